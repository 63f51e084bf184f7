//! What time it is. Timers are tokio's; this is the clock on the wall, which may jump.

use std::time::{Duration, SystemTime};

/// The time, by this machine's clock or the simulation's.
pub fn now() -> SystemTime {
    #[cfg(feature = "testing")]
    if let Some(simulated) = crate::world::now() {
        return simulated;
    }
    SystemTime::now()
}

/// The same in milliseconds since 1970; 0 before that.
pub fn unix_millis() -> i64 {
    millis_of(now())
}

/// Milliseconds since 1970; 0 before that.
pub fn millis_of(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
