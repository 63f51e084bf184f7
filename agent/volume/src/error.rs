//! Why a volume could not be opened or read.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Why a volume could not be opened, read or recognised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// It could not be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Neither a regular file nor a block device, or one without a byte in it.
    #[error("{} cannot be a volume: it is {what}", path.display())]
    NotAVolume {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Something about it could not be found out.
    #[error("{}: cannot {what}", path.display())]
    Inspect {
        /// Which volume.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The system says that these bytes cannot be read.
    #[error("{}: cannot read bytes {} to {}", path.display(), range.start, range.end)]
    Read {
        /// Which volume.
        path: PathBuf,
        /// Bytes asked for.
        range: Range<u64>,
        /// The system's reason.
        source: io::Error,
    },
    /// Fewer bytes came than are there by its length: it shrank, or lies.
    #[error("{}: bytes {} to {} were asked for and only {got} came: it is shorter than it was", path.display(), range.start, range.end)]
    ShortRead {
        /// Which volume.
        path: PathBuf,
        /// Bytes asked for.
        range: Range<u64>,
        /// Bytes that came.
        got: u64,
    },
    /// The caller asked for bytes outside the volume.
    #[error("{}: bytes {at} to {at} + {len} are outside its {length} bytes", path.display())]
    OutOfBounds {
        /// Which volume.
        path: PathBuf,
        /// First byte asked for.
        at: u64,
        /// How many.
        len: u64,
        /// Bytes of the volume.
        length: u64,
    },
    /// It is no longer what was opened: resized, or another device under the same name.
    #[error("{} changed since it was opened: {what}", path.display())]
    Changed {
        /// Which volume.
        path: PathBuf,
        /// What changed.
        what: String,
    },
}

impl VolumeError {
    /// Whether opening and reading again later may go better without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Inspect { source, .. } => is_transient(source),
            // A changed volume is opened anew in the next round. EIO may be a path of a SAN coming back.
            Self::Read { .. } | Self::ShortRead { .. } | Self::Changed { .. } => true,
            Self::NotAVolume { .. } | Self::OutOfBounds { .. } => false,
        }
    }

    pub(crate) fn inspect(path: &Path, what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Inspect { path: path.to_owned(), what, source: source.into() }
    }
}

/// Errors of the machine's state of the moment.
pub(crate) fn is_transient(e: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(e.kind(), K::Interrupted | K::WouldBlock | K::OutOfMemory | K::ResourceBusy | K::TimedOut)
        || matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN))
}
