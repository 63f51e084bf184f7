//! How reading the store fails.

use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::record::RecordError;
use backhaul_protocol::store::envelope::FormatError;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::wire::message::{Reason, Refusal};

use crate::store::{Kind, StoreError};

/// How reading the store fails.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The store itself.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An object is not what was written.
    #[error("{key}: {cause}")]
    Damaged {
        /// Which object.
        key: ObjectKey,
        /// What is wrong.
        cause: FormatError,
    },
    /// A record is not what was written.
    #[error("{key}, bytes {offset} to {end}: {cause}")]
    Record {
        /// Which object.
        key: ObjectKey,
        /// First byte of the record.
        offset: u64,
        /// Byte after the record.
        end: u64,
        /// What is wrong.
        cause: RecordError,
    },
    /// The log does not hang together.
    #[error("the log is broken at record {seq}: {what}")]
    Log {
        /// Where.
        seq: LogSeq,
        /// What is wrong.
        what: &'static str,
    },
    /// The record of the point that is wanted can't be read, or one that may be it.
    #[error("{cause}; {what}{}", older_text(.older))]
    Point {
        /// What can't be read.
        cause: Box<ReadError>,
        /// What follows from it.
        what: String,
        /// The newest point before it that can be read.
        older: Option<LogSeq>,
    },
    /// Asked for what is not there.
    #[error("{0}")]
    NotFound(String),
}

fn older_text(older: &Option<LogSeq>) -> String {
    match older {
        Some(seq) => format!("; the newest point before it that can be read is {seq}: name it, @{seq}, to restore it"),
        None => "; no point before it can be read".into(),
    }
}

impl ReadError {
    /// Whether trying again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Store(e) if e.is_retryable())
    }
    /// Whether what was written is damaged or gone: other parts may still be readable.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Record { .. } | Self::Log { .. } | Self::Point { .. } => true,
            Self::Store(e) => matches!(e.kind(), Kind::NotFound | Kind::Corrupt | Kind::Unreadable),
            Self::NotFound(_) => false,
        }
    }
    /// Whether it is there and can't be read now: no reason to do without it for good.
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::Store(e) if e.kind() == Kind::Unreadable)
    }
    /// What an agent is told.
    pub fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::NotFound(_) => Reason::NotFound,
            Self::Store(e) if e.kind() == Kind::NoSpace => Reason::NoSpace,
            Self::Store(e) if e.kind() == Kind::Unavailable => Reason::Unavailable,
            _ if self.is_damage() => Reason::Damaged,
            _ => Reason::Store,
        };
        Refusal { reason, text: self.to_string() }
    }
    /// For `map_err` with the object's key.
    pub fn damaged(key: &ObjectKey) -> impl FnOnce(FormatError) -> Self + '_ {
        |cause| Self::Damaged { key: key.clone(), cause }
    }
}
