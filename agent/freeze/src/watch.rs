//! The agent's last resort: a thread that thaws when helper and guard do not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::clock::{Instant, sleep, slice};
use crate::holding::{Holding, Unfinished, Who};

/// How long thaws that fail are tried again when the helper has ended, as the guard does.
const GIVE_UP: Duration = Duration::from_secs(10);

/// A thread that thaws when the helper ends, or neither helper nor guard moves. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Arc<OwnedFd>,
    /// When to thaw without having seen the helper's end, as [`Instant`] has it.
    deadline: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start(socket: Arc<OwnedFd>, holding: Arc<Holding>, deadline: Instant) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = stop.clone();
        let deadline = Arc::new(AtomicU64::new(deadline.0));
        let until = deadline.clone();
        let thread = std::thread::Builder::new().spawn(move || watch(&socket, &stopped, &holding, &until))?;
        Ok(Self { stop, deadline, thread: Some(thread) })
    }

    /// It thaws by itself, as long as it lives.
    pub(crate) fn helper_moves(&self) {
        self.deadline.store(u64::MAX, Ordering::SeqCst);
    }

    /// Nobody waits for it: it ends some time after the helper. Until then file systems are held open.
    pub(crate) fn leave(mut self) {
        self.thread = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let _ = rustix::io::write(&*self.stop, &u64::to_ne_bytes(1));
        let _ = thread.join();
    }
}

fn watch(socket: &OwnedFd, stop: &OwnedFd, holding: &Holding, deadline: &AtomicU64) {
    let mut gone: Option<Instant> = None;
    loop {
        let deadline = Instant(deadline.load(Ordering::SeqCst));
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(socket, PollFlags::RDHUP)];
        // A socket that is gone would wake us at once, again and again.
        let count = if gone.is_some() { 1 } else { 2 };
        let until = if gone.is_some() { Instant::now() + Duration::from_millis(5) } else { deadline };
        let _ = poll(&mut fds[..count], slice(Some(until)).as_ref());
        if !fds[0].revents().is_empty() {
            return;
        }
        if gone.is_none() && !fds[1].revents().is_empty() {
            gone = Some(Instant::now());
        }
        // Without the privilege nothing happens, and the guard or the unit's stop thaws.
        if let Some(at) = gone {
            // Its socket is closed when its last thread has ended, so that none is in FIFREEZE any more.
            if holding.thaw_all(Who::Rescuer, Unfinished::Settle) == 0 || Instant::now() >= at + GIVE_UP {
                return;
            }
        } else if Instant::now() >= deadline {
            holding.thaw_all(Who::Rescuer, Unfinished::Try);
            sleep(Duration::from_millis(5));
        }
    }
}
