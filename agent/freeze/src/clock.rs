//! Time that goes on while the machine sleeps: a file system that was frozen over a suspend was frozen for that long.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds since boot, time asleep included.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Instant(pub(crate) u64);

impl Instant {
    pub(crate) fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl std::ops::Add<Duration> for Instant {
    type Output = Self;
    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time.as_nanos().try_into().unwrap_or(u64::MAX)))
    }
}

/// For `poll`, whose own clock stands still while the machine sleeps: never long, so that who waits looks at ours.
pub(crate) fn slice(until: Option<Instant>) -> Option<Timespec> {
    // Arbitrary: what a thaw may come too late after a suspend.
    const SLICE: Duration = Duration::from_millis(20);
    let left = until?.since(Instant::now()).min(SLICE);
    Some(Timespec { tv_sec: 0, tv_nsec: left.as_nanos() as _ })
}

pub(crate) fn sleep(time: Duration) {
    std::thread::sleep(time);
}
