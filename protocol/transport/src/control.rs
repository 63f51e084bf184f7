//! The control stream: a greeting, then frames with one message each.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use backhaul_protocol::wire::frame::{self, Receivable, Sendable};
use backhaul_protocol::wire::hello::{self, HELLO_LEN};
use backhaul_protocol::wire::message::{AgentMessage, ReceiverMessage};
use quinn::{Connection, RecvStream, SendStream};

use crate::error::TransportError;

/// Sends messages of one direction.
pub struct ControlSender<M> {
    stream: SendStream,
    bytes: Arc<AtomicU64>,
    message: PhantomData<fn(M)>,
}

/// Receives messages of the other direction.
pub struct ControlReceiver<M> {
    stream: RecvStream,
    bytes: Arc<AtomicU64>,
    message: PhantomData<fn() -> M>,
}

impl<M: Sendable> ControlSender<M> {
    /// One message. Not cancel safe: a send that is dropped half-way breaks the stream.
    pub async fn send(&mut self, message: &M) -> Result<(), TransportError> {
        let frame = frame::encode(message)?;
        self.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        Ok(self.stream.write_all(&frame).await?)
    }
    /// Bytes of all messages so far.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }
    /// No more messages.
    pub fn finish(&mut self) {
        let _ = self.stream.finish();
    }
}

impl<M: Receivable> ControlReceiver<M> {
    /// The next message; `None` when the other side has finished.
    pub async fn receive(&mut self) -> Result<Option<M>, TransportError> {
        let mut prefix = [0; frame::PREFIX_LEN];
        match self.stream.read_exact(&mut prefix).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let mut bytes = vec![0; frame::frame_len(prefix)?];
        self.stream.read_exact(&mut bytes).await?;
        self.bytes.fetch_add((prefix.len() + bytes.len()) as u64, Ordering::Relaxed);
        Ok(Some(frame::decode(&bytes)?))
    }
    /// Bytes of all messages so far.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }
}

/// Opens the control stream and greets, as the agent.
pub async fn greet(
    connection: &Connection,
) -> Result<(ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>), TransportError> {
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(&hello::agent_hello()).await?;
    let mut answer = [0; HELLO_LEN];
    recv.read_exact(&mut answer).await?;
    hello::accept(&answer)?;
    Ok((
        ControlSender { stream: send, bytes: Arc::default(), message: PhantomData },
        ControlReceiver { stream: recv, bytes: Arc::default(), message: PhantomData },
    ))
}

/// Accepts the control stream and answers the greeting, as the receiver.
pub async fn welcome(
    connection: &Connection,
) -> Result<(ControlSender<ReceiverMessage>, ControlReceiver<AgentMessage>), TransportError> {
    let (mut send, mut recv) = connection.accept_bi().await?;
    let mut greeting = [0; HELLO_LEN];
    recv.read_exact(&mut greeting).await?;
    let (answer, goes_on) = hello::answer(&greeting)?;
    send.write_all(&answer).await?;
    if let Err(error) = goes_on {
        let _ = send.finish();
        // The agent must get the answer before the connection goes.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), send.stopped()).await;
        return Err(error.into());
    }
    Ok((
        ControlSender { stream: send, bytes: Arc::default(), message: PhantomData },
        ControlReceiver { stream: recv, bytes: Arc::default(), message: PhantomData },
    ))
}
