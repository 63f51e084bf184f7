//! What a receiver remembers of a group between rounds.
//!
//! Read first: [`GroupState`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use backhaul_protocol::digest::{ObjectDigest, RangeDigest};
use backhaul_protocol::ids::{CaptureNumber, CommitId, VolumeSlot};
use backhaul_protocol::session::sink::GroupHead;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::store::segment::DraftBinding;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::random;

use backhaul_seams::situation::{Situation, reached};

use crate::catalog::GroupLog;
use crate::draft::{Draft, end_of_captures};
use crate::fold::Layers;
use crate::object_ids::IdSource;
use crate::read_error::ReadError;
use crate::salvage::{BadIndex, OpenedView, open_view};
use crate::view::View;

/// What a receiver remembers of a group between rounds. All of it can be read from the store again.
#[derive(Debug)]
pub struct GroupState {
    pub(super) log: GroupLog,
    pub(super) known: Option<KnownHead>,
    /// The commit on which an earlier session left nothing.
    clean: Option<CommitId>,
}

#[derive(Debug)]
pub(super) struct KnownHead {
    pub(super) head: GroupHead,
    pub(super) hash: ObjectDigest,
    pub(super) layers: Layers,
    /// Range digests of the head's volumes, where they have been computed.
    pub(super) ranges: BTreeMap<VolumeSlot, Vec<RangeDigest>>,
    /// Part of the head's index is damaged and left out of the layers: its digests are not those of the volumes, and
    /// the next point does not build on it.
    pub(super) is_mending: bool,
    pub(super) draft: Draft,
    pub(super) ids: Arc<Mutex<IdSource>>,
    /// No capture of any round on this head, as long as this is known, is as high.
    pub(super) end_capture: CaptureNumber,
}

impl GroupState {
    /// Nothing known yet, but that no draft of this receiver lies on the commit `clean`. What another receiver left on
    /// it is not found then, and is sent again.
    pub fn new(log: GroupLog, clean: Option<CommitId>) -> Self {
        Self { log, known: None, clean }
    }

    /// The newest commit, if nothing has arrived since.
    pub fn clean(&self) -> Option<CommitId> {
        let known = self.known.as_ref().filter(|k| k.draft.is_empty()).map(|k| k.head.record.commit);
        // The first is left only where nobody has looked at the group since.
        self.clean.or(known)
    }

    /// The log.
    pub fn log(&self) -> &GroupLog {
        &self.log
    }

    /// When the newest point that is known began, by its agent's clock.
    pub fn newest_point(&self) -> Option<UnixMillis> {
        self.known.as_ref()?.head.point.as_ref().map(|(_, point)| point.capture_start)
    }

    /// Forgets everything, to be read again.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// Makes sure that what is known is the newest.
    pub(super) async fn refresh(&mut self) -> Result<&mut KnownHead, ReadError> {
        if let Some(known) = &self.known {
            let seq = known.head.record.seq;
            // Where the next record is gone, too, the log went on without us for long.
            if self.log.read(seq.next()).await?.is_some() || self.log.readable_floor().await? > seq {
                reached(Situation::KnownHeadWasOld);
                self.known = None;
            }
        }
        if self.known.is_none() {
            self.known = Some(KnownHead::load(&self.log, self.clean.take()).await?);
        }
        Ok(self.known.as_mut().expect("just loaded"))
    }
}

impl KnownHead {
    async fn load(log: &GroupLog, clean: Option<CommitId>) -> Result<Self, ReadError> {
        let (head, hash) = log.head().await?;
        let mut is_mending = false;
        let layers = match &head.point {
            Some((_, point)) => {
                let OpenedView { view, holes, .. } = open_view(log, point, BadIndex::LeaveOut).await?;
                // A dying disk is no reason to do without a map for good.
                if let Some(hole) = holes.iter().find(|h| h.error().is_unreadable()) {
                    return Err(hole.error().clone());
                }
                let mut segments = point.segments.clone();
                for hole in &holes {
                    let error = hole.error();
                    tracing::warn!(group = %log.group(), %error, "left out, and what it held is asked for again");
                    segments.retain(|s| s.id != hole.id);
                }
                is_mending = !holes.is_empty();
                if is_mending {
                    reached(Situation::Mending);
                }
                Layers { view, segments }
            }
            None => Layers { view: View::default(), segments: Vec::new() },
        };
        let (generation, seq) = (head.record.generation, head.record.seq);
        let binding = DraftBinding { group: log.group(), base_commit: head.record.commit };
        let draft = match clean == Some(head.record.commit) || planted(Mutant::DraftForgotten) {
            false => Draft::recover(log.store(), log.keys(), binding, generation, seq, head.max_capture()).await?,
            true => Draft::empty(binding),
        };
        // All of this may be told to an agent as committed or as arrived: it must not go away any more (I3).
        let written = [
            log.keys().log(seq).to_string(),
            log.keys().draft_segments(generation, seq),
            log.keys().draft_maps(generation, seq),
        ];
        for prefix in written {
            log.store().settle(&prefix).await?;
        }
        let end_capture = end_of_captures(head.max_capture().max(draft.max_capture));
        let ids = Arc::new(Mutex::new(IdSource::new(seq, generation, random::number())));
        Ok(Self { head, hash, layers, ranges: BTreeMap::new(), is_mending, draft, ids, end_capture })
    }
}
