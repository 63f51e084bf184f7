//! Counts what is read from a store: a decorator.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;

use crate::catalog::Catalog;
use crate::store::{ObjectStore, StoreError};

/// A store that counts the bytes that it hands out.
#[derive(Debug)]
pub struct Counting {
    inner: Arc<dyn ObjectStore>,
    read: AtomicU64,
}

impl Counting {
    /// Around a store.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self { inner, read: AtomicU64::new(0) })
    }

    /// A catalog that is counted from now on.
    pub fn catalog(catalog: Catalog) -> (Arc<Self>, Catalog) {
        let counting = Self::new(catalog.store.clone());
        (counting.clone(), Catalog { store: counting, ..catalog })
    }

    /// Bytes that were read so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn count(&self, bytes: Bytes) -> Bytes {
        self.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        bytes
    }
}

#[async_trait]
impl ObjectStore for Counting {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.inner.put_new(key, body).await
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.inner.put_hint(key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.inner.get(key, max).await.map(|b| self.count(b))
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await.map(|b| self.count(b))
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        self.inner.list(prefix, after, limit).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix).await
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn waits(&self) -> Option<crate::store::Waits> {
        self.inner.waits()
    }
}
