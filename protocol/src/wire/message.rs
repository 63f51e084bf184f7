//! Control messages: one enum per direction, so that neither side can even express the other's.
//!
//! Variants are numbered in order: new ones are added at the end, none is ever removed or moved. Every list in here
//! is bounded by the frame's length, and counts are checked again by the sessions.

use bincode::{Decode, Encode};

use crate::consistency::Consistency;
use crate::digest::{BlockDigest, DeltaDigest, RangeDigest, VolumeDigest};
use crate::geometry::Geometry;
use crate::ids::{
    AgentId, CaptureNumber, CommitId, Generation, GroupId, Incarnation, LogSeq, Name, StateId, VolumeId, VolumeSlot,
    WriterNonce,
};
use crate::store::fleet::AgentRole;
use crate::store::log::{MachineId, UnixMillis};

/// From the agent to the receiver.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum AgentMessage {
    /// Without a certificate: gives a token for one.
    Join(Join),
    /// Asks for a new certificate for the key that has one.
    Renew {
        /// PKCS#10 in DER.
        request: Vec<u8>,
    },
    /// Begins to write the next point.
    Open(Open),
    /// Begins to read a point.
    OpenRead(OpenRead),
    /// Asks for the range digests of a volume, from a page on, as many as fit an answer.
    Ranges {
        /// Which volume.
        volume: VolumeSlot,
        /// First page.
        first: u64,
    },
    /// Asks for the block digests of one page.
    Page {
        /// Which volume.
        volume: VolumeSlot,
        /// Which page.
        page: u64,
    },
    /// Everything was sent: make it a point.
    Commit(Box<Commit>),
    /// Everything was looked at and equals the newest point: what the RPO counts from.
    StillEqual {
        /// When the look began, by the agent's clock.
        at: UnixMillis,
    },
    /// Asks for blocks of the point that is being read.
    Want {
        /// Which volume.
        volume: VolumeSlot,
        /// Which page.
        page: u64,
        /// One bit a block, the lowest first; exactly 128 bytes.
        blocks: Vec<u8>,
    },
    /// Block streams carry bytes without meaning from now on, which are counted; and how many were counted so far?
    Probe,
}

/// From the receiver to the agent.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub enum ReceiverMessage {
    /// No. The session is over.
    Refused(Refusal),
    /// Welcome.
    Joined(Joined),
    /// A new certificate.
    Renewed {
        /// DER, the agent's own first.
        certificates: Vec<Vec<u8>>,
    },
    /// Write on.
    Opened(Box<Opened>),
    /// This is what can be read.
    ReadOpened(ReadOpened),
    /// Answer to `Ranges`.
    Ranges {
        /// Which volume.
        volume: VolumeSlot,
        /// First page.
        first: u64,
        /// From that page on; ends with the volume or with the frame.
        digests: Vec<RangeDigest>,
    },
    /// Answer to `Page`.
    Page {
        /// Which volume.
        volume: VolumeSlot,
        /// Which page.
        page: u64,
        /// One bit a block, the lowest first: those that the draft holds.
        draft: Vec<u8>,
        /// Of every block of the page.
        digests: Vec<BlockDigest>,
    },
    /// The point exists.
    Committed(Committed),
    /// All wanted blocks of the page are on their way.
    Sent {
        /// Which volume.
        volume: VolumeSlot,
        /// Which page.
        page: u64,
        /// How many records.
        records: u64,
    },
    /// No answer to anything: the store keeps the receiver waiting. May come at any time.
    Waiting(Waiting),
    /// Answer to `Probe`.
    Probed(Probed),
}

/// What came over a path that is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Probed {
    /// Bytes of block streams that were read since the first `Probe`, and thrown away.
    pub bytes: u64,
    /// Microseconds since then, by the receiver's clock.
    pub micros: u64,
    /// Bytes that are still taken; 0: streams are stopped.
    pub left: u64,
}

/// The receiver waits for its store, or is at work.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Waiting {
    /// For people: what for, and why.
    pub text: String,
    /// Seconds so far.
    pub seconds: u32,
    /// Seconds after which the receiver gives up waiting; 0: it is at work, and does not.
    pub limit: u32,
}

impl std::fmt::Display for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { text, seconds, limit } = self;
        match limit {
            0 => write!(f, "the receiver is still at work, for {seconds} s so far: {text}"),
            _ => write!(f, "the receiver waits for its store, for {seconds} s so far and up to {limit} s: {text}"),
        }
    }
}

/// Why not.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// For people: what, why, and what to do next.
    pub text: String,
}

/// Kinds of refusal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub enum Reason {
    /// Not a message for this state, or a value out of bounds.
    Protocol,
    /// Not allowed, or not there: the same answer for both.
    Denied,
    /// Token or certificate is not good (any more).
    Authentication,
    /// Another agent wrote since, or this one is a copy.
    Diverged,
    /// A newer session of the same agent took over.
    Superseded,
    /// Too many sessions, or shutting down: come again.
    Busy,
    /// Somebody else committed first: open again and compare anew.
    Conflict,
    /// The digests of both sides differ: compare anew.
    Digest,
    /// No such point or volume.
    NotFound,
    /// The store has no room.
    NoSpace,
    /// The store fails.
    Store,
    /// The volume may not be taken like this (shrunk, other block size).
    Volume,
    /// Something in the store is damaged.
    Damaged,
    /// The store does not answer, and the receiver has tried for as long as it does.
    Unavailable,
}

impl Reason {
    /// Whether opening again may help without anybody doing anything.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Busy | Self::Conflict | Self::Digest | Self::NoSpace | Self::Store | Self::Unavailable)
    }
}

/// A token for a certificate.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Join {
    /// From the token.
    pub secret: [u8; 32],
    /// PKCS#10 in DER; the key never leaves the agent.
    pub request: Vec<u8>,
    /// Where the agent runs.
    pub machine: MachineId,
    /// What the machine calls itself.
    pub host: Name,
}

impl std::fmt::Debug for Join {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Join").field("host", &self.host).finish_non_exhaustive()
    }
}

/// A certificate for a token.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Joined {
    /// DER, the agent's own first, the authority's last.
    pub certificates: Vec<Vec<u8>>,
    /// Who the agent is from now on.
    pub agent: AgentId,
    /// Which group it belongs to.
    pub group: GroupId,
    /// The group's name.
    pub group_name: Name,
    /// What it may do.
    pub role: AgentRole,
}

/// Begins a writing session. Group and agent are in the certificate.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Open {
    /// The agent's state folder.
    pub state: StateId,
    /// The nonce of the last point that this agent knows of, and that of a commit whose answer it did not get.
    pub nonces: Vec<WriterNonce>,
    /// Where the agent runs.
    pub machine: MachineId,
    /// The highest point that this agent saw committed: a store that has less was rolled back.
    pub high_water: LogSeq,
    /// What it wants to protect.
    pub volumes: Vec<OpenVolume>,
}

/// A volume that an agent offers.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct OpenVolume {
    /// For good.
    pub id: VolumeId,
    /// What the user calls it.
    pub name: Name,
    /// How often identity or size changed.
    pub incarnation: Incarnation,
    /// Block size and length.
    pub geometry: Geometry,
}

/// What the receiver has.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Opened {
    /// Of the writer.
    pub generation: Generation,
    /// The newest log record.
    pub head: LogSeq,
    /// Its commit id: the HashIndex of this commit is the one to use.
    pub head_commit: CommitId,
    /// Captures begin here.
    pub next_capture: CaptureNumber,
    /// In the order of the `Open`.
    pub volumes: Vec<OpenedVolume>,
    /// The volumes of the newest point are others than those offered, or it has none: commit even if nothing
    /// else changed.
    pub volumes_changed: VolumesChanged,
}

/// Whether a point with the offered volumes would differ from the newest one in more than blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub enum VolumesChanged {
    /// Same volumes, names, geometries.
    No,
    /// Others, or there is no point yet.
    Yes,
}

/// What the receiver has of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct OpenedVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// Digest in the newest point, if the geometry is the same.
    pub digest: Option<VolumeDigest>,
    /// Pages that a draft touches, as sorted ranges (first, count); their blocks must be compared with the draft.
    pub draft: DraftPages,
}

/// Pages that a draft touches.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode, Default)]
pub struct DraftPages(pub Vec<(u64, u64)>);

impl DraftPages {
    /// Joins neighbours; if there are more runs than `max` the smallest gaps are covered too, which costs some
    /// comparing and is never wrong.
    pub fn of(pages: impl IntoIterator<Item = u64>, max: usize) -> Self {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == page => *count += 1,
                _ => runs.push((page, 1)),
            }
        }
        let mut gap = 1;
        while runs.len() > max {
            gap *= 2;
            runs = runs.into_iter().fold(Vec::new(), |mut out: Vec<(u64, u64)>, (first, count)| {
                match out.last_mut() {
                    Some((f, c)) if first - (*f + *c) <= gap => *c = first + count - *f,
                    _ => out.push((first, count)),
                }
                out
            });
        }
        Self(runs)
    }
    /// Whether the page is one of them.
    pub fn contains(&self, page: u64) -> bool {
        let after = self.0.partition_point(|(first, _)| *first <= page);
        after.checked_sub(1).is_some_and(|i| page - self.0[i].0 < self.0[i].1)
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Makes what was sent a point.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Commit {
    /// Chosen by the agent, written down by it before it asks.
    pub commit: CommitId,
    /// The record that this was compared with.
    pub base: LogSeq,
    /// Of the writer.
    pub generation: Generation,
    /// What this agent will show next time.
    pub nonce: WriterNonce,
    /// What the point claims.
    pub consistency: Consistency,
    /// The agent's clock when the first block was read.
    pub capture_start: UnixMillis,
    /// The agent's clock when the last block was read.
    pub capture_end: UnixMillis,
    /// Records sent in this round: the receiver waits for as many.
    pub records: u64,
    /// No record has a higher one.
    pub max_capture: CaptureNumber,
    /// Of all (volume, block, digest) that the draft now holds.
    pub delta_digest: DeltaDigest,
    /// How many there are.
    pub delta_blocks: u64,
    /// In the order of the `Open`.
    pub volumes: Vec<CommitVolume>,
}

/// One volume of a commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct CommitVolume {
    /// Of every byte, by the agent's own reading.
    pub digest: VolumeDigest,
    /// The agent's clock at the end of the last scan that read everything.
    pub full_scan: UnixMillis,
}

/// A point exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct Committed {
    /// Its number.
    pub seq: LogSeq,
    /// The commit that it is.
    pub commit: CommitId,
    /// By the receiver's clock.
    pub time: UnixMillis,
    /// Bytes of log record, indexes and maps that the commit wrote.
    pub metadata_bytes: u64,
}

/// Which point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub enum PointSpec {
    /// The newest that is not Fuzzy.
    Latest,
    /// This number.
    Number(LogSeq),
    /// The newest that is not Fuzzy and not after this time.
    Time(UnixMillis),
}

/// Begins to read a point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, Decode)]
pub struct OpenRead {
    /// Which.
    pub point: PointSpec,
}

/// A point that can be read.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ReadOpened {
    /// Its number.
    pub seq: LogSeq,
    /// By the receiver's clock.
    pub time: UnixMillis,
    /// What it claims.
    pub consistency: Consistency,
    /// Its volumes.
    pub volumes: Vec<ReadVolume>,
}

/// A volume that can be read.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub struct ReadVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// For good.
    pub id: VolumeId,
    /// What the user calls it.
    pub name: Name,
    /// Block size and length.
    pub geometry: Geometry,
    /// Of every byte.
    pub digest: VolumeDigest,
}

/// How a connection is closed; the code of QUIC's CONNECTION_CLOSE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CloseCode {
    /// Done.
    Done = 0,
    /// A newer session of the same agent took over.
    Superseded = 1,
    /// The agent was revoked.
    Revoked = 2,
    /// The receiver is shutting down: come again.
    ShuttingDown = 3,
    /// The other side broke the protocol.
    Protocol = 4,
    /// Refused; the reason was sent as a message.
    Refused = 5,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame;

    #[test]
    fn probes_have_their_numbers() {
        assert_eq!(frame::encode(&AgentMessage::Probe).expect("fits"), [1, 0, 0, 0, 9]);
        let probed = ReceiverMessage::Probed(Probed { bytes: 1, micros: 300, left: 1 << 30 });
        let bytes = [10, 0, 0, 0, 10, 1, 251, 44, 1, 252, 0, 0, 0, 64];
        assert_eq!(frame::encode(&probed).expect("fits"), bytes);
        assert_eq!(frame::decode::<ReceiverMessage>(&bytes[4..]).expect("right"), probed);
    }
}
