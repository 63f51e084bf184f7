//! The programs under test: run to their end, or started and ended again.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A command that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where a program of this workspace is: beside the tests, where the same build put it.
pub fn program(name: &str) -> PathBuf {
    let mut folder = std::env::current_exe().expect("a test knows its own path");
    folder.pop();
    if folder.ends_with("deps") {
        folder.pop();
    }
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: cargo build -p backhaul-agent -p backhaul-receiver", path.display());
    path
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// What was typed.
    pub line: String,
    /// Its exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// It must have ended well; gives its JSON.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.code, Some(0), "must end well: {self:#?}");
        self.json()
    }

    /// It must have ended with this exit code and this error.
    #[track_caller]
    pub fn fails(&self, code: i32, id: &str) -> Value {
        assert_eq!(self.code, Some(code), "want exit {code} {id}: {self:#?}");
        let json = self.json();
        assert_eq!(json["schema"], "backhaul.error/1", "{self:#?}");
        assert_eq!(json["error"]["code"], id, "{self:#?}");
        let message = json["error"]["message"].as_str().expect("an error has a message");
        assert!(!message.is_empty() && !self.err.contains("panicked"), "{self:#?}");
        json
    }

    /// Exactly one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("no JSON ({e}): {self:#?}"))
    }
}

/// Runs a command to its end.
#[track_caller]
pub fn run(mut command: Command, input: Option<&str>) -> Ran {
    let line = describe(&command);
    let piped = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    command.stdin(piped).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
    if let Some(input) = input {
        // A command that refuses before it reads closes its end.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    }
    let pid = Pid::from_child(&child);
    let (done, ended) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap_or_else(|e| panic!("{line}: {e}"));
    drop(done);
    let _ = watchdog.join();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { line, code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

/// Runs a tool of the system that must work.
#[track_caller]
pub fn tool<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(name);
    command.args(args);
    let ran = run(command, None);
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    ran.out
}

fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    command.get_args().fold(program, |line, arg| line + " " + &arg.to_string_lossy())
}

/// A program that goes on. Killed when dropped.
#[derive(Debug)]
pub struct Child {
    line: String,
    child: std::process::Child,
    lines: mpsc::Receiver<String>,
    err: PathBuf,
    reaped: bool,
}

impl Child {
    /// Starts it; standard error goes to a file.
    #[track_caller]
    pub fn start(mut command: Command, err: &Path) -> Self {
        let line = describe(&command);
        let file = File::options().create(true).append(true).open(err).expect("a file for standard error");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
        let out = child.stdout.take().expect("piped");
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(out).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        Self { line, child, lines, err: err.to_owned(), reaped: false }
    }

    /// The next line of its standard output.
    #[track_caller]
    pub fn line(&mut self, within: Duration) -> String {
        self.lines.recv_timeout(within).unwrap_or_else(|_| panic!("{} says nothing: {}", self.line, self.err()))
    }

    /// What it said on standard error so far.
    pub fn err(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a child that has not been waited for can be signalled");
    }

    /// Whether it is still there.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.reaped = true;
                return status;
            }
            assert!(started.elapsed() < within, "{} goes on after {within:?}: {}", self.line, self.err());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// kill -9, and waits.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.reaped = true;
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill();
        }
    }
}

/// Waits until something is so.
#[track_caller]
pub fn until(what: &str, within: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < within, "not within {within:?}: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    started.elapsed()
}
