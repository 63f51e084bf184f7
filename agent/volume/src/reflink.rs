//! Clones of image files that share their blocks (reflinks): one instant of an image that somebody writes to.
//!
//! Read first: [`Source::clone_image`], then [`Moment`] for several images.
//!
//! **Why a clone is of one instant.** FICLONE holds the file's lock of writers and the one of page faults from before
//! its dirty pages are written to after the last extent is shared (xfs: `xfs_reflink_remap_prep` with `IOLOCK_EXCL` and
//! `MMAPLOCK_EXCL`; btrfs: `btrfs_double_inode_lock` with `i_mmap_lock`), and waits for direct I/O. `write` and direct
//! I/O wait for the lock. A page that is mapped writable is dirty; writing it makes it read-only, so that the next store
//! to it is a fault, which waits. When the last page is written nobody can change any, and what is shared is what all of
//! them hold at that moment. Other file systems that know FICLONE were not looked at, and are not asked.
//!
//! The clone has no name (O_TMPFILE): it is gone with the process, however that ends.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Advice, IFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::time::ClockId;

use crate::source::reopen;
use crate::stability::FileTimes;
use crate::{Source, Volume, VolumeError};

/// File systems whose clones are of one instant, by the magic of statfs(2) and their kernel headers.
const CLONING: [u64; 2] = [0x5846_5342, 0x9123_683e];

/// An image that was written to within this time before it was looked at counts as being written to. Times of older
/// kernels have steps of up to 10 ms; and a page fault sets them a moment before the store that it is for, of which
/// nobody knows how long it can be. Far more than both.
const SETTLED: Duration = Duration::from_secs(1);

/// Why there is no clone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloneError {
    /// Not here.
    #[error("{0}")]
    Unable(String),
    /// The image.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Size and times of an image, as they were at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    times: FileTimes,
    settled: bool,
}

impl Moment {
    fn of(file: &File) -> std::io::Result<Self> {
        // The clock before the times, and the one that file systems take them from.
        let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
        let meta = file.metadata()?;
        let times = FileTimes::of(&meta);
        let (seconds, nanos) = times.newest();
        let age = i128::from(now.tv_sec - seconds) * 1_000_000_000 + i128::from(now.tv_nsec - nanos);
        Ok(Self { times, settled: age > SETTLED.as_nanos() as i128 })
    }

    /// When it was last changed: seconds and nanoseconds since 1970.
    pub fn newest(&self) -> (i64, i64) {
        self.times.newest()
    }

    /// Whether nothing was written from this moment to a later one. When in doubt it was.
    pub fn lasts_until(&self, later: &Self) -> bool {
        self.settled && self.times == later.times
    }
}

/// Room on a file system, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Which file system.
    pub file_system: u64,
    /// What is free for anybody.
    pub free: u64,
    /// What the image takes: all that writing to it can need beside a clone.
    pub taken: u64,
}

impl Source {
    /// Clones the image as it is at one instant. Writers wait while that takes: its dirty pages are written before, so
    /// that it is milliseconds, and about a second for a million fragments.
    pub fn clone_image(&self) -> Result<Self, CloneError> {
        let unable = |what: String| CloneError::Unable(what);
        let Some(image) = self.image() else { return Err(unable("a device can't be cloned".into())) };
        let fs =
            rustix::fs::fstatfs(image).map_err(|e| unable(format!("cannot tell which file system it is on: {e}")))?;
        if !CLONING.contains(&(fs.f_type as u64 & 0xffff_ffff)) {
            return Err(unable("its file system is not one that can clone a file at one instant (xfs, btrfs)".into()));
        }
        let folder = self.path().parent().unwrap_or(Path::new("/"));
        let no_file = |e| unable(format!("no file can be made in {}: {e}", folder.display()));
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let clone = File::from(rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).map_err(no_file)?);
        same_flags(image, &clone);
        // Not under the file's lock, where it would keep writers waiting. What fails here fails there.
        let _ = image.sync_data();
        rustix::fs::ioctl_ficlone(&clone, image).map_err(|e| unable(refused(e)))?;
        let length = clone.metadata().map_err(|e| VolumeError::inspect(self.path(), "get its clone's size", e))?.len();
        if length != self.length() {
            let what = format!("it had {} bytes and has {length}", self.length());
            return Err(VolumeError::Changed { path: self.path().to_owned(), what }.into());
        }
        // Open for writing no more: then it is as any other image that nobody writes to.
        let read_only = reopen(clone.as_fd(), OFlags::RDONLY).map_err(|e| unable(format!("its clone: {e}")))?;
        let _ = rustix::fs::fadvise(&read_only, 0, None, Advice::Sequential);
        Ok(self.with_image(read_only))
    }

    /// Size and times of an image now; `None` for a device.
    pub fn moment(&self) -> Result<Option<Moment>, VolumeError> {
        let moment = self.image().map(Moment::of).transpose();
        moment.map_err(|e| VolumeError::inspect(self.path(), "get its times", e))
    }

    /// Room on the file system of an image; `None` for a device.
    pub fn room(&self) -> Result<Option<Room>, VolumeError> {
        let Some(image) = self.image() else { return Ok(None) };
        let failed = |e: std::io::Error| VolumeError::inspect(self.path(), "find out how much room there is", e);
        let meta = image.metadata().map_err(failed)?;
        let fs = rustix::fs::fstatvfs(image).map_err(|e| failed(e.into()))?;
        Ok(Some(Room { file_system: meta.dev(), free: fs.f_bavail * fs.f_frsize, taken: meta.blocks() * 512 }))
    }
}

/// btrfs clones a file without checksums (chattr +C, as images of virtual machines often are) only to another one.
fn same_flags(image: &File, clone: &File) {
    let is_nocow = rustix::fs::ioctl_getflags(image).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
    if is_nocow && let Ok(flags) = rustix::fs::ioctl_getflags(clone) {
        // Where it can't be, cloning says why.
        let _ = rustix::fs::ioctl_setflags(clone, flags | IFlags::NOCOW);
    }
}

fn refused(e: Errno) -> String {
    match e {
        Errno::OPNOTSUPP => "its file system was made without clones (xfs: reflink=0)".to_owned(),
        Errno::NOSPC | Errno::DQUOT => "there is no room for a clone".to_owned(),
        Errno::XDEV => "its folder is on another file system than itself".to_owned(),
        e => format!("the kernel refuses to clone it: {e}"),
    }
}

#[cfg(test)]
#[path = "reflink_tests.rs"]
mod tests;
