//! Why hints are not to be believed, and why there are none.

use std::io;
use std::path::PathBuf;

/// Why blocks may have changed without a mark. The answer is always a full scan, begun after [`crate::Tracker::track`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Doubt {
    /// Nothing was pinned: the first time, or somebody removed it.
    #[error("this volume's writes were not tracked")]
    NoPin,
    /// Tracked, but no point was settled since.
    #[error("the scan that tracking began with was not finished")]
    Unfinished,
    /// The bits belong to another index, or to one older than what was settled.
    #[error("what was tracked belongs to another state of the index")]
    OtherBaseline,
    /// Another disk or image lies there, or it cannot be told apart from another.
    #[error("it is another device than the one whose writes were tracked")]
    OtherDevice,
    /// Its length changed.
    #[error("the device's size changed")]
    Resized,
    /// The partition begins elsewhere.
    #[error("the partition was moved")]
    Moved,
    /// Another size of block.
    #[error("writes were tracked in blocks of {tracked} bytes")]
    BlockSize {
        /// Bytes.
        tracked: u64,
    },
    /// Writes of which the program was not told, or which it could not note down.
    #[error("{events} writes or more could not be tracked")]
    Missed {
        /// Of all volumes, as far as they can be counted.
        events: u64,
    },
    /// The block layer itself counted more than the program was told of, which nothing else shows.
    #[error("the kernel wrote {sectors} sectors of which it did not tell")]
    Unseen {
        /// Of the whole disk, 512 bytes each.
        sectors: u64,
    },
    /// The block layer counted less than the program was told of, so that nothing shows what was not told.
    #[error("the kernel did not count {sectors} sectors that it wrote; was queue/iostats switched off?")]
    Uncounted {
        /// Of the whole disk, 512 bytes each.
        sectors: u64,
    },
    /// Somebody talks to the drive past the block layer (SG_IO, nvme-cli, persistent reservations).
    #[error("{commands} commands were sent to the drive directly, and what they changed cannot be known")]
    Commands {
        /// How many.
        commands: u64,
    },
    /// Its link or program is no longer pinned.
    #[error("the kernel stopped tracking, since somebody removed its program")]
    ProgramGone,
    /// Others are pinned than we recorded.
    #[error("somebody replaced the kernel's tracking program")]
    ProgramReplaced,
    /// Before a reboot.
    #[error("writes were tracked before the machine was rebooted")]
    OtherBoot,
    /// By another version of the agent, in a way that this one does not know.
    #[error("writes were tracked by another version")]
    OtherVersion,
    /// It contradicts itself.
    #[error("what was tracked is damaged")]
    Damaged,
}

/// Why this machine or user cannot track writes at all, and what would help. Full scans work without.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// Neither root nor CAP_BPF with CAP_PERFMON, or refused by a security module.
    #[error("tracking writes needs root, or CAP_BPF and CAP_PERFMON: {0}")]
    Privilege(#[source] io::Error),
    /// The kernel's lockdown mode forbids programs to read its memory.
    #[error("the kernel is locked down for confidentiality, which forbids tracking writes: {0}")]
    Lockdown(#[source] io::Error),
    /// Nowhere to keep it while the agent restarts.
    #[error("no BPF file system at {path}; `mount -t bpf bpf /sys/fs/bpf` as root: {error}")]
    NoBpfFs {
        /// Where one was looked for.
        path: PathBuf,
        /// What was in the way.
        error: io::Error,
    },
    /// Built without CONFIG_DEBUG_INFO_BTF.
    #[error("the kernel does not tell its types (/sys/kernel/btf/vmlinux: {0}); use one with CONFIG_DEBUG_INFO_BTF")]
    NoTypes(#[source] io::Error),
    /// Before 5.12, or without what is needed.
    #[error("the kernel {release} cannot track writes, 5.12 or later can: {what}")]
    Kernel {
        /// As `uname -r`.
        release: String,
        /// What is missing.
        what: String,
    },
    /// It looked at the program and did not like it.
    #[error("the kernel refused the tracking program {program}: {error}; its verifier says: {log}")]
    Verifier {
        /// Which.
        program: String,
        /// What the call said.
        error: io::Error,
        /// The last lines.
        log: String,
    },
    /// Anything else.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What came of it.
        error: io::Error,
    },
}

impl Unavailable {
    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Privilege(error),
            _ => Self::Io { action, error },
        }
    }
}

/// Why one volume cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// Writes to it would not, or not surely, be seen.
    #[error("writes to {device} cannot be tracked: {why}")]
    Unsupported {
        /// As for people.
        device: String,
        /// Why.
        why: &'static str,
    },
    /// The device or block size is not what was said.
    #[error("{device}: {why}")]
    Mismatch {
        /// As for people.
        device: String,
        /// What does not fit.
        why: &'static str,
    },
    /// More than 256.
    #[error("256 volumes are tracked already, no more can be")]
    Full,
    /// Anything else.
    #[error("cannot {action}: {error}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What came of it.
        error: io::Error,
    },
}

impl TrackError {
    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Io { action, error }
    }
}
