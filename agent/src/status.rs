//! What a running service knows about itself, told over a socket in the state folder: only that is fresh. No answer means
//! that it does not run.
//!
//! Read first: [`StatusServer`]; what is told is decided in [`crate::condition`].

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::condition::{Condition, Report, RunState, Through};
use crate::pipeline::load::Load;
use crate::replicate::{RoundReport, Stage};
use crate::state::StateDir;

/// Answers `status`.
pub struct StatusServer {
    condition: Arc<Mutex<Condition>>,
    load: Arc<Load>,
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

fn socket(state: &StateDir) -> PathBuf {
    state.path().join("status.sock")
}

impl StatusServer {
    /// Listens; only this user may ask. `load` counts what goes through.
    pub fn start(state: &StateDir, condition: Condition, load: Arc<Load>) -> std::io::Result<Self> {
        let path = socket(state);
        // Left by a killed `run`: the lock says that none is running.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let condition = Arc::new(Mutex::new(condition));
        let shared = condition.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let text = serde_json::to_vec(&lock(&shared).report());
                if let Ok(text) = text {
                    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&text)).await;
                }
            }
        });
        Ok(Self { condition, load, path, task })
    }

    fn change(&self, change: impl FnOnce(&mut Condition, Instant)) {
        change(&mut lock(&self.condition), Instant::now());
    }

    fn through(&self) -> Through {
        Through { sent: self.load.sent_bytes(), read: self.load.read_bytes() }
    }

    /// To be asked elsewhere.
    pub fn reports(&self) -> impl Fn() -> Report + Send + Sync + 'static {
        let condition = self.condition.clone();
        move || lock(&condition).report()
    }

    /// Another interval from now on.
    pub fn set_every(&self, every: Duration) {
        self.change(|c, _| c.set_every(every));
    }

    /// A round begins.
    pub fn begun(&self) {
        self.change(Condition::begun);
    }

    /// It is known what it looks at.
    pub fn looks(&self, stage: &Stage) {
        let through = self.through();
        self.change(|c, now| c.looks(now, stage, through));
    }

    /// Time goes by. To be called every second or so.
    pub fn tick(&self) {
        let through = self.through();
        self.change(|c, now| c.tick(now, through));
    }

    /// A round ended well.
    pub fn succeeded(&self, report: &RoundReport) {
        let through = self.through();
        self.change(|c, now| {
            c.succeeded(now, report);
            c.tick(now, through);
        });
    }

    /// A round failed.
    pub fn failed(&self, state: RunState, cause: String) {
        self.change(|c, now| c.failed(now, state, cause));
    }

    /// Nothing is done for now.
    pub fn paused(&self, cause: String) {
        self.change(|c, now| c.paused(now, cause));
    }
}

fn lock(condition: &Mutex<Condition>) -> std::sync::MutexGuard<'_, Condition> {
    condition.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for StatusServer {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Asks a running service; `None` if there is none.
pub async fn ask(state: &StateDir) -> Option<Report> {
    let mut stream = UnixStream::connect(socket(state)).await.ok()?;
    let mut text = Vec::new();
    tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut text)).await.ok()?.ok()?;
    serde_json::from_slice(&text).ok()
}
