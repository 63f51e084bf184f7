//! Crashes at every store operation of a sync in turn, and points without end (I1, I2, I3).

use std::path::Path;
use std::sync::Arc;

use backhaul_protocol::ids::LogSeq;
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::store::fault::{Fault, FaultStore, When};
use backhaul_receiver::store::mem::MemStore;
use backhaul_receiver::store::{Kind, ObjectStore};
use backhaul_receiver::view::View;
use backhaul_tests::fixture::{GROUP, copy_folder};
use backhaul_tests::inside::{Inside, init};
use backhaul_tests::{Random, image};

const MIB: u64 = 1 << 20;

type Faulty = Arc<FaultStore<Arc<MemStore>>>;

fn faulty(store: &Arc<MemStore>) -> Faulty {
    Arc::new(FaultStore::new(store.clone(), 1))
}

/// What a sync in which the receiver dies begins with.
struct Scenario {
    inside: Inside,
    store: Arc<MemStore>,
    /// Of every point so far, the bytes that were offered.
    offered: Vec<Vec<u8>>,
    /// What is offered next.
    next: Vec<u8>,
}

impl Scenario {
    /// After so many points; each changes so many bytes.
    async fn new(points: u64, change: usize) -> Self {
        let inside = Inside::new(true);
        let store = Arc::new(MemStore::new());
        init(&*store).await;
        let receiving = inside.serve(store.clone()).await;
        let (state, disk) = (inside.path("state"), inside.path("disk.img"));
        let mut random = Random::new(points * 1000 + change as u64);
        image::random(&disk, 9 * MIB + 55, &mut random);
        inside.join(store.clone(), &receiving, &state, &disk).await;
        let mut offered = Vec::new();
        for _ in 0..points {
            offered.push(std::fs::read(&disk).expect("it is there"));
            inside.round(&receiving, &state).await.expect("nothing fails yet");
            let at = random.between(0, 9 * MIB - change as u64);
            image::write(&disk, at, &random.bytes(change));
        }
        receiving.end().await;
        let next = std::fs::read(&disk).expect("it is there");
        Self { inside, store, offered, next }
    }

    /// What the store shows must be what was offered, point by point.
    async fn check(&self, store: Arc<dyn ObjectStore>, at_least: usize, what: &str) -> usize {
        let points = self.inside.points(store.clone()).await;
        assert!(points.len() >= at_least, "{what}: a point that was acknowledged is gone: {points:?}");
        assert!(points.len() <= self.offered.len() + 1, "{what}: points out of nothing: {points:?}");
        // The newest is the one that a crash could hurt; the others every now and then.
        for (i, number) in points.iter().enumerate().rev().take(2) {
            let expected = self.offered.get(i).unwrap_or(&self.next);
            assert!(self.inside.restored(store.clone(), *number).await == *expected, "{what}: point {number} differs");
        }
        points.len()
    }

    /// The receiver dies at operation `step`: before it is done, or after it with the reply lost.
    async fn crash_at(&self, step: u64, done: bool) -> bool {
        let what = format!("step {step}{}", if done { ", done" } else { "" });
        let survivor = Arc::new(self.store.fork());
        let dying = faulty(&survivor);
        let state = self.inside.path("state-now");
        let _ = std::fs::remove_dir_all(&state);
        copy_folder(&self.inside.path("state"), &state);
        let receiving = self.inside.serve(dying.clone()).await;
        let skip = dying.trace().len() as u64;
        if done {
            dying.add(When::step(step), Fault::After(Kind::Unavailable));
        }
        // A rule that fits ends the search: this one does not see the step that is done.
        dying.add(When::always().skip(step), Fault::Before(Kind::Unavailable));
        let began = std::time::Instant::now();
        let outcome = self.inside.round(&receiving, &state).await;
        let failed = outcome.as_ref().map_or_else(ToString::to_string, |_| "acknowledged".into());
        // What it does after a commit that nobody waits for; then it can't reach the store any more.
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        tokio::spawn(receiving.end());
        println!("{what}: {failed} after {:?}", began.elapsed());
        let reached = dying.trace().len() as u64 > skip + step;

        let acknowledged = self.offered.len() + usize::from(outcome.is_ok());
        let before = self.check(survivor.clone(), acknowledged, &what).await;

        // Started again, it goes on; then what was offered is there.
        let receiving = self.inside.serve(survivor.clone()).await;
        let report = self.inside.round(&receiving, &state).await.unwrap_or_else(|e| panic!("{what}: no way on: {e}"));
        tokio::spawn(receiving.end());
        let newest = report.committed.expect("it always commits").seq.0;
        assert_eq!(newest, before as u64 + 1, "{what}: numbers are contiguous");
        assert!(self.inside.restored(survivor, newest).await == self.next, "{what}: what came after differs");
        reached
    }
}

async fn crash_everywhere(points: u64, change: usize) {
    let scenario = Scenario::new(points, change).await;
    let mut steps = 0;
    for done in [false, true] {
        let mut step = 0;
        while scenario.crash_at(step, done).await {
            step += 1;
            assert!(step < 500, "it never ends");
        }
        steps += step;
    }
    println!("{steps} crashes");
    assert!(steps > 10, "a sync does more than {steps} things");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_operation_of_a_first_sync() {
    crash_everywhere(0, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_operation_of_a_large_change() {
    crash_everywhere(2, 5 << 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_every_operation_of_a_small_change() {
    crash_everywhere(3, 1000).await;
}

/// Enough points that this one folds.
#[tokio::test(flavor = "multi_thread")]
async fn at_every_operation_of_a_sync_that_folds() {
    crash_everywhere(64, 300_000).await;
}

/// A point's record and the requests to open it stay bounded after many small points. 600 here; 5,000 with
/// `BACKHAUL_TEST_POINTS=5000`, which takes some minutes.
#[tokio::test(flavor = "multi_thread")]
async fn bounded_after_many_small_points() {
    let points: u64 = std::env::var("BACKHAUL_TEST_POINTS").ok().and_then(|n| n.parse().ok()).unwrap_or(600);
    let inside = Inside::new(true);
    let store = Arc::new(MemStore::new());
    init(&*store).await;
    let receiving = inside.serve(store.clone()).await;
    let (state, disk) = (inside.path("state"), inside.path("disk.img"));
    let mut random = Random::new(5);
    image::sparse(&disk, 32 * MIB);
    inside.join(store.clone(), &receiving, &state, &disk).await;
    let (mut most_requests, mut most_bytes) = (0, 0);
    for point in 1..=points {
        image::write(&disk, random.between(0, 32 * MIB - 8), &random.number().to_le_bytes());
        inside.round(&receiving, &state).await.expect("nothing fails");
        if point % 50 == 0 || point == points {
            let (requests, bytes) = opened(store.clone(), &disk, point).await;
            println!("point {point}: record of {bytes} bytes, opened with {requests} requests");
            most_requests = most_requests.max(requests);
            most_bytes = most_bytes.max(bytes);
        }
    }
    // A record lists at most 64 segments and 16 delta maps of 64 bytes each beside what lies inside it.
    assert!(most_bytes <= backhaul_protocol::limits::MAX_LOG_RECORD, "{most_bytes} bytes");
    assert!(most_requests <= 128, "{most_requests} requests");
    receiving.end().await;
    let expected = std::fs::read(&disk).expect("it is there");
    assert!(inside.restored(store, points).await == expected);
}

/// Opens the newest point as a restore does: requests, and bytes of its record.
async fn opened(store: Arc<MemStore>, disk: &Path, point: u64) -> (u64, usize) {
    let counting: Faulty = faulty(&store);
    let catalog = Catalog::open(counting.clone() as Arc<dyn ObjectStore>).await.expect("a store");
    let log = catalog.expect_group(&GROUP.parse().expect("legal")).await.expect("the group");
    let before = counting.counts().total();
    let (record, _) = log.read(LogSeq(point)).await.expect("readable").expect("it is there");
    let body = record.point().expect("a point");
    assert_eq!(body.volumes[0].geometry.length(), disk.metadata().expect("there").len());
    let view = View::open(log.store(), log.keys(), body).await.expect("it opens");
    drop(view);
    (counting.counts().total() - before, record.to_bytes().len())
}
