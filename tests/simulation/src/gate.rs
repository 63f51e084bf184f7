//! Whether a simulated process runs: everything that it does to the world outside passes its [`Gate`].

use std::sync::Arc;

use tokio::sync::watch;

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
pub struct Gate(Arc<watch::Sender<Process>>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Process::Running)))
    }
}

impl Gate {
    /// What it is doing.
    pub fn process(&self) -> Process {
        *self.0.borrow()
    }
    /// From now on; the dead stay dead.
    pub fn set(&self, process: Process) {
        self.0.send_if_modified(|p| {
            let changes = *p != Process::Dead && *p != process;
            if changes {
                *p = process;
            }
            changes
        });
    }
    /// Waits while it is paused, and for ever when it is dead.
    pub async fn pass(&self) {
        if self.process() == Process::Running {
            return;
        }
        let mut changes = self.0.subscribe();
        // The sender lives as long as this.
        let _ = changes.wait_for(|p| *p == Process::Running).await;
    }
}
