//! Where the log ends.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use backhaul_protocol::ids::{CommitId, RepositoryId};
use backhaul_protocol::store::key::ObjectKey;

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

/// A store as a receiver finds it that sleeps after so many calls, for as long as others need to write and prune.
#[derive(Debug)]
struct Asleep {
    before: MemStore,
    after: MemStore,
    left: AtomicUsize,
}

impl Asleep {
    fn store(&self) -> &MemStore {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if left.is_ok() { &self.before } else { &self.after }
    }
}

#[async_trait]
impl ObjectStore for Asleep {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.store().put_new(key, body).await
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.store().put_hint(key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.store().get(key, max).await
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.store().get_range(key, range).await
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        self.store().list(prefix, after, limit).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.store().delete(key).await
    }
    fn describe(&self) -> String {
        "a store that is slept over".into()
    }
}

/// Wherever a receiver falls asleep while it looks for the newest record or writes one: that the log went on and was
/// pruned meanwhile is no damage (I4, I14).
#[tokio::test]
async fn a_log_that_is_pruned_while_it_is_read_is_not_damaged() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    for i in 0..7 {
        group.commit(&[("a", 16384, &noise(100_000, i))]).await;
    }
    let before = store.fork();
    for i in 7..14 {
        group.commit(&[("a", 16384, &noise(100_000, i))]).await;
    }
    let (theirs, _) = group.state.log().read(LogSeq(8)).await.expect("readable").expect("it is there");
    group.prune(LogSeq(12)).await;
    let asleep_after = |calls: usize, hint: u64| {
        let (before, after) = (before.fork(), store.fork());
        let hint = Bytes::from(write_seq(ObjectKind::Head, LogSeq(hint)));
        before.tamper(&group.state.log().keys().head(), Some(hint));
        let store = Asleep { before, after, left: AtomicUsize::new(calls) };
        let format = StoreFormat { repository: RepositoryId([1; 16]), sharing: Sharing::ManyReceivers };
        Catalog { store: Arc::new(store), format }.log(group.state.log().group())
    };
    for (calls, hint) in (0..30).flat_map(|calls| [0, 5, 7].map(|hint| (calls, hint))) {
        let at = format!("asleep after {calls} calls, the hint is {hint}");
        let newest = asleep_after(calls, hint).newest().await.unwrap_or_else(|e| panic!("{at}: {e}"));
        assert!([7, 14].contains(&newest.0), "{at}: {newest}");
        let (head, _) = asleep_after(calls, hint).head().await.unwrap_or_else(|e| panic!("{at}: {e}"));
        assert!([7, 14].contains(&head.record.seq.0), "{at}: {head:?}");
    }
    let ours = Record { commit: CommitId([1; 16]), ..theirs.clone() };
    for (calls, there) in (0..6).flat_map(|calls| [true, false].map(|there| (calls, there))) {
        let log = asleep_after(calls, 7);
        if there {
            before.tamper(&log.keys().log(LogSeq(8)), Some(Bytes::from(theirs.to_bytes())));
        }
        let log = asleep_after(calls, 7);
        let appended = log.append(&ours).await.unwrap_or_else(|e| panic!("asleep after {calls} calls: {e}"));
        before.tamper(&log.keys().log(LogSeq(8)), None);
        let is_right = match appended.0 {
            Appended::Ours => !there && calls >= 2,
            Appended::Theirs(_) => there && calls >= 2,
            Appended::BelowFloor => calls < 2,
        };
        assert!(is_right, "asleep after {calls} calls, their record is there: {there}: {appended:?}");
    }
}
