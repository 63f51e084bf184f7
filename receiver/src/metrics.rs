//! What Prometheus is told of a receiver. `docs/metrics.md` lists it all; a test compares.
//!
//! Read first: [`Counts`], then [`render`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_cli::metrics::{Exposition, Kind, Metric, resident_bytes, serve};
use backhaul_protocol::ids::GroupId;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::clock;
use tokio::net::TcpListener;

use crate::metering::{BUCKETS, RESULTS, StoreCounts, VERBS};
use crate::server::Shared;

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, help }
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, help }
}

const INFO: Metric = gauge("backhaul_receiver_info", "Always 1; the version is in the label.");
const SESSIONS: Metric = gauge("backhaul_receiver_sessions", "Sessions that are open.");
const MAX_SESSIONS: Metric = gauge("backhaul_receiver_sessions_limit", "As many sessions may be open.");
const AGENTS: Metric = gauge("backhaul_receiver_agents", "Sessions by what they do.");
const HANDSHAKES: Metric = gauge("backhaul_receiver_handshakes", "Connections whose handshake is under way.");
const REFUSALS: Metric = counter("backhaul_receiver_refusals_total", "Requests of agents that were refused.");
const POINTS: Metric = counter("backhaul_receiver_points_total", "Points that were committed here.");
const INGESTED: Metric =
    counter("backhaul_receiver_ingested_bytes_total", "Block records that were taken and verified.");
const STORED: Metric = counter("backhaul_receiver_stored_bytes_total", "Bytes that were written to the store.");
const FETCHED: Metric = counter("backhaul_receiver_fetched_bytes_total", "Bytes that were read from the store.");
const REQUESTS: Metric =
    counter("backhaul_receiver_store_requests_total", "Requests to the store by kind and by how they ended.");
const LATENCY: Metric = Metric {
    name: "backhaul_receiver_store_request_seconds",
    kind: Kind::Histogram,
    help: "How long requests to the store took, with all that was tried again.",
};
const WAITING: Metric =
    gauge("backhaul_receiver_store_waiting_seconds", "How long the store has not answered a request; 0: it answers.");
const MEMORY: Metric = gauge("backhaul_receiver_segment_memory_bytes", "Memory of open segments and uploads.");
const MEMORY_LIMIT: Metric = gauge("backhaul_receiver_segment_memory_limit_bytes", "What that may be.");
const CREDIT: Metric = gauge("backhaul_receiver_credit_bytes", "What agents may send before it is read.");
const RESIDENT: Metric = gauge("backhaul_receiver_resident_memory_bytes", "Memory that the process takes.");
const POINT_AGE: Metric = gauge("backhaul_receiver_newest_point_age_seconds", "Age of a group's newest point.");
const LAG: Metric =
    gauge("backhaul_receiver_lag_seconds", "Age of the last moment at which a group was equal to its newest point.");
const FORGOTTEN: Metric =
    counter("backhaul_receiver_groups_forgotten_total", "Groups that are left out above, since there are too many.");

/// Groups that are told apart: a sample each in two families. Those that were heard of longest ago are left out.
const MAX_GROUPS: usize = 1000;

/// What a session does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// Nothing.
    Idle,
    /// It makes a point.
    Writing,
    /// It restores.
    Reading,
}

/// As they are written.
const DOINGS: [(&str, Doing); 3] = [("idle", Doing::Idle), ("writing", Doing::Writing), ("reading", Doing::Reading)];

/// What is known of a group.
#[derive(Clone, Debug)]
struct Group {
    name: String,
    point: Option<UnixMillis>,
    /// Equal to the newest point at this time.
    equal: Option<UnixMillis>,
    heard: UnixMillis,
}

/// What sessions count.
#[derive(Debug, Default)]
pub struct Counts {
    doing: [AtomicUsize; 3],
    points: AtomicU64,
    refusals: AtomicU64,
    forgotten: AtomicU64,
    groups: Mutex<BTreeMap<GroupId, Group>>,
}

impl Counts {
    /// A session that does nothing yet.
    pub fn session(self: &Arc<Self>) -> Counted {
        self.doing[Doing::Idle as usize].fetch_add(1, Ordering::Relaxed);
        Counted { counts: self.clone(), doing: Doing::Idle }
    }

    /// Something was refused.
    pub fn refused(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    /// A point of a group was committed; by its agent's clock it began at `at`.
    pub fn committed(&self, group: GroupId, at: UnixMillis) {
        self.points.fetch_add(1, Ordering::Relaxed);
        self.change(group, |g| (g.point, g.equal) = (Some(at), Some(at)));
    }

    /// The volumes of a group were equal to its newest point at this time.
    pub fn still_equal(&self, group: GroupId, at: UnixMillis) {
        self.change(group, |g| g.equal = g.equal.max(Some(at)));
    }

    /// Whether a group has a name here.
    pub fn knows(&self, group: GroupId) -> bool {
        self.groups().contains_key(&group)
    }

    /// A group was opened; its newest point began at `point`.
    pub fn opened(&self, group: GroupId, name: &str, point: Option<UnixMillis>) {
        let mut groups = self.groups();
        if groups.len() >= MAX_GROUPS && !groups.contains_key(&group) {
            let oldest = groups.iter().min_by_key(|(_, g)| g.heard).map(|(id, _)| *id);
            oldest.iter().for_each(|id| drop(groups.remove(id)));
            self.forgotten.fetch_add(1, Ordering::Relaxed);
        }
        let heard = UnixMillis(clock::unix_millis());
        groups.entry(group).or_insert(Group { name: name.to_owned(), point, equal: point, heard });
    }

    fn change(&self, group: GroupId, change: impl FnOnce(&mut Group)) {
        if let Some(group) = self.groups().get_mut(&group) {
            group.heard = UnixMillis(clock::unix_millis());
            change(group);
        }
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Group>> {
        // Nothing in here panics half-way through a change.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that is counted until this is dropped.
#[derive(Debug)]
pub struct Counted {
    counts: Arc<Counts>,
    doing: Doing,
}

impl Counted {
    /// It does something else now.
    pub fn does(&mut self, doing: Doing) {
        self.counts.doing[self.doing as usize].fetch_sub(1, Ordering::Relaxed);
        self.counts.doing[doing as usize].fetch_add(1, Ordering::Relaxed);
        self.doing = doing;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.doing[self.doing as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Listens for as long as the process lives. That it can't is said, and no reason to take nothing.
pub async fn start(at: SocketAddr, shared: Arc<Shared>, store: Arc<StoreCounts>) {
    match TcpListener::bind(at).await {
        Ok(listener) => {
            let local = listener.local_addr().map_or_else(|_| at.to_string(), |at| at.to_string());
            tracing::info!("metrics are at http://{local}/metrics");
            tokio::spawn(serve(listener, move || render(&shared, &store, clock::unix_millis())));
        }
        Err(error) => tracing::error!(%error, "no metrics: can't listen on {at}"),
    }
}

/// All of them. `now` is in ms since 1970.
pub fn render(shared: &Shared, store: &StoreCounts, now: i64) -> String {
    let (counts, used) = (&shared.counts, shared.in_use());
    let of = |n: &AtomicU64| Some(n.load(Ordering::Relaxed) as f64);
    let mut out = Exposition::default();
    out.family(&INFO);
    out.sample(&INFO, "", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    out.one(&SESSIONS, Some(used.sessions as f64));
    out.one(&MAX_SESSIONS, Some(shared.settings.max_sessions as f64));
    out.family(&AGENTS);
    for (name, doing) in DOINGS {
        out.sample(&AGENTS, "", &[("doing", name)], counts.doing[doing as usize].load(Ordering::Relaxed) as f64);
    }
    out.one(&HANDSHAKES, Some(used.handshakes as f64));
    out.one(&REFUSALS, of(&counts.refusals));
    out.one(&POINTS, of(&counts.points));
    out.one(&INGESTED, Some(shared.resources.budget.ingested() as f64));
    out.one(&STORED, of(&store.written));
    out.one(&FETCHED, of(&store.read));
    render_requests(&mut out, store);
    let waits = shared.catalog.store.waits().and_then(|w| w.longest());
    out.one(&WAITING, Some(waits.map_or(0.0, |w| w.since.elapsed().as_secs_f64())));
    out.one(&MEMORY, Some(used.memory as f64));
    out.one(&MEMORY_LIMIT, Some(shared.settings.memory as f64));
    out.one(&CREDIT, Some(f64::from(used.credit)));
    out.one(&RESIDENT, resident_bytes().map(|n| n as f64));
    let groups: Vec<Group> = counts.groups().values().cloned().collect();
    let mut ages = |metric: &Metric, of: fn(&Group) -> Option<UnixMillis>| {
        out.family(metric);
        for group in &groups {
            let age = of(group).map(|at| now.saturating_sub(at.0).max(0) as f64 / 1e3);
            age.into_iter().for_each(|age| out.sample(metric, "", &[("group", &group.name)], age));
        }
    };
    ages(&POINT_AGE, |g| g.point);
    ages(&LAG, |g| g.equal);
    out.one(&FORGOTTEN, of(&counts.forgotten));
    out.into_text()
}

fn render_requests(out: &mut Exposition, store: &StoreCounts) {
    out.family(&REQUESTS);
    for (verb, counts) in VERBS.iter().zip(&store.verbs) {
        for (result, n) in RESULTS.iter().zip(&counts.results) {
            out.sample(&REQUESTS, "", &[("verb", verb), ("result", result)], n.load(Ordering::Relaxed) as f64);
        }
    }
    out.family(&LATENCY);
    for (verb, counts) in VERBS.iter().zip(&store.verbs) {
        let mut all = 0;
        for (i, n) in counts.buckets.iter().enumerate() {
            all += n.load(Ordering::Relaxed);
            let most = BUCKETS.get(i).map_or("+Inf".to_owned(), ToString::to_string);
            out.sample(&LATENCY, "_bucket", &[("verb", verb), ("le", &most)], all as f64);
        }
        let seconds = counts.micros.load(Ordering::Relaxed) as f64 / 1e6;
        out.sample(&LATENCY, "_sum", &[("verb", verb)], seconds);
        out.sample(&LATENCY, "_count", &[("verb", verb)], all as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_bounded_and_the_oldest_are_left_out() {
        let counts = Counts::default();
        let id = |n: usize| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            GroupId(id)
        };
        for n in 0..MAX_GROUPS + 5 {
            counts.opened(id(n), &n.to_string(), None);
        }
        assert_eq!(counts.groups().len(), MAX_GROUPS, "labels are bounded (I12)");
        assert_eq!(counts.forgotten.load(Ordering::Relaxed), 5);
        assert!(counts.knows(id(MAX_GROUPS + 4)));
    }

    #[test]
    fn a_session_is_counted_once_and_not_for_longer_than_it_lives() {
        let counts = Arc::new(Counts::default());
        let doing = || [0, 1, 2].map(|i| counts.doing[i].load(Ordering::Relaxed));
        let (mut one, two) = (counts.session(), counts.session());
        one.does(Doing::Writing);
        assert_eq!(doing(), [1, 1, 0]);
        drop((one, two));
        assert_eq!(doing(), [0, 0, 0]);
    }

    #[test]
    fn a_heartbeat_makes_the_lag_younger_and_the_point_not() {
        let counts = Counts::default();
        let group = GroupId([1; 16]);
        counts.opened(group, "web", Some(UnixMillis(1000)));
        counts.still_equal(group, UnixMillis(5000));
        counts.still_equal(group, UnixMillis(4000));
        let known = counts.groups()[&group].clone();
        assert_eq!((known.point, known.equal), (Some(UnixMillis(1000)), Some(UnixMillis(5000))));
    }
}
