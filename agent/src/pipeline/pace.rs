//! How hard blocks are compressed: as hard as costs no time.
//!
//! Read first: [`Compression`], then `Pace::worked` and `decide`. Threads tell how long they worked and how long they waited for the
//! sender. Where they wait because the path is full, time is left to make blocks smaller, and more blocks go through the
//! same path; where they do not wait, compressing is what takes the time, and less of it is done.

use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backhaul_protocol::record::Effort;
use backhaul_transport::link::Link;
use backhaul_transport::tuning::Traffic;

/// As it is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compression {
    /// At least level 1, which keeps what is stored small, and more where the path is what takes the time.
    #[default]
    Auto,
    /// As `Auto`, but nothing at all where the path takes more than can be compressed.
    Fast,
    /// Always the same.
    Fixed(Effort),
}

impl Compression {
    /// A zstd level that may be set.
    pub fn level(level: i32) -> Result<Self, String> {
        if (-7..=19).contains(&level) {
            Ok(Self::Fixed(Effort::Level(level)))
        } else {
            Err(format!("compression = {level}: want \"auto\", \"fast\", \"none\" or from -7 to 19"))
        }
    }

    /// The rungs of the ladder that may be stood on.
    fn rungs(self) -> &'static [Rung] {
        match self {
            Self::Auto => &LADDER[1..],
            Self::Fast => LADDER,
            Self::Fixed(_) => &[],
        }
    }
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fast => f.write_str("fast"),
            Self::Fixed(Effort::None) => f.write_str("none"),
            Self::Fixed(Effort::Level(level)) => write!(f, "{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "fast" => Ok(Self::Fast),
            "none" => Ok(Self::Fixed(Effort::None)),
            other => Err(format!("compression = \"{other}\": want \"auto\", \"fast\", \"none\" or a zstd level")),
        }
    }
}

struct Rung {
    effort: Effort,
    /// What a thread does for one block, reading and hashing included; the first level is 1.
    cost: f64,
}

/// Measured with blocks of 64 KiB of a mixed volume, of which level 1 leaves 0.395: level 4 leaves 0.378 and level 6
/// 0.366; those between are no better than one of these, and those above leave no less.
const LADDER: &[Rung] = &[
    Rung { effort: Effort::None, cost: 0.3 },
    Rung { effort: Effort::Level(1), cost: 1.0 },
    Rung { effort: Effort::Level(4), cost: 1.3 },
    Rung { effort: Effort::Level(6), cost: 3.5 },
];

/// Threads are looked at this often, in their own time.
const LOOK: Duration = Duration::from_millis(200);
/// Threads may be busy for so much of the time after a step up: blocks differ.
const BUSY: f64 = 0.8;
/// Threads that wait for less than this are what takes the time.
const WAITING: f64 = 0.1;

/// What the threads of one round share.
pub struct Pace {
    compression: Compression,
    link: Option<Arc<dyn Link>>,
    rung: AtomicUsize,
    seen: Mutex<Seen>,
}

struct Seen {
    at: Instant,
    traffic: Option<Traffic>,
    worked: Duration,
    waited: Duration,
}

impl Pace {
    /// For blocks that go over `link`; without one nothing changes.
    pub fn new(compression: Compression, link: Option<Arc<dyn Link>>) -> Self {
        let traffic = link.as_ref().and_then(|l| l.traffic());
        let seen = Seen { at: Instant::now(), traffic, worked: Duration::ZERO, waited: Duration::ZERO };
        Self { compression, link, rung: AtomicUsize::new(0), seen: Mutex::new(seen) }
    }

    /// What to do to the next block.
    pub fn effort(&self) -> Effort {
        match self.compression {
            Compression::Fixed(effort) => effort,
            auto => auto.rungs()[self.rung.load(Ordering::Relaxed)].effort,
        }
    }

    /// A thread has worked for so long, and waited for the sender.
    pub fn worked(&self, worked: Duration, waited: Duration) {
        let (Some(link), false) = (&self.link, self.compression.rungs().is_empty()) else { return };
        // Whoever finds it taken is heard the next time.
        let Ok(mut seen) = self.seen.try_lock() else { return };
        seen.worked += worked;
        seen.waited += waited;
        let elapsed = seen.at.elapsed();
        if elapsed < LOOK {
            return;
        }
        let traffic = link.traffic();
        let is_full = matches!((&seen.traffic, &traffic), (Some(a), Some(b)) if b.filled_since(a, elapsed));
        let waiting = seen.waited.as_secs_f64() / (seen.worked + seen.waited).as_secs_f64().max(1e-9);
        let rung = self.rung.load(Ordering::Relaxed);
        self.rung.store(decide(self.compression.rungs(), rung, waiting, is_full), Ordering::Relaxed);
        *seen = Seen { at: Instant::now(), traffic, worked: Duration::ZERO, waited: Duration::ZERO };
    }
}

impl std::fmt::Debug for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pace").field("compression", &self.compression).field("effort", &self.effort()).finish()
    }
}

/// The next rung, from the share of time that threads wait and whether the path is full.
fn decide(rungs: &[Rung], rung: usize, waiting: f64, is_full: bool) -> usize {
    let then = rungs.get(rung + 1).map(|next| (1.0 - waiting) * next.cost / rungs[rung].cost);
    match then {
        Some(busy) if is_full && busy < BUSY => rung + 1,
        _ if waiting < WAITING => rung.saturating_sub(1),
        _ => rung,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that takes so many blocks while threads can do one at level 1: where the ladder leads.
    fn settles(compression: Compression, path: f64) -> Effort {
        let rungs = compression.rungs();
        let mut rung = 0;
        let mut seen = Vec::new();
        for _ in 0..50 {
            let busy = (path * rungs[rung].cost).min(1.0);
            rung = decide(rungs, rung, 1.0 - busy, busy < 1.0);
            seen.push(rung);
        }
        assert!(seen[10..].windows(2).all(|w| w[0] == w[1]), "to and fro: {seen:?}");
        rungs[rung].effort
    }

    #[test]
    fn harder_where_the_path_takes_less() {
        use Compression::{Auto, Fast};
        let of = |path| [settles(Auto, path), settles(Fast, path)];
        assert_eq!(of(0.1), [Effort::Level(6); 2]);
        assert_eq!(of(0.4), [Effort::Level(4); 2]);
        assert_eq!(of(0.7), [Effort::Level(1); 2]);
        assert_eq!(of(2.0), [Effort::Level(1), Effort::None]);
        assert_eq!(of(10.0), [Effort::Level(1), Effort::None]);
    }

    #[test]
    fn who_waits_for_the_receiver_does_not_work_harder() {
        assert_eq!(decide(LADDER, 1, 0.9, false), 1);
        assert_eq!(decide(LADDER, 1, 0.9, true), 2);
        assert_eq!(decide(LADDER, 3, 0.0, true), 2, "blocks that cost more than before");
    }

    #[test]
    fn names() {
        for text in ["auto", "fast", "none"] {
            assert_eq!(text.parse::<Compression>().expect(text).to_string(), text);
        }
        assert!(["", "1", "Auto", "lz4"].iter().all(|bad| bad.parse::<Compression>().is_err()));
        assert!([-8, 20, i32::MIN, i32::MAX].into_iter().all(|bad| Compression::level(bad).is_err()));
        assert_eq!(Compression::level(-7).expect("may be set").to_string(), "-7");
    }
}
