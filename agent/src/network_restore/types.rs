//! What a restore over the network is asked for, what it did, and how it fails.
//!
//! Read first: [`RestoreRequest`], [`RestoreReport`], [`RestoreError`].

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use backhaul_protocol::digest::VolumeDigest;
use backhaul_protocol::ids::Name;
use backhaul_protocol::record::RecordError;
use backhaul_protocol::wire::message::{PointSpec, Refusal};
use backhaul_transport::blocks::BlockStreamError;
use backhaul_transport::error::TransportError;
use backhaul_volume::target::{Durability, TargetError};
use serde::Serialize;

/// How a restore over the network fails.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The connection.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The receiver says no; what it says about damage names the object.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The receiver says what it may not say.
    #[error("the receiver broke the protocol: {0}")]
    Protocol(&'static str),
    /// The target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A record is not what the point says.
    #[error("volume {volume}: {cause}")]
    Record {
        /// Which volume.
        volume: Name,
        /// What is wrong.
        cause: RecordError,
    },
    /// A stream of records is none.
    #[error(transparent)]
    Stream(#[from] BlockStreamError),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Request(String),
    /// What was asked for is not there.
    #[error("{0}")]
    NotFound(String),
    /// Nothing came.
    #[error("the receiver sent nothing for {0:?}")]
    Silent(Duration),
    /// The point's own index does not add up to the digest that it states.
    #[error("volume {volume}: the index of the point has digest {found}, and the point states {stated}")]
    Index {
        /// Which volume.
        volume: Name,
        /// What the index adds up to.
        found: VolumeDigest,
        /// What the agent stated.
        stated: VolumeDigest,
    },
    /// What was read back is not what the point holds.
    #[error("volume {volume}: what was read back from the target differs from the point within {}", list(.ranges))]
    Differs {
        /// Which volume.
        volume: Name,
        /// Pages in which it differs, in bytes.
        ranges: Vec<Range<u64>>,
    },
    /// No memory for a decompressor.
    #[error("can't set up a decompressor")]
    Setup(#[source] std::io::Error),
}

impl RestoreError {
    /// Whether the same restore may go better later without anybody doing anything. It then continues.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Transport(e) | Self::Stream(BlockStreamError::Transport(e)) => e.is_retryable(),
            Self::Refused(refusal) => refusal.reason.is_retryable(),
            Self::Target(e) => e.is_retryable(),
            Self::Silent(_) | Self::Setup(_) => true,
            _ => false,
        }
    }
}

fn list(ranges: &[Range<u64>]) -> String {
    let mut out: Vec<String> = ranges.iter().take(8).map(|r| format!("bytes {} to {}", r.start, r.end)).collect();
    if ranges.len() > out.len() {
        out.push(format!("{} more", ranges.len() - out.len()));
    }
    out.join(", ")
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Which volume; `None` means all of the point.
    pub volume: Option<Name>,
    /// Which point.
    pub point: PointSpec,
    /// `TARGET` or `NAME=TARGET`, as typed.
    pub targets: Vec<String>,
    /// Serials or names of devices that may be overwritten.
    pub confirm: Vec<String>,
    /// Paths that are being replicated.
    pub refuse: Vec<PathBuf>,
    /// What is waited for, and how it is read back.
    pub durability: Durability,
}

/// What was done, as it is printed: the fields of the receiver's restore.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// Number of the point.
    pub point: u64,
    /// When it was committed.
    pub time: String,
    /// What it claims.
    pub consistency: String,
    /// Bytes of the targets that were read to compare.
    pub bytes_read: u64,
    /// Bytes of block records that came.
    pub bytes_fetched: u64,
    /// Bytes of all other messages that came.
    pub metadata_bytes: u64,
    /// Bytes that were written or zeroed.
    pub bytes_written: u64,
    /// Bytes that were read back and compared.
    pub bytes_verified: u64,
    /// `device` or `cached`.
    pub verified: &'static str,
    /// Of the volume, if it is one.
    pub digest: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Each volume.
    pub volumes: Vec<VolumeReport>,
}

/// What was done to one target.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeReport {
    /// Of the volume.
    pub name: String,
    /// As it was named.
    pub target: String,
    /// Bytes of the volume.
    pub length: u64,
    /// What was read back, and what the point states.
    pub digest: String,
    /// Bytes that were written or zeroed.
    pub bytes_written: u64,
    /// Bytes of a device behind the volume's end, which stay as they were.
    pub beyond: u64,
}
