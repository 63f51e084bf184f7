//! What `run` tells of itself: over a socket in the state folder, so that an idle round writes nothing.
//!
//! Read first: [`StatusServer`] and [`Report`].

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::store::log::UnixMillis;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::replicate::{RoundReport, Stage};
use crate::state::StateDir;

/// What the service is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// There is no point yet.
    InitialSync,
    /// Marks of what was written can't be relied upon: all of a volume is read.
    Rescan,
    /// The last round went well.
    Continuous,
    /// The receiver can't be reached; tried again.
    Disconnected,
    /// Somebody must do something.
    Stalled,
    /// The receiver takes another agent, or an older state of this one, for the group's writer: only an operator's
    /// `adopt` helps.
    Diverged,
}

/// What `run` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What it is doing.
    pub state: RunState,
    /// Why, if it does not go well.
    pub cause: Option<String>,
    /// The newest point.
    pub point: Option<u64>,
    /// The beginning of the last look that found the volumes equal to the newest point, or made it; ms since 1970. What
    /// the lag counts from.
    #[serde(rename = "protected_until_ms")]
    pub protected_until: Option<i64>,
    /// Of the newest point.
    pub consistency: Option<String>,
    /// Bytes of records that the last round sent.
    pub last_sent: u64,
    /// Seconds that the last round took.
    pub last_seconds: f64,
    /// Bytes of blocks that were written and are in no point yet, as the last round found them.
    pub behind_bytes: u64,
    /// Milliseconds that file systems were frozen for the newest point, if they were.
    pub frozen_ms: Option<f64>,
    /// When all of every volume had last been read, ms since 1970.
    pub full_scan_ms: Option<i64>,
    /// Blocks that had changed and were not marked, since the service began.
    pub missed_blocks: u64,
}

/// Answers `status`.
pub struct StatusServer {
    report: Arc<Mutex<Report>>,
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

fn socket(state: &StateDir) -> PathBuf {
    state.path().join("status.sock")
}

impl StatusServer {
    /// Listens; only this user may ask.
    pub fn start(state: &StateDir) -> std::io::Result<Self> {
        let path = socket(state);
        // Left by a killed `run`: the lock says that none is running.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let report = Arc::new(Mutex::new(Report {
            state: RunState::InitialSync,
            cause: None,
            point: None,
            protected_until: None,
            consistency: None,
            last_sent: 0,
            last_seconds: 0.0,
            behind_bytes: 0,
            frozen_ms: None,
            full_scan_ms: None,
            missed_blocks: 0,
        }));
        let shared = report.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((mut stream, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                };
                let text = serde_json::to_vec(&*shared.lock().unwrap_or_else(PoisonError::into_inner));
                if let Ok(text) = text {
                    let _ = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&text)).await;
                }
            }
        });
        Ok(Self { report, path, task })
    }

    fn change(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A round has begun.
    pub fn begun(&self, stage: &Stage) {
        self.change(|r| {
            r.behind_bytes = stage.marked;
            if !stage.unknown.is_empty() && r.point.is_some() {
                (r.state, r.cause) = (RunState::Rescan, Some(stage.unknown.join("; ")));
            }
        });
    }

    /// A round ended well.
    pub fn succeeded(&self, point: Option<(LogSeq, UnixMillis)>, report: &RoundReport) {
        self.change(|r| {
            r.behind_bytes = 0;
            r.frozen_ms = report.frozen_for.map(|d| d.as_secs_f64() * 1e3).or(r.frozen_ms);
            r.full_scan_ms = report.full_scan.map(|at| at.0);
            r.missed_blocks = report.missed_blocks;
            r.state = RunState::Continuous;
            r.cause = None;
            r.point = point.map(|(seq, _)| seq.0);
            r.protected_until = point.map(|(_, at)| at.0);
            if report.committed.is_some() {
                r.consistency = Some(report.consistency.to_string());
            }
            r.last_sent = report.bytes_sent;
            r.last_seconds = report.took.as_secs_f64();
        });
    }

    /// A round failed.
    pub fn failed(&self, state: RunState, cause: String) {
        self.change(|r| {
            r.state = state;
            r.cause = Some(cause);
        });
    }
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
