//! The server: accepts connections, and keeps what sessions share.
//!
//! Read first: [`Server::run`], then [`crate::session`].

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backhaul_protocol::ids::{AgentId, CommitId, GroupId, LogSeq};
use backhaul_protocol::store::checkpoint::Sharing;
use backhaul_protocol::wire::message::CloseCode;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::{clock, random};
use backhaul_transport::authority::Authority;
use backhaul_transport::endpoint::{Endpoint, Medium, Serving, Windows};
use backhaul_transport::error::TransportError;
use backhaul_transport::tls::server_config;
use backhaul_transport::tuning::Tuning;
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, GroupLog};
use crate::credit::Credit;
use crate::limits::Limits;
use crate::measuring::AT_ONCE;
use crate::metrics::Counts;
use crate::quota::Quota;
use crate::read_error::ReadError;
use crate::round::{GroupState, RoundResources};
use crate::seen::Seen;
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
    /// When to fold.
    pub limits: Limits,
    /// How connections treat their path.
    pub tuning: Tuning,
    /// Where Prometheus is answered.
    pub metrics: Option<SocketAddr>,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 4433)),
            // Of 50 sessions before a bucket that takes nothing the process then held 212 MiB at most, credit of QUIC and
            // copies of the HTTP client included (tests/e2e/stalled_store.rs); 256 are promised.
            memory: 64 << 20,
            segment_size: backhaul_protocol::limits::DEFAULT_SEGMENT_SIZE as usize,
            max_sessions: 200,
            // A revoked agent is thrown out within 30 s; this leaves room for a slow store.
            revocation_check: Duration::from_secs(10),
            limits: Limits::default(),
            tuning: Tuning::default(),
            metrics: None,
        }
    }
}

/// Handshakes at once. 64 KiB of credit each.
const MAX_HANDSHAKES: usize = 256;
/// Of these, from one address. Many agents may be behind one, and a handshake takes milliseconds.
const MAX_HANDSHAKES_OF_ONE_ADDRESS: usize = 32;
/// Connections without a certificate, which may join.
const MAX_STRANGERS: usize = 64;
/// Of these, from one address.
const MAX_STRANGERS_OF_ONE_ADDRESS: usize = 32;
/// Sessions of one agent: its service, and restores beside it. 8 MiB of credit each to begin with.
const MAX_SESSIONS_OF_ONE_AGENT: usize = 8;

/// A group that somebody writes to: its state, and how to take it over.
#[derive(Debug)]
pub struct GroupSlot {
    /// Held by the session that writes.
    pub state: Arc<AsyncMutex<GroupState>>,
    writer: Mutex<Writer>,
    /// Apart from the slot: it is written while nobody waits.
    pub hint: Arc<HeadHint>,
}

/// The head hint is written at most this often.
const HINT_INTERVAL: Duration = Duration::from_secs(30);

/// Groups that are remembered without a session. Arbitrary; 32 bytes each.
const MAX_CLEAN: usize = 10_000;

/// What is remembered of groups.
#[derive(Debug, Default)]
struct Groups {
    /// Those that have a session.
    slots: HashMap<GroupId, Arc<GroupSlot>>,
    /// Of those that had one, or that an agent joined: the newest commit, where nothing was left on it that waits for the
    /// next session. No draft is looked for then.
    clean: HashMap<GroupId, Option<Clean>>,
}

/// A commit on which nothing waits for the next session.
#[derive(Clone, Copy, Debug)]
struct Clean {
    commit: CommitId,
    since: Instant,
}

/// How long nobody is expected to have left a draft through another receiver: what it took meanwhile would be sent again.
const CLEAN_FOR: Duration = Duration::from_secs(60);

/// Which session is the group's writer.
#[derive(Debug, Default)]
struct Writer {
    /// Told when a newer one comes.
    superseded: Option<Arc<Notify>>,
    /// The session that has the group's state, from before it is known whether it may write: told too, or one that waits
    /// for the store would keep everybody out for as long as it waits.
    holder: Option<Arc<Notify>>,
    /// How many there were.
    count: u64,
}

impl GroupSlot {
    /// How many writers there were.
    pub fn writers(&self) -> u64 {
        lock(&self.writer).count
    }

    /// Tells the session that writes to give way; the new one is told when a newer one comes. Gives its number.
    pub fn take_over(&self, own: Arc<Notify>) -> u64 {
        let mut writer = lock(&self.writer);
        writer.count += 1;
        let (older, holder) = (writer.superseded.replace(own.clone()), writer.holder.take());
        let others = |o: &Arc<Notify>| !Arc::ptr_eq(o, &own) && !planted(Mutant::OlderNotTold);
        for older in [older, holder].into_iter().flatten().filter(others) {
            older.notify_one();
        }
        writer.count
    }

    /// This session has the group's state now.
    pub fn hold(&self, own: Arc<Notify>) {
        if !planted(Mutant::HolderNotTold) {
            lock(&self.writer).holder = Some(own);
        }
    }

    /// The same, unless there was a newer one since there were so many: an older session must not end it.
    pub fn take_over_at(&self, count: u64, own: Arc<Notify>) -> bool {
        let is_newest = lock(&self.writer).count == count;
        if is_newest {
            self.take_over(own);
        }
        is_newest
    }
}

/// When the head hint is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HintWhen {
    /// Half a minute after the last time.
    Due,
    /// Nobody comes to write it later.
    Now,
}

/// What the head hint tells, and what it should.
#[derive(Debug, Default)]
pub struct HeadHint {
    state: Mutex<HintState>,
    /// Held while it is written: a slow write must not put an older one in the place of a newer one.
    writing: AsyncMutex<()>,
}

#[derive(Debug, Default)]
struct HintState {
    written: Option<Instant>,
    untold: Option<LogSeq>,
}

impl HeadHint {
    /// A record was appended that the hint does not tell of.
    pub fn appended(&self, seq: LogSeq) {
        lock(&self.state).untold = Some(seq);
    }

    /// Whether there is something to tell, and it is time.
    pub fn is_due(&self, when: HintWhen) -> bool {
        let hint = lock(&self.state);
        hint.untold.is_some() && (when == HintWhen::Now || hint.written.is_none_or(|t| t.elapsed() >= HINT_INTERVAL))
    }

    /// Writes what is not told yet.
    pub async fn write(&self, log: &GroupLog) -> Result<(), ReadError> {
        let _one_at_a_time = self.writing.lock().await;
        let Some(seq) = lock(&self.state).untold.take() else { return Ok(()) };
        lock(&self.state).written = Some(Instant::now());
        let written = log.write_hint(seq).await;
        if written.is_err() {
            // Unless there is a newer one.
            lock(&self.state).untold.get_or_insert(seq);
        }
        written
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
    groups: Mutex<Groups>,
    /// Connections whose handshake is under way.
    pub handshakes: Arc<Quota<IpAddr>>,
    /// Connections without a certificate.
    pub strangers: Arc<Quota<IpAddr>>,
    /// Sessions that are open.
    pub sessions: Arc<Quota<AgentId>>,
    /// For what agents send and is not read yet.
    pub credit: Arc<Credit>,
    /// Numbers sessions in logs.
    pub session_numbers: AtomicU64,
    /// When agents were here.
    pub seen: Seen,
    /// Whose path is measured.
    pub measured: Arc<Semaphore>,
    /// For metrics.
    pub counts: Arc<Counts>,
}

/// What sessions hold at this moment: nothing of it when there are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InUse {
    /// Connections whose handshake is under way.
    pub handshakes: usize,
    /// Connections without a certificate.
    pub strangers: usize,
    /// Sessions that are open.
    pub sessions: usize,
    /// Groups of which something is remembered.
    pub groups: usize,
    /// Credit of QUIC, bytes.
    pub credit: u32,
    /// Memory for segments, bytes.
    pub memory: usize,
    /// Paths that are measured.
    pub measured: usize,
}

/// The authority, which has no useful text form.
pub struct AuthorityHandle(pub Authority);

impl std::fmt::Debug for AuthorityHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Shared {
    /// What the sessions of a receiver share that has just started.
    pub fn new(catalog: Catalog, authority: Authority, settings: ServerSettings) -> Arc<Self> {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let resources = RoundResources {
            budget: Budget::new(settings.memory),
            verifiers: Arc::new(Semaphore::new(threads)),
            segment_size: settings.segment_size,
            limits: settings.limits,
        };
        let sessions = Quota::new(settings.max_sessions, MAX_SESSIONS_OF_ONE_AGENT);
        Arc::new(Self {
            catalog,
            authority: AuthorityHandle(authority),
            resources,
            settings,
            groups: Mutex::default(),
            handshakes: Quota::new(MAX_HANDSHAKES, MAX_HANDSHAKES_OF_ONE_ADDRESS),
            strangers: Quota::new(MAX_STRANGERS, MAX_STRANGERS_OF_ONE_ADDRESS),
            sessions,
            credit: Credit::new(),
            session_numbers: AtomicU64::new(1),
            seen: Seen::default(),
            measured: Arc::new(Semaphore::new(AT_ONCE)),
            counts: Arc::default(),
        })
    }

    /// The slot of a group.
    pub fn slot(shared: &Arc<Self>, group: GroupId) -> SlotInUse {
        let mut groups = lock(&shared.groups);
        let Groups { slots, clean } = &mut *groups;
        let sharing = shared.catalog.format.sharing;
        let is_new = |clean: &Clean| sharing == Sharing::OneReceiver || clean.since.elapsed() < CLEAN_FOR;
        let mut new = || {
            let clean = clean.remove(&group).flatten().filter(is_new).map(|clean| clean.commit);
            Arc::new(GroupSlot {
                state: Arc::new(AsyncMutex::new(GroupState::new(shared.catalog.log(group), clean))),
                writer: Mutex::default(),
                hint: Arc::default(),
            })
        };
        let slot = match planted(Mutant::GroupsNotShared) {
            false => slots.entry(group).or_insert_with(new).clone(),
            true => new(),
        };
        SlotInUse { shared: shared.clone(), group, slot: Some(slot) }
    }

    /// An agent joined the group here. If it is new, its first session need not look for a draft.
    pub async fn joined(&self, group: GroupId) -> Result<(), ReadError> {
        let log = self.catalog.log(group);
        let Some((create, _)) = log.read(LogSeq(0)).await? else { return Ok(()) };
        let keys = log.keys();
        for prefix in [keys.draft_segments(create.generation, LogSeq(0)), keys.draft_maps(create.generation, LogSeq(0))]
        {
            if !self.catalog.store.list(&prefix, None, 1).await?.is_empty() {
                return Ok(());
            }
        }
        let mut groups = lock(&self.groups);
        if !groups.slots.contains_key(&group) && groups.clean.len() < MAX_CLEAN {
            let clean = Clean { commit: create.commit, since: Instant::now() };
            groups.clean.entry(group).or_insert(Some(clean));
        }
        Ok(())
    }

    /// Groups of which something is remembered.
    pub fn groups_in_use(&self) -> usize {
        lock(&self.groups).slots.len()
    }

    /// What sessions hold.
    pub fn in_use(&self) -> InUse {
        InUse {
            handshakes: self.handshakes.inside(),
            strangers: self.strangers.inside(),
            sessions: self.sessions.inside(),
            groups: self.groups_in_use(),
            credit: self.credit.granted(),
            memory: self.resources.budget.taken(),
            measured: AT_ONCE - self.measured.available_permits(),
        }
    }
}

/// A group's slot while a session needs it. What is known of a group takes up to some 40 MiB and can be read from the
/// store again: it is forgotten with the last session.
#[derive(Debug)]
pub struct SlotInUse {
    shared: Arc<Shared>,
    group: GroupId,
    /// Until it is dropped.
    slot: Option<Arc<GroupSlot>>,
}

impl std::ops::Deref for SlotInUse {
    type Target = GroupSlot;
    fn deref(&self) -> &GroupSlot {
        self.slot.as_deref().expect("only `drop` takes it")
    }
}

impl Drop for SlotInUse {
    fn drop(&mut self) {
        let mut groups = lock(&self.shared.groups);
        // All others are made and dropped under the same lock, but for the map's.
        drop(self.slot.take());
        let Some(slot) = groups.slots.get(&self.group).filter(|slot| Arc::strong_count(slot) == 1) else { return };
        let commit = slot.state.try_lock().ok().and_then(|state| state.clean());
        groups.slots.remove(&self.group);
        let clean = commit.map(|commit| Clean { commit, since: Instant::now() });
        if groups.clean.len() >= MAX_CLEAN {
            groups.clean.clear();
        }
        groups.clean.insert(self.group, clean);
    }
}

/// Whose a connection is, as far as an address tells: of IPv6 the network, in which one host may have any address.
pub fn origin(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & (u128::MAX << 64)).into()),
        v4 => v4,
    }
}

/// The same at every start of this receiver. One of the same authority on another machine has another: it would sign
/// resets for connections that are not its own.
fn reset_key(authority: &Authority) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&authority.reset_key());
    // Where there is none, resets are still this authority's.
    hasher.update(&std::fs::read("/etc/machine-id").unwrap_or_default());
    if planted(Mutant::ResetKeyMadeAnew) {
        hasher.update(&random::bytes::<16>());
    }
    *hasher.finalize().as_bytes()
}

fn serving(authority: &Authority, tuning: Tuning) -> Result<Serving, TransportError> {
    let own = authority.issue_receiver(clock::now())?;
    let tls = server_config(authority, own)?;
    Ok(Serving { tls, windows: Windows::UNKNOWN_PEER, reset_key: reset_key(authority), tuning })
}

/// A receiver that listens.
pub struct Server {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

impl Server {
    /// Binds the socket.
    pub fn bind(catalog: Catalog, authority: Authority, settings: ServerSettings) -> Result<Self, TransportError> {
        let endpoint = Endpoint::server(settings.listen, serving(&authority, settings.tuning)?)?;
        Ok(Self::with_endpoint(endpoint, catalog, authority, settings))
    }

    /// Over a medium that is given.
    pub fn over(
        medium: Medium,
        catalog: Catalog,
        authority: Authority,
        settings: ServerSettings,
    ) -> Result<Self, TransportError> {
        let endpoint = Endpoint::over(medium, Some(serving(&authority, settings.tuning)?))?;
        Ok(Self::with_endpoint(endpoint, catalog, authority, settings))
    }

    fn with_endpoint(endpoint: Endpoint, catalog: Catalog, authority: Authority, settings: ServerSettings) -> Self {
        if catalog.format.sharing == Sharing::OneReceiver {
            tracing::warn!("this store has no atomic conditional write: never run a second receiver on it");
        }
        Self { endpoint, shared: Shared::new(catalog, authority, settings) }
    }

    /// What its sessions share, to be watched.
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// The address that it is bound to.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown`; then lets the sessions end: commits that are under way are finished, what
    /// has arrived otherwise stays as drafts.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                incoming = self.endpoint.accept() => {
                    let Some(incoming) = incoming else { break };
                    // Under load strangers must show that they receive what is sent to their address; until then they
                    // cost nothing.
                    let crowded = self.shared.handshakes.inside() >= MAX_HANDSHAKES_OF_ONE_ADDRESS / 2;
                    if crowded && !incoming.remote_address_validated() {
                        let _ = incoming.retry();
                        continue;
                    }
                    let Ok(ticket) = self.shared.handshakes.enter(origin(incoming.remote_address())) else {
                        tracing::info!(from = %incoming.remote_address(), "too many handshakes: refused a connection");
                        incoming.refuse();
                        continue;
                    };
                    let (shared, stop) = (self.shared.clone(), shutdown.clone());
                    sessions.spawn(crate::session::run(shared, incoming, ticket, stop));
                }
                Some(_) = sessions.join_next() => {}
            }
        }
        let drained = async { while sessions.join_next().await.is_some() {} };
        if planted(Mutant::ShutdownWaitsForNobody) {
            return self.endpoint.close(CloseCode::ShuttingDown, "").await;
        }
        if tokio::time::timeout(Duration::from_secs(30), drained).await.is_err() {
            tracing::warn!("sessions did not end within 30 s; what had arrived is sent again");
        }
        self.endpoint.close(CloseCode::ShuttingDown, "the receiver is shutting down").await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;
    use crate::testing::TestGroup;

    #[tokio::test]
    async fn a_group_that_no_session_uses_is_forgotten() {
        let group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
        let (certificate, key) = Authority::generate(clock::now()).expect("a key");
        let authority = Authority::from_pem(&certificate, &key).expect("just made");
        let settings = ServerSettings { listen: ([127, 0, 0, 1], 0).into(), ..ServerSettings::default() };
        let server = Server::bind(group.catalog.clone(), authority, settings).expect("a free port");
        let own = GroupId([1; 16]);
        let (one, two) = (Shared::slot(&server.shared, own), Shared::slot(&server.shared, own));
        let other = Shared::slot(&server.shared, GroupId([2; 16]));
        assert!(std::ptr::eq(&*one, &*two), "sessions of one group share what is known");
        assert_eq!(server.shared.groups_in_use(), 2);
        drop((one, other));
        assert_eq!(server.shared.groups_in_use(), 1);
        drop(two);
        assert_eq!(server.shared.groups_in_use(), 0);
    }

    fn is_told(session: &Notify) -> bool {
        let mut told = std::pin::pin!(session.notified());
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        told.as_mut().poll(&mut cx).is_ready()
    }

    /// A session that waits for the store while it opens has the group's state and does not write yet.
    #[tokio::test]
    async fn who_opens_and_who_writes_hear_of_a_newer_session_and_that_one_does_not() {
        let group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
        let (certificate, key) = Authority::generate(clock::now()).expect("a key");
        let authority = Authority::from_pem(&certificate, &key).expect("just made");
        let shared = Shared::new(group.catalog.clone(), authority, ServerSettings::default());
        let slot = Shared::slot(&shared, GroupId([1; 16]));
        let [opens, newer, newest] = [(); 3].map(|()| Arc::new(Notify::new()));
        let before = slot.writers();
        slot.hold(opens.clone());
        slot.take_over(newer.clone());
        assert!(is_told(&opens) && !is_told(&newer), "who holds the state gives way (I4)");
        assert!(!slot.take_over_at(before, opens.clone()), "and does not end the newer one when it has opened");
        assert!(!is_told(&newer));
        // The same one holds and writes.
        slot.hold(newer.clone());
        assert!(slot.take_over_at(slot.writers(), newer.clone()) && !is_told(&newer));
        slot.take_over(newest.clone());
        assert!(is_told(&newer) && !is_told(&newest) && !is_told(&opens), "each is told once, by the next one");
    }
}
