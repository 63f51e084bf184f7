//! One direction of a long link, as a state machine: a bottleneck with a queue before it, random loss, and a delay.
//!
//! Read first: [`Path::offer`].

use std::time::{Duration, Instant};

/// A sender that was not let on the CPU in time catches up with so much of its rate.
const BURST: Duration = Duration::from_millis(2);

/// What a direction is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes a second, headers of IP and UDP or TCP included; none: as fast as packets come.
    pub rate: Option<f64>,
    /// From the bottleneck to the other end.
    pub delay: Duration,
    /// Of all packets that the bottleneck lets through, the part that is lost.
    pub loss: f64,
    /// Bytes that wait before the bottleneck; what does not fit is dropped, the last to come first.
    pub queue: u64,
    /// Larger packets are dropped, as a path drops them that may not fragment.
    pub largest: usize,
}

/// What became of packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Passed on.
    pub packets: u64,
    /// Passed on.
    pub bytes: u64,
    /// Lost at random.
    pub lost: u64,
    /// The queue was full.
    pub dropped: u64,
    /// Larger than the path takes.
    pub too_large: u64,
}

/// One direction.
#[derive(Debug)]
pub struct Path {
    shape: Shape,
    random: u64,
    /// When the bottleneck has sent all that it has taken.
    free_at: Instant,
    counts: Counts,
}

impl Path {
    /// Empty.
    pub fn new(shape: Shape, seed: u64, now: Instant) -> Self {
        Self { shape, random: seed, free_at: now, counts: Counts::default() }
    }

    /// A packet comes; when it arrives at the other end, if it does. Later packets never arrive earlier.
    pub fn offer(&mut self, now: Instant, len: usize) -> Option<Instant> {
        if len > self.shape.largest {
            self.counts.too_large += 1;
            return None;
        }
        let left = match self.shape.rate {
            None => now,
            Some(rate) => {
                let waits = self.free_at.saturating_duration_since(now);
                if waits.as_secs_f64() * rate + len as f64 > self.shape.queue as f64 {
                    self.counts.dropped += 1;
                    return None;
                }
                let earliest = now.checked_sub(BURST).unwrap_or(now);
                self.free_at = self.free_at.max(earliest) + Duration::from_secs_f64(len as f64 / rate);
                self.free_at.max(now)
            }
        };
        if self.draw() < self.shape.loss {
            self.counts.lost += 1;
            return None;
        }
        self.counts.packets += 1;
        self.counts.bytes += len as u64;
        Some(left + self.shape.delay)
    }

    /// What became of packets so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// From 0 to 1: splitmix64.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as f64 / u64::MAX as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { rate: Some(1e6), delay: Duration::from_millis(10), loss: 0.0, queue: 100_000, largest: 1500 };

    #[test]
    fn a_full_queue_drops_and_the_rate_is_kept() {
        let start = Instant::now();
        let mut path = Path::new(SHAPE, 1, start);
        let arrivals: Vec<Instant> = (0..200).filter_map(|_| path.offer(start, 1000)).collect();
        assert_eq!((arrivals.len(), path.counts().dropped), (100, 100));
        assert!(arrivals.is_sorted());
        let last = *arrivals.last().expect("some") - start;
        assert!((109..=111).contains(&last.as_millis()), "100 KB at 1 MB/s and 10 ms: {last:?}");
        assert_eq!(path.offer(start, 1501), None);
        // Once it is empty there is room again.
        assert!(path.offer(start + Duration::from_millis(200), 1000).is_some());
    }

    #[test]
    fn loss_is_what_was_asked_for_and_the_same_for_a_seed() {
        let lost = |seed| {
            let start = Instant::now();
            let mut path = Path::new(Shape { rate: None, loss: 0.01, ..SHAPE }, seed, start);
            let passed = (0..100_000).filter(|_| path.offer(start, 1000).is_some()).count() as u64;
            assert_eq!(passed, path.counts().packets);
            path.counts().lost
        };
        assert!((900..1100).contains(&lost(7)), "{}", lost(7));
        assert_eq!(lost(7), lost(7));
        assert_ne!(lost(7), lost(8));
    }
}
