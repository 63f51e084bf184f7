//! One command of the user: `sh -c` in a process group of its own.
//!
//! Read first: [`run`]. It blocks, and ends in bounded time whatever the command does: with the timeout, with too much
//! output, or when it is told to stop, the whole group gets SIGTERM and after a while SIGKILL. What a command that ended
//! well left running is let alone: it may hold something that `post` ends.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, test_kill_process_group};

use super::{Hook, HookError, Said};

/// What a group has to end after SIGTERM. Less than what systemd gives a service by far, and enough to let go.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked whether to stop.
const TICK: Duration = Duration::from_millis(50);
/// Standard output of `pre`: 64 paths of 1 KiB.
const MAX_ANSWER: usize = 64 << 10;
/// A line of standard error that is longer is cut.
const MAX_LINE: usize = 1 << 10;
/// Lines of one hook that go to the log. Arbitrary.
const MAX_LOGGED: usize = 1000;
/// Lines of standard error in an error.
const LAST_LINES: usize = 5;

/// Runs a command to its end and gives what it printed. `started` is told its process. Stops it when `stop` is set.
pub fn run(
    hook: Hook,
    command: &str,
    env: &[(String, String)],
    timeout: Duration,
    stop: Option<&AtomicBool>,
    started: impl FnOnce(Pid),
) -> Result<Vec<u8>, HookError> {
    let deadline = Instant::now() + timeout;
    let failed = |source| HookError::Start { hook, source };
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .current_dir("/")
        .env_clear()
        .envs(env.iter().map(|(k, v)| (k, v)))
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let pid = Pid::from_child(&child);
    started(pid);
    let (mut out, mut log) = (Answer::default(), Log::new(hook));
    let ended = watch(&mut child, pid, hook, deadline, stop, &mut out, &mut log);
    let how = match ended {
        Ok(Ended::ByItself(status)) if status.success() => None,
        Ok(Ended::ByItself(status)) => Some(ended_how(status)),
        Ok(Ended::TooLong) => Some(format!("was killed: it took longer than {} s", timeout.as_secs())),
        Ok(Ended::TooMuch) => Some(format!("was killed: it printed more than {MAX_ANSWER} bytes")),
        Ok(Ended::Stopped) => Some("was stopped".to_owned()),
        Err(e) => {
            end_group(&mut child, pid);
            Some(format!("can't be watched: {e}"))
        }
    };
    log.end();
    match how {
        None => Ok(out.bytes),
        Some(how) => Err(HookError::Failed { hook, how, said: Said(log.last.into()) }),
    }
}

enum Ended {
    ByItself(ExitStatus),
    TooLong,
    TooMuch,
    Stopped,
}

fn watch(
    child: &mut Child,
    pid: Pid,
    hook: Hook,
    deadline: Instant,
    stop: Option<&AtomicBool>,
    out: &mut Answer,
    log: &mut Log,
) -> io::Result<Ended> {
    let exit = pidfd_open(pid, PidfdFlags::empty())?;
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    for pipe in [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().flatten() {
        rustix::fs::fcntl_setfl(pipe, rustix::fs::fcntl_getfl(pipe)? | rustix::fs::OFlags::NONBLOCK)?;
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = Timespec { tv_sec: 0, tv_nsec: left.min(TICK).subsec_nanos().into() };
        let exited = {
            let fds = [Some(exit.as_fd()), stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
            let mut fds: Vec<_> =
                fds.into_iter().flatten().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match poll(&mut fds, Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            !fds[0].revents().is_empty()
        };
        // After it has ended: what it wrote before that is in the pipes. What it left running may hold them open.
        drain(&mut stdout, &mut |bytes| out.add(bytes))?;
        drain(&mut stderr, &mut |bytes| log.add(bytes))?;
        let ended = if hook == Hook::Pre && out.total > MAX_ANSWER {
            Ended::TooMuch
        } else if exited {
            return Ok(Ended::ByItself(child.wait()?));
        } else if left.is_zero() {
            Ended::TooLong
        } else if stop.is_some_and(|stop| stop.load(Ordering::Acquire)) {
            Ended::Stopped
        } else {
            continue;
        };
        // Nobody reads any more: who still writes gets SIGPIPE.
        drop((stdout, stderr));
        end_group(child, pid);
        return Ok(ended);
    }
}

/// Reads what is there; bounded, so that a flood does not keep us from looking at the clock.
fn drain<P: Read>(pipe: &mut Option<P>, add: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    for _ in 0..16 {
        let Some(open) = pipe.as_mut() else { return Ok(()) };
        match open.read(&mut buffer) {
            Ok(0) => *pipe = None,
            Ok(n) => add(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// SIGTERM, some time, SIGKILL. The group is there while any process of it is, and its number is nobody else's so long.
fn end_group(child: &mut Child, pid: Pid) {
    let _ = kill_process_group(pid, Signal::TERM);
    let begun = Instant::now();
    while begun.elapsed() < GRACE {
        // Reaped first: as a zombie it would count as one of the group.
        let reaped = matches!(child.try_wait(), Ok(Some(_)));
        if reaped && test_kill_process_group(pid).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = kill_process_group(pid, Signal::KILL);
    let _ = child.wait();
}

fn ended_how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "did not end well".to_owned(),
    }
}

#[derive(Default)]
struct Answer {
    bytes: Vec<u8>,
    total: usize,
}

impl Answer {
    fn add(&mut self, bytes: &[u8]) {
        self.total = self.total.saturating_add(bytes.len());
        let room = MAX_ANSWER.saturating_sub(self.bytes.len());
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

/// Standard error, line by line.
struct Log {
    hook: Hook,
    line: Vec<u8>,
    lines: usize,
    last: VecDeque<String>,
}

impl Log {
    fn new(hook: Hook) -> Self {
        Self { hook, line: Vec::new(), lines: 0, last: VecDeque::new() }
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end(),
                _ if self.line.len() < MAX_LINE => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn end(&mut self) {
        let line = std::mem::take(&mut self.line);
        let text: String =
            String::from_utf8_lossy(&line).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        self.lines += 1;
        if self.lines <= MAX_LOGGED {
            tracing::info!(hook = %self.hook, "{text}");
        } else if self.lines == MAX_LOGGED + 1 {
            tracing::warn!(hook = %self.hook, "it says more than {MAX_LOGGED} lines; the rest is left out");
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
        }
        self.last.push_back(text.to_owned());
    }
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
