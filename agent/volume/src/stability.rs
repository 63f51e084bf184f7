//! Whether a source held still while it was read: what earns the label `Crash` for images and idle devices (I6).
//!
//! Read first: [`Watch`]. A watch that cannot be sure says [`Stability::Moved`] with the reason; it never guesses.
//!
//! **An image file** must be under a read lease from before the first read to after the last. The kernel gives one only
//! while nobody has the file open for writing; a writable shared mapping and a loop device keep the file open, so they
//! count too, even after their descriptor is closed. Who opens for writing (or truncates) waits until the lease is
//! given back: a thread looks every few milliseconds and gives it back at once. Who opens with O_NONBLOCK gets
//! EWOULDBLOCK once. A lease does not see writers on other machines: file systems that are shared never earn the label.
//! Size, mtime and ctime are compared as well, against file systems whose leases are not what they should be.
//!
//! **A device** must not be claimed (mounted, swap, LVM, RAID: an exclusive open finds out) before and after, and its
//! counters of written and discarded sectors must not move; for a partition neither those of writes that go through
//! the whole disk. Not seen: writes past the block layer (SCSI generic) and by other machines that share the disk.
//! What a loop device lies on can be written behind its back: the times of the backing file are compared too.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::OFlags;

use crate::source::reopen;
use crate::sys;
use crate::sysfs::{Dev, Written};

/// How often the lease is looked at. A writer waits at most this long; 200 calls a second cost nothing measurable.
const LEASE_POLL: Duration = Duration::from_millis(5);

/// Tries to read the counters of a disk and its partitions in one consistent state.
const COUNTER_TRIES: usize = 50;

/// How often and with what pause to wait for writes that are under way; together 0.2 s. Arbitrary: other partitions of
/// the disk may be busy.
const IN_FLIGHT_TRIES: usize = 200;
const IN_FLIGHT_PAUSE: Duration = Duration::from_millis(1);

/// What a watch found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stability {
    /// Nothing was written from the start of the watch to its end: all reads between are of one instant.
    Still,
    /// It changed, or may have, for this reason.
    Moved(String),
}

/// Watches a source from its making to [`Watch::finish`]. Dropping it gives the lease back.
#[must_use = "a watch that is not finished proves nothing"]
pub struct Watch {
    state: Result<State, String>,
    caveats: Vec<String>,
}

enum State {
    Image { lease: Lease, before: FileTimes },
    Device(Box<DeviceWatch>),
}

impl Watch {
    pub(crate) fn image(path: &Path, file: &File) -> Self {
        Self { state: watch_image(path, file), caveats: Vec::new() }
    }

    pub(crate) fn device(path: &Path, dev: Dev, file: &File) -> Self {
        let mut caveats = Vec::new();
        if let Some(backing) = dev.loop_backing() {
            caveats.push(format!(
                "{} is a loop device: what others write to {} while it is read is seen only by that file's times",
                path.display(),
                backing.display()
            ));
        }
        Self { state: DeviceWatch::start(path, dev, file).map(|w| State::Device(Box::new(w))), caveats }
    }

    /// Whether it is lost already; there is then no more reason to hurry. `false` proves nothing yet.
    pub fn has_moved(&self) -> bool {
        match &self.state {
            Err(_) => true,
            Ok(State::Image { lease, .. }) => lease.broken(),
            Ok(State::Device(watch)) => watch.counters_moved().is_some(),
        }
    }

    /// What this kind of source can't show, for people. Empty for most.
    pub fn caveats(&self) -> &[String] {
        &self.caveats
    }

    /// Ends the watch. To be called after the last read has returned.
    pub fn finish(self) -> Stability {
        let moved = match self.state {
            Err(reason) => Some(reason),
            Ok(State::Image { lease, before }) => lease.finish(before),
            Ok(State::Device(watch)) => watch.finish(),
        };
        moved.map_or(Stability::Still, Stability::Moved)
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.state {
            Err(reason) => write!(f, "Watch(lost: {reason})"),
            Ok(State::Image { .. }) => f.write_str("Watch(lease)"),
            Ok(State::Device(watch)) => write!(f, "Watch({})", watch.dev),
        }
    }
}

/// Size, modification and change time with nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FileTimes([i64; 5]);

impl FileTimes {
    pub(crate) fn of(meta: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self([meta.size() as i64, meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()])
    }

    /// The later of the two times.
    pub(crate) fn newest(&self) -> (i64, i64) {
        let [_, modified, modified_nanos, changed, changed_nanos] = self.0;
        (modified, modified_nanos).max((changed, changed_nanos))
    }
}

fn watch_image(path: &Path, file: &File) -> Result<State, String> {
    // A descriptor of its own: closing it gives the lease back whatever happens.
    let file = reopen(file, OFlags::RDONLY).map_err(|e| format!("cannot open {} again: {e}", path.display()))?;
    let fs = rustix::fs::fstatfs(&file).map_err(|e| format!("cannot tell which file system it is on: {e}"))?;
    if let Some((_, name)) = SHARED.iter().find(|(magic, _)| *magic == fs.f_type as u64 & 0xffff_ffff) {
        return Err(format!("it is on {name}, where writers elsewhere cannot be seen"));
    }
    sys::take_read_lease(&file).map_err(lease_refused)?;
    let before = file.metadata().map_err(|e| format!("cannot get its times: {e}"))?;
    Ok(State::Image { lease: Lease::watch(file)?, before: FileTimes::of(&before) })
}

fn lease_refused(e: io::Error) -> String {
    match e.raw_os_error() {
        Some(libc::EAGAIN) => "it is open for writing by another process".to_owned(),
        Some(libc::EACCES) => "a lease on it needs its owner or CAP_LEASE".to_owned(),
        Some(libc::EINVAL) => "its file system has no leases".to_owned(),
        _ => format!("a lease was refused: {e}"),
    }
}

/// File systems that somebody else may write to unseen, by the magic of statfs(2) and their kernel headers.
const SHARED: [(u64, &str); 11] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x7461_636f, "OCFS2"),
    (0x0116_1970, "GFS2"),
    (0x6573_5546, "FUSE"),
    (0x5346_414f, "AFS"),
    (0x0bd0_0bd0, "Lustre"),
];

/// A read lease and the thread that gives it back as soon as somebody wants to write.
struct Lease {
    shared: Arc<LeaseShared>,
    watcher: Option<JoinHandle<()>>,
}

struct LeaseShared {
    file: File,
    stop: AtomicBool,
    broken: AtomicBool,
    /// Held over every look at the lease together with what follows from it.
    look: Mutex<()>,
}

impl LeaseShared {
    /// Looks at the lease, and gives it back if somebody waits.
    fn look(&self) -> bool {
        let _one_at_a_time = self.look.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.broken.load(Ordering::Acquire) && !sys::lease_is_whole(&self.file) {
            // First the mark, then the release: whoever is let in finds the watch already lost.
            self.broken.store(true, Ordering::Release);
            sys::end_lease(&self.file);
        }
        self.broken.load(Ordering::Acquire)
    }
}

impl Lease {
    fn watch(file: File) -> Result<Self, String> {
        let (stop, broken) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(LeaseShared { file, stop, broken, look: Mutex::new(()) });
        let theirs = Arc::clone(&shared);
        let body = move || {
            while !theirs.stop.load(Ordering::Acquire) && !theirs.look() {
                std::thread::park_timeout(LEASE_POLL);
            }
        };
        let watcher = std::thread::Builder::new().name("backhaul-lease".to_owned()).spawn(body);
        let watcher = watcher.map_err(|e| format!("cannot start the thread that watches the lease: {e}"))?;
        Ok(Self { shared, watcher: Some(watcher) })
    }

    fn broken(&self) -> bool {
        self.shared.look()
    }

    fn finish(mut self, before: FileTimes) -> Option<String> {
        // The times first: while the lease is whole afterwards, nobody can have written before it.
        let after = self.shared.file.metadata();
        let broken = self.shared.look();
        self.release();
        match after {
            _ if broken => Some("another process opened it for writing".to_owned()),
            Err(e) => Some(format!("cannot get its times: {e}")),
            Ok(meta) if FileTimes::of(&meta) != before => Some("its size or times changed".to_owned()),
            Ok(_) => None,
        }
    }

    fn release(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        sys::end_lease(&self.shared.file);
        if let Some(watcher) = self.watcher.take() {
            watcher.thread().unpark();
            // It has no way to panic; and nothing more to say.
            let _ = watcher.join();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}

struct DeviceWatch {
    dev: Dev,
    file: File,
    sequence: Option<u64>,
    before: Counters,
    backing: Option<(PathBuf, FileTimes)>,
}

/// What a device's write counters stood at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Counters {
    own: Written,
    /// Of a partition: what was written through the whole disk and not through any of its partitions. Signed, since
    /// the counts of a disk and of its partitions are not read in one moment.
    through_disk: (i64, i64),
}

impl DeviceWatch {
    fn start(path: &Path, dev: Dev, file: &File) -> Result<Self, String> {
        let file = reopen(file, OFlags::RDONLY | OFlags::DIRECT).map_err(|e| format!("cannot open it again: {e}"))?;
        // Dirty pages that an earlier writer left would be written back while we read and count as writes; those of
        // the whole disk and of other partitions lie in caches of their own, which O_DIRECT does not look at.
        // fsync of a block device works on a descriptor that is open for reading only.
        flush(path, dev, &file)?;
        if !dev.is_counted() {
            return Err("its writes are not counted (queue/iostats is 0)".to_owned());
        }
        let backing = backing_times(dev)?;
        let sequence = dev.sequence();
        let before = Counters::read(dev)?;
        // After the counters: whatever is under way now is counted later.
        probe_exclusive(&file)?;
        Ok(Self { dev, file, sequence, before, backing })
    }

    fn counters_moved(&self) -> Option<String> {
        match Counters::read(self.dev) {
            Err(reason) => Some(reason),
            Ok(now) if now.own != self.before.own => Some(format!("{} was written to while it was read", self.dev)),
            Ok(now) if now != self.before => {
                Some(format!("{} was written to while {} was read", self.dev.whole(), self.dev))
            }
            Ok(_) => None,
        }
    }

    /// A write that is under way may have reached the disk, and is counted only when it completes. A moment without
    /// any, after the last read, means that all that could have mattered are counted.
    fn wait_until_counted(&self) -> Option<String> {
        let disk = self.dev.whole();
        for _ in 0..IN_FLIGHT_TRIES {
            if disk.writes_in_flight() == Some(0) {
                return None;
            }
            std::thread::sleep(IN_FLIGHT_PAUSE);
        }
        Some(format!("{disk} is so busy that its writes cannot be told apart"))
    }

    fn finish(self) -> Option<String> {
        let exclusive = probe_exclusive(&self.file).err();
        let same_disk = self.dev.sequence() == self.sequence && self.dev.is_counted();
        exclusive
            .or_else(|| self.wait_until_counted())
            .or_else(|| self.counters_moved())
            .or_else(|| (!same_disk).then(|| "another disk has its number now".to_owned()))
            .or_else(|| match backing_times(self.dev) {
                Ok(now) if now == self.backing => None,
                Ok(_) => Some("the file behind the loop device was written to while it was read".to_owned()),
                Err(reason) => Some(reason),
            })
    }
}

impl Counters {
    fn read(dev: Dev) -> Result<Self, String> {
        let unknown = || "its write counters cannot be read".to_owned();
        let whole = dev.whole();
        if whole == dev {
            return Ok(Self { own: dev.written().ok_or_else(unknown)?, through_disk: (0, 0) });
        }
        // Other partitions may be busy. Two equal readings in a row are taken for a consistent one.
        let mut last = None;
        for _ in 0..COUNTER_TRIES {
            let own = dev.written().ok_or_else(unknown)?;
            let mut rest = whole.written().map(|w| (w.sectors as i64, w.discarded as i64)).ok_or_else(unknown)?;
            for part in whole.partitions() {
                let written = part.written().ok_or_else(unknown)?;
                rest = (rest.0 - written.sectors as i64, rest.1 - written.discarded as i64);
            }
            let now = Self { own, through_disk: rest };
            if last == Some(now) {
                return Ok(now);
            }
            last = Some(now);
        }
        Err(format!("other partitions of {whole} are written to so fast that its counters cannot be compared"))
    }
}

/// Writes dirty pages of the device, its disk and its partitions back.
fn flush(path: &Path, dev: Dev, file: &File) -> Result<(), String> {
    file.sync_all().map_err(|e| format!("dirty pages of {} cannot be written: {e}", path.display()))?;
    let relatives = [vec![dev.whole()], dev.partitions()].concat();
    for relative in relatives.into_iter().filter(|d| *d != dev) {
        let node = relative.node().ok_or_else(|| format!("{relative} has no node to flush it by"))?;
        let synced = File::open(&node).and_then(|f| f.sync_all());
        synced.map_err(|e| format!("dirty pages of {} cannot be written: {e}", node.display()))?;
    }
    Ok(())
}

/// Whether an exclusive open would do; closed again at once, since it keeps others from mounting.
fn probe_exclusive(file: &File) -> Result<(), String> {
    match reopen(file, OFlags::RDONLY | OFlags::EXCL) {
        Ok(_) => Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            Err("it is in use (mounted, swap, LVM, RAID or opened exclusively)".to_owned())
        }
        Err(e) => Err(format!("it cannot be opened exclusively: {e}")),
    }
}

/// The times of the file behind a loop device; `None` for any other device.
fn backing_times(dev: Dev) -> Result<Option<(PathBuf, FileTimes)>, String> {
    let Some(path) = dev.loop_backing() else { return Ok(None) };
    match std::fs::metadata(&path) {
        Ok(meta) => Ok(Some((path, FileTimes::of(&meta)))),
        Err(e) => Err(format!("the file behind the loop device, {}, cannot be looked at: {e}", path.display())),
    }
}

#[cfg(test)]
#[path = "stability_tests.rs"]
mod tests;
