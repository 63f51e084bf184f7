//! What a target's bytes lie on: a regular file through the page cache, or a device past it.
//!
//! Owns the system calls; does not own the order of writes or the first MiB, which are the target's.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_protocol::geometry::ByteOffset;
use backhaul_seams::failpoint;
use rustix::fs::{Advice, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::check::Place;
use super::{CheckedTarget, HEAD_LEN, Head, ReadBack, Refusal, Target, TargetError};
use crate::buffer::AlignedBuffer;
use crate::direct::{DirectIo, read_full};
use crate::source::{next_data, reopen};
use crate::sysfs::Dev;
use crate::{VolumeError, sys};

/// Zeroes are written in pieces of this size where nothing better works. Arbitrary.
const ZEROES: usize = 1 << 20;
/// Unit of O_DIRECT reads of files: no file system asks for more.
const FILE_SECTOR: u32 = 4096;
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;

pub(super) enum Medium {
    File { file: File, past_cache: Option<DirectIo>, has_device: bool },
    Device { dev: Dev, direct: DirectIo },
}

impl std::fmt::Debug for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File { .. } => f.write_str("File"),
            Self::Device { dev, .. } => write!(f, "Device({dev})"),
        }
    }
}

impl CheckedTarget {
    /// Creates the file, or brings it to exactly the volume's length; a device is only read. This is the first moment
    /// at which anything is written.
    pub fn open(self) -> Result<Target, TargetError> {
        let beyond = self.beyond();
        let Self { path, length, place } = self;
        let resized = matches!(&place, Place::File { length: old, .. } if *old != 0 && *old != length);
        let (medium, fresh) = match place {
            Place::New { folder, name } => {
                // What appeared since the check is not ours, and a symbolic link is not followed.
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = match rustix::fs::openat(&folder, &name, flags, Mode::from_raw_mode(0o600)) {
                    Ok(fd) => File::from(fd),
                    Err(Errno::EXIST) => {
                        return Err(TargetError::refused(&path, Refusal::Changed("it appeared")));
                    }
                    Err(e) => return Err(TargetError::io(&path, "create", e)),
                };
                step("target.created").map_err(|e| TargetError::io(&path, "create", e))?;
                flush_folder(&path, &folder)?;
                resize(&path, &file, 0, length)?;
                (Medium::of_file(file), true)
            }
            Place::File { file, length: old } => {
                resize(&path, &file, old, length)?;
                (Medium::of_file(file), old == 0)
            }
            Place::Device { dev, direct, .. } => {
                // Dirty pages of an earlier user, of its partitions too, would be written over what we restore.
                drop_device_caches(dev);
                (Medium::Device { dev, direct }, false)
            }
        };
        let mut bytes = AlignedBuffer::new(HEAD_LEN.min(length) as usize);
        if !fresh {
            let got = medium.read(0, &mut bytes).map_err(|e| TargetError::io(&path, "read the first MiB of", e))?;
            if got != bytes.len() {
                let e = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(TargetError::io(&path, "read the first MiB of", e));
            }
        }
        let head = Head { bytes, pending: false, touched: false, lost: false };
        Ok(Target { path, length, medium, fresh, resized, beyond, head: head.into() })
    }
}

/// So that the new name survives a power cut. A folder that may be written and not read cannot be flushed, and some
/// file systems flush no folders.
fn flush_folder(path: &Path, folder: &OwnedFd) -> Result<(), TargetError> {
    let flushed = reopen(folder, OFlags::RDONLY | OFlags::DIRECTORY).map(|f| f.sync_all());
    match flushed {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) if e.raw_os_error() != Some(libc::EINVAL) => Err(TargetError::io(path, "flush the folder of", e)),
        Ok(Err(e)) | Err(e) => {
            tracing::debug!(target = %path.display(), error = %e, "cannot flush the folder of the target");
            Ok(())
        }
    }
}

/// Brings a file to its length. Changing a file that has content begins with its first MiB: cut off or with zeroes
/// behind, it is already a half restored one.
fn resize(path: &Path, file: &File, old: u64, length: u64) -> Result<(), TargetError> {
    if old == length {
        return Ok(());
    }
    if old != 0 {
        let head = 0..HEAD_LEN.min(old);
        let erased = zero_file(file, head).and_then(|()| file.sync_all()).and_then(|()| step("target.resize-erased"));
        erased.map_err(|e| TargetError::io(path, "erase", e))?;
    }
    let sized = file.set_len(length).and_then(|()| step("target.sized"));
    sized.map_err(|e| TargetError::at(path, format!("bring it to {length} bytes"), e))
}

/// Where a test may stop.
pub(super) fn step(name: &'static str) -> io::Result<()> {
    failpoint::reach(|| name)
}

impl Medium {
    fn of_file(file: File) -> Self {
        let fs = rustix::fs::fstatfs(&file).map(|s| s.f_type as u64 & 0xffff_ffff).unwrap_or(0);
        let has_device = fs != TMPFS && fs != RAMFS;
        // tmpfs takes O_DIRECT and reads from memory all the same: do not claim more than is so.
        let past_cache = has_device
            .then(|| reopen(&file, OFlags::RDONLY | OFlags::DIRECT).ok())
            .flatten()
            .map(|f| DirectIo::new(f, FILE_SECTOR));
        Self::File { file, past_cache, has_device }
    }

    pub(super) fn is_device(&self) -> bool {
        matches!(self, Self::Device { .. })
    }

    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File { file, .. } => read_full(file, at, buf),
            Self::Device { direct, .. } => direct.read(at, buf),
        }
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.write_all_at(bytes, at),
            Self::Device { direct, .. } => direct.write(at, bytes),
        }
    }

    /// Zeroes by the cheapest means; whatever was there does not come back.
    pub(super) fn zero(&self, range: Range<u64>) -> io::Result<()> {
        match self {
            Self::File { file, .. } => zero_file(file, range),
            Self::Device { direct, .. } => zero_device(direct, range),
        }
    }

    /// Overwrites the first `len` bytes with zeroes.
    pub(super) fn erase(&self, len: u64) -> io::Result<()> {
        write_zero_bytes(0..len, |at, zeroes| self.write(at, zeroes))
    }

    pub(super) fn next_data(
        &self,
        path: &Path,
        from: ByteOffset,
        length: u64,
    ) -> Result<Option<Range<u64>>, VolumeError> {
        match self {
            Self::File { file, .. } => next_data(path, file, from, length),
            Self::Device { .. } => Ok((from.0 < length).then_some(from.0..length)),
        }
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.sync_all(),
            // Direct writes are past our cache; this empties the device's own.
            Self::Device { direct, .. } => direct.file().sync_all(),
        }
    }

    /// A hint: the system writes back by itself sooner or later.
    pub(super) fn start_writeback(&self) {
        if let Self::File { file, .. } = self
            && let Err(e) = sys::start_writeback(file)
        {
            tracing::debug!(error = %e, "cannot start writing the target back");
        }
    }

    /// After a flush: drops clean pages, so that later reads come from the device; `changed` has a disk's partition
    /// table read anew, too. Best effort: reading back past the cache does not need it.
    pub(super) fn drop_caches(&self, changed: bool) {
        match self {
            Self::File { file, .. } => {
                if let Err(e) = rustix::fs::fadvise(file, 0, None, Advice::DontNeed) {
                    tracing::debug!(error = %e, "cannot drop the target's cache");
                }
            }
            Self::Device { dev, direct } => {
                drop_device_caches(*dev);
                if changed
                    && *dev == dev.whole()
                    && let Err(e) = sys::device_reread_partitions(direct.file())
                {
                    // Loop devices without -P and disks that cannot have partitions answer EINVAL.
                    tracing::debug!(device = %dev, error = %e, "the kernel did not read the partition table anew");
                }
            }
        }
    }

    pub(super) fn read_back(&self, at: u64, buf: &mut [u8]) -> io::Result<(usize, ReadBack)> {
        match self {
            Self::Device { direct, .. } => Ok((direct.read(at, buf)?, ReadBack::Direct)),
            Self::File { file, past_cache, has_device } => {
                match past_cache.as_ref().map(|direct| direct.read(at, buf)) {
                    Some(Ok(got)) => return Ok((got, ReadBack::Direct)),
                    // Opened, but not able to after all.
                    Some(Err(e)) if e.raw_os_error() == Some(libc::EINVAL) => {}
                    Some(Err(e)) => return Err(e),
                    None => {}
                }
                if !has_device {
                    return Ok((read_full(file, at, buf)?, ReadBack::Cached));
                }
                rustix::fs::fadvise(file, at, std::num::NonZero::new(buf.len() as u64), Advice::DontNeed)?;
                Ok((read_full(file, at, buf)?, ReadBack::CacheDropped))
            }
        }
    }
}

fn zero_file(file: &File, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, range.start, range.end - range.start) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            write_zero_bytes(range, |at, zeroes| file.write_all_at(zeroes, at))
        }
        Err(e) => Err(e.into()),
    }
}

/// BLKZEROOUT for whole sectors; the rest is written.
fn zero_device(direct: &DirectIo, range: Range<u64>) -> io::Result<()> {
    let sector = direct.sector();
    let whole = range.start.div_ceil(sector) * sector..range.end / sector * sector;
    let write = |part: Range<u64>| write_zero_bytes(part, |at, zeroes| direct.write(at, zeroes));
    if whole.is_empty() {
        return write(range);
    }
    write(range.start..whole.start)?;
    match sys::device_zero_out(direct.file(), whole.start, whole.end - whole.start) {
        Ok(()) => {}
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY)) => {
            write(whole.clone())?
        }
        Err(e) => return Err(e),
    }
    write(whole.end..range.end)
}

fn write_zero_bytes(range: Range<u64>, write: impl Fn(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let zeroes = AlignedBuffer::new(ZEROES.min((range.end - range.start) as usize));
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(zeroes.len() as u64);
        write(at, &zeroes[..n as usize])?;
        at += n;
    }
    Ok(())
}

/// Writes back and drops the caches of a device, of its disk and of its partitions: each has one of its own. Other
/// partitions of the disk may be mounted and are left alone.
fn drop_device_caches(dev: Dev) {
    let mut devices = [vec![dev, dev.whole()], dev.partitions()].concat();
    devices.dedup();
    for device in devices {
        let Some(node) = device.node() else { continue };
        let dropped = OpenOptions::new().read(true).open(&node).and_then(|f| sys::device_drop_cache(&f));
        if let Err(e) = dropped {
            tracing::debug!(device = %node.display(), error = %e, "cannot drop its cache");
        }
    }
}
