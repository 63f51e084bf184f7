//! How a restore fails.

use std::ops::Range;

use backhaul_protocol::digest::VolumeDigest;
use backhaul_protocol::ids::Name;
use backhaul_volume::target::TargetError;

use crate::fetch::FetchError;
use crate::read_error::ReadError;
use crate::salvage::Lost;

/// How a restore fails.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The store can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The target can't be read or written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Fetching failed as a whole.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Request(String),
    /// What is needed is damaged or gone.
    #[error("damaged: {}", crate::salvage::describe(.0))]
    Damaged(Vec<Lost>),
    /// What was read back is not what the point holds.
    #[error(
        "volume {volume}: what was read back from the target differs from the point at {}",
        crate::salvage::describe_ranges(.ranges)
    )]
    Differs {
        /// Which volume.
        volume: Name,
        /// Where, in bytes; as far as it was looked at.
        ranges: Vec<Range<u64>>,
    },
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
}

impl RestoreError {
    /// Whether the same restore may go better later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Read(e) => e.is_retryable(),
            Self::Target(e) => e.is_retryable(),
            Self::Fetch(e) => e.is_retryable(),
            Self::Request(_) | Self::Damaged(_) | Self::Differs { .. } | Self::Index { .. } => false,
        }
    }
    /// Whether data are damaged or differ.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Read(e) | Self::Fetch(FetchError::Read(e)) => e.is_damage(),
            Self::Damaged(_) | Self::Differs { .. } | Self::Index { .. } => true,
            Self::Target(_) | Self::Fetch(_) | Self::Request(_) => false,
        }
    }
}
