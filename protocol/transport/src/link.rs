//! A connection as sessions see it: streams that are opened and accepted, and an end with a reason. QUIC is one
//! ([`QuicLink`]); a simulation brings its own.
//!
//! Read first: [`Link`].

use std::sync::Arc;

use async_trait::async_trait;
use backhaul_protocol::wire::message::CloseCode;
use bytes::Bytes;
use quinn::VarInt;

use crate::endpoint::Endpoint;
use crate::error::TransportError;
use crate::tuning::Traffic;

/// A connection. Every method that waits is cancel safe.
#[async_trait]
pub trait Link: Send + Sync {
    /// Opens the control stream, as the agent.
    async fn open_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError>;
    /// Accepts the control stream, as the receiver.
    async fn accept_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError>;
    /// Opens a block stream.
    async fn open_blocks(&self) -> Result<Box<dyn SendHalf>, TransportError>;
    /// Accepts a block stream.
    async fn accept_blocks(&self) -> Result<Box<dyn ReceiveHalf>, TransportError>;
    /// So many bytes may be on their way to us and not read yet.
    fn allow(&self, bytes: u32);
    /// So many bytes of ours may be on their way and not confirmed yet; kept until they are.
    fn keep(&self, _bytes: u32) {}
    /// What was carried so far; `None` where there is no network.
    fn traffic(&self) -> Option<Traffic> {
        None
    }
    /// Ends it with a reason that the other side can show.
    fn close(&self, code: CloseCode, text: &str);
    /// Why it has ended; `None` while it has not.
    fn close_reason(&self) -> Option<TransportError>;
    /// Waits until it has ended.
    async fn closed(&self);
    /// Ends it and waits, shortly, until what was still to be sent is sent.
    async fn goodbye(&self);
}

/// The sending half of a stream.
#[async_trait]
pub trait SendHalf: Send {
    /// Sends all of it. Not cancel safe: a write that is dropped half-way breaks the stream.
    async fn write(&mut self, bytes: Bytes) -> Result<(), TransportError>;
    /// Nothing more is sent.
    fn finish(&mut self);
    /// Nothing more is sent, and what waits to be sent is thrown away.
    fn reset(&mut self) {
        self.finish();
    }
    /// Waits until the other side has everything, or wants no more.
    async fn stopped(&mut self);
}

/// The receiving half of a stream.
#[async_trait]
pub trait ReceiveHalf: Send {
    /// What has come, up to `most` bytes; `None` at the end. Cancel safe.
    async fn read(&mut self, most: usize) -> Result<Option<Bytes>, TransportError>;
    /// Wants no more.
    fn stop(&mut self);
}

/// QUIC.
pub struct QuicLink {
    connection: quinn::Connection,
    /// An agent's endpoint has one connection; it ends with it.
    endpoint: Option<Endpoint>,
}

impl QuicLink {
    /// The receiver's side: its endpoint has many.
    pub fn accepted(connection: quinn::Connection) -> Arc<dyn Link> {
        Arc::new(Self { connection, endpoint: None })
    }
    /// The agent's side.
    pub fn connected(endpoint: Endpoint, connection: quinn::Connection) -> Arc<dyn Link> {
        Arc::new(Self { connection, endpoint: Some(endpoint) })
    }
}

#[async_trait]
impl Link for QuicLink {
    async fn open_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        let (send, receive) = self.connection.open_bi().await?;
        Ok((Box::new(send), Box::new(receive)))
    }
    async fn accept_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        let (send, receive) = self.connection.accept_bi().await?;
        Ok((Box::new(send), Box::new(receive)))
    }
    async fn open_blocks(&self) -> Result<Box<dyn SendHalf>, TransportError> {
        Ok(Box::new(self.connection.open_uni().await?))
    }
    async fn accept_blocks(&self) -> Result<Box<dyn ReceiveHalf>, TransportError> {
        Ok(Box::new(self.connection.accept_uni().await?))
    }
    fn allow(&self, bytes: u32) {
        self.connection.set_receive_window(VarInt::from_u32(bytes));
    }
    fn keep(&self, bytes: u32) {
        self.connection.set_send_window(bytes.into());
    }
    fn traffic(&self) -> Option<Traffic> {
        let stats = self.connection.stats();
        let (received, sent) = (stats.udp_rx.bytes, stats.udp_tx.bytes);
        Some(Traffic { round_trip: stats.path.rtt, received, sent, window: stats.path.cwnd })
    }
    fn close(&self, code: CloseCode, text: &str) {
        self.connection.close(VarInt::from_u32(code as u32), text.as_bytes());
    }
    fn close_reason(&self) -> Option<TransportError> {
        self.connection.close_reason().map(TransportError::from)
    }
    async fn closed(&self) {
        self.connection.closed().await;
    }
    async fn goodbye(&self) {
        match &self.endpoint {
            Some(endpoint) => endpoint.close(CloseCode::Done, "").await,
            None => self.close(CloseCode::Done, ""),
        }
    }
}

#[async_trait]
impl SendHalf for quinn::SendStream {
    async fn write(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        Ok(self.write_chunk(bytes).await?)
    }
    fn finish(&mut self) {
        // An error means that it was finished or stopped before.
        let _ = quinn::SendStream::finish(self);
    }
    fn reset(&mut self) {
        // The same.
        let _ = quinn::SendStream::reset(self, VarInt::from_u32(CloseCode::Done as u32));
    }
    async fn stopped(&mut self) {
        let _ = quinn::SendStream::stopped(self).await;
    }
}

#[async_trait]
impl ReceiveHalf for quinn::RecvStream {
    async fn read(&mut self, most: usize) -> Result<Option<Bytes>, TransportError> {
        Ok(self.read_chunk(most, true).await?.map(|chunk| chunk.bytes))
    }
    fn stop(&mut self) {
        // An error means that it has ended.
        let _ = quinn::RecvStream::stop(self, VarInt::from_u32(CloseCode::Protocol as u32));
    }
}
