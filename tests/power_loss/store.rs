//! Power losses of the directory store: no acknowledged point is lost (I2), what is listed is whole (I1), what is said
//! to be right is right (I8), and the store can be written again.
//!
//! Read first: [`Recorded::sync`] (the workload, once), then [`Recorded::check`] (every image).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backhaul_protocol::store::key::ObjectKey;
use backhaul_receiver::store::dir::DirStore;
use backhaul_receiver::store::{MissingRoot, ObjectStore};
use backhaul_tests::faultdisk::{Crash, FaultDisk, FileSystem, Replica, WriteLog};
use backhaul_tests::fixture::copy_folder;
use backhaul_tests::inside::{Inside, init};
use backhaul_tests::noting::{Noting, When};
use backhaul_tests::{Random, image, needs_fault_disk};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = MIB + MIB / 2 + 55;
const POINTS: u64 = 11;

/// A point that was offered.
pub struct Offered {
    /// Where the log was when the agent began.
    began: u64,
    /// Where the log was when its record was durable, as the store said: from here on the agent may be told.
    acknowledged: u64,
    pub bytes: Vec<u8>,
    /// Of the bytes, computed without the agent.
    digest: String,
}

/// How much of an image is looked at. Of every point the log, the index and all data are verified in any case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Two points are restored.
    Quick,
    /// All points are restored, and the receiver and the agent go on from here.
    Thorough,
}

/// What happened to a store on a disk, and to the disk.
pub struct Recorded {
    pub inside: Inside,
    pub log: WriteLog,
    /// Position where the file system was new.
    pub start: u64,
    /// Position where the store was made and an agent had joined.
    pub joined: u64,
    pub points: Vec<Offered>,
    /// What the volume holds after the last point.
    next: Vec<u8>,
    /// Copies of the agent's state and the position from which on each is the newest.
    states: BTreeMap<u64, String>,
}

pub async fn open(mounted: &Path, missing: MissingRoot) -> Result<Arc<dyn ObjectStore>, String> {
    match DirStore::open(&mounted.join("store"), missing).await {
        Ok(store) => Ok(Arc::new(store)),
        Err(e) => Err(e.to_string()),
    }
}

impl Recorded {
    /// An agent makes points in a store on a disk; the receiver is started anew half way.
    pub async fn sync(kind: FileSystem) -> Self {
        Self::sync_through(kind, |store, _| store).await
    }

    /// The same; `through` may put something around the store and gets the folder that it is in.
    pub async fn sync_through(
        kind: FileSystem,
        through: impl FnOnce(Arc<dyn ObjectStore>, PathBuf) -> Arc<dyn ObjectStore>,
    ) -> Self {
        let inside = Inside::new(true);
        let disk = Arc::new(FaultDisk::new(&inside.path(""), "disk", kind.size()));
        kind.make(disk.path());
        let mounted = kind.mount(disk.path(), &inside.path("mnt")).expect("it was just made");
        let start = disk.position();
        let store = open(mounted.path(), MissingRoot::Create).await.expect("an empty folder");
        init(&*store).await;
        let store = through(store, mounted.join("store"));
        let (state, volume) = (inside.path("state"), inside.path("disk.img"));
        let mut random = Random::new(11);
        image::random(&volume, VOLUME, &mut random);
        let watcher = Arc::new(Watcher {
            disk: disk.clone(),
            state: state.clone(),
            folder: inside.path(""),
            states: Mutex::default(),
            committed: AtomicU64::new(0),
        });
        let noting: Arc<dyn ObjectStore> = {
            let watcher = watcher.clone();
            Arc::new(Noting::new(store.clone(), move |key, when| watcher.see(key, when)))
        };
        let mut receiving = inside.serve(noting.clone()).await;
        inside.join(store.clone(), &receiving, &state, &volume).await;
        let joined = disk.position();
        watcher.save();
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
            points.push(Offered { began, acknowledged: watcher.committed.load(Ordering::SeqCst), bytes, digest });
            watcher.save();
            change(&volume, point, &mut random);
        }
        receiving.end().await;
        drop((noting, store));
        drop(mounted);
        let log = disk.log();
        let next = std::fs::read(&volume).expect("it is there");
        let states = std::mem::take(&mut *watcher.states.lock().expect("no copy panics"));
        Self { inside, log, start, joined, points, next, states }
    }

    /// What the store must be after this power loss. Gives how many points it has, or what is wrong with it.
    pub async fn check(&self, mounted: &Path, crash: &Crash, how: Check) -> Result<usize, String> {
        let store = match open(mounted, MissingRoot::Refuse).await {
            // Not more than half made: nothing was promised yet.
            _ if crash.at < self.joined => return Ok(0),
            result => result.map_err(|e| format!("the store is gone (I2): {e}"))?,
        };
        let points = self.inside.try_points(store.clone()).await.map_err(|e| format!("the log (I1, I4): {e}"))?;
        let begun = self.points.iter().filter(|p| p.began < crash.at).count();
        let acknowledged = self.points.iter().filter(|p| p.acknowledged <= crash.at).count();
        if !points.iter().copied().eq(1..=points.len() as u64) {
            return Err(format!("numbers are not contiguous (I4): {points:?}"));
        }
        if points.len() < acknowledged {
            return Err(format!("point {acknowledged} was acknowledged and is gone (I2): {points:?}"));
        }
        if points.len() > begun {
            return Err(format!("points out of nothing (I1): {points:?}, and {begun} were begun"));
        }
        for (number, offered) in points.iter().zip(&self.points) {
            let report = self.inside.verify(store.clone(), *number).await;
            let report = report.map_err(|e| format!("verify of {number}: {e}"))?;
            if !report.damaged.is_empty() {
                return Err(format!("point {number} is damaged (I1): {:?}", report.damaged));
            }
            let digest = report.point.map(|p| p.volumes[0].digest.clone());
            if digest.as_ref() != Some(&offered.digest) {
                return Err(format!("point {number} is another one (I1): {digest:?}"));
            }
            // What is clean must be right: the newest always, and one of the others.
            if how == Check::Quick && *number != points.len() as u64 && *number != 1 + crash.at % points.len() as u64 {
                continue;
            }
            let restored = self.inside.try_restored(store.clone(), *number).await;
            let restored = restored.map_err(|e| format!("point {number} is clean and can't be restored (I8): {e}"))?;
            if restored != offered.bytes {
                return Err(format!("point {number} is clean and differs from what was offered (I1, I8)"));
            }
        }
        Ok(points.len())
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

/// Notes what happens meanwhile.
struct Watcher {
    disk: Arc<FaultDisk>,
    state: PathBuf,
    folder: PathBuf,
    states: Mutex<BTreeMap<u64, String>>,
    committed: AtomicU64,
}

impl Watcher {
    fn see(&self, key: &ObjectKey, when: When) {
        match when {
            _ if !key.as_str().contains("/log/") => {}
            When::After => self.committed.store(self.disk.position(), Ordering::SeqCst),
            // The agent knows of it already, and waits. The first record is from before it joined.
            When::Before if self.state.join("volumes.json").exists() => self.save(),
            When::Before => {}
        }
    }

    /// Keeps what the agent has on its disk at this moment.
    fn save(&self) {
        let at = self.disk.position();
        let name = format!("state-{at}");
        copy_folder(&self.state, &self.folder.join(&name));
        self.states.lock().expect("no copy panics").insert(at, name);
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
    let crashes = recorded.log.crashes(recorded.start, kind.sector(), 5, seed);
    let mut replica = Replica::new(&recorded.inside.path(""), "replica", kind);
    let mut went_on = 0;
    for (i, crash) in crashes.iter().enumerate() {
        let mounted = replica.after(&recorded.log, crash).unwrap_or_else(|e| panic!("{crash:?}: does not mount: {e}"));
        let how = if i % THOROUGH == 0 { Check::Thorough } else { Check::Quick };
        let points = recorded.check(mounted.path(), crash, how).await.unwrap_or_else(|e| panic!("{crash:?}: {e}"));
        if how == Check::Thorough && crash.at >= recorded.joined {
            recorded.goes_on(mounted.path(), crash, points).await;
            went_on += 1;
        }
    }
    let torn = replica.torn_superblocks();
    println!("{kind:?}: {} power losses, {went_on} gone on from, in {:?}", crashes.len(), started.elapsed());
    println!("{torn} with a torn superblock were looked at untorn");
    assert!(torn * 50 <= crashes.len(), "{torn} images do not mount");
    let after = crashes.iter().filter(|crash| crash.at >= recorded.joined).map(|crash| format!("{crash:?}"));
    let distinct = after.collect::<std::collections::BTreeSet<_>>().len();
    println!("{distinct} different ones since it had joined");
    // With those of the other tests: 2,000.
    let wanted = match kind {
        FileSystem::Ext4 => 720,
        FileSystem::Xfs => 500,
    };
    assert!(distinct >= wanted, "only {} power losses: the store flushes less than it did", distinct);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_store_on_ext4() {
    power_losses(FileSystem::Ext4, "store::of_the_store_on_ext4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_store_on_xfs() {
    power_losses(FileSystem::Xfs, "store::of_the_store_on_xfs").await;
}
