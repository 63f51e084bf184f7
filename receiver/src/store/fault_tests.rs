use std::sync::Arc;

use super::*;
use crate::store::mem::MemStore;

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn store() -> FaultStore<MemStore> {
    FaultStore::new(MemStore::new(), 1)
}

async fn put(store: &FaultStore<MemStore>, name: &str) -> Option<Kind> {
    store.put_new(&key(name), Bytes::from_static(b"0123")).await.err().map(|error| error.kind())
}

#[tokio::test]
async fn rules_choose_by_verb_key_and_number() {
    let store = store();
    store.add(When::verb(Verb::PutNew).key("log/").skip(1).times(2), Fault::Before(Kind::Unavailable));
    let mut got = Vec::new();
    for name in ["log/1", "map/1", "log/2", "map/2", "log/3", "log/4"] {
        got.push(put(&store, name).await.is_some());
    }
    assert_eq!(got, [false, false, true, false, true, false]);
    assert_eq!(store.counts().put_new, 6);
    assert_eq!(store.inner().counts().put_new, 4, "before means before");
    let trace = store.trace();
    assert_eq!((trace[2].verb, trace[2].key.as_str()), (Verb::PutNew, "log/2"));
    assert_eq!(trace[2].fault, Some(Fault::Before(Kind::Unavailable)));
    assert_eq!(trace[3].fault, None);
}

/// A crash test counts the steps in one pass, and stops at each of them in the next.
#[tokio::test]
async fn a_step_is_a_number_over_all_verbs() {
    let store = store();
    store.add(When::step(2), Fault::Before(Kind::Other));
    assert_eq!(put(&store, "a").await, None);
    store.get(&key("a"), 10).await.unwrap();
    assert_eq!(store.list("", None, 1).await.unwrap_err().kind(), Kind::Other);
    assert_eq!(put(&store, "b").await, None);
}

#[tokio::test]
async fn after_means_done() {
    let store = store();
    store.add(When::always(), Fault::After(Kind::Unavailable));
    assert_eq!(put(&store, "a").await, Some(Kind::Unavailable));
    assert!(store.delete(&key("b")).await.is_err());
    store.heal();
    assert_eq!(put(&store, "a").await, Some(Kind::Exists));
}

#[tokio::test]
async fn a_frozen_call_goes_on_when_released() {
    for (fault, done_while_frozen) in [(Fault::FreezeBefore, false), (Fault::FreezeAfter, true)] {
        let store = Arc::new(store());
        store.add(When::verb(Verb::PutNew).times(1), fault);
        let zombie = tokio::spawn({
            let store = Arc::clone(&store);
            async move { put(&store, "a").await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!zombie.is_finished(), "{fault:?}");
        assert_eq!(store.inner().objects().len(), usize::from(done_while_frozen), "{fault:?}");
        // Others are not frozen.
        assert_eq!(put(&store, "b").await, None);
        store.heal();
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!zombie.is_finished(), "healing is not waking");
        store.release();
        assert_eq!(zombie.await.unwrap(), None, "{fault:?}");
        assert!(store.inner().objects().contains_key(&key("a")));
    }
}

#[tokio::test]
async fn bodies_are_cut_and_flipped() {
    let store = store();
    put(&store, "a").await;
    store.add(When::verb(Verb::Get), Fault::Truncate(2));
    store.add(When::verb(Verb::GetRange), Fault::Flip(5));
    assert_eq!(store.get(&key("a"), 10).await.unwrap(), "01");
    assert_eq!(store.get_range(&key("a"), 0..4).await.unwrap(), "0023", "bit 0 of byte 5 modulo 4");
    assert_eq!(store.inner().objects()[&key("a")], "0123", "what is stored stays");
}

#[tokio::test]
async fn stale_reads_find_nothing() {
    let store = store();
    put(&store, "a").await;
    store.add(When::always(), Fault::Stale);
    assert!(store.get(&key("a"), 10).await.unwrap_err().is_not_found());
    assert_eq!(store.list("", None, 10).await.unwrap(), []);
}

#[tokio::test]
async fn an_ignored_condition_replaces() {
    let store = store();
    store.add(When::verb(Verb::PutNew).skip(1), Fault::IgnoreConditional);
    put(&store, "a").await;
    store.put_new(&key("a"), Bytes::from_static(b"second")).await.unwrap();
    assert_eq!(store.inner().objects()[&key("a")], "second");
}

#[tokio::test]
async fn chance_is_decided_by_the_seed() {
    let run = |seed| async move {
        let store = FaultStore::new(MemStore::new(), seed);
        store.add(When::always().chance(0.3), Fault::Before(Kind::Unavailable));
        let mut failed = Vec::new();
        for n in 0..1000 {
            failed.push(put(&store, &format!("k{n}")).await.is_some());
        }
        failed
    };
    assert_eq!(run(7).await, run(7).await);
    assert_ne!(run(7).await, run(8).await);
    let failed = run(7).await.iter().filter(|failed| **failed).count();
    assert!((230..370).contains(&failed), "{failed} of 1000 with a chance of 0.3");
}
