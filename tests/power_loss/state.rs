//! Power losses of the agent's state folder: files are old or new and never half (F5), an honest agent is never taken
//! for another one, and no lie of an index gets into a point (I5, I8).
//!
//! Read first: [`Recorded::sync`], then [`Recorded::check`]. Only the agent's machine loses power: the store is what it
//! was at that moment, or a moment later, when a commit that was under way has arrived.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use backhaul_agent::state::StateDir;
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::mem::MemStore;
use backhaul_tests::faultdisk::{Crash, FaultDisk, FileSystem, Replica, WriteLog};
use backhaul_tests::inside::{Inside, init};
use backhaul_tests::noting::{Noting, When};
use backhaul_tests::{Random, image, needs_fault_disk};

const MIB: u64 = 1 << 20;
const VOLUME: u64 = 2 * MIB + 55;
const BLOCK: usize = 65_536;
const POINTS: u64 = 12;

/// A commit, and the store right before and after.
struct Commit {
    /// Where the log was when the receiver was about to write the record: the agent had asked for it.
    asked: u64,
    /// Where the log was when the record was there, before the agent knew.
    done: u64,
    without: Arc<MemStore>,
    with: Arc<MemStore>,
}

struct Recorded {
    inside: Inside,
    log: WriteLog,
    start: u64,
    /// Position where the agent had joined and knew what to protect.
    joined: u64,
    empty: Arc<MemStore>,
    commits: Vec<Commit>,
    /// What the volume held, ever.
    contents: Vec<Vec<u8>>,
}

impl Recorded {
    /// An agent with its state on a disk makes points.
    async fn sync(kind: FileSystem) -> Self {
        let inside = Inside::new(true);
        let disk = Arc::new(FaultDisk::new(&inside.path(""), "disk", kind.size()));
        kind.make(disk.path());
        let mounted = kind.mount(disk.path(), &inside.path("mnt")).expect("it was just made");
        let start = disk.position();
        let store = Arc::new(MemStore::new());
        init(&*store).await;
        let seen = Arc::new(Mutex::new((0, Arc::new(store.fork()), 0)));
        let noting: Arc<dyn ObjectStore> = {
            let (disk, store, seen) = (disk.clone(), store.clone(), seen.clone());
            Arc::new(Noting::new(store.clone(), move |key, when| {
                let mut seen = seen.lock().expect("no fork panics");
                match when {
                    _ if !key.as_str().contains("/log/") => {}
                    When::Before => (seen.0, seen.1) = (disk.position(), Arc::new(store.fork())),
                    When::After => seen.2 = disk.position(),
                }
            }))
        };
        let receiving = inside.serve(noting).await;
        let (state, volume) = (mounted.join("state"), inside.path("disk.img"));
        let mut random = Random::new(12);
        image::random(&volume, VOLUME, &mut random);
        inside.join(store.clone(), &receiving, &state, &volume).await;
        let (joined, empty) = (disk.position(), Arc::new(store.fork()));
        let (mut commits, mut contents) = (Vec::new(), Vec::new());
        for point in 1..=POINTS {
            contents.push(std::fs::read(&volume).expect("it is there"));
            inside.round(&receiving, &state).await.expect("nothing fails");
            let (asked, without, done) = seen.lock().expect("no fork panics").clone();
            commits.push(Commit { asked, done, without, with: Arc::new(store.fork()) });
            let at = random.between(0, VOLUME - 300_000);
            image::write(&volume, at, &random.bytes(if point % 3 == 0 { 300_000 } else { 100 }));
        }
        receiving.end().await;
        drop(mounted);
        Self { inside, log: disk.log(), start, joined, empty, commits, contents }
    }

    /// Which stores there may be beside a state folder that lost power then.
    fn stores(&self, crash: &Crash) -> Vec<(u64, &Arc<MemStore>)> {
        let asked = self.commits.iter().filter(|c| c.asked <= crash.at).count();
        match asked.checked_sub(1).map(|last| &self.commits[last]) {
            None => vec![(0, &self.empty)],
            Some(last) if crash.at <= last.done => vec![(asked as u64 - 1, &last.without), (asked as u64, &last.with)],
            Some(last) => vec![(asked as u64, &last.with)],
        }
    }

    /// Blocks of now and of any time before: where an index says something that is not so, it will be believed wrongly
    /// if it is believed at all.
    fn mixed(&self, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.contents[random.between(0, self.contents.len() as u64) as usize].clone();
        for (i, block) in bytes.chunks_mut(BLOCK).enumerate() {
            let from = &self.contents[random.between(0, self.contents.len() as u64) as usize];
            block.copy_from_slice(&from[i * BLOCK..i * BLOCK + block.len()]);
        }
        bytes
    }

    /// The agent starts on what is left, and makes a point.
    async fn check(&self, mounted: &Path, crash: &Crash, random: &mut Random) {
        let state = mounted.join("state");
        let dir = StateDir::new(&state);
        let whole = dir.joined().map(drop).and(dir.key().map(drop)).and(dir.volumes().map(drop));
        whole.and(dir.writer().map(drop)).unwrap_or_else(|e| panic!("{crash:?}: {e} (F5)"));
        if crash.at < self.joined {
            // It may have joined or not; what it needs for that is whole.
            assert!(dir.joined().expect("whole").is_none() || dir.chain().is_ok(), "{crash:?}: no certificate");
            return;
        }
        let stores = self.stores(crash);
        let (points, store) = stores[random.between(0, stores.len() as u64) as usize];
        let store = Arc::new(store.fork());
        let content = self.mixed(random);
        std::fs::write(self.inside.path("disk.img"), &content).expect("there is room");
        let receiving = self.inside.serve(store.clone()).await;
        let report = self.inside.round(&receiving, &state).await;
        // It waits for a connection that is gone; nothing here waits for it.
        tokio::spawn(receiving.end());
        let report = report.unwrap_or_else(|e| panic!("{crash:?}, {points} points: no way on (I5): {e}"));
        let newest = report.committed.expect("it always commits").seq.0;
        assert_eq!(newest, points + 1, "{crash:?}: numbers are contiguous (I4)");
        let restored = self.inside.restored(store, newest).await;
        assert!(restored == content, "{crash:?}, {points} points: a wrong byte in the next point (I8)");
    }
}

async fn power_losses(kind: FileSystem, test: &str) {
    if !needs_fault_disk(test) {
        return;
    }
    let started = Instant::now();
    let recorded = Recorded::sync(kind).await;
    let mut random = Random::printed(test);
    let crashes = recorded.log.crashes(recorded.start, kind.sector(), 3, random.number());
    let mut replica = Replica::new(&recorded.inside.path(""), "replica", kind);
    for crash in &crashes {
        let mounted = replica.after(&recorded.log, crash).unwrap_or_else(|e| panic!("{crash:?}: does not mount: {e}"));
        recorded.check(mounted.path(), crash, &mut random).await;
    }
    let torn = replica.torn_superblocks();
    println!("{kind:?}: {} power losses in {:?}", crashes.len(), started.elapsed());
    println!("{torn} with a torn superblock were looked at untorn");
    assert!(torn * 50 <= crashes.len(), "{torn} images do not mount");
    let after = crashes.iter().filter(|crash| crash.at >= recorded.joined).map(|crash| format!("{crash:?}"));
    let distinct = after.collect::<std::collections::BTreeSet<_>>().len();
    println!("{distinct} different ones since it had joined");
    // With those of the other tests: 2,000.
    let wanted = match kind {
        FileSystem::Ext4 => 430,
        FileSystem::Xfs => 350,
    };
    assert!(distinct >= wanted, "only {} power losses: the agent flushes less than it did", distinct);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_agents_state_on_ext4() {
    power_losses(FileSystem::Ext4, "state::of_the_agents_state_on_ext4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_agents_state_on_xfs() {
    power_losses(FileSystem::Xfs, "state::of_the_agents_state_on_xfs").await;
}
