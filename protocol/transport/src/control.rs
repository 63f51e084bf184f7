//! The control stream: a greeting, then frames with one message each.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use backhaul_protocol::wire::frame::{self, Receivable, Sendable};
use backhaul_protocol::wire::hello::{self, HELLO_LEN};
use backhaul_protocol::wire::message::{AgentMessage, ReceiverMessage};
use bytes::{Buf, Bytes, BytesMut};

use crate::error::TransportError;
use crate::link::{Link, ReceiveHalf, SendHalf};

/// Sends messages of one direction.
pub struct ControlSender<M> {
    stream: Box<dyn SendHalf>,
    bytes: Arc<AtomicU64>,
    message: PhantomData<fn(M)>,
}

/// Receives messages of the other direction.
pub struct ControlReceiver<M> {
    stream: Incoming,
    bytes: Arc<AtomicU64>,
    message: PhantomData<fn() -> M>,
}

impl<M: Sendable> ControlSender<M> {
    /// One message. Not cancel safe: a send that is dropped half-way breaks the stream.
    pub async fn send(&mut self, message: &M) -> Result<(), TransportError> {
        let frame = frame::encode(message)?;
        self.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
        self.stream.write(frame.into()).await
    }
    /// Bytes of all messages so far.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }
    /// No more messages.
    pub fn finish(&mut self) {
        self.stream.finish();
    }
    /// Waits until the other side has all of them, or is gone; after [`Self::finish`].
    pub async fn delivered(&mut self) {
        self.stream.stopped().await;
    }
}

impl<M: Receivable> ControlReceiver<M> {
    /// The next message; `None` when the other side has finished.
    pub async fn receive(&mut self) -> Result<Option<M>, TransportError> {
        if !self.stream.fill(frame::PREFIX_LEN).await? {
            return Ok(None);
        }
        let mut prefix = [0; frame::PREFIX_LEN];
        prefix.copy_from_slice(&self.stream.take(frame::PREFIX_LEN).await?);
        let bytes = self.stream.take(frame::frame_len(prefix)?).await?;
        self.bytes.fetch_add((prefix.len() + bytes.len()) as u64, Ordering::Relaxed);
        Ok(Some(frame::decode(&bytes)?))
    }
    /// Bytes of all messages so far.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        self.bytes.clone()
    }
}

/// What has come on a stream and is not used yet.
struct Incoming {
    stream: Box<dyn ReceiveHalf>,
    pending: BytesMut,
}

impl Incoming {
    fn new(stream: Box<dyn ReceiveHalf>) -> Self {
        Self { stream, pending: BytesMut::new() }
    }

    /// Waits for so many bytes; `false` if the stream ends before the first of them.
    async fn fill(&mut self, bytes: usize) -> Result<bool, TransportError> {
        while self.pending.len() < bytes {
            match self.stream.read(bytes - self.pending.len()).await? {
                Some(more) => self.pending.extend_from_slice(&more),
                None if self.pending.is_empty() => return Ok(false),
                None => return Err(TransportError::Stream("finished in the middle of a message".into())),
            }
        }
        Ok(true)
    }

    /// Waits for so many bytes and takes them.
    async fn take(&mut self, bytes: usize) -> Result<Bytes, TransportError> {
        if !self.fill(bytes).await? && bytes > 0 {
            return Err(TransportError::Stream("finished in the middle of a message".into()));
        }
        Ok(self.pending.copy_to_bytes(bytes))
    }
}

/// Opens the control stream and greets, as the agent.
pub async fn greet(
    link: &dyn Link,
) -> Result<(ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>), TransportError> {
    let (mut send, receive) = link.open_control().await?;
    let mut receive = Incoming::new(receive);
    send.write(Bytes::copy_from_slice(&hello::agent_hello())).await?;
    let mut answer = [0; HELLO_LEN];
    answer.copy_from_slice(&receive.take(HELLO_LEN).await?);
    hello::accept(&answer)?;
    Ok((
        ControlSender { stream: send, bytes: Arc::default(), message: PhantomData },
        ControlReceiver { stream: receive, bytes: Arc::default(), message: PhantomData },
    ))
}

/// Accepts the control stream and answers the greeting, as the receiver.
pub async fn welcome(
    link: &dyn Link,
) -> Result<(ControlSender<ReceiverMessage>, ControlReceiver<AgentMessage>), TransportError> {
    let (mut send, receive) = link.accept_control().await?;
    let mut receive = Incoming::new(receive);
    let mut greeting = [0; HELLO_LEN];
    greeting.copy_from_slice(&receive.take(HELLO_LEN).await?);
    let (answer, goes_on) = hello::answer(&greeting)?;
    send.write(Bytes::copy_from_slice(&answer)).await?;
    if let Err(error) = goes_on {
        send.finish();
        // The agent must get the answer before the connection goes.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), send.stopped()).await;
        return Err(error.into());
    }
    Ok((
        ControlSender { stream: send, bytes: Arc::default(), message: PhantomData },
        ControlReceiver { stream: receive, bytes: Arc::default(), message: PhantomData },
    ))
}
