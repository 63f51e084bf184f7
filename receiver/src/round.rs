//! A round: from `Open` to `Committed`. Owns the group's draft while it lasts.
//!
//! Read first: [`GroupState`] (what is kept between rounds), [`Round::open`] and [`Round::commit`].
//! Nothing in here says that a point exists but [`GroupLog::append`]; everything else is preparation that a crash
//! turns into a draft or into garbage.

mod examining;
mod group_state;
mod recording;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use backhaul_protocol::digest::DeltaDigest;
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::session::sink::{Sealed, Sink, Taken};
use backhaul_protocol::store::key::ObjectId;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::store::segment::{DraftBinding, SegmentBuilder};
use backhaul_protocol::wire::message::{
    Commit, Committed, DraftPages, Open, Opened, OpenedVolume, Reason, Refusal, VolumesChanged,
};
use backhaul_seams::failpoint;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use tokio::sync::{Semaphore, watch};

use crate::catalog::GroupLog;
use crate::fold::{self, FoldTarget, Layers};
use crate::ingest::{Ingest, Progress};
use crate::layers::layer_page;
use crate::limits::Limits;
use crate::read_error::ReadError;
use crate::segment_writer::{Budget, Rest, SegmentWriter};
use crate::store::{Kind, StoreError, Verb};
use crate::view::{Loose, View, ViewVolume};
use examining::check_folded;
pub use group_state::GroupState;
use group_state::KnownHead;
pub use recording::after_commit;
use recording::append;

/// Runs of draft pages in an `Opened`, of all volumes: keeps it inside one frame.
const MAX_DRAFT_RUNS: usize = 1500;
/// Records that may still be on their way when a commit is asked for: what fits the windows of both sides.
const MAX_LATE_RECORDS: u64 = 1 << 19;
/// The last records are with the transport when a commit is asked for: a minute without one of them is a network that
/// does not work, five for all of them is a peer that does not mean it.
const LATE: Late = Late { next: Duration::from_secs(60), all: Duration::from_secs(300) };

/// How often what was stored is taken into the draft.
pub const ABSORB_INTERVAL: Duration = Duration::from_millis(250);

/// What the rounds of all sessions share.
#[derive(Debug)]
pub struct RoundResources {
    /// Memory of open segments and uploads.
    pub budget: Arc<Budget>,
    /// Threads that verify.
    pub verifiers: Arc<Semaphore>,
    /// Segments are sealed at this size, bytes.
    pub segment_size: usize,
    /// When to fold.
    pub limits: Limits,
}

/// An open round.
pub struct Round {
    /// What was agreed.
    pub taken: Taken,
    /// Where records go.
    pub ingest: Arc<Ingest>,
    /// Base, deltas, draft: what the agent compares with.
    view: View,
    end_capture: CaptureNumber,
    limits: Limits,
}

impl Round {
    /// Answers an `Open`.
    pub async fn open(
        state: &mut GroupState,
        sink: &mut Sink,
        open: &Open,
        resources: &RoundResources,
    ) -> Result<(Self, Opened), Refusal> {
        let (store, keys) = (state.log.store().clone(), state.log.keys());
        let known = state.refresh().await.map_err(|e| e.refusal())?;
        let open = &believed(open, known);
        let mut taken = sink.open(&known.head, open)?;
        if known.is_mending {
            // Everything is compared, and a point is made whatever comes of it.
            taken.volumes.iter_mut().for_each(|v| v.head_digest = None);
            taken.changed = VolumesChanged::Yes;
        }
        let mut view = known.layers.view.clone();
        view.volumes = taken
            .volumes
            .iter()
            .map(|v| ViewVolume {
                slot: v.slot,
                geometry: v.offer.geometry,
                base: known.layers.view.volume(v.slot).and_then(|old| old.base.clone()),
            })
            .collect();
        view.deltas.extend(known.draft.deltas.iter().cloned());
        view.loose.push(known.draft.loose.clone());
        let mut highest = known.head.max_capture().max(known.draft.max_capture);
        if planted(Mutant::CapturesStartAgain) {
            highest = known.head.max_capture();
        }
        let Some(first_capture) = highest.0.checked_add(1).filter(|c| *c < known.end_capture.0) else {
            let text =
                "no capture numbers are left in this group: the log is damaged or was written by a hostile agent";
            return Err(Refusal { reason: Reason::Damaged, text: text.into() });
        };
        let first_capture = CaptureNumber(first_capture);
        let writer = SegmentWriter::new(
            store,
            keys,
            known.draft.binding,
            known.ids.clone(),
            resources.segment_size,
            resources.budget.clone(),
        );
        let admission = Sink::admission(&taken, first_capture, known.end_capture);
        let end_capture = known.end_capture;
        let ingest = Ingest::new(admission, writer, resources.verifiers.clone());
        let mut draft_pages: BTreeMap<VolumeSlot, Vec<u64>> = BTreeMap::new();
        for (slot, page) in known.draft.pages().await.map_err(|e| e.refusal())? {
            draft_pages.entry(slot).or_default().push(page.0);
        }
        let max_runs = MAX_DRAFT_RUNS / taken.volumes.len().max(1);
        let opened = Opened {
            generation: taken.generation,
            head: taken.base,
            head_commit: taken.base_commit,
            next_capture: first_capture,
            volumes: taken
                .volumes
                .iter()
                .map(|v| {
                    let pages = draft_pages.remove(&v.slot).unwrap_or_default();
                    let inside = pages.into_iter().filter(|p| *p < v.offer.geometry.pages());
                    OpenedVolume { slot: v.slot, digest: v.head_digest, draft: DraftPages::of(inside, max_runs) }
                })
                .collect(),
            volumes_changed: taken.changed,
        };
        Ok((Self { taken, ingest, view, end_capture, limits: resources.limits }, opened))
    }

    /// The view that the agent compares with.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Which blocks of a page the draft held when the round was opened, and everything of the page.
    pub async fn page(
        &self,
        state: &GroupState,
        slot: VolumeSlot,
        index: PageIndex,
    ) -> Result<(Vec<u8>, Vec<backhaul_protocol::digest::BlockDigest>), ReadError> {
        let volume = self.view.volume(slot).ok_or_else(|| ReadError::NotFound("no such volume".into()))?;
        let page = self.view.page(volume, index).await?;
        let mut set = backhaul_protocol::session::compare::BlockSet::default();
        if let Some(known) = &state.known {
            let (deltas, loose) = (&known.draft.deltas, std::slice::from_ref(&known.draft.loose));
            let blocks = volume.geometry.page_blocks(index);
            let layer = layer_page(deltas, loose, slot, index, blocks).await?;
            layer.blocks().filter(|(_, held)| held.is_some()).for_each(|(block, _)| set.insert(block.in_page()));
        }
        Ok((set.to_bytes(), page.digests()))
    }

    /// The round ends without a commit: what has arrived stays, as a draft.
    pub async fn abandon(self, state: &mut GroupState) {
        match self.ingest.writer().finish(Rest::Segment).await {
            Ok(finished) => {
                if let Some(known) = &mut state.known {
                    finished.stored.into_iter().for_each(|(reference, index)| known.draft.add(reference, index));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "could not keep what had arrived; it is sent again");
                state.forget();
            }
        }
    }

    /// Takes what has been stored so far into the draft, and folds it where it has grown.
    pub async fn absorb(&self, state: &mut GroupState) -> Result<(), ReadError> {
        let target = self.fold_target(state);
        let Some(known) = &mut state.known else { return Ok(()) };
        let collected = match self.ingest.writer().collect().await {
            Ok(collected) => collected,
            Err(error) => {
                // What was stored before it failed is not known any more: the store tells.
                state.forget();
                return Err(error.into());
            }
        };
        for (reference, index) in collected {
            known.draft.add(reference, index);
        }
        if known.draft.wants_fold(self.limits) {
            let mut ids = *lock(&known.ids);
            // Ids are set aside generously: uploads go on meanwhile and take theirs from the same counter.
            let mut apart = ids;
            apart.used_up_to(ObjectId { n: ids.peek().n + FOLD_IDS, ..ids.peek() });
            *lock(&known.ids) = apart;
            known.draft.fold(&target, &mut ids).await?;
        }
        Ok(())
    }

    fn fold_target(&self, state: &GroupState) -> FoldTarget {
        FoldTarget {
            store: state.log.store().clone(),
            keys: state.log.keys(),
            binding: DraftBinding { group: state.log.group(), base_commit: self.taken.base_commit },
            volumes: self.taken.volumes.iter().map(|v| (v.slot, v.offer.geometry)).collect(),
            limits: self.limits,
        }
    }

    /// Waits for the last records of a commit, and goes on taking what is stored into the draft.
    async fn all_records(&self, state: &mut GroupState, records: u64) -> Result<(), Refusal> {
        let mut waiting = std::pin::pin!(wait_for(self.ingest.progress(), records, LATE));
        let mut absorb = tokio::time::interval(ABSORB_INTERVAL);
        absorb.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                arrived = &mut waiting => return arrived,
                // Indexes of stored segments are in nobody's way then, whatever is still on its way.
                _ = absorb.tick() => self.absorb(state).await.map_err(|e| e.refusal())?,
            }
        }
    }

    /// Makes the draft a point. `now` is the receiver's clock.
    pub async fn commit(
        &mut self,
        state: &mut GroupState,
        sink: &mut Sink,
        peer: backhaul_protocol::ids::AgentId,
        commit: Commit,
        now: impl Fn() -> UnixMillis,
    ) -> Result<Committed, Refusal> {
        let records = commit.records;
        let stated = (commit.delta_digest, commit.delta_blocks);
        if commit.max_capture >= self.end_capture {
            return Err(Refusal { reason: Reason::Protocol, text: "a capture number out of bounds".into() });
        }
        let commit_id = commit.commit;
        sink.commit(commit)?;
        self.all_records(state, records).await?;
        let read = |e: ReadError| e.refusal();
        // Maps of a commit that fails must never be taken for the draft's: they are bound to the commit itself.
        let mut target = self.fold_target(state);
        target.binding.base_commit = commit_id;
        let log = state.log.clone();
        let known =
            state.known.as_mut().ok_or_else(|| Refusal { reason: Reason::Protocol, text: "no round".into() })?;
        let rest = if known.draft.is_empty() { Rest::Inline(self.limits.inline) } else { Rest::Segment };
        let finished = self.ingest.writer().finish(rest).await.map_err(|e| read(e.into()))?;
        let all_inline = finished.stored.is_empty();
        for (reference, index) in finished.stored {
            known.draft.add(reference, index);
        }
        let seq = self.taken.base.next();
        let inline = match finished.inline {
            // Segments were stored meanwhile after all: the rest joins them, so that a draft is one thing.
            Some(builder) if !all_inline || !known.draft.is_empty() => {
                let (reference, index) = store_rest(&log, known, builder).await.map_err(read)?;
                known.draft.add(reference, index);
                None
            }
            other => other.map(|b| b.into_inline(ObjectId::inline(seq))),
        };
        if inline.is_some() {
            reached(Situation::InlinePoint);
        }
        let inline_loose = Arc::new(Loose::new(inline.as_ref().map(|i| i.index.clone()).unwrap_or_default()));
        let mut layers = self.layers(known, inline_loose.clone());
        let (sealed, ranges, next_slot) = self.examine(known, &layers.view, &inline_loose).await.map_err(read)?;
        let sealed = if planted(Mutant::DigestsNotCompared) { believed_sealed(&sealed, stated) } else { sealed };
        let (taken, approved) = sink.sealed(&sealed)?;
        step("commit.sealed").map_err(read)?;

        // The records inside the log record have no place yet: they are left out of folding and stay loose.
        layers.view.loose.retain(|l| !Arc::ptr_eq(l, &inline_loose));
        let mut ids = *lock(&known.ids);
        let folded = fold::fold_point(&target, &mut layers, inline.as_ref().map(|_| &*inline_loose), &mut ids)
            .await
            .map_err(read)?;
        *lock(&known.ids) = ids;
        let checked = check_folded(&taken, &approved, &folded, inline.is_none())?;

        let stored = known.draft.stored + inline.as_ref().map_or(0, |i| i.records.len() as u64);
        let record =
            self.record(&log, known, peer, &taken, &approved, checked, &layers, inline, stored, now(), next_slot);
        let (record, hash, len) = append(&log, state, record).await?;
        step("commit.appended").map_err(read)?;
        sink.appended();
        let inline_len = record.point().and_then(|p| p.inline.as_ref()).map_or(0, |i| i.records.len());
        let metadata_bytes = (len - inline_len) as u64;
        let committed = Committed { seq: record.seq, commit: record.commit, time: record.time, metadata_bytes };
        self.adopt(state, record, hash, layers, ranges).await.map_err(read)?;
        step("commit.adopted").map_err(read)?;
        Ok(committed)
    }

    /// Everything that the new point consists of.
    fn layers(&self, known: &KnownHead, inline: Arc<Loose>) -> Layers {
        let mut view = self.view.clone();
        view.deltas = known.layers.view.deltas.iter().chain(&known.draft.deltas).cloned().collect();
        view.loose = known.layers.view.loose.clone();
        view.loose.push(known.draft.loose.clone());
        view.loose.push(inline);
        let segments = known.layers.segments.iter().chain(&known.draft.segments).copied().collect();
        Layers { view, segments }
    }
}

/// Where a test may stop. It fails as a store that does not answer.
fn step(name: &'static str) -> Result<(), ReadError> {
    let failed = |e| StoreError::new(Kind::Unavailable, Verb::PutNew, name, "a test wants it").because(e);
    Ok(failpoint::reach(|| name).map_err(failed)?)
}

/// What an agent says, with the planted mistakes in how it is believed.
fn believed(open: &Open, known: &KnownHead) -> Open {
    let mut open = open.clone();
    if planted(Mutant::NonceNotChecked) {
        open.nonces.push(known.head.record.nonce);
    }
    if planted(Mutant::MachineNotChecked)
        && let Some((_, point)) = &known.head.point
    {
        open.machine = point.machine;
    }
    if planted(Mutant::HighWaterIgnored) {
        open.high_water = Default::default();
    }
    open
}

fn believed_sealed(sealed: &Sealed, (delta_digest, delta_blocks): (DeltaDigest, u64)) -> Sealed {
    let volumes = vec![None; sealed.volumes.len()];
    Sealed { delta_digest, delta_blocks, volumes, ..sealed.clone() }
}

/// Ids that a fold of the draft may take, for parts of 16 MiB: 64 GiB of maps, three times the entries of the largest
/// volume. There are enough for a million folds in one session, each of 64 segments.
const FOLD_IDS: u32 = 1 << 12;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn store_rest(
    log: &GroupLog,
    known: &KnownHead,
    builder: SegmentBuilder,
) -> Result<crate::segment_writer::Stored, ReadError> {
    let id = lock(&known.ids).take();
    let sealed = builder.seal(known.draft.binding, id);
    log.store().put_new(&log.keys().segment(id), bytes::Bytes::from(sealed.bytes)).await?;
    Ok((sealed.reference, sealed.index))
}

/// How long a commit waits for its last records.
#[derive(Clone, Copy, Debug)]
struct Late {
    /// For the next one.
    next: Duration,
    /// For all of them.
    all: Duration,
}

/// Waits for the last records of a commit: streams and the control stream are not ordered.
async fn wait_for(mut progress: watch::Receiver<Progress>, records: u64, patience: Late) -> Result<(), Refusal> {
    let refuse = |reason, text| Err(Refusal { reason, text });
    let begun = tokio::time::Instant::now();
    let late = records.saturating_sub(progress.borrow().records);
    if late > MAX_LATE_RECORDS {
        return refuse(Reason::Protocol, format!("the commit counts {late} records that were not sent"));
    }
    loop {
        let now = progress.borrow_and_update().clone();
        if now.records > records || begun.elapsed() > patience.all {
            let text = format!("{} records arrived, the commit counts {records}", now.records);
            return refuse(Reason::Protocol, text);
        }
        if let Some(text) = now.failed {
            return refuse(Reason::Protocol, text);
        }
        if now.records >= records {
            return Ok(());
        }
        if tokio::time::timeout(patience.next, progress.changed()).await.is_err() {
            let text = format!("{} of {records} records arrived, then nothing for {:?}", now.records, patience.next);
            return refuse(Reason::Busy, text);
        }
    }
}

#[cfg(test)]
mod tests;
