use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{CommitId, LogSeq};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::message::Committed;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MIB: u64 = 1 << 20;

struct Story {
    begun: Instant,
    now: Instant,
    condition: Condition,
    through: Through,
}

impl Story {
    fn new(last: Option<i64>) -> Self {
        let begun = Instant::now();
        Self { begun, now: begun, condition: Condition::new(begun, 15 * SECOND, last), through: Through::default() }
    }

    fn go(&mut self, seconds: u64) -> &mut Self {
        self.now += SECOND * seconds as u32;
        self.condition.tick(self.now, self.through);
        self
    }

    fn looks(&mut self, to_read: u64, unknown: &[&str]) -> &mut Self {
        let volumes = vec![VolumeReport { name: "data".into(), bytes: 1 << 40, unmarked: None }];
        let unknown = unknown.iter().map(|u| (*u).to_owned()).collect();
        self.condition.begun(self.now);
        self.condition.looks(self.now, &Stage { marked: to_read, to_read, unknown, volumes }, self.through);
        self
    }

    fn succeeds(&mut self, frozen_for: Option<Duration>) -> &mut Self {
        let committed = Committed { seq: LogSeq(7), commit: CommitId([1; 16]), time: UnixMillis(1), metadata_bytes: 0 };
        let report = RoundReport {
            committed: Some(committed),
            head: LogSeq(7),
            consistency: Consistency::Crash,
            caveats: Vec::new(),
            bytes_scanned: 0,
            bytes_sent: 0,
            metadata_bytes: 0,
            marked_bytes: Some(15 * MIB),
            frozen_for,
            full_scan: None,
            missed_blocks: 0,
            capture_start: UnixMillis(5),
            took: Duration::ZERO,
            volumes: Vec::new(),
        };
        self.condition.succeeded(self.now, &report);
        self
    }

    #[track_caller]
    fn is(&self, state: RunState, cause: &str) {
        let r = self.condition.report();
        assert_eq!(r.state, state, "after {:?}: {:?}", self.now - self.begun, r.cause);
        let text = r.cause.unwrap_or_default();
        assert!(text.contains(cause), "{text}");
        assert_eq!(text.is_empty(), state == RunState::Continuous, "every state but continuous says why (I22)");
    }
}

#[test]
fn from_nothing_to_continuous() {
    let mut s = Story::new(None);
    s.is(RunState::InitialSync, "no point yet");
    s.looks(100 * MIB, &["data: tracking has just begun"]).is(RunState::InitialSync, "100.0 MiB are read");
    s.through = Through { read: 40 * MIB, sent: 10 * MIB };
    s.go(20).is(RunState::InitialSync, "40.0 MiB of 100.0 MiB are looked at, 10.0 MiB were sent");
    s.is(RunState::InitialSync, "about 30.0 s left");
    assert_eq!(s.condition.report().behind_bytes, 60 * MIB);
    s.go(20).succeeds(None).is(RunState::Backlog, "the last round took 40.0 s");
    s.looks(MIB, &[]).go(2).succeeds(None).is(RunState::Continuous, "");
    assert_eq!(s.condition.report().behind_bytes, 0);
}

#[test]
fn an_outage_is_a_backlog_until_the_newest_point_is_young() {
    let mut s = Story::new(Some(1));
    s.is(RunState::Backlog, "just started");
    s.looks(MIB, &[]).succeeds(None).is(RunState::Continuous, "");
    let volumes = vec![VolumeReport { name: "data".into(), bytes: 1 << 40, unmarked: Some("an image".into()) }];
    s.condition.begun(s.now);
    s.condition.looks(s.now, &Stage { marked: MIB, to_read: 1 << 40, unknown: vec![], volumes }, s.through);
    assert_eq!(s.condition.report().behind_bytes, MIB, "what is read without being marked is not behind");
    s.succeeds(None);
    s.condition.failed(s.now, RunState::Disconnected, "no answer".into());
    s.is(RunState::Disconnected, "no answer");
    s.go(300).is(RunState::Disconnected, "no answer");
    s.looks(600 * MIB, &[]).is(RunState::Backlog, "after it was disconnected for 5m00s: 600.0 MiB");
    s.through.read = 300 * MIB;
    s.go(40).is(RunState::Backlog, "300.0 MiB behind, more than is sent in 15.0 s");
    s.succeeds(None).is(RunState::Backlog, "");
    s.looks(MIB, &[]).is(RunState::Backlog, "");
    s.go(1).succeeds(None).is(RunState::Continuous, "");
}

#[test]
fn a_round_that_takes_longer_than_two_intervals_is_a_backlog_while_it_lasts() {
    let mut s = Story::new(Some(1));
    s.looks(MIB, &[]).succeeds(None).go(15).looks(900 * MIB, &[]).is(RunState::Continuous, "");
    s.go(10).is(RunState::Continuous, "");
    s.through.read = 90 * MIB;
    s.go(10).is(RunState::Backlog, "810.0 MiB behind");
    s.is(RunState::Backlog, "about 3m00s left");
}

#[test]
fn marks_that_are_in_doubt_are_a_rescan() {
    let mut s = Story::new(Some(1));
    s.looks(MIB, &[]).succeeds(None).looks(900 * MIB, &["data: the machine was started anew"]);
    s.is(RunState::Rescan, "started anew");
    s.go(100).is(RunState::Rescan, "started anew");
}

#[test]
fn a_pause_says_who_and_ends_in_a_backlog() {
    let mut s = Story::new(Some(1));
    s.looks(MIB, &[]).succeeds(None);
    s.condition.paused(s.now, "until noon, by anna".into());
    s.go(100).is(RunState::Paused, "by anna");
    s.looks(MIB, &[]).is(RunState::Backlog, "after it was paused");
}

#[test]
fn freezes_of_an_hour_in_bounded_memory() {
    let mut s = Story::new(Some(1));
    for n in 0..10_000_u64 {
        s.looks(0, &[]).go(1).succeeds(Some(Duration::from_millis(if n % 100 == 7 { 400 } else { 50 })));
    }
    assert!(s.condition.freezes.len() <= MAX_FREEZES);
    let r = s.condition.report();
    assert_eq!((r.frozen_ms, r.frozen_max_ms, r.frozen_p99_ms), (Some(50.0), Some(400.0), Some(50.0)));
    s.go(3700);
    let r = s.condition.report();
    assert_eq!((r.frozen_ms, r.frozen_max_ms, r.frozen_p99_ms), (Some(50.0), None, None), "an hour later");
}

#[test]
fn what_is_written_is_smoothed() {
    let mut s = Story::new(Some(1));
    for _ in 0..3 {
        s.looks(0, &[]).succeeds(None).go(15);
    }
    let rate = s.condition.report().change_bytes_per_second.expect("known");
    assert!((rate - MIB as f64).abs() < 1.0, "{rate}");
    s.condition.changed(s.now + 15 * SECOND, Some(1500 * MIB));
    let jumped = s.condition.report().change_bytes_per_second.expect("known") / MIB as f64;
    assert!((2.0..20.0).contains(&jumped), "{jumped} MiB/s");
}
