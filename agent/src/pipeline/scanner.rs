//! Threads that take pages, read and hash them, compare with what the receiver has, and compress what differs.
//!
//! Read first: [`Scanner::start`], [`Job`] and [`Scanned`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use backhaul_protocol::digest::{BlockDigest, RangeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::record::{Encoder, encode_zeroes};
use backhaul_protocol::session::compare::BlockSet;
use backhaul_volume::scan::{DEVICE_READ, FILE_READ, PageScanner};
use backhaul_volume::{Volume, VolumeError};
use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};

use crate::tracker::hash_index::{HashIndex, IndexError};

/// Records are handed to the sender in pieces of about this many bytes: a quarter of a stream's window. Arbitrary.
const PIECE: usize = 256 << 10;

/// How scanning fails.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Memory for compression.
    #[error("can't compress: {0}")]
    Compressor(std::io::Error),
    /// The sender has stopped: its own error says why.
    #[error("sending has stopped")]
    Stopped,
}

/// What does not change while a volume is scanned.
pub struct ScanVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// Block size and length.
    pub geometry: Geometry,
    /// What is read.
    pub volume: Box<dyn Volume>,
    /// How much is read at once, bytes.
    pub read_len: usize,
    /// Digests as they were last read.
    pub index: HashIndex,
}

impl ScanVolume {
    /// How much to read at once.
    pub fn read_len(is_device: bool) -> usize {
        if is_device { DEVICE_READ } else { FILE_READ }
    }
}

/// What the receiver has of a page.
#[derive(Debug)]
pub enum HeldPage {
    /// What the index has: their range digests are equal.
    AsIndexed,
    /// Nothing but zeroes, and no draft.
    Zero,
    /// As the receiver told.
    Digests {
        /// Of every block.
        digests: Vec<BlockDigest>,
        /// Those that the draft holds.
        draft: BlockSet,
    },
}

/// Pages to scan, one after the other: several at once in large volumes, where waking a thread for each page would cost
/// more than looking at it.
pub struct Job {
    /// Which volume.
    pub volume: Arc<ScanVolume>,
    /// Which pages, and what the receiver has of each.
    pub pages: Vec<(PageIndex, HeldPage)>,
}

/// A page that was scanned; what differs is with the sender.
pub struct Scanned {
    /// Which volume.
    pub slot: VolumeSlot,
    /// Which page.
    pub page: PageIndex,
    /// Of every block, as read now.
    pub digests: Vec<BlockDigest>,
    /// Their digest.
    pub range: RangeDigest,
    /// What the draft held before.
    pub draft: BlockSet,
    /// What was sent now.
    pub sent: BlockSet,
    /// Number of records that were sent.
    pub records: u64,
    /// Bytes that were read.
    pub bytes_read: u64,
}

/// What the threads share.
#[derive(Debug)]
pub struct ScanShared {
    /// Captures are numbered through the whole round.
    pub capture: AtomicU64,
    /// Set when the round is given up.
    pub stop: AtomicBool,
    /// zstd level.
    pub level: i32,
}

/// The threads' ends of the queues.
pub struct Scanner {
    /// Pages go in here.
    pub jobs: mpsc::Sender<Job>,
    /// And come out here, in about the same order.
    pub scanned: mpsc::Receiver<Result<Vec<Scanned>, ScanError>>,
    shared: Arc<ScanShared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Scanner {
    /// Starts so many threads; pieces of records go to `records`.
    pub fn start(threads: usize, shared: Arc<ScanShared>, records: mpsc::Sender<Bytes>) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>(threads);
        let (done, scanned) = mpsc::channel(threads);
        let queue = Arc::new(Mutex::new(queue));
        let mut handles = Vec::new();
        for n in 0..threads {
            let (queue, done, records, shared) = (queue.clone(), done.clone(), records.clone(), shared.clone());
            let thread = std::thread::Builder::new().name(format!("scan-{n}"));
            handles.push(thread.spawn(move || work(&queue, &done, &records, &shared))?);
        }
        Ok(Self { jobs, scanned, shared, threads: handles })
    }

    /// Gives the round up: threads end after the piece that they are at.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Scanner {
    fn drop(&mut self) {
        self.stop();
        // Closing both queues lets threads that wait for either go on and end; they are not waited for here, since
        // this may be an async task.
        self.scanned.close();
        self.threads.clear();
    }
}

fn work(
    queue: &Mutex<mpsc::Receiver<Job>>,
    done: &mpsc::Sender<Result<Vec<Scanned>, ScanError>>,
    records: &mpsc::Sender<Bytes>,
    shared: &ScanShared,
) {
    let mut worker = match Encoder::new(shared.level) {
        Ok(encoder) => Worker { encoder, scanner: None, piece: Vec::with_capacity(PIECE * 2) },
        Err(e) => {
            let _ = done.blocking_send(Err(ScanError::Compressor(e)));
            return;
        }
    };
    loop {
        let job = queue.blocking_lock().blocking_recv();
        let Some(job) = job else { return };
        let Job { volume, pages } = job;
        let scanned = pages.into_iter().map(|(page, held)| worker.scan(&volume, page, held, records, shared)).collect();
        if done.blocking_send(scanned).is_err() {
            return;
        }
    }
}

struct Worker {
    encoder: Encoder,
    scanner: Option<(VolumeSlot, PageScanner)>,
    piece: Vec<u8>,
}

impl Worker {
    fn scan(
        &mut self,
        volume: &ScanVolume,
        page: PageIndex,
        held: HeldPage,
        records: &mpsc::Sender<Bytes>,
        shared: &ScanShared,
    ) -> Result<Scanned, ScanError> {
        let (held, draft) = match held {
            HeldPage::AsIndexed => (volume.index.page(page), BlockSet::default()),
            HeldPage::Zero => (vec![BlockDigest::ZERO; volume.geometry.page_blocks(page)], BlockSet::default()),
            HeldPage::Digests { digests, draft } => (digests, draft),
        };
        let scanner = match &mut self.scanner {
            Some((slot, scanner)) if *slot == volume.slot => scanner,
            other => &mut other.insert((volume.slot, PageScanner::new(volume.geometry, volume.read_len))).1,
        };
        let (encoder, piece) = (&mut self.encoder, &mut self.piece);
        let mut sent = BlockSet::default();
        let mut count = 0;
        let found = scanner.scan::<ScanError>(&*volume.volume, volume.geometry, page, |block, digest, bytes| {
            if digest.is_zero() || held[block.in_page()] == digest {
                return if shared.stop.load(Ordering::Relaxed) { Err(ScanError::Stopped) } else { Ok(()) };
            }
            let capture = CaptureNumber(shared.capture.fetch_add(1, Ordering::Relaxed));
            encoder.encode(volume.slot, block, capture, digest, bytes, piece);
            sent.insert(block.in_page());
            count += 1;
            if piece.len() >= PIECE { hand_on(piece, records) } else { Ok(()) }
        })?;
        let zeroes = zero_runs(&held, &found.digests);
        for (first, run) in zeroes {
            let capture = CaptureNumber(shared.capture.fetch_add(1, Ordering::Relaxed));
            let block = BlockIndex(page.first_block().0 + first as u64);
            encode_zeroes(volume.slot, block, run as u64, capture, piece);
            (first..first + run).for_each(|i| sent.insert(i));
            count += 1;
        }
        if !piece.is_empty() {
            hand_on(piece, records)?;
        }
        let range = RangeDigest::of(&found.digests);
        volume.index.store(page, range, &found.digests)?;
        Ok(Scanned {
            slot: volume.slot,
            page,
            digests: found.digests,
            range,
            draft,
            sent,
            records: count,
            bytes_read: found.bytes_read,
        })
    }
}

fn hand_on(piece: &mut Vec<u8>, records: &mpsc::Sender<Bytes>) -> Result<(), ScanError> {
    let full = std::mem::replace(piece, Vec::with_capacity(PIECE * 2));
    records.blocking_send(Bytes::from(full)).map_err(|_| ScanError::Stopped)
}

/// Runs of blocks that are zero now and that the receiver has as something else.
fn zero_runs(held: &[BlockDigest], actual: &[BlockDigest]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, _) in held.iter().zip(actual).enumerate().filter(|(_, (h, a))| a.is_zero() && !h.is_zero()) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == i => *count += 1,
            _ => runs.push((i, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_became_zero_is_sent_as_zeroes() {
        let [z, a] = [BlockDigest::ZERO, BlockDigest([1; 32])];
        assert_eq!(zero_runs(&[a, a, z, a, a], &[z, z, z, a, z]), [(0, 2), (4, 1)]);
    }
}
