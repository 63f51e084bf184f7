//! When agents were here: told to the store now and then, by the one receiver that has them.
//!
//! Read first: [`Seen::note`]. A PUT for every round of every agent would cost more than the rounds themselves.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use backhaul_protocol::ids::AgentId;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::clock;
use backhaul_transport::tls::AgentIdentity;
use tokio::time::Instant;

use crate::access;
use crate::store::{ObjectStore, StoreError};

/// How old what the store says of a connected agent may be. Arbitrary.
const INTERVAL: Duration = Duration::from_secs(60);
/// Agents that are remembered; 40 bytes each. Arbitrary.
const MAX_AGENTS: usize = 10_000;

/// What was told of whom.
#[derive(Debug, Default)]
pub struct Seen(Mutex<HashMap<AgentId, (Instant, UnixMillis)>>);

impl Seen {
    /// The agent is here, with a certificate until then. Writes it down unless that was done a moment ago.
    pub async fn note(&self, store: &dyn ObjectStore, identity: &AgentIdentity) -> Result<(), StoreError> {
        if self.is_due(identity.agent, identity.not_after) {
            access::write_seen(store, identity, clock::now()).await?;
            self.told(identity.agent, identity.not_after);
        }
        Ok(())
    }

    fn is_due(&self, agent: AgentId, until: UnixMillis) -> bool {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        told.get(&agent).is_none_or(|(at, known)| at.elapsed() >= INTERVAL || *known != until)
    }

    fn told(&self, agent: AgentId, until: UnixMillis) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= MAX_AGENTS {
            told.retain(|_, (at, _)| at.elapsed() < INTERVAL);
        }
        if told.len() < MAX_AGENTS {
            told.insert(agent, (Instant::now(), until));
        }
    }
}
