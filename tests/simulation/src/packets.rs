//! A simulated network for real QUIC: datagrams that are lost, doubled, late and out of order, and directions that are
//! cut.
//!
//! Read first: [`Packets`]. Timers are tokio's, whose clock is paused: minutes pass in milliseconds.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use backhaul_transport::endpoint::Medium;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, TokioRuntime, UdpPoller};

use crate::chance::Chance;

/// What happens to datagrams.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Path {
    /// Of a hundred so many are lost.
    pub loss: f64,
    /// And so many come twice.
    pub double: f64,
    /// Shortest and longest delay, ms: what differs is reordering.
    pub delay: (u64, u64),
    /// Largest datagram that gets through, bytes.
    pub mtu: usize,
}

impl Default for Path {
    fn default() -> Self {
        Self { loss: 0.0, double: 0.0, delay: (1, 3), mtu: 1500 }
    }
}

/// The network.
#[derive(Clone)]
pub struct Packets(Arc<Mutex<Inner>>, Chance);

#[derive(Default)]
struct Inner {
    path: Path,
    /// Who is not heard.
    mute: Vec<SocketAddr>,
    inboxes: BTreeMap<SocketAddr, Inbox>,
    sockets: u64,
    sent: u64,
}

#[derive(Default)]
struct Inbox {
    /// Whose it is.
    socket: u64,
    arrived: VecDeque<(SocketAddr, Vec<u8>)>,
    waker: Option<Waker>,
}

impl Packets {
    /// A network without faults.
    pub fn new(chance: Chance) -> Self {
        Self(Arc::default(), chance)
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// From now on.
    pub fn set(&self, path: Path) {
        self.lock().path = path;
    }
    /// What this address sends arrives nowhere, or does again.
    pub fn mute(&self, address: SocketAddr, mute: bool) {
        let mut inner = self.lock();
        inner.mute.retain(|a| *a != address);
        if mute {
            inner.mute.push(address);
        }
    }
    /// Datagrams that were sent so far.
    pub fn sent(&self) -> u64 {
        self.lock().sent
    }
    /// Nobody is at this address any more.
    pub fn unbind(&self, address: SocketAddr) {
        self.lock().inboxes.remove(&address);
    }
    /// Binds an address; whoever had it hears nothing any more.
    pub fn bind(&self, address: SocketAddr) -> Medium {
        let number = {
            let mut inner = self.lock();
            inner.sockets += 1;
            let socket = inner.sockets;
            inner.inboxes.insert(address, Inbox { socket, ..Inbox::default() });
            socket
        };
        let socket = Socket { packets: self.clone(), address, number };
        Medium { socket: Arc::new(socket), runtime: Arc::new(TokioRuntime) }
    }

    fn send(&self, from: SocketAddr, to: SocketAddr, datagram: &[u8]) {
        let path = {
            let mut inner = self.lock();
            inner.sent += 1;
            if inner.mute.contains(&from) || datagram.len() > inner.path.mtu {
                return;
            }
            inner.path
        };
        let copies = 1 + usize::from(self.1.happens(path.double / 100.0));
        for _ in 0..copies {
            if self.1.happens(path.loss / 100.0) {
                continue;
            }
            let (this, datagram) = (self.clone(), datagram.to_vec());
            let delay: Duration = self.1.millis(path.delay.0, path.delay.1.max(path.delay.0 + 1));
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                let mut inner = this.lock();
                if let Some(inbox) = inner.inboxes.get_mut(&to) {
                    inbox.arrived.push_back((from, datagram));
                    if let Some(waker) = inbox.waker.take() {
                        waker.wake();
                    }
                }
            });
        }
    }
}

struct Socket {
    packets: Packets,
    address: SocketAddr,
    number: u64,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "simulated {}", self.address)
    }
}

#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        // A process that was killed says nothing more.
        let is_own = self.packets.lock().inboxes.get(&self.address).is_some_and(|i| i.socket == self.number);
        for datagram in transmit.contents.chunks(size).filter(|_| is_own) {
            self.packets.send(self.address, transmit.destination, datagram);
        }
        Ok(())
    }
    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.packets.lock();
        let own = inner.inboxes.get_mut(&self.address).filter(|i| i.socket == self.number);
        let Some(inbox) = own else { return Poll::Pending };
        let mut count = 0;
        for (buf, meta) in bufs.iter_mut().zip(meta.iter_mut()) {
            let Some((from, datagram)) = inbox.arrived.pop_front() else { break };
            let len = datagram.len().min(buf.len());
            buf[..len].copy_from_slice(&datagram[..len]);
            *meta = RecvMeta { addr: from, len, stride: len, ecn: None, dst_ip: None };
            count += 1;
        }
        if count > 0 {
            return Poll::Ready(Ok(count));
        }
        inbox.waker = Some(cx.waker().clone());
        Poll::Pending
    }
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
    fn may_fragment(&self) -> bool {
        false
    }
}
