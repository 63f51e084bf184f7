//! Credit for what agents send and nobody has read yet: one sum for all sessions, whatever their number (I12).
//!
//! Read first: [`Credit::grant`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_transport::endpoint::Windows;
use backhaul_transport::tuning::Grants;

/// What sessions share. With the least for each of 200 sessions it is under 90 MiB; memory of the process is more than
/// this, since packets are kept whole. Arbitrary below that.
const SHARED: u32 = 32 << 20;
/// A session gets one of so many parts of what is left: the first one all that a window may be.
const PARTS: u32 = 4;
/// What windows that grow leave for sessions that come: the next one still has half of what the first one began with.
const RESERVE: u32 = SHARED / 2;
/// The least: 4 MB/s at 64 ms.
const LEAST: u32 = 256 << 10;

/// The credit that is left.
#[derive(Debug)]
pub struct Credit {
    left: Mutex<u32>,
}

/// A session's windows; given back when it is dropped.
#[derive(Debug)]
pub struct Window {
    credit: Arc<Credit>,
    taken: u32,
    /// For what is sent, above what every session may have on its way.
    lent: u32,
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
        Window { credit: self.clone(), taken, lent: 0 }
    }

    /// More for a session whose path is long: half of what is left above what stays for those who come.
    fn lend(&self, wanted: u32) -> u32 {
        let mut left = self.lock();
        let more = (left.saturating_sub(RESERVE) / 2).min(wanted);
        *left -= more;
        more
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

/// Less than this is not worth a message to the agent.
const WORTH: u32 = 64 << 10;

impl Grants for Window {
    fn receive(&mut self, wanted: u32) -> Option<u32> {
        let before = self.bytes();
        let missing = wanted.min(Windows::MOST.receive).saturating_sub(before);
        if missing < WORTH {
            return None;
        }
        self.taken += self.credit.lend(missing);
        (self.bytes() > before).then(|| self.bytes())
    }

    fn send(&mut self, wanted: u32) -> Option<u32> {
        let before = Windows::BLOCKS.send + self.lent;
        let missing = wanted.min(Windows::MOST.send).saturating_sub(before);
        if missing < WORTH {
            return None;
        }
        let more = self.credit.lend(missing);
        self.lent += more;
        (more > 0).then_some(before + more)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        *self.credit.lock() += self.taken + self.lent;
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

    #[test]
    fn windows_grow_on_long_paths_and_stay_within_what_is_shared() {
        let credit = Credit::new();
        let mut first = credit.grant();
        assert_eq!(first.receive(1 << 20), None, "a short path asks for less than there is");
        let grown = first.receive(u32::MAX).expect("there is some left");
        let sent = first.send(u32::MAX).expect("there is some left");
        assert!(grown >= Windows::BLOCKS.receive * 3 / 2 && sent > Windows::BLOCKS.send, "{grown} {sent}");
        // It asks again with every look.
        while first.receive(u32::MAX).is_some() || first.send(u32::MAX).is_some() {}
        assert!(first.bytes() <= Windows::MOST.receive && first.lent <= Windows::MOST.send, "{first:?}");
        let mut second = credit.grant();
        assert!(second.bytes() >= Windows::BLOCKS.receive / 2, "I14: {second:?}");
        while second.receive(u32::MAX).is_some() {}
        assert!(credit.grant().bytes() >= Windows::BLOCKS.receive / 4, "I14: the third one too");
        drop(second);
        // Everybody asks for all, again and again.
        let mut many: Vec<Window> = (0..199).map(|_| credit.grant()).collect();
        for _ in 0..5 {
            for window in &mut many {
                window.receive(u32::MAX);
                window.send(u32::MAX);
            }
        }
        let all = || many.iter().chain([&first]);
        let sum: u64 = all().map(|w| u64::from(w.bytes()) + u64::from(w.lent)).sum();
        assert!(sum <= 90 << 20, "I12: {sum}");
        assert!(all().map(|w| u64::from(w.taken) + u64::from(w.lent)).sum::<u64>() <= u64::from(SHARED), "I12");
        assert!(all().all(|w| w.bytes() >= LEAST), "I14: who came late has a window too");
        drop((first, many));
        assert_eq!(credit.granted(), 0, "everything is given back");
    }
}
