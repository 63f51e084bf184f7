//! Failures on demand, for tests and simulation. Part of the library and not of the tests, so that every crate can
//! use it. Read [`FaultStore`] and [`Fault`].
//!
//! Given a seed and calls that arrive in the same order, the same calls fail in the same way. No clock is read.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use bytes::{Bytes, BytesMut};
use tokio::sync::watch;
use tokio::time::Duration;

use super::mem::OpCounts;
use super::{Kind, ObjectStore, StoreError, Verb};

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Fails, and nothing was done.
    Before(Kind),
    /// Is done, and fails all the same: the reply was lost.
    After(Kind),
    /// Is done, this much later.
    Delay(Duration),
    /// Waits until [`FaultStore::release`], then is done: a receiver that was paused and wakes up.
    FreezeBefore,
    /// Is done, then waits until [`FaultStore::release`] with the reply.
    FreezeAfter,
    /// A read returns only this many bytes, as if they were all.
    Truncate(usize),
    /// A read returns a body with one bit of the byte at this place (modulo the length) flipped.
    Flip(usize),
    /// `put_new` replaces what is there: a store without conditional writes (F18).
    IgnoreConditional,
    /// A read finds nothing and a list is empty: a store that is slow to show what was written (F17).
    Stale,
}

/// Which calls a fault happens to. All conditions must hold; the default is every call.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct When {
    /// Only this verb.
    pub verb: Option<Verb>,
    /// Only keys (of a list: prefixes) that contain this text.
    pub key: Option<&'static str>,
    /// Of the calls that match so far, skips this many.
    pub skip: u64,
    /// And then happens to this many; `None` is all that follow.
    pub times: Option<u64>,
    /// And of those with this probability, 0 to 1; `None` is always.
    pub chance: Option<f64>,
}

impl When {
    /// Every call of one verb.
    pub fn verb(verb: Verb) -> Self {
        Self { verb: Some(verb), ..Self::default() }
    }
    /// Every call at all.
    pub fn always() -> Self {
        Self::default()
    }
    /// The call of this number, counted from 0 over all verbs: the step of a crash test.
    pub fn step(number: u64) -> Self {
        Self::default().skip(number).times(1)
    }
    /// Only keys that contain `text`.
    #[must_use]
    pub fn key(self, text: &'static str) -> Self {
        Self { key: Some(text), ..self }
    }
    /// Not the first so many.
    #[must_use]
    pub fn skip(self, skip: u64) -> Self {
        Self { skip, ..self }
    }
    /// Only so many.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times: Some(times), ..self }
    }
    /// Only with this probability.
    #[must_use]
    pub fn chance(self, chance: f64) -> Self {
        Self { chance: Some(chance), ..self }
    }
}

/// One call, as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What was asked.
    pub verb: Verb,
    /// For which key, or prefix.
    pub key: String,
    /// What was done to it.
    pub fault: Option<Fault>,
}

/// Passes calls on to another store, or does to them what the rules say. The first rule that fits is the only one.
#[derive(Debug)]
pub struct FaultStore<S> {
    inner: S,
    plan: Mutex<Plan>,
    /// How often `release` was called; frozen calls wait for it to change.
    releases: watch::Sender<u64>,
}

#[derive(Debug)]
struct Plan {
    rules: Vec<(When, Fault, u64)>,
    random: u64,
    trace: Vec<Step>,
    counts: OpCounts,
}

impl<S: ObjectStore> FaultStore<S> {
    /// Passes everything on until there are rules. `seed` decides what `chance` does.
    pub fn new(inner: S, seed: u64) -> Self {
        let plan = Plan { rules: Vec::new(), random: seed, trace: Vec::new(), counts: OpCounts::default() };
        Self { inner, plan: Mutex::new(plan), releases: watch::Sender::new(0) }
    }
    /// What is under it.
    pub fn inner(&self) -> &S {
        &self.inner
    }
    /// Adds a rule, after those that are there.
    pub fn add(&self, when: When, fault: Fault) {
        self.lock().rules.push((when, fault, 0));
    }
    /// Faults stop. Calls that are frozen stay so until [`FaultStore::release`].
    pub fn heal(&self) {
        self.lock().rules.clear();
    }
    /// Lets all calls go on that are frozen now.
    pub fn release(&self) {
        self.releases.send_modify(|count| *count += 1);
    }
    /// All calls so far, in the order in which they arrived.
    pub fn trace(&self) -> Vec<Step> {
        self.lock().trace.clone()
    }
    /// How often each verb was called.
    pub fn counts(&self) -> OpCounts {
        self.lock().counts
    }

    fn lock(&self) -> MutexGuard<'_, Plan> {
        // No code that can panic runs under the lock.
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides, and does what comes before the call.
    async fn arrive(&self, verb: Verb, key: &str) -> Result<Option<Fault>, StoreError> {
        // Subscribed before deciding: a release in between counts.
        let mut released = self.releases.subscribe();
        let fault = self.lock().decide(verb, key);
        match fault {
            Some(Fault::Before(kind)) => return Err(injected(kind, verb, key)),
            Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
            // The sender lives in self, which the caller holds.
            Some(Fault::FreezeBefore) => drop(released.changed().await),
            _ => {}
        }
        Ok(fault)
    }

    /// Does what comes after it.
    async fn leave<T>(
        &self,
        fault: Option<Fault>,
        verb: Verb,
        key: &str,
        result: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match fault {
            Some(Fault::After(kind)) => Err(injected(kind, verb, key)),
            Some(Fault::FreezeAfter) => {
                drop(self.releases.subscribe().changed().await);
                result
            }
            _ => result,
        }
    }

    async fn read(
        &self,
        verb: Verb,
        key: &ObjectKey,
        call: impl Future<Output = Result<Bytes, StoreError>> + Send,
    ) -> Result<Bytes, StoreError> {
        let fault = self.arrive(verb, key.as_str()).await?;
        let body = call.await;
        let body = body.map(|body| match fault {
            Some(Fault::Truncate(len)) => body.slice(..len.min(body.len())),
            Some(Fault::Flip(at)) if !body.is_empty() => {
                let at = at % body.len();
                let mut body = BytesMut::from(&body[..]);
                body[at] ^= 1;
                body.freeze()
            }
            _ => body,
        });
        if fault == Some(Fault::Stale) {
            return Err(injected(Kind::NotFound, verb, key.as_str()));
        }
        self.leave(fault, verb, key.as_str(), body).await
    }
}

impl Plan {
    fn decide(&mut self, verb: Verb, key: &str) -> Option<Fault> {
        let mut happens = None;
        for at in 0..self.rules.len() {
            let (when, fault, seen) = self.rules[at];
            if when.verb.is_some_and(|only| only != verb) || when.key.is_some_and(|text| !key.contains(text)) {
                continue;
            }
            self.rules[at].2 += 1;
            let in_window = seen >= when.skip && when.times.is_none_or(|times| seen < when.skip + times);
            if in_window && when.chance.is_none_or(|chance| self.draw() < chance) {
                happens = Some(fault);
                break;
            }
        }
        self.counts.add(verb);
        self.trace.push(Step { verb, key: key.to_owned(), fault: happens });
        happens
    }

    /// From 0 up to 1: splitmix64, <https://prng.di.unimi.it/splitmix64.c>.
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn injected(kind: Kind, verb: Verb, key: &str) -> StoreError {
    StoreError::new(kind, verb, key, "a fault was injected")
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for FaultStore<S> {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let fault = self.arrive(Verb::PutNew, key.as_str()).await?;
        let result = match fault {
            Some(Fault::IgnoreConditional) => self.inner.put_hint(key, body).await,
            _ => self.inner.put_new(key, body).await,
        };
        self.leave(fault, Verb::PutNew, key.as_str(), result).await
    }

    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let fault = self.arrive(Verb::PutHint, key.as_str()).await?;
        let result = self.inner.put_hint(key, body).await;
        self.leave(fault, Verb::PutHint, key.as_str(), result).await
    }

    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.read(Verb::Get, key, self.inner.get(key, max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.read(Verb::GetRange, key, self.inner.get_range(key, range)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        let fault = self.arrive(Verb::List, prefix).await?;
        let result = match fault {
            Some(Fault::Stale) => Ok(Vec::new()),
            _ => self.inner.list(prefix, after, limit).await,
        };
        self.leave(fault, Verb::List, prefix, result).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        let fault = self.arrive(Verb::Delete, key.as_str()).await?;
        let result = self.inner.delete(key).await;
        self.leave(fault, Verb::Delete, key.as_str(), result).await
    }

    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix).await
    }

    fn describe(&self) -> String {
        format!("{}, with faults", self.inner.describe())
    }
}

#[cfg(test)]
#[path = "fault_tests.rs"]
mod tests;
