//! A simulated network: connections whose bytes take time, that can be cut in either direction, and that end as QUIC
//! connections do: by a goodbye, by the idle timeout, by a reset of a receiver that was started again.
//!
//! Read first: [`Wire`], then [`connect`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use backhaul_protocol::wire::message::CloseCode;
use backhaul_transport::endpoint::IDLE_TIMEOUT;
use backhaul_transport::error::TransportError;
use backhaul_transport::link::{Link, ReceiveHalf, SendHalf};
use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::chance::Chance;
use crate::gate::{Gate, Process};

/// Chunks of a stream that may be on their way.
const WINDOW: usize = 16;

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The agent's.
    Agent,
    /// The receiver's.
    Receiver,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Agent => Self::Receiver,
            Self::Receiver => Self::Agent,
        }
    }
}

/// The network between one agent and one receiver.
#[derive(Debug)]
pub struct Wire {
    /// Whether what an end sends arrives; by the end that sends.
    up: [watch::Sender<bool>; 2],
    /// Shortest and longest delay, ms.
    delay: [AtomicU64; 2],
}

impl Default for Wire {
    fn default() -> Self {
        Self {
            up: [watch::Sender::new(true), watch::Sender::new(true)],
            delay: [AtomicU64::new(1), AtomicU64::new(20)],
        }
    }
}

impl Wire {
    /// Cuts or mends one direction.
    pub fn set_up(&self, from: End, up: bool) {
        self.up[from as usize].send_replace(up);
    }
    /// Both directions work, and fast.
    pub fn heal(&self) {
        self.set_up(End::Agent, true);
        self.set_up(End::Receiver, true);
        self.set_delay(1, 20);
    }
    /// Delays from now on, ms.
    pub fn set_delay(&self, shortest: u64, longest: u64) {
        self.delay[0].store(shortest, Ordering::Relaxed);
        self.delay[1].store(longest.max(shortest + 1), Ordering::Relaxed);
    }
    /// Whether what this end sends arrives.
    pub fn is_up(&self, from: End) -> bool {
        *self.up[from as usize].borrow()
    }
    fn draw(&self, chance: &Chance) -> Duration {
        chance.millis(self.delay[0].load(Ordering::Relaxed), self.delay[1].load(Ordering::Relaxed))
    }
}

/// Hears every message that the agent's end sends on the control stream.
pub type Tap = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// Why an end is over.
#[derive(Clone, Debug)]
enum Over {
    Local,
    TimedOut,
    Reset,
    Closed(CloseCode, String),
}

impl From<Over> for TransportError {
    fn from(over: Over) -> Self {
        Self::Connection(match over {
            Over::Local => quinn::ConnectionError::LocallyClosed,
            Over::TimedOut => quinn::ConnectionError::TimedOut,
            Over::Reset => quinn::ConnectionError::Reset,
            Over::Closed(code, text) => quinn::ConnectionError::ApplicationClosed(quinn::ApplicationClose {
                error_code: quinn::VarInt::from_u32(code as u32),
                reason: text.into_bytes().into(),
            }),
        })
    }
}

struct Shared {
    wire: Arc<Wire>,
    chance: Chance,
    gates: [Gate; 2],
    over: [watch::Sender<Option<Over>>; 2],
    control: [Accepts<(Outgoing, Incoming)>; 2],
    blocks: [Accepts<Incoming>; 2],
    tap: Tap,
}

/// Streams that wait to be accepted by an end.
struct Accepts<T> {
    offer: mpsc::UnboundedSender<T>,
    take: AsyncMutex<mpsc::UnboundedReceiver<T>>,
}

impl<T> Default for Accepts<T> {
    fn default() -> Self {
        let (offer, take) = mpsc::unbounded_channel();
        Self { offer, take: AsyncMutex::new(take) }
    }
}

/// A connection that was made: both ends.
pub fn connect(wire: Arc<Wire>, chance: Chance, gates: [Gate; 2], tap: Tap) -> (Arc<dyn Link>, Arc<dyn Link>) {
    let shared = Arc::new(Shared {
        wire,
        chance,
        gates,
        over: [watch::Sender::new(None), watch::Sender::new(None)],
        control: Default::default(),
        blocks: Default::default(),
        tap,
    });
    tokio::spawn(watch_over(shared.clone()));
    let end = |end| Arc::new(SimLink { shared: shared.clone(), end }) as Arc<dyn Link>;
    (end(End::Agent), end(End::Receiver))
}

/// Notices ends that hear nothing any more, as QUIC's timers do.
async fn watch_over(shared: Arc<Shared>) {
    let timeout = IDLE_TIMEOUT.as_secs();
    // A process that was killed and started again answers the next packet with a reset.
    let reset_after = [0, 1].map(|_| shared.chance.between(1, 2 * timeout));
    let mut silent = [0; 2];
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for from in [End::Agent, End::Receiver] {
            let process = shared.gates[from as usize].process();
            let hears = shared.wire.is_up(from) && process == Process::Running && shared.is_open(from);
            let silent = &mut silent[from as usize];
            *silent = if hears { 0 } else { *silent + 1 };
            let to = from.other();
            if process == Process::Dead && *silent >= reset_after[from as usize] && shared.wire.is_up(from) {
                shared.end(to, Over::Reset);
            } else if *silent >= timeout {
                shared.end(to, Over::TimedOut);
            }
        }
        if shared.over.iter().all(|o| o.borrow().is_some()) {
            return;
        }
    }
}

impl Shared {
    fn is_open(&self, end: End) -> bool {
        self.over[end as usize].borrow().is_none()
    }
    fn end(&self, end: End, why: Over) {
        self.over[end as usize].send_if_modified(|over| {
            let first = over.is_none();
            if first {
                *over = Some(why);
            }
            first
        });
    }
    async fn over(&self, end: End) -> TransportError {
        let mut over = self.over[end as usize].subscribe();
        let found = match over.wait_for(Option::is_some).await {
            Ok(found) => found.clone(),
            Err(_) => None,
        };
        found.unwrap_or(Over::Local).into()
    }
    fn reason(&self, end: End) -> Option<TransportError> {
        self.over[end as usize].borrow().clone().map(TransportError::from)
    }
    fn stream(self: &Arc<Self>, from: End, tapped: bool) -> (Outgoing, Incoming) {
        let (send, receive) = mpsc::unbounded_channel();
        let credit = Arc::new(Semaphore::new(WINDOW));
        let stopped = Arc::new(AtomicBool::new(false));
        let outgoing = Outgoing {
            shared: self.clone(),
            end: from,
            send,
            credit: credit.clone(),
            stopped: stopped.clone(),
            last: Instant::now(),
            finished: false,
            tapped,
        };
        let incoming = Incoming {
            shared: self.clone(),
            end: from.other(),
            receive,
            credit,
            stopped,
            pending: None,
            at_end: false,
        };
        (outgoing, incoming)
    }
}

enum Chunk {
    Bytes(Instant, Bytes),
    Finish(Instant),
}

struct Outgoing {
    shared: Arc<Shared>,
    end: End,
    send: mpsc::UnboundedSender<Chunk>,
    credit: Arc<Semaphore>,
    stopped: Arc<AtomicBool>,
    last: Instant,
    finished: bool,
    tapped: bool,
}

impl Outgoing {
    /// When what is sent now arrives: never before what was sent earlier.
    fn arrival(&mut self) -> Instant {
        self.last = self.last.max(Instant::now() + self.shared.wire.draw(&self.shared.chance));
        self.last
    }
}

#[async_trait]
impl SendHalf for Outgoing {
    async fn write(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        let shared = self.shared.clone();
        shared.gates[self.end as usize].pass().await;
        // Always a chance to be killed between deciding to send and sending.
        tokio::task::yield_now().await;
        if let Some(over) = shared.reason(self.end) {
            return Err(over);
        }
        if self.stopped.load(Ordering::Relaxed) {
            return Err(TransportError::Stream("stopped by the other side".into()));
        }
        if self.tapped {
            (shared.tap)(&bytes);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            // Some messages arrive in two parts.
            let cut = if rest.len() > 1 && shared.chance.happens(0.1) {
                shared.chance.between(1, rest.len() as u64)
            } else {
                rest.len() as u64
            };
            let part = rest.split_to(cut as usize);
            tokio::select! {
                biased;
                over = shared.over(self.end) => return Err(over),
                permit = self.credit.clone().acquire_owned() => permit.map_err(|_| TransportError::Stream("closed".into()))?.forget(),
            }
            let at = self.arrival();
            let _ = self.send.send(Chunk::Bytes(at, part));
        }
        Ok(())
    }
    fn finish(&mut self) {
        if !std::mem::replace(&mut self.finished, true)
            && self.shared.gates[self.end as usize].process() == Process::Running
        {
            let at = self.arrival();
            let _ = self.send.send(Chunk::Finish(at));
        }
    }
    async fn stopped(&mut self) {
        tokio::time::sleep(self.shared.wire.draw(&self.shared.chance)).await;
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // As quinn does it.
        self.finish();
    }
}

struct Incoming {
    shared: Arc<Shared>,
    end: End,
    receive: mpsc::UnboundedReceiver<Chunk>,
    credit: Arc<Semaphore>,
    stopped: Arc<AtomicBool>,
    pending: Option<Chunk>,
    at_end: bool,
}

impl Incoming {
    /// Waits until what arrives at `at` has arrived.
    async fn arrive(shared: &Shared, end: End, at: Instant) {
        tokio::time::sleep_until(at).await;
        let mut up = shared.wire.up[end.other() as usize].subscribe();
        let _ = up.wait_for(|up| *up).await;
        shared.gates[end as usize].pass().await;
    }
}

#[async_trait]
impl ReceiveHalf for Incoming {
    async fn read(&mut self, most: usize) -> Result<Option<Bytes>, TransportError> {
        if self.at_end {
            return Ok(None);
        }
        if self.pending.is_none() {
            tokio::select! {
                biased;
                chunk = self.receive.recv() => match chunk {
                    Some(chunk) => self.pending = Some(chunk),
                    // The sender was killed: nothing more comes, and that is not an end.
                    None => return Err(self.shared.over(self.end).await),
                },
                over = self.shared.over(self.end) => return Err(over),
            }
        }
        let at = match &self.pending {
            Some(Chunk::Bytes(at, _) | Chunk::Finish(at)) => *at,
            None => Instant::now(),
        };
        tokio::select! {
            biased;
            over = self.shared.over(self.end) => return Err(over),
            () = Self::arrive(&self.shared, self.end, at) => {}
        }
        match self.pending.take() {
            Some(Chunk::Bytes(at, mut bytes)) => {
                if bytes.len() > most {
                    let first = bytes.split_to(most);
                    self.pending = Some(Chunk::Bytes(at, bytes));
                    return Ok(Some(first));
                }
                self.credit.add_permits(1);
                Ok(Some(bytes))
            }
            _ => {
                self.at_end = true;
                Ok(None)
            }
        }
    }
    fn stop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.at_end {
            self.stop();
        }
    }
}

struct SimLink {
    shared: Arc<Shared>,
    end: End,
}

impl SimLink {
    async fn accept<T>(&self, accepts: &Accepts<T>) -> Result<T, TransportError> {
        let mut take = accepts.take.lock().await;
        tokio::select! {
            biased;
            over = self.shared.over(self.end) => Err(over),
            taken = take.recv() => taken.ok_or_else(|| TransportError::Stream("gone".into())),
        }
    }
    fn check(&self) -> Result<(), TransportError> {
        self.shared.reason(self.end).map_or(Ok(()), Err)
    }
}

#[async_trait]
impl Link for SimLink {
    async fn open_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        self.check()?;
        let (send, theirs_in) = self.shared.stream(self.end, true);
        let (theirs_out, receive) = self.shared.stream(self.end.other(), false);
        let _ = self.shared.control[self.end.other() as usize].offer.send((theirs_out, theirs_in));
        Ok((Box::new(send), Box::new(receive)))
    }
    async fn accept_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        let (send, receive) = self.accept(&self.shared.control[self.end as usize]).await?;
        Ok((Box::new(send), Box::new(receive)))
    }
    async fn open_blocks(&self) -> Result<Box<dyn SendHalf>, TransportError> {
        self.check()?;
        let (send, theirs) = self.shared.stream(self.end, false);
        let _ = self.shared.blocks[self.end.other() as usize].offer.send(theirs);
        Ok(Box::new(send))
    }
    async fn accept_blocks(&self) -> Result<Box<dyn ReceiveHalf>, TransportError> {
        Ok(Box::new(self.accept(&self.shared.blocks[self.end as usize]).await?))
    }
    fn allow(&self, _bytes: u32) {}
    fn close(&self, code: CloseCode, text: &str) {
        if !self.shared.is_open(self.end) || self.shared.gates[self.end as usize].process() == Process::Dead {
            return;
        }
        self.shared.end(self.end, Over::Local);
        let (shared, end, text) = (self.shared.clone(), self.end, text.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(shared.wire.draw(&shared.chance)).await;
            // A goodbye that is lost is not sent again.
            if shared.wire.is_up(end) {
                shared.end(end.other(), Over::Closed(code, text));
            }
        });
    }
    fn close_reason(&self) -> Option<TransportError> {
        self.shared.reason(self.end)
    }
    async fn closed(&self) {
        self.shared.over(self.end).await;
    }
    async fn goodbye(&self) {
        self.close(CloseCode::Done, "");
    }
}

/// Wires by agent and receiver.
#[derive(Clone, Default)]
pub struct Network(Arc<Mutex<Wires>>);

type Wires = BTreeMap<(usize, usize), Arc<Wire>>;

impl Network {
    /// The wire between these two.
    pub fn wire(&self, agent: usize, receiver: usize) -> Arc<Wire> {
        let mut wires = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wires.entry((agent, receiver)).or_default().clone()
    }
    /// Everything works.
    pub fn heal(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(|w| w.heal());
    }
}
