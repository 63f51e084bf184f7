//! Block streams: several, so that one lost packet does not stop all, and each with an ordinary window.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use backhaul_transport::error::TransportError;
use backhaul_transport::link::Link;
use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use super::load::Load;

/// Streams of one round. Windows of 1 MiB each then fill the connection's 8 MiB.
const STREAMS: usize = 8;
/// Pieces that wait for a stream.
const QUEUE: usize = 8;

/// Sends pieces of records.
pub struct Sender {
    /// Pieces go in here; each holds whole records.
    pub pieces: mpsc::Sender<Bytes>,
    streams: JoinSet<Result<(), TransportError>>,
    bytes: Arc<AtomicU64>,
}

impl Sender {
    /// Streams are opened when there is something to send.
    pub fn start(link: &Arc<dyn Link>, load: &Arc<Load>) -> Self {
        let (pieces, queue) = mpsc::channel::<Bytes>(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        let bytes = Arc::new(AtomicU64::new(0));
        let mut streams = JoinSet::new();
        for _ in 0..STREAMS {
            streams.spawn(run_stream(link.clone(), queue.clone(), bytes.clone(), load.clone()));
        }
        Self { pieces, streams, bytes }
    }

    /// Bytes of records handed to the streams so far.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }

    /// Waits until everything is with the transport. Every clone of `pieces` must be dropped before.
    pub async fn finish(self) -> Result<(), TransportError> {
        drop(self.pieces);
        let mut streams = self.streams;
        while let Some(done) = streams.join_next().await {
            done.expect("sending does not panic")?;
        }
        Ok(())
    }

    /// Waits for the first stream to fail.
    pub async fn failed(&mut self) -> TransportError {
        while let Some(done) = self.streams.join_next().await {
            if let Err(error) = done.expect("sending does not panic") {
                return error;
            }
        }
        std::future::pending().await
    }
}

async fn run_stream(
    link: Arc<dyn Link>,
    queue: Arc<Mutex<mpsc::Receiver<Bytes>>>,
    bytes: Arc<AtomicU64>,
    load: Arc<Load>,
) -> Result<(), TransportError> {
    let mut stream = None;
    loop {
        let piece = queue.lock().await.recv().await;
        let Some(piece) = piece else { break };
        load.send(piece.len() as u64).await;
        bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        let stream = match &mut stream {
            Some(stream) => stream,
            none => none.insert(link.open_blocks().await?),
        };
        if let Err(error) = stream.write(piece).await {
            return Err(link.close_reason().unwrap_or(error));
        }
    }
    if let Some(mut stream) = stream {
        stream.finish();
    }
    Ok(())
}
