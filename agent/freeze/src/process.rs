//! The hidden command that is helper, guard, or one thaw of what was left over. Read first: [`helper_main`].

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::clock::{Instant, sleep};
use crate::helper::{End, Server};
use crate::left_over::{LeftOver, ThawedLeftOver, thaw_left_over};
use crate::wire::{self, Answer, Tag};
use crate::{guard, journal};

/// The whole of the helper process. `args` is what follows the hidden command: a role and the journal's path.
///
/// - `serve`: standard input is the agent's socket. Ends with the agent.
/// - `listen`: standard input is a listening socket (systemd: `StandardInput=socket`). One agent at a time.
/// - `thaw`: thaws what a dead helper left frozen, and says so. Fails if one that lives keeps the journal for ten seconds.
/// - `guard`: for the helper itself.
///
/// To be called before any thread is started.
pub fn helper_main(args: Vec<OsString>) -> ExitCode {
    let [role, journal] = &args[..] else {
        eprintln!("usage: serve|listen|thaw JOURNAL");
        return ExitCode::from(2);
    };
    let journal = Path::new(journal);
    let done = match role.to_str() {
        Some("serve") => serve(journal, args.len()),
        Some("listen") => listen(journal, args.len()),
        Some("thaw") => return thaw(journal),
        Some("guard") => guard::run(),
        _ => Err(io::Error::other(format!("no role {}", role.display()))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("freeze helper: {e}");
            ExitCode::FAILURE
        }
    }
}

fn serve(journal: &Path, own_args: usize) -> io::Result<()> {
    let client = std::io::stdin().as_fd().try_clone_to_owned()?;
    match set_up(journal) {
        Ok(signals) => {
            Server::new(client, signals.as_fd(), journal, guard_command(journal, own_args)?).serve().map(drop)
        }
        Err(e) => {
            let errno = e.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            wire::send_answer(&client, Tag::Failed, Answer::errno(0, errno))?;
            Err(e)
        }
    }
}

fn listen(journal: &Path, own_args: usize) -> io::Result<()> {
    let signals = set_up(journal)?;
    let stdin = std::io::stdin();
    loop {
        let mut fds = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        let client = rustix::net::accept_with(&stdin, rustix::net::SocketFlags::CLOEXEC)?;
        // After an error systemd starts a new one: threads of the old may wait for ever, with file systems open.
        match Server::new(client, signals.as_fd(), journal, guard_command(journal, own_args)?).serve()? {
            End::Gone => {}
            End::Told => return Ok(()),
        }
    }
}

fn thaw(journal: &Path) -> ExitCode {
    // What is being killed may be in FIFREEZE for a while, and then nobody else thaws it. Arbitrary above a second.
    match thaw_when_free(journal, Duration::from_secs(10)) {
        Ok(outcomes) => {
            report(&outcomes);
            ExitCode::from(u8::from(outcomes.iter().any(|o| matches!(o.outcome, LeftOver::Failed(_)))))
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
            eprintln!("a freeze helper that uses {} is at work or in the kernel; try again", journal.display());
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("cannot read {}: {e}", journal.display());
            ExitCode::FAILURE
        }
    }
}

fn report(outcomes: &[ThawedLeftOver]) {
    for one in outcomes {
        match &one.outcome {
            LeftOver::Thawed => eprintln!("thawed {}, which a dead freeze helper had left frozen", one.what),
            LeftOver::WasNotFrozen | LeftOver::Gone => {}
            LeftOver::Failed(why) => eprintln!("{why}; mount it and type: fsfreeze --unfreeze MOUNT-POINT"),
        }
    }
}

/// Makes this process one that can freeze: alone in its session, in memory for good, and with a clean slate.
fn set_up(journal: &Path) -> io::Result<OwnedFd> {
    let signals = backhaul_volume::frozen::ending_signals()?;
    stay()?;
    journal::check_folder(journal)?;
    loop {
        // The guard of one who just died may be at work still.
        match thaw_when_free(journal, Duration::from_secs(2)) {
            Ok(outcomes) => {
                report(&outcomes);
                return Ok(signals);
            }
            Err(e) if e.kind() == io::ErrorKind::InvalidData => eprintln!("freeze helper: {e}; it was put aside"),
            Err(e) => return Err(e),
        }
    }
}

/// [`thaw_left_over`], waiting for so long for those who have the journal to end.
fn thaw_when_free(journal: &Path, within: Duration) -> io::Result<Vec<ThawedLeftOver>> {
    let until = Instant::now() + within;
    loop {
        match thaw_left_over(journal) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// For helper and guard: not ended by the agent's terminal, not swapped out, the last to be chosen when memory is short.
pub(crate) fn stay() -> io::Result<()> {
    // Fails only where it leads a group already.
    let _ = rustix::process::setsid();
    // Both may be forbidden, and nothing depends on them.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = rustix::process::setpriority_process(None, -20);
    use rustix::mm::MlockAllFlags;
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE)
        .map_err(|e| io::Error::from_raw_os_error(e.raw_os_error()))
}

/// This program again, with everything that led here but the role.
fn guard_command(journal: &Path, own_args: usize) -> io::Result<Vec<OsString>> {
    let all: Vec<OsString> = std::env::args_os().collect();
    let prefix = all.len().checked_sub(own_args).ok_or_else(|| io::Error::other("called with arguments of its own"))?;
    let program = PathBuf::from("/proc/self/exe").into_os_string();
    let hidden = all.into_iter().take(prefix).skip(1);
    Ok(std::iter::once(program).chain(hidden).chain(["guard".into(), journal.into()]).collect())
}
