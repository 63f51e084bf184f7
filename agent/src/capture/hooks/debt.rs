//! That a `post` is owed: written to the state folder before `pre` begins, and gone when `post` has run.
//!
//! Read first: [`Debt`] and [`pay`]. After a kill -9 or a power loss whoever has the state folder next pays first.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use serde::{Deserialize, Serialize};

use super::{Hook, HookError, process};
use crate::config::snapshot::Hooks;
use crate::state::{StateDir, StateError};

const FILE: &str = "hooks.json";
/// What the group of a hook that outlived its agent has to end after SIGTERM; as in [`process`].
const GRACE: Duration = Duration::from_secs(5);

/// What is owed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Debt {
    /// The command as it was set when `pre` ran; used where none is set any more.
    post: String,
    timeout_ms: u64,
    /// The environment that `pre` had.
    env: Vec<(String, String)>,
    /// The hook that was running last.
    process: Option<Process>,
}

/// A process that another one of the same number is not taken for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Process {
    pid: i32,
    /// Clock ticks since the machine's start.
    started: u64,
    boot: String,
}

/// How `post` is told that the round ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Everything was read.
    Read,
    /// It was not.
    Failed,
    /// Nobody knows: the agent was killed.
    LeftOver,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Failed => "failed",
            Self::LeftOver => "left-over",
        }
    }
}

impl Debt {
    /// For a `pre` that is about to run.
    pub fn new(hooks: &Hooks, env: &[(String, String)]) -> Self {
        let timeout_ms = hooks.timeout.as_millis() as u64;
        Self { post: hooks.post.clone(), timeout_ms, env: env.to_vec(), process: None }
    }

    /// Writes it down; it survives a power loss from here on.
    pub fn write(&self, state: &StateDir) -> Result<(), StateError> {
        state.write_json(FILE, self)
    }

    /// Writes down which process runs now. Without it a `post` that is left over may run beside its `pre`.
    pub fn note(&mut self, state: &StateDir, pid: Pid) {
        self.process = Process::look(pid.as_raw_pid());
        if let Err(error) = self.write(state) {
            tracing::warn!(%error, "which process a hook is could not be written down");
        }
    }

    /// Runs `post`, and owes nothing any more whatever it says: one that fails would fail for ever. Only one that can't
    /// even be started stays owed.
    pub fn pay(mut self, state: &StateDir, set: Option<&Hooks>, outcome: Outcome) {
        let (post, timeout) = set.map_or_else(
            || (self.post.clone(), Duration::from_millis(self.timeout_ms)),
            |hooks| (hooks.post.clone(), hooks.timeout),
        );
        let mut env = self.env.clone();
        env.retain(|(name, _)| name != "BACKHAUL_HOOK");
        env.push(("BACKHAUL_HOOK".into(), "post".into()));
        env.push(("BACKHAUL_RESULT".into(), outcome.as_str().into()));
        match process::run(Hook::Post, &post, &env, timeout, None, |pid| self.note(state, pid)) {
            Err(error @ HookError::Start { .. }) => {
                tracing::warn!(%error, "it is owed, and tried again before the next round");
                return;
            }
            Err(error) => tracing::warn!(%error, "what it was to undo may still be there"),
            Ok(_) => {}
        }
        if let Err(error) = state.remove(FILE) {
            tracing::warn!(%error, "post will run once more");
        }
    }
}

/// Pays what a killed agent left, by the settings of now if there are any. Blocks.
pub fn pay(state: &StateDir, set: Option<&Hooks>) -> Result<(), StateError> {
    let Some(debt) = state.read_json::<Debt>(FILE)? else { return Ok(()) };
    tracing::warn!("an earlier run ended between its hooks: post is run now");
    if let Some(process) = &debt.process {
        process.end();
    }
    debt.pay(state, set, Outcome::LeftOver);
    Ok(())
}

impl Process {
    fn look(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything. The 22nd field is the 20th after it.
        let started = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        Some(Self { pid, started, boot })
    }

    /// Ends the group of a hook that outlived its agent.
    fn end(&self) {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| Self::look(self.pid).as_ref() == Some(self)) else { return };
        tracing::warn!("a hook of the earlier run is still running, and is ended");
        let _ = kill_process_group(pid, Signal::TERM);
        let begun = std::time::Instant::now();
        while begun.elapsed() < GRACE {
            if test_kill_process_group(pid).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = kill_process_group(pid, Signal::KILL);
    }
}
