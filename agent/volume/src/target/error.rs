//! Why a restore target was refused or failed.

use std::io;
use std::path::{Path, PathBuf};

use crate::VolumeError;
use crate::error::is_transient;

/// Why a target cannot be restored to, or a write to it failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// A safety check. Nothing was written.
    #[error("refusing to restore to {}: {why}", path.display())]
    Refused {
        /// The target as it was named.
        path: PathBuf,
        /// Why.
        why: Refusal,
    },
    /// The target's folder, or the file that a symbolic link leads to, is not there.
    #[error("cannot restore to {}: {what}", path.display())]
    NotFound {
        /// The target as it was named.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The file system is full.
    #[error("no space to restore to {}: {what}", path.display())]
    NoSpace {
        /// The target.
        path: PathBuf,
        /// How much is missing, or what failed.
        what: String,
    },
    /// Not allowed.
    #[error("not allowed to {what} {}", path.display())]
    Permission {
        /// The target.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The system failed.
    #[error("{}: cannot {what}", path.display())]
    Io {
        /// The target.
        path: PathBuf,
        /// What was tried, with the byte range where there is one.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A flush failed: what was written since the one before is lost to an unknown part.
    #[error("{}: what was written could not be flushed; run the restore again", path.display())]
    Flush {
        /// The target.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A write or a flush failed earlier: no later one can make the target whole.
    #[error("{}: an earlier write or flush failed; run the restore again", path.display())]
    Lost {
        /// The target.
        path: PathBuf,
    },
    /// Bytes for a place that the target does not have: a mistake in this program.
    #[error("{}: {what}", path.display())]
    Misfit {
        /// The target.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
}

/// What an exit code or a retry depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TargetErrorKind {
    /// A safety check; nothing was written. Exit 4.
    Refused,
    /// Exit 10.
    NotFound,
    /// Exit 14.
    NoSpace,
    /// Not allowed. Exit 1.
    Permission,
    /// Anything else. Exit 1.
    Io,
}

/// The safety check that refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Directory, character device, pipe.
    #[error("it is {0}; want a block device or a regular file")]
    Kind(&'static str),
    /// It, or a device that it lies on or that lies on it, is being replicated.
    #[error("it is being replicated ({0})")]
    Replicated(String),
    /// A file system of it is mounted.
    #[error("{device} is mounted at {}; unmount it first", at.display())]
    Mounted {
        /// The device, a partition of it, or what lies on it.
        device: String,
        /// Where, in the mount namespace in which it was found.
        at: PathBuf,
    },
    /// It is used as swap.
    #[error("{0} is used as swap; swapoff it first")]
    Swap(String),
    /// LVM, RAID or dm-crypt is built on it.
    #[error("{device} is held by {holders}; stop that first")]
    Held {
        /// The device or its partition.
        device: String,
        /// What is built on it.
        holders: String,
    },
    /// A loop device lies on the file or device.
    #[error("{0} lies on it; detach that first")]
    Loop(String),
    /// Somebody has it open exclusively.
    #[error("another program or the kernel has it open exclusively")]
    Busy,
    /// Device or file system is read-only.
    #[error("it is read-only")]
    ReadOnly,
    /// Too small. Bytes.
    #[error("it has {has} bytes and the volume needs {needs}")]
    TooSmall {
        /// Bytes of the device, whole sectors only.
        has: u64,
        /// Bytes of the volume.
        needs: u64,
    },
    /// A device with content and no confirmation.
    #[error("it has content that would be overwritten; to do that, add --confirm-target {type_this}")]
    Unconfirmed {
        /// What to type.
        type_this: String,
    },
    /// The confirmation names something else.
    #[error(
        "the confirmation names \"{given}\", but this is {names}; if it is the right one, use --confirm-target {type_this}"
    )]
    WrongConfirmation {
        /// What was typed.
        given: String,
        /// All names of the device.
        names: String,
        /// What to type.
        type_this: String,
    },
    /// Between the check and the opening somebody changed what is there.
    #[error("{0} while it was being checked")]
    Changed(&'static str),
}

impl TargetError {
    /// The class.
    pub fn kind(&self) -> TargetErrorKind {
        match self {
            Self::Refused { .. } => TargetErrorKind::Refused,
            Self::NotFound { .. } => TargetErrorKind::NotFound,
            Self::NoSpace { .. } => TargetErrorKind::NoSpace,
            Self::Permission { .. } => TargetErrorKind::Permission,
            Self::Io { .. } | Self::Flush { .. } | Self::Lost { .. } | Self::Misfit { .. } => TargetErrorKind::Io,
        }
    }

    /// Whether the same call may go better later without anybody doing anything. A failed flush is not repeated.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_transient(source))
    }

    pub(crate) fn refused(path: &Path, why: Refusal) -> Self {
        Self::Refused { path: path.to_owned(), why }
    }

    /// `what` completes "cannot ..." and "not allowed to ...".
    pub(crate) fn io(path: &Path, what: &'static str, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.to_owned(), source.into());
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Permission { path, what, source },
            io::ErrorKind::ReadOnlyFilesystem => Self::Refused { path, why: Refusal::ReadOnly },
            _ => Self::at(&path, what.to_owned(), source),
        }
    }

    /// The same with a text made for the occasion.
    pub(crate) fn at(path: &Path, what: String, source: io::Error) -> Self {
        use io::ErrorKind as K;
        let path = path.to_owned();
        match source.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => {
                Self::NoSpace { path, what: format!("cannot {what}: {source}") }
            }
            _ => Self::Io { path, what, source },
        }
    }
}

impl From<VolumeError> for TargetError {
    fn from(e: VolumeError) -> Self {
        let (path, what) = match &e {
            VolumeError::Open { path, .. }
            | VolumeError::NotAVolume { path, .. }
            | VolumeError::Inspect { path, .. }
            | VolumeError::Read { path, .. }
            | VolumeError::ShortRead { path, .. }
            | VolumeError::OutOfBounds { path, .. }
            | VolumeError::Changed { path, .. } => (path.clone(), "read what is there".to_owned()),
        };
        Self::Io { path, what, source: io::Error::other(e) }
    }
}
