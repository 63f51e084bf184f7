//! What can be set about a store, apart from where it is. Read [`StoreSettings`].

use std::time::Duration;

/// Settings of every backend; each takes what concerns it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StoreSettings {
    /// What to do where there is no folder.
    pub missing_root: MissingRoot,
    /// How long one attempt on a bucket may take.
    pub s3: S3Settings,
    /// How long and how often a call is tried.
    pub retry: RetrySettings,
}

/// What opening does where there is no folder yet. Buckets are never made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingRoot {
    /// An error: everything but `init` expects a store, and a disk that is not mounted must not look like an empty one.
    #[default]
    Refuse,
    /// Made, with what is above it.
    Create,
}

/// How long one attempt on a bucket may take. The SDK on its own has no limit but for connecting.
#[derive(Debug, Clone, PartialEq)]
pub struct S3Settings {
    /// Until a connection (and its TLS) stands.
    pub connect: Duration,
    /// For the answer to a request without a body worth mentioning; a request that carries bytes may take this and
    /// what [`S3Settings::min_rate`] allows for them.
    pub answer: Duration,
    /// Bytes per second below which a body counts as stuck.
    pub min_rate: u32,
    /// A reply body that brings not one byte for so long is given up before the limits above say so.
    pub stall: Duration,
}

impl Default for S3Settings {
    fn default() -> Self {
        Self {
            // The SDK's own default is 3.1 s; a far link under load needs a little more.
            connect: Duration::from_secs(5),
            // S3 answers small requests in 100 to 200 ms and may take seconds under load
            // (https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html); arbitrary beyond that.
            answer: Duration::from_secs(15),
            // 8 Mbit/s: the slowest uplink on which the default segment of 16 MiB still passes in 17 s. Arbitrary.
            min_rate: 1_000_000,
            // Arbitrary: well under `answer`, well over a few lost packets.
            stall: Duration::from_secs(8),
        }
    }
}

impl S3Settings {
    /// How long a request may take that carries so many bytes in either direction.
    pub fn limit(&self, bytes: usize) -> Duration {
        self.answer + Duration::from_secs_f64(bytes as f64 / f64::from(self.min_rate.max(1)))
    }
}

/// The one retry layer: pauses that double, each with up to its own length more by chance, bounded by time and not by
/// number.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrySettings {
    /// First pause, before chance.
    pub first_pause: Duration,
    /// Longest pause, before chance.
    pub longest_pause: Duration,
    /// From the first attempt until the caller is told, whatever the backend does in between; an attempt that runs at
    /// that moment is dropped.
    pub total: Duration,
    /// Makes the jitter repeatable, for simulations. `None` in a real receiver, where two must not pause in step.
    pub seed: Option<u64>,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            // SlowDown is over when S3 has split a partition or a second has passed; the usual advice is to start
            // at 100 ms (https://docs.aws.amazon.com/general/latest/gr/api-retries.html).
            first_pause: Duration::from_millis(100),
            // Short, so that work goes on soon after the store is back (I14: within 60 s).
            longest_pause: Duration::from_secs(5),
            // Long enough for a failover of a compatible server or a rebooted NAT gateway; what takes longer is for
            // the session to survive, not for one call. Two attempts with the largest segment (64 MiB) fit. Arbitrary.
            total: Duration::from_secs(180),
            seed: None,
        }
    }
}
