//! Where the log ends.

use std::sync::Arc;

use super::*;
use crate::store::mem::MemStore;
use crate::testing::{TestGroup, noise};

/// A writer that slept puts a record where the log was pruned meanwhile. It does not exist, and nothing ends there,
/// whatever the hint says (I4, I14).
#[tokio::test]
async fn a_record_that_is_revived_below_the_floor_is_not_where_the_log_ends() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    for i in 0..7 {
        group.commit(&[("a", 16384, &noise(100_000, i))]).await;
    }
    let log = group.state.log().clone();
    let records = store.objects();
    group.prune(LogSeq(6)).await;
    for revived in [0, 3, 5] {
        let key = log.keys().log(LogSeq(revived));
        store.tamper(&key, Some(records[&key].clone()));
        for hint in [0, 3, 5, 6, 7, 8, 99] {
            log.write_hint(LogSeq(hint)).await.expect("the store works");
            let newest = log.newest().await.expect("the log is whole");
            assert_eq!(newest, LogSeq(7), "record {revived} is revived, the hint is {hint}");
        }
        log.write_hint(LogSeq(revived)).await.expect("the store works");
        let history = log.history().await.expect("the store works");
        assert_eq!(history.points.iter().map(|p| p.seq.0).collect::<Vec<_>>(), [6, 7]);
        assert!(history.unreadable.is_empty() && history.broken.is_empty(), "{history:?}");
    }
}

/// Where our own record is there already, it counts only above the floor, too.
#[tokio::test]
async fn a_record_that_was_written_before_and_pruned_since_does_not_count() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    for i in 0..3 {
        group.commit(&[("a", 16384, &noise(100_000, i))]).await;
    }
    let log = group.state.log().clone();
    let records = store.objects();
    let (ours, _) = log.read(LogSeq(1)).await.expect("readable").expect("it is there");
    assert!(matches!(log.append(&ours).await.expect("the store works").0, Appended::Ours));
    group.prune(LogSeq(2)).await;
    store.tamper(&log.keys().log(LogSeq(1)), Some(records[&log.keys().log(LogSeq(1))].clone()));
    assert!(matches!(log.append(&ours).await.expect("the store works").0, Appended::BelowFloor));
}
