//! Disks that fail while the real programs are at work: as source, under the store, under the agent's state, as target.
//!
//! What must hold: nothing is acknowledged that is not so (I3), nothing wrong is passed off as data (I8, I9), and when
//! the disk is well again, so is everything else (I13, I14).

mod index;
mod source;
mod store;
mod target;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use backhaul_tests::faultdisk::{Effect, FaultDisk, FileSystem, Mounted, Op, Order, Rule};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A file system on a disk that can fail.
struct Disk {
    // Order matters: unmounted before it is detached.
    mounted: Option<Mounted>,
    disk: FaultDisk,
    kind: FileSystem,
    at: std::path::PathBuf,
}

impl Disk {
    fn new(folder: &Path, name: &str, kind: FileSystem) -> Self {
        let disk = FaultDisk::new(folder, name, kind.size());
        kind.make(disk.path());
        let at = folder.join(name);
        let mounted = Some(kind.mount(disk.path(), &at).expect("it was just made"));
        Self { mounted, disk, kind, at }
    }

    fn path(&self) -> &Path {
        &self.at
    }

    /// Unmounts it and mounts it again: nothing of it is in any cache.
    fn again(&mut self) {
        self.mounted = None;
        self.disk.reattach();
        self.mounted = Some(self.kind.mount(self.disk.path(), &self.at).expect("it mounts again"));
    }

    /// The power fails: what was not flushed is gone. Then it is well again.
    fn lose_power(&mut self) {
        // What the kernel writes while it lets go of the file system comes too late.
        self.disk.fault(Rule::new(Op::Write, Effect::Drop));
        self.disk.fault(Rule::new(Op::Flush, Effect::Lie));
        self.disk.order(&Order::PowerLoss);
        self.mounted = None;
        self.disk.heal();
        self.again();
    }

    /// Where on the disk these bytes are, which were flushed; of many the first sector counts.
    fn find(&self, needle: &[u8]) -> u64 {
        let folder = File::open(&self.at).expect("it is mounted");
        rustix::fs::syncfs(folder).expect("it can be flushed");
        let needle = &needle[..needle.len().min(512)];
        let mut bytes = Vec::new();
        File::open(self.disk.path()).and_then(|mut f| f.read_to_end(&mut bytes)).expect("it can be read");
        let places: Vec<_> = bytes.chunks(512).enumerate().filter(|(_, c)| c.starts_with(needle)).collect();
        assert!(!places.is_empty(), "these bytes are on the disk, at the beginning of a sector");
        places[0].0 as u64 * 512
    }
}
