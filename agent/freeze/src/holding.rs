//! Superblocks that one process may have to thaw, and the thaw that helper, guard and agent share.
//!
//! Read first: [`Holding::thaw_all`]. All three may try at once. Only one thaws a superblock at a time, and each looks at
//! the journal before: what one has thawed no other touches, since somebody else may have frozen it by then.
//!
//! FITHAW may write to the disk, and wait for ever if that hangs. So each superblock has a thread of its own, made before
//! anything is frozen: no file system waits for another one's disk.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use backhaul_seams::failpoint;
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

/// Of threads, which lie in locked memory: arbitrary, many times of what they need.
const STACK: usize = 64 << 10;
/// How long a thaw is waited for, less than the guard gives a helper. Usually it takes under a millisecond, and a write
/// to the disk with some file systems; arbitrary above that.
const PATIENCE: Duration = Duration::from_millis(200);

/// Open superblocks in the order in which they are frozen, and their journal.
#[derive(Debug)]
pub(crate) struct Holding {
    held: Arc<Held>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads have of it.
#[derive(Debug)]
struct Held {
    journal: OwnedFd,
    files: Vec<OwnedFd>,
    /// The journal's number of the first of them.
    first: usize,
    /// Between threads of this process; between processes there are locks on the journal.
    turns: Vec<Mutex<()>>,
    jobs: Mutex<Jobs>,
    asked: Condvar,
    done: Condvar,
}

#[derive(Debug)]
struct Jobs {
    /// Of each superblock.
    all: Vec<Job>,
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Job {
    Asked(Who, Unfinished),
    Running,
    /// Whether it is certain not to be frozen by us any more.
    Done(bool),
}

/// The turn to thaw one superblock. Given back when dropped, or when the process dies.
pub(crate) struct Turn<'a> {
    held: &'a Held,
    index: usize,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let _ = backhaul_volume::frozen::unlock_byte(&self.held.journal, self.held.lock_at(self.index));
    }
}

impl Holding {
    pub(crate) fn new(journal: OwnedFd, files: Vec<OwnedFd>) -> io::Result<Self> {
        Self::from(journal, files, 0)
    }

    /// One superblock of a journal with several.
    pub(crate) fn at(journal: OwnedFd, file: OwnedFd, index: usize) -> io::Result<Self> {
        Self::from(journal, vec![file], index)
    }

    fn from(journal: OwnedFd, files: Vec<OwnedFd>, first: usize) -> io::Result<Self> {
        let count = files.len();
        let held = Arc::new(Held {
            journal,
            files,
            first,
            turns: (0..count).map(|_| Mutex::new(())).collect(),
            jobs: Mutex::new(Jobs { all: vec![Job::Done(true); count], ended: false }),
            asked: Condvar::new(),
            done: Condvar::new(),
        });
        let mut holding = Self { held, threads: Vec::with_capacity(count) };
        for index in 0..count {
            let held = holding.held.clone();
            let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || held.serve(index))?;
            holding.threads.push(thread);
        }
        Ok(holding)
    }

    pub(crate) fn len(&self) -> usize {
        self.held.files.len()
    }

    pub(crate) fn files(&self) -> &[OwnedFd] {
        &self.held.files
    }

    pub(crate) fn journal(&self) -> &OwnedFd {
        &self.held.journal
    }

    pub(crate) fn state(&self, index: usize) -> State {
        self.held.state(index)
    }

    pub(crate) fn set(&self, index: usize, state: State) -> io::Result<()> {
        self.held.set(index, state)
    }

    pub(crate) fn states(&self) -> impl Iterator<Item = State> + '_ {
        (0..self.len()).map(|i| self.state(i))
    }

    pub(crate) fn turn(&self, index: usize) -> Turn<'_> {
        self.held.turn(index)
    }

    /// With the turn in hand. Whether it is certain not to be frozen by us any more.
    pub(crate) fn thaw_one(&self, index: usize, who: Who, unfinished: Unfinished) -> bool {
        self.held.thaw_one(index, who, unfinished)
    }

    /// Thaws what may be frozen by us. Gives how many may still be frozen: come again.
    pub(crate) fn thaw_all(&self, who: Who, unfinished: Unfinished) -> usize {
        let mut jobs = self.held.jobs();
        for (index, job) in jobs.all.iter_mut().enumerate() {
            match job {
                Job::Done(_) if self.state(index).may_be_frozen() => *job = Job::Asked(who, unfinished),
                Job::Done(done) => *done = true,
                // It is at it still, since the last time.
                Job::Asked(..) | Job::Running => {}
            }
        }
        self.held.asked.notify_all();
        let until = Instant::now() + PATIENCE;
        while jobs.all.iter().any(|j| !matches!(j, Job::Done(_))) && Instant::now() < until {
            let left = until.since(Instant::now());
            jobs = self.held.done.wait_timeout(jobs, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        jobs.all.iter().filter(|j| **j != Job::Done(true)).count()
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let idle: Vec<bool> = {
            let mut jobs = self.held.jobs();
            jobs.ended = true;
            jobs.all.iter().map(|j| matches!(j, Job::Done(_))).collect()
        };
        self.held.asked.notify_all();
        // File systems are closed when this returns, but for those that hang.
        for (thread, idle) in self.threads.drain(..).zip(idle) {
            if idle {
                let _ = thread.join();
            }
        }
    }
}

impl Held {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A superblock's own thread.
    fn serve(&self, index: usize) {
        let mut jobs = self.jobs();
        loop {
            if let Job::Asked(who, unfinished) = jobs.all[index] {
                jobs.all[index] = Job::Running;
                drop(jobs);
                let done = {
                    let _turn = self.turn(index);
                    self.thaw_one(index, who, unfinished)
                };
                jobs = self.jobs();
                jobs.all[index] = Job::Done(done);
                self.done.notify_all();
            } else if jobs.ended {
                return;
            } else {
                jobs = self.asked.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn state(&self, index: usize) -> State {
        journal::state(&self.journal, self.first + index)
    }

    fn set(&self, index: usize, state: State) -> io::Result<()> {
        journal::set_state(&self.journal, self.first + index, state)
    }

    /// The byte of the journal that is locked for a superblock.
    fn lock_at(&self, index: usize) -> u64 {
        (self.first + index) as u64
    }

    /// Waits for the others, yet not for ever: one who was stopped in the middle must not keep a file system frozen.
    fn turn(&self, index: usize) -> Turn<'_> {
        let turn = self.turns[index].lock().unwrap_or_else(PoisonError::into_inner);
        // A thaw takes well under a millisecond; arbitrary above that.
        let until = Instant::now() + Duration::from_millis(50);
        while backhaul_volume::frozen::lock_byte(&self.journal, self.lock_at(index)).is_err() {
            if Instant::now() >= until {
                break;
            }
            sleep(Duration::from_micros(200));
        }
        Turn { held: self, index, _turn: turn }
    }

    fn thaw_one(&self, index: usize, who: Who, unfinished: Unfinished) -> bool {
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
            // Who stood in for us has thawed it by now: FITHAW waits for another one.
            Err(Some(Errno::INVAL)) if self.state(index) != state => return !self.state(index).may_be_frozen(),
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
