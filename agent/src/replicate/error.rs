//! How a round fails.

use backhaul_hints::Doubt;
use backhaul_protocol::ids::Name;
use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::wire::message::Reason;
use backhaul_volume::VolumeError;

use crate::capture::SnapshotError;
use crate::capture::hooks::HookError;
use crate::connection::SessionError;
use crate::pipeline::scanner::ScanError;
use crate::state::StateError;
use crate::tracker::hash_index::IndexError;

/// How a round fails.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    /// The session.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// A command of the user.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A volume.
    #[error("volume {name}: {source}")]
    Volume {
        /// Which.
        name: Name,
        /// Why.
        source: VolumeError,
    },
    /// Reading, hashing, compressing.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// What is marked of a volume is not to be believed any more: the next round reads all of it.
    #[error("volume {name}: {doubt}; all of it is read again")]
    Doubted {
        /// Which.
        name: Name,
        /// Why.
        doubt: Doubt,
    },
    /// The volumes do not stand still for long enough to be read at one instant: no point this time.
    #[error("no point in time: {0}")]
    Moving(String),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// Threads can't be had.
    #[error("can't start threads: {0}")]
    Threads(std::io::Error),
}

impl RoundError {
    /// Whether the receiver's store did not answer: the receiver has tried for minutes.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Session(SessionError::Source(e)) if e.is_unavailable())
    }

    /// Whether a command of the user failed: it takes its time, and says itself what it tried.
    pub fn is_hook(&self) -> bool {
        matches!(self, Self::Hook(_))
    }

    /// Whether there is no place at the receiver now. Sessions of an agent that was killed are there until they are
    /// found dead.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Session(SessionError::Source(SourceError::Refused(r))) if r.reason == Reason::Busy)
    }

    /// Whether another round may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Session(e) => e.is_retryable(),
            Self::Hook(_) => true,
            Self::Volume { source, .. } | Self::Scan(ScanError::Volume(source)) => source.is_retryable(),
            Self::Scan(ScanError::Stopped) | Self::Doubted { .. } | Self::Moving(_) => true,
            Self::Index(e) | Self::Scan(ScanError::Index(e)) => e.is_retryable(),
            Self::Scan(ScanError::Compressor(_)) | Self::Threads(_) => false,
            Self::State(e) => e.is_retryable(),
        }
    }

    /// Whether the receiver says that this agent is not the group's writer any more.
    pub fn is_divergence(&self) -> bool {
        matches!(self, Self::Session(SessionError::Source(SourceError::Refused(r))) if r.reason == Reason::Diverged)
    }
}

impl From<SnapshotError> for RoundError {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Hook(e) => Self::Hook(e),
            SnapshotError::Volume { name, source } => Self::Volume { name, source },
            SnapshotError::State(e) => Self::State(e),
        }
    }
}

impl From<SourceError> for RoundError {
    fn from(error: SourceError) -> Self {
        Self::Session(error.into())
    }
}
