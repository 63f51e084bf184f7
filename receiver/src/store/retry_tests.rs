use std::sync::Arc;

use super::*;
use crate::store::fault::{Fault, FaultStore, When};
use crate::store::mem::MemStore;

type Faulty = Arc<FaultStore<MemStore>>;

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn settings(total: u64) -> RetrySettings {
    let ms = Duration::from_millis;
    RetrySettings { first_pause: ms(1), longest_pause: ms(8), total: ms(total), seed: Some(1) }
}

/// A store with faults, and the same store with retries around it.
fn pair(total: u64, seed: u64) -> (Faulty, Retrying<Faulty>) {
    let faulty = Arc::new(FaultStore::new(MemStore::new(), seed));
    let retrying = Retrying::new(Arc::clone(&faulty), settings(total));
    (faulty, retrying)
}

#[tokio::test]
async fn what_may_help_is_tried_again_and_nothing_else() {
    let (faulty, store) = pair(5000, 1);
    let a = key("a");
    faulty.add(When::always().times(4), Fault::Before(Kind::Unavailable));
    store.put_new(&a, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(faulty.counts().put_new, 5);
    for kind in [Kind::NotFound, Kind::Permission, Kind::NoSpace, Kind::Corrupt, Kind::Config, Kind::Other] {
        faulty.heal();
        faulty.add(When::always(), Fault::Before(kind));
        let before = faulty.counts().total();
        assert_eq!(store.get(&a, 10).await.unwrap_err().kind(), kind);
        assert_eq!(store.put_hint(&a, Bytes::new()).await.unwrap_err().kind(), kind);
        assert_eq!(faulty.counts().total(), before + 2, "{kind:?} is tried once");
    }
}

#[tokio::test]
async fn time_bounds_the_attempts_and_not_their_number() {
    let (faulty, store) = pair(200, 1);
    faulty.add(When::always(), Fault::Before(Kind::Unavailable));
    let start = Instant::now();
    let error = store.list("", None, 1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    let tried = faulty.counts().list;
    assert!(tried >= 5, "{tried} attempts in 200 ms with pauses of at most 16 ms");
    assert!(error.to_string().contains(&format!("tried {tried} times")), "{error}");
    assert!(start.elapsed() < Duration::from_millis(1000), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_backend_that_never_answers_is_left() {
    let (faulty, store) = pair(100, 1);
    faulty.add(When::always(), Fault::FreezeBefore);
    let start = Instant::now();
    let error = store.get(&key("a"), 1).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(start.elapsed() < Duration::from_millis(1000), "{:?}", start.elapsed());
    assert_eq!(faulty.counts().get, 1);
}

/// F16. The object is there after a failure: by us, or by somebody else.
#[tokio::test]
async fn a_lost_reply_is_success_only_if_the_bytes_are_ours() {
    let body = Bytes::from_static(b"commit 1");
    let (faulty, store) = pair(5000, 1);
    let (a, b) = (key("a"), key("b"));
    faulty.add(When::verb(Verb::PutNew).times(1), Fault::After(Kind::Unavailable));
    store.put_new(&a, body.clone()).await.unwrap();
    assert_eq!((faulty.counts().put_new, faulty.counts().get), (2, 1), "tried again, then read back");
    assert_eq!(store.put_new(&a, body.clone()).await.unwrap_err().kind(), Kind::Exists, "nothing was lost here");

    for theirs in ["", "commit 2", "commit 1 and more"] {
        faulty.heal();
        faulty.inner().tamper(&b, Some(Bytes::from(theirs)));
        faulty.add(When::verb(Verb::PutNew).times(1), Fault::Before(Kind::Unavailable));
        assert_eq!(store.put_new(&b, body.clone()).await.unwrap_err().kind(), Kind::Exists, "{theirs:?}");
        assert_eq!(faulty.inner().objects()[&b], theirs, "never replaced");
    }
}

/// I3: what cannot be read back is not acknowledged, and not denied.
#[tokio::test]
async fn unknown_stays_unknown() {
    for fault in [Fault::Before(Kind::Unavailable), Fault::Before(Kind::Permission), Fault::Stale, Fault::FreezeBefore]
    {
        let (faulty, store) = pair(100, 1);
        faulty.add(When::verb(Verb::PutNew).times(1), Fault::After(Kind::Unavailable));
        faulty.add(When::verb(Verb::Get), fault);
        let error = store.put_new(&key("a"), Bytes::from_static(b"x")).await.expect_err("nobody knows");
        assert_eq!(error.kind(), Kind::Unavailable, "{fault:?}: {error}");
    }
}

#[tokio::test]
async fn damage_on_the_way_back_is_not_our_success() {
    let (faulty, store) = pair(100, 1);
    faulty.add(When::verb(Verb::PutNew).times(1), Fault::After(Kind::Unavailable));
    faulty.add(When::verb(Verb::Get), Fault::Flip(0));
    let error = store.put_new(&key("a"), Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exists, "{error}");
}

#[tokio::test]
async fn pauses_grow_to_their_limit() {
    let store = Retrying::new(MemStore::new(), RetrySettings { seed: None, ..RetrySettings::default() });
    let pauses: Vec<_> = store.tries(Verb::Get, "a", 0).pauses.take(20).collect();
    let RetrySettings { first_pause, longest_pause, .. } = RetrySettings::default();
    assert!(pauses[0] >= first_pause && pauses[0] <= 2 * first_pause, "{pauses:?}");
    assert!(pauses.iter().all(|pause| *pause <= 2 * longest_pause), "{pauses:?}");
    assert!(pauses[10..].iter().all(|pause| *pause >= longest_pause), "{pauses:?}");
    let other: Vec<_> = store.tries(Verb::Get, "a", 0).pauses.take(20).collect();
    assert_ne!(pauses, other, "two receivers do not pause in step");
}

/// Four writers under a storm of failures before and after: of each key one writer believes that it won, and what it
/// wrote is there.
#[tokio::test]
async fn a_storm_leaves_one_winner_for_each_key() {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos();
    storm(u64::from(seed)).await;
}

#[tokio::test]
async fn a_storm_of_a_known_seed() {
    storm(1).await;
}

async fn storm(seed: u64) {
    println!("seed {seed}");
    let (faulty, store) = pair(20_000, seed);
    faulty.add(When::always().chance(0.2), Fault::Before(Kind::Unavailable));
    faulty.add(When::always().chance(0.2), Fault::After(Kind::Unavailable));
    let store = Arc::new(store);
    let mut winners = vec![Vec::new(); 50];
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            let mut won = Vec::new();
            for n in 0..50 {
                match store.put_new(&key(&format!("k{n}")), Bytes::from(format!("writer {writer}"))).await {
                    Ok(()) => won.push(n),
                    Err(error) => assert_eq!(error.kind(), Kind::Exists, "seed {seed}: {error}"),
                }
            }
            (writer, won)
        });
    }
    for (writer, won) in writers.join_all().await {
        for n in won {
            winners[n].push(writer);
        }
    }
    for (n, won) in winners.iter().enumerate() {
        assert_eq!(won.len(), 1, "seed {seed}: k{n} was won by {won:?}");
        let found = &faulty.inner().objects()[&key(&format!("k{n}"))];
        assert_eq!(*found, format!("writer {}", won[0]), "seed {seed}: k{n}");
    }
    let lost = faulty.trace().iter().filter(|step| matches!(step.fault, Some(Fault::After(_)))).count();
    assert!(lost > 20, "the situation was reached only {lost} times");
}

/// Errors and silence alike are known after some seconds, and forgotten when the call ends. In real time: 6 s.
#[tokio::test]
async fn a_call_without_an_answer_is_known_to_others() {
    let known = |fault| async move {
        let (faulty, store) = pair(6000, 1);
        let waits = store.waits().expect("the retry layer keeps track");
        let a = key("a");
        faulty.add(When::always(), fault);
        let call = tokio::spawn(async move { store.get(&a, 10).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(waits.longest().is_none(), "one second is nothing");
        tokio::time::sleep(Duration::from_millis(3500)).await;
        let waiting = waits.longest().expect("four seconds and a half are much");
        assert!(waiting.reason.contains("cannot read a"), "{}", waiting.reason);
        assert_eq!(waiting.total, Duration::from_secs(6));
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(waits.longest().is_none());
        let refusal = crate::read_error::ReadError::from(error).refusal();
        assert_eq!(backhaul_cli::of_reason(refusal.reason).0, backhaul_cli::Exit::Network);
    };
    tokio::join!(known(Fault::Before(Kind::Unavailable)), known(Fault::Delay(Duration::from_secs(3600))));
}
