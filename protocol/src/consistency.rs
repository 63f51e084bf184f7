//! What a recovery point may claim of itself.

use std::fmt;

use bincode::{Decode, Encode};

/// How the volumes of a point relate in time. Order: the better is the greater.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Encode, Decode)]
pub enum Consistency {
    /// Read while it may have changed: never the default of a restore.
    Fuzzy,
    /// All volumes at one instant, as if the power was cut.
    Crash,
    /// As `Crash`, and hooks brought the applications to rest.
    Application,
}

impl Consistency {
    /// The byte in the store.
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Fuzzy => 1,
            Self::Crash => 2,
            Self::Application => 3,
        }
    }
    /// The byte in the store, checked.
    pub fn from_byte(b: u8) -> Option<Self> {
        [Self::Fuzzy, Self::Crash, Self::Application].into_iter().find(|c| c.to_byte() == b)
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fuzzy => "fuzzy",
            Self::Crash => "crash",
            Self::Application => "application",
        })
    }
}

/// What the receiver had recomputed itself when the point was committed. Order: the better is the greater.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Encode, Decode)]
pub enum Checked {
    /// The digest of what changed.
    Delta,
    /// The digests of the whole volumes, from the digests of their blocks.
    Digest,
    /// The same, from the payloads.
    Data,
}

impl Checked {
    /// The byte in the store.
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Delta => 1,
            Self::Digest => 2,
            Self::Data => 3,
        }
    }
    /// The byte in the store, checked.
    pub fn from_byte(b: u8) -> Option<Self> {
        [Self::Delta, Self::Digest, Self::Data].into_iter().find(|c| c.to_byte() == b)
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Delta => "delta-checked",
            Self::Digest => "digest-checked",
            Self::Data => "data-checked",
        })
    }
}
