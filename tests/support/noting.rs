//! A store that says what is about to be created in it, so that a test can look around at that moment.

use std::ops::Range;

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_receiver::store::{ObjectStore, StoreError};
use bytes::Bytes;

/// Whoever wants to know.
type Listener = Box<dyn Fn(&ObjectKey, When) + Send + Sync>;

/// When it is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// The object is about to be created.
    Before,
    /// It was created, and whoever wanted it does not know yet.
    After,
}

/// Tells somebody of each `put_new`.
pub struct Noting<S> {
    inner: S,
    listener: Listener,
}

impl<S> Noting<S> {
    /// Calls `listener` with the key of each object right before and right after it is created.
    pub fn new(inner: S, listener: impl Fn(&ObjectKey, When) + Send + Sync + 'static) -> Self {
        Self { inner, listener: Box::new(listener) }
    }
}

impl<S: ObjectStore> std::fmt::Debug for Noting<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Noting<S> {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        (self.listener)(key, When::Before);
        self.inner.put_new(key, body).await?;
        (self.listener)(key, When::After);
        Ok(())
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.inner.put_hint(key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.inner.get(key, max).await
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
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
}
