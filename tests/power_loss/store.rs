//! Power losses of the directory store: no acknowledged point is lost (I2), what is listed is whole (I1), what is said
//! to be right is right (I8), and the store can be written again.
//!
//! Read first: [`Recorded::sync`] (the workload, once), then [`Recorded::check`] (every image).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backhaul_receiver::store::dir::DirStore;
use backhaul_receiver::store::{MissingRoot, ObjectStore};
use backhaul_tests::faultdisk::{Crash, FaultDisk, FileSystem, Replica, WriteLog};
use backhaul_tests::fixture::copy_folder;
use backhaul_tests::inside::{Inside, init};
use backhaul_tests::noting::{Noting, When};
use backhaul_tests::{Random, image, needs_fault_disk};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = MIB + MIB / 2 + 55;
const POINTS: u64 = 9;

/// A point that was offered.
struct Offered {
    /// Where the log was when the agent began.
    began: u64,
    /// Where the log was when the agent was told that it is committed.
    acknowledged: u64,
    bytes: Vec<u8>,
    /// Of the bytes, computed without the agent.
    digest: String,
}

/// How much of an image is looked at. Of every point the log, the index and all data are verified in any case.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Two points are restored.
    Quick,
    /// All points are restored, and the receiver and the agent go on from here.
    Thorough,
}

/// What happened to a store on a disk, and to the disk.
struct Recorded {
    inside: Inside,
    log: WriteLog,
    /// Position where the file system was new.
    start: u64,
    /// Position where the store was made and an agent had joined.
    joined: u64,
    points: Vec<Offered>,
    /// What the volume holds after the last point.
    next: Vec<u8>,
    /// Copies of the agent's state and the position from which on each is the newest.
    states: BTreeMap<u64, String>,
}

async fn open(mounted: &Path, missing: MissingRoot) -> Result<Arc<dyn ObjectStore>, String> {
    match DirStore::open(&mounted.join("store"), missing).await {
        Ok(store) => Ok(Arc::new(store)),
        Err(e) => Err(e.to_string()),
    }
}

impl Recorded {
    /// An agent makes points in a store on a disk; the receiver is started anew half way.
    async fn sync(kind: FileSystem) -> Self {
        let inside = Inside::new(true);
        let disk = Arc::new(FaultDisk::new(&inside.path(""), "disk", kind.size()));
        kind.make(disk.path());
        let mounted = kind.mount(disk.path(), &inside.path("mnt")).expect("it was just made");
        let start = disk.position();
        let store = open(mounted.path(), MissingRoot::Create).await.expect("an empty folder");
        init(&*store).await;
        let (state, volume) = (inside.path("state"), inside.path("disk.img"));
        let mut random = Random::new(11);
        image::random(&volume, VOLUME, &mut random);
        let states = Arc::new(Mutex::new(BTreeMap::new()));
        // What the agent has on its disk at this moment; when a record is about to be written it knows of it already.
        let save = {
            let (disk, states, state, folder) = (disk.clone(), states.clone(), state.clone(), inside.path(""));
            move || {
                let at = disk.position();
                let name = format!("state-{at}");
                copy_folder(&state, &folder.join(&name));
                states.lock().expect("no copy panics").insert(at, name);
            }
        };
        let at_commit = (save.clone(), state.join("volumes.json"));
        let noting: Arc<dyn ObjectStore> = Arc::new(Noting::new(store.clone(), move |key, when| {
            if when == When::Before && key.as_str().contains("/log/") && at_commit.1.exists() {
                at_commit.0();
            }
        }));
        let mut receiving = inside.serve(noting.clone()).await;
        inside.join(store.clone(), &receiving, &state, &volume).await;
        let joined = disk.position();
        save();
        let mut points = Vec::new();
        for point in 1..=POINTS {
            if point == POINTS / 2 {
                receiving.end().await;
                receiving = inside.serve(noting.clone()).await;
            }
            let (began, bytes) = (disk.position(), std::fs::read(&volume).expect("it is there"));
            let digest = image::digest(&volume, 65_536);
            let report = inside.round(&receiving, &state).await.expect("nothing fails");
            assert_eq!(report.committed.expect("it always commits").seq.0, point);
            points.push(Offered { began, acknowledged: disk.position(), bytes, digest });
            save();
            change(&volume, point, &mut random);
        }
        receiving.end().await;
        drop((noting, store));
        drop(mounted);
        let log = disk.log();
        let next = std::fs::read(&volume).expect("it is there");
        let states = std::mem::take(&mut *states.lock().expect("no copy panics"));
        Self { inside, log, start, joined, points, next, states }
    }

    /// How many points were acknowledged at this moment.
    fn acknowledged(&self, at: u64) -> usize {
        self.points.iter().filter(|p| p.acknowledged <= at).count()
    }

    /// What the store must be after this power loss. Gives how many points it has.
    async fn check(&self, mounted: &Path, crash: &Crash, how: Check) -> usize {
        let store = match open(mounted, MissingRoot::Refuse).await {
            Ok(store) if crash.at >= self.joined => store,
            // Not more than half made: nothing was promised yet.
            Ok(_) | Err(_) if crash.at < self.joined => return 0,
            Ok(_) | Err(_) => panic!("{crash:?}: the store is gone (I2)"),
        };
        let points = self.inside.points(store.clone()).await;
        let begun = self.points.iter().filter(|p| p.began < crash.at).count();
        let acknowledged = self.acknowledged(crash.at);
        let expected: Vec<u64> = (1..=points.len() as u64).collect();
        assert_eq!(points, expected, "{crash:?}: numbers are contiguous (I4)");
        assert!(points.len() >= acknowledged, "{crash:?}: point {acknowledged} was acknowledged and is gone (I2)");
        assert!(points.len() <= begun, "{crash:?}: {} points, and {begun} were begun (I1)", points.len());
        for (number, offered) in points.iter().zip(&self.points) {
            let report = self.inside.verify(store.clone(), *number).await;
            let report = report.unwrap_or_else(|e| panic!("{crash:?}: verify of {number}: {e}"));
            assert!(report.damaged.is_empty(), "{crash:?}: point {number} is damaged (I1): {:?}", report.damaged);
            let digest = report.point.map(|p| p.volumes[0].digest.clone());
            assert_eq!(digest.as_ref(), Some(&offered.digest), "{crash:?}: point {number} is another one (I1)");
            // What is clean must be right: the newest always, and one of the others.
            if how == Check::Quick && *number != points.len() as u64 && *number != 1 + crash.at % points.len() as u64 {
                continue;
            }
            let restored = self.inside.restored(store.clone(), *number).await;
            assert!(restored == offered.bytes, "{crash:?}: point {number} differs from what was offered (I1)");
        }
        points.len()
    }

    /// The receiver starts anew on what is left, and the agent, which lost nothing, makes its next point.
    async fn goes_on(&self, mounted: &Path, crash: &Crash, before: usize) {
        let state = self.inside.path("state-now");
        let _ = std::fs::remove_dir_all(&state);
        let (_, copy) = self.states.range(..=crash.at).next_back().expect("it had joined");
        copy_folder(&self.inside.path(copy), &state);
        let store = open(mounted, MissingRoot::Refuse).await.expect("it can be opened");
        let receiving = self.inside.serve(store.clone()).await;
        let report = self.inside.round(&receiving, &state).await;
        receiving.end().await;
        let report = report.unwrap_or_else(|e| panic!("{crash:?}: no way on (I14): {e}"));
        let newest = report.committed.expect("it always commits").seq.0;
        assert_eq!(newest, before as u64 + 1, "{crash:?}: numbers are contiguous (I4)");
        assert!(self.inside.restored(store.clone(), newest).await == self.next, "{crash:?}: what came after differs");
        if before > 0 {
            let restored = self.inside.restored(store, before as u64).await;
            assert!(restored == self.points[before - 1].bytes, "{crash:?}: what was there before differs (I1)");
        }
    }
}

/// Large changes and small ones, zeroes, and old content again.
fn change(volume: &Path, point: u64, random: &mut Random) {
    let at = random.between(0, VOLUME - 800_000);
    match point % 4 {
        0 => image::write(volume, at, &random.bytes(700_000)),
        1 => image::write(volume, at, &random.bytes(100)),
        2 => image::write(volume, at / 65_536 * 65_536, &[0; 3 * 65_536]),
        _ => {
            let whole = std::fs::read(volume).expect("it is there");
            image::write(volume, at, &whole[..200_000]);
        }
    }
}

/// One in so many images is looked at thoroughly.
const THOROUGH: usize = 16;

async fn power_losses(kind: FileSystem, test: &str) {
    if !needs_fault_disk(test) {
        return;
    }
    let started = Instant::now();
    let recorded = Recorded::sync(kind).await;
    let seed = Random::printed(test).number();
    let crashes = recorded.log.crashes(recorded.start, kind.sector(), 4, seed);
    let mut replica = Replica::new(&recorded.inside.path(""), "replica", kind);
    let mut went_on = 0;
    for (i, crash) in crashes.iter().enumerate() {
        let mounted = replica.after(&recorded.log, crash).unwrap_or_else(|e| panic!("{crash:?}: does not mount: {e}"));
        let how = if i % THOROUGH == 0 { Check::Thorough } else { Check::Quick };
        let points = recorded.check(mounted.path(), crash, how).await;
        if how == Check::Thorough && crash.at >= recorded.joined {
            recorded.goes_on(mounted.path(), crash, points).await;
            went_on += 1;
        }
    }
    let torn = replica.torn_superblocks();
    println!("{kind:?}: {} power losses, {went_on} gone on from, in {:?}", crashes.len(), started.elapsed());
    println!("{torn} with a torn superblock were looked at untorn");
    assert!(torn * 50 <= crashes.len(), "{torn} images do not mount");
    assert!(crashes.len() >= 600, "only {} power losses: the store flushes less than it did", crashes.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_store_on_ext4() {
    power_losses(FileSystem::Ext4, "store::of_the_store_on_ext4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_store_on_xfs() {
    power_losses(FileSystem::Xfs, "store::of_the_store_on_xfs").await;
}
