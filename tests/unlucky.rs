//! Receivers that sleep, stores that fail once, volumes that shrink and grow again: the same agent goes on (I1, I3, I4).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backhaul_agent::protect;
use backhaul_agent::state::StateDir;
use backhaul_receiver::store::fault::{Fault, FaultStore, When};
use backhaul_receiver::store::mem::MemStore;
use backhaul_receiver::store::{Kind, Verb};
use backhaul_tests::fixture::copy_folder;
use backhaul_tests::inside::{Inside, Receiving, init};
use backhaul_tests::{Random, image};

const MIB: u64 = 1 << 20;

type Faulty = Arc<FaultStore<Arc<MemStore>>>;

/// Two receivers of one store, whose failures are their own, and an agent with one point.
struct Two {
    inside: Inside,
    store: Arc<MemStore>,
    stores: [Faulty; 2],
    receiving: [Receiving; 2],
}

impl Two {
    async fn new() -> Self {
        let inside = Inside::new(true);
        let store = Arc::new(MemStore::new());
        init(&*store).await;
        let stores = [1, 2].map(|seed| Arc::new(FaultStore::new(store.clone(), seed)));
        let receiving = [inside.serve(stores[0].clone()).await, inside.serve(stores[1].clone()).await];
        let two = Self { inside, store, stores, receiving };
        image::random(&two.disk(), 3 * MIB, &mut Random::new(1));
        two.inside.join(two.store.clone(), &two.receiving[0], &two.state(), &two.disk()).await;
        two.inside.round(&two.receiving[0], &two.state()).await.expect("nothing fails yet");
        two
    }

    fn state(&self) -> std::path::PathBuf {
        self.inside.path("state")
    }
    fn disk(&self) -> std::path::PathBuf {
        self.inside.path("disk.img")
    }

    /// The agent asks the first receiver for a point, which falls asleep over the log record; the agent gives up.
    async fn asleep_over_the_record(&self) {
        self.stores[0].add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::FreezeBefore);
        image::write(&self.disk(), 5, b"asleep");
        let state = self.state();
        let mut round = std::pin::pin!(self.inside.round(&self.receiving[0], &state));
        let asleep = || self.stores[0].trace().iter().any(|s| s.fault == Some(Fault::FreezeBefore));
        while !asleep() {
            let nap = tokio::time::timeout(Duration::from_millis(20), round.as_mut()).await;
            assert!(nap.is_err(), "it was to fall asleep");
        }
    }

    async fn points(&self) -> Vec<u64> {
        self.inside.points(self.store.clone()).await
    }

    async fn until_points(&self, expected: &[u64]) {
        for _ in 0..200 {
            if self.points().await == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no {expected:?}: {:?}", self.points().await);
    }

    async fn holds_what_was_offered(&self) {
        let newest = *self.points().await.last().expect("points");
        assert!(
            self.inside.restored(self.store.clone(), newest).await == std::fs::read(self.disk()).expect("it is there")
        );
    }
}

/// A commit that nobody waits for any more lands after the agent has asked for another one: the agent is who it says
/// it is all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_lands_late_does_not_make_its_agent_a_stranger() {
    let two = Two::new().await;
    two.asleep_over_the_record().await;
    two.stores[1].add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::Before(Kind::Unavailable));
    image::write(&two.disk(), 100, b"the next one");
    two.inside.round(&two.receiving[1], &two.state()).await.expect_err("its record is not stored");
    two.stores[0].release();
    two.until_points(&[1, 2]).await;
    let report = two.inside.round(&two.receiving[1], &two.state()).await.expect("it is no stranger");
    assert_eq!(report.head.0, 3);
    two.holds_what_was_offered().await;
}

/// A receiver that sleeps over a commit while another one takes over, and wakes up: fenced, and no harm done.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_wakes_up_late_is_fenced() {
    let two = Two::new().await;
    two.asleep_over_the_record().await;
    for at in [100, 2 * MIB] {
        image::write(&two.disk(), at, b"the other one");
        two.inside.round(&two.receiving[1], &two.state()).await.expect("it takes over");
    }
    assert_eq!(two.points().await, [1, 2, 3]);
    let before = two.store.fork();
    two.stores[0].release();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(two.points().await, [1, 2, 3], "nothing came of it");
    for point in 1..=3 {
        let (then, now) = (Arc::new(before.fork()), two.store.clone());
        assert!(two.inside.restored(then, point).await == two.inside.restored(now, point).await, "point {point}");
    }
    // It knows better now, and is of use again.
    image::write(&two.disk(), MIB, b"awake");
    let report = two.inside.round(&two.receiving[0], &two.state()).await.expect("it has read what happened");
    assert_eq!(report.head.0, 4);
    two.holds_what_was_offered().await;
}

/// The store fails once, at every operation of a sync in turn; the same receiver goes on, and the same agent.
async fn fails_once_everywhere(points: u64, change: usize) {
    let inside = Inside::new(true);
    let store = Arc::new(MemStore::new());
    init(&*store).await;
    let (state, disk) = (inside.path("state"), inside.path("disk.img"));
    let mut random = Random::new(points);
    image::random(&disk, 5 * MIB, &mut random);
    let receiving = inside.serve(store.clone()).await;
    inside.join(store.clone(), &receiving, &state, &disk).await;
    for _ in 0..points {
        inside.round(&receiving, &state).await.expect("nothing fails yet");
        image::write(&disk, random.between(0, 5 * MIB - change as u64), &random.bytes(change));
    }
    receiving.end().await;
    let offered = std::fs::read(&disk).expect("it is there");
    for fault in [Fault::Before(Kind::Unavailable), Fault::After(Kind::Unavailable)] {
        for step in 0.. {
            let what = format!("step {step} {fault:?}");
            let fork = Arc::new(store.fork());
            let faulty: Faulty = Arc::new(FaultStore::new(fork.clone(), 1));
            let now = inside.path("state-now");
            let _ = std::fs::remove_dir_all(&now);
            copy_folder(&state, &now);
            let receiving = inside.serve(faulty.clone()).await;
            let served = faulty.trace().len() as u64;
            faulty.add(When::step(step), fault);
            let first = inside.round(&receiving, &now).await;
            let reached = faulty.trace().len() as u64 > served + step;
            faulty.heal();
            let second = inside.round(&receiving, &now).await;
            let report = second.unwrap_or_else(|e| panic!("{what}: first {:?}, then {e}", first.err()));
            let newest = report.committed.expect("it always commits").seq.0;
            assert!(inside.restored(fork, newest).await == offered, "{what}: it differs");
            tokio::spawn(receiving.end());
            if !reached {
                assert!(step > 10, "a sync does more than {step} things");
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_fails_once_during_a_sync_that_folds() {
    fails_once_everywhere(64, 300_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_fails_once_during_a_first_sync() {
    fails_once_everywhere(0, 1).await;
}

fn set_len(disk: &Path, len: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(disk).expect("it is there");
    file.set_len(len).expect("there is room");
}

/// What lay beyond the end of a volume that shrank does not come back when it grows: not from memory, not from the
/// store, not through a fold.
async fn shrinks_and_grows(points: u64) {
    let inside = Inside::new(true);
    let store = Arc::new(MemStore::new());
    init(&*store).await;
    let (state, disk) = (inside.path("state"), inside.path("disk.img"));
    let mut random = Random::new(points);
    // Two pages of 64 MiB, and something in both.
    image::sparse(&disk, 66 * MIB + 5);
    image::write(&disk, 0, &random.bytes(3 << 20));
    image::write(&disk, 65 * MIB, &random.bytes(1 << 20));
    let mut receiving = inside.serve(store.clone()).await;
    inside.join(store.clone(), &receiving, &state, &disk).await;
    for _ in 0..points {
        inside.round(&receiving, &state).await.expect("nothing fails");
        image::write(&disk, random.between(0, MIB), &random.bytes(100));
    }
    for (i, len) in
        [MIB + 100, 66 * MIB + 5, 65 * MIB + 777, 70 * MIB, 64 * MIB, 66 * MIB, MIB, 2 * MIB].into_iter().enumerate()
    {
        let shrinks = len < disk.metadata().expect("it is there").len();
        set_len(&disk, len);
        if shrinks {
            let volumes = [("data".parse().expect("legal"), disk.clone())];
            protect::protect(&StateDir::new(&state), &volumes, 65536).expect("it is named again");
        }
        if i % 2 == 1 {
            // Half of the time the receiver remembers nothing.
            receiving.end().await;
            receiving = inside.serve(store.clone()).await;
        }
        let report = inside.round(&receiving, &state).await.unwrap_or_else(|e| panic!("{len} bytes: {e}"));
        let restored = inside.restored(store.clone(), report.head.0).await;
        assert!(restored == std::fs::read(&disk).expect("it is there"), "{len} bytes after {points} points");
    }
    receiving.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_volume_lost_when_it_shrank_does_not_come_back() {
    shrinks_and_grows(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_volume_lost_when_it_shrank_does_not_come_back_through_a_fold() {
    shrinks_and_grows(62).await;
}

/// A first sync that is broken off when its draft has been folded; another receiver finds it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_draft_that_was_folded_is_taken_up_by_another_receiver() {
    let inside = Inside::new(true);
    let store = Arc::new(MemStore::new());
    init(&*store).await;
    let (state, disk) = (inside.path("state"), inside.path("disk.img"));
    let faulty: Faulty = Arc::new(FaultStore::new(store.clone(), 1));
    let receiving = inside.serve(faulty.clone()).await;
    image::random(&disk, 240 * MIB, &mut Random::new(9));
    inside.join(store.clone(), &receiving, &state, &disk).await;
    // A map has been stored, and some segments after it.
    faulty.add(When::verb(Verb::PutNew).key("/segments/").skip(105), Fault::Before(Kind::Unavailable));
    // Slow enough that the draft is folded meanwhile.
    faulty.add(When::verb(Verb::PutNew).key("/segments/"), Fault::Delay(Duration::from_millis(30)));
    inside.round(&receiving, &state).await.expect_err("the store fails");
    let put = |key: &str| faulty.trace().iter().filter(|s| s.verb == Verb::PutNew && s.key.contains(key)).count();
    assert!(put("/maps/") > 0, "it was folded");
    receiving.end().await;
    let counting: Faulty = Arc::new(FaultStore::new(store.clone(), 1));
    let receiving = inside.serve(counting.clone()).await;
    image::write(&disk, 3 * MIB, b"changed meanwhile");
    let report = inside.round(&receiving, &state).await.expect("it goes on");
    assert!(report.bytes_sent < 90 * MIB, "most of it was there: {}", report.bytes_sent);
    assert!(inside.restored(store, report.head.0).await == std::fs::read(&disk).expect("it is there"));
    receiving.end().await;
}
