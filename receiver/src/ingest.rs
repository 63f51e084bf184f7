//! Takes block streams: verifies every record and hands it to the segment writer.
//!
//! Read first: [`Ingest::run_stream`]. Decompressing and hashing happen on blocking threads, never on the endpoint's.

use std::sync::Arc;

use backhaul_protocol::record::{HEADER_LEN, RecordBody, RecordError, RecordHeader, Verifier, split_record};
use backhaul_protocol::session::sink::Admission;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::{random, threads};
use backhaul_transport::blocks::{BlockStreamError, RecordReader};
use backhaul_transport::link::ReceiveHalf;
use tokio::sync::{Semaphore, watch};

use crate::segment_writer::SegmentWriter;

/// Batches of one round that are verified, or wait for room, at the same time: one for each of two cores and one that is
/// handed on. Where the store takes nothing, this many of every session are in memory beside the budget.
const TURNS: usize = 3;

/// One round's records.
#[derive(Debug)]
pub struct Ingest {
    admission: Admission,
    writer: Arc<SegmentWriter>,
    /// Threads that may verify at once, of all sessions.
    verifiers: Arc<Semaphore>,
    /// Streams of this round that may have a batch in their hands.
    turns: Semaphore,
    progress: watch::Sender<Progress>,
}

/// How far a round's records have come.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Records that are with the segment writer.
    pub records: u64,
    /// The first failure of any stream.
    pub failed: Option<String>,
}

impl Ingest {
    /// For one round.
    pub fn new(admission: Admission, writer: Arc<SegmentWriter>, verifiers: Arc<Semaphore>) -> Arc<Self> {
        let progress = watch::Sender::new(Progress::default());
        Arc::new(Self { admission, writer, verifiers, turns: Semaphore::new(TURNS), progress })
    }

    /// Where the records go.
    pub fn writer(&self) -> &Arc<SegmentWriter> {
        &self.writer
    }
    /// To wait for records.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Takes one stream to its end.
    pub async fn run_stream(self: Arc<Self>, stream: Box<dyn ReceiveHalf>) {
        if let Err(error) = self.take_stream(RecordReader::new(stream)).await {
            self.progress.send_modify(|p| {
                p.failed.get_or_insert(error.to_string());
            });
        }
    }

    async fn take_stream(&self, mut reader: RecordReader) -> Result<(), BlockStreamError> {
        // One verifier stays with the stream: a new decompressor per batch would cost more than the batch.
        let mut verifier = Some(Verifier::new().map_err(|_| BlockStreamError::Cut)?);
        while reader.has_record(|header| self.admission.check(header).map(drop)).await? {
            // Until here a stream holds one record at most, and that is all that those hold which wait for a turn.
            let turn = self.turns.acquire().await.expect("never closed");
            let Some(batch) = reader.next_batch().await? else { break };
            let permit = self.verifiers.clone().acquire_owned().await.expect("never closed");
            let admission = self.admission.clone();
            let mut own = verifier.take().expect("put back below");
            let (batch, records, own) = threads::blocking(move || {
                let records = verify_batch(&admission, &mut own, &batch);
                (batch, records, own)
            })
            .await;
            drop(permit);
            verifier = Some(own);
            let records = records?;
            let lost = planted(Mutant::DigestsNotCompared) && random::number().is_multiple_of(8);
            if !lost {
                self.writer.push(&batch, &records).await;
            }
            drop(turn);
            self.progress.send_modify(|p| p.records += records.len() as u64);
        }
        Ok(())
    }
}

/// Checks and hashes every record of a batch: headers and where they begin.
fn verify_batch(
    admission: &Admission,
    verifier: &mut Verifier,
    batch: &[u8],
) -> Result<Vec<(RecordHeader, usize)>, RecordError> {
    let mut records = Vec::with_capacity(batch.len() / 4096);
    let mut at = 0;
    while at < batch.len() {
        let split = split_record(&batch[at..])?.ok_or(RecordError::Bounds("length"))?;
        let geometry = admission.check(&split.header)?;
        if let RecordBody::Data { .. } = split.header.body {
            verifier.verify(&split.header, split.payload, geometry)?;
        }
        records.push((split.header, at));
        at += HEADER_LEN + split.payload.len();
    }
    Ok(records)
}
