//! A bottleneck, and flows over it that do what quinn does, in quinn's order: acknowledgements, their end, then what is
//! lost, then probes, then sending; and who had nothing more to send says so with the next acknowledgements.

use super::*;

const PACKET: u64 = 1500;
const TICK: Duration = Duration::from_micros(500);
/// As quinn's `max_ack_delay`.
const ACK_DELAY: Duration = Duration::from_millis(25);
const EVER: u64 = u64::MAX / 2;

#[derive(Clone)]
struct Line {
    /// Bytes a second.
    rate: f64,
    round_trip: Duration,
    /// Of all packets.
    loses: f64,
    /// Bytes.
    queue: f64,
    is_cut: bool,
    now: Instant,
    free_at: Instant,
    packets: u64,
    dropped: u64,
    random: u64,
}

struct Flow {
    controller: Bbr,
    /// Bytes that the application and flow control let be under way.
    send_window: u64,
    number: u64,
    largest_acked: u64,
    /// Not yet acknowledged nor lost: number, and when it was sent.
    sent: VecDeque<(u64, Instant)>,
    /// When the acknowledgement comes, and of what.
    acks: VecDeque<(Instant, u64)>,
    round_trip: Duration,
    variance: Duration,
    last_sent: Instant,
    probes: u32,
    /// What the pacer lets go.
    tokens: f64,
    is_idle: bool,
    arrived: u64,
}

impl Line {
    /// The queue is in round trips.
    fn new(rate: f64, round_trip: Duration, queue: f64) -> Self {
        let now = Instant::now();
        let queue = rate * round_trip.as_secs_f64() * queue;
        let (loses, random) = (0.0, 1);
        Self { rate, round_trip, loses, queue, is_cut: false, now, free_at: now, packets: 0, dropped: 0, random }
    }

    fn flow(&self) -> Flow {
        Flow {
            controller: Bbr::new(self.now, PACKET as u16),
            send_window: EVER,
            number: 0,
            largest_acked: 0,
            sent: VecDeque::new(),
            acks: VecDeque::new(),
            round_trip: self.round_trip,
            variance: self.round_trip / 2,
            last_sent: self.now,
            probes: 0,
            tokens: 0.0,
            is_idle: false,
            arrived: 0,
        }
    }

    /// Lets time pass; gives how much of the line each flow had.
    fn run(&mut self, flows: &mut [Flow], time: Duration) -> Vec<f64> {
        let (end, before) = (self.now + time, flows.iter().map(|f| f.arrived).collect::<Vec<_>>());
        while self.now < end {
            self.now += TICK;
            for flow in &mut *flows {
                flow.hear(self.now);
                flow.lose(self.now);
                flow.probe(self);
                flow.pace();
            }
            // In turns, as packets of two senders come to one router.
            while flows.iter_mut().fold(false, |is_any, flow| flow.send(self) | is_any) {}
        }
        flows.iter().zip(before).map(|(f, b)| (f.arrived - b) as f64 / time.as_secs_f64() / self.rate).collect()
    }

    fn run_one(&mut self, flow: &mut Flow, time: Duration) -> f64 {
        self.run(std::slice::from_mut(flow), time)[0]
    }

    /// When the acknowledgement of a packet comes.
    fn carry(&mut self) -> Option<Instant> {
        self.packets += 1;
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let waits = self.free_at.saturating_duration_since(self.now).as_secs_f64() * self.rate;
        if self.is_cut || waits + PACKET as f64 > self.queue {
            self.dropped += 1;
            return None;
        }
        self.free_at = self.free_at.max(self.now) + Duration::from_secs_f64(PACKET as f64 / self.rate);
        let is_lost = ((self.random >> 33) as f64) < self.loses * (1u64 << 31) as f64;
        (!is_lost).then_some(self.free_at + self.round_trip)
    }
}

impl Flow {
    fn in_flight(&self) -> u64 {
        self.sent.len() as u64 * PACKET
    }

    fn hear(&mut self, now: Instant) {
        let mut newest = None;
        let mut is_any = false;
        while let Some((_, number)) = self.acks.pop_front_if(|ack| ack.0 <= now) {
            let Ok(at) = self.sent.binary_search_by_key(&number, |packet| packet.0) else { continue };
            let (_, sent) = self.sent.remove(at).expect("it was found");
            self.arrived += PACKET;
            // What `on_ack` calls: quinn's `RttEstimator` cannot be made here.
            self.controller.acked(now, sent, PACKET, self.is_idle);
            is_any = true;
            if number > self.largest_acked {
                (self.largest_acked, newest) = (number, Some(now - sent));
            }
        }
        if is_any {
            self.controller.on_end_acks(now, self.in_flight(), self.is_idle, Some(self.largest_acked));
            self.probes = 0;
        }
        if let Some(newest) = newest {
            self.variance = (self.variance * 3 + newest.abs_diff(self.round_trip)) / 4;
            self.round_trip = (self.round_trip * 7 + newest) / 8;
        }
    }

    fn probe_timeout(&self) -> Duration {
        self.round_trip + self.variance * 4 + ACK_DELAY
    }

    /// By three newer packets or by time; persistent congestion as RFC 9002, 7.6.
    fn lose(&mut self, now: Instant) {
        let (mut lost, mut is_persistent) = (0, false);
        let mut began: Option<(u64, Instant)> = None;
        while let Some(&(number, sent)) = self.sent.front() {
            let is_old = now - sent >= self.round_trip * 9 / 8;
            if number >= self.largest_acked || !(is_old || number + 3 <= self.largest_acked) {
                break;
            }
            self.sent.pop_front();
            began =
                began.filter(|(last, _)| last + 1 == number).map_or(Some((number, sent)), |(_, at)| Some((number, at)));
            is_persistent |= began.is_some_and(|(_, at)| sent - at > self.probe_timeout() * 3);
            lost += PACKET;
        }
        if lost > 0 {
            self.controller.on_congestion_event(now, now, is_persistent, lost);
        }
    }

    fn probe(&mut self, line: &mut Line) {
        if !self.sent.is_empty() && line.now - self.last_sent > self.probe_timeout() * (1 << self.probes) {
            self.probes += 1;
            self.transmit(line);
            self.transmit(line);
        }
    }

    /// A bucket of two milliseconds, filled with 1.25 windows a round trip.
    fn pace(&mut self) {
        let window = self.controller.window() as f64;
        let ticks = TICK.as_secs_f64() / self.round_trip.as_secs_f64();
        let most = (window * ticks * 4.0).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
        self.tokens = (self.tokens + window * 1.25 * ticks).min(most);
    }

    fn send(&mut self, line: &mut Line) -> bool {
        let next = self.in_flight() + PACKET;
        let is_held = next >= self.controller.window() || self.tokens < PACKET as f64;
        self.is_idle = next > self.send_window;
        if is_held || self.is_idle {
            return false;
        }
        self.tokens -= PACKET as f64;
        self.transmit(line);
        true
    }

    fn transmit(&mut self, line: &mut Line) {
        (self.number, self.last_sent) = (self.number + 1, line.now);
        self.sent.push_back((self.number, line.now));
        self.controller.on_sent(line.now, PACKET, self.number);
        if let Some(at) = line.carry() {
            self.acks.push_back((at, self.number));
        }
    }
}

const SECONDS: Duration = Duration::from_secs(4);

fn far() -> Line {
    Line::new(50e6, Duration::from_millis(50), 1.0)
}

#[test]
fn a_line_is_filled_and_its_queue_is_not_overflowed() {
    let mut line = far();
    let mut flows = [line.flow()];
    line.run(&mut flows, SECONDS);
    let (rates, dropped) = (line.run(&mut flows, SECONDS), line.dropped);
    assert!(rates[0] > 0.95, "{rates:?}");
    assert!(dropped * 20 < line.packets, "{dropped} of {}", line.packets);
    let packets = line.packets;
    line.run(&mut flows, SECONDS);
    assert!((line.dropped - dropped) * 1000 < line.packets - packets, "only the beginning may overflow");
}

#[test]
fn random_loss_does_not_slow_it_down() {
    for loses in [1000, 100, 40] {
        let mut line = Line { loses: 1.0 / f64::from(loses), ..far() };
        let mut flows = [line.flow()];
        line.run(&mut flows, SECONDS);
        let rates = line.run(&mut flows, SECONDS * 3);
        assert!(rates[0] > 0.9, "one of {loses} lost: {rates:?}");
    }
}

#[test]
fn two_share_and_do_not_drown_each_other() {
    let mut line = far();
    let mut flows = vec![line.flow()];
    line.run(&mut flows, SECONDS);
    flows.push(line.flow());
    line.run(&mut flows, SECONDS * 5);
    let (dropped, packets) = (line.dropped, line.packets);
    let rates = line.run(&mut flows, SECONDS * 5);
    assert!(rates.iter().all(|r| *r > 0.2), "{rates:?}");
    assert!(rates.iter().sum::<f64>() > 0.9, "{rates:?}");
    let (dropped, packets) = (line.dropped - dropped, line.packets - packets);
    assert!(dropped * 50 < packets, "{dropped} of {packets}");
}

#[test]
fn a_line_that_changes_is_followed() {
    let mut line = far();
    let mut flows = [line.flow()];
    line.run(&mut flows, SECONDS);
    // Half as fast, with the queue that belongs to that: what was known of the rate must be forgotten.
    (line.rate, line.queue) = (line.rate / 2.0, line.queue / 2.0);
    line.run(&mut flows, SECONDS);
    let (dropped, packets) = (line.dropped, line.packets);
    let rates = line.run(&mut flows, SECONDS);
    assert!(rates[0] > 0.9, "{rates:?}");
    assert!((line.dropped - dropped) * 50 < line.packets - packets, "{} of {packets}", line.dropped - dropped);
    // Fast again, and twice as far.
    (line.rate, line.queue, line.round_trip) = (line.rate * 2.0, line.queue * 4.0, line.round_trip * 2);
    line.run(&mut flows, SECONDS * 5);
    let rates = line.run(&mut flows, SECONDS * 5);
    assert!(rates[0] > 0.85, "{rates:?}");
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// 40 Mbit/s, 50 ms; slow enough to try much.
fn slow() -> Line {
    Line::new(5e6, ms(50), 1.0)
}

const DEEP: f64 = 1e4;

#[test]
fn a_pause_of_the_line_is_forgotten() {
    for loses in [0.0, 0.02] {
        for pause in [20, 50, 100, 200, 400, 1000, 3000] {
            let mut line = Line { loses, ..slow() };
            let mut flow = line.flow();
            line.run_one(&mut flow, ms(5000));
            line.is_cut = true;
            line.run_one(&mut flow, ms(pause));
            line.is_cut = false;
            let soon = if pause <= 200 { 600 } else { 2500 };
            line.run_one(&mut flow, ms(soon));
            let rate = line.run_one(&mut flow, ms(1000));
            assert!(rate > 0.9, "{rate} of the line {soon} ms after a pause of {pause} ms, {loses} lost");
            // And the limit is lifted, although single packets are lost.
            line.run_one(&mut flow, ms(1000));
            let rate = line.run_one(&mut flow, ms(5000));
            assert!(rate > 0.92, "{rate} in the time after a pause of {pause} ms, {loses} lost");
            assert!(loses > 0.0 || flow.controller.limit.is_none(), "limited for ever after {pause} ms");
        }
    }
}

/// What was known is of another time: begin with few, and grow by what arrives.
#[test]
fn after_persistent_congestion_it_begins_small() {
    let mut line = slow();
    let mut flow = line.flow();
    line.run_one(&mut flow, ms(5000));
    (line.rate, line.queue) = (line.rate / 20.0, line.queue / 20.0);
    line.run_one(&mut flow, ms(1000));
    flow.controller.on_congestion_event(line.now, line.now, true, PACKET);
    assert_eq!(flow.controller.window(), LEAST_PACKETS * PACKET);
    // Never much more than fits: 12.5 KB.
    for _ in 0..100 {
        line.run_one(&mut flow, ms(10));
        assert!(flow.controller.window() < INITIAL_WINDOW / 3, "{}", flow.controller.window());
    }
    line.run_one(&mut flow, ms(1500));
    assert!(line.run_one(&mut flow, ms(1000)) > 0.9);
}

#[test]
fn what_is_begun_with_counts_until_a_rate_is_known() {
    let mut line = Line::new(0.25e6, ms(50), DEEP);
    let mut flow = line.flow();
    for _ in 0..3000 {
        line.run_one(&mut flow, ms(1));
        let (rate, window) = (flow.controller.rate(), flow.controller.window());
        assert!(if rate > 0.0 { window < INITIAL_WINDOW / 2 } else { window == INITIAL_WINDOW }, "{window} for {rate}");
    }
}

#[test]
fn looking_for_the_distance_forgets_no_rate() {
    let mut line = Line::new(20e6, ms(10), 1.0);
    let mut flow = line.flow();
    line.run_one(&mut flow, ms(1000));
    let mut looked = 0;
    for _ in 0..12_000 {
        line.run_one(&mut flow, ms(1));
        looked += u32::from(matches!(flow.controller.phase, Phase::Looking { .. }));
        assert!(flow.controller.rate() > 0.9 * line.rate, "{} after {looked} ms", flow.controller.rate());
    }
    assert!(looked > 100 && looked < 500, "{looked} ms");
}

#[test]
fn a_mark_lowers_a_full_window_and_not_an_idle_one() {
    for (packets, expected) in [(2, 0.99), (EVER / PACKET, 0.8)] {
        let mut line = slow();
        let mut flow = line.flow();
        line.run_one(&mut flow, ms(5000));
        flow.send_window = packets * PACKET;
        line.run_one(&mut flow, ms(500));
        let before = flow.controller.window() as f64;
        flow.controller.on_congestion_event(line.now, line.now, false, 0);
        line.run_one(&mut flow, ms(100));
        let after = flow.controller.window() as f64 / before;
        assert!((after - expected).abs() < 0.1, "{after} of the window left, with {packets} packets to send");
        flow.send_window = EVER;
        line.run_one(&mut flow, ms(500));
        assert!(line.run_one(&mut flow, ms(1000)) > 0.95);
    }
}

/// With a queue as deep as it likes and one of a round trip; held by the controller, and by a send window.
#[test]
fn a_line_that_becomes_slow_is_not_flooded() {
    for slower in [5.0, 10.0, 20.0] {
        for queue in [1.0, DEEP] {
            // The last is held by the send window in every round, before and after.
            for send_window in [EVER, 1_600_000, 370_000] {
                let what = format!("{slower} times slower, queue {queue}, send window {send_window}");
                let mut line = Line::new(5e6, ms(50), queue);
                let mut flow = line.flow();
                flow.send_window = send_window;
                line.run_one(&mut flow, ms(6000));
                (line.rate, line.queue) = (line.rate / slower, line.queue / slower);
                line.run_one(&mut flow, if queue == DEEP { ms(16_000) } else { ms(4000) });
                let (packets, dropped) = (line.packets, line.dropped);
                let rate = line.run_one(&mut flow, ms(5000));
                assert!(rate > 0.9, "{rate}: {what}");
                assert!(flow.round_trip < ms(120), "{:?} on the way: {what}", flow.round_trip);
                assert!((line.dropped - dropped) * 50 < line.packets - packets, "{}: {what}", line.dropped - dropped);
            }
        }
    }
}

#[test]
fn near_and_far_fast_and_slow() {
    // Bytes a second, round trip, queue in round trips; filled from when on, and then no longer a round trip than.
    for (rate, round_trip, queue, from, longest) in [
        (5e6, 2, DEEP, 500, 12),
        (5e6, 600, 1.0, 8000, 1000),
        (50e6, 150, 1.0, 2000, 240),
        // 64 kbit/s: what is begun with waits for half a minute, but only once.
        (8e3, 300, DEEP, 42_000, 2500),
        (8e3, 600, 13.0, 20_000, 2500),
    ] {
        let mut line = Line::new(rate, ms(round_trip), queue);
        let mut flow = line.flow();
        line.run_one(&mut flow, ms(from));
        assert!(flow.round_trip < ms(longest), "{:?} at first for {rate} B/s, {round_trip} ms", flow.round_trip);
        // Long enough that the distance is looked for again and again.
        let had = line.run_one(&mut flow, ms(if rate > 10e6 { 12_000 } else { 60_000 }));
        assert!(had > 0.9, "{had} of {rate} B/s, {round_trip} ms");
        assert!(flow.round_trip < ms(longest), "{:?} for {rate} B/s, {round_trip} ms", flow.round_trip);
    }
}

#[test]
fn a_path_that_becomes_longer_is_filled() {
    for times in [2, 4, 8] {
        let mut line = slow();
        let mut flow = line.flow();
        line.run_one(&mut flow, ms(6000));
        (line.round_trip, line.queue) = (line.round_trip * times, line.queue * f64::from(times));
        line.run_one(&mut flow, ms(2500) + line.round_trip * 12);
        let rate = line.run_one(&mut flow, ms(4000));
        assert!(rate > 0.9, "{times} times as far: {rate}");
    }
}

/// Little is said at first, and the answers wait for `ACK_DELAY`: that is neither a queue nor a slow path.
#[test]
fn a_quiet_beginning_says_nothing() {
    let mut line = slow();
    let mut flow = line.flow();
    flow.send_window = PACKET;
    line.run_one(&mut flow, ms(200));
    line.round_trip += ACK_DELAY;
    line.run_one(&mut flow, ms(1000));
    line.round_trip -= ACK_DELAY;
    assert_eq!(flow.controller.window(), INITIAL_WINDOW);
    flow.send_window = EVER;
    line.run_one(&mut flow, ms(250));
    let rate = line.run_one(&mut flow, ms(500));
    assert!(rate > 0.95, "{rate}");
}

/// Who is held by something else in all rounds does not lose what it knows, and has it when no longer held.
#[test]
fn a_send_window_below_what_the_path_holds() {
    let mut line = slow();
    let mut flow = line.flow();
    line.run_one(&mut flow, ms(3000));
    flow.send_window = 50_000;
    let had = line.run_one(&mut flow, ms(20_000));
    assert!(had > 0.18, "{had}");
    flow.send_window = EVER;
    let had = line.run_one(&mut flow, ms(500));
    assert!(had > 0.9, "{had}");
}

#[test]
fn larger_packets() {
    let line = slow();
    let mut controller = line.flow().controller;
    controller.on_congestion_event(line.now, line.now, true, PACKET);
    controller.on_mtu_update(9000);
    assert_eq!(controller.window(), LEAST_PACKETS * 9000);
}

#[test]
fn flows_become_equal() {
    for (queue, flows) in [(0.25, 2), (0.5, 2), (1.0, 2), (2.0, 2)] {
        let mut line = Line::new(5e6, ms(50), queue);
        let mut flows: Vec<Flow> = (0..flows).map(|_| line.flow()).collect();
        // The last comes when the others have everything.
        let last = flows.len() - 1;
        line.run(&mut flows[..last], ms(4000));
        line.run(&mut flows, ms(20_000));
        let (packets, dropped) = (line.packets, line.dropped);
        let rates = line.run(&mut flows, ms(40_000));
        let fair = 1.0 / flows.len() as f64;
        assert!(rates.iter().all(|rate| *rate > 0.6 * fair), "{rates:.2?} with a queue of {queue}");
        assert!((line.dropped - dropped) * 50 < line.packets - packets, "{} with {queue}", line.dropped - dropped);
    }
}
