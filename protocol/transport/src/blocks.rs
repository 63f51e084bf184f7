//! Block streams: unidirectional streams that carry block records back to back.
//!
//! Read first: [`RecordReader`]. Writing is [`crate::link::SendHalf::write`] of whole records.

use backhaul_protocol::limits::MAX_BLOCK_SIZE;
use backhaul_protocol::record::{HEADER_LEN, RecordError, RecordHeader, split_record};

use crate::error::TransportError;
use crate::link::ReceiveHalf;

/// A batch is handed on at this many bytes: large enough that handing on costs nothing, small enough that several
/// streams at once stay far below the memory budget. Arbitrary.
pub const BATCH: usize = 256 << 10;

/// Read at once while a record is not whole. Arbitrary.
const PIECE: usize = 16 << 10;

/// How reading records fails.
#[derive(Debug, thiserror::Error)]
pub enum BlockStreamError {
    /// The connection broke.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The bytes are no records.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The stream ended in the middle of a record.
    #[error("a block stream ended in the middle of a record")]
    Cut,
}

/// Collects whole records from a stream.
pub struct RecordReader {
    stream: Box<dyn ReceiveHalf>,
    pending: Vec<u8>,
}

impl RecordReader {
    /// From a stream's first byte.
    pub fn new(stream: Box<dyn ReceiveHalf>) -> Self {
        Self { stream, pending: Vec::new() }
    }

    /// Waits for one whole record, and takes no more than it and what comes in one piece with its end; false at the end
    /// of the stream. Then [`Self::next_batch`] does not wait. A header that is not admitted is not waited for.
    pub async fn has_record(
        &mut self,
        admit: impl Fn(&RecordHeader) -> Result<(), RecordError>,
    ) -> Result<bool, BlockStreamError> {
        loop {
            if let Some(header) = self.pending.first_chunk::<HEADER_LEN>() {
                admit(&RecordHeader::parse(header)?)?;
            }
            if split_record(&self.pending)?.is_some() {
                return Ok(true);
            }
            match self.stream.read(PIECE).await? {
                Some(bytes) => self.pending.extend_from_slice(&bytes),
                None if self.pending.is_empty() => return Ok(false),
                None => return Err(BlockStreamError::Cut),
            }
        }
    }

    /// At least one whole record, and about [`BATCH`] bytes of them when they come fast; `None` at the end. Headers
    /// are checked for form only: a length that is out of bounds never makes this wait or allocate.
    pub async fn next_batch(&mut self) -> Result<Option<Vec<u8>>, BlockStreamError> {
        let mut whole = 0;
        loop {
            while let Some(split) = split_record(&self.pending[whole..])? {
                whole = self.pending.len() - split.rest.len();
            }
            if whole >= BATCH {
                return Ok(Some(self.take(whole)));
            }
            // What has arrived is taken without waiting; only an empty hand waits.
            let chunk = if whole > 0 {
                match poll_once(self.stream.read(BATCH)).await {
                    Some(chunk) => chunk,
                    None => return Ok(Some(self.take(whole))),
                }
            } else {
                self.stream.read(BATCH).await
            };
            match chunk? {
                Some(bytes) => self.pending.extend_from_slice(&bytes),
                None if whole > 0 => return Ok(Some(self.take(whole))),
                None if self.pending.is_empty() => return Ok(None),
                None => return Err(BlockStreamError::Cut),
            }
            debug_assert!(self.pending.len() <= 2 * BATCH + HEADER_LEN + MAX_BLOCK_SIZE as usize);
        }
    }

    fn take(&mut self, whole: usize) -> Vec<u8> {
        let mut next = Vec::with_capacity(BATCH + BATCH / 4);
        next.extend_from_slice(&self.pending[whole..]);
        let mut batch = std::mem::replace(&mut self.pending, next);
        batch.truncate(whole);
        batch
    }
}

/// Polls a future once.
async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match future.as_mut().poll(cx) {
            std::task::Poll::Ready(out) => Some(out),
            std::task::Poll::Pending => None,
        })
    })
    .await
}
