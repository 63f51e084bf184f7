//! That these tests bite: a disk that lies about its flushes, and stores that flush less than they should, are found
//! out by the very checks that the real store passes. And what such a disk leaves is never called right when it is not.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_receiver::store::{MissingRoot, ObjectStore, StoreError};
use backhaul_tests::faultdisk::{Crash, FileSystem, Kept, Replica};
use backhaul_tests::{Random, needs_fault_disk};
use bytes::Bytes;

use crate::store::{Check, Recorded, open};

/// What a store may do wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mistake {
    /// The bytes are not flushed, the folder is.
    NoFileFlush,
    /// The bytes are flushed, the folder is not.
    NoFolderFlush,
    /// The name is there, and flushed, before the bytes are.
    NameFirst,
    /// It is acknowledged before any of it is on the disk.
    NoFlush,
}

/// A folder store that makes one mistake with log records and segments; everything else goes to the real one.
#[derive(Debug)]
struct Sloppy {
    real: Arc<dyn ObjectStore>,
    root: PathBuf,
    mistake: Mistake,
}

impl Sloppy {
    fn write(&self, path: &Path, body: &[u8]) -> std::io::Result<()> {
        let folder = path.parent().expect("a key has a folder");
        let temp = folder.join("+sloppy");
        let mut file = File::create(&temp)?;
        file.write_all(body)?;
        if self.mistake == Mistake::NoFolderFlush {
            file.sync_all()?;
        }
        std::fs::rename(&temp, path)?;
        if matches!(self.mistake, Mistake::NoFileFlush | Mistake::NameFirst) {
            File::open(folder)?.sync_all()?;
        }
        if self.mistake == Mistake::NameFirst {
            file.sync_all()?;
        }
        Ok(())
    }
}

#[async_trait]
impl ObjectStore for Sloppy {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let path = self.root.join(key.as_str());
        let mine = ["/log/", "/segments/"].iter().any(|kind| key.as_str().contains(kind));
        // The first in its folder makes the folder.
        if !mine || path.exists() || !path.parent().is_some_and(Path::exists) {
            return self.real.put_new(key, body).await;
        }
        self.write(&path, &body).expect("the disk is good");
        Ok(())
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.real.put_hint(key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.real.get(key, max).await
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.real.get_range(key, range).await
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        self.real.list(prefix, after, limit).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.real.delete(key).await
    }
    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.real.settle(prefix).await
    }
    fn describe(&self) -> String {
        self.real.describe()
    }
}

/// Each mistake is found in the power losses of one workload.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_flushes_too_little_is_found_out() {
    if !needs_fault_disk("a_store_that_flushes_too_little_is_found_out") {
        return;
    }
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        for mistake in [Mistake::NoFileFlush, Mistake::NoFolderFlush, Mistake::NameFirst, Mistake::NoFlush] {
            let recorded = Recorded::sync_through(kind, |real, root| Arc::new(Sloppy { real, root, mistake })).await;
            let crashes = recorded.log.crashes(recorded.joined, kind.sector(), 1, 1);
            let mut replica = Replica::new(&recorded.inside.path(""), "replica", kind);
            let mut found = None;
            let mut looked = 0;
            for crash in &crashes {
                looked += 1;
                let mounted = replica.after(&recorded.log, crash).expect("it mounts");
                found = recorded.check(mounted.path(), crash, Check::Quick).await.err();
                if found.is_some() {
                    break;
                }
            }
            println!("{kind:?}, {mistake:?}: after {looked} of {} power losses: {found:?}", crashes.len());
            assert!(found.is_some(), "{kind:?}: {mistake:?} passes");
        }
    }
}

/// A disk whose flushes do nothing: everything of the last stretches may be there or not, whatever was flushed in
/// between. No software can help that, but points are seen to be lost, and no damage is called clean (I8).
async fn lies(kind: FileSystem, test: &str) {
    if !needs_fault_disk(test) {
        return;
    }
    let recorded = Recorded::sync(kind).await;
    let mut random = Random::printed(test);
    let windows = recorded.log.windows(recorded.joined);
    let mut crashes = Vec::new();
    for back in [4, 20] {
        // As if none of the flushes in between had done anything.
        for (from, to) in windows.iter().zip(&windows[back..]) {
            let kept = if random.number().is_multiple_of(4) { Kept::Nothing } else { Kept::Some(random.number()) };
            crashes.push(Crash { durable: from.start, at: to.end, kept, sector: kind.sector() });
        }
    }
    crashes.sort_by_key(|c| (c.durable, c.at));
    let mut replica = Replica::new(&recorded.inside.path(""), "replica", kind);
    let (mut unmounted, mut lost, mut damaged, mut fine) = (0, 0, 0, 0);
    for crash in &crashes {
        let Ok(mounted) = replica.after(&recorded.log, crash) else {
            unmounted += 1;
            continue;
        };
        match recorded.check(mounted.path(), crash, Check::Quick).await {
            Ok(_) => fine += 1,
            Err(e) if e.contains("I2") => lost += 1,
            Err(_) => damaged += 1,
        }
        never_falsely_clean(&recorded, mounted.path(), crash).await;
    }
    println!("{kind:?}: {unmounted} not mountable, {lost} with lost points, {damaged} damaged, {fine} as if honest");
    assert!(lost >= 20, "{kind:?}: lost points are not seen: {lost}");
}

/// Whatever is there: what is verified without a complaint can be restored, and is what was offered.
async fn never_falsely_clean(recorded: &Recorded, mounted: &Path, crash: &Crash) {
    let Ok(store) = open(mounted, MissingRoot::Refuse).await else { return };
    for (number, offered) in (1..).zip(&recorded.points) {
        let Ok(report) = recorded.inside.verify(store.clone(), number).await else { continue };
        if report.point.is_none() || !report.damaged.is_empty() {
            continue;
        }
        let restored = recorded.inside.try_restored(store.clone(), number).await;
        let restored = restored.unwrap_or_else(|e| panic!("{crash:?}: {number} is clean and can't be restored: {e}"));
        assert!(restored == offered.bytes, "{crash:?}: {number} is clean and not what was offered (I8)");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_disk_under_ext4_is_found_out() {
    lies(FileSystem::Ext4, "a_lying_disk_under_ext4_is_found_out").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_disk_under_xfs_is_found_out() {
    lies(FileSystem::Xfs, "a_lying_disk_under_xfs_is_found_out").await;
}
