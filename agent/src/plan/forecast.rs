//! What follows from the figures: pure arithmetic. Each formula and what it takes for granted stands in `docs/plan.md`.
//!
//! Read first: [`Given`], then [`forecast`].

use super::Estimate;
use super::rate::Spread;
use super::watch::{Load, Together};

/// A commit's own work at receiver and store, seconds: two puts one after the other. Assumed; not measured here.
pub const COMMIT: f64 = 0.2;
/// Round trips of a round: what is on its way, the commit, and its answer.
const ROUND_TRIPS: f64 = 3.0;
/// As receivers seal segments by default, bytes.
const SEGMENT: f64 = backhaul_protocol::limits::DEFAULT_SEGMENT_SIZE as f64;
/// Up to here records lie in the log record, bytes.
const INLINE: f64 = backhaul_protocol::limits::MAX_INLINE_RECORDS as f64;
/// A record's header, index row and map entry, bytes.
const HEADER: f64 = 64.0;
const ROW: f64 = 64.0;
const ENTRY: f64 = 72.0;
/// A log record without inline records: it names up to 64 segments and 16 maps of 64 bytes each; half of that.
const LOG_RECORD: f64 = 2_600.0;
/// Bytes of one read of a restore.
const READ: f64 = (4 << 20) as f64;
/// What a page of the index covers, blocks.
const PAGE: f64 = 1024.0;
/// A month, as bills have it.
pub const MONTH: f64 = 30.0 * 86_400.0;
/// A point is made at least this often, seconds.
const AT_LEAST: f64 = 3_600.0;
/// The hint is written at most this often, seconds, and so is when an agent was seen.
const HINT: f64 = 30.0;
const SEEN: f64 = 60.0;

/// What was measured, and what is asked for.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Given {
    /// The policy's interval, seconds.
    pub every: f64,
    /// For how long points are kept, seconds.
    pub keep: f64,
    /// What changes.
    pub changes: Together,
    /// Bytes of records that a byte of a changed block comes to.
    pub stored_share: f64,
    /// Bytes of all volumes, holes of images not counted.
    pub length: f64,
    /// Blocks that are not zero.
    pub data_blocks: f64,
    /// Bytes that are not zero.
    pub data: Estimate,
    /// Bytes of their records.
    pub stored: Estimate,
    /// Bytes a second that are read in a row.
    pub read: f64,
    /// Bytes a second that all threads can hash; and hash and compress.
    pub hash: f64,
    /// See `hash`.
    pub compress: f64,
    /// Bytes that must be read in every round, since the kernel does not mark what was written to them.
    pub scanned: f64,
    /// Seconds and bytes a second; `None` if there is no connection.
    pub link: Option<Link>,
    /// For a thousand puts, and for a GB (10^9 bytes) and month.
    pub put_price: Option<f64>,
    /// See `put_price`.
    pub month_price: Option<f64>,
}

/// The path to the receiver.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// Seconds.
    pub round_trip: f64,
    /// Bytes a second.
    pub rate: f64,
}

/// What a policy gives.
#[derive(Clone, PartialEq, Debug, Default, serde::Serialize)]
pub struct Forecast {
    /// Of each interval that was looked at; the one asked for among them.
    pub policies: Vec<Policy>,
    /// Bytes a second in changed blocks that could be kept up with; `None` without a link.
    pub sustainable: Option<f64>,
    /// What sets that limit.
    pub limit: Option<Limit>,
    /// Seconds of the first sync; without a link of reading and compressing alone.
    pub first_sync: Estimate,
    /// What sets that.
    pub first_sync_limit: Limit,
    /// Seconds of a restore of everything, the link as fast down as up.
    pub restore: Estimate,
    /// Requests.
    pub requests: Requests,
    /// Bytes in the store.
    pub storage: Storage,
    /// In the currency of the prices, for a month, where they were given.
    pub cost: Option<Cost>,
}

/// What takes the time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// The path to the receiver.
    Link,
    /// Hashing and compressing.
    Cpu,
    /// Reading the volumes.
    #[default]
    Disk,
}

/// A policy of one point each so many seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Policy {
    /// Seconds.
    pub every: f64,
    /// Bytes in distinct blocks that change in one interval.
    pub changed: Spread,
    /// Bytes a second that must be sent on average.
    pub needed: f64,
    /// Whether link, processor and disk keep up with the mean; `None` without a link.
    pub keeps_up: Option<bool>,
    /// Seconds from a point's first reading to its commit, in the median and at the peak.
    pub round: Option<[f64; 2]>,
    /// The age of the newest point just before the next one exists, seconds, in the median and at the peak.
    pub rpo: Option<[f64; 2]>,
}

/// Requests to the store.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Requests {
    /// Points in a month.
    pub points_per_month: f64,
    /// Of the first sync.
    pub first_sync_puts: f64,
    /// In a month, all of the below.
    pub puts_per_month: f64,
    /// Log records.
    pub log: f64,
    /// Segments.
    pub segments: f64,
    /// Maps that segments are folded into, and checkpoints.
    pub maps: f64,
    /// Hints, and when the agent was seen.
    pub hints: f64,
    /// Of a restore of the newest point.
    pub restore_gets: f64,
}

/// Bytes in the store.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Storage {
    /// After the first sync.
    pub first: Estimate,
    /// A day more.
    pub per_day: f64,
    /// When everything was kept for as long as asked for.
    pub after_keep: f64,
}

/// Money.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Cost {
    /// For puts.
    pub puts: Option<f64>,
    /// For what is stored after `keep`.
    pub storage: Option<f64>,
}

impl Given {
    /// Bytes of records of what changed.
    fn sent(&self, load: &Load) -> f64 {
        load.bytes * self.stored_share + load.blocks * HEADER
    }

    /// Seconds of looking for what changed, where the kernel does not tell.
    fn look(&self) -> f64 {
        if self.scanned == 0.0 { 0.0 } else { self.scanned / self.read.min(self.hash).max(1.0) }
    }

    /// Seconds from the first reading to the commit.
    fn round(&self, changed: f64, sent: f64, link: Link) -> f64 {
        let work = (changed / self.read.max(1.0)).max(changed / self.compress.max(1.0)).max(sent / link.rate.max(1.0));
        self.look() + work + ROUND_TRIPS * link.round_trip + COMMIT
    }

    fn policy(&self, every: f64, loads: &[Load]) -> Policy {
        let changed = Spread::of(loads.iter().map(|l| l.bytes));
        let sent = Spread::of(loads.iter().map(|l| self.sent(l)));
        let rounds = self
            .link
            .map(|link| [self.round(changed.median, sent.median, link), self.round(changed.peak, sent.peak, link)]);
        // Throughput alone: what is on its way and what is committed overlap with nothing.
        let keeps_up = self.link.map(|link| self.round(changed.mean, sent.mean, link) <= every);
        // The next round begins when it is its time, or when this one ends; its point exists when it ends too.
        let rpo = rounds.map(|rounds| rounds.map(|round| every.max(round) + round));
        Policy { every, changed, needed: sent.mean / every, keeps_up, round: rounds, rpo }
    }
}

/// Computes all of it.
pub fn forecast(given: &Given) -> Forecast {
    let mut policies = vec![given.policy(given.every, &given.changes.intervals)];
    if given.every > 1.0 && !given.changes.seconds.is_empty() {
        policies.insert(0, given.policy(1.0, &given.changes.seconds));
    }
    if given.changes.whole.seconds > given.every * 1.5 {
        policies.push(given.policy(given.changes.whole.seconds, std::slice::from_ref(&given.changes.whole)));
    }
    let (sustainable, limit) = sustainable(given);
    let (first_sync, first_sync_limit) = first_sync(given);
    let requests = requests(given);
    let storage = storage(given, &requests);
    let cost = (given.put_price.is_some() || given.month_price.is_some()).then(|| Cost {
        puts: given.put_price.map(|price| requests.puts_per_month / 1_000.0 * price),
        storage: given.month_price.map(|price| storage.after_keep / 1e9 * price),
    });
    let restore = restore(given);
    Forecast { policies, sustainable, limit, first_sync, first_sync_limit, restore, requests, storage, cost }
}

fn sustainable(given: &Given) -> (Option<f64>, Option<Limit>) {
    let Some(link) = given.link else { return (None, None) };
    // Of a changed byte so much is sent.
    let share = if given.changes.whole.bytes > 0.0 {
        given.sent(&given.changes.whole) / given.changes.whole.bytes
    } else {
        given.stored_share
    };
    let rates = [(link.rate / share.max(1e-6), Limit::Link), (given.compress, Limit::Cpu), (given.read, Limit::Disk)];
    let (rate, limit) = rates.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("there are three");
    // What is left of an interval when it was looked for what changed, and committed.
    let left = (given.every - given.look() - ROUND_TRIPS * link.round_trip - COMMIT).max(0.0);
    (Some(rate * left / given.every), Some(limit))
}

fn first_sync(given: &Given) -> (Estimate, Limit) {
    let cpu = given.length / given.hash.max(1.0) + given.data.value / given.compress.max(1.0)
        - given.data.value / given.hash.max(1.0);
    let mut times = vec![(given.length / given.read.max(1.0), 0.0, Limit::Disk)];
    times.push((cpu, given.data.margin / given.compress.max(1.0), Limit::Cpu));
    if let Some(link) = given.link {
        times.push((given.stored.value / link.rate.max(1.0), given.stored.margin / link.rate.max(1.0), Limit::Link));
    }
    let (value, margin, limit) = times.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are two");
    let more = given.link.map_or(0.0, |link| ROUND_TRIPS * link.round_trip + COMMIT);
    (Estimate { value: value + more, margin }, limit)
}

fn restore(given: &Given) -> Estimate {
    // Written as fast as this volume is read, and read back.
    let write = given.data.value / given.read.max(1.0);
    let fetch = given.link.map_or(0.0, |link| given.stored.value / link.rate.max(1.0));
    let slower = if fetch > write { given.stored.margin / given.link.map_or(1.0, |l| l.rate.max(1.0)) } else { 0.0 };
    Estimate { value: fetch.max(write) + write, margin: slower }
}

fn requests(given: &Given) -> Requests {
    let loads = &given.changes.intervals;
    let every = given.policy(given.every, loads).round.map_or(given.every, |[median, _]| median.max(given.every));
    let changed = loads.iter().filter(|l| l.bytes > 0.0).count() as f64 / loads.len().max(1) as f64;
    let points = (MONTH / every * changed).max(MONTH / AT_LEAST);
    // Of a point, on average.
    let segments = |l: &Load| {
        let sent = self::loaded(given, l);
        if sent <= INLINE { 0.0 } else { (sent / SEGMENT).ceil() }
    };
    let busy = loads.iter().filter(|l| l.bytes > 0.0);
    let mean = |of: &dyn Fn(&Load) -> f64| Spread::of(busy.clone().map(of)).mean;
    let (segments, blocks) = (mean(&segments), mean(&|l| l.blocks));
    // Inline records count as a segment where segments are counted until they are folded; then the map's own put.
    let folds = ((segments.max(1.0)) / 64.0).max(blocks / 65_536.0) * (1.0 + 1.0 / 16.0);
    let made = MONTH / every * changed;
    let log = points;
    let segments = made * segments;
    let maps = made * folds + points / 1_024.0;
    let hints = points.min(MONTH / HINT) + MONTH / SEEN;
    let first = (given.stored.value / SEGMENT).ceil();
    let pages = (given.data_blocks / PAGE).ceil();
    Requests {
        points_per_month: points,
        first_sync_puts: first + (first / 64.0).ceil() + 2.0,
        puts_per_month: log + segments + maps + hints,
        log,
        segments,
        maps,
        hints,
        restore_gets: (given.stored.value / READ).ceil() + pages + 8.0,
    }
}

/// Bytes of a point's records with their index rows.
fn loaded(given: &Given, load: &Load) -> f64 {
    given.sent(load) + load.blocks * ROW
}

fn storage(given: &Given, requests: &Requests) -> Storage {
    let metadata = given.data_blocks * (ROW + ENTRY) + LOG_RECORD;
    let first = Estimate { value: given.stored.value + metadata, margin: given.stored.margin };
    let loads = &given.changes.intervals;
    let bytes = Spread::of(loads.iter().map(|l| loaded(given, l) + l.blocks * ENTRY)).mean;
    let per_day = (bytes / given.every.max(1e-9) + requests.points_per_month / MONTH * LOG_RECORD) * 86_400.0;
    Storage { first, per_day, after_keep: first.value + per_day * given.keep / 86_400.0 }
}

#[cfg(test)]
#[path = "forecast_tests.rs"]
mod tests;
