//! The writing session as the receiver sees it: what is admitted, and when a draft may become a point.
//!
//! ```text
//! Waiting --Open--> Taking --Commit--> Sealing --sealed--> Appending --appended--> Waiting
//!    |                 |                  |                    |
//!    +----refused------+----refused-------+--digests differ----+--somebody was first--> Closed
//! ```
//!
//! The shell keeps the head of the log and does the IO. It asks this machine for every decision: [`Sink::open`],
//! [`Admission::check`] for every record, [`Sink::commit`], [`Sink::sealed`].

use std::collections::{BTreeMap, BTreeSet};

use crate::consistency::Checked;
use crate::digest::{DeltaDigest, VolumeDigest};
use crate::geometry::Geometry;
use crate::ids::{AgentId, CaptureNumber, CommitId, Generation, LogSeq, VolumeSlot, WriterNonce};
use crate::limits::MAX_VOLUMES;
use crate::record::{RecordError, RecordHeader};
use crate::store::log::{Body, MachineId, PointBody, PointVolume, Record};
use crate::wire::message::{Commit, Open, OpenVolume, Reason, Refusal, VolumesChanged};

/// The newest record of a group's log, and the newest point if that is another.
#[derive(Clone, Debug)]
pub struct GroupHead {
    /// The newest record.
    pub record: Record,
    /// The newest point.
    pub point: Option<(LogSeq, PointBody)>,
}

impl GroupHead {
    /// The volumes of the newest point.
    pub fn volumes(&self) -> &[PointVolume] {
        self.point.as_ref().map_or(&[], |(_, p)| &p.volumes)
    }
    /// No record up to here has a higher capture.
    pub fn max_capture(&self) -> CaptureNumber {
        self.point.as_ref().map_or(CaptureNumber(0), |(_, p)| p.max_capture)
    }
    fn next_slot(&self) -> VolumeSlot {
        self.point.as_ref().map_or(VolumeSlot(0), |(_, p)| p.next_slot)
    }
}

/// Who opens a session: from its certificate and from what was written down when it joined.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its id.
    pub agent: AgentId,
    /// Where it joined.
    pub joined_machine: MachineId,
}

/// A volume of an open session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakenVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// As offered.
    pub offer: OpenVolume,
    /// Its digest in the newest point, if the geometry is the same.
    pub head_digest: Option<VolumeDigest>,
    /// Whether the newest point has the volume under this slot.
    pub known: Known,
}

/// Whether the newest point has a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known {
    /// Under this slot.
    Yes,
    /// It is new, or its block size changed: nothing below this slot exists.
    No,
}

/// What the receiver's ingest needs to let records in. Cheap to share with the threads that do it.
#[derive(Clone, Debug)]
pub struct Admission {
    volumes: BTreeMap<VolumeSlot, Geometry>,
    first_capture: CaptureNumber,
    end_capture: CaptureNumber,
}

impl Admission {
    /// The geometry of the record's volume, if the record may be taken at all.
    pub fn check(&self, header: &RecordHeader) -> Result<Geometry, RecordError> {
        let geometry = *self.volumes.get(&header.volume).ok_or(RecordError::Bounds("volume"))?;
        if header.capture < self.first_capture || header.capture >= self.end_capture {
            return Err(RecordError::Bounds("capture number"));
        }
        header.check_geometry(geometry)?;
        Ok(geometry)
    }
}

/// What the receiver found when it had sealed everything that a commit names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Of all winners of the draft.
    pub delta_digest: DeltaDigest,
    /// How many there are.
    pub delta_blocks: u64,
    /// The highest capture among them.
    pub max_capture: CaptureNumber,
    /// Recomputed where the pages were at hand; in the order of the volumes.
    pub volumes: Vec<Option<VolumeDigest>>,
}

/// What may be appended: the point but for its maps and segments, which the shell knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Approved {
    /// As asked for.
    pub commit: Commit,
    /// Of each volume, in order, what was checked.
    pub checked: Vec<Checked>,
}

enum State {
    Waiting,
    Taking(Taken),
    Sealing(Taken, Commit),
    Appending,
    Closed,
}

/// An open session.
#[derive(Clone, Debug)]
pub struct Taken {
    /// The record that the draft is built on.
    pub base: LogSeq,
    /// Its commit id.
    pub base_commit: CommitId,
    /// Of the writer.
    pub generation: Generation,
    /// In the order of the `Open`.
    pub volumes: Vec<TakenVolume>,
    /// Whether a point would differ from the newest one in more than blocks.
    pub changed: VolumesChanged,
    /// Lowest slot never used, if this draft is committed.
    pub next_slot: VolumeSlot,
    /// Where the agent runs.
    pub machine: MachineId,
}

/// The machine.
pub struct Sink {
    peer: Peer,
    state: State,
}

fn refuse<T>(reason: Reason, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, text: text.into() })
}

impl Sink {
    /// Waiting for the first `Open`.
    pub fn new(peer: Peer) -> Self {
        Self { peer, state: State::Waiting }
    }

    /// Whose session it is.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Whether records may come in.
    pub fn is_taking(&self) -> bool {
        matches!(self.state, State::Taking(_))
    }

    /// The agent opens a round; `head` has just been read. A round that was open is given up.
    pub fn open(&mut self, head: &GroupHead, open: &Open) -> Result<Taken, Refusal> {
        if !matches!(self.state, State::Waiting | State::Taking(_)) {
            self.state = State::Closed;
            return refuse(Reason::Protocol, "`Open` in the middle of a commit");
        }
        self.state = State::Closed;
        check_writer(&self.peer, head, open)?;
        let (volumes, next_slot) = assign_slots(head, &open.volumes)?;
        let same = head.volumes().len() == volumes.len()
            && volumes.iter().all(|v| {
                head.volumes().iter().any(|h| {
                    (h.id, &h.name, h.geometry, h.incarnation)
                        == (v.offer.id, &v.offer.name, v.offer.geometry, v.offer.incarnation)
                })
            });
        let changed = if same && head.point.is_some() { VolumesChanged::No } else { VolumesChanged::Yes };
        let taken = Taken {
            base: head.record.seq,
            base_commit: head.record.commit,
            generation: head.record.generation,
            volumes,
            changed,
            next_slot,
            machine: open.machine,
        };
        self.state = State::Taking(taken.clone());
        Ok(taken)
    }

    /// What records the open round admits: captures from `first_capture`, which is above every capture of base and
    /// draft, up to but not including `end_capture`.
    pub fn admission(taken: &Taken, first_capture: CaptureNumber, end_capture: CaptureNumber) -> Admission {
        let volumes = taken.volumes.iter().map(|v| (v.slot, v.offer.geometry)).collect();
        Admission { volumes, first_capture, end_capture }
    }

    /// The agent wants a point. After this the shell waits for all records, seals them and calls [`Self::sealed`].
    pub fn commit(&mut self, commit: Commit) -> Result<(), Refusal> {
        let State::Taking(taken) = std::mem::replace(&mut self.state, State::Closed) else {
            return refuse(Reason::Protocol, "`Commit` without `Open`");
        };
        if (commit.base, commit.generation) != (taken.base, taken.generation) {
            return refuse(Reason::Conflict, "the commit was built on another point than this session");
        }
        if commit.volumes.len() != taken.volumes.len() {
            return refuse(Reason::Protocol, "the commit names another number of volumes than were opened");
        }
        if commit.nonce == WriterNonce::OPEN {
            return refuse(Reason::Protocol, "the commit shows no nonce");
        }
        self.state = State::Sealing(taken, commit);
        Ok(())
    }

    /// Everything is sealed: may it become a point?
    pub fn sealed(&mut self, found: &Sealed) -> Result<(Taken, Approved), Refusal> {
        let State::Sealing(taken, commit) = std::mem::replace(&mut self.state, State::Closed) else {
            return refuse(Reason::Protocol, "nothing to seal");
        };
        if (found.delta_digest, found.delta_blocks) != (commit.delta_digest, commit.delta_blocks) {
            let text = format!(
                "the receiver holds {} changed blocks with digest {}, the agent states {} with {}",
                found.delta_blocks, found.delta_digest, commit.delta_blocks, commit.delta_digest
            );
            return refuse(Reason::Digest, text);
        }
        if found.max_capture > commit.max_capture {
            return refuse(Reason::Protocol, "a record has a higher capture number than the commit states");
        }
        let mut checked = Vec::with_capacity(taken.volumes.len());
        for ((volume, stated), recomputed) in taken.volumes.iter().zip(&commit.volumes).zip(&found.volumes) {
            match recomputed {
                None => checked.push(Checked::Delta),
                Some(digest) if *digest == stated.digest => checked.push(Checked::Digest),
                Some(digest) => {
                    let text = format!(
                        "volume {}: the receiver computes digest {digest}, the agent states {}",
                        volume.offer.name, stated.digest
                    );
                    return refuse(Reason::Digest, text);
                }
            }
        }
        self.state = State::Appending;
        Ok((taken, Approved { commit, checked }))
    }

    /// The record is in the log: the next round may open.
    pub fn appended(&mut self) {
        if matches!(self.state, State::Appending) {
            self.state = State::Waiting;
        }
    }
}

fn check_writer(peer: &Peer, head: &GroupHead, open: &Open) -> Result<(), Refusal> {
    let adopt = format!(
        "if this machine is the one that should write, let it: backhaul-receiver adopt --store URL GROUP {}",
        peer.agent
    );
    let bound_machine = match &head.record.body {
        // The operator has just named the writer: its nonce, machine and high water are what it says.
        Body::Promote(promote) if promote.agent == peer.agent => return Ok(()),
        Body::Promote(promote) => {
            return refuse(
                Reason::Diverged,
                format!(
                    "agent {} was made the writer of this group, this is agent {}; {adopt}",
                    promote.agent, peer.agent
                ),
            );
        }
        Body::Create(_) => peer.joined_machine,
        Body::Point(point) => point.machine,
    };
    if open.high_water > head.record.seq {
        let text = format!(
            "this agent saw point {} committed, the store ends at {}: the store was rolled back or is another one; {adopt}",
            open.high_water, head.record.seq
        );
        return refuse(Reason::Diverged, text);
    }
    if head.record.nonce != WriterNonce::OPEN && !open.nonces.contains(&head.record.nonce) {
        let text = format!(
            "another writer committed after this agent's state was made: its state folder is a copy or was restored from \
             an old image; {adopt}"
        );
        return refuse(Reason::Diverged, text);
    }
    if bound_machine != open.machine {
        let text =
            format!("this is not the machine that joined or wrote last (a clone, or a booted drill copy?); {adopt}");
        return refuse(Reason::Diverged, text);
    }
    Ok(())
}

fn assign_slots(head: &GroupHead, offers: &[OpenVolume]) -> Result<(Vec<TakenVolume>, VolumeSlot), Refusal> {
    let ids: BTreeSet<_> = offers.iter().map(|o| o.id).collect();
    let names: BTreeSet<_> = offers.iter().map(|o| &o.name).collect();
    if offers.is_empty() || offers.len() > MAX_VOLUMES || ids.len() != offers.len() || names.len() != offers.len() {
        return refuse(Reason::Protocol, "no volumes, too many, or the same one twice");
    }
    let mut next_slot = head.next_slot();
    // Whom the operator made the writer may have been restored from an old image, volumes and all.
    let adopted = matches!(head.record.body, Body::Promote(_));
    let mut slots = BTreeMap::new();
    // By id, so that the same volumes get the same slots when a draft is taken up again.
    let mut sorted: Vec<_> = offers.iter().collect();
    sorted.sort_by_key(|o| o.id);
    for offer in sorted {
        let known = head.volumes().iter().find(|v| v.id == offer.id);
        if let Some(v) = known {
            if offer.incarnation < v.incarnation && !adopted {
                let text =
                    format!("volume {}: incarnation {} is older than {}", offer.name, offer.incarnation, v.incarnation);
                return refuse(Reason::Volume, text);
            }
            let same = offer.incarnation == v.incarnation && !adopted;
            if same
                && (offer.geometry.block_size() != v.geometry.block_size()
                    || offer.geometry.length() < v.geometry.length())
            {
                let text = format!(
                    "volume {} shrank or changed its block size; name it again: backhaul-agent protect {}=PATH",
                    offer.name, offer.name
                );
                return refuse(Reason::Volume, text);
            }
        }
        let known = known.filter(|v| v.geometry.block_size() == offer.geometry.block_size());
        let slot = known.map_or(next_slot, |v| v.slot);
        if known.is_none() {
            next_slot = next_slot.next();
        }
        slots.insert(offer.id, (slot, known));
    }
    let taken = offers.iter().map(|offer| {
        let (slot, known) = slots[&offer.id];
        let head_digest = known.filter(|v| v.geometry == offer.geometry).map(|v| v.digest);
        let known = if known.is_some() { Known::Yes } else { Known::No };
        TakenVolume { slot, offer: offer.clone(), head_digest, known }
    });
    Ok((taken.collect(), next_slot))
}
