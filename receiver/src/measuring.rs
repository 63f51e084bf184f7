//! Measuring the path of an agent: what comes on its block streams is counted and thrown away. Nothing of a group is
//! read or written, and nobody is the writer for it.
//!
//! Read first: [`Measuring::begin`]. Bounded in bytes and time, whatever the agent does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use backhaul_protocol::limits::{MAX_PROBE_BYTES, MAX_PROBE_SECONDS};
use backhaul_protocol::wire::message::{Probed, Reason, Refusal};
use backhaul_transport::link::ReceiveHalf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Paths that are measured at once: two at a time would measure each other.
pub const AT_ONCE: usize = 1;
/// Read at once. Arbitrary.
const PIECE: usize = 256 << 10;

/// A path that is measured.
#[derive(Debug)]
pub struct Measuring {
    counted: Arc<Counted>,
    /// Given back when its time is over, though the session goes on.
    turn: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
struct Counted {
    since: Instant,
    bytes: AtomicU64,
}

impl Counted {
    fn left(&self) -> u64 {
        let is_over = self.since.elapsed() >= Duration::from_secs(MAX_PROBE_SECONDS);
        if is_over { 0 } else { MAX_PROBE_BYTES.saturating_sub(self.bytes.load(Ordering::Relaxed)) }
    }
}

impl Measuring {
    /// From now on, if nobody else measures.
    pub fn begin(turns: &Arc<Semaphore>) -> Result<Self, Refusal> {
        let turn = turns.clone().try_acquire_owned().map_err(|_| Refusal {
            reason: Reason::Busy,
            text: "the path of another agent is being measured, for some seconds: come again".into(),
        })?;
        let counted = Arc::new(Counted { since: Instant::now(), bytes: AtomicU64::new(0) });
        Ok(Self { counted, turn: Some(turn) })
    }

    /// How much came so far.
    pub fn probed(&self) -> Probed {
        let Counted { since, bytes } = &*self.counted;
        let micros = since.elapsed().as_micros() as u64;
        Probed { bytes: bytes.load(Ordering::Relaxed), micros, left: self.counted.left() }
    }

    /// Reads a stream to its end, or until enough was read of all.
    pub fn count(&self, mut stream: Box<dyn ReceiveHalf>) -> impl Future<Output = ()> + use<> {
        let counted = self.counted.clone();
        async move {
            while counted.left() > 0 {
                let Ok(Some(bytes)) = stream.read(PIECE).await else { return };
                counted.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            stream.stop();
        }
    }

    /// To be called now and then: whoever goes on after its time does not keep others from measuring.
    pub fn end_in_time(&mut self) {
        if self.counted.left() == 0 {
            self.turn = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use backhaul_transport::error::TransportError;
    use bytes::Bytes;
    use std::sync::atomic::AtomicBool;

    /// Junk without end.
    struct Junk(Arc<AtomicBool>);

    #[async_trait]
    impl ReceiveHalf for Junk {
        async fn read(&mut self, most: usize) -> Result<Option<Bytes>, TransportError> {
            tokio::task::yield_now().await;
            Ok(Some(Bytes::from_static(&[7; PIECE]).slice(..most)))
        }
        fn stop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn only_so_much_is_taken_of_whom_whose_turn_it_is() {
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let mut first = Measuring::begin(&turns).expect("nobody else");
        assert_eq!(Measuring::begin(&turns).expect_err("one at a time").reason, Reason::Busy);
        assert_eq!((first.probed().bytes, first.probed().left), (0, MAX_PROBE_BYTES));
        let stopped = Arc::new(AtomicBool::new(false));
        first.count(Box::new(Junk(stopped.clone()))).await;
        assert!(stopped.load(Ordering::Relaxed), "the sender is told");
        let probed = first.probed();
        assert!(probed.bytes >= MAX_PROBE_BYTES && probed.bytes < MAX_PROBE_BYTES + PIECE as u64, "{probed:?}");
        assert_eq!(probed.left, 0);
        first.end_in_time();
        let mut second = Measuring::begin(&turns).expect("the first one is over");
        second.end_in_time();
        assert!(Measuring::begin(&turns).is_err(), "it is still its turn");
        let since = Instant::now() - Duration::from_secs(MAX_PROBE_SECONDS);
        second.counted = Arc::new(Counted { since, bytes: AtomicU64::new(0) });
        assert_eq!(second.probed().left, 0, "time is bounded too");
        second.end_in_time();
        drop(Measuring::begin(&turns).expect("the second one is over"));
        assert!(Measuring::begin(&turns).is_ok(), "given back");
    }
}
