//! What a restore would do, as both programs print it.

use std::fmt;

use serde::Serialize;

use crate::text;

/// What a restore of a point would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestorePlan {
    /// Number of the point.
    pub point: u64,
    /// Each volume.
    pub volumes: Vec<VolumePlan>,
    /// What could not be restored, as a restore lists it; none where damage is not tolerated.
    pub lost: Vec<serde_json::Value>,
}

/// What would be done to one target. All in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumePlan {
    /// Of the volume.
    pub name: String,
    /// As it was named.
    pub target: String,
    /// Of the volume.
    pub length: u64,
    /// As they must be already.
    pub equal: u64,
    /// Would become zeroes.
    pub zeroed: u64,
    /// Would be fetched and written.
    pub written: u64,
    /// Of block records, as they are stored; over the network nobody knows before they come.
    pub fetched: Option<u64>,
    /// Read requests to the store; over the network that is the receiver's business.
    pub reads: Option<u64>,
    /// Of a device behind the volume's end: they stay as they are.
    pub beyond: u64,
}

impl fmt::Display for RestorePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing was written; a restore of point {} would do:", self.point)?;
        self.volumes.iter().try_for_each(|v| write!(f, "\n  {v}"))?;
        match self.lost.len() {
            0 => Ok(()),
            n => write!(f, "\n{n} ranges are lost; --json lists them, and `verify`"),
        }
    }
}

impl fmt::Display for VolumePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = text::bytes;
        write!(f, "{} to {} ({}): ", self.name, self.target, b(self.length))?;
        write!(f, "{} equal already, {} to zero, {} to write", b(self.equal), b(self.zeroed), b(self.written))?;
        if let (Some(fetched), Some(reads)) = (self.fetched, self.reads) {
            write!(f, ", {} to fetch in {reads} reads", b(fetched))?;
        }
        match self.beyond {
            0 => Ok(()),
            n => write!(f, "; {} behind the volume's end stay as they are", b(n)),
        }
    }
}
