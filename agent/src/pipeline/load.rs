//! How much is asked of the server: bytes per second that are sent and read, and how threads that scan rank.
//!
//! Read first: [`Load`], then [`Bucket::try_take`]. What happens while file systems are frozen is not held back, nor is
//! the thread that freezes: a freeze would last longer.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use backhaul_protocol::geometry::ByteOffset;
use backhaul_volume::priority::IoClass;
use backhaul_volume::{Volume, VolumeError};

use super::schedule::{Schedule, local_now};

/// What is asked at most.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Bytes of block records that are sent per second.
    pub send: Schedule,
    /// Bytes of volumes that are read per second; `None`: as many as go.
    pub read: Option<u64>,
    /// How threads that scan rank.
    pub priority: Priority,
}

/// How threads rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Priority {
    /// For processors, 0 to 19; never better than that of the process.
    pub nice: i32,
    /// For disks.
    pub io: IoClass,
}

impl Priority {
    /// Applies it to the calling thread. Where that is not allowed it ranks as the process does, and that is said.
    fn apply(self) {
        let nice = match rustix::process::getpriority_process(None) {
            Ok(own) if own < self.nice => rustix::process::setpriority_process(None, self.nice).map_err(Into::into),
            _ => Ok(()),
        };
        if let Err(error) = nice.and_then(|()| backhaul_volume::priority::of_this_thread(self.io)) {
            tracing::warn!(%error, "threads that scan rank as all others: nice and io can't be set");
        }
    }
}

/// A step of waiting at most: the rate may be another one then.
const STEP: Duration = Duration::from_millis(500);
/// What may go at once after a pause, in time: short beside what people look at, longer than timers are late.
const BURST: Duration = Duration::from_millis(200);

/// Bytes that may go. Who takes more than there are has the next one wait.
#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { level: 0.0, at: now }
    }

    /// Takes them, or says how long to wait and ask again. With no bound everything may go.
    fn try_take(&mut self, now: Instant, rate: Option<u64>, bytes: u64) -> Result<(), Duration> {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        let Some(rate) = rate else {
            self.level = 0.0;
            return Ok(());
        };
        let rate = rate as f64;
        self.level = (self.level + elapsed * rate).min(BURST.as_secs_f64() * rate);
        if self.level < 0.0 || rate == 0.0 {
            let wait = Duration::try_from_secs_f64(-self.level / rate).unwrap_or(STEP);
            return Err(wait.clamp(Duration::from_millis(1), STEP));
        }
        self.level -= bytes as f64;
        Ok(())
    }
}

#[derive(Debug)]
struct Counted {
    bucket: Mutex<Bucket>,
    bytes: AtomicU64,
}

impl Default for Counted {
    fn default() -> Self {
        Self { bucket: Mutex::new(Bucket::new(Instant::now())), bytes: AtomicU64::new(0) }
    }
}

impl Counted {
    fn try_take(&self, rate: Option<u64>, bytes: u64) -> Result<(), Duration> {
        let result = lock(&self.bucket).try_take(Instant::now(), rate, bytes);
        if result.is_ok() {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        result
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all rounds of a process share: limits that may be changed, and what went through.
#[derive(Debug, Default)]
pub struct Load {
    limits: RwLock<Limits>,
    sent: Counted,
    read: Counted,
}

impl Load {
    /// With these limits.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits: RwLock::new(limits), ..Self::default() })
    }

    /// Other limits from now on. Threads that scan already keep their rank until the round ends.
    pub fn set(&self, limits: Limits) {
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    fn limits<T>(&self, of: impl FnOnce(&Limits) -> T) -> T {
        of(&self.limits.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes of records that were let out.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.bytes.load(Ordering::Relaxed)
    }

    /// Bytes of volumes that were read, but for what is read while they are frozen.
    pub fn read_bytes(&self) -> u64 {
        self.read.bytes.load(Ordering::Relaxed)
    }

    /// Waits until so many bytes may be sent.
    pub async fn send(&self, bytes: u64) {
        loop {
            let rate = self.limits(|l| match l.send.windows.is_empty() {
                true => l.send.usual,
                false => l.send.rate(&local_now()),
            });
            match self.sent.try_take(rate, bytes) {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    /// To be called by each thread that scans.
    pub fn rank_this_thread(&self) {
        let priority = self.limits(|l| l.priority);
        if priority != Priority::default() {
            priority.apply();
        }
    }

    fn read(&self, bytes: u64) {
        while let Err(wait) = self.read.try_take(self.limits(|l| l.read), bytes) {
            std::thread::sleep(wait);
        }
    }
}

/// A volume that is read no faster than it may be.
pub struct Paced<V> {
    /// What is read.
    pub volume: V,
    /// How fast.
    pub load: Arc<Load>,
}

impl<V: Volume> Volume for Paced<V> {
    fn length(&self) -> u64 {
        self.volume.length()
    }
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        self.load.read(buf.len() as u64);
        self.volume.read_at(at, buf)
    }
    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        self.volume.next_data(from)
    }
    fn describe(&self) -> String {
        self.volume.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What goes in ten seconds, in pieces of this size, asked for as often as can be.
    fn in_ten_seconds(rate: u64, piece: u64) -> u64 {
        let begun = Instant::now();
        let (mut bucket, mut now, mut bytes) = (Bucket::new(begun), begun, 0);
        while now < begun + Duration::from_secs(10) {
            match bucket.try_take(now, Some(rate), piece) {
                Ok(()) => bytes += piece,
                // Timers are late.
                Err(wait) => now += wait + Duration::from_millis(3),
            }
        }
        bytes
    }

    #[test]
    fn a_rate_is_held() {
        for (rate, piece) in [(20 << 20, 256 << 10), (5_000_000, 300_000), (1_000_000, 64 << 10), (200_000, 70_000)] {
            let ratio = in_ten_seconds(rate, piece) as f64 / (rate * 10) as f64;
            assert!((0.9..1.1).contains(&ratio), "{rate} in pieces of {piece}: {ratio}");
        }
    }

    #[test]
    fn an_idle_hour_is_not_made_up_for() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(begun);
        let later = begun + Duration::from_secs(3600);
        let mut bytes = 0;
        while bucket.try_take(later, Some(1_000_000), 10_000).is_ok() {
            bytes += 10_000;
        }
        assert!(bytes <= 210_000, "{bytes}");
    }

    #[test]
    fn nothing_goes_at_zero_and_everything_without_a_limit() {
        let begun = Instant::now();
        let mut bucket = Bucket::new(begun);
        assert_eq!(bucket.try_take(begun + Duration::from_secs(9), Some(0), 1), Err(STEP));
        assert_eq!(bucket.try_take(begun, None, u64::MAX), Ok(()));
        assert_eq!(bucket.try_take(begun, Some(1), 1), Ok(()), "and what went without a limit is not owed");
    }

    #[tokio::test]
    async fn other_limits_reach_those_who_wait() {
        let load = Load::new(Limits { send: Schedule { usual: Some(1), windows: vec![] }, ..Limits::default() });
        load.send(1000).await;
        let waiting = tokio::spawn({
            let load = load.clone();
            async move { load.send(1000).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiting.is_finished());
        load.set(Limits::default());
        tokio::time::timeout(Duration::from_secs(2), waiting).await.expect("soon").expect("no panic");
        assert_eq!(load.sent_bytes(), 2000);
    }

    #[test]
    fn a_thread_ranks_below_and_others_as_before() {
        let rank = || rustix::process::getpriority_process(None).expect("it has one");
        let before = rank();
        let wanted = (before + 3).min(19);
        let load = Load::new(Limits { priority: Priority { nice: wanted, io: IoClass::Idle }, ..Limits::default() });
        let inside = std::thread::spawn(move || {
            load.rank_this_thread();
            (rank(), backhaul_volume::priority::class_of_this_thread())
        });
        assert_eq!(inside.join().expect("no panic"), (wanted, IoClass::Idle));
        assert_eq!((rank(), backhaul_volume::priority::class_of_this_thread()), (before, IoClass::Unchanged));
    }
}
