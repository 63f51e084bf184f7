//! What is said to a fault disk, and what it answers: a line of JSON each.

use serde::{Deserialize, Serialize};

/// Something that a fault disk does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Nothing: only the answer is wanted.
    Tell,
    /// From now on this goes wrong, too. Rules are tried in the order in which they came; the first that fits acts.
    Fault(Rule),
    /// Nothing goes wrong any more. What went wrong stays as it is.
    Heal,
    /// Flips the bits of `mask` in the byte at `at`, now.
    Rot {
        /// Offset in bytes.
        at: u64,
        /// Which bits.
        mask: u8,
    },
    /// Everything written since the last flush that was honest is gone.
    PowerLoss,
}

/// When something goes wrong, and what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rule {
    op: Op,
    effect: Effect,
    start: u64,
    end: u64,
    contains: Option<Vec<u8>>,
    at_least: u64,
    skip: u64,
    times: u64,
}

/// What the kernel asks of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Read.
    Read,
    /// Write, or make zero.
    Write,
    /// Flush the disk's cache.
    Flush,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Effect {
    /// EIO, and nothing is done.
    Eio,
    /// ENOSPC, and nothing is done.
    Enospc,
    /// A write is done elsewhere: so many bytes further on.
    Shift(i64),
    /// A write is acknowledged and not done; a flush is acknowledged and what it is to keep is dropped there and then.
    Drop,
    /// A flush is acknowledged; what it is to keep is kept until power is lost.
    Lie,
    /// A bit of what is written or read flips on the way: the lowest of the middle byte.
    Flip,
}

impl Rule {
    /// Always, everywhere.
    pub fn new(op: Op, effect: Effect) -> Self {
        Self { op, effect, start: 0, end: u64::MAX, contains: None, at_least: 0, skip: 0, times: u64::MAX }
    }

    /// Only what touches these bytes of the disk.
    #[must_use]
    pub fn within(self, range: std::ops::Range<u64>) -> Self {
        Self { start: range.start, end: range.end, ..self }
    }

    /// Only writes that contain these bytes.
    #[must_use]
    pub fn containing(self, needle: &[u8]) -> Self {
        Self { contains: Some(needle.to_vec()), ..self }
    }

    /// Only reads and writes of at least so many bytes.
    #[must_use]
    pub fn at_least(self, bytes: u64) -> Self {
        Self { at_least: bytes, ..self }
    }

    /// Not the first ones that fit.
    #[must_use]
    pub fn skip(self, first: u64) -> Self {
        Self { skip: first, ..self }
    }

    /// Only so often.
    #[must_use]
    pub fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// Whether it acts on this now; counts.
    pub(super) fn acts(&mut self, op: Op, range: &std::ops::Range<u64>, bytes: &[u8]) -> Option<Effect> {
        let touches = op == Op::Flush || (range.start < self.end && self.start < range.end);
        let large = op == Op::Flush || range.end - range.start >= self.at_least;
        let has = |needle: &Vec<u8>| bytes.windows(needle.len()).any(|w| w == needle);
        if op != self.op || !touches || !large || self.times == 0 || !self.contains.as_ref().is_none_or(has) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.effect)
    }
}

/// How a fault disk is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Told {
    /// Entries in the log of writes and flushes: a moment that can be returned to.
    pub position: u64,
    /// Reads so far.
    pub reads: u64,
    /// Writes so far.
    pub writes: u64,
    /// Flushes so far.
    pub flushes: u64,
    /// How often a rule acted.
    pub hits: u64,
}
