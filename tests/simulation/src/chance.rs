//! Chance that everything in a history shares: one seeded source, asked in an order that the seed decides too.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A source of chance.
#[derive(Clone, Debug)]
pub struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }
    fn lock(&self) -> MutexGuard<'_, fastrand::Rng> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// From 0 up to `below`.
    pub fn below(&self, below: u64) -> u64 {
        self.lock().u64(0..below.max(1))
    }
    /// Between both, the second left out.
    pub fn between(&self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low))
    }
    /// With this probability.
    pub fn happens(&self, probability: f64) -> bool {
        self.lock().f64() < probability
    }
    /// One of them.
    pub fn pick<T: Clone>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize].clone()
    }
    /// Milliseconds between both.
    pub fn millis(&self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.between(low, high))
    }
}
