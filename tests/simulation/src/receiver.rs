//! A simulated receiver process: the real sessions over a simulated store and network.
//!
//! Read first: [`Receiver`].

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::limits::Limits;
use backhaul_receiver::server::{ServerSettings, Shared};
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::RetrySettings;
use backhaul_receiver::store::retry::Retrying;
use backhaul_transport::authority::Authority;
use backhaul_transport::link::Link;
use backhaul_transport::tls::AgentIdentity;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::bucket::{Bucket, Door, Weather};
use crate::chance::Chance;
use crate::gate::{Gate, Process};

/// Small enough that points of a few blocks have segments, deltas and bases.
const LIMITS: Limits = Limits { inline: 36_000, segments: 4, entries: 40, deltas: 3, checkpoint_interval: 5 };

/// A place where a receiver can run.
pub struct Receiver {
    bucket: Arc<Bucket>,
    chance: Chance,
    /// Its luck with the store; survives restarts.
    pub weather: Arc<Mutex<Weather>>,
    running: Option<Running>,
}

struct Running {
    gate: Gate,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
    sessions: Vec<JoinHandle<()>>,
}

impl Receiver {
    /// Not started.
    pub fn new(bucket: Arc<Bucket>, chance: Chance) -> Self {
        Self { bucket, chance, weather: Arc::default(), running: None }
    }
    /// What the process does; `None` if there is none.
    pub fn process(&self) -> Option<Process> {
        self.running.as_ref().map(|r| r.gate.process())
    }
    /// Its gate.
    pub fn gate(&self) -> Option<Gate> {
        self.running.as_ref().map(|r| r.gate.clone())
    }

    /// A store as a process behind `gate` reaches it.
    pub fn store(&self, gate: Gate) -> Arc<dyn ObjectStore> {
        let door = Door::new(self.bucket.clone(), gate, self.weather.clone(), self.chance.clone());
        let retry = RetrySettings { seed: Some(self.chance.below(u64::MAX)), ..RetrySettings::default() };
        Arc::new(Retrying::new(door, retry))
    }

    /// Starts it, unless it runs or the store can't be read.
    pub async fn start(&mut self) -> bool {
        if self.running.is_some() {
            return true;
        }
        let gate = Gate::default();
        let opened = tokio::time::timeout(Duration::from_secs(30), Catalog::open(self.store(gate.clone()))).await;
        let Ok(Ok(catalog)) = opened else { return false };
        let settings =
            ServerSettings { memory: 1 << 20, segment_size: 80 << 10, limits: LIMITS, ..ServerSettings::default() };
        let shared = Shared::new(catalog, authority(), settings);
        self.running = Some(Running { gate, shared, shutdown: CancellationToken::new(), sessions: Vec::new() });
        true
    }

    /// Kill -9.
    pub fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            running.gate.set(Process::Dead);
            running.sessions.iter().for_each(JoinHandle::abort);
        }
    }

    /// SIGTERM: sessions may finish.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown.cancel();
            tokio::spawn(async move {
                // What its service manager does after 90 s.
                tokio::time::sleep(Duration::from_secs(90)).await;
                running.gate.set(Process::Dead);
                running.sessions.iter().for_each(JoinHandle::abort);
            });
        }
    }

    /// SIGSTOP and SIGCONT.
    pub fn pause(&self, paused: bool) {
        if let Some(running) = &self.running {
            running.gate.set(if paused { Process::Paused } else { Process::Running });
        }
    }

    /// Serves a connection.
    pub fn serve(&mut self, link: Arc<dyn Link>, identity: AgentIdentity) {
        if let Some(running) = &mut self.running {
            let session =
                backhaul_receiver::session::run_agent(running.shared.clone(), link, identity, running.shutdown.clone());
            running.sessions.push(tokio::spawn(session));
        }
    }
}

fn authority() -> Authority {
    static AUTHORITY: OnceLock<(String, String)> = OnceLock::new();
    let (certificate, key) =
        AUTHORITY.get_or_init(|| Authority::generate(SystemTime::now()).expect("an authority can be made"));
    Authority::from_pem(certificate, key).expect("just made")
}
