//! One damaged record costs its point and no other, and never makes an older point the latest.

use std::sync::Arc;

use backhaul_protocol::ids::{AgentId, CommitId};
use backhaul_protocol::store::checkpoint::write_seq;
use backhaul_protocol::store::envelope::Kind as ObjectKind;
use backhaul_protocol::store::log::{Body, PromoteBody};
use bytes::Bytes;

use super::*;
use crate::store::ObjectStore;
use crate::store::mem::MemStore;
use crate::testing::{TestGroup, noise};

async fn group(points: u8) -> (Arc<MemStore>, TestGroup) {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut bytes = noise(64 << 10, 1);
    for point in 0..points {
        bytes[usize::from(point)] ^= 0xff;
        // Later than the group's creation, which is by the real clock.
        group.now = UnixMillis(4_000_000_000_000 + 1000 * i64::from(point));
        group.commit(&[("disk", 16384, &bytes)]).await;
    }
    (store, group)
}

fn flip(store: &MemStore, key: &ObjectKey) {
    let mut bytes = store.objects()[key].to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    store.tamper(key, Some(Bytes::from(bytes)));
}

async fn log(group: &TestGroup) -> GroupLog {
    group.catalog.expect_group(&group.name).await.expect("a group")
}

fn numbers(history: &History) -> Vec<u64> {
    history.points.iter().map(|p| p.seq.0).collect()
}

async fn older_than(log: &GroupLog, spec: PointSpec) -> Option<LogSeq> {
    match log.find(spec).await {
        Err(ReadError::Point { older, .. }) => older,
        other => panic!("{:?}", other.map(|(record, _)| record.seq)),
    }
}

#[tokio::test]
async fn one_damaged_record_leaves_all_others() {
    let (store, group) = group(4).await;
    let log = log(&group).await;
    flip(&store, &log.keys().log(LogSeq(2)));
    let history = log.history().await.expect("the store works");
    assert_eq!(numbers(&history), [1, 3, 4]);
    assert_eq!(history.unreadable.len(), 1);
    assert_eq!(log.object_of(&history.unreadable[0].1), log.keys().log(LogSeq(2)).as_str());
    for seq in [1, 3, 4] {
        log.find(PointSpec::Number(LogSeq(seq))).await.expect("undamaged");
    }
    assert_eq!(log.find(PointSpec::Latest).await.expect("undamaged").0.seq, LogSeq(4));
    assert_eq!(older_than(&log, PointSpec::Number(LogSeq(2))).await, Some(LogSeq(1)));
}

#[tokio::test]
async fn the_latest_is_never_an_older_one() {
    let (store, group) = group(3).await;
    let log = log(&group).await;
    let newest = log.keys().log(LogSeq(3));
    let whole = store.objects()[&newest].clone();
    flip(&store, &newest);
    assert_eq!(older_than(&log, PointSpec::Latest).await, Some(LogSeq(2)));
    assert_eq!(older_than(&log, PointSpec::Time(UnixMillis(i64::MAX))).await, Some(LogSeq(2)));
    // Gone without a trace but for the hint.
    store.tamper(&newest, None);
    log.write_hint(LogSeq(3)).await.expect("the store works");
    assert_eq!(older_than(&log, PointSpec::Latest).await, Some(LogSeq(2)));
    assert_eq!(numbers(&log.history().await.expect("the store works")), [1, 2]);
    store.tamper(&newest, Some(whole));
    assert_eq!(log.find(PointSpec::Latest).await.expect("mended").0.seq, LogSeq(3));
}

#[tokio::test]
async fn a_gap_does_not_hide_what_comes_after() {
    let (store, group) = group(5).await;
    let log = log(&group).await;
    store.tamper(&log.keys().log(LogSeq(3)), None);
    for hint in [true, false] {
        if !hint {
            store.tamper(&log.keys().head(), None);
        }
        let history = log.history().await.expect("the store works");
        assert_eq!(numbers(&history), [1, 2, 4, 5], "hint {hint}");
        assert_eq!(history.unreadable[0].0, LogSeq(3));
        assert_eq!(log.find(PointSpec::Latest).await.expect("the newest is whole").0.seq, LogSeq(5));
    }
    store.tamper(&log.keys().log(LogSeq(0)), None);
    assert_eq!(numbers(&log.history().await.expect("the store works")), [1, 2, 4, 5]);
}

#[tokio::test]
async fn a_damaged_hint_is_named_and_costs_nothing() {
    let (store, group) = group(2).await;
    let log = log(&group).await;
    log.write_hint(LogSeq(2)).await.expect("the store works");
    flip(&store, &log.keys().head());
    let history = log.history().await.expect("the store works");
    assert_eq!((numbers(&history), history.aside.len()), (vec![1, 2], 1));
    assert_eq!(log.find(PointSpec::Latest).await.expect("whole").0.seq, LogSeq(2));
}

#[tokio::test]
async fn a_group_whose_name_is_damaged_or_gone_is_found_by_its_log() {
    let (store, group) = group(1).await;
    let key = backhaul_protocol::store::key::group_name(&group.name);
    let whole = store.objects()[&key].clone();
    let own = log(&group).await.group();
    for damaged in [None, Some(whole.slice(..whole.len() - 1))] {
        store.tamper(&key, damaged);
        assert_eq!(log(&group).await.group(), own);
        let located = group.catalog.locate().await.expect("the store works");
        assert_eq!((located.groups.len(), located.damaged.len()), (1, 1));
    }
    let format = backhaul_protocol::store::key::format();
    for damaged in [None, Some(Bytes::from_static(b"x"))] {
        store.tamper(&format, damaged);
        let opened = crate::catalog::Catalog::open_to_read(store.clone() as Arc<dyn ObjectStore>).await;
        assert!(opened.expect("it can be read").1.is_some());
    }
}

/// Its name is put first; a receiver that stops there has damaged nothing.
#[tokio::test]
async fn a_group_that_was_not_finished_is_empty_and_one_without_its_log_is_damaged() {
    let (store, group) = group(1).await;
    let log = log(&group).await;
    log.write_hint(LogSeq(1)).await.expect("the store works");
    for key in store.objects().into_keys().filter(|k| k.as_str().contains("/log/")) {
        store.tamper(&key, None);
    }
    assert_eq!(log.history().await.expect("the store works").unreadable.len(), 1);
    for key in store.objects().into_keys().filter(|k| k.as_str().starts_with("groups/")) {
        store.tamper(&key, None);
    }
    assert_eq!(log.history().await.expect("the store works").damage().count(), 0);
}

#[tokio::test]
async fn what_is_not_there_is_told_with_what_is() {
    let (_, group) = group(2).await;
    let log = log(&group).await;
    let first = log.history().await.expect("the store works").points[0].time;
    let before = UnixMillis(first.0 - 1);
    for (spec, text) in [
        (PointSpec::Number(LogSeq(9)), "no point 9: they go from 1 to 2"),
        (PointSpec::Number(LogSeq(0)), "no point 0"),
        (PointSpec::Time(before), "the first is 1 of"),
    ] {
        let error = log.find(spec).await.expect_err("there is none");
        assert!(matches!(&error, ReadError::NotFound(t) if t.contains(text)), "{error}");
    }
}

/// Whoever may write to the bucket can put any number anywhere.
#[tokio::test]
async fn absurd_numbers_neither_hang_nor_fill_the_memory() {
    let (store, group) = group(3).await;
    let log = log(&group).await;
    let bytes = store.objects()[&log.keys().log(LogSeq(2))].clone();
    for junk in [LogSeq(u64::MAX), LogSeq(1 << 50), LogSeq(1 << 40)] {
        let key = log.keys().log(junk);
        store.tamper(&key, Some(bytes.clone()));
        let history = log.history().await.expect("the store works");
        assert_eq!(numbers(&history), [1, 2, 3], "{junk}");
        assert!(history.unreadable.len() <= 1002, "{}", history.unreadable.len());
        for seq in 1..=3 {
            log.find(PointSpec::Number(LogSeq(seq))).await.expect("it is there");
        }
        // What can't be a record is none; what could be one is not passed over where the log is listed: without a hint.
        store.tamper(&log.keys().head(), None);
        assert_eq!(log.find(PointSpec::Latest).await.is_ok(), !junk.is_possible(), "{junk}");
        assert_eq!(log.head().await.is_ok(), !junk.is_possible(), "{junk}");
        store.tamper(&key, None);
    }
    for hint in [1 << 47, (1 << 48) - 1, 1 << 48, u64::MAX] {
        log.write_hint(LogSeq(hint)).await.expect("the store works");
        let history = log.history().await.expect("the store works");
        assert_eq!(numbers(&history), [1, 2, 3], "{hint}");
        assert!(history.damage().count() >= 1 && history.unreadable.len() <= 1002, "{}", history.unreadable.len());
        assert_eq!(log.head().await.expect("the hint is only a hint").0.record.seq, LogSeq(3));
    }
}

#[tokio::test]
async fn nobody_writes_as_if_there_had_been_no_point_before() {
    let (store, group) = group(2).await;
    let log = log(&group).await;
    let (head, previous) = log.head().await.expect("whole");
    assert_eq!(head.point.expect("a point").0, LogSeq(2));
    let body = Body::Promote(PromoteBody { agent: AgentId([1; 16]) });
    let promote = Record { seq: LogSeq(3), previous, commit: CommitId([3; 16]), body, ..head.record };
    log.append(&promote).await.expect("the store works");
    assert_eq!(log.head().await.expect("whole").0.point.expect("a point").0, LogSeq(2));
    store.tamper(&log.keys().log(LogSeq(2)), None);
    log.write_hint(LogSeq(3)).await.expect("the store works");
    let error = log.head().await.expect_err("what was before is not known");
    assert!(matches!(error, ReadError::Log { seq: LogSeq(2), .. }), "{error}");
}

/// What a checkpoint lists and the log does not have any more is no point.
#[tokio::test]
async fn records_that_only_a_checkpoint_knows_are_missing() {
    let (store, group) = group(6).await;
    let log = log(&group).await;
    log.write_checkpoint(LogSeq(5)).await.expect("the store works");
    let times: Vec<UnixMillis> = log.history().await.expect("the store works").points.iter().map(|p| p.time).collect();
    for seq in [2, 3, 4] {
        store.tamper(&log.keys().log(LogSeq(seq)), None);
    }
    let history = log.whole_history().await.expect("the store works");
    assert_eq!(numbers(&history), [1, 5, 6]);
    assert_eq!(history.unreadable.iter().map(|(seq, _)| seq.0).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(older_than(&log, PointSpec::Number(LogSeq(3))).await, Some(LogSeq(1)));
    assert_eq!(older_than(&log, PointSpec::Time(times[2])).await, Some(LogSeq(1)));
    assert_eq!(log.find(PointSpec::Latest).await.expect("whole").0.seq, LogSeq(6));
}

/// The end of the log is lost, and nothing but a checkpoint tells that it was longer.
#[tokio::test]
async fn a_checkpoint_tells_how_long_the_log_was() {
    let (store, group) = group(6).await;
    let log = log(&group).await;
    log.write_checkpoint(LogSeq(6)).await.expect("the store works");
    store.tamper(&log.keys().head(), None);
    let times: Vec<UnixMillis> = log.history().await.expect("the store works").points.iter().map(|p| p.time).collect();
    for (gone, left) in [(6, 5), (5, 4)] {
        store.tamper(&log.keys().log(LogSeq(gone)), None);
        assert_eq!(older_than(&log, PointSpec::Latest).await, Some(LogSeq(left)));
        assert_eq!(older_than(&log, PointSpec::Time(times[5])).await, Some(LogSeq(left)));
        let history = log.whole_history().await.expect("the store works");
        assert_eq!(numbers(&history), (1..=left).collect::<Vec<_>>());
        assert_eq!(history.unreadable.len() as u64, 6 - left);
    }
    store.tamper(&log.keys().log(LogSeq(0)), None);
    let history = log.whole_history().await.expect("the store works");
    assert_eq!(history.unreadable.first().map(|(seq, _)| *seq), Some(LogSeq(0)));
    // One that can't be read costs nothing but time.
    flip(&store, &log.keys().checkpoint(LogSeq(6)));
    assert_eq!(numbers(&log.whole_history().await.expect("the store works")), [1, 2, 3, 4]);
}

/// A writer that slept may put a record where records were deleted: below the floor there are no points (I4).
#[tokio::test]
async fn a_record_below_the_floor_is_no_point() {
    let (store, group) = group(6).await;
    let log = log(&group).await;
    let times: Vec<UnixMillis> = log.history().await.expect("the store works").points.iter().map(|p| p.time).collect();
    log.write_checkpoint(LogSeq(4)).await.expect("the store works");
    flip(&store, &log.keys().log(LogSeq(2)));
    store.tamper(&log.keys().floor(), Some(Bytes::from(write_seq(ObjectKind::Floor, LogSeq(4)))));
    // Where a checkpoint tells of them, and where the log is read itself.
    for with_checkpoint in [true, false] {
        if !with_checkpoint {
            store.tamper(&log.keys().checkpoint(LogSeq(4)), None);
        }
        let history = log.whole_history().await.expect("the store works");
        assert_eq!(numbers(&history), [4, 5, 6], "checkpoint {with_checkpoint}");
        assert!(history.unreadable.is_empty(), "what lies below the floor is not missed: {:?}", history.unreadable);
        for spec in [PointSpec::Number(LogSeq(3)), PointSpec::Number(LogSeq(2)), PointSpec::Time(times[2])] {
            let error = log.find(spec).await.map(|(record, _)| record.seq).expect_err("it does not exist");
            assert!(matches!(error, ReadError::NotFound(_)), "checkpoint {with_checkpoint}, {spec:?}: {error}");
        }
        assert_eq!(log.find(PointSpec::Number(LogSeq(4))).await.expect("it exists").0.seq, LogSeq(4));
    }
}

/// All sessions and restores of the newest point come this way: a LIST costs twelve times a GET.
#[tokio::test]
async fn with_a_hint_nothing_is_listed_and_a_gap_is_found() {
    let (store, group) = group(40).await;
    let log = log(&group).await;
    for hint in [3, 30, 40] {
        log.write_hint(LogSeq(hint)).await.expect("the store works");
        let lists = store.counts().list;
        assert_eq!(log.find(PointSpec::Latest).await.expect("undamaged").0.seq, LogSeq(40));
        assert_eq!(log.head().await.expect("undamaged").0.record.seq, LogSeq(40));
        assert_eq!(store.counts().list, lists, "the hint is {hint}");
    }
    // Nobody writes into a gap whose end is near, or takes what lies before it for all there is.
    log.write_hint(LogSeq(20)).await.expect("the store works");
    for gone in 21..=34 {
        store.tamper(&log.keys().log(LogSeq(gone)), None);
        assert!(log.head().await.is_err_and(|e| e.is_damage()), "21 to {gone} are gone");
        assert!(log.find(PointSpec::Latest).await.is_ok_and(|(r, _)| r.seq == LogSeq(40)), "21 to {gone} are gone");
    }
}
