//! Which calls of a store get no answer, so that whoever waits behind them can be told. Read [`Waits`]; the retry layer
//! is the only one that writes into it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A call that gets no answer for so long is told about: soon enough that nobody takes the program for dead, and
/// longer than a store that is merely busy. Arbitrary within that.
pub(super) const NOTICE: Duration = Duration::from_secs(3);
/// How often the log says that it is still so.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// A call that gets no answer.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Since when.
    pub since: Instant,
    /// How long it is tried in all.
    pub total: Duration,
    /// What is done to which object, and why it does not work.
    pub reason: String,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (so_far, total) = (self.since.elapsed().as_secs(), self.total.as_secs());
        write!(f, "the store does not answer, for {so_far} s so far and tried for up to {total} s: {}", self.reason)
    }
}

/// The calls of one store that get no answer at this moment.
#[derive(Debug, Clone, Default)]
pub struct Waits(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    logged: Option<Instant>,
}

impl Waits {
    /// The call that waits longest; `None` while the store answers.
    pub fn longest(&self) -> Option<Waiting> {
        self.lock().waiting.values().min_by_key(|w| w.since).cloned()
    }

    /// A call gets no answer, until the returned value is dropped.
    pub(crate) fn begin(&self, waiting: Waiting) -> WaitGuard {
        let mut inner = self.lock();
        let due = inner.logged.is_none_or(|at| at.elapsed() >= LOG_EVERY);
        if inner.waiting.is_empty() || due {
            tracing::warn!("{waiting}");
            inner.logged = Some(Instant::now());
        }
        inner.next += 1;
        let id = inner.next;
        inner.waiting.insert(id, waiting);
        WaitGuard { waits: self.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a call waits for as long as it lives.
#[derive(Debug)]
pub(crate) struct WaitGuard {
    waits: Waits,
    id: u64,
}

impl WaitGuard {
    /// The reason is another one now.
    pub(super) fn set_reason(&self, reason: String) {
        let mut inner = self.waits.lock();
        let due = inner.logged.is_none_or(|at| at.elapsed() >= LOG_EVERY);
        let Some(waiting) = inner.waiting.get_mut(&self.id) else { return };
        waiting.reason = reason;
        if due {
            tracing::warn!("{waiting}");
            inner.logged = Some(Instant::now());
        }
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        let mut inner = self.waits.lock();
        inner.waiting.remove(&self.id);
    }
}
