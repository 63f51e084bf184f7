use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use backhaul_protocol::wire::message::CloseCode;

use super::*;
use crate::error::TransportError;
use crate::link::{ReceiveHalf, SendHalf};

const MIB: u64 = 1 << 20;

#[test]
fn names_of_congestion_control() {
    for congestion in [Congestion::Bbr, Congestion::Cubic] {
        assert_eq!(congestion.as_str().parse(), Ok(congestion));
    }
    for bad in ["", "BBR", "reno", "bbr "] {
        assert!(bad.parse::<Congestion>().is_err(), "{bad}");
    }
}

/// What a path of this length asks for that carries a window in each round trip, look after look.
fn windows(round_trip: Duration, most_per_second: u64) -> Vec<u32> {
    let (start, mut grants) = (Instant::now(), Unshared::default());
    let (mut window, mut bytes, mut demand) = (Windows::BLOCKS.receive, 0, Demand::new(start));
    (1..=20u32)
        .map(|look| {
            let rate = (f64::from(window) / round_trip.as_secs_f64()).min(most_per_second as f64);
            bytes += (rate * BUSY.as_secs_f64()) as u64;
            if let Some(more) = grants.receive(demand.window(start + BUSY * look, round_trip, bytes)) {
                assert!(more > window, "it never shrinks: {more}");
                window = more;
            }
            window
        })
        .collect()
}

#[test]
fn windows_grow_on_a_long_path_and_stay_on_a_short_one() {
    let gigabit = 125_000_000;
    let far = windows(Duration::from_millis(50), gigabit);
    assert_eq!(far[1], Windows::MOST.receive, "at once: {far:?}");
    let near = windows(Duration::from_micros(500), 8 * gigabit);
    assert!(near.iter().all(|w| *w == Windows::BLOCKS.receive), "I12: {near:?}");
    let slow = windows(Duration::from_millis(200), gigabit / 100);
    assert!(slow.iter().all(|w| *w == Windows::BLOCKS.receive), "I12: {slow:?}");
    let farthest = windows(Duration::from_secs(2), gigabit);
    assert!(farthest.iter().all(|w| *w <= Windows::MOST.receive), "I12: {farthest:?}");
}

#[test]
fn a_queue_is_no_distance() {
    let start = Instant::now();
    let mut demand = Demand::new(start);
    demand.window(start + BUSY, Duration::from_millis(1), MIB);
    // The same path, with half a second of packets that wait for our own CPU.
    let wanted = demand.window(start + BUSY * 2, Duration::from_millis(500), 11 * MIB);
    assert!(u64::from(wanted) < MIB, "{wanted}");
}

#[test]
fn a_path_is_full_when_its_window_is() {
    let (second, window) = (Duration::from_secs(1), 8 * MIB);
    let look = |sent, round_trip| Traffic { round_trip: Duration::from_millis(round_trip), received: 0, sent, window };
    let before = look(7 * MIB, 50);
    // 160 MiB a second have 8 MiB under way in 50 ms.
    assert!(look((7 + 160) * MIB, 50).filled_since(&before, second));
    assert!(look((7 + 110) * MIB, 75).filled_since(&before, second), "a queue is under way too");
    assert!(!look((7 + 110) * MIB, 50).filled_since(&before, second), "an end is too slow");
    assert!(!look((7 + 1000) * MIB, 1).filled_since(&before, second), "a short path");
    assert!(!before.filled_since(&before, Duration::ZERO), "nothing was sent");
}

/// A link that carries so much each time it is looked at.
struct Far {
    looks: AtomicU64,
    allowed: AtomicU32,
    kept: AtomicU32,
}

#[async_trait]
impl Link for Far {
    async fn open_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        std::future::pending().await
    }
    async fn accept_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        std::future::pending().await
    }
    async fn open_blocks(&self) -> Result<Box<dyn SendHalf>, TransportError> {
        std::future::pending().await
    }
    async fn accept_blocks(&self) -> Result<Box<dyn ReceiveHalf>, TransportError> {
        std::future::pending().await
    }
    fn allow(&self, bytes: u32) {
        self.allowed.store(bytes, Ordering::Relaxed);
    }
    fn keep(&self, bytes: u32) {
        self.kept.store(bytes, Ordering::Relaxed);
    }
    fn traffic(&self) -> Option<Traffic> {
        let received = (self.looks.fetch_add(1, Ordering::Relaxed) + 1) * 16 * MIB;
        Some(Traffic { round_trip: Duration::from_millis(100), received, sent: 0, window: 0 })
    }
    fn close(&self, _code: CloseCode, _text: &str) {}
    fn close_reason(&self) -> Option<TransportError> {
        None
    }
    async fn closed(&self) {
        std::future::pending().await
    }
    async fn goodbye(&self) {}
}

#[tokio::test]
async fn a_connection_is_followed_for_as_long_as_somebody_has_it() {
    let far = Arc::new(Far { looks: 0.into(), allowed: 0.into(), kept: 0.into() });
    let link: Arc<dyn Link> = far.clone();
    let weak: Weak<dyn Link> = Arc::downgrade(&link);
    drop(link);
    let mut grants = Unshared::default();
    let following = follow(weak, &mut grants);
    let looking = async {
        while far.looks.load(Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let set = [&far.allowed, &far.kept].map(|w| w.load(Ordering::Relaxed));
        drop(far);
        set
    };
    let patience = Duration::from_secs(20);
    let ((), set) = tokio::time::timeout(patience, async { tokio::join!(following, looking) })
        .await
        .expect("it ends when nobody has the connection");
    assert_eq!(set, [Windows::MOST.receive, 0], "what comes asks for a window, and nothing goes");
}
