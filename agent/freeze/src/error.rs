//! Why file systems could not be frozen, or were not frozen for as long as they should have been.

use std::io;
use std::path::PathBuf;

/// Why nothing is frozen. Whatever was frozen before the error was thawed again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// Not ours, and left as it is.
    #[error(
        "{what} is frozen already, by another program or by LVM or a backup at work; if none is running, type: \
         fsfreeze --unfreeze MOUNT-POINT"
    )]
    FrozenByOther {
        /// Which file system.
        what: String,
    },
    /// Its type cannot.
    #[error("{what} cannot be frozen: file systems of its type do not know how")]
    NotSupported {
        /// Which file system.
        what: String,
    },
    /// Something took longer than it may.
    #[error("{what} took longer than {} ms; the disk is busy or slow, try again later or allow more", limit.as_millis())]
    TooSlow {
        /// What: "syncing /srv (ext4 on /dev/sda1)".
        what: String,
        /// What was allowed.
        limit: std::time::Duration,
    },
    /// A file system's own error.
    #[error("cannot freeze {what}; look at its messages with: journalctl -k")]
    Failed {
        /// Which file system.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The process that freezes ended or does not answer. Its guard thaws what it had frozen.
    #[error("the freeze helper is gone or does not answer; see: journalctl -u backhaul-freezer")]
    HelperGone,
    /// The process that guards the helper ended.
    #[error("the guard of the freeze helper is gone, and without it nothing is frozen")]
    GuardGone,
    /// Not allowed.
    #[error(
        "freezing needs CAP_SYS_ADMIN: run as root, or let backhaul-freezer.service do it: systemctl start backhaul-freezer.socket"
    )]
    NoPrivilege,
    /// Mounts or devices are not those that were found. Find them again.
    #[error("what is mounted changed since it was looked for")]
    Changed,
    /// More than one message can carry.
    #[error("{found} file systems are too many to freeze at one instant; protect fewer devices in one group")]
    TooMany {
        /// How many there are.
        found: usize,
    },
    /// Another helper or its guard has the journal.
    #[error("another freeze helper uses the journal {}", journal.display())]
    InUse {
        /// Which journal.
        journal: PathBuf,
    },
    /// Something else of the system.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl FreezeError {
    /// Whether the same may go better later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::FrozenByOther { .. } | Self::TooSlow { .. } | Self::HelperGone | Self::GuardGone | Self::Changed => {
                true
            }
            Self::InUse { .. } => true,
            Self::NotSupported { .. } | Self::Failed { .. } | Self::NoPrivilege | Self::TooMany { .. } => false,
            Self::System { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::Interrupted
                    | io::ErrorKind::WouldBlock
                    | io::ErrorKind::OutOfMemory
                    | io::ErrorKind::TimedOut
            ),
        }
    }

    pub(crate) fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}

/// Why what was read between freeze and thaw is not known to be of one instant. Everything is thawed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// The limit passed before the thaw was asked for, or before it was done.
    #[error("the time limit passed and the helper thawed by itself")]
    Deadline,
    /// Our thaw found it thawed.
    #[error("{what} was thawed by another program in between")]
    ThawedByOther {
        /// Which file system.
        what: String,
    },
    /// The guard or the agent thawed, since the helper did not move.
    #[error("{what} was thawed by the helper's guard, since the helper did not move")]
    Rescued {
        /// Which file system.
        what: String,
    },
    /// The helper ended or does not answer.
    #[error("the freeze helper ended")]
    HelperGone,
    /// The guard ended.
    #[error("the guard of the freeze helper ended")]
    GuardGone,
    /// The helper was told to end.
    #[error("the freeze helper was told to end")]
    Ended,
    /// Something was mounted, unmounted, attached or detached.
    #[error("what is mounted changed while it was frozen")]
    Changed,
    /// It may be frozen still. The helper goes on trying.
    #[error("{what} could not be thawed; type: fsfreeze --unfreeze MOUNT-POINT")]
    ThawFailed {
        /// Which file system.
        what: String,
    },
}
