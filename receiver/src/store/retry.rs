//! The one layer that tries again. The SDK under a bucket has its own retries switched off: two layers multiply, and
//! only this one knows what a lost reply means. Read [`Retrying`].

use std::future::Future;
use std::ops::Range;

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_seams::situation::{Situation, reached};
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use tokio::time::{Duration, Instant};

use super::waits::{NOTICE, WaitGuard};
use super::{Kind, ObjectStore, RetrySettings, StoreError, Verb, Waiting, Waits};

/// Bytes per second of the slowest link that is taken for a working one without a word: 32 Mbit/s, so that a range of
/// 4 MiB has 4 s. Arbitrary.
const SLOW_LINK: f64 = 4e6;

/// Tries a call again while its error says that this may help, for as long as the settings allow.
///
/// **A lost reply.** When an attempt of `put_new` ends without a clear answer and a later one finds the object there,
/// that may be our own work. The object is read back: equal bytes are success, others are [`Kind::Exists`]. So the
/// bodies of two writers must differ if only one of them may believe that it won; every record of the log carries a
/// commit id for this.
///
/// When the time is up the last error is returned, and after an `Unavailable` a `put_new` may still have been applied.
#[derive(Debug)]
pub struct Retrying<S> {
    inner: S,
    settings: RetrySettings,
    waits: Waits,
}

impl<S: ObjectStore> Retrying<S> {
    /// Puts the layer around a store.
    pub fn new(inner: S, settings: RetrySettings) -> Self {
        Self { inner, settings, waits: Waits::default() }
    }

    /// What is under the layer.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// `bytes` is what one attempt carries, in either direction.
    fn tries(&self, verb: Verb, object: &str, bytes: u64) -> Tries {
        let RetrySettings { first_pause, longest_pause, total, seed } = self.settings;
        let pauses = ExponentialBuilder::new().with_min_delay(first_pause).with_max_delay(longest_pause);
        // Without a seed backon (its feature `std` is off) takes a constant, and all receivers pause in step.
        let seed = seed.unwrap_or_else(|| uuid::Uuid::now_v7().as_u64_pair().1);
        let pauses = pauses.with_jitter().with_jitter_seed(seed).without_max_times().build();
        let patience = NOTICE + Duration::from_secs_f64(bytes as f64 / SLOW_LINK);
        let (object, start, waits) = (object.to_owned(), Instant::now(), self.waits.clone());
        Tries { verb, object, start, total, pauses, failed: 0, patience, waits, waiting: None }
    }

    /// For verbs that may be repeated without a second thought.
    async fn repeat<T, F>(
        &self,
        (verb, object, bytes): (Verb, &str, u64),
        call: impl Fn() -> F + Send + Sync,
    ) -> Result<T, StoreError>
    where
        T: Send,
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let mut tries = self.tries(verb, object, bytes);
        loop {
            match tries.attempt(call()).await {
                Err(error) if error.is_retryable() => tries.pause(error).await?,
                other => return other,
            }
        }
    }

    /// The object is there after an attempt of ours that had no clear answer: did that attempt make it?
    async fn ours(&self, key: &ObjectKey, body: &Bytes, exists: StoreError) -> Result<(), StoreError> {
        match self.get(key, body.len()).await {
            Ok(found) if found == body => {
                reached(Situation::OwnWriteFound);
                Ok(())
            }
            Ok(_) => Err(exists),
            // Longer than ours.
            Err(error) if error.kind() == Kind::Corrupt => Err(exists),
            Err(error) => {
                let what = "it exists, perhaps by our own doing, and reading it back to find out failed";
                Err(StoreError::new(Kind::Unavailable, Verb::PutNew, key, what).because(error))
            }
        }
    }
}

/// The attempts of one call.
struct Tries {
    verb: Verb,
    object: String,
    start: Instant,
    total: Duration,
    pauses: ExponentialBackoff,
    failed: u32,
    /// How long the first attempt may take before it is told that there is no answer.
    patience: Duration,
    waits: Waits,
    waiting: Option<WaitGuard>,
}

impl Tries {
    /// Runs one attempt, for as long as there is time at all.
    async fn attempt<T>(&mut self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let left = self.total.saturating_sub(self.start.elapsed());
        let mut call = std::pin::pin!(tokio::time::timeout(left, call));
        let result = loop {
            tokio::select! {
                biased;
                result = &mut call => break result,
                () = tokio::time::sleep_until(self.start + self.patience), if self.waiting.is_none() => {
                    self.tell(format!("cannot {} {}: no answer yet", self.verb, self.object));
                }
            }
        };
        result.unwrap_or_else(|_| {
            let what = format!("no answer within {:.1} s", left.as_secs_f64());
            Err(StoreError::new(Kind::Unavailable, self.verb, &self.object, what))
        })
    }

    fn tell(&mut self, reason: String) {
        match &self.waiting {
            Some(waiting) => waiting.set_reason(reason),
            None => {
                let waiting = Waiting { since: self.start, total: self.total, reason };
                self.waiting = Some(self.waits.begin(waiting));
            }
        }
    }

    /// Waits before the next attempt, or gives the error back when there is no time for one.
    async fn pause(&mut self, error: StoreError) -> Result<(), StoreError> {
        self.failed += 1;
        reached(Situation::StoreRetried);
        let took = self.start.elapsed();
        let pause = self.pauses.next().unwrap_or(self.total);
        if took + pause >= self.total {
            return Err(error.after(self.failed, took));
        }
        tracing::debug!(%error, ?pause, "trying again");
        if took + pause >= NOTICE {
            // What failed may go well at the next attempt; that it took so long is worth a word all the same.
            self.tell(error.to_string());
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Retrying<S> {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let mut tries = self.tries(Verb::PutNew, key.as_str(), body.len() as u64);
        loop {
            match tries.attempt(self.inner.put_new(key, body.clone())).await {
                Err(error) if error.is_retryable() => tries.pause(error).await?,
                Err(error) if error.is_exists() && tries.failed > 0 => return self.ours(key, &body, error).await,
                other => return other,
            }
        }
    }

    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.repeat((Verb::PutHint, key.as_str(), body.len() as u64), || self.inner.put_hint(key, body.clone())).await
    }

    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.repeat((Verb::Get, key.as_str(), 0), || self.inner.get(key, max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = range.end.saturating_sub(range.start);
        self.repeat((Verb::GetRange, key.as_str(), bytes), || self.inner.get_range(key, range.clone())).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        self.repeat((Verb::List, prefix, 0), || self.inner.list(prefix, after, limit)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.repeat((Verb::Delete, key.as_str(), 0), || self.inner.delete(key)).await
    }

    /// Not repeated: a flush that failed would succeed the second time without having written anything.
    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn waits(&self) -> Option<Waits> {
        Some(self.waits.clone())
    }
}

#[cfg(test)]
#[path = "retry_tests.rs"]
mod tests;
