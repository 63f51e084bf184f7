//! Superblocks that one process may have to thaw, and the thaw that helper, guard and agent share.
//!
//! Read first: [`Holding::thaw_all`]. All three may try at once. Only one thaws at a time, and each looks at the journal
//! before: what one has thawed no other touches, since somebody else may have frozen it by then.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backhaul_seams::failpoint;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::clock::{Instant, sleep};
use crate::journal::{self, State};

/// Who thaws. Only the helper's thaw counts as one that went as planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Who {
    Helper,
    Rescuer,
}

/// What to do with superblocks whose FIFREEZE has begun and of which no end is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unfinished {
    /// A thread that lives is in it and will thaw by itself. FITHAW now could hit the freeze of somebody else who it
    /// waits for.
    Leave,
    /// Whoever was in it does not move, and may be in it still.
    Try,
    /// Whoever was in it is gone: what is not frozen now will not be.
    Settle,
}

/// Open superblocks in the order in which they are frozen, and their journal.
#[derive(Debug)]
pub(crate) struct Holding {
    journal: OwnedFd,
    files: Vec<OwnedFd>,
    /// The journal's number of the first of them.
    first: usize,
    /// Between threads of this process; between processes there is a lock on the journal.
    turn: Mutex<()>,
}

/// The turn to thaw. Given back when dropped, or when the process dies.
pub(crate) struct Turn<'a> {
    journal: &'a OwnedFd,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::fcntl_lock(self.journal, FlockOperation::NonBlockingUnlock);
    }
}

impl Holding {
    pub(crate) fn new(journal: OwnedFd, files: Vec<OwnedFd>) -> Self {
        Self { journal, files, first: 0, turn: Mutex::new(()) }
    }

    /// One superblock of a journal with several.
    pub(crate) fn at(journal: OwnedFd, file: OwnedFd, index: usize) -> Self {
        Self { journal, files: vec![file], first: index, turn: Mutex::new(()) }
    }

    pub(crate) fn len(&self) -> usize {
        self.files.len()
    }

    pub(crate) fn files(&self) -> &[OwnedFd] {
        &self.files
    }

    pub(crate) fn journal(&self) -> &OwnedFd {
        &self.journal
    }

    pub(crate) fn state(&self, index: usize) -> State {
        journal::state(&self.journal, self.first + index)
    }

    pub(crate) fn set(&self, index: usize, state: State) -> io::Result<()> {
        journal::set_state(&self.journal, self.first + index, state)
    }

    pub(crate) fn states(&self) -> impl Iterator<Item = State> + '_ {
        (0..self.len()).map(|i| self.state(i))
    }

    /// Waits for the others, yet not for ever: one who was stopped in the middle must not keep a file system frozen.
    pub(crate) fn turn(&self) -> Turn<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // A thaw takes well under a millisecond; arbitrary above that.
        let until = Instant::now() + Duration::from_millis(50);
        while rustix::fs::fcntl_lock(&self.journal, FlockOperation::NonBlockingLockExclusive).is_err() {
            if Instant::now() >= until {
                break;
            }
            sleep(Duration::from_micros(200));
        }
        Turn { journal: &self.journal, _turn: turn }
    }

    /// Thaws what may be frozen by us, last frozen first. Gives how many may still be frozen: come again.
    pub(crate) fn thaw_all(&self, who: Who, unfinished: Unfinished) -> usize {
        let _turn = self.turn();
        (0..self.len()).rev().map(|i| usize::from(!self.thaw_one(i, who, unfinished))).sum()
    }

    /// With the turn in hand. Whether it is certain not to be frozen by us any more.
    pub(crate) fn thaw_one(&self, index: usize, who: Who, unfinished: Unfinished) -> bool {
        let state = self.state(index);
        match state {
            State::Frozen => {}
            State::Freezing if unfinished == Unfinished::Leave => return false,
            State::Freezing => {}
            _ => return true,
        }
        let after = match backhaul_volume::frozen::thaw(&self.files[index]).map_err(|e| Errno::from_io_error(&e)) {
            Ok(()) if who == Who::Helper => State::Thawed,
            Ok(()) => State::Rescued,
            Err(Some(Errno::INVAL)) if state == State::Frozen => State::Lost,
            Err(Some(Errno::INVAL)) if unfinished == Unfinished::Settle => State::NotOurs,
            Err(_) => return false,
        };
        let _ = failpoint::reach(|| "freeze.thaw-done");
        // If this fails somebody tries again and finds it not frozen.
        let _ = self.set(index, after);
        let _ = failpoint::reach(|| "freeze.thaw-recorded");
        true
    }
}
