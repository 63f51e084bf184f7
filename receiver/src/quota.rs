//! How many of something may be there at once: in all, and of one owner, so that one can't take the place of all.
//!
//! Read first: [`Quota::enter`].

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts those who are in.
#[derive(Debug)]
pub struct Quota<K> {
    inside: Mutex<Inside<K>>,
    most: usize,
    most_of_one: usize,
}

#[derive(Debug)]
struct Inside<K> {
    all: usize,
    of: HashMap<K, usize>,
}

/// Why somebody may not enter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Full {
    /// There are enough in all.
    All,
    /// There are enough of this one.
    Own,
}

/// Somebody is in until this is dropped.
#[derive(Debug)]
pub struct Ticket<K: Eq + Hash> {
    quota: Arc<Quota<K>>,
    key: K,
}

impl<K: Eq + Hash + Clone> Quota<K> {
    /// At most so many in all, and so many of one.
    pub fn new(most: usize, most_of_one: usize) -> Arc<Self> {
        let inside = Mutex::new(Inside { all: 0, of: HashMap::new() });
        Arc::new(Self { inside, most, most_of_one })
    }

    /// Lets one more in.
    pub fn enter(self: &Arc<Self>, key: K) -> Result<Ticket<K>, Full> {
        let mut inside = self.lock();
        if inside.all >= self.most {
            return Err(Full::All);
        }
        if inside.of.get(&key).is_some_and(|n| *n >= self.most_of_one) {
            return Err(Full::Own);
        }
        inside.all += 1;
        *inside.of.entry(key.clone()).or_default() += 1;
        Ok(Ticket { quota: self.clone(), key })
    }
}

impl<K> Quota<K> {
    /// How many are in.
    pub fn inside(&self) -> usize {
        self.lock().all
    }

    fn lock(&self) -> MutexGuard<'_, Inside<K>> {
        // Nothing in here panics half-way through a change.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Ticket<K> {
    fn drop(&mut self) {
        let mut inside = self.quota.lock();
        inside.all -= 1;
        if let Some(n) = inside.of.get_mut(&self.key) {
            *n -= 1;
            if *n == 0 {
                inside.of.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_the_place_of_all() {
        let quota = Quota::new(3, 2);
        let one = quota.enter("a").expect("room");
        let _two = quota.enter("a").expect("room");
        assert_eq!(quota.enter("a").err(), Some(Full::Own));
        let _three = quota.enter("b").expect("room");
        assert_eq!(quota.enter("c").err(), Some(Full::All));
        drop(one);
        let _again = quota.enter("c").expect("room");
        assert_eq!(quota.inside(), 3);
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let quota = Quota::new(3, 2);
        drop(quota.enter("a"));
        assert!(quota.lock().of.is_empty() && quota.inside() == 0);
    }
}
