use super::*;

const PACKET: u64 = 1500;
const TICK: Duration = Duration::from_micros(500);

/// A bottleneck with a queue of one round trip, and one flow or two over it.
struct Line {
    /// Bytes a second.
    rate: f64,
    round_trip: Duration,
    /// Every so many packets one is lost.
    loses: Option<u64>,
    queue: f64,
    now: Instant,
    free_at: Instant,
    packets: u64,
    dropped: u64,
}

struct Flow {
    controller: Bbr,
    in_flight: u64,
    number: u64,
    /// When its end is known, when it was sent, its number, and whether it arrived.
    under_way: VecDeque<(Instant, Instant, u64, bool)>,
    arrived: u64,
}

impl Line {
    fn new(rate: f64, round_trip: Duration) -> Self {
        let now = Instant::now();
        let queue = rate * round_trip.as_secs_f64();
        Self { rate, round_trip, loses: None, queue, now, free_at: now, packets: 0, dropped: 0 }
    }

    fn flow(&self) -> Flow {
        let controller = Bbr::new(self.now, PACKET as u16);
        Flow { controller, in_flight: 0, number: 0, under_way: VecDeque::new(), arrived: 0 }
    }

    /// Lets time pass; gives the bytes a second that each flow had.
    fn run(&mut self, flows: &mut [Flow], time: Duration) -> Vec<f64> {
        let (end, before) = (self.now + time, flows.iter().map(|f| f.arrived).collect::<Vec<_>>());
        while self.now < end {
            self.now += TICK;
            for flow in &mut *flows {
                self.hear(flow);
            }
            // In turns, as packets of two senders come to one router.
            loop {
                let mut is_sent = false;
                for flow in &mut *flows {
                    is_sent |= self.send(flow);
                }
                if !is_sent {
                    break;
                }
            }
        }
        flows.iter().zip(before).map(|(f, b)| (f.arrived - b) as f64 / time.as_secs_f64()).collect()
    }

    fn hear(&mut self, flow: &mut Flow) {
        let mut largest = None;
        while let Some((_, sent, number, is_there)) = flow.under_way.pop_front_if(|p| p.0 <= self.now) {
            flow.in_flight -= PACKET;
            if is_there {
                flow.arrived += PACKET;
                flow.controller.acked(self.now, sent, PACKET, false);
                largest = Some(number);
            } else {
                flow.controller.on_congestion_event(self.now, sent, false, PACKET);
            }
        }
        if largest.is_some() {
            flow.controller.on_end_acks(self.now, flow.in_flight, false, largest);
        }
    }

    fn send(&mut self, flow: &mut Flow) -> bool {
        if flow.in_flight + PACKET > flow.controller.window() {
            return false;
        }
        (flow.in_flight, flow.number, self.packets) = (flow.in_flight + PACKET, flow.number + 1, self.packets + 1);
        flow.controller.on_sent(self.now, PACKET, flow.number);
        let waits = self.free_at.saturating_duration_since(self.now).as_secs_f64() * self.rate;
        let fits = waits + PACKET as f64 <= self.queue;
        self.dropped += u64::from(!fits);
        if fits {
            self.free_at = self.free_at.max(self.now) + Duration::from_secs_f64(PACKET as f64 / self.rate);
        }
        let is_there = fits && self.loses.is_none_or(|n| !self.packets.is_multiple_of(n));
        flow.under_way.push_back((self.free_at.max(self.now) + self.round_trip, self.now, flow.number, is_there));
        true
    }
}

const SECONDS: Duration = Duration::from_secs(4);

fn far() -> Line {
    Line::new(50e6, Duration::from_millis(50))
}

#[test]
fn a_line_is_filled_and_its_queue_is_not_overflowed() {
    let mut line = far();
    let mut flows = [line.flow()];
    line.run(&mut flows, SECONDS);
    let (rates, dropped) = (line.run(&mut flows, SECONDS), line.dropped);
    assert!(rates[0] > 0.95 * line.rate, "{rates:?}");
    assert!(dropped * 20 < line.packets, "{dropped} of {}", line.packets);
    let packets = line.packets;
    line.run(&mut flows, SECONDS);
    assert!((line.dropped - dropped) * 1000 < line.packets - packets, "only the beginning may overflow");
}

#[test]
fn random_loss_does_not_slow_it_down() {
    for loses in [1000, 100, 40] {
        let mut line = Line { loses: Some(loses), ..far() };
        let mut flows = [line.flow()];
        line.run(&mut flows, SECONDS);
        let rates = line.run(&mut flows, SECONDS * 3);
        assert!(rates[0] > 0.9 * line.rate, "one of {loses} lost: {rates:?}");
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
    assert!(rates.iter().all(|r| *r > 0.2 * line.rate), "{rates:?}");
    assert!(rates.iter().sum::<f64>() > 0.9 * line.rate, "{rates:?}");
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
    assert!(rates[0] > 0.9 * line.rate, "{rates:?}");
    assert!((line.dropped - dropped) * 50 < line.packets - packets, "{} of {packets}", line.dropped - dropped);
    // Fast again, and twice as far.
    (line.rate, line.queue, line.round_trip) = (line.rate * 2.0, line.queue * 4.0, line.round_trip * 2);
    line.run(&mut flows, SECONDS * 5);
    let rates = line.run(&mut flows, SECONDS * 5);
    assert!(rates[0] > 0.85 * line.rate, "{rates:?}");
}
