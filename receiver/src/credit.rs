//! Credit for what agents send and nobody has read yet: one sum for all sessions, whatever their number (I12).
//!
//! Read first: [`Credit::grant`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_transport::endpoint::Windows;

/// What sessions share. With the least for each of 200 sessions it is under 90 MiB; memory of the process is more than
/// this, since packets are kept whole. Arbitrary below that.
const SHARED: u32 = 32 << 20;
/// A session gets one of so many parts of what is left: the first one all that a window may be.
const PARTS: u32 = 4;
/// The least: 4 MB/s at 64 ms.
const LEAST: u32 = 256 << 10;

/// The credit that is left.
#[derive(Debug)]
pub struct Credit {
    left: Mutex<u32>,
}

/// A session's window; given back when it is dropped.
#[derive(Debug)]
pub struct Window {
    credit: Arc<Credit>,
    taken: u32,
}

impl Credit {
    /// All of it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { left: Mutex::new(SHARED) })
    }

    /// A window for one more session: large while there are few, and never none.
    pub fn grant(self: &Arc<Self>) -> Window {
        let mut left = self.lock();
        let taken = (*left / PARTS).min(Windows::BLOCKS.receive);
        *left -= taken;
        Window { credit: self.clone(), taken }
    }

    /// Bytes that sessions have.
    pub fn granted(&self) -> u32 {
        SHARED - *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        // Nothing in here panics half-way through a change.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Window {
    /// Bytes.
    pub fn bytes(&self) -> u32 {
        self.taken.max(LEAST)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        *self.credit.lock() += self.taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_windows_are_small_and_few_are_large() {
        let credit = Credit::new();
        let first = credit.grant();
        assert_eq!(first.bytes(), Windows::BLOCKS.receive);
        let many: Vec<Window> = (0..199).map(|_| credit.grant()).collect();
        let sum = many.iter().map(|w| u64::from(w.bytes())).sum::<u64>() + u64::from(first.bytes());
        assert!(sum <= 90 << 20, "I12: {sum}");
        assert!(many.iter().all(|w| w.bytes() >= LEAST));
        drop((first, many));
        assert_eq!(*credit.lock(), SHARED, "everything is given back");
    }
}
