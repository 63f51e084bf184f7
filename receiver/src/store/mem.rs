//! A store in memory, for tests and simulation. Read [`MemStore`].

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;

use super::{Kind, ObjectStore, StoreError, Verb, check_key, check_prefix, range_len, too_long, too_short};

/// How often each verb was called, successful or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the verbs")]
pub struct OpCounts {
    pub put_new: u64,
    pub put_hint: u64,
    pub get: u64,
    pub get_range: u64,
    pub list: u64,
    pub delete: u64,
}

impl OpCounts {
    /// Counts one call.
    pub fn add(&mut self, verb: Verb) {
        match verb {
            Verb::Open => {}
            Verb::PutNew => self.put_new += 1,
            Verb::PutHint => self.put_hint += 1,
            Verb::Get => self.get += 1,
            Verb::GetRange => self.get_range += 1,
            Verb::List => self.list += 1,
            Verb::Delete => self.delete += 1,
        }
    }
    /// All calls.
    pub fn total(&self) -> u64 {
        self.put_new + self.put_hint + self.get + self.get_range + self.list + self.delete
    }
}

/// Objects in a map behind one lock: every verb is atomic, nothing ever fails on its own, no call waits.
#[derive(Debug, Default)]
pub struct MemStore {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<ObjectKey, Bytes>,
    counts: OpCounts,
}

impl MemStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }
    /// How often each verb was called since the start.
    pub fn counts(&self) -> OpCounts {
        self.lock().counts
    }
    /// Everything in it, by key. Bodies are shared, not copied.
    pub fn objects(&self) -> BTreeMap<ObjectKey, Bytes> {
        self.lock().objects.clone()
    }
    /// A store that starts with the same objects and then goes its own way: what a crash at this moment would leave.
    pub fn fork(&self) -> Self {
        Self { inner: Mutex::new(Inner { objects: self.objects(), counts: OpCounts::default() }) }
    }
    /// Bit rot and worse: puts `body` where an object is or is not, `None` takes it away. Not counted.
    pub fn tamper(&self, key: &ObjectKey, body: Option<Bytes>) {
        let mut inner = self.lock();
        match body {
            Some(body) => inner.objects.insert(key.clone(), body),
            None => inner.objects.remove(key),
        };
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code that can panic runs under the lock, and the map is valid between any two statements.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn counted(&self, verb: Verb) -> MutexGuard<'_, Inner> {
        let mut inner = self.lock();
        inner.counts.add(verb);
        inner
    }
    fn read(&self, verb: Verb, key: &ObjectKey) -> Result<Bytes, StoreError> {
        check_key(verb, key)?;
        let inner = self.counted(verb);
        inner.objects.get(key).cloned().ok_or_else(|| StoreError::new(Kind::NotFound, verb, key, "no such object"))
    }
}

#[async_trait]
impl ObjectStore for MemStore {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        check_key(Verb::PutNew, key)?;
        let mut inner = self.counted(Verb::PutNew);
        if inner.objects.contains_key(key) {
            return Err(StoreError::new(Kind::Exists, Verb::PutNew, key, "it exists already"));
        }
        inner.objects.insert(key.clone(), body);
        Ok(())
    }

    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        check_key(Verb::PutHint, key)?;
        self.counted(Verb::PutHint).objects.insert(key.clone(), body);
        Ok(())
    }

    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        let body = self.read(Verb::Get, key)?;
        if body.len() > max {
            return Err(too_long(key, body.len() as u64, max));
        }
        Ok(body)
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range_len(key, &range)? == 0 {
            return Ok(Bytes::new());
        }
        let body = self.read(Verb::GetRange, key)?;
        if range.end > body.len() as u64 {
            return Err(too_short(key, body.len() as u64, &range));
        }
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        check_prefix(prefix)?;
        let inner = self.counted(Verb::List);
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let found = inner.objects.range((start, Bound::Unbounded));
        let found = found.filter(|(key, _)| key.as_str().starts_with(prefix));
        Ok(found.take(limit).map(|(key, body)| (key.clone(), body.len() as u64)).collect())
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        check_key(Verb::Delete, key)?;
        self.counted(Verb::Delete).objects.remove(key);
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}
