//! How well a running service protects: its state in one word, why, and how far behind it is.
//!
//! Read first: [`RunState`], then [`Condition`]. Time comes in as an argument; nothing is read or asked here.
//!
//! ```text
//! initial_sync --> backlog <--> continuous        rescan: instead of backlog, where all of a volume is read
//!       any --> disconnected | stalled | diverged | paused --> backlog --> continuous
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use backhaul_cli::text;
use serde::{Deserialize, Serialize};

use crate::replicate::{RoundReport, Stage};

/// What the service is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// There is no point yet.
    InitialSync,
    /// Points are made, and the newest is older than two intervals.
    Backlog,
    /// The last round went well, and the newest point is younger than two intervals.
    Continuous,
    /// Marks of what was written can't be relied upon: all of a volume is read.
    Rescan,
    /// Somebody must do something, or the server writes faster than is sent.
    Stalled,
    /// The receiver can't be reached; tried again.
    Disconnected,
    /// Somebody wants it so.
    Paused,
    /// The receiver takes another agent, or an older state of this one, for the group's writer: only an operator's
    /// `adopt` helps.
    Diverged,
}

impl RunState {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::InitialSync,
        Self::Backlog,
        Self::Continuous,
        Self::Rescan,
        Self::Stalled,
        Self::Disconnected,
        Self::Paused,
        Self::Diverged,
    ];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InitialSync => "initial_sync",
            Self::Backlog => "backlog",
            Self::Continuous => "continuous",
            Self::Rescan => "rescan",
            Self::Stalled => "stalled",
            Self::Disconnected => "disconnected",
            Self::Paused => "paused",
            Self::Diverged => "diverged",
        }
    }

    /// Whether points are made in it.
    fn is_working(self) -> bool {
        matches!(self, Self::InitialSync | Self::Backlog | Self::Continuous | Self::Rescan)
    }
}

/// A volume as `run` sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Why its writes are not marked, if they are not: all of it is read for each point.
    pub unmarked: Option<String>,
}

/// What `run` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What it is doing.
    pub state: RunState,
    /// Why; `None` only when it is continuous.
    pub cause: Option<String>,
    /// The newest point.
    pub point: Option<u64>,
    /// The beginning of the last look that found the volumes equal to the newest point, or made it; ms since 1970. What
    /// the lag counts from.
    #[serde(rename = "protected_until_ms")]
    pub protected_until: Option<i64>,
    /// Of the newest point.
    pub consistency: Option<String>,
    /// Points that were made since the service began.
    pub points: u64,
    /// Rounds that found nothing new.
    pub unchanged_rounds: u64,
    /// Rounds that failed.
    pub failed_rounds: u64,
    /// Bytes of records that the last round sent.
    pub last_sent: u64,
    /// Seconds that the last round took.
    pub last_seconds: f64,
    /// Bytes of blocks that are to be looked at and are in no point yet, as far as the last round knows.
    pub behind_bytes: u64,
    /// Bytes of blocks that were marked, per second, smoothed over five minutes; `None` while nothing is marked.
    pub change_bytes_per_second: Option<f64>,
    /// Bytes of records that were sent since the service began.
    pub service_sent_bytes: u64,
    /// Bytes of volumes that were read since the service began.
    pub service_read_bytes: u64,
    /// Milliseconds that file systems were frozen for the newest point that needed it.
    pub frozen_ms: Option<f64>,
    /// The longest within the last hour.
    pub frozen_max_ms: Option<f64>,
    /// 99 of 100 within the last hour were no longer.
    pub frozen_p99_ms: Option<f64>,
    /// When all of every volume had last been read, ms since 1970.
    pub full_scan_ms: Option<i64>,
    /// Blocks that had changed and were not marked, since the service began.
    pub missed_blocks: u64,
    /// What the last round looked at.
    #[serde(rename = "volume_reports", default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeReport>,
}

/// Shorter delays are none: a round takes some time.
const LEAST_DELAY: Duration = Duration::from_secs(3);
/// What changes are smoothed over.
const SMOOTHING: Duration = Duration::from_secs(300);
/// What figures about freezes are of.
const HOUR: Duration = Duration::from_secs(3600);
/// Freezes that are remembered: one a second.
const MAX_FREEZES: usize = 3600;

/// Bytes that went through since the service began.
#[derive(Clone, Copy, Default, Debug)]
pub struct Through {
    /// Of records.
    pub sent: u64,
    /// Of volumes.
    pub read: u64,
}

/// A round that looks.
#[derive(Clone, Copy, Debug)]
struct Look {
    since: Instant,
    before: Through,
    to_read: u64,
    /// Of that, what is known to have been written to.
    marked: u64,
}

/// The state, and what it follows from.
#[derive(Debug)]
pub struct Condition {
    report: Report,
    every: Duration,
    /// When the newest point, or the newest look that found nothing new, began.
    fresh: Option<Instant>,
    round: Option<Instant>,
    look: Option<Look>,
    /// In the state since.
    since: Instant,
    /// Bytes that were marked, not smoothed in yet, and since when.
    changed_since: Option<Instant>,
    freezes: VecDeque<(Instant, f64)>,
    /// What was logged last.
    said: (RunState, String),
    /// Something was logged that is not over.
    alarmed: bool,
}

impl Condition {
    /// Of a service that starts. `last` is when its newest point began, as it was written down.
    pub fn new(now: Instant, every: Duration, last: Option<i64>) -> Self {
        let (state, cause) = match last {
            None => (RunState::InitialSync, "there is no point yet: all volumes are read".to_owned()),
            Some(_) => (RunState::Backlog, "the service has just started, and looks what changed meanwhile".to_owned()),
        };
        let report = Report {
            state,
            cause: Some(cause),
            point: None,
            protected_until: last,
            consistency: None,
            points: 0,
            unchanged_rounds: 0,
            failed_rounds: 0,
            last_sent: 0,
            last_seconds: 0.0,
            behind_bytes: 0,
            change_bytes_per_second: None,
            service_sent_bytes: 0,
            service_read_bytes: 0,
            frozen_ms: None,
            frozen_max_ms: None,
            frozen_p99_ms: None,
            full_scan_ms: None,
            missed_blocks: 0,
            volumes: Vec::new(),
        };
        Self {
            report,
            every,
            fresh: None,
            round: None,
            look: None,
            since: now,
            changed_since: None,
            freezes: VecDeque::new(),
            said: (state, String::new()),
            alarmed: true,
        }
    }

    /// What is told.
    pub fn report(&self) -> Report {
        self.report.clone()
    }

    /// Another interval from now on.
    pub fn set_every(&mut self, every: Duration) {
        self.every = every;
    }

    /// How old the newest point may be.
    fn delay(&self) -> Duration {
        (self.every * 2).max(LEAST_DELAY)
    }

    fn set(&mut self, now: Instant, state: RunState, cause: Option<String>) {
        if state != self.report.state {
            self.since = now;
        }
        (self.report.state, self.report.cause) = (state, cause);
        self.say();
    }

    /// Logs the state when it is another one, or somebody must do something else about it. Numbers do not count.
    fn say(&mut self) {
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        let (state, cause) = (self.report.state, self.report.cause.as_deref().unwrap_or_default());
        let told = if state.is_working() { String::new() } else { cause.replace(digits, "") };
        if self.said == (state, told.clone()) {
            return;
        }
        let (state, was) = (state.as_str(), self.said.0);
        // Rounds that are a little late now and then are no news.
        let is_alarm = !self.report.state.is_working() || self.report.state == RunState::Rescan;
        let is_over = self.alarmed && self.report.state == RunState::Continuous;
        let is_news = is_alarm || is_over || !was.is_working();
        self.alarmed = (self.alarmed || is_alarm) && !is_over;
        match (is_news, cause) {
            (true, "") => tracing::warn!("{state}"),
            (true, cause) => tracing::warn!("{state}: {cause}"),
            (false, cause) => tracing::info!("{state}: {cause}"),
        }
        self.said = (self.report.state, told);
    }

    /// A round begins.
    pub fn begun(&mut self, now: Instant) {
        self.round = Some(now);
        self.look = None;
    }

    /// It is known what the round looks at.
    pub fn looks(&mut self, now: Instant, stage: &Stage, before: Through) {
        let bytes = |v: &VolumeReport| v.bytes;
        self.report.volumes.clone_from(&stage.volumes);
        let to_read = stage.to_read.min(self.report.volumes.iter().map(bytes).sum());
        self.look = Some(Look { since: now, before, to_read, marked: stage.marked });
        let was = self.report.state;
        if self.report.protected_until.is_none() {
            let cause = format!("there is no point yet: {} are read", text::bytes(to_read));
            self.set(now, RunState::InitialSync, Some(cause));
        } else if !stage.unknown.is_empty() {
            self.set(now, RunState::Rescan, Some(stage.unknown.join("; ")));
        } else if !was.is_working() {
            let (was, took) = (was.as_str(), text::duration(now.saturating_duration_since(self.since)));
            let cause = format!("after it was {was} for {took}: {} are looked at", text::bytes(to_read));
            self.set(now, RunState::Backlog, Some(cause));
        }
        // Where nothing is marked all is read for every point, and that is not to be behind.
        self.report.behind_bytes = if self.report.state == RunState::Continuous { stage.marked } else { to_read };
    }

    /// Time goes by.
    pub fn tick(&mut self, now: Instant, through: Through) {
        (self.report.service_sent_bytes, self.report.service_read_bytes) = (through.sent, through.read);
        self.forget_freezes(now);
        let (Some(look), true) = (self.look, self.report.state.is_working()) else { return };
        let elapsed = now.saturating_duration_since(look.since).as_secs_f64();
        let read = through.read.saturating_sub(look.before.read);
        let left = look.to_read.saturating_sub(read);
        let is_even = self.report.state == RunState::Continuous;
        self.report.behind_bytes = if is_even { look.marked.saturating_sub(read) } else { left };
        let late = self.fresh.is_none_or(|at| now.saturating_duration_since(at) > self.delay());
        if !late || elapsed < 1.0 {
            return;
        }
        let per_second = read as f64 / elapsed;
        let estimate = match per_second > 1.0 {
            true => {
                format!("about {} left", text::duration(Duration::from_secs_f64((left as f64 / per_second).min(1e9))))
            }
            false => "nothing gets on".into(),
        };
        let sent = through.sent.saturating_sub(look.before.sent);
        let figures = format!(
            "{} of {} are looked at, {} were sent, {} a second; {estimate}",
            text::bytes(look.to_read - left),
            text::bytes(look.to_read),
            text::bytes(sent),
            text::bytes((sent as f64 / elapsed) as u64),
        );
        match self.report.state {
            RunState::InitialSync => self.report.cause = Some(format!("there is no point yet: {figures}")),
            RunState::Rescan => {}
            _ => {
                let every = text::duration(self.every);
                let cause = format!("{} behind, more than is sent in {every}: {figures}", text::bytes(left));
                self.set(now, RunState::Backlog, Some(cause));
                self.report.behind_bytes = left;
            }
        }
    }

    /// A round ended well. `point` is the newest one.
    pub fn succeeded(&mut self, now: Instant, report: &RoundReport) {
        let begun = self.round.take().unwrap_or(now);
        self.look = None;
        let r = &mut self.report;
        r.behind_bytes = 0;
        r.full_scan_ms = report.full_scan.map(|at| at.0).filter(|at| *at > 0);
        r.missed_blocks = report.missed_blocks;
        r.point = Some(report.head.0);
        r.protected_until = Some(report.capture_start.0);
        match report.committed {
            Some(_) => {
                r.points += 1;
                r.consistency = Some(report.consistency.to_string());
            }
            None => r.unchanged_rounds += 1,
        }
        r.last_sent = report.bytes_sent;
        r.last_seconds = report.took.as_secs_f64();
        self.changed(begun, report.marked_bytes);
        if let Some(frozen) = report.frozen_for {
            self.froze(now, frozen);
        }
        self.fresh = Some(begun);
        let age = now.saturating_duration_since(begun);
        if age <= self.delay() {
            return self.set(now, RunState::Continuous, None);
        }
        let (age, every) = (text::duration(age), text::duration(self.every));
        let sent = text::bytes(report.bytes_sent);
        let cause = format!(
            "the last round took {age} for {sent}, with a point wanted every {every}; the next goes on at once"
        );
        self.set(now, RunState::Backlog, Some(cause));
    }

    /// A round failed.
    pub fn failed(&mut self, now: Instant, state: RunState, cause: String) {
        (self.round, self.look) = (None, None);
        self.report.failed_rounds += 1;
        self.set(now, state, Some(cause));
    }

    /// Nothing is done for now.
    pub fn paused(&mut self, now: Instant, cause: String) {
        (self.round, self.look) = (None, None);
        self.set(now, RunState::Paused, Some(cause));
    }

    /// So many bytes of blocks were marked until `now`.
    fn changed(&mut self, now: Instant, marked: Option<u64>) {
        let since = self.changed_since.replace(now);
        let (Some(since), Some(marked)) = (since, marked) else {
            self.report.change_bytes_per_second = self.report.change_bytes_per_second.filter(|_| marked.is_some());
            return;
        };
        let elapsed = now.saturating_duration_since(since).as_secs_f64();
        if elapsed <= 0.0 {
            return;
        }
        let rate = marked as f64 / elapsed;
        let weight = 1.0 - (-elapsed / SMOOTHING.as_secs_f64()).exp();
        let smoothed = self.report.change_bytes_per_second.map_or(rate, |old| old + (rate - old) * weight);
        self.report.change_bytes_per_second = Some(smoothed);
    }

    fn froze(&mut self, now: Instant, frozen: Duration) {
        let ms = frozen.as_secs_f64() * 1e3;
        self.report.frozen_ms = Some(ms);
        if self.freezes.len() == MAX_FREEZES {
            self.freezes.pop_front();
        }
        self.freezes.push_back((now, ms));
        self.forget_freezes(now);
        let mut all: Vec<f64> = self.freezes.iter().map(|(_, ms)| *ms).collect();
        all.sort_by(f64::total_cmp);
        self.report.frozen_max_ms = all.last().copied();
        self.report.frozen_p99_ms = all.get((all.len() * 99).div_ceil(100).saturating_sub(1)).copied();
    }

    fn forget_freezes(&mut self, now: Instant) {
        while self.freezes.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > HOUR) {
            self.freezes.pop_front();
        }
        if self.freezes.is_empty() {
            (self.report.frozen_max_ms, self.report.frozen_p99_ms) = (None, None);
        }
    }
}

#[cfg(test)]
#[path = "condition_tests.rs"]
mod tests;
