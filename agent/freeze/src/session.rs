//! One freeze, from the first FIFREEZE to the last FITHAW. Read first: [`Server::freeze`].
//!
//! FIFREEZE waits for writers and for a sync, and nothing ends the wait. So threads of their own are in it, one for each
//! superblock, while this one keeps the time. What a thread freezes too late it thaws at once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use backhaul_seams::failpoint;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::clock::{Instant, slice};
use crate::guard::Guard;
use crate::helper::{End, STACK, Server};
use crate::holding::{Holding, Unfinished, Who};
use crate::journal::State;
use crate::wire::{self, Answer, Code, Tag};

/// How often a thaw that failed is tried again; arbitrary.
const AGAIN: Duration = Duration::from_millis(20);
/// After so long the agent hears that a thaw fails; arbitrary.
const GIVE_UP: Duration = Duration::from_secs(1);

/// What the freezing thread and the one that keeps the time share.
struct Work {
    holding: Arc<Holding>,
    go: OwnedFd,
    done: OwnedFd,
    /// Freeze no more, and thaw what is frozen.
    abort: AtomicBool,
    /// When the first FIFREEZE began, nanoseconds since boot; 0 before.
    begun: AtomicU64,
    /// Index and errno of what failed; [`NONE`] if nothing did.
    failed: AtomicU64,
    /// Of each superblock, in the order of the journal: innermost first.
    levels: Vec<u32>,
    /// A level begins when the one before has ended.
    step: Barrier,
}

const NONE: u64 = u64::MAX;

impl Work {
    /// Lets the others go, level after level, and says when all have ended.
    fn run(&self) {
        // Also if it panics: whoever keeps the time then thaws what was frozen.
        let _done = Done(&self.done);
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.go, &mut count);
        self.begun.store(Instant::now().0, Ordering::SeqCst);
        for _ in self.steps() {
            self.step.wait();
        }
        self.step.wait();
    }

    /// Freezes one superblock when its level has its turn. Those of one level at once: the kernel waits some 40 ms for a
    /// grace period of RCU in each, and those who wait at the same time wait for the same one.
    fn run_one(&self, index: usize) {
        for level in self.steps() {
            self.step.wait();
            if level != self.levels[index] || self.abort.load(Ordering::SeqCst) || self.failed().is_some() {
                continue;
            }
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.one(index)));
            if let Err(errno) = result.unwrap_or(Err(Errno::IO)) {
                let failed = (index as u64) << 32 | u64::from(errno.raw_os_error() as u32);
                let _ = self.failed.compare_exchange(NONE, failed, Ordering::SeqCst, Ordering::SeqCst);
            }
        }
        self.step.wait();
    }

    /// The levels, innermost first, each once.
    fn steps(&self) -> impl Iterator<Item = u32> + '_ {
        let mut last = None;
        self.levels.iter().copied().filter(move |level| last.replace(*level) != Some(*level))
    }

    fn one(&self, index: usize) -> Result<(), Errno> {
        let errno = |e: io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
        let holding = &self.holding;
        if self.abort.load(Ordering::SeqCst) {
            return Ok(());
        }
        // Before the freeze: whoever reads the journal after a kill must know.
        holding.set(index, State::Freezing).map_err(errno)?;
        if failpoint::reach(|| "freeze.intent-recorded").is_err() {
            let _ = holding.set(index, State::NotOurs);
            return Err(Errno::IO);
        }
        let result = backhaul_volume::frozen::freeze(&holding.files()[index]).map_err(errno);
        if let Err(e) = result {
            // At once, before anything can happen to this process: it is not ours to thaw.
            holding.set(index, State::NotOurs).map_err(errno)?;
            return Err(e);
        }
        let failed = failpoint::reach(|| "freeze.one-frozen");
        let _turn = holding.turn(index);
        // The guard may have thawed it already, if this process did not move for long.
        if holding.state(index) == State::Freezing {
            // If this fails it counts as one that may be frozen.
            let _ = holding.set(index, State::Frozen);
        }
        if self.abort.load(Ordering::SeqCst) {
            holding.thaw_one(index, Who::Helper, Unfinished::Settle);
        }
        failed.and_then(|()| failpoint::reach(|| "freeze.one-recorded")).map_err(errno)
    }

    fn under_way(&self) -> usize {
        self.holding.states().position(|s| s == State::Freezing).unwrap_or(0)
    }

    fn failed(&self) -> Option<(usize, i32)> {
        match self.failed.load(Ordering::SeqCst) {
            NONE => None,
            both => Some(((both >> 32) as usize, both as u32 as i32)),
        }
    }
}

struct Done<'a>(&'a OwnedFd);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let _ = rustix::io::write(self.0, &u64::to_ne_bytes(1));
    }
}

/// What the time-keeping thread knows.
struct Session {
    deadline: Instant,
    /// The freezing thread is at it.
    working: bool,
    /// The agent has heard that everything is frozen, or that it is not.
    told: bool,
    /// The agent wants the thaw, and since when.
    asked: Option<Instant>,
    /// Why it is broken.
    why: Option<Code>,
    end: Option<End>,
    /// The agent needs it no more.
    release: bool,
}

impl Server<'_> {
    /// Freezes everything that is prepared and sees it thawed, whatever happens. An end if the helper is to end too.
    pub(crate) fn freeze(&mut self, limit: Duration) -> io::Result<Option<End>> {
        let (Some(holding), Some(guard)) = (self.holding.clone(), self.guard.take()) else {
            return self.fail(Code::GuardGone).map(|()| None);
        };
        for index in 0..holding.len() {
            holding.set(index, State::Idle)?;
        }
        self.outcome = None;
        let work = start(holding, self.levels())?;
        let deadline = Instant::now() + limit;
        if guard.arm(deadline).is_err() {
            // The thread ends without having frozen anything.
            work.abort.store(true, Ordering::SeqCst);
            rustix::io::write(&work.go, &u64::to_ne_bytes(1))?;
            guard.end();
            return self.fail(Code::GuardGone).map(|()| None);
        }
        rustix::io::write(&work.go, &u64::to_ne_bytes(1))?;
        let mut session =
            Session { deadline, working: true, told: false, asked: None, why: None, end: None, release: false };
        // From here on nothing is returned before nothing is frozen.
        self.keep_time(&work, &guard, &mut session);
        let ended = Instant::now();
        let _ = failpoint::reach(|| "freeze.all-thawed");
        let disarmed = wire::send(&guard.socket, Tag::Done).is_ok();
        self.guard = Some(guard);
        if work.failed().is_none() && session.why.is_none() && !disarmed {
            session.why = Some(Code::GuardGone);
        }
        let mut answer = judge(&work, session.why, ended, limit);
        if session.asked.is_some() && answer.code == Code::Fine && !self.is_unchanged() {
            answer.code = Code::Changed;
        }
        match session.asked {
            // Already told that the thaw failed.
            Some(_) if session.why == Some(Code::ThawFailed) => {}
            Some(_) => wire::send_answer(&self.client, Tag::Thaw, answer)?,
            None => self.outcome = Some(answer),
        }
        if session.release {
            self.release();
        }
        Ok(session.end)
    }

    fn keep_time(&self, work: &Work, guard: &Guard, session: &mut Session) {
        let mut left = 0;
        loop {
            let over =
                session.why.is_some() || session.asked.is_some() || (!session.working && work.failed().is_some());
            let until = if over { Instant::now() + AGAIN } else { session.deadline };
            if !over || session.working || left > 0 {
                self.hear(work, guard, session, until);
            }
            if Instant::now() >= session.deadline {
                session.why = session.why.or(Some(Code::Deadline));
            }
            self.tell(work, session);
            if session.why.is_none() && session.asked.is_none() && (session.working || work.failed().is_none()) {
                continue;
            }
            work.abort.store(true, Ordering::SeqCst);
            left = work
                .holding
                .thaw_all(Who::Helper, if session.working { Unfinished::Leave } else { Unfinished::Settle });
            if session.working {
                // The guard shall not thaw what is under way: somebody else's freeze may be what we wait for.
                let _ = wire::send(&guard.socket, Tag::Wait);
            } else if left == 0 {
                return;
            } else if session.asked.is_some_and(|at| Instant::now() >= at + GIVE_UP)
                && session.why != Some(Code::ThawFailed)
            {
                session.why = Some(Code::ThawFailed);
                let index = work.holding.states().position(|s| s.may_be_frozen()).unwrap_or(0);
                let answer = Answer { index: index as u8, ..Answer::new(Code::ThawFailed) };
                let _ = wire::send_answer(&self.client, Tag::Thaw, answer);
            }
        }
    }

    /// Waits for anything to happen, and takes note of it.
    fn hear(&self, work: &Work, guard: &Guard, session: &mut Session, until: Instant) {
        // An agent that is gone, or a guard, would be heard of again and again.
        let client = if session.end.is_some() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = [
            PollFd::new(&self.client, client),
            PollFd::from_borrowed_fd(self.signals, PollFlags::IN),
            PollFd::new(&guard.socket, PollFlags::RDHUP),
            PollFd::new(&work.done, if session.working { PollFlags::IN } else { PollFlags::empty() }),
        ];
        // What is over waits for the freezing thread alone, and briefly.
        let (from, to) = if session.end.is_some() || session.why.is_some() { (3, 4) } else { (0, 4) };
        if poll(&mut fds[from..to], slice(Some(until)).as_ref()).is_err() {
            return;
        }
        if session.working && !fds[3].revents().is_empty() {
            session.working = false;
            let _ = failpoint::reach(|| "freeze.all-frozen");
        }
        if from > 0 {
            return;
        }
        if !fds[2].revents().is_empty() {
            session.why = Some(Code::GuardGone);
        }
        if !fds[1].revents().is_empty() {
            (session.why, session.end) = (Some(Code::Ended), Some(End::Told));
        }
        if !fds[0].revents().is_empty() {
            match wire::receive(self.client.as_fd()).map(|p| p.map(|p| p.tag)) {
                Ok(Some(Tag::Thaw)) => session.asked = Some(Instant::now()),
                Ok(Some(Tag::Done)) => (session.why, session.release) = (Some(Code::NotNow), true),
                Ok(Some(_)) => {
                    let _ = self.fail(Code::NotNow);
                }
                Ok(None) | Err(_) => (session.why, session.end) = (Some(Code::Ended), Some(End::Gone)),
            }
        }
    }

    /// Tells the agent once how the freeze went. What cannot be sent is found out by the next `hear`.
    fn tell(&self, work: &Work, session: &mut Session) {
        if session.told {
            return;
        }
        let answer = match (session.working, work.failed(), session.why) {
            (false, Some((index, errno)), _) => Answer::errno(index, errno),
            (_, _, Some(code)) => Answer { index: work.under_way() as u8, ..Answer::new(code) },
            (false, None, None) => {
                session.told = true;
                let _ = wire::send(&self.client, Tag::Freeze);
                return;
            }
            (true, _, None) => return,
        };
        session.told = true;
        let _ = wire::send_answer(&self.client, Tag::Failed, answer);
        let _ = failpoint::reach(|| "freeze.failure-told");
    }
}

/// All threads, before anything is frozen.
fn start(holding: Arc<Holding>, levels: Vec<u32>) -> io::Result<Arc<Work>> {
    let work = Arc::new(Work {
        holding,
        go: eventfd(0, EventfdFlags::CLOEXEC)?,
        done: eventfd(0, EventfdFlags::CLOEXEC)?,
        abort: AtomicBool::new(false),
        begun: AtomicU64::new(0),
        failed: AtomicU64::new(NONE),
        step: Barrier::new(levels.len() + 1),
        levels,
    });
    for index in 0..work.levels.len() {
        let shared = work.clone();
        std::thread::Builder::new().stack_size(STACK).spawn(move || shared.run_one(index))?;
    }
    let shared = work.clone();
    std::thread::Builder::new().stack_size(STACK).spawn(move || shared.run())?;
    Ok(work)
}

/// Whether all of it was frozen by us and thawed by us, in time.
fn judge(work: &Work, why: Option<Code>, ended: Instant, limit: Duration) -> Answer {
    let lasted = ended.since(Instant(work.begun.load(Ordering::SeqCst)));
    let all = |code| Answer { code, index: 0, errno: 0, nanoseconds: lasted.as_nanos() as u64 };
    for (index, state) in work.holding.states().enumerate() {
        let code = match state {
            State::Lost => Code::Lost,
            State::Rescued => Code::Rescued,
            State::Freezing | State::Frozen => Code::ThawFailed,
            State::Idle | State::NotOurs | State::Thawed => continue,
        };
        return Answer { index: index as u8, ..all(code) };
    }
    match why {
        Some(code) => all(code),
        None if lasted > limit => all(Code::Deadline),
        None if !work.holding.states().all(|s| s == State::Thawed) => all(Code::Changed),
        None => all(Code::Fine),
    }
}
