//! The helper's side of the conversation with one agent. Read first: [`Server::serve`]; freezing itself is in `session`.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use backhaul_seams::failpoint;
use backhaul_volume::sysfs::Dev;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::clock::Instant;
use crate::find;
use crate::found::{Found, texts};
use crate::guard::Guard;
use crate::holding::Holding;
use crate::journal::{self, Entry, MAX_SUPERBLOCKS};
use crate::left_over::identity;
use crate::wire::{self, Answer, Code, Packet, Tag};

/// Of threads, which lie in locked memory: arbitrary, many times of what they need.
pub(crate) const STACK: usize = 128 << 10;

/// What the agent asks to be looked at.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Wanted {
    #[serde(with = "texts")]
    pub(crate) devices: Vec<Dev>,
}

/// Why a conversation ended without an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The agent went.
    Gone,
    /// A signal told the helper to end.
    Told,
}

pub(crate) struct Server<'a> {
    pub(crate) client: OwnedFd,
    pub(crate) signals: BorrowedFd<'a>,
    journal: &'a Path,
    guard_command: Vec<OsString>,
    pub(crate) guard: Option<Guard>,
    wanted: Wanted,
    looked: Option<(Found, Vec<OwnedFd>)>,
    found: Found,
    pub(crate) holding: Option<Arc<Holding>>,
    /// How the last freeze ended, until the agent asks.
    pub(crate) outcome: Option<Answer>,
    /// Threads in syncfs.
    syncing: Arc<AtomicUsize>,
}

impl<'a> Server<'a> {
    pub(crate) fn new(
        client: OwnedFd,
        signals: BorrowedFd<'a>,
        journal: &'a Path,
        guard_command: Vec<OsString>,
    ) -> Self {
        Self {
            client,
            signals,
            journal,
            guard_command,
            guard: None,
            wanted: Wanted::default(),
            looked: None,
            found: Found::default(),
            holding: None,
            outcome: None,
            syncing: Arc::default(),
        }
    }

    /// Does what the agent asks until it goes. Nothing is frozen afterwards.
    pub(crate) fn serve(mut self) -> io::Result<End> {
        let end = self.converse();
        self.release();
        if let Some(guard) = self.guard.take() {
            guard.end();
        }
        end
    }

    fn converse(&mut self) -> io::Result<End> {
        wire::send_number(&self.client, Tag::Hello, wire::VERSION)?;
        loop {
            let mut fds =
                [PollFd::new(&self.client, PollFlags::IN), PollFd::from_borrowed_fd(self.signals, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            if !fds[1].revents().is_empty() {
                return Ok(End::Told);
            }
            let Some(packet) = wire::receive(&self.client)? else { return Ok(End::Gone) };
            if packet.tag == Tag::Freeze {
                if let Some(end) = self.freeze(Duration::from_nanos(packet.number()))? {
                    return Ok(end);
                }
                continue;
            }
            if let Err(e) = self.answer(packet) {
                let errno = e.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
                wire::send_answer(&self.client, Tag::Failed, Answer::errno(0, errno))?;
            }
        }
    }

    fn answer(&mut self, mut packet: Packet) -> io::Result<()> {
        match packet.tag {
            Tag::Find => {
                self.wanted = packet.json()?;
                let (found, files) = find::find(&self.wanted.devices)?;
                wire::send_json(&self.client, Tag::Find, &found)?;
                self.looked = Some((found, files));
                Ok(())
            }
            Tag::Prepare => {
                let found: Found = packet.json()?;
                match self.looked.take() {
                    Some((looked, _)) if looked != found => self.fail(Code::Changed),
                    None => self.fail(Code::Changed),
                    Some((_, files)) if files.len() > MAX_SUPERBLOCKS => self.fail(Code::TooMany),
                    Some((_, files)) => self.prepare(found, files),
                }
            }
            Tag::Sync => self.sync(Duration::from_nanos(packet.number())),
            Tag::Thaw => {
                let answer = self.outcome.take().unwrap_or(Answer::new(Code::NotNow));
                wire::send_answer(&self.client, Tag::Thaw, answer)
            }
            // The agent does not wait for an answer.
            Tag::Done => {
                self.release();
                Ok(())
            }
            _ => self.fail(Code::NotNow),
        }
    }

    pub(crate) fn fail(&self, code: Code) -> io::Result<()> {
        wire::send_answer(&self.client, Tag::Failed, Answer::new(code))
    }

    fn prepare(&mut self, found: Found, files: Vec<OwnedFd>) -> io::Result<()> {
        self.release();
        let entry = |(superblock, fd)| -> io::Result<Entry> {
            let superblock: &crate::Superblock = superblock;
            let (fs_id, sequence) = identity(superblock, fd)?;
            Ok(Entry { superblock: superblock.clone(), fs_id, sequence })
        };
        let entries = found.superblocks.iter().zip(&files).map(entry).collect::<io::Result<Vec<_>>>()?;
        let guard = match self.guard.take() {
            Some(guard) if guard.is_alive() => guard,
            dead => {
                if let Some(dead) = dead {
                    dead.end();
                }
                Guard::start(&self.guard_command)?
            }
        };
        let journal = journal::create(self.journal, entries)?;
        failpoint::reach(|| "freeze.journal-written")?;
        // The agent gets the journal without our lock: who locks it anew must find it free when we and the guard end.
        let unlocked = std::fs::File::options().read(true).write(true).open(self.journal)?;
        let holding = Arc::new(Holding::new(journal, files)?);
        guard.prepare(&holding)?;
        failpoint::reach(|| "freeze.guard-prepared")?;
        let mut sent = vec![unlocked.as_fd()];
        sent.extend(holding.files().iter().map(AsFd::as_fd));
        wire::send_files(&self.client, Tag::Prepare, &sent)?;
        (self.guard, self.found, self.holding, self.outcome) = (Some(guard), found, Some(holding), None);
        Ok(())
    }

    /// Lets go of what was prepared: file systems that are held open cannot be unmounted.
    pub(crate) fn release(&mut self) {
        let Some(holding) = self.holding.take() else { return };
        if let Some(guard) = self.guard.take() {
            guard.end();
        }
        if !holding.states().any(|s| s.may_be_frozen()) {
            let _ = std::fs::remove_file(self.journal);
        }
    }

    fn sync(&self, budget: Duration) -> io::Result<()> {
        let Some(holding) = &self.holding else { return self.fail(Code::NotNow) };
        // One that hangs in the kernel would be joined by more with every call.
        if self.syncing.load(Ordering::SeqCst) > 0 {
            return self.fail(Code::Deadline);
        }
        let until = Instant::now() + budget;
        let (done, results) = mpsc::channel();
        for index in 0..holding.len() {
            let (holding, done, syncing) = (holding.clone(), done.clone(), self.syncing.clone());
            syncing.fetch_add(1, Ordering::SeqCst);
            let work = move || {
                let result = rustix::fs::syncfs(&holding.files()[index]);
                // An Arc that a thread in the kernel has keeps file systems open, and nothing else can be done about it.
                drop(holding);
                syncing.fetch_sub(1, Ordering::SeqCst);
                let _ = done.send((index, result));
            };
            std::thread::Builder::new().stack_size(STACK).spawn(work)?;
        }
        let mut missing: Vec<usize> = (0..holding.len()).collect();
        while !missing.is_empty() {
            match results.recv_timeout(until.since(Instant::now())) {
                Ok((index, Ok(()))) => missing.retain(|i| *i != index),
                Ok((index, Err(e))) => {
                    return wire::send_answer(&self.client, Tag::Failed, Answer::errno(index, e.raw_os_error()));
                }
                Err(_) => {
                    let answer = Answer { index: missing[0] as u8, ..Answer::new(Code::Deadline) };
                    return wire::send_answer(&self.client, Tag::Failed, answer);
                }
            }
        }
        wire::send(&self.client, Tag::Sync)
    }

    pub(crate) fn levels(&self) -> Vec<u32> {
        self.found.superblocks.iter().map(|s| s.level).collect()
    }

    /// Whether the same file systems lie on the devices as before the freeze. One that came in between was not frozen.
    pub(crate) fn is_unchanged(&self) -> bool {
        find::find(&self.wanted.devices).is_ok_and(|(now, _)| essence(&now) == essence(&self.found))
    }
}

/// Mount points and sentences left out: containers come and go.
fn essence(found: &Found) -> impl PartialEq + '_ {
    let superblocks: Vec<_> = found.superblocks.iter().map(|s| (s.dev, &s.devices, s.level)).collect();
    let others: Vec<_> = found.not_freezable.iter().map(|n| (&n.devices, n.why)).collect();
    (superblocks, others, &found.swap, &found.unmounted)
}
