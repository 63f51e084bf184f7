//! The process that thaws when the helper cannot. It opens nothing and decides nothing: the journal says what is ours.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use backhaul_seams::failpoint;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::SLACK;
use crate::clock::{Instant, sleep, slice};
use crate::holding::{Holding, Unfinished, Who};
use crate::process::stay;
use crate::wire::{self, Tag};

/// Between tries: arbitrary, a few times what a thaw takes.
const AGAIN: Duration = Duration::from_millis(20);

pub(crate) fn run() -> io::Result<()> {
    let _signals = backhaul_volume::frozen::ending_signals()?;
    stay()?;
    let socket = std::io::stdin();
    wire::send(&socket, Tag::Hello)?;
    let mut holding = None;
    // Any error of the socket is the end of the helper.
    let _ = watch(socket.as_fd(), &mut holding);
    let Some(holding) = holding else { return Ok(()) };
    // The kernel closes a process's socket when its last thread has ended, so that none is in FIFREEZE any more. A thaw
    // that fails for ten seconds is left to the next start, which needs the journal's lock.
    let until = Instant::now() + Duration::from_secs(10);
    while holding.thaw_all(Who::Rescuer, Unfinished::Settle) > 0 && Instant::now() < until {
        sleep(AGAIN);
    }
    Ok(())
}

fn watch(socket: BorrowedFd<'_>, holding: &mut Option<Holding>) -> io::Result<()> {
    let mut until: Option<Instant> = None;
    loop {
        let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
        match poll(&mut fds, slice(until).as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !fds[0].revents().is_empty() {
            let Some(packet) = wire::receive(socket)? else { return Ok(()) };
            match packet.tag {
                Tag::Prepare => {
                    let mut files = packet.files.into_iter();
                    let journal = files.next().ok_or_else(wire::strange)?;
                    *holding = Some(Holding::new(journal, files.collect())?);
                    wire::send(socket, Tag::Prepare)?;
                }
                Tag::Freeze => {
                    until = Some(Instant(packet.number()) + SLACK);
                    let _ = failpoint::reach(|| "freeze.guard-armed");
                    wire::send(socket, Tag::Freeze)?;
                }
                Tag::Wait => until = Some(Instant::now() + SLACK),
                Tag::Done => until = None,
                _ => return Err(wire::strange()),
            }
        }
        if let (Some(at), Some(holding)) = (until, &holding)
            && Instant::now() >= at
        {
            holding.thaw_all(Who::Rescuer, Unfinished::Try);
            until = Some(Instant::now() + AGAIN);
        }
    }
}

/// The helper's end of it.
#[derive(Debug)]
pub(crate) struct Guard {
    pub(crate) socket: OwnedFd,
    child: Child,
}

impl Guard {
    pub(crate) fn start(command: &[std::ffi::OsString]) -> io::Result<Self> {
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let (program, args) = command.split_first().ok_or_else(wire::strange)?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn()?;
        let guard = Self { socket, child };
        guard.answer(Tag::Hello, Duration::from_secs(5))?;
        Ok(guard)
    }

    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Default::default())).is_ok() && fds[0].revents().is_empty()
    }

    pub(crate) fn prepare(&self, holding: &Holding) -> io::Result<()> {
        let mut files = vec![holding.journal().as_fd()];
        files.extend(holding.files().iter().map(AsFd::as_fd));
        wire::send_files(&self.socket, Tag::Prepare, &files)?;
        self.answer(Tag::Prepare, Duration::from_secs(5))
    }

    pub(crate) fn arm(&self, deadline: Instant) -> io::Result<()> {
        wire::send_number(&self.socket, Tag::Freeze, deadline.0)?;
        // Without an answer nothing is frozen. Arbitrary: it has only to wake up.
        self.answer(Tag::Freeze, Duration::from_millis(200))
    }

    fn answer(&self, tag: Tag, within: Duration) -> io::Result<()> {
        match wire::receive_within(&self.socket, within)? {
            Some(packet) if packet.tag == tag => Ok(()),
            Some(_) => Err(wire::strange()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Ends it and collects it, if it ends soon.
    pub(crate) fn end(mut self) {
        drop(self.socket);
        for _ in 0..200 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            sleep(Duration::from_millis(5));
        }
    }
}
