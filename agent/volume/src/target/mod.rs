//! Where a restore writes.
//!
//! Read first: [`Target::check`] (every refusal, nothing written), [`CheckedTarget::open`], [`Target::write_run`],
//! [`Target::finish`], [`Target::read_back`].
//!
//! **The first MiB is written last.** From the first change on, the first MiB on the medium is zeroes; what belongs
//! there waits in memory until [`Target::finish`], which flushes everything else first. So nothing takes a half
//! restored target for a whole one: it has no boot sector, partition table or superblock. That is the mark of an
//! unfinished restore, for devices and files alike; there is no marker file. Run the restore again to continue: what
//! is equal already is not written again, and if nothing is to be written, nothing is touched. (Not hidden by this:
//! copies that some formats keep elsewhere, as the backup GPT at the end of a disk.)
//!
//! [`Target::read_at`] is the content as it will be, the waiting MiB included; [`Target::read_back`] is what is on the
//! medium. Bytes get in as [`VerifiedBlock`] or [`VerifiedRun`] only (proof by type). All methods take `&self` and may
//! be called by several threads, for different blocks.

mod check;
mod error;
mod medium;
mod run;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use backhaul_protocol::digest::is_zero;
use backhaul_protocol::geometry::{ByteOffset, Geometry};
use backhaul_protocol::record::VerifiedBlock;

use crate::buffer::AlignedBuffer;
use crate::rebuild::Existing;
use crate::{Volume, VolumeError, checked_range};

pub use check::{CheckedTarget, TargetNeeds};
pub use error::{Refusal, TargetError, TargetErrorKind};
use medium::{Medium, step};
pub use run::VerifiedRun;

/// Bytes at the beginning that are written last. Boot sector, partition table and the superblocks of ext4, XFS and LVM
/// lie within it; btrfs keeps its first copy at 64 KiB.
pub const HEAD_LEN: u64 = 1 << 20;

/// Bytes of those that are the very last: MBR, GPT and LVM label, and the superblocks of ext4 and XFS.
const FIRST_LEN: usize = 4096;

/// What [`Target::finish`] waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Everything is on the device, and no cache stands before it any more.
    Device,
    /// Everything is written to where reads find it; the system writes it back when it likes. A power cut may lose it.
    Cached,
}

/// Where [`Target::read_back`] got its bytes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadBack {
    /// Past the cache, from the device.
    Direct,
    /// Through the cache, after it was dropped: from the device as far as the kernel tells.
    CacheDropped,
    /// From memory: the file system has no device.
    Cached,
}

/// An opened target. A device stays claimed exclusively until it is dropped.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    length: u64,
    medium: Medium,
    fresh: bool,
    resized: bool,
    beyond: u64,
    head: Mutex<Head>,
}

/// The first MiB.
#[derive(Debug)]
struct Head {
    /// What belongs there.
    bytes: AlignedBuffer,
    /// On the medium there are zeroes, or something older.
    pending: bool,
    /// Something on the medium was changed since the last finish, or may have been.
    touched: bool,
    /// A write or flush failed: what is on the medium is not known any more, and never completed from here.
    lost: bool,
}

impl Target {
    /// Makes every check that can be made before the first write; writes nothing. An existing file or device is opened
    /// here, once, and everything later is done to what was opened.
    pub fn check(path: impl AsRef<Path>, needs: &TargetNeeds) -> Result<CheckedTarget, TargetError> {
        check::check(path.as_ref(), needs)
    }

    /// The path as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of a device behind the volume's end: they stay as they are.
    pub fn beyond(&self) -> u64 {
        self.beyond
    }

    /// Whether it is a file that had content and another length: of its first MiB nothing is left.
    pub fn was_resized(&self) -> bool {
        self.resized
    }

    /// Writes one block. The geometry must have the target's length.
    pub fn write_block(&self, block: &VerifiedBlock<'_>, geometry: Geometry) -> Result<(), TargetError> {
        let bytes = block.bytes();
        if !geometry.contains(block.block()) || bytes.len() != geometry.block_len(block.block()) {
            return Err(self.misfit(format!("block {} is not one of this volume", block.block())));
        }
        self.write(geometry, geometry.offset(block.block()), bytes)
    }

    /// Writes adjacent blocks in one go. An empty run does nothing.
    pub fn write_run(&self, run: &VerifiedRun) -> Result<(), TargetError> {
        if run.is_empty() { Ok(()) } else { self.write(run.geometry(), run.offset(), run.bytes()) }
    }

    fn write(&self, geometry: Geometry, at: ByteOffset, bytes: &[u8]) -> Result<(), TargetError> {
        if geometry.length() != self.length {
            return Err(self.misfit(format!("a volume of {} bytes, and this has {}", geometry.length(), self.length)));
        }
        let range = self.range(at, bytes.len())?;
        let in_head = self.split(&range);
        self.change(in_head.start..in_head.end, |head, part| head.copy_from_slice(&bytes[..part]))?;
        let rest = in_head.end - range.start;
        if in_head.end == range.end {
            return Ok(());
        }
        let written = self.medium.write(in_head.end, &bytes[rest as usize..]).and_then(|()| step("target.written"));
        written.map_err(|e| self.lose("write", &range, e))
    }

    /// Makes `range` (bytes) read as zeroes: a hole in a file, BLKZEROOUT on a device.
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<(), TargetError> {
        if range.start > range.end || range.end > self.length {
            return Err(self.misfit(format!("bytes {} to {} are outside it", range.start, range.end)));
        }
        let in_head = self.split(&range);
        self.change(in_head.clone(), |head, _| head.fill(0))?;
        let rest = in_head.end..range.end;
        if rest.is_empty() {
            return Ok(());
        }
        let zeroed = self.medium.zero(rest).and_then(|()| step("target.zeroed"));
        zeroed.map_err(|e| self.lose("zero", &range, e))
    }

    /// Completes the restore: everything else first, then the first MiB. May be called again after more writes. Once a
    /// write or flush has failed it always fails ([`TargetError::Lost`]): a failed flush is never repeated, and the
    /// first MiB is not put on top of what is not whole. Open and compare anew.
    pub fn finish(&self, durability: Durability) -> Result<(), TargetError> {
        let mut head = self.head();
        if head.lost {
            return Err(TargetError::Lost { path: self.path.clone() });
        }
        if head.pending {
            // From the end: superblocks and partition tables begin in the first sectors.
            let first = FIRST_LEN.min(head.bytes.len());
            for (part, name) in [(first..head.bytes.len(), "target.flushed"), (0..first, "target.head-flushed")] {
                if durability == Durability::Device {
                    self.flush(&mut head, name)?;
                }
                if let Err(e) = self.medium.write(part.start as u64, &head.bytes[part.clone()]) {
                    head.lost = true;
                    return Err(self.failed("write", &(part.start as u64..part.end as u64), e));
                }
            }
            (head.pending, head.touched) = (false, true);
        }
        if durability == Durability::Device {
            self.flush(&mut head, "target.finished")?;
            self.medium.drop_caches(head.touched);
            head.touched = false;
        }
        Ok(())
    }

    /// Has what was written to a file so far written back; waits while the disk's queue is full, not for the disk. A
    /// hint, so that there is little left for [`Self::finish`].
    pub fn start_writeback(&self) {
        self.medium.start_writeback();
    }

    /// `name` is what a test calls it.
    fn flush(&self, head: &mut Head, name: &'static str) -> Result<(), TargetError> {
        self.medium.flush().and_then(|()| step(name)).map_err(|source| {
            head.lost = true;
            TargetError::Flush { path: self.path.clone(), source }
        })
    }

    /// Reads what is on the medium, past the cache where that is possible, and says how it was. To verify a restore:
    /// after [`Target::finish`] with [`Durability::Device`].
    pub fn read_back(&self, at: ByteOffset, buf: &mut [u8]) -> Result<ReadBack, TargetError> {
        let range = self.range(at, buf.len())?;
        match self.medium.read_back(at.0, buf) {
            Ok((got, how)) if got == buf.len() => Ok(how),
            Ok((got, _)) => {
                let e = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("only {got} bytes came"));
                Err(self.failed("read back", &range, e))
            }
            Err(e) => Err(self.failed("read back", &range, e)),
        }
    }

    /// The part of `range` that lies in the first MiB.
    fn split(&self, range: &Range<u64>) -> Range<u64> {
        let head_len = HEAD_LEN.min(self.length);
        range.start..range.end.min(head_len).max(range.start)
    }

    /// Before anything else on the medium changes, its first MiB becomes zeroes, durably. Then changes the part of the
    /// waiting MiB that is meant, if any.
    fn change(&self, part: Range<u64>, apply: impl FnOnce(&mut [u8], usize)) -> Result<(), TargetError> {
        let mut head = self.head();
        if head.lost {
            return Err(TargetError::Lost { path: self.path.clone() });
        }
        if !head.pending {
            // In a fresh file there is nothing to be mistaken for anything.
            if !is_zero(&head.bytes) {
                let range = 0..head.bytes.len() as u64;
                head.touched = true;
                if let Err(e) = self.medium.erase(range.end).and_then(|()| step("target.erased")) {
                    // What is there now is neither the old MiB nor zeroes.
                    head.lost = true;
                    return Err(self.failed("erase", &range, e));
                }
                self.flush(&mut head, "target.guarded")?;
            }
            (head.pending, head.touched) = (true, true);
        }
        if !part.is_empty() {
            let len = (part.end - part.start) as usize;
            apply(&mut head.bytes[part.start as usize..part.end as usize], len);
        }
        Ok(())
    }

    /// A failed write: the target is not to be completed.
    fn lose(&self, what: &str, range: &Range<u64>, e: std::io::Error) -> TargetError {
        self.head().lost = true;
        self.failed(what, range, e)
    }

    fn head(&self) -> MutexGuard<'_, Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, at: ByteOffset, len: usize) -> Result<Range<u64>, TargetError> {
        checked_range(at, len, self.length)
            .ok_or_else(|| self.misfit(format!("bytes {} to {} + {len} are outside it", at.0, at.0)))
    }

    fn misfit(&self, what: String) -> TargetError {
        TargetError::Misfit { path: self.path.clone(), what }
    }

    fn failed(&self, what: &str, range: &Range<u64>, e: std::io::Error) -> TargetError {
        TargetError::at(&self.path, format!("{what} bytes {} to {}", range.start, range.end), e)
    }
}

impl Existing for Target {
    fn is_fresh(&self) -> bool {
        self.fresh
    }

    fn is_device(&self) -> bool {
        self.medium.is_device()
    }
}

impl Volume for Target {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let (path, length, len) = (|| self.path.clone(), self.length, buf.len() as u64);
        let range = checked_range(at, buf.len(), length).ok_or_else(|| VolumeError::OutOfBounds {
            path: path(),
            at: at.0,
            len,
            length,
        })?;
        let in_head = self.split(&range);
        let rest = (in_head.end - range.start) as usize;
        if rest > 0 {
            buf[..rest].copy_from_slice(&self.head().bytes[in_head.start as usize..in_head.end as usize]);
        }
        match self.medium.read(in_head.end, &mut buf[rest..]) {
            Ok(got) if got == buf.len() - rest => Ok(()),
            Ok(got) => Err(VolumeError::ShortRead { path: path(), range, got: (got + rest) as u64 }),
            Err(source) => Err(VolumeError::Read { path: path(), range, source }),
        }
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        let head_len = HEAD_LEN.min(self.length);
        // On the medium there may be a hole where bytes wait in memory.
        if from.0 < head_len && !is_zero(&self.head().bytes) {
            return Ok(Some(from.0..head_len));
        }
        self.medium.next_data(&self.path, from, self.length)
    }

    fn describe(&self) -> String {
        let kind = if self.is_device() { "device" } else { "file" };
        format!("{kind} {}", self.path.display())
    }
}

#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod tests;
