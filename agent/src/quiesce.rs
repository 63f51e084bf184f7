//! One instant of mounted volumes: their file systems stand still while the last marked blocks are read into memory.
//!
//! Read first: [`Quiescer::hold`], then [`Quiescer::instant`]. A thread of its own talks to the freeze helper, since all
//! of that blocks; [`frozen`] is what happens while file systems are frozen.

mod frozen;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use backhaul_freeze::{Found, FreezeError, Freezer, Helper, Options, Prepared};
use backhaul_volume::VolumeError;
use backhaul_volume::sysfs::Dev;
use tokio::sync::oneshot;

pub use frozen::{Instant, Memory, Part, Verdict};

/// Where `backhaul-freezer.socket` listens.
pub const SOCKET: &str = "/run/backhaul/freezer.sock";
/// Where a helper that is our own child keeps its journal: in memory, since the disk may be what is frozen. The first
/// that is, which on most machines is the first.
const JOURNALS: [&str; 2] = ["/run", "/dev/shm"];

/// What a freeze may cost the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How long programs may wait for their writes.
    pub freeze: Duration,
    /// How long writing back what is dirty may take before that.
    pub sync: Duration,
    /// Bytes of the last changed blocks that are kept in memory.
    pub memory: usize,
}

impl Default for Limits {
    /// Half a second; ten; 32 MiB, which is what a usual disk brings in a fifth of a second.
    fn default() -> Self {
        Self { freeze: backhaul_freeze::DEFAULT_LIMIT, sync: Duration::from_secs(10), memory: 32 << 20 }
    }
}

/// Why file systems were not frozen.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// The freeze.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// Some of a file system lies on devices that are not protected with it.
    #[error("{what} lies on devices too that are not protected: protect all of them")]
    Outside {
        /// Which file system.
        what: String,
    },
    /// A block could not be read.
    #[error(transparent)]
    Read(#[from] VolumeError),
    /// Memory for the last blocks.
    #[error("no memory for the last changed blocks: {0}")]
    Memory(std::io::Error),
    /// The thread has ended.
    #[error("the thread that freezes has ended")]
    Gone,
}

impl QuiesceError {
    /// Whether the same may go better soon. Otherwise this machine, user or layout can't have it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Freeze(e) => e.is_retryable(),
            Self::Outside { .. } => false,
            Self::Read(e) => e.is_retryable(),
            Self::Memory(_) | Self::Gone => true,
        }
    }
}

enum Command {
    Hold { devices: Vec<Dev>, reply: oneshot::Sender<Result<Vec<String>, QuiesceError>> },
    Instant { parts: Vec<Part>, limit: Duration, reply: oneshot::Sender<Result<Instant, QuiesceError>> },
    Release,
}

/// Freezes on a thread of its own.
#[derive(Debug)]
pub struct Quiescer {
    commands: mpsc::Sender<Command>,
    /// What it may cost.
    pub limits: Limits,
}

impl Quiescer {
    /// Starts the thread; the helper is started when it is first needed.
    pub fn start(helper: Helper, limits: Limits) -> std::io::Result<Self> {
        let (commands, queue) = mpsc::channel();
        let thread = std::thread::Builder::new().name("quiesce".to_owned());
        thread.spawn(move || serve(&Options { helper }, limits, &queue))?;
        Ok(Self { commands, limits })
    }

    /// Finds what is mounted on these devices, has the helper hold on to it, and writes back what is dirty. Gives what a
    /// person should know. Until [`Quiescer::release`] none of it can be unmounted.
    pub async fn hold(&self, devices: Vec<Dev>) -> Result<Vec<String>, QuiesceError> {
        self.ask(|reply| Command::Hold { devices, reply }).await
    }

    /// Freezes what is held, reads what is marked, and thaws.
    pub async fn instant(&self, parts: Vec<Part>, limit: Duration) -> Result<Instant, QuiesceError> {
        self.ask(|reply| Command::Instant { parts, limit, reply }).await
    }

    /// Lets go of what is held.
    pub fn release(&self) {
        // A thread that has ended holds nothing.
        let _ = self.commands.send(Command::Release);
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, QuiesceError>>) -> Command,
    ) -> Result<T, QuiesceError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).map_err(|_| QuiesceError::Gone)?;
        answer.await.map_err(|_| QuiesceError::Gone)?
    }
}

/// The helper that is right for this process: the service where it is installed, or else a child.
pub fn helper(state: &[u8; 16]) -> Helper {
    if Path::new(SOCKET).exists() {
        return Helper::Connect(SOCKET.into());
    }
    let name: String = state.iter().map(|b| format!("{b:02x}")).collect();
    let folder = JOURNALS.iter().find(|folder| is_tmpfs(Path::new(folder))).unwrap_or(&JOURNALS[0]);
    Helper::Spawn {
        // Also after an upgrade has replaced the file that this process was started from.
        program: PathBuf::from("/proc/self/exe"),
        args: vec![OsString::from("freeze-helper")],
        journal: Path::new(folder).join("backhaul").join(format!("freeze-{name}")),
    }
}

fn is_tmpfs(folder: &Path) -> bool {
    /// linux/magic.h
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::statfs(folder).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC)
}

fn serve(options: &Options, limits: Limits, queue: &mpsc::Receiver<Command>) {
    let (mut freezer, mut memory) = (None, None);
    while let Ok(command) = queue.recv() {
        match command {
            Command::Hold { devices, reply } => {
                if let Err((error, reply)) = hold(options, limits, &mut freezer, &mut memory, &devices, queue, reply) {
                    // Whatever it was about, the next helper begins anew.
                    freezer = None;
                    let _ = reply.send(Err(error));
                }
            }
            Command::Instant { reply, .. } => {
                let _ = reply.send(Err(QuiesceError::Gone));
            }
            Command::Release => {}
        }
    }
}

type Reply = oneshot::Sender<Result<Vec<String>, QuiesceError>>;

/// Holds until it is released.
fn hold(
    options: &Options,
    limits: Limits,
    freezer: &mut Option<Freezer>,
    memory: &mut Option<Arc<Memory>>,
    devices: &[Dev],
    queue: &mpsc::Receiver<Command>,
    reply: Reply,
) -> Result<(), (QuiesceError, Reply)> {
    let (mut prepared, caveats) = match prepare(options, limits, freezer, devices) {
        Ok(prepared) => prepared,
        Err(error) => return Err((error, reply)),
    };
    if reply.send(Ok(caveats)).is_err() {
        return Ok(());
    }
    while let Ok(command) = queue.recv() {
        match command {
            Command::Instant { parts, limit, reply } => {
                let result = Memory::of(memory, limits.memory)
                    .map_err(QuiesceError::Memory)
                    .and_then(|memory| frozen::instant(&mut prepared, parts, limit, memory));
                let _ = reply.send(result);
            }
            Command::Release => break,
            Command::Hold { reply, .. } => {
                let _ = reply.send(Err(QuiesceError::Gone));
            }
        }
    }
    Ok(())
}

fn prepare<'f>(
    options: &Options,
    limits: Limits,
    freezer: &'f mut Option<Freezer>,
    devices: &[Dev],
) -> Result<(Prepared<'f>, Vec<String>), QuiesceError> {
    let freezer = match freezer {
        Some(freezer) => freezer,
        none => none.insert(Freezer::start(options)?),
    };
    let found: Found = freezer.find(devices)?;
    if let Some(part) = found.superblocks.iter().find(|s| !s.outside.is_empty()) {
        return Err(QuiesceError::Outside { what: part.to_string() });
    }
    let caveats = found.caveats.clone();
    let mut prepared = freezer.prepare(found)?;
    prepared.sync(limits.sync)?;
    Ok((prepared, caveats))
}
