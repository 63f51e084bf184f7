//! Turns verified records into stored segments, within the memory budget of the process.
//!
//! Read first: [`SegmentWriter::push`], then [`Budget`]. A segment is sealed by size, by number of records, when the
//! round ends, or when somebody else needs the memory.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use backhaul_protocol::limits::MAX_SEGMENT_RECORDS;
use backhaul_protocol::record::{HEADER_LEN, RecordHeader};
use backhaul_protocol::store::key::GroupKeys;
use backhaul_protocol::store::segment::{DraftBinding, INDEX_ROW_LEN, SegmentBuilder, SegmentRef, VolumeEntry};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::threads;
use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::object_ids::IdSource;
use crate::store::{Kind, ObjectStore, StoreError};

/// The budget counts in pieces of this many bytes.
const PIECE: usize = 64 << 10;
/// Segments of one session that are on their way to the store at once: one is sealed while another is written.
const UPLOADS: usize = 2;

/// Buffers of segments that are used again, of all rounds: fresh pages cost a tenth of what a receiver does in a first
/// sync. They are beside the budget while nothing is in them.
const SPARE: usize = 3;

/// One session's share of the budget for indexes that it has not collected: one in so many. Arbitrary.
const UNCOLLECTED_SHARE: usize = 8;

/// Memory of all open segments and all uploads of the process.
#[derive(Debug)]
pub struct Budget {
    pieces: Arc<Semaphore>,
    total: usize,
    writers: Mutex<Vec<Weak<SegmentWriter>>>,
    spare: Arc<Semaphore>,
    ingested: AtomicU64,
}

/// Memory of a segment. Used memory has a place among those that are kept.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    place: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// So many bytes.
    pub fn new(bytes: usize) -> Arc<Self> {
        let total = (bytes / PIECE).max(1);
        let pieces = Arc::new(Semaphore::new(total));
        let (writers, spare) = (Mutex::default(), Arc::new(Semaphore::new(SPARE)));
        Arc::new(Self { pieces, total, writers, spare, ingested: AtomicU64::new(0) })
    }

    /// Bytes that are in use.
    pub fn taken(&self) -> usize {
        (self.total - self.pieces.available_permits()) * PIECE
    }

    /// Bytes of verified records that were taken so far.
    pub fn ingested(&self) -> u64 {
        self.ingested.load(Ordering::Relaxed)
    }

    /// Waits for so many bytes. Who has to wait makes the largest open segment of any session go to the store.
    async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let pieces = bytes.div_ceil(PIECE).clamp(1, self.total) as u32;
        if let Ok(permit) = self.pieces.clone().try_acquire_many_owned(pieces) {
            return permit;
        }
        let wait = self.pieces.clone().acquire_many_owned(pieces);
        let mut wait = std::pin::pin!(wait);
        loop {
            let largest = lock(&self.writers).iter().filter_map(Weak::upgrade).max_by_key(|w| w.open_size());
            if let Some(writer) = largest {
                writer.seal_open();
            }
            // Others may open segments while this one waits: look again now and then.
            let nap = tokio::time::Duration::from_millis(50);
            if let Ok(permit) = tokio::time::timeout(nap, wait.as_mut()).await {
                return permit.expect("the budget is never closed");
            }
        }
    }

    fn enroll(&self, writer: &Arc<SegmentWriter>) {
        let mut writers = lock(&self.writers);
        writers.retain(|w| w.strong_count() > 0);
        writers.push(Arc::downgrade(writer));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pieces(permit: Option<&OwnedSemaphorePermit>) -> usize {
    permit.map_or(0, OwnedSemaphorePermit::num_permits)
}

/// A stored segment.
pub type Stored = (SegmentRef, Vec<VolumeEntry>);

/// A stored segment that the draft has not taken yet.
struct Uploaded {
    stored: Stored,
    charged: Option<OwnedSemaphorePermit>,
}

#[derive(Default)]
struct OpenSegment {
    builder: Option<SegmentBuilder>,
    /// As many pieces as the builder needs, and while records are added at most one more.
    permit: Option<OwnedSemaphorePermit>,
    /// The place of its memory, if that was used before.
    place: Option<OwnedSemaphorePermit>,
}

impl OpenSegment {
    /// Adds to what is charged.
    fn charge(&mut self, permit: Option<OwnedSemaphorePermit>) {
        match (&mut self.permit, permit) {
            (Some(own), Some(more)) => own.merge(more),
            (none @ None, more) => *none = more,
            (Some(_), None) => {}
        }
    }

    /// Gives back what is charged beyond `bytes`. Every batch is charged in whole pieces: without this, a peer that sends
    /// record by record would take up 64 KiB of everybody's memory with 64 bytes.
    fn settle(&mut self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let permit = self.permit.as_mut()?;
        permit.split(permit.num_permits().saturating_sub(bytes.div_ceil(PIECE)))
    }

    fn size(&self) -> usize {
        self.builder.as_ref().map_or(0, SegmentBuilder::size)
    }
}

/// Collects records of one round and stores them as segments.
pub struct SegmentWriter {
    store: Arc<dyn ObjectStore>,
    keys: GroupKeys,
    binding: DraftBinding,
    ids: Arc<Mutex<IdSource>>,
    segment_size: usize,
    budget: Arc<Budget>,
    open: Mutex<OpenSegment>,
    slots: Arc<Semaphore>,
    spare: Mutex<Vec<Buffer>>,
    uploads: Mutex<JoinSet<Result<Uploaded, StoreError>>>,
    finished: AsyncMutex<()>,
    /// Pieces that indexes take which nobody collected yet, and who is told when some are.
    uncollected: AtomicUsize,
    collected: Notify,
}

impl std::fmt::Debug for SegmentWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentWriter").field("open", &self.open_size()).finish_non_exhaustive()
    }
}

/// What is left when a round ends.
pub struct Finished {
    /// Segments that were stored.
    pub stored: Vec<Stored>,
    /// The rest, if it is small enough to lie inside the log record.
    pub inline: Option<SegmentBuilder>,
}

/// Whether a small rest may lie inside the log record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rest {
    /// Up to so many bytes of records and their index.
    Inline(usize),
    /// Everything becomes a segment.
    Segment,
}

impl SegmentWriter {
    /// For one round.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        keys: GroupKeys,
        binding: DraftBinding,
        ids: Arc<Mutex<IdSource>>,
        segment_size: usize,
        budget: Arc<Budget>,
    ) -> Arc<Self> {
        let writer = Arc::new(Self {
            store,
            keys,
            binding,
            ids,
            segment_size,
            budget: budget.clone(),
            open: Mutex::default(),
            slots: Arc::new(Semaphore::new(UPLOADS)),
            spare: Mutex::default(),
            uploads: Mutex::default(),
            finished: AsyncMutex::new(()),
            uncollected: AtomicUsize::new(0),
            collected: Notify::new(),
        });
        budget.enroll(&writer);
        writer
    }

    fn open_size(&self) -> usize {
        lock(&self.open).size()
    }

    /// Adds verified records. Waits while the budget is used up or two segments are on their way already, which is what
    /// slows the agent down.
    pub async fn push(self: &Arc<Self>, batch: &[u8], records: &[(RecordHeader, usize)]) {
        self.budget.ingested.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.wait_for_collection().await;
        // A piece more: where the batch spreads over two segments, both are charged in whole pieces.
        let need = batch.len() + records.len() * INDEX_ROW_LEN + PIECE;
        let permit = self.budget.take(need).await;
        // Wait for a free upload first: an open segment then never grows past its size while it waits.
        let slot = self.slots.clone().acquire_owned().await.expect("slots are never closed");
        let mut full = Vec::new();
        {
            let mut open = lock(&self.open);
            open.charge(Some(permit));
            for (header, at) in records {
                let payload = &batch[at + HEADER_LEN..at + HEADER_LEN + header.payload_len()];
                let needs = HEADER_LEN + payload.len() + INDEX_ROW_LEN;
                let no_room = open.builder.as_ref().is_some_and(|b| {
                    b.size() + needs > self.segment_size || b.records() >= MAX_SEGMENT_RECORDS as usize
                });
                if no_room {
                    let mut whole = std::mem::take(&mut *open);
                    let rest = whole.settle(whole.size());
                    open.charge(rest);
                    full.push(whole);
                }
                if open.builder.is_none() {
                    let Buffer { bytes, place } = self.buffer();
                    (open.builder, open.place) = (Some(SegmentBuilder::in_buffer(bytes)), place);
                }
                open.builder.as_mut().expect("just begun").push(header, payload);
            }
            let size = open.size();
            drop(open.settle(size));
        }
        drop(slot);
        for segment in full {
            self.upload(segment);
        }
    }

    /// Memory for a segment, used or new.
    fn buffer(&self) -> Buffer {
        let new = || Buffer { bytes: Vec::with_capacity(self.segment_size), place: None };
        lock(&self.spare).pop().unwrap_or_else(new)
    }

    /// Keeps the memory of a segment that was stored, if nobody else has it any more and there is a place.
    fn keep(&self, stored: Bytes, place: Option<OwnedSemaphorePermit>) {
        let place = place.or_else(|| self.budget.spare.clone().try_acquire_owned().ok());
        if let (Some(_), Ok(bytes)) = (&place, stored.try_into_mut()) {
            lock(&self.spare).push(Buffer { bytes: bytes.into(), place });
        }
    }

    /// Waits while the indexes of stored segments that nobody collects take their share of the budget: a session that does
    /// not collect stalls itself and nobody else.
    async fn wait_for_collection(&self) {
        loop {
            let collected = self.collected.notified();
            if self.uncollected.load(Ordering::Acquire) <= self.budget.total / UNCOLLECTED_SHARE {
                return;
            }
            collected.await;
        }
    }

    /// Sends the open segment to the store although it is not full.
    pub fn seal_open(self: &Arc<Self>) {
        let open = std::mem::take(&mut *lock(&self.open));
        self.upload(open);
    }

    fn upload(self: &Arc<Self>, mut segment: OpenSegment) {
        let Some(builder) = segment.builder.take() else { return };
        let this = self.clone();
        let id = lock(&self.ids).take();
        lock(&self.uploads).spawn(async move {
            let _slot = this.slots.clone().acquire_owned().await.expect("slots are never closed");
            let binding = this.binding;
            let sealed = threads::blocking(move || builder.seal(binding, id)).await;
            let key = this.keys.segment(id);
            let bytes = Bytes::from(sealed.bytes);
            let mut result = this.store.put_new(&key, bytes.clone()).await;
            this.keep(bytes, segment.place.take());
            if planted(Mutant::SegmentFailureIgnored) {
                result = Ok(());
            }
            // The index stays in memory until the draft takes it.
            let mut segment = OpenSegment { builder: None, permit: segment.permit, place: None };
            drop(segment.settle(sealed.index.len() * size_of::<VolumeEntry>()));
            match result {
                Ok(()) => {
                    let charged = segment.permit;
                    this.uncollected.fetch_add(pieces(charged.as_ref()), Ordering::AcqRel);
                    Ok(Uploaded { stored: (sealed.reference, sealed.index), charged })
                }
                // A random session tag that was used before on this base: nobody else's records are touched.
                Err(e) if e.kind() == Kind::Exists => Err(e.retryable(true)),
                Err(e) => Err(e),
            }
        });
    }

    /// What has been stored since the last call; the first failure if there is one.
    pub async fn collect(&self) -> Result<Vec<Stored>, StoreError> {
        let _one_at_a_time = self.finished.lock().await;
        let mut done = Vec::new();
        while let Some(joined) = { lock(&self.uploads).try_join_next() } {
            done.push(self.take(joined.expect("uploads do not panic")?));
        }
        Ok(done)
    }

    fn take(&self, uploaded: Uploaded) -> Stored {
        self.uncollected.fetch_sub(pieces(uploaded.charged.as_ref()), Ordering::AcqRel);
        self.collected.notify_waiters();
        if planted(Mutant::MemoryKept) {
            std::mem::forget(uploaded.charged);
        }
        uploaded.stored
    }

    /// Ends the round: waits until everything is stored.
    pub async fn finish(self: &Arc<Self>, rest: Rest) -> Result<Finished, StoreError> {
        let _one_at_a_time = self.finished.lock().await;
        let open = std::mem::take(&mut *lock(&self.open));
        let fits = |b: &SegmentBuilder| matches!(rest, Rest::Inline(max) if b.size() <= max);
        let inline = if open.builder.as_ref().is_some_and(fits) {
            open.builder
        } else {
            self.upload(open);
            None
        };
        let mut uploads = std::mem::take(&mut *lock(&self.uploads));
        let mut stored = Vec::new();
        while let Some(joined) = uploads.join_next().await {
            stored.push(self.take(joined.expect("uploads do not panic")?));
        }
        Ok(Finished { stored, inline })
    }
}

#[cfg(test)]
mod tests {
    use backhaul_protocol::geometry::BlockIndex;
    use backhaul_protocol::ids::{CaptureNumber, CommitId, Generation, GroupId, LogSeq, VolumeSlot};
    use backhaul_protocol::record::{encode_zeroes, split_record};

    use super::*;
    use crate::store::mem::MemStore;

    fn writer(budget: &Arc<Budget>, session: u32) -> Arc<SegmentWriter> {
        let group = GroupId([1; 16]);
        let ids = Arc::new(Mutex::new(IdSource::new(LogSeq(0), Generation(1), session)));
        let binding = DraftBinding { group, base_commit: CommitId([2; 16]) };
        SegmentWriter::new(Arc::new(MemStore::new()), GroupKeys(group), binding, ids, 4 << 20, budget.clone())
    }

    async fn push_one(writer: &Arc<SegmentWriter>, block: u64) {
        let mut record = Vec::new();
        encode_zeroes(VolumeSlot(0), BlockIndex(block), 1, CaptureNumber(block), &mut record);
        let header = split_record(&record).expect("own").expect("whole").header;
        writer.push(&record, &[(header, 0)]).await;
    }

    fn used(budget: &Budget) -> usize {
        budget.total - budget.pieces.available_permits()
    }

    #[tokio::test]
    async fn tiny_records_are_charged_what_they_take() {
        let budget = Budget::new(16 << 20);
        let writer = writer(&budget, 1);
        for i in 0..6000 {
            push_one(&writer, i).await;
            assert!(used(&budget) * PIECE <= writer.open_size() + 2 * PIECE, "{} pieces after {i}", used(&budget));
        }
        // Whatever was sealed and not collected is charged for its index.
        writer.seal_open();
        let mut stored = Vec::new();
        while stored.is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            let held = used(&budget) * PIECE;
            if held < 900_000 {
                assert!(held >= 6000 * size_of::<VolumeEntry>(), "an index that nobody took counts: {held}");
            }
            stored = writer.collect().await.expect("stored");
        }
        assert_eq!(used(&budget), 0, "everything is given back");
    }

    #[tokio::test]
    async fn segments_that_fill_up_are_charged_whole_and_given_back() {
        let budget = Budget::new(16 << 20);
        let writer = writer(&budget, 1);
        for i in 0..20_000 {
            push_one(&writer, i).await;
        }
        let finished = writer.finish(Rest::Segment).await.expect("stored");
        assert_eq!(finished.stored.iter().map(|(_, index)| index.len()).sum::<usize>(), 20_000);
        assert_eq!(used(&budget), 0);
    }

    #[tokio::test]
    async fn a_peer_that_trickles_does_not_keep_others_from_their_work() {
        let budget = Budget::new(2 << 20);
        let (hog, other) = (writer(&budget, 1), writer(&budget, 2));
        for i in 0..1000 {
            push_one(&hog, i).await;
        }
        let began = std::time::Instant::now();
        for i in 0..1000 {
            push_one(&other, i).await;
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(hog.open_size() > 0 && other.open_size() > 0, "nobody had to give way");
    }

    #[tokio::test]
    async fn who_does_not_collect_stalls_itself_and_nobody_else() {
        let budget = Budget::new(2 << 20);
        let (hog, other) = (writer(&budget, 1), writer(&budget, 2));
        let stalled = tokio::time::timeout(std::time::Duration::from_secs(20), async {
            for i in 0.. {
                push_one(&hog, i).await;
                if i % 50 == 0 {
                    hog.seal_open();
                }
            }
        });
        let mut stalled = std::pin::pin!(stalled);
        tokio::select! {
            _ = &mut stalled => {}
            () = tokio::time::sleep(std::time::Duration::from_secs(2)) => {}
        }
        assert!(used(&budget) <= budget.total / 2, "{} of {} pieces", used(&budget), budget.total);
        let work = async {
            for i in 0..1000 {
                push_one(&other, i).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(5), work).await.expect("it has the rest of the budget");
        assert!(!hog.collect().await.expect("stored").is_empty());
    }
}
