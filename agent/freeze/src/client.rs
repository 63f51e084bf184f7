//! The agent's side: asks the helper, and thaws by itself if the helper ends.
//!
//! Read first: [`Freezer::start`], then [`Freezer::find`], [`Freezer::prepare`], [`Prepared::freeze`] and
//! [`Frozen::thaw`], in the order in which they are called. Everything blocks, within limits.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use backhaul_volume::sysfs::Dev;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair};

use crate::SLACK;
use crate::clock::{Instant, sleep};
use crate::error::{Broken, FreezeError};
use crate::found::Found;
use crate::helper::Wanted;
use crate::holding::{Holding, Unfinished, Who};
use crate::watch::Watch;
use crate::wire::{self, Answer, Code, Packet, Tag};

/// To look at all processes and devices of a large machine; arbitrary above that.
const LOOK: Duration = Duration::from_secs(30);
/// To answer what needs no disk; arbitrary.
const ANSWER: Duration = Duration::from_secs(10);

/// Where the helper comes from.
#[derive(Clone, Debug)]
pub enum Helper {
    /// A process of our own. `program` with `args` calls [`crate::helper_main`] with what follows.
    Spawn {
        /// The executable, usually our own.
        program: PathBuf,
        /// The hidden command.
        args: Vec<OsString>,
        /// On tmpfs, in a folder of root's: "/run/backhaul/freeze".
        journal: PathBuf,
    },
    /// `backhaul-freezer.service` behind its socket.
    Connect(PathBuf),
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the helper comes from.
    pub helper: Helper,
}

/// A helper that is ready. It ends with this value.
#[derive(Debug)]
pub struct Freezer {
    socket: Arc<OwnedFd>,
    child: Option<Child>,
    /// It did not answer once: whatever it says later belongs to another question. It may be in a freeze still.
    lost: bool,
}

impl Freezer {
    /// Starts or reaches a helper, which first thaws what a dead one left.
    pub fn start(options: &Options) -> Result<Self, FreezeError> {
        let (socket, child) = match &options.helper {
            Helper::Spawn { program, args, journal } => spawn(program, args, journal)?,
            Helper::Connect(path) => (reach(path)?, None),
        };
        let mut freezer = Self { socket: Arc::new(socket), child, lost: false };
        match freezer.expect(Tag::Hello, ANSWER) {
            Ok(hello) if hello.number() == wire::VERSION => Ok(freezer),
            Ok(_) => Err(FreezeError::system("understand the freeze helper", wire::strange())),
            Err(Reply::Failed(answer)) if answer.errno == Errno::WOULDBLOCK.raw_os_error() => match &options.helper {
                Helper::Spawn { journal, .. } => Err(FreezeError::InUse { journal: journal.clone() }),
                Helper::Connect(journal) => Err(FreezeError::InUse { journal: journal.clone() }),
            },
            Err(Reply::Failed(answer)) if answer.errno == Errno::PERM.raw_os_error() => Err(FreezeError::NoPrivilege),
            Err(reply) => Err(reply.into_error("start the freeze helper", &Found::default(), Duration::ZERO)),
        }
    }

    /// The helper's process, if it is a child.
    pub fn helper_process(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// [`crate::superblocks`] with the helper's privileges. The helper has all of it open from now on, so that it cannot
    /// be unmounted: prepare soon, or drop this value.
    pub fn find(&mut self, devices: &[Dev]) -> Result<Found, FreezeError> {
        let wanted = Wanted { devices: devices.to_vec() };
        let asked = wire::send_json(&*self.socket, Tag::Find, &wanted);
        let mut packet = self.after(asked, Tag::Find, LOOK, "look at what is mounted", &Found::default())?;
        packet.json().map_err(|e| FreezeError::system("understand the freeze helper", e))
    }

    /// Has helper and guard hold on to what was found last. Until the result is dropped none of it can be unmounted.
    pub fn prepare(&mut self, found: Found) -> Result<Prepared<'_>, FreezeError> {
        let asked = wire::send_json(&*self.socket, Tag::Prepare, &found);
        let packet = self.after(asked, Tag::Prepare, ANSWER, "prepare the freeze", &found)?;
        let mut files = packet.files.into_iter();
        let journal =
            files.next().ok_or_else(|| FreezeError::system("understand the freeze helper", wire::strange()))?;
        let holding = Holding::new(journal, files.collect()).map_err(|e| FreezeError::system("start a thread", e))?;
        let holding = Arc::new(holding);
        if holding.len() != found.superblocks.len() {
            return Err(FreezeError::system("understand the freeze helper", wire::strange()));
        }
        Ok(Prepared { freezer: self, found, holding })
    }

    fn after(
        &mut self,
        asked: io::Result<()>,
        tag: Tag,
        within: Duration,
        what: &str,
        found: &Found,
    ) -> Result<Packet, FreezeError> {
        self.ask(asked, tag, within).map_err(|r| r.into_error(what, found, within))
    }

    /// The answer to what was sent.
    fn ask(&mut self, asked: io::Result<()>, tag: Tag, within: Duration) -> Result<Packet, Reply> {
        match asked {
            Ok(()) => self.expect(tag, within),
            Err(_) if self.lost => Err(Reply::Silent),
            Err(_) => Err(Reply::Ended),
        }
    }

    /// The answer of that kind. Uses no memory unless descriptors come.
    fn expect(&mut self, tag: Tag, within: Duration) -> Result<Packet, Reply> {
        if self.lost {
            return Err(Reply::Silent);
        }
        let reply = match wire::receive_within(&*self.socket, within) {
            Ok(Some(packet)) if packet.tag == tag => Ok(packet),
            Ok(Some(packet)) if packet.tag == Tag::Failed => {
                packet.answer().map_err(|_| Reply::Silent).and_then(|a| Err(Reply::Failed(a)))
            }
            Ok(None) => Err(Reply::Ended),
            _ => Err(Reply::Silent),
        };
        if matches!(reply, Err(Reply::Ended | Reply::Silent)) {
            self.lose();
        }
        reply
    }

    fn lose(&mut self) {
        self.lost = true;
        // It hears that we are gone when it moves again. Only this way: what we can still hear is its end.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Write);
    }

    /// After a freeze that failed: returns when nothing is frozen. If that cannot be known the watch goes on.
    fn settle(&mut self, reply: &Reply, holding: &Holding, watch: Watch) {
        let last = match reply {
            Reply::Failed(_) => {
                // It says so before it thaws, and may be killed in between together with the guard. Only its next
                // answer comes afterwards.
                watch.helper_moves();
                let asked = wire::send(&*self.socket, Tag::Thaw);
                match self.ask(asked, Tag::Thaw, ANSWER).map(|p| p.answer()) {
                    Ok(Ok(answer)) if answer.code != Code::ThawFailed => return,
                    Err(Reply::Ended) => Some(Unfinished::Settle),
                    // It moves, or did: what it is in may wait for the freeze of somebody else.
                    _ => None,
                }
            }
            Reply::Ended => Some(Unfinished::Settle),
            Reply::Silent => Some(Unfinished::Try),
        };
        if let Some(unfinished) = last {
            holding.thaw_all(Who::Rescuer, unfinished);
        }
        self.lose();
        watch.leave();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.lose();
        let Some(mut child) = self.child.take() else { return };
        for _ in 0..100 {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            sleep(Duration::from_millis(5));
        }
        // It is in the kernel, or stopped. Somebody must collect it one day.
        std::thread::spawn(move || child.wait());
    }
}

fn spawn(program: &Path, args: &[OsString], journal: &Path) -> Result<(OwnedFd, Option<Child>), FreezeError> {
    if let Some(folder) = journal.parent() {
        use std::os::unix::fs::DirBuilderExt;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(|e| FreezeError::system(format!("create {}", folder.display()), e))?;
    }
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (socket, theirs) = pair.map_err(|e| FreezeError::system("make a socket", e))?;
    let mut command = Command::new(program);
    command.args(args).arg("serve").arg(journal).stdin(Stdio::from(theirs)).stdout(Stdio::null());
    // The agent's folder may be on what is to be unmounted one day.
    command.current_dir("/");
    let child = command.spawn().map_err(|e| FreezeError::system(format!("start {}", program.display()), e))?;
    Ok((socket, Some(child)))
}

fn reach(path: &Path) -> Result<OwnedFd, FreezeError> {
    let made = || -> rustix::io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let what = || format!("reach {}; type: systemctl start backhaul-freezer.socket", path.display());
    made().map_err(|e| FreezeError::system(what(), e))
}

/// Why there is not the answer that was wanted.
enum Reply {
    /// The helper's own.
    Failed(Answer),
    /// The helper has ended: none of its threads is in the kernel any more.
    Ended,
    /// It does not move, or not as it should.
    Silent,
}

impl Reply {
    fn into_error(self, doing: &str, found: &Found, limit: Duration) -> FreezeError {
        let Self::Failed(answer) = self else { return FreezeError::HelperGone };
        let what = name(found, answer.index);
        match answer.code {
            Code::Deadline => FreezeError::TooSlow { what: format!("to {doing} {what}"), limit },
            Code::GuardGone => FreezeError::GuardGone,
            Code::Changed => FreezeError::Changed,
            Code::TooMany => FreezeError::TooMany { found: found.superblocks.len() },
            Code::NotNow => {
                FreezeError::system(format!("{doing}: the helper is not done with what was before"), Errno::AGAIN)
            }
            Code::Errno => match Errno::from_raw_os_error(answer.errno) {
                Errno::BUSY if doing == FREEZE => FreezeError::FrozenByOther { what },
                Errno::OPNOTSUPP => FreezeError::NotSupported { what },
                Errno::PERM => FreezeError::NoPrivilege,
                errno if doing == FREEZE => FreezeError::Failed { what, source: errno.into() },
                errno => FreezeError::system(format!("{doing} {what}"), errno),
            },
            _ => FreezeError::HelperGone,
        }
    }
}

const FREEZE: &str = "freeze";

fn name(found: &Found, index: u8) -> String {
    found.superblocks.get(usize::from(index)).map(ToString::to_string).unwrap_or_default()
}

/// Everything is open, the guard is up, memory is locked.
#[derive(Debug)]
pub struct Prepared<'a> {
    freezer: &'a mut Freezer,
    found: Found,
    holding: Arc<Holding>,
}

impl Prepared<'_> {
    /// What is prepared.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Writes back what is dirty on each file system, so that the freeze has little to do. To be called just before it.
    pub fn sync(&mut self, budget: Duration) -> Result<(), FreezeError> {
        let asked = wire::send_number(&*self.freezer.socket, Tag::Sync, nanoseconds(budget));
        let reply = self.freezer.ask(asked, Tag::Sync, budget + ANSWER);
        reply.map(drop).map_err(|r| r.into_error("sync", &self.found, budget))
    }

    /// Freezes everything. All of it is frozen when this returns, and thawed `limit` after the first freeze began at the
    /// latest, whatever happens to whom.
    ///
    /// Until then the caller touches only what is open and in memory: no file, no log, no allocation.
    pub fn freeze(&mut self, limit: Duration) -> Result<Frozen<'_>, FreezeError> {
        if self.freezer.lost {
            return Err(FreezeError::HelperGone);
        }
        let deadline = Instant::now() + limit;
        // Helper first, guard a bit later, ourselves last.
        let watch = Watch::start(self.freezer.socket.clone(), self.holding.clone(), deadline + SLACK * 2)
            .map_err(|e| FreezeError::system("start a thread", e))?;
        let asked = wire::send_number(&*self.freezer.socket, Tag::Freeze, nanoseconds(limit));
        match self.freezer.ask(asked, Tag::Freeze, limit + SLACK * 3) {
            Ok(_) => Ok(Frozen {
                freezer: self.freezer,
                found: &self.found,
                holding: &self.holding,
                watch: Some(watch),
                deadline,
            }),
            Err(reply) => {
                self.freezer.settle(&reply, &self.holding, watch);
                Err(reply.into_error(FREEZE, &self.found, limit))
            }
        }
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        let _ = wire::send(&*self.freezer.socket, Tag::Done);
    }
}

fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// Everything is frozen. Dropped it thaws.
#[derive(Debug)]
pub struct Frozen<'a> {
    freezer: &'a mut Freezer,
    found: &'a Found,
    holding: &'a Arc<Holding>,
    watch: Option<Watch>,
    deadline: Instant,
}

/// How a freeze ended. Everything is thawed in any case, but for [`Broken::ThawFailed`].
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use = "what was read is of one instant only if it held"]
pub enum Thawed {
    /// Frozen and thawed by us alone, all of it, within the limit.
    Held {
        /// From the first FIFREEZE to the last FITHAW.
        frozen_for: Duration,
    },
    /// What was read may not be of one instant.
    Broken(Broken),
}

impl Frozen<'_> {
    /// How long it will stay frozen if nobody thaws. To be looked at before one more thing is read.
    pub fn remaining(&self) -> Duration {
        self.deadline.since(Instant::now())
    }

    /// Thaws everything.
    pub fn thaw(mut self) -> Thawed {
        self.end()
    }

    fn end(&mut self) -> Thawed {
        let asked = wire::send(&*self.freezer.socket, Tag::Thaw);
        let reply = self.freezer.ask(asked, Tag::Thaw, ANSWER);
        let unfinished = if matches!(reply, Err(Reply::Ended)) { Unfinished::Settle } else { Unfinished::Try };
        let answer = reply.ok().and_then(|p| p.answer().ok());
        if answer.is_none() {
            // The guard is at it too; only one of us thaws each.
            self.holding.thaw_all(Who::Rescuer, unfinished);
        }
        let watch = self.watch.take();
        if answer.is_none_or(|a| a.code == Code::ThawFailed) {
            self.freezer.lose();
            watch.into_iter().for_each(Watch::leave);
        }
        let Some(answer) = answer else { return Thawed::Broken(Broken::HelperGone) };
        let what = name(self.found, answer.index);
        Thawed::Broken(match answer.code {
            Code::Fine => return Thawed::Held { frozen_for: Duration::from_nanos(answer.nanoseconds) },
            Code::Deadline => Broken::Deadline,
            Code::Lost => Broken::ThawedByOther { what },
            Code::Rescued => Broken::Rescued { what },
            Code::GuardGone => Broken::GuardGone,
            Code::Ended => Broken::Ended,
            Code::Changed => Broken::Changed,
            Code::ThawFailed => Broken::ThawFailed { what },
            Code::Errno | Code::TooMany | Code::NotNow => Broken::HelperGone,
        })
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.watch.is_some() {
            let _ = self.end();
        }
    }
}
