//! QUIC endpoints. Each has a thread of its own with a single-threaded runtime, so that packets are never kept waiting
//! by hashing, compression or disk: measured, a runtime shared with those halves the rate.
//!
//! Read first: [`Endpoint::server`] and [`Endpoint::client`].

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use backhaul_protocol::wire::SERVER_NAME;
use backhaul_protocol::wire::message::CloseCode;
use backhaul_seams::mutant::{Mutant, planted};
use quinn::congestion::{ControllerFactory, CubicConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, TransportConfig, VarInt};
use rustix::net::sockopt;
use tokio::runtime::Handle;

use crate::congestion::BbrConfig;
use crate::error::TransportError;
use crate::tuning::{Congestion, Tuning};

/// Largest packet that path discovery tries, bytes of UDP payload. Ten of them, which is what one segmented send
/// carries, stay under 64 KiB; more hangs (measured at 8972).
const MAX_PACKET: u16 = 6500;
/// Credit of one stream. With the smallest packets of 1,200 bytes this is 1,748 of them: even if each second one is
/// lost, which happens where a queue overflows, quinn holds fewer pieces than the 2,048 at which it tidies up, and closes
/// a connection where more than 1,024 are left. Memory is bounded by the window of the connection.
const STREAM_WINDOW: u32 = 2 << 20;
/// Block streams that an agent may have open at once. A receiver holds one record of each, of up to 1 MiB, beside its
/// budget.
const AGENT_STREAMS: u32 = 8;
/// Block streams that a receiver may have open at once: one for each answer.
const RECEIVER_STREAMS: u32 = 32;
/// Bytes of a connection id: none is ever guessed or met again.
const CONNECTION_ID: usize = 12;
/// UDP buffers asked for; the kernel caps them at net.core.rmem_max and wmem_max, except for root.
const SOCKET_BUFFER: usize = 4 << 20;
/// A peer that is gone is noticed after this long where nobody is left to say so: the network is cut, the machine is
/// off, or its address has changed. Not less: on a bad path the answer to a packet may take ten seconds, and a link
/// that is given up costs more than one that is waited for. A receiver that was only started again says so itself, by
/// a stateless reset in answer to the next packet, which the keep-alive sends within five seconds.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Enough for the endpoint's thread to send what it has to send.
const GOODBYE: Duration = Duration::from_millis(20);
/// Four of them may be lost before the idle timeout; also keeps the mappings of NATs, which live for 30 s and more.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Memory that one connection may take: credit for what the peer sends, and what we send and is not acknowledged.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Bytes of all streams that may be on their way to us and not read yet.
    pub receive: u32,
    /// Bytes that we may have on their way.
    pub send: u32,
}

impl Windows {
    /// For a connection that carries blocks. 8 MiB fill 1 Gbit/s at 64 ms where nothing is lost.
    pub const BLOCKS: Self = Self { receive: 8 << 20, send: 8 << 20 };
    /// What these may grow to on a long path: the windows of an agent's streams together.
    pub const MOST: Self = Self { receive: STREAM_WINDOW * AGENT_STREAMS, send: STREAM_WINDOW * AGENT_STREAMS };
    /// For a peer that has not shown who it is.
    pub const UNKNOWN_PEER: Self = Self { receive: 64 << 10, send: 8 << 20 };
}

/// A QUIC endpoint and the thread that drives it. Dropping the last handle ends the thread.
pub struct Endpoint {
    inner: quinn::Endpoint,
    tuning: Tuning,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What a server's endpoint needs.
pub struct Serving {
    /// Keys and certificates.
    pub tls: rustls::ServerConfig,
    /// For whoever connects.
    pub windows: Windows,
    /// The same at every start and no other receiver's: by it a receiver that was killed and started again tells agents
    /// at their next packet that it knows nothing of their connections.
    pub reset_key: [u8; 32],
    /// As set.
    pub tuning: Tuning,
}

/// Where an endpoint's packets go, and what drives it, where that is not the kernel and a thread: in a simulation.
pub struct Medium {
    /// Packets.
    pub socket: Arc<dyn AsyncUdpSocket>,
    /// Timers and tasks.
    pub runtime: Arc<dyn Runtime>,
}

impl Endpoint {
    /// Listens on `address`.
    pub fn server(address: SocketAddr, serving: Serving) -> Result<Self, TransportError> {
        let tuning = serving.tuning;
        Self::start(address, Some(serving), tuning)
    }

    /// Any free port, of the same address family as the receiver's address.
    pub fn client(receiver: SocketAddr, tuning: Tuning) -> Result<Self, TransportError> {
        let any: SocketAddr = match receiver {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        Self::start(any, None, tuning)
    }

    /// Over a medium that is given; a server if it gets what one needs.
    pub fn over(medium: Medium, serving: Option<Serving>) -> Result<Self, TransportError> {
        let tuning = serving.as_ref().map_or_else(Tuning::default, |s| s.tuning);
        let (config, server) = configure(serving)?;
        let address = medium.socket.local_addr().unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
        let inner = quinn::Endpoint::new_with_abstract_socket(config, server, medium.socket, medium.runtime);
        let inner = inner.map_err(|cause| TransportError::Bind { address, cause })?;
        Ok(Self { inner, tuning, stop: None, thread: None })
    }

    fn start(address: SocketAddr, serving: Option<Serving>, tuning: Tuning) -> Result<Self, TransportError> {
        let failed = |cause| TransportError::Bind { address, cause };
        let (config, server) = configure(serving)?;
        let socket = UdpSocket::bind(address).map_err(failed)?;
        enlarge_buffers(&socket);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let on_thread = Arc::new(OnThread(runtime.handle().clone()));
        let inner = quinn::Endpoint::new(config, server, socket, on_thread).map_err(failed)?;
        let own = inner.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("quic".into())
            .spawn(move || {
                runtime.block_on(async {
                    let _ = stopped.await;
                    // A connection that is let go without a word would be a session at the receiver for a while.
                    own.close(VarInt::from_u32(CloseCode::Done as u32), b"");
                    let _ = tokio::time::timeout(GOODBYE, own.wait_idle()).await;
                });
                runtime.shutdown_background();
            })
            .map_err(failed)?;
        Ok(Self { inner, tuning, stop: Some(stop), thread: Some(thread) })
    }

    /// The address that it is bound to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// The next connection attempt; `None` once closed.
    pub async fn accept(&self) -> Option<quinn::Incoming> {
        self.inner.accept().await
    }

    /// Connects to a receiver.
    pub async fn connect(
        &self,
        address: SocketAddr,
        tls: rustls::ClientConfig,
        windows: Windows,
    ) -> Result<quinn::Connection, TransportError> {
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)
            .map_err(|_| crate::tls::TlsError::Pem("no TLS 1.3 cipher"))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport(windows, self.tuning, false)));
        Ok(self.inner.connect_with(config, address, SERVER_NAME)?.await?)
    }

    /// Closes all connections and lets the peers know. The goodbye goes out at once; waiting for more than that is
    /// waiting for the time that late packets are answered in, which is a matter of politeness.
    pub async fn close(&self, code: CloseCode, text: &str) {
        self.inner.close(VarInt::from_u32(code as u32), text.as_bytes());
        let _ = tokio::time::timeout(GOODBYE, self.inner.wait_idle()).await;
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn configure(serving: Option<Serving>) -> Result<(quinn::EndpointConfig, Option<quinn::ServerConfig>), TransportError> {
    let mut config = match &serving {
        Some(serving) => ResetKey(serving.reset_key).endpoint_config(),
        None => quinn::EndpointConfig::default(),
    };
    let too_large = |_| TransportError::Stream("a packet size that QUIC does not allow".into());
    config.max_udp_payload_size(MAX_PACKET).map_err(too_large)?;
    let Some(serving) = serving else { return Ok((config, None)) };
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(serving.tls)
        .map_err(|_| crate::tls::TlsError::Pem("no TLS 1.3 cipher"))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(Arc::new(transport(serving.windows, serving.tuning, true)));
    server.max_incoming(64);
    Ok((config, Some(server)))
}

/// Signs stateless resets: it must outlive the process, or the reset of a receiver that was started again is not
/// believed, and the agent waits for the idle timeout.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn endpoint_config(&self) -> quinn::EndpointConfig {
        let mut config = quinn::EndpointConfig::new(Arc::new(Self(self.0)));
        // Ids that need no key to be one's own: those of an earlier start are answered too.
        config.cid_generator(|| Box::new(quinn_proto::RandomConnectionIdGenerator::new(CONNECTION_ID)));
        config
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        signature.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }
    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }
    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // In constant time, which is what comparing hashes is.
        let stated: [u8; 32] = signature.try_into().map_err(|_| CryptoError)?;
        if blake3::keyed_hash(&self.0, data) == blake3::Hash::from(stated) { Ok(()) } else { Err(CryptoError) }
    }
}

fn transport(windows: Windows, tuning: Tuning, server: bool) -> TransportConfig {
    let streams = if server { AGENT_STREAMS } else { RECEIVER_STREAMS };
    let mut config = TransportConfig::default();
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_PACKET);
    let idle = quinn::IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32));
    config
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(windows.receive))
        .send_window(windows.send.into())
        .congestion_controller_factory(controller(tuning.congestion))
        .enable_segmentation_offload(tuning.segmentation.is_offload())
        .max_concurrent_bidi_streams(VarInt::from_u32(u32::from(server)))
        .max_concurrent_uni_streams(VarInt::from_u32(streams))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE).filter(|_| !planted(Mutant::NoKeepAlive)))
        .max_idle_timeout(Some(idle).filter(|_| !planted(Mutant::NoIdleTimeout)));
    config
}

fn controller(congestion: Congestion) -> Arc<dyn ControllerFactory + Send + Sync> {
    match congestion {
        Congestion::Bbr => Arc::new(BbrConfig),
        Congestion::Cubic => Arc::new(CubicConfig::default()),
    }
}

/// Small buffers cost speed on fast and on long links, nothing else: said once, and gone on with.
fn enlarge_buffers(socket: &UdpSocket) {
    static SAID: Once = Once::new();
    // The kernel's limits hold for who may not set them.
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER);
    }
    let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER);
    let given = [sockopt::socket_recv_buffer_size(socket), sockopt::socket_send_buffer_size(socket)];
    if let Some(advice) = buffer_advice(given.map(|g| g.unwrap_or_default())) {
        SAID.call_once(|| tracing::warn!("{advice}"));
    }
}

/// What to do about buffers of which the kernel gave much less than was asked for. It states twice what it gives.
fn buffer_advice([receive, send]: [usize; 2]) -> Option<String> {
    let short = |name: &'static str, stated: usize| (stated < SOCKET_BUFFER).then_some((name, stated / 2));
    let short = [short("net.core.rmem_max", receive), short("net.core.wmem_max", send)];
    let least = short.iter().flatten().map(|(_, given)| given).min()?;
    let typed: Vec<String> = short.iter().flatten().map(|(name, _)| format!("{name}={SOCKET_BUFFER}")).collect();
    Some(format!(
        "the kernel gives UDP sockets {} KiB of the {} KiB asked for, which is slow on fast and on long links; type: sysctl -w {}",
        least >> 10,
        SOCKET_BUFFER >> 10,
        typed.join(" ")
    ))
}

/// quinn's tokio runtime, but always on the endpoint's own thread, whoever calls.
#[derive(Debug)]
struct OnThread(Handle);

impl Runtime for OnThread {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _inside = self.0.enter();
        TokioRuntime.new_timer(at)
    }
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }
    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _inside = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }
}

#[cfg(test)]
#[path = "endpoint_tests.rs"]
mod tests;
