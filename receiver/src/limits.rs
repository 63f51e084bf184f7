//! When a receiver folds and writes checkpoints. Read [`Limits`].

use backhaul_protocol::limits::{
    CHECKPOINT_INTERVAL, MAX_DELTA_MAPS, MAX_INLINE_RECORDS, MAX_LOOSE_ENTRIES, MAX_LOOSE_SEGMENTS,
};

/// What a point may consist of before it is folded, and how often a checkpoint is written. The format's limits by
/// default; simulations take smaller ones, to get there sooner. Larger ones would not be read by anybody.
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
            inline: MAX_INLINE_RECORDS,
            segments: MAX_LOOSE_SEGMENTS,
            entries: MAX_LOOSE_ENTRIES,
            deltas: MAX_DELTA_MAPS,
            checkpoint_interval: CHECKPOINT_INTERVAL,
        }
    }
}
