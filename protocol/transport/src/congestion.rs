//! How much may be under way, from what arrives and how far it is (BBR's idea), not from single losses.
//!
//! quinn has a BBR too. Measured, it takes everything: its rate is that of the two acknowledgements that came closest
//! together, and is never lowered; two such flows lose half of what they send, and a TCP beside one stands still.
//!
//! Read first: `Bbr::window`, then `Bbr::end_round`. A round is the time in which what was sent at its beginning is
//! acknowledged. Its rate is what arrived during it, divided by its length; the best of the last rounds counts. The
//! window is what that rate has under way in one and a half of the shortest round trips. A path that has room answers
//! with a higher rate, and the window follows; one that has none answers with a queue of half a round trip. A round that
//! loses more than lines do by themselves lowers what may be under way, whatever the rate.
//!
//! quinn tells losses after the end of the acknowledgements that showed them: they count for the round that begins
//! then. It takes a packet for lost that three newer ones overtook; a path that mixes packets more than that looks like
//! one that overflows.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

/// What is begun with, as quinn's BBR: 200 of the smallest packets. Only until a rate is known.
const INITIAL_WINDOW: u64 = 200 * 1200;
/// Never less: else a lost packet is only noticed by a timeout.
const LEAST_PACKETS: u64 = 8;
/// A round that brought fewer says nothing: neither how fast the path is nor that a queue grows. Half of the least
/// window, so that a full round of that always counts.
const FEW_PACKETS: u64 = LEAST_PACKETS / 2;
/// Rounds whose best rate counts. A rate that is no more is forgotten after as many.
const ROUNDS: usize = 8;
/// Of the shortest round trip: half a round trip may wait in the queue. With twice, as in BBR, two flows overflow a
/// queue of one round trip; with less, flows that fill the queue push this one aside.
const GAIN: f64 = 1.5;
/// While it is not known what the path carries: twice as much in each round, and what comes late.
const STARTUP_GAIN: f64 = 2.9;
/// Programs wait for the CPU and acknowledgements for each other, for longer than short round trips.
const SLACK: Duration = Duration::from_millis(5);
/// Startup goes on while each round has so much more.
const GROWTH: f64 = 1.25;
/// Rounds without growth after which the path is taken to be full.
const FULL: u32 = 3;
/// Lost of what a round sent: above, a queue overflows. Lines that lose that much by themselves are broken.
const OVERFLOW: f64 = 0.04;
/// What is left of what arrived in a round that overflowed.
const BACK_OFF: f64 = 0.85;
/// Not less than this is left of the window: losses are noticed a round later than what arrived, and a pause of the
/// line has a round that brought nothing and lost everything. As CUBIC (RFC 9438, 4.6).
const LEAST_LEFT: f64 = 0.7;
/// A round with this many lost packets or fewer did not overflow: small windows lose one of ten by chance.
const CHANCE_PACKETS: u64 = 4;
/// Of the shortest round trip: nothing waited. As much as clocks and schedulers make of it; with more, two flows over a
/// short queue become less equal (simulated).
const ROOM: f64 = 1.1;
/// The shortest round trip is looked for again after this long: with little under way, or our own queue is measured.
const DISTANCE_LIFE: Duration = Duration::from_secs(10);
/// Looking takes this long, or one round trip.
const LOOK: Duration = Duration::from_millis(200);
/// Also looked for when the rate fell this far below that of the round in which a queue appeared which has not gone
/// since: a path that became longer looks like that. Arbitrary; the rate of a path that is full varies less.
const FALLEN: f64 = 0.75;

/// Makes one for each path.
#[derive(Debug, Default)]
pub struct BbrConfig;

impl ControllerFactory for BbrConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Bbr::new(now, current_mtu))
    }
}

/// What it is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// It is not known yet what the path carries; rounds without growth.
    Startup(u32),
    /// The window follows the rate.
    Steady,
    /// Little is under way until then, so that queues empty and the distance shows to what is sent meanwhile.
    Looking { since: Instant, until: Instant },
}

/// The state of one path.
#[derive(Clone, Debug)]
pub struct Bbr {
    packet: u64,
    phase: Phase,
    /// Bytes a second, of the last rounds.
    rates: VecDeque<f64>,
    /// The rate that startup must exceed.
    outgrown: f64,
    /// The shortest round trip, and when it was seen.
    distance: Option<(Duration, Instant)>,
    /// While looking.
    looked: Duration,
    /// The best rate when a queue appeared that has not gone since.
    queued_at: Option<f64>,
    /// No more may be under way: a queue overflowed.
    limit: Option<u64>,
    /// Rounds in a row without overflow in which nothing waited.
    calm: u64,
    round: Round,
    largest_sent: u64,
}

/// What a round saw.
#[derive(Clone, Debug)]
struct Round {
    began: Instant,
    /// Packets up to this one were sent before it.
    ends_with: u64,
    acked: u64,
    lost: u64,
    /// Less was sent than might have been.
    is_idle: bool,
    shortest: Duration,
    /// A router said that its queue grows.
    is_marked: bool,
}

impl Round {
    fn new(began: Instant, ends_with: u64) -> Self {
        let shortest = Duration::MAX;
        Self { began, ends_with, acked: 0, lost: 0, is_idle: false, shortest, is_marked: false }
    }
}

impl Bbr {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            packet: mtu.into(),
            phase: Phase::Startup(0),
            rates: VecDeque::with_capacity(ROUNDS),
            outgrown: 0.0,
            distance: None,
            looked: Duration::MAX,
            queued_at: None,
            limit: None,
            calm: 0,
            round: Round::new(now, 0),
            largest_sent: 0,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    /// What the rate has under way in so many of the shortest round trips, and a little.
    fn under_way(&self, gain: f64) -> Option<u64> {
        let (distance, _) = self.distance?;
        let rate = self.rate();
        (rate > 0.0).then(|| (rate * (distance.as_secs_f64() * gain + SLACK.as_secs_f64())) as u64)
    }

    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, is_idle: bool) {
        let round_trip = now.saturating_duration_since(sent);
        self.round.acked += bytes;
        self.round.is_idle |= is_idle;
        self.round.shortest = self.round.shortest.min(round_trip);
        if matches!(self.phase, Phase::Looking { since, .. } if sent >= since) {
            self.looked = self.looked.min(round_trip);
        }
        if self.distance.is_none_or(|(distance, _)| round_trip <= distance) {
            self.distance = Some((round_trip, now));
        }
    }

    /// Every packet of the round waited longer than this controller lets them wait.
    fn has_queue(&self) -> bool {
        self.round.acked >= FEW_PACKETS * self.packet
            && self.distance.is_some_and(|(distance, _)| self.round.shortest > distance.mul_f64(GAIN) + SLACK)
    }

    /// Startup does not wait for the end of a round that takes twice as long as it should: on a slow line that end is
    /// as far away as all that was sent.
    fn is_startup_late(&self, now: Instant) -> bool {
        let is_late = self.distance.is_some_and(|(distance, _)| now > self.round.began + distance * 2 + SLACK);
        matches!(self.phase, Phase::Startup(_)) && is_late && self.round.acked >= FEW_PACKETS * self.packet
    }

    fn end_round(&mut self, now: Instant) {
        let has_queue = self.has_queue();
        let round = std::mem::replace(&mut self.round, Round::new(now, self.largest_sent));
        let is_few = round.acked < FEW_PACKETS * self.packet;
        let rate = round.acked as f64 / (now - round.began).as_secs_f64().max(1e-6);
        // A round that had little to send says nothing about the path, unless that little was more than before, or
        // already too much: who is held by the send window is idle in every round.
        let counts = !round.is_idle || has_queue || rate > self.rate();
        if counts && !is_few && !matches!(self.phase, Phase::Looking { .. }) {
            if self.rates.len() == ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.queued_at = has_queue.then(|| self.queued_at.unwrap_or(self.rate()));
        let is_much = round.lost as f64 > (round.acked + round.lost) as f64 * OVERFLOW;
        let is_overflow = round.is_marked && !is_few || is_much && round.lost > CHANCE_PACKETS * self.packet;
        let has_room = self.distance.is_some_and(|(distance, _)| round.shortest < distance.mul_f64(ROOM));
        self.calm = if has_room && !is_overflow { self.calm + 1 } else { 0 };
        let enough = self.under_way(GAIN);
        if let Phase::Startup(rounds) = self.phase {
            self.limit = self.limit.map(|limit| if is_overflow { limit } else { limit * 2 });
            self.end_startup_round(round.is_idle, rounds, has_queue || is_overflow);
        } else if is_overflow {
            let before = self.limit.unwrap_or(u64::MAX).min(enough.unwrap_or(INITIAL_WINDOW)) as f64;
            let left = (round.acked as f64 * BACK_OFF).max(before * LEAST_LEFT).min(before);
            self.limit = Some((left as u64).max(LEAST_PACKETS * self.packet));
        } else if let Some(limit) = &mut self.limit {
            // Half of what TCP would add, or a hundredth: nobody is alone for long, and flows that share become equal.
            // When nothing waited for long the overflow was of another time: one hundredth more in each round.
            let hundredths = 1 + self.calm.saturating_sub(ROUNDS as u64);
            *limit += (self.packet / 2).max(*limit * hundredths / 100);
        }
        if enough.is_some_and(|enough| self.limit > Some(enough)) {
            self.limit = None;
        }
    }

    fn end_startup_round(&mut self, is_idle: bool, without_growth: u32, is_full: bool) {
        let rate = self.rate();
        if rate >= self.outgrown * GROWTH {
            self.outgrown = rate;
            self.phase = Phase::Startup(0);
        } else if !is_idle {
            self.phase = Phase::Startup(without_growth + 1);
        }
        if is_full || self.phase == Phase::Startup(FULL) {
            self.phase = Phase::Steady;
        }
    }

    /// Looks for the shortest round trip now and then.
    fn look(&mut self, now: Instant) {
        let Some((distance, seen)) = self.distance else { return };
        let is_starved = self.queued_at.is_some_and(|rate| self.rate() < rate * FALLEN);
        match self.phase {
            Phase::Looking { until, .. } if now >= until && self.looked < Duration::MAX => {
                self.distance = Some((self.looked, now));
                self.queued_at = None;
                self.phase = Phase::Steady;
            }
            Phase::Steady if is_starved || now.saturating_duration_since(seen) > DISTANCE_LIFE => {
                self.looked = Duration::MAX;
                // What is under way must be gone first.
                self.phase = Phase::Looking { since: now, until: now + LOOK + distance.mul_f64(2.0) };
            }
            _ => {}
        }
    }
}

impl Controller for Bbr {
    fn on_sent(&mut self, _now: Instant, _bytes: u64, last_packet_number: u64) {
        self.largest_sent = last_packet_number;
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _rtt: &RttEstimator) {
        self.acked(now, sent, bytes, app_limited);
    }

    fn on_end_acks(&mut self, now: Instant, _in_flight: u64, app_limited: bool, largest_acked: Option<u64>) {
        self.round.is_idle |= app_limited;
        let is_over = largest_acked.is_some_and(|largest| largest > self.round.ends_with) && self.round.acked > 0;
        if is_over || self.is_startup_late(now) {
            self.end_round(now);
        }
        self.look(now);
    }

    fn on_congestion_event(&mut self, now: Instant, _sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.round.lost += lost_bytes;
        self.round.is_marked |= lost_bytes == 0;
        if is_persistent {
            // Nothing came through for long: what was known is of another time.
            let (mtu, largest_sent) = (self.packet as u16, self.largest_sent);
            *self = Self { largest_sent, limit: Some(LEAST_PACKETS * self.packet), ..Self::new(now, mtu) };
            self.round.ends_with = largest_sent;
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.packet = new_mtu.into();
    }

    fn window(&self) -> u64 {
        let wanted = match self.phase {
            Phase::Startup(_) => self.under_way(STARTUP_GAIN),
            Phase::Steady => self.under_way(GAIN),
            // Half of what the path itself holds, of the newest rate: the best may be from before the path was full.
            Phase::Looking { .. } => {
                self.rates.back().zip(self.distance).map(|(rate, (d, _))| (rate * d.as_secs_f64() / 2.0) as u64)
            }
        };
        let wanted = wanted.unwrap_or(INITIAL_WINDOW);
        wanted.min(self.limit.unwrap_or(u64::MAX)).max(LEAST_PACKETS * self.packet)
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
#[path = "congestion_tests.rs"]
mod tests;
