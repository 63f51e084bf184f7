//! A disk as a power loss left it: a file in memory behind a loop device, brought to one image after the other.
//!
//! Read first: [`Replica::after`], then [`Mounted`].

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::log::{Crash, Entry, WriteLog};
use crate::Loop;
use crate::process::tool;

const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;

/// A file system that these tests make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileSystem {
    /// ext4 with its defaults, but for what would be written lazily after mkfs.
    Ext4,
    /// XFS with its defaults.
    Xfs,
}

impl FileSystem {
    /// Bytes of a disk that it fits on: XFS makes none under 300 MiB.
    pub fn size(self) -> u64 {
        match self {
            Self::Ext4 => 96 << 20,
            Self::Xfs => 320 << 20,
        }
    }

    /// Bytes that its disk writes wholly or not at all. XFS stands no torn block of a folder: when the block's first
    /// sector carries the number of the log record that would mend the others, recovery takes it for done. So its disk
    /// is one with 4 KiB sectors, as disks are today; ext4 stands the disks of old, but for its superblock: see
    /// [`Replica::torn_superblocks`].
    pub fn sector(self) -> u64 {
        match self {
            Self::Ext4 => 512,
            Self::Xfs => 4096,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Makes one.
    pub fn make(self, device: &Path) {
        let device = device.to_str().expect("UTF-8");
        match self {
            Self::Ext4 => {
                let now = "lazy_itable_init=0,lazy_journal_init=0,nodiscard";
                tool("mkfs.ext4", ["-q", "-F", "-b", "4096", "-m", "0", "-E", now, device])
            }
            Self::Xfs => tool("mkfs.xfs", ["-q", "-f", "-K", device]),
        };
    }

    /// Mounts one.
    pub fn mount(self, device: &Path, at: &Path) -> Result<Mounted, Errno> {
        std::fs::create_dir_all(at).expect("a folder can be made");
        // Images of one file system have one uuid, and several may be mounted.
        let options: Option<&CStr> = (self == Self::Xfs).then_some(c"nouuid");
        rustix::mount::mount(device, at, self.name(), MountFlags::NOATIME, options)?;
        Ok(Mounted { at: at.to_owned() })
    }
}

/// A file system that is mounted; unmounted when dropped, for which everything on it must be closed.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Where.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// A path on it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Threads that are just ending may have a file open for a moment.
        for _ in 0..500 {
            match rustix::mount::unmount(&self.at, UnmountFlags::empty()) {
                Err(Errno::BUSY) => std::thread::sleep(Duration::from_millis(4)),
                _ => return,
            }
        }
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
        assert!(std::thread::panicking(), "{} stays busy", self.at.display());
    }
}

/// A disk that is brought from one crash image to the next.
pub struct Replica {
    kind: FileSystem,
    file: File,
    device: Loop,
    at: PathBuf,
    /// What the device is to hold.
    image: Vec<u8>,
    /// Entries of the log that are in `image` for good.
    applied: u64,
    /// What the last image's own writes covered.
    undo: Vec<(usize, Vec<u8>)>,
    /// Pages of `image` that the file may not have.
    changed: BTreeSet<usize>,
    torn_superblocks: usize,
}

impl Replica {
    /// A disk of zeroes, mounted below `folder` on demand.
    pub fn new(folder: &Path, name: &str, kind: FileSystem) -> Self {
        let path = folder.join(format!("{name}.image"));
        let device = Loop::new(&path, kind.size());
        let file = File::options().read(true).write(true).open(&path).expect("just made");
        Self {
            kind,
            file,
            device,
            at: folder.join(name),
            image: vec![0; kind.size() as usize],
            applied: 0,
            undo: Vec::new(),
            changed: BTreeSet::new(),
            torn_superblocks: 0,
        }
    }

    /// Mounts the disk as this power loss left it. Power losses must come in the order of the log.
    pub fn after(&mut self, log: &WriteLog, crash: &Crash) -> Result<Mounted, Errno> {
        self.bring(log, crash);
        match self.kind.mount(self.device.path(), &self.at) {
            Err(Errno::BADMSG) if crash.sector < PAGE as u64 => {
                self.torn_superblocks += 1;
                self.bring(log, &Crash { sector: PAGE as u64, ..*crash });
                self.kind.mount(self.device.path(), &self.at)
            }
            result => result,
        }
    }

    /// How many images did not mount because the superblock of ext4, 1 KiB long and written without its journal, was
    /// torn between two sectors: there `e2fsck` is needed. They were tried with 4 KiB sectors instead.
    pub fn torn_superblocks(&self) -> usize {
        self.torn_superblocks
    }

    fn bring(&mut self, log: &WriteLog, crash: &Crash) {
        assert!(crash.durable >= self.applied, "power losses come in order");
        for (at, bytes) in std::mem::take(&mut self.undo).into_iter().rev() {
            self.put(at, &bytes);
        }
        for entry in &log.entries()[self.applied as usize..crash.durable as usize] {
            match entry {
                Entry::Write { at, bytes } => self.put(*at as usize, bytes),
                Entry::Zero { at, len } => self.put(*at as usize, &vec![0; *len as usize]),
                Entry::Flush => {}
            }
        }
        self.applied = crash.durable;
        for (at, bytes) in crash.pieces(log) {
            let at = at as usize;
            self.undo.push((at, self.image[at..at + bytes.len()].to_vec()));
            self.put(at, &bytes);
        }
        self.settle();
    }

    /// Changes the image of the moment: damage that no power loss does.
    pub fn and_then(&mut self, change: impl FnOnce(&mut Self)) -> Result<Mounted, Errno> {
        change(self);
        self.settle();
        self.kind.mount(self.device.path(), &self.at)
    }

    /// Writes into the image of the moment only.
    pub fn damage(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.undo.push((at, self.image[at..at + bytes.len()].to_vec()));
        self.put(at, bytes);
    }

    /// The image of the moment.
    pub fn image(&self) -> &[u8] {
        &self.image
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if self.image[at..at + bytes.len()] == *bytes {
            return;
        }
        self.image[at..at + bytes.len()].copy_from_slice(bytes);
        self.changed.extend(at / PAGE..(at + bytes.len()).div_ceil(PAGE));
    }

    /// Brings the file to the image: what changed, and what whoever had the last one mounted wrote into it.
    fn settle(&mut self) {
        for page in std::mem::take(&mut self.changed) {
            self.write_page(page);
        }
        let mut buffer = vec![0; PIECE];
        let mut at = 0;
        while let Ok(start) = rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).expect("data end somewhere");
            at = start;
            while at < end {
                let len = PIECE.min((end - at) as usize);
                self.file.read_exact_at(&mut buffer[..len], at).expect("it is as long as the image");
                let first = at as usize;
                for (i, page) in buffer[..len].chunks(PAGE).enumerate() {
                    let from = first + i * PAGE;
                    if *page != self.image[from..from + page.len()] {
                        self.write_page(from / PAGE);
                    }
                }
                at += len as u64;
            }
        }
    }

    fn write_page(&self, page: usize) {
        let from = page * PAGE;
        let to = (from + PAGE).min(self.image.len());
        self.file.write_all_at(&self.image[from..to], from as u64).expect("there is memory");
    }
}
