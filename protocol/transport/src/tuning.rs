//! How a connection treats its path: what can be set, and windows that grow with what the path asks for.
//!
//! Read first: [`Tuning`], then [`follow`].

use std::str::FromStr;
use std::sync::Weak;
use std::time::Duration;

use tokio::time::Instant;

use crate::endpoint::Windows;
use crate::link::Link;

/// What can be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tuning {
    /// Who decides how much is under way.
    pub congestion: Congestion,
    /// Who cuts what is sent into packets.
    pub segmentation: Segmentation,
}

/// How much may be under way: each end decides for what it sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Congestion {
    /// From the rate that arrives and the shortest round trip. Random loss, as on radio and long lines, does not matter.
    #[default]
    Bbr,
    /// Grows until a packet is lost, and every lost packet is taken for a full queue.
    Cubic,
}

/// Who cuts what is sent into packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Segmentation {
    /// The kernel, or the network card: a quarter of the CPU time (measured).
    #[default]
    Kernel,
    /// We do: for network cards and tunnels that get it wrong.
    Own,
}

impl Congestion {
    /// As it is set.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bbr => "bbr",
            Self::Cubic => "cubic",
        }
    }
}

impl FromStr for Congestion {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bbr" => Ok(Self::Bbr),
            "cubic" => Ok(Self::Cubic),
            other => Err(format!("congestion = \"{other}\": want \"bbr\" or \"cubic\"")),
        }
    }
}

impl Segmentation {
    /// From `segmentation_offload`.
    pub fn offload(is_on: bool) -> Self {
        if is_on { Self::Kernel } else { Self::Own }
    }
    /// As it is set.
    pub fn is_offload(self) -> bool {
        self == Self::Kernel
    }
}

/// What a connection has carried so far, and over what distance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traffic {
    /// Round trip, smoothed.
    pub round_trip: Duration,
    /// Bytes that came.
    pub received: u64,
    /// Bytes that went, what was sent again included.
    pub sent: u64,
    /// Bytes that congestion control lets be under way.
    pub window: u64,
}

impl Traffic {
    /// Whether the path took no more between an earlier look and this one, `elapsed` apart: what was under way filled
    /// the window. Where one end or the other is too slow, less is.
    pub fn filled_since(&self, earlier: &Self, elapsed: Duration) -> bool {
        let rate = self.sent.saturating_sub(earlier.sent) as f64 / elapsed.as_secs_f64().max(1e-3);
        rate * self.round_trip.as_secs_f64() > self.window as f64 * FILLED
    }
}

/// Of the window. A path that is not full has some two thirds under way even if what is sent fills its line: the window
/// is one and a half times that.
const FILLED: f64 = 0.8;

/// A lost packet is known after one round trip and there after two, and everything behind it waits: that takes three
/// times what is under way.
const ROUND_TRIPS: u32 = 3;

/// How large a window must be for what one direction carries.
#[derive(Debug)]
pub struct Demand {
    at: Instant,
    bytes: u64,
    /// The shortest that was seen: queues, ours included, are no distance.
    round_trip: Duration,
}

impl Demand {
    /// Nothing was carried yet.
    pub fn new(now: Instant) -> Self {
        Self { at: now, bytes: 0, round_trip: Duration::MAX }
    }

    /// The window for the rate since the last look. A window that is too small is full, and asks for three times its
    /// size: it grows within few looks.
    pub fn window(&mut self, now: Instant, round_trip: Duration, bytes: u64) -> u32 {
        let elapsed = (now - self.at).as_secs_f64().max(1e-3);
        let rate = bytes.saturating_sub(self.bytes) as f64 / elapsed;
        self.round_trip = self.round_trip.min(round_trip);
        (self.at, self.bytes) = (now, bytes);
        // Saturates, as conversions from floating point do.
        (rate * self.round_trip.as_secs_f64() * f64::from(ROUND_TRIPS)) as u32
    }
}

/// Between two looks while something is carried; longer than most round trips.
const BUSY: Duration = Duration::from_millis(100);
/// And while little is.
const IDLE: Duration = Duration::from_secs(1);
/// Little: less a second than anybody needs a window for.
const LITTLE: u64 = 1 << 20;

/// Who says how large windows may be. Each is told what the path asks for, and gives the new size where it grows.
pub trait Grants: Send {
    /// For what the peer sends.
    fn receive(&mut self, wanted: u32) -> Option<u32>;
    /// For what we send.
    fn send(&mut self, wanted: u32) -> Option<u32>;
}

/// For whoever has one connection: all that one may take.
#[derive(Debug)]
pub struct Unshared(Windows);

impl Default for Unshared {
    fn default() -> Self {
        Self(Windows::BLOCKS)
    }
}

impl Grants for Unshared {
    fn receive(&mut self, wanted: u32) -> Option<u32> {
        let wanted = wanted.min(Windows::MOST.receive);
        (wanted > self.0.receive).then(|| {
            self.0.receive = wanted;
            wanted
        })
    }
    fn send(&mut self, wanted: u32) -> Option<u32> {
        let wanted = wanted.min(Windows::MOST.send);
        (wanted > self.0.send).then(|| {
            self.0.send = wanted;
            wanted
        })
    }
}

/// Lets the windows of a connection grow, until it ends or nobody else has it.
pub async fn follow(link: Weak<dyn Link>, grants: &mut impl Grants) {
    let now = Instant::now();
    let (mut receive, mut send) = (Demand::new(now), Demand::new(now));
    let (mut pause, mut carried) = (BUSY, 0);
    loop {
        tokio::time::sleep(pause).await;
        let Some(link) = link.upgrade() else { return };
        let Some(traffic) = link.traffic().filter(|_| link.close_reason().is_none()) else { return };
        let now = Instant::now();
        if let Some(bytes) = grants.receive(receive.window(now, traffic.round_trip, traffic.received)) {
            link.allow(bytes);
        }
        if let Some(bytes) = grants.send(send.window(now, traffic.round_trip, traffic.sent)) {
            link.keep(bytes);
        }
        let sum = traffic.received + traffic.sent;
        pause = if sum - carried > LITTLE { BUSY } else { IDLE };
        carried = sum;
    }
}

#[cfg(test)]
#[path = "tuning_tests.rs"]
mod tests;
