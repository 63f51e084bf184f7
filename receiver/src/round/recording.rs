//! The log record of a new point, and what is done once it is there.
//!
//! Read first: [`Round::record`], then [`Round::adopt`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use backhaul_protocol::consistency::Checked;
use backhaul_protocol::digest::{ObjectDigest, RangeDigest};
use backhaul_protocol::ids::{CaptureNumber, LogSeq, VolumeSlot};
use backhaul_protocol::session::sink::{Approved, GroupHead, Taken};
use backhaul_protocol::store::log::{Body, PointBody, PointVolume, Record, UnixMillis};
use backhaul_protocol::store::segment::DraftBinding;
use backhaul_protocol::wire::message::{Reason, Refusal};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::random;
use backhaul_seams::situation::{Situation, reached};

use super::Round;
use super::group_state::{GroupState, KnownHead};

use crate::catalog::{Appended, GroupLog};
use crate::draft::{Draft, end_of_captures};
use crate::fold::{self, Layers};
use crate::limits::Limits;
use crate::object_ids::IdSource;
use crate::read_error::ReadError;
use crate::view::Loose;

impl Round {
    #[expect(clippy::too_many_arguments, reason = "a log record is made of all of it")]
    pub(super) fn record(
        &self,
        log: &GroupLog,
        known: &KnownHead,
        peer: backhaul_protocol::ids::AgentId,
        taken: &Taken,
        approved: &Approved,
        checked: Vec<Checked>,
        layers: &Layers,
        inline: Option<backhaul_protocol::store::segment::Inline>,
        delta_stored: u64,
        now: UnixMillis,
        next_slot: VolumeSlot,
    ) -> Record {
        let commit = &approved.commit;
        let volumes =
            taken.volumes.iter().zip(&commit.volumes).zip(checked).map(|((v, stated), checked)| PointVolume {
                slot: v.slot,
                id: v.offer.id,
                name: v.offer.name.clone(),
                incarnation: v.offer.incarnation,
                geometry: v.offer.geometry,
                digest: stated.digest,
                checked,
                full_scan: stated.full_scan,
                base: fold::base_reference(&layers.view, v.slot),
            });
        let point = PointBody {
            base: taken.base,
            consistency: commit.consistency,
            capture_start: commit.capture_start,
            capture_end: commit.capture_end,
            max_capture: commit.max_capture.max(known.head.max_capture()),
            delta_digest: commit.delta_digest,
            delta_blocks: commit.delta_blocks,
            delta_stored,
            agent: peer,
            machine: taken.machine,
            next_slot: if planted(Mutant::SlotUsedAgain) { VolumeSlot::default() } else { next_slot },
            volumes: volumes.collect(),
            deltas: layers.view.deltas.iter().map(|d| d.reference).collect(),
            segments: layers.segments.clone(),
            inline,
        };
        Record {
            group: log.group(),
            seq: taken.base.next(),
            previous: known.hash,
            generation: taken.generation,
            commit: commit.commit,
            nonce: commit.nonce,
            // Commit times never go backwards within a group, whatever the clock does.
            time: now.max(known.head.record.time),
            body: Body::Point(Box::new(point)),
        }
    }

    /// The new point becomes what is known, so that the next round reads nothing.
    pub(super) async fn adopt(
        &self,
        state: &mut GroupState,
        record: Record,
        hash: ObjectDigest,
        mut layers: Layers,
        ranges: BTreeMap<VolumeSlot, Vec<RangeDigest>>,
    ) -> Result<(), ReadError> {
        let (seq, generation) = (record.seq, record.generation);
        // Read back once: the places of inline records are known only now that the record is laid out.
        let lost = ReadError::Log { seq, what: "the record went away" };
        let (record, _) = if record.point().is_some_and(|p| p.inline.is_some()) {
            let bytes = record.to_bytes();
            let parsed =
                Record::parse(record.group, seq, &bytes).map_err(ReadError::damaged(&state.log.keys().log(seq)))?;
            let own = parsed.point().and_then(|p| p.segments.last().copied()).ok_or(lost)?;
            let start = own.index_offset as usize;
            let index = backhaul_protocol::store::segment::read_index(&own, &bytes[start..])
                .map_err(ReadError::damaged(&state.log.keys().log(seq)))?;
            layers.view.loose.push(Arc::new(Loose::new(index)));
            layers.segments.push(own);
            (parsed, ())
        } else {
            (record, ())
        };
        if layers.view.loose.len() > 1 {
            let all = layers.view.loose.iter().flat_map(|l| l.0.iter().copied()).collect();
            layers.view.loose = vec![Arc::new(Loose::new(all))];
        }
        let end_capture = end_of_captures(record.point().map_or(CaptureNumber(0), |p| p.max_capture));
        let point = record.point().cloned().map(|p| (seq, p));
        let binding = DraftBinding { group: state.log.group(), base_commit: record.commit };
        state.known = Some(KnownHead {
            head: GroupHead { record, point },
            hash,
            layers,
            ranges,
            is_mending: false,
            draft: Draft::empty(binding),
            end_capture,
            ids: Arc::new(Mutex::new(IdSource::new(seq, generation, random::number()))),
        });
        Ok(())
    }
}

/// Appends the record of a point, or says who was first.
pub(super) async fn append(
    log: &GroupLog,
    state: &mut GroupState,
    record: Record,
) -> Result<(Record, ObjectDigest, usize), Refusal> {
    let read = |e: ReadError| e.refusal();
    let (outcome, hash, len) = if planted(Mutant::CommittedBeforeRecord) {
        let (later, bytes) = (log.clone(), record.to_bytes());
        let hash = Record::hash(&bytes);
        let late = record.clone();
        tokio::spawn(async move { later.append(&late).await });
        (Appended::Ours, hash, bytes.len())
    } else {
        log.append(&record).await.map_err(read)?
    };
    let (record, outcome, hash, len) = match outcome {
        Appended::Theirs(theirs) if planted(Mutant::NoBaseCheck) => {
            blindly(log, record, &theirs).await.map_err(read)?
        }
        outcome => (record, outcome, hash, len),
    };
    let text = match outcome {
        Appended::Ours => return Ok((record, hash, len)),
        Appended::Theirs(_) if planted(Mutant::TheirsTakenForOurs) => return Ok((record, hash, len)),
        Appended::Theirs(theirs) => {
            reached(Situation::AppendLost);
            format!("record {} was written by somebody else (commit {}) meanwhile", record.seq, theirs.commit)
        }
        Appended::BelowFloor => {
            reached(Situation::BelowFloor);
            "this receiver slept too long".into()
        }
    };
    state.forget();
    Err(Refusal { reason: Reason::Conflict, text })
}

/// Puts a record behind one that it does not know.
async fn blindly(
    log: &GroupLog,
    record: Record,
    theirs: &Record,
) -> Result<(Record, Appended, ObjectDigest, usize), ReadError> {
    let previous = Record::hash(&theirs.to_bytes());
    let record = Record { seq: theirs.seq.next(), previous, time: record.time.max(theirs.time), ..record };
    let (outcome, hash, len) = log.append(&record).await?;
    Ok((record, outcome, hash, len))
}

/// Work after a commit that nobody waits for: a checkpoint where one is due.
pub async fn after_commit(log: &GroupLog, seq: LogSeq, limits: Limits) {
    assert!(!planted(Mutant::PanicsUnheard), "planted");
    if seq.0.is_multiple_of(limits.checkpoint_interval)
        && let Err(error) = log.write_checkpoint(seq).await
    {
        tracing::warn!(%error, "could not write a checkpoint; lists of points read more of the log");
    }
}
