//! A receiver is killed after a record has its name and before that is flushed. The next one sees the record; once it
//! has told an agent of it, a power loss must not take it away (I2, I3).

use std::path::Path;
use std::sync::Arc;

use backhaul_agent::state::StateDir;
use backhaul_receiver::store::dir::DirStore;
use backhaul_receiver::store::fault::{Fault, FaultStore, When};
use backhaul_receiver::store::{Kind, MissingRoot, ObjectStore, Verb};
use backhaul_tests::faultdisk::{Crash, FaultDisk, FileSystem, Kept, Replica};
use backhaul_tests::fixture::GROUP;
use backhaul_tests::inside::{Inside, init};
use backhaul_tests::{Random, image, needs_fault_disk};

async fn open(folder: &Path, missing: MissingRoot) -> Arc<dyn ObjectStore> {
    Arc::new(DirStore::open(&folder.join("store"), missing).await.expect("a folder"))
}

/// The log record of the group that is not a point yet, renamed and not flushed, as a writer that was killed leaves it.
fn unflushed(folder: &Path, hidden: &Path) {
    let groups = folder.join("store/groups");
    let group = std::fs::read_dir(groups).expect("a store").flatten().next().expect("a group").path();
    let record = group.join("log").join(format!("{:020}", 2));
    match hidden.exists() {
        false => std::fs::rename(record, hidden).expect("it was written"),
        true => std::fs::rename(hidden, record).expect("it was kept"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_stays() {
    if !needs_fault_disk("what_was_told_stays") {
        return;
    }
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        let inside = Inside::new(true);
        let disk = FaultDisk::new(&inside.path(""), "disk", kind.size());
        kind.make(disk.path());
        let mounted = kind.mount(disk.path(), &inside.path("mnt")).expect("it was just made");
        let store = open(mounted.path(), MissingRoot::Create).await;
        init(&*store).await;
        let (state, volume) = (inside.path("state"), inside.path("disk.img"));
        image::random(&volume, 500_000, &mut Random::new(1));
        let receiving = inside.serve(store.clone()).await;
        inside.join(store.clone(), &receiving, &state, &volume).await;
        inside.round(&receiving, &state).await.expect("nothing fails");
        receiving.end().await;
        // The second commit: the record is on the disk with all that it needs, and the answer is lost.
        let lost = Arc::new(FaultStore::new(store.clone(), 1));
        lost.add(When::verb(Verb::PutNew).key("/log/"), Fault::After(Kind::Unavailable));
        let receiving = inside.serve(lost).await;
        inside.round(&receiving, &state).await.expect_err("the answer is lost");
        receiving.end().await;
        let hidden = mounted.join("store/+tmp/hidden");
        unflushed(mounted.path(), &hidden);
        drop(store);
        rustix::fs::syncfs(std::fs::File::open(mounted.path()).expect("mounted")).expect("it can be flushed");
        unflushed(mounted.path(), &hidden);

        // Another receiver, which can't write: it tells the head, and the round fails later.
        let failing = Arc::new(FaultStore::new(open(mounted.path(), MissingRoot::Refuse).await, 1));
        let receiving = inside.serve(failing.clone()).await;
        failing.add(When::verb(Verb::PutNew), Fault::Before(Kind::Other));
        // Nor hints: on these file systems the flush of one would flush the record as well, a moment too late.
        failing.add(When::verb(Verb::PutHint), Fault::Before(Kind::Other));
        inside.round(&receiving, &state).await.expect_err("nothing can be written");
        let told = StateDir::new(&state).writer().expect("whole").high_water.0;
        assert_eq!(told, 2, "the agent was told of it");
        let at = disk.position();
        receiving.end().await;
        drop(failing);
        drop(mounted);

        let log = disk.log();
        let durable = log.windows(0).into_iter().map(|w| w.start).filter(|start| *start <= at).max().expect("flushes");
        let crash = Crash { durable, at, kept: Kept::Nothing, sector: kind.sector() };
        let mut replica = Replica::new(&inside.path(""), "replica", kind);
        let mounted = replica.after(&log, &crash).expect("it mounts");
        let points = inside.points(open(mounted.path(), MissingRoot::Refuse).await).await;
        assert_eq!(points, [1, 2], "{kind:?}: {GROUP} lost a point that its agent was told of (I3)");
    }
}
