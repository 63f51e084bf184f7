//! Fetches ranges of records, several at once, opens and hashes them on blocking threads, and has them written: for a
//! restore, and without writing for `verify`.
//!
//! Read first: [`Fetcher::start`]. What it holds is bounded: a read takes a slot before it begins and gives it back
//! when its last block is written.

use std::sync::{Arc, Mutex, PoisonError};

use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::record::{RecordError, Verifier};
use backhaul_protocol::store::key::{GroupKeys, ObjectKey};
use backhaul_seams::threads;
use backhaul_volume::rebuild::BlockWriter;
use backhaul_volume::target::{Durability, Target, TargetError};
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::plan::reads::{Read, Wanted, record_in};
use crate::read_error::ReadError;
use crate::store::{Kind, ObjectStore};

/// Reads from the store under way at once. One stream of S3 brings about 100 MB/s, and 8 of them more than two cores
/// unpack; of a folder two would do.
const READS: usize = 8;

/// How fetching fails as a whole; a damaged record is no failure but [`Fetched::lost`].
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The store can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The target can't be written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// No memory for a decompressor.
    #[error("can't set up a decompressor")]
    Setup(#[source] std::io::Error),
}

impl FetchError {
    /// Whether the same restore may go better later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Read(e) => e.is_retryable(),
            Self::Target(e) => e.is_retryable(),
            Self::Setup(_) => true,
        }
    }
}

/// What becomes of verified blocks.
#[derive(Clone, Debug)]
pub enum Purpose {
    /// They are written to a target that is finished like this.
    Write(Arc<Target>, Durability),
    /// They were good, and that is all.
    Check,
}

/// A block whose record can't be had.
#[derive(Clone, Debug)]
pub struct LostBlock {
    /// Which block.
    pub block: BlockIndex,
    /// Which object holds its record.
    pub object: ObjectKey,
    /// What is wrong.
    pub cause: String,
}

/// What came of one read, or of several.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Bytes of block records that were fetched.
    pub fetched: u64,
    /// Plain bytes of the blocks that were good, and were written.
    pub good: u64,
    /// Blocks that were not.
    pub lost: Vec<LostBlock>,
}

impl Fetched {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        self.fetched += other.fetched;
        self.good += other.good;
        self.lost.extend(other.lost);
    }
}

/// What a thread needs to open records; kept, since a decompressor costs more than what it does to a few blocks.
struct Bench {
    verifier: Verifier,
    writer: Option<BlockWriter>,
}

/// Fetches the records of one volume.
pub struct Fetcher {
    shared: Arc<Shared>,
    slots: Arc<Semaphore>,
    jobs: JoinSet<Result<Fetched, FetchError>>,
}

struct Shared {
    store: Arc<dyn ObjectStore>,
    keys: GroupKeys,
    geometry: Geometry,
    purpose: Purpose,
    threads: Arc<Semaphore>,
    benches: Mutex<Vec<Bench>>,
}

impl Fetcher {
    /// `threads` is shared with whatever else works on blocking threads.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        keys: GroupKeys,
        geometry: Geometry,
        purpose: Purpose,
        threads: Arc<Semaphore>,
    ) -> Self {
        let slots = Arc::new(Semaphore::new(READS + threads.available_permits()));
        let shared = Shared { store, keys, geometry, purpose, threads, benches: Mutex::default() };
        Self { shared: Arc::new(shared), slots, jobs: JoinSet::new() }
    }

    /// Begins a read; waits while enough are under way.
    pub async fn start(&mut self, read: Read) {
        let slot = self.slots.clone().acquire_owned().await.expect("never closed");
        let shared = self.shared.clone();
        self.jobs.spawn(async move {
            let fetched = shared.run(read).await;
            drop(slot);
            fetched
        });
    }

    /// A read that is done already, if there is one.
    pub fn try_next(&mut self) -> Option<Result<Fetched, FetchError>> {
        self.jobs.try_join_next().map(|joined| joined.expect("fetching does not panic"))
    }

    /// The next read to be done; `None` if none is under way.
    pub async fn next(&mut self) -> Option<Result<Fetched, FetchError>> {
        self.jobs.join_next().await.map(|joined| joined.expect("fetching does not panic"))
    }
}

impl Shared {
    async fn run(self: Arc<Self>, read: Read) -> Result<Fetched, FetchError> {
        let key = self.keys.segment(read.object);
        match self.store.get_range(&key, read.range.clone()).await {
            Ok(bytes) => self.open(read, bytes).await,
            // A truncated object still has the records before its end.
            Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unreadable) && read.records.len() > 1 => {
                self.one_by_one(read).await
            }
            Err(e) if ReadError::from(e.clone()).is_damage() => {
                let cause = e.to_string();
                let lost = |w: &Wanted| LostBlock { block: w.block, object: key.clone(), cause: cause.clone() };
                Ok(Fetched { lost: read.records.iter().map(lost).collect(), ..Fetched::default() })
            }
            Err(e) => Err(ReadError::from(e).into()),
        }
    }

    async fn one_by_one(self: Arc<Self>, read: Read) -> Result<Fetched, FetchError> {
        let mut sum = Fetched::default();
        for wanted in read.records {
            let range = u64::from(wanted.location.offset)..wanted.location.end();
            let single = Read { object: read.object, range, records: vec![wanted] };
            sum.add(Box::pin(self.clone().run(single)).await?);
        }
        Ok(sum)
    }

    async fn open(self: Arc<Self>, mut read: Read, bytes: Bytes) -> Result<Fetched, FetchError> {
        let _thread = self.threads.clone().acquire_owned().await.expect("never closed");
        let this = self.clone();
        let work = move || {
            // In the order of the volume, so that neighbours are written together.
            read.records.sort_unstable_by_key(|w| w.block);
            let mut bench = this.bench()?;
            let fetched = this.open_all(&mut bench, &read, &bytes);
            if fetched.is_ok() {
                this.benches.lock().unwrap_or_else(PoisonError::into_inner).push(bench);
            }
            fetched
        };
        threads::blocking(work).await
    }

    fn bench(&self) -> Result<Bench, FetchError> {
        if let Some(bench) = self.benches.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(bench);
        }
        let writer = match &self.purpose {
            Purpose::Write(target, durability) => Some(BlockWriter::new(target, self.geometry, *durability)),
            Purpose::Check => None,
        };
        Ok(Bench { verifier: Verifier::new().map_err(FetchError::Setup)?, writer })
    }

    fn open_all(&self, bench: &mut Bench, read: &Read, bytes: &[u8]) -> Result<Fetched, FetchError> {
        let mut sum = Fetched { fetched: bytes.len() as u64, ..Fetched::default() };
        for wanted in &read.records {
            match self.open_one(bench, read, bytes, wanted)? {
                Ok(good) => sum.good += good,
                Err(cause) => {
                    let (start, end) = (wanted.location.offset, wanted.location.end());
                    let cause = format!("bytes {start} to {end} of the object: {cause}");
                    sum.lost.push(LostBlock { block: wanted.block, object: self.keys.segment(read.object), cause });
                }
            }
        }
        if let (Purpose::Write(target, _), Some(writer)) = (&self.purpose, &mut bench.writer) {
            writer.flush(target)?;
        }
        Ok(sum)
    }

    /// The inner result is about the record, the outer about everything else.
    fn open_one(
        &self,
        bench: &mut Bench,
        read: &Read,
        bytes: &[u8],
        wanted: &Wanted,
    ) -> Result<Result<u64, RecordError>, TargetError> {
        let verified = record_in(read, bytes, wanted)
            .and_then(|(header, payload, _)| bench.verifier.verify(&header, payload, self.geometry));
        match verified {
            Ok(block) => {
                if let (Purpose::Write(target, _), Some(writer)) = (&self.purpose, &mut bench.writer) {
                    writer.push(target, &block)?;
                }
                Ok(Ok(block.bytes().len() as u64))
            }
            Err(cause) => Ok(Err(cause)),
        }
    }
}
