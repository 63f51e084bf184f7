//! Threads that take pages, read and hash them, compare with what the receiver has, and compress what differs.
//!
//! Read first: [`Scanner::start`], [`Job`] and [`Scanned`].

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backhaul_protocol::digest::{BlockDigest, RangeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::record::{Encoder, encode_zeroes};
use backhaul_protocol::session::compare::{BlockSet, differing};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::threads::is_simulated;
use backhaul_volume::scan::PageScanner;
use backhaul_volume::{Volume, VolumeError};
use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use super::load::Load;
use super::pace::Pace;
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
    pub index: Arc<HashIndex>,
}

/// Which blocks of a page are read.
#[derive(Clone, Copy, Debug)]
pub enum Reading {
    /// All.
    Everything,
    /// These, and where the receiver has something else than the index. The others are as the index has them.
    Only(BlockSet),
}

/// A page to scan.
#[derive(Debug)]
pub struct PageWork {
    /// Which.
    pub page: PageIndex,
    /// What the receiver has of it.
    pub held: HeldPage,
    /// How much of it to read.
    pub reading: Reading,
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
    /// Which pages.
    pub pages: Vec<PageWork>,
}

/// A page that was scanned; what differs is with the sender.
pub struct Scanned {
    /// Which volume.
    pub slot: VolumeSlot,
    /// Which page.
    pub page: PageIndex,
    /// What the draft holds now: it held it before, or it was sent.
    pub drafted: BlockSet,
    /// What was read and is not as the index had it.
    pub differed: BlockSet,
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
    /// How hard to compress.
    pub pace: Pace,
    /// How threads rank.
    pub load: Arc<Load>,
}

/// The other ends of the workers' queues.
pub struct Scanner {
    /// Pages go in here.
    pub jobs: mpsc::Sender<Job>,
    /// And come out here, in about the same order.
    pub scanned: mpsc::Receiver<Result<Vec<Scanned>, ScanError>>,
    shared: Arc<ScanShared>,
    _task: JoinSet<()>,
}

impl Scanner {
    /// Starts so many threads; pieces of records go to `records`. In a simulation it is a task.
    pub fn start(threads: usize, shared: Arc<ScanShared>, records: mpsc::Sender<Bytes>) -> std::io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(threads);
        let (done, scanned) = mpsc::channel(threads);
        let mut task = JoinSet::new();
        if is_simulated() {
            let own = shared.clone();
            task.spawn(async move { work_as_task(&mut queue, &done, &records, &own).await });
            return Ok(Self { jobs, scanned, shared, _task: task });
        }
        let queue = Arc::new(Mutex::new(queue));
        for n in 0..threads {
            let (queue, done, records, shared) = (queue.clone(), done.clone(), records.clone(), shared.clone());
            let thread = std::thread::Builder::new().name(format!("scan-{n}"));
            thread.spawn(move || work(&queue, &done, &records, &shared))?;
        }
        Ok(Self { jobs, scanned, shared, _task: task })
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
    }
}

fn work(
    queue: &Mutex<mpsc::Receiver<Job>>,
    done: &mpsc::Sender<Result<Vec<Scanned>, ScanError>>,
    records: &mpsc::Sender<Bytes>,
    shared: &ScanShared,
) {
    shared.load.rank_this_thread();
    let mut worker = match Worker::new() {
        Ok(worker) => worker,
        Err(e) => {
            let _ = done.blocking_send(Err(e));
            return;
        }
    };
    loop {
        let job = queue.blocking_lock().blocking_recv();
        let Some(Job { volume, pages }) = job else { return };
        let (began, mut waited) = (Instant::now(), Duration::ZERO);
        let mut hand_on = |piece| {
            let full = Instant::now();
            let sent = records.blocking_send(piece).map_err(|_| ScanError::Stopped);
            waited += full.elapsed();
            sent
        };
        let scan = |work| worker.scan(&volume, work, &mut hand_on, shared);
        let scanned = pages.into_iter().map(scan).collect();
        shared.pace.worked(began.elapsed().saturating_sub(waited), waited);
        if done.blocking_send(scanned).is_err() {
            return;
        }
    }
}

/// The same without a thread.
async fn work_as_task(
    queue: &mut mpsc::Receiver<Job>,
    done: &mpsc::Sender<Result<Vec<Scanned>, ScanError>>,
    records: &mpsc::Sender<Bytes>,
    shared: &ScanShared,
) {
    let mut worker = Worker::new().expect("a simulation has memory");
    while let Some(Job { volume, pages }) = queue.recv().await {
        let mut scanned = Vec::new();
        for work in pages {
            let mut pieces = Vec::new();
            let hand_on = &mut |piece| {
                pieces.push(piece);
                Ok(())
            };
            scanned.push(worker.scan(&volume, work, hand_on, shared));
            for piece in pieces {
                if records.send(piece).await.is_err() {
                    return;
                }
            }
        }
        if done.send(scanned.into_iter().collect()).await.is_err() {
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
    fn new() -> Result<Self, ScanError> {
        // The level is set with each page.
        let encoder = Encoder::new(1).map_err(ScanError::Compressor)?;
        Ok(Self { encoder, scanner: None, piece: Vec::with_capacity(PIECE * 2) })
    }

    fn scan(
        &mut self,
        volume: &ScanVolume,
        PageWork { page, held, reading }: PageWork,
        hand_on: &mut dyn FnMut(Bytes) -> Result<(), ScanError>,
        shared: &ScanShared,
    ) -> Result<Scanned, ScanError> {
        let before = volume.index.page(page)?;
        let (held, mut drafted) = match held {
            HeldPage::AsIndexed => (None, BlockSet::default()),
            HeldPage::Zero => (Some(vec![BlockDigest::ZERO; before.len()]), BlockSet::default()),
            HeldPage::Digests { digests, draft } => (Some(digests), draft),
        };
        let held = held.as_deref().unwrap_or(&before);
        let scanner = match &mut self.scanner {
            Some((slot, scanner)) if *slot == volume.slot => scanner,
            other => &mut other.insert((volume.slot, PageScanner::new(volume.geometry, volume.read_len))).1,
        };
        let (encoder, piece) = (&mut self.encoder, &mut self.piece);
        encoder.set_effort(shared.pace.effort()).map_err(ScanError::Compressor)?;
        let (mut records, mut bytes_read) = (0, 0);
        let mut digests = before.clone();
        for run in runs(&reading, held, &before) {
            bytes_read += scanner.scan_range::<ScanError>(
                &*volume.volume,
                volume.geometry,
                page,
                run,
                &mut digests,
                |block, digest, bytes| {
                    if digest.is_zero() || held[block.in_page()] == digest {
                        return if shared.stop.load(Ordering::Relaxed) { Err(ScanError::Stopped) } else { Ok(()) };
                    }
                    let capture = CaptureNumber(shared.capture.fetch_add(1, Ordering::Relaxed));
                    encoder.encode(volume.slot, block, capture, digest, bytes, piece);
                    drafted.insert(block.in_page());
                    records += 1;
                    if piece.len() >= PIECE { hand_on(full(piece)) } else { Ok(()) }
                },
            )?;
        }
        let zeroes = if planted(Mutant::ZeroesNotSent) { Vec::new() } else { zero_runs(held, &digests) };
        for (first, run) in zeroes {
            let capture = CaptureNumber(shared.capture.fetch_add(1, Ordering::Relaxed));
            let block = BlockIndex(page.first_block().0 + first as u64);
            encode_zeroes(volume.slot, block, run as u64, capture, piece);
            (first..first + run).for_each(|i| drafted.insert(i));
            records += 1;
        }
        if !piece.is_empty() {
            hand_on(full(piece))?;
        }
        volume.index.store(page, RangeDigest::of(&digests), &digests)?;
        let differed = differing(&before, &digests);
        Ok(Scanned { slot: volume.slot, page, drafted, differed, records, bytes_read })
    }
}

/// Neighbouring blocks that are to be read.
fn runs(reading: &Reading, held: &[BlockDigest], indexed: &[BlockDigest]) -> Vec<Range<usize>> {
    let Reading::Only(noted) = reading else { return std::iter::once(0..indexed.len()).collect() };
    let mut runs: Vec<Range<usize>> = Vec::new();
    for i in (0..indexed.len()).filter(|i| noted.contains(*i) || held[*i] != indexed[*i]) {
        match runs.last_mut() {
            Some(run) if run.end == i => run.end += 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// Takes the piece; the next one begins.
fn full(piece: &mut Vec<u8>) -> Bytes {
    Bytes::from(std::mem::replace(piece, Vec::with_capacity(PIECE * 2)))
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
    fn what_is_noted_is_read_and_what_the_receiver_has_otherwise() {
        let [a, b] = [BlockDigest([1; 32]), BlockDigest([2; 32])];
        let (indexed, mut held) = ([a; 8], [a; 8]);
        let noted = Reading::Only(BlockSet::from_words(&[0b1000_0110]));
        assert_eq!(runs(&noted, &held, &indexed), [1..3, 7..8]);
        held[3] = b;
        assert_eq!(runs(&noted, &held, &indexed), [1..4, 7..8]);
        assert!(runs(&Reading::Only(BlockSet::default()), &[a], &[a]).is_empty());
        assert_eq!(runs(&Reading::Everything, &held, &indexed).first(), Some(&(0..8)));
    }

    #[test]
    fn only_what_became_zero_is_sent_as_zeroes() {
        let [z, a] = [BlockDigest::ZERO, BlockDigest([1; 32])];
        assert_eq!(zero_runs(&[a, a, z, a, a], &[z, z, z, a, z]), [(0, 2), (4, 1)]);
    }
}
