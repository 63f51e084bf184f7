//! The server: accepts connections, and keeps what sessions share.
//!
//! Read first: [`Server::run`], then [`crate::session`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use backhaul_protocol::ids::GroupId;
use backhaul_protocol::store::checkpoint::Sharing;
use backhaul_protocol::wire::message::CloseCode;
use backhaul_transport::authority::Authority;
use backhaul_transport::endpoint::{Endpoint, Windows};
use backhaul_transport::error::TransportError;
use backhaul_transport::tls::server_config;
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, watch};
use tokio::task::JoinSet;

use crate::catalog::Catalog;
use crate::round::{GroupState, RoundResources};
use crate::segment_writer::Budget;

/// What can be set.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Memory of open segments and uploads, bytes.
    pub memory: usize,
    /// Segments are sealed at this size, bytes.
    pub segment_size: usize,
    /// Agents that may be connected at once.
    pub max_sessions: usize,
    /// How often a live session's agent is looked up among the revoked.
    pub revocation_check: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 4433)),
            // With QUIC windows and the indexes of open rounds this stays under 256 MiB.
            memory: 96 << 20,
            segment_size: backhaul_protocol::limits::DEFAULT_SEGMENT_SIZE as usize,
            max_sessions: 200,
            // A revoked agent is thrown out within 30 s; this leaves room for a slow store.
            revocation_check: Duration::from_secs(10),
        }
    }
}

/// A group that somebody writes to: its state, and how to take it over.
#[derive(Debug)]
pub struct GroupSlot {
    /// Held by the session that writes.
    pub state: Arc<AsyncMutex<GroupState>>,
    holder: Mutex<Option<Arc<Notify>>>,
    last_hint: Mutex<Option<Instant>>,
}

/// The head hint is written at most this often.
const HINT_INTERVAL: Duration = Duration::from_secs(30);

impl GroupSlot {
    /// Tells the session that writes to give way; the new one is told when a newer one comes.
    pub fn take_over(&self, own: Arc<Notify>) {
        let older = lock(&self.holder).replace(own.clone());
        if let Some(older) = older.filter(|o| !Arc::ptr_eq(o, &own)) {
            older.notify_one();
        }
    }
    /// Whether the hint may be written again.
    pub fn hint_is_due(&self) -> bool {
        let mut last = lock(&self.last_hint);
        let due = last.is_none_or(|t| t.elapsed() >= HINT_INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What sessions share.
#[derive(Debug)]
pub struct Shared {
    /// The store.
    pub catalog: Catalog,
    /// Signs certificates.
    pub authority: AuthorityHandle,
    /// Memory and threads.
    pub resources: RoundResources,
    /// As set.
    pub settings: ServerSettings,
    groups: Mutex<HashMap<GroupId, Arc<GroupSlot>>>,
    /// Sessions that are open.
    pub sessions: AtomicUsize,
    /// Numbers sessions in logs.
    pub session_numbers: AtomicU64,
}

/// The authority, which has no useful text form.
pub struct AuthorityHandle(pub Authority);

impl std::fmt::Debug for AuthorityHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Shared {
    /// The slot of a group.
    pub fn slot(&self, group: GroupId) -> Arc<GroupSlot> {
        let mut groups = lock(&self.groups);
        let new = || {
            Arc::new(GroupSlot {
                state: Arc::new(AsyncMutex::new(GroupState::new(self.catalog.log(group)))),
                holder: Mutex::default(),
                last_hint: Mutex::default(),
            })
        };
        groups.entry(group).or_insert_with(new).clone()
    }
}

/// A receiver that listens.
pub struct Server {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

impl Server {
    /// Binds the socket.
    pub fn bind(catalog: Catalog, authority: Authority, settings: ServerSettings) -> Result<Self, TransportError> {
        let own = authority.issue_receiver(SystemTime::now())?;
        let tls = server_config(&authority, own)?;
        let endpoint = Endpoint::server(settings.listen, tls, Windows::UNKNOWN_PEER)?;
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let resources = RoundResources {
            budget: Budget::new(settings.memory),
            verifiers: Arc::new(Semaphore::new(threads)),
            segment_size: settings.segment_size,
        };
        if catalog.format.sharing == Sharing::OneReceiver {
            tracing::warn!("this store has no atomic conditional write: never run a second receiver on it");
        }
        let shared = Arc::new(Shared {
            catalog,
            authority: AuthorityHandle(authority),
            resources,
            settings,
            groups: Mutex::default(),
            sessions: AtomicUsize::new(0),
            session_numbers: AtomicU64::new(1),
        });
        Ok(Self { endpoint, shared })
    }

    /// The address that it is bound to.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown` turns true; then lets the sessions end: commits that are under way are finished, what
    /// has arrived otherwise stays as drafts.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) {
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = crate::session::stopped(&mut shutdown) => break,
                incoming = self.endpoint.accept() => {
                    let Some(incoming) = incoming else { break };
                    if self.shared.sessions.load(Ordering::Relaxed) >= self.shared.settings.max_sessions {
                        incoming.refuse();
                        continue;
                    }
                    // Under load strangers must show that they receive what is sent to their address.
                    if self.endpoint.open_connections() > self.shared.settings.max_sessions / 2
                        && !incoming.remote_address_validated()
                    {
                        let _ = incoming.retry();
                        continue;
                    }
                    let (shared, stop) = (self.shared.clone(), shutdown.clone());
                    sessions.spawn(crate::session::run(shared, incoming, stop));
                }
                Some(_) = sessions.join_next() => {}
            }
        }
        let drained = async { while sessions.join_next().await.is_some() {} };
        if tokio::time::timeout(Duration::from_secs(30), drained).await.is_err() {
            tracing::warn!("sessions did not end within 30 s; what had arrived is sent again");
        }
        self.endpoint.close(CloseCode::ShuttingDown, "the receiver is shutting down").await;
    }
}
