//! The HashIndex: the digest of every block as it was when it was last read. A cache, never believed unseen.
//!
//! Read first: [`HashIndex::ranges`] and [`HashIndex::page`].
//!
//! It is read, not mapped: a sector that can't be read is an error of a read, and would be SIGBUS from a map. An index
//! that can't be read when it is opened is made anew.
//!
//! One flat file for each volume: a header (`BHIX`, version, block size, length, epoch, number of points, time of the
//! last full scan), and from byte 4096 on 32 bytes a block; holes are zero blocks. It is changed in place while a round goes on, without any order or flush. That
//! is enough, because nothing in it is used before its range digest was found equal to the receiver's: a page that
//! is torn, old, ahead of what was committed, or of another volume differs from the receiver's and is fetched. An idle
//! round writes nothing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use backhaul_hints::Baseline;
use backhaul_protocol::digest::{BlockDigest, RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::VolumeId;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::{failpoint, random};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

const MAGIC: &[u8; 8] = b"BHIX\x01\0\0\0";
const DIGESTS_START: u64 = 4096;
/// Where the header has which index this is: see [`HashIndex::baseline`].
const STANDING_START: u64 = 64;
/// What a disk or a file system that can't read says.
const UNREADABLE: [Errno; 3] = [Errno::IO, Errno::UCLEAN, Errno::BADMSG];

/// How the index fails. The agent can always go on without one.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The file can't be opened, read or written.
    #[error("index {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A page was read when the index was opened, and can't be read as it was then: the disk fails, or a round that was
    /// given up was still at its last page. The next round opens it anew, and takes from the receiver what is lost.
    #[error("index {}: page {} is not what it was when the index was opened", path.display(), page.0)]
    Page {
        /// Which file.
        path: PathBuf,
        /// Which page.
        page: PageIndex,
        /// Why it can't be read; `None`: it reads differently.
        source: Option<std::io::Error>,
    },
}

impl IndexError {
    /// Whether trying again may help: when there is room again, or with an index that is made anew.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            Self::Page { .. } => true,
        }
    }
}

/// The index of one volume.
#[derive(Debug)]
pub struct HashIndex {
    path: PathBuf,
    file: File,
    geometry: Geometry,
    ranges: RwLock<Vec<RangeDigest>>,
    standing: Mutex<Standing>,
}

/// Which index this is, and how far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Standing {
    baseline: Baseline,
    full_scan: Option<UnixMillis>,
    scan: ScanProgress,
}

/// How far the background scan is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScanProgress {
    /// The next block.
    pub next: u64,
    /// When block 0 was read.
    pub begun: UnixMillis,
}

impl Standing {
    const LEN: usize = 48;

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.baseline.epoch);
        bytes[16..24].copy_from_slice(&self.baseline.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.full_scan.map_or(0, |at| at.0).to_le_bytes());
        bytes[32..40].copy_from_slice(&self.scan.next.to_le_bytes());
        bytes[40..].copy_from_slice(&self.scan.begun.0.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let epoch = std::array::from_fn(|i| bytes[i]);
        let scan = ScanProgress { next: word(32), begun: UnixMillis(word(40) as i64) };
        let full_scan = Some(UnixMillis(word(24) as i64)).filter(|at| at.0 != 0);
        Self { baseline: Baseline { epoch, number: word(16) }, full_scan, scan }
    }
}

impl HashIndex {
    /// Opens the index of a volume, or makes an empty one. One of another geometry keeps what still fits; one that the
    /// disk can't read any more is removed first.
    pub fn open(folder: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self, IndexError> {
        let path = folder.join(volume.to_string());
        let io = |source| IndexError::Io { path: path.clone(), source };
        // A cache that somebody cleared away is made again.
        std::fs::create_dir_all(folder).map_err(io)?;
        match Self::open_file(&path, geometry) {
            Err(e) if e.raw_os_error().is_some_and(|e| UNREADABLE.contains(&Errno::from_raw_os_error(e))) => {
                tracing::warn!(index = %path.display(), error = %e, "an index can't be read, and is made anew");
                Self::remove(folder, volume).and_then(|()| Self::open_file(&path, geometry))
            }
            result => result,
        }
        .map_err(io)
    }

    fn open_file(path: &Path, geometry: Geometry) -> std::io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let length = DIGESTS_START + geometry.blocks() * 32;
        let mut header = [0; 64];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&geometry.block_size().to_le_bytes());
        let mut found = [0; 64];
        let known = file.metadata()?.len() >= DIGESTS_START;
        if known {
            file.read_exact_at(&mut found, 0)?;
        }
        if found != header {
            file.set_len(0)?;
            file.write_all_at(&header, 0)?;
            failpoint::reach(|| "index.begun")?;
        }
        if file.metadata()?.len() != length {
            file.set_len(length)?;
            failpoint::reach(|| "index.sized")?;
        }
        let mut standing = [0; Standing::LEN];
        file.read_exact_at(&mut standing, STANDING_START)?;
        if standing[..16] == [0; 16] {
            standing[..16].copy_from_slice(&random::id());
            file.write_all_at(&standing, STANDING_START)?;
        }
        let standing = Mutex::new(Standing::from_bytes(standing));
        let index = Self { path: path.to_owned(), file, geometry, ranges: RwLock::default(), standing };
        let ranges = index.compute_ranges()?;
        *index.ranges.write().unwrap_or_else(PoisonError::into_inner) = ranges;
        Ok(index)
    }

    /// Removes the index of a volume.
    pub fn remove(folder: &Path, volume: VolumeId) -> std::io::Result<()> {
        match std::fs::remove_file(folder.join(volume.to_string())) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The geometry that it was opened with.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Which index this is (another one whenever it was made anew), and a number that grows with what is settled.
    pub fn baseline(&self) -> Baseline {
        self.standing().baseline
    }

    /// When all of the volume was last read; `None` if it never was, or nobody knows.
    pub fn full_scan(&self) -> Option<UnixMillis> {
        self.standing().full_scan
    }

    /// Writes down that it is one point further, and gives the new baseline. Not flushed: what relies on it does not
    /// outlive a power loss either.
    pub fn advance(&self) -> Result<Baseline, IndexError> {
        let standing = self.write_standing(|s| s.baseline.number += 1)?;
        Ok(standing.baseline)
    }

    /// All of the volume was read, from this time on.
    pub fn scanned(&self, begun: UnixMillis, now: UnixMillis) -> Result<(), IndexError> {
        self.write_standing(|s| {
            s.full_scan = Some(begun);
            s.scan = ScanProgress { next: 0, begun: now };
        })?;
        Ok(())
    }

    /// How far the background scan is.
    pub fn scan_progress(&self) -> ScanProgress {
        self.standing().scan
    }

    /// The background scan is so far.
    pub fn scanned_to(&self, next: u64) -> Result<(), IndexError> {
        self.write_standing(|s| s.scan.next = next).map(drop)
    }

    fn write_standing(&self, change: impl FnOnce(&mut Standing)) -> Result<Standing, IndexError> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut standing);
        let written = self.file.write_all_at(&standing.to_bytes(), STANDING_START);
        written.map_err(|source| IndexError::Io { path: self.path.clone(), source })?;
        Ok(*standing)
    }

    /// Makes it another index, of which nobody has marks: it will hold what the volume may never have held.
    pub fn renounce(&self) -> Result<(), IndexError> {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        standing.baseline = Baseline { epoch: random::id(), number: 0 };
        let written = self.file.write_all_at(&standing.to_bytes(), STANDING_START);
        written.map_err(|source| IndexError::Io { path: self.path.clone(), source })
    }

    fn standing(&self) -> Standing {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, page: PageIndex) -> (u64, usize) {
        (DIGESTS_START + page.first_block().0 * 32, self.geometry.page_blocks(page) * 32)
    }

    fn compute_ranges(&self) -> std::io::Result<Vec<RangeDigest>> {
        let mut ranges = vec![RangeDigest::ZERO; self.geometry.pages() as usize];
        let mut page = 0;
        while page < self.geometry.pages() {
            // Holes are skipped: the index of a large sparse volume is one too.
            let (at, _) = self.place(PageIndex(page));
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(_) => at,
            };
            page = page.max(data.saturating_sub(DIGESTS_START) / 32 / backhaul_protocol::limits::BLOCKS_PER_PAGE);
            if page >= self.geometry.pages() {
                break;
            }
            ranges[page as usize] = RangeDigest::of(&self.read_page(PageIndex(page))?);
            page += 1;
        }
        Ok(ranges)
    }

    /// Range digests of all pages, as the index has them.
    pub fn ranges(&self) -> Vec<RangeDigest> {
        self.ranges.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The range digest of one page, as the index has it.
    pub fn range(&self, page: PageIndex) -> RangeDigest {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        ranges.get(page.0 as usize).copied().unwrap_or_default()
    }

    /// The digest of the volume, as the index has it.
    pub fn volume_digest(&self) -> VolumeDigest {
        VolumeDigester::of(self.geometry, &self.ranges())
    }

    /// The digests of a page's blocks; they add up to [`Self::range`].
    pub fn page(&self, page: PageIndex) -> Result<Vec<BlockDigest>, IndexError> {
        // Holes are not touched: the index of a large sparse volume is one too.
        let range = self.range(page);
        if range == RangeDigest::ZERO {
            return Ok(vec![BlockDigest::ZERO; self.geometry.page_blocks(page)]);
        }
        let lost = |source| IndexError::Page { path: self.path.clone(), page, source };
        let digests = self.read_page(page).map_err(|e| lost(Some(e)))?;
        // The file may have been written to since, or is read from the disk a second time.
        if RangeDigest::of(&digests) == range { Ok(digests) } else { Err(lost(None)) }
    }

    fn read_page(&self, page: PageIndex) -> std::io::Result<Vec<BlockDigest>> {
        let (at, len) = self.place(page);
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at)?;
        let (digests, _) = bytes.as_chunks::<32>();
        Ok(digests.iter().map(|d| BlockDigest(*d)).collect())
    }

    /// Replaces the digests of a page, where they differ from what is there.
    pub fn store(&self, page: PageIndex, range: RangeDigest, digests: &[BlockDigest]) -> Result<(), IndexError> {
        let unchanged = |ranges: &[RangeDigest]| ranges.get(page.0 as usize) == Some(&range);
        if unchanged(&self.ranges.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(());
        }
        let (at, len) = self.place(page);
        debug_assert_eq!(digests.len() * 32, len);
        let mut bytes = Vec::with_capacity(len);
        digests.iter().for_each(|d| bytes.extend_from_slice(&d.0));
        let io = |source| IndexError::Io { path: self.path.clone(), source };
        self.file.write_all_at(&bytes, at).map_err(io)?;
        failpoint::reach(|| "index.page").map_err(io)?;
        self.ranges.write().unwrap_or_else(PoisonError::into_inner)[page.0 as usize] = range;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread of a round that was given up may still be at its last page when the next round has compared its index
    /// with the receiver's: what it stores then was never compared, and a block that it calls equal may not be.
    #[test]
    fn what_somebody_else_stores_meanwhile_is_never_believed() {
        let folder = tempfile::tempdir().expect("temp folder");
        let geometry = Geometry::new(65536, 10 * 65536).expect("legal");
        let open = || HashIndex::open(folder.path(), VolumeId([1; 16]), geometry).expect("opens");
        let pages = [1, 2].map(|n| vec![BlockDigest([n; 32]); 10]);
        let store = |index: &HashIndex, digests: &[BlockDigest]| {
            index.store(PageIndex(0), RangeDigest::of(digests), digests).expect("stores");
        };
        store(&open(), &pages[0]);
        let (given_up, next) = (open(), open());
        assert_eq!(next.page(PageIndex(0)).expect("whole"), pages[0]);
        store(&given_up, &pages[1]);
        let error = next.page(PageIndex(0)).expect_err("nobody compared these");
        assert!(matches!(error, IndexError::Page { source: None, .. }) && error.is_retryable(), "{error}");
        assert_eq!(open().page(PageIndex(0)).expect("whole"), pages[1]);
    }

    #[test]
    fn an_index_survives_growth_and_loses_itself_with_another_block_size() {
        let folder = tempfile::tempdir().expect("temp folder");
        let id = VolumeId([1; 16]);
        let small = Geometry::new(65536, 1500 * 65536).expect("legal");
        let digests: Vec<_> = (0..476).map(|i| BlockDigest([i as u8; 32])).collect();
        let index = HashIndex::open(folder.path(), id, small).expect("opens");
        assert_eq!(index.ranges(), [RangeDigest::ZERO; 2]);
        index.store(PageIndex(1), RangeDigest::of(&digests), &digests).expect("stores");
        drop(index);
        let large = Geometry::new(65536, 5000 * 65536).expect("legal");
        let index = HashIndex::open(folder.path(), id, large).expect("opens");
        assert_eq!(index.page(PageIndex(1)).expect("it can be read")[..476], digests);
        assert_eq!(index.ranges()[1], RangeDigest::of(&digests));
        drop(index);
        let other = Geometry::new(32768, 5000 * 65536).expect("legal");
        let index = HashIndex::open(folder.path(), id, other).expect("opens");
        assert!(index.ranges().iter().all(|r| *r == RangeDigest::ZERO));
    }
}
