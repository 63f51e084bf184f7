//! An in-place restore of one volume, page by page: compare, write what differs, read everything back. The same for
//! the receiver's restore and for one over the network; where the bytes come from is theirs.
//!
//! Read first: [`Difference`], [`BlockWriter`] and [`verify_all`]. Everything here is synchronous and for threads that
//! may block. It decides nothing: what a page must hold comes in as block digests.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use backhaul_protocol::digest::{BlockDigest, RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{BlockIndex, ByteOffset, Geometry, PageIndex};
use backhaul_protocol::record::VerifiedBlock;
use backhaul_protocol::session::compare::BlockSet;

use crate::scan::{DEVICE_READ, FILE_READ, PageScanner};
use crate::target::{Durability, ReadBack, Target, TargetError, VerifiedRun};
use crate::{Volume, VolumeError};

/// Bytes that are gathered for one write to a device, where every write waits for the disk. A file is written block by
/// block: another copy costs more there than another call.
const DEVICE_WRITE: usize = 1 << 20;

/// Threads that read a device back at once, at least: with one request at a time each, the usual disk needs a few.
const DEVICE_READERS: usize = 4;

/// What a target holds of a page before the restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeroes, without looking: it was just created.
    Fresh,
    /// Blocks with these digests.
    Digests(Vec<BlockDigest>),
}

/// What must happen to a page.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Difference {
    /// Blocks that differ and are not zero: their bytes must be fetched.
    pub fetch: BlockSet,
    /// Bytes that must become zeroes: neighbouring blocks together, ascending.
    pub zero: Vec<Range<u64>>,
}

impl Difference {
    /// Of what must be there and what is; both have one digest for each block of the page.
    pub fn of(geometry: Geometry, page: PageIndex, expected: &[BlockDigest], found: &Found) -> Self {
        let mut this = Self::default();
        for (i, want) in expected.iter().enumerate() {
            let have = match found {
                Found::Fresh => BlockDigest::ZERO,
                Found::Digests(digests) => digests[i],
            };
            if *want == have {
                continue;
            }
            if !want.is_zero() {
                this.fetch.insert(i);
                continue;
            }
            let range = block_range(geometry, BlockIndex(page.first_block().0 + i as u64));
            match this.zero.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => this.zero.push(range),
            }
        }
        this
    }

    /// Whether the page is as it must be.
    pub fn is_empty(&self) -> bool {
        self.fetch.is_empty() && self.zero.is_empty()
    }
}

/// The bytes of a block.
pub fn block_range(geometry: Geometry, block: BlockIndex) -> Range<u64> {
    let start = geometry.offset(block).0;
    start..start + geometry.block_len(block) as u64
}

/// What a restore finds, before or after it was opened for writing.
pub trait Existing: Volume {
    /// Whether all of it reads as zeroes since it was just created, is empty, or is not there yet.
    fn is_fresh(&self) -> bool;
    /// Whether it is a block device.
    fn is_device(&self) -> bool;
}

impl<T: Existing> Existing for Arc<T> {
    fn is_fresh(&self) -> bool {
        (**self).is_fresh()
    }

    fn is_device(&self) -> bool {
        (**self).is_device()
    }
}

/// How much is read from a target at once.
fn read_len(target: &impl Existing) -> usize {
    if target.is_device() { DEVICE_READ } else { FILE_READ }
}

/// Reads a target's pages before they are changed; keeps its buffer. One for each thread.
pub struct Comparer {
    geometry: Geometry,
    scanner: PageScanner,
}

impl Comparer {
    /// For a volume of this geometry.
    pub fn new(target: &impl Existing, geometry: Geometry) -> Self {
        Self { geometry, scanner: PageScanner::new(geometry, read_len(target)) }
    }

    /// What the target holds of a page, and how many bytes were read to know it. A fresh target is not read.
    pub fn look(&mut self, target: &impl Existing, page: PageIndex) -> Result<(Found, u64), TargetError> {
        if target.is_fresh() {
            return Ok((Found::Fresh, 0));
        }
        let scanned = self.scanner.scan::<VolumeError>(target, self.geometry, page, |_, _, _| Ok(()))?;
        Ok((Found::Digests(scanned.digests), scanned.bytes_read))
    }
}

/// Bytes that a writer leaves dirty in a file's cache before it has them written back, where that is waited for in the
/// end: so the disk works from the start and not only after everything else. Arbitrary, and some seconds of a disk.
const WRITEBACK: u64 = 64 << 20;

/// Writes verified blocks, on a device neighbouring ones together. Call [`Self::flush`] at the end.
pub struct BlockWriter {
    geometry: Geometry,
    durability: Durability,
    run: Option<VerifiedRun>,
    /// Bytes since write-back was begun last.
    dirty: u64,
}

impl BlockWriter {
    /// For a volume of this geometry. `durability` is what [`Target::finish`] will be asked for.
    pub fn new(target: &Target, geometry: Geometry, durability: Durability) -> Self {
        let run = target.is_device().then(|| VerifiedRun::new(geometry, DEVICE_WRITE));
        Self { geometry, durability, run, dirty: 0 }
    }

    /// Writes the block, now or with those that follow.
    pub fn push(&mut self, target: &Target, block: &VerifiedBlock<'_>) -> Result<(), TargetError> {
        let Some(run) = &mut self.run else {
            self.dirty += block.bytes().len() as u64;
            return target.write_block(block, self.geometry);
        };
        if run.push(block) {
            return Ok(());
        }
        target.write_run(run)?;
        run.clear();
        // A block that an empty run refuses is not of this volume: the target says so.
        if run.push(block) { Ok(()) } else { target.write_block(block, self.geometry) }
    }

    /// Writes what is still gathered. Now and then it waits until a file's earlier blocks are on their way to the disk.
    pub fn flush(&mut self, target: &Target) -> Result<(), TargetError> {
        let Some(run) = &mut self.run else {
            if self.durability == Durability::Device && self.dirty >= WRITEBACK {
                self.dirty = 0;
                target.start_writeback();
            }
            return Ok(());
        };
        let written = target.write_run(run);
        run.clear();
        written
    }
}

/// What a target turned out to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadAll {
    /// Of every page, in order.
    pub ranges: Vec<RangeDigest>,
    /// Of the whole volume.
    pub digest: VolumeDigest,
    /// Bytes that were compared, holes included: the volume's length.
    pub bytes: u64,
    /// Whether every byte came from the device, past the cache. False where there is no device, and after
    /// [`Durability::Cached`].
    pub from_device: bool,
}

impl ReadAll {
    /// The pages that are not as they must be. `expected` has one digest for each page.
    pub fn differing(&self, expected: &[RangeDigest]) -> Vec<PageIndex> {
        let pairs = self.ranges.iter().zip(expected).enumerate();
        pairs.filter(|(_, (have, want))| have != want).map(|(i, _)| PageIndex(i as u64)).collect()
    }
}

/// Reads the whole target on `threads` threads and hashes it: after [`Durability::Device`] what is on the medium, past the
/// cache; after [`Durability::Cached`] what any reader finds. Holes of files are not read. Call after
/// [`Target::finish`]. `progress` is told bytes of the volume as they are done.
pub fn verify_all(
    target: &Target,
    geometry: Geometry,
    durability: Durability,
    threads: usize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<ReadAll, TargetError> {
    let medium = Medium::new(target, durability);
    let pages = geometry.pages();
    let threads =
        if target.is_device() || durability == Durability::Device { threads.max(DEVICE_READERS) } else { threads };
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let first_error = Mutex::new(None);
    let ranges: Vec<Mutex<RangeDigest>> = (0..pages).map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, pages.min(64) as usize) {
            scope.spawn(|| {
                let mut scanner = PageScanner::new(geometry, read_len(target));
                while !failed.load(Ordering::Relaxed) {
                    let page = PageIndex(next.fetch_add(1, Ordering::Relaxed));
                    if page.0 >= pages {
                        break;
                    }
                    match scanner.scan::<VolumeError>(&medium, geometry, page, |_, _, _| Ok(())) {
                        Ok(found) => *lock(&ranges[page.0 as usize]) = RangeDigest::of(&found.digests),
                        Err(e) => {
                            failed.store(true, Ordering::Relaxed);
                            lock(&first_error).get_or_insert(TargetError::from(e));
                        }
                    }
                    progress(geometry.page_len(page));
                }
            });
        }
    });
    if let Some(error) = first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let ranges: Vec<RangeDigest> = ranges.iter().map(|r| *lock(r)).collect();
    let digest = VolumeDigester::of(geometry, &ranges);
    let from_device = medium.was_device();
    Ok(ReadAll { ranges, digest, bytes: geometry.length(), from_device })
}

/// The bytes of a page that are not as they must be, after [`verify_all`] found that it differs: neighbouring blocks
/// together, ascending.
pub fn differing_ranges(
    target: &Target,
    geometry: Geometry,
    durability: Durability,
    page: PageIndex,
    expected: &[BlockDigest],
) -> Result<Vec<Range<u64>>, TargetError> {
    let mut scanner = PageScanner::new(geometry, read_len(target));
    let medium = Medium::new(target, durability);
    let found = scanner.scan::<VolumeError>(&medium, geometry, page, |_, _, _| Ok(()))?;
    let mut out: Vec<Range<u64>> = Vec::new();
    for (i, _) in found.digests.iter().zip(expected).enumerate().filter(|(_, (have, want))| have != want) {
        let range = block_range(geometry, BlockIndex(page.first_block().0 + i as u64));
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    Ok(out)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A target as the medium holds it, or as any reader finds it.
struct Medium<'a> {
    target: &'a Target,
    durability: Durability,
    /// The least that was true of any read: 0 none yet, 1 from the device, 2 from memory.
    least: AtomicU8,
}

impl<'a> Medium<'a> {
    fn new(target: &'a Target, durability: Durability) -> Self {
        Self { target, durability, least: AtomicU8::new(0) }
    }

    /// A volume of holes alone was not read at all, and counts as what was asked for.
    fn was_device(&self) -> bool {
        self.durability == Durability::Device && self.least.load(Ordering::Relaxed) < 2
    }
}

impl Volume for Medium<'_> {
    fn length(&self) -> u64 {
        self.target.length()
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        if self.durability == Durability::Cached {
            return self.target.read_at(at, buf);
        }
        let range = at.0..at.0 + buf.len() as u64;
        let how = self.target.read_back(at, buf).map_err(|e| {
            let source = match e {
                TargetError::Io { source, .. } => source,
                other => std::io::Error::other(other),
            };
            VolumeError::Read { path: self.target.path().to_owned(), range, source }
        })?;
        let rank = if how == ReadBack::Cached { 2 } else { 1 };
        self.least.fetch_max(rank, Ordering::Relaxed);
        Ok(())
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        self.target.next_data(from)
    }

    fn describe(&self) -> String {
        self.target.describe()
    }
}

#[cfg(test)]
#[path = "rebuild_tests.rs"]
mod tests;
