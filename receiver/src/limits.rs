//! When a receiver folds and writes checkpoints. Read [`Limits`].

use backhaul_protocol::limits::{
    CHECKPOINT_INTERVAL, MAX_DELTA_MAPS, MAX_INLINE_RECORDS, MAX_LOOSE_ENTRIES, MAX_LOOSE_SEGMENTS,
};
use backhaul_seams::limits::limit;

/// What a point may consist of before it is folded, and how often a checkpoint is written. The format's limits by
/// default; tests take smaller ones, to get there sooner. Larger ones would not be read by anybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of records, and their index, that may lie inside a log record.
    pub inline: usize,
    /// Loose segments.
    pub segments: usize,
    /// Entries of loose segments.
    pub entries: usize,
    /// Delta maps.
    pub deltas: usize,
    /// Log records from one checkpoint to the next.
    pub checkpoint_interval: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            inline: limit("inline", MAX_INLINE_RECORDS as u64) as usize,
            segments: limit("segments", MAX_LOOSE_SEGMENTS as u64) as usize,
            entries: limit("entries", MAX_LOOSE_ENTRIES as u64) as usize,
            deltas: limit("deltas", MAX_DELTA_MAPS as u64) as usize,
            checkpoint_interval: limit("checkpoint_interval", CHECKPOINT_INTERVAL),
        }
    }
}
