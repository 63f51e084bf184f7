//! Whether a simulated process runs: everything that it does to the world outside passes its [`Gate`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What a process is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Process {
    /// It runs.
    Running,
    /// It was stopped and will wake up where it was: a zombie.
    Paused,
    /// It was killed.
    Dead,
}

/// Lets a process act while it runs.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

/// Not a `watch`: that wakes who waits in an order which no seed decides.
#[derive(Debug)]
struct Inner {
    process: Mutex<Process>,
    changed: Notify,
}

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(Inner { process: Mutex::new(Process::Running), changed: Notify::new() }))
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Process> {
        self.0.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What it is doing.
    pub fn process(&self) -> Process {
        *self.lock()
    }
    /// From now on; the dead stay dead.
    pub fn set(&self, process: Process) {
        {
            let mut now = self.lock();
            if *now == Process::Dead {
                return;
            }
            *now = process;
        }
        self.0.changed.notify_waiters();
    }
    /// Waits while it is paused, and for ever when it is dead.
    pub async fn pass(&self) {
        while self.process() != Process::Running {
            // One thread: nothing changes between looking and waiting.
            self.0.changed.notified().await;
        }
    }
}
