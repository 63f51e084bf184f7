//! Counts what is asked of a store, how long it takes and how it ends: a decorator around the layer that tries again.
//!
//! Read first: [`Metered`], then [`StoreCounts`].

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;

use crate::store::{Kind, ObjectStore, StoreError, Waits};

/// Kinds of requests.
pub const VERBS: [&str; 7] = ["put_new", "put_hint", "get", "get_range", "list", "delete", "settle"];
/// How they end.
pub const RESULTS: [&str; 4] = ["ok", "exists", "not_found", "failed"];
/// Seconds; the first is what a folder takes, the last what a store that is in trouble does.
pub const BUCKETS: [f64; 9] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Of one kind of request.
#[derive(Debug, Default)]
pub struct VerbCounts {
    /// By how they ended, as [`RESULTS`] has it.
    pub results: [AtomicU64; 4],
    /// By how long they took: no longer than this one of [`BUCKETS`], and longer than the one before.
    pub buckets: [AtomicU64; 10],
    /// All of their time.
    pub micros: AtomicU64,
}

/// Of all requests of a process.
#[derive(Debug, Default)]
pub struct StoreCounts {
    /// As [`VERBS`] has it.
    pub verbs: [VerbCounts; 7],
    /// Bytes that were written.
    pub written: AtomicU64,
    /// Bytes that were read.
    pub read: AtomicU64,
}

/// A store that is counted.
#[derive(Debug)]
pub struct Metered {
    inner: Arc<dyn ObjectStore>,
    counts: Arc<StoreCounts>,
}

impl Metered {
    /// Around a store.
    pub fn new(inner: Arc<dyn ObjectStore>, counts: Arc<StoreCounts>) -> Arc<Self> {
        Arc::new(Self { inner, counts })
    }

    async fn counted<T>(
        &self,
        verb: usize,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let result = call.await;
        let (took, counts) = (begun.elapsed(), &self.counts.verbs[verb]);
        let how = match result.as_ref().map_err(StoreError::kind) {
            Ok(_) => 0,
            Err(Kind::Exists) => 1,
            Err(Kind::NotFound) => 2,
            Err(_) => 3,
        };
        counts.results[how].fetch_add(1, Ordering::Relaxed);
        let bucket = BUCKETS.iter().position(|most| took.as_secs_f64() <= *most).unwrap_or(BUCKETS.len());
        counts.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        counts.micros.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
        result
    }

    fn wrote(&self, bytes: usize) {
        self.counts.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn read(&self, bytes: &Bytes) {
        self.counts.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }
}

#[async_trait]
impl ObjectStore for Metered {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let len = body.len();
        self.counted(0, self.inner.put_new(key, body)).await.inspect(|()| self.wrote(len))
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let len = body.len();
        self.counted(1, self.inner.put_hint(key, body)).await.inspect(|()| self.wrote(len))
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.counted(2, self.inner.get(key, max)).await.inspect(|b| self.read(b))
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.counted(3, self.inner.get_range(key, range)).await.inspect(|b| self.read(b))
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        self.counted(4, self.inner.list(prefix, after, limit)).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.counted(5, self.inner.delete(key)).await
    }
    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.counted(6, self.inner.settle(prefix)).await
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn waits(&self) -> Option<Waits> {
        self.inner.waits()
    }
}
