//! The draft of a group: what has arrived for the next point. Bound to (generation, base record): a draft that was
//! built on another base is never looked at again.
//!
//! Read first: [`Draft`]. What is in the store of a draft survives any crash; [`Draft::recover`] finds it again with
//! one LIST.

use std::collections::BTreeSet;
use std::sync::Arc;

use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, Generation, LogSeq, VolumeSlot};
use backhaul_protocol::store::key::{GroupKeys, ObjectId};
use backhaul_protocol::store::map::{self, PAGES_START, Role};
use backhaul_protocol::store::segment::{self, DraftBinding, RECORDS_START, SegmentRef, VolumeEntry};

use crate::fold::{self, FoldTarget};
use crate::layers::touched_pages;
use crate::limits::Limits;
use crate::object_ids::IdSource;
use crate::read_error::ReadError;
use crate::store::{ObjectStore, list_all};
use crate::view::{Loose, MapReader, View, read_segment_index};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use tokio::task::JoinSet;

/// Captures that one session may use on one base: 16 times the blocks of the largest volume, and room for a hundred
/// million sessions that were broken off.
pub const MAX_CAPTURES: u64 = 1 << 36;
/// Objects that are opened at once when a draft is looked for.
const READS: usize = 16;

/// The first capture that a session may not use which begins after `highest`. Not above it where none are left.
pub fn end_of_captures(highest: CaptureNumber) -> CaptureNumber {
    CaptureNumber(highest.0.checked_add(MAX_CAPTURES).unwrap_or(0))
}

/// What has arrived for the next point and lies in the store.
#[derive(Clone, Debug)]
pub struct Draft {
    /// What it is bound to.
    pub binding: DraftBinding,
    /// Delta maps of its own.
    pub deltas: Vec<Arc<MapReader>>,
    /// Segments that none of them covers.
    pub segments: Vec<SegmentRef>,
    /// Their entries.
    pub loose: Arc<Loose>,
    /// No capture in it is higher.
    pub max_capture: CaptureNumber,
    /// Bytes of records in it.
    pub stored: u64,
}

impl Draft {
    /// Nothing yet.
    pub fn empty(binding: DraftBinding) -> Self {
        Self {
            binding,
            deltas: Vec::new(),
            segments: Vec::new(),
            loose: Arc::default(),
            max_capture: CaptureNumber(0),
            stored: 0,
        }
    }

    /// Whether nothing has arrived.
    pub fn is_empty(&self) -> bool {
        self.deltas.is_empty() && self.segments.is_empty()
    }

    /// Finds what an earlier session left for this base, whose highest capture is `base_capture`. Bounded by the number
    /// of objects, never by that of their entries: an agent waits for it, and a first sync may have been under way for
    /// days. Where maps were written the highest capture is therefore not looked up but bounded: no session, which is what
    /// the tag in object ids tells apart, uses more than [`MAX_CAPTURES`]. Objects that can't be read as what they should be are passed
    /// over: what they held is sent again.
    pub async fn recover(
        store: &Arc<dyn ObjectStore>,
        keys: GroupKeys,
        binding: DraftBinding,
        generation: Generation,
        base: LogSeq,
        base_capture: CaptureNumber,
    ) -> Result<Self, ReadError> {
        let mut draft = Self::empty(binding);
        let mut sessions = BTreeSet::new();
        let mut covered = BTreeSet::new();
        let mut candidates = Vec::new();
        let maps = list_all(&**store, &keys.draft_maps(generation, base)).await?;
        sessions.extend(maps.iter().filter_map(|(key, _)| keys.object_id(key)).map(|id| id.session));
        for chunk in maps.chunks(READS) {
            let mut opening = JoinSet::new();
            for (key, size) in chunk.iter().cloned() {
                let store = store.clone();
                opening.spawn(async move { (open_draft_map(&store, keys, &key, size, binding).await, key) });
            }
            while let Some(opened) = opening.join_next().await {
                match opened.expect("opening a map does not panic") {
                    (Ok(Some(reader)), _) => candidates.push(Arc::new(reader)),
                    (Ok(None), _) => {}
                    (Err(e), key) if e.is_damage() => {
                        tracing::warn!(%key, error = %e, "a map of the draft is damaged; what it held is sent again")
                    }
                    (Err(e), _) => return Err(e),
                }
            }
        }
        // Merged deltas reach the older ones that they replaced only through their segments: the newest that covers
        // a segment is enough, all of them are harmless, since captures decide.
        for reader in candidates {
            let reach = match touched_pages(std::slice::from_ref(&reader), &[]).await {
                Ok(_) => reader.checked_reach().await,
                Err(e) => Err(e),
            };
            match reach {
                Ok(reach) => {
                    covered.extend(reach.into_iter().filter_map(|(what, _)| match what {
                        map::Reached::Segment(id) => Some(id),
                        map::Reached::Map(_) => None,
                    }));
                    draft.deltas.push(reader);
                }
                Err(e) if e.is_damage() && !e.is_unreadable() => {
                    tracing::warn!(error = %e, "a map of the draft is damaged; its segments are read one by one");
                }
                Err(e) => return Err(e),
            }
        }
        let mut entries = Vec::new();
        for (key, size) in list_all(&**store, &keys.draft_segments(generation, base)).await? {
            let Some(id) = keys.object_id(&key) else { continue };
            sessions.insert(id.session);
            if covered.contains(&id) {
                continue;
            }
            match open_draft_segment(&**store, keys, id, size, binding).await {
                Ok(Some((reference, index))) => {
                    draft.stored += index.iter().map(stored_len).sum::<u64>();
                    draft.segments.push(reference);
                    entries.extend(index);
                }
                Ok(None) => {}
                Err(e) if e.is_damage() => {
                    tracing::warn!(%key, error = %e, "a segment of the draft is damaged; what it held is sent again")
                }
                Err(e) => return Err(e),
            }
        }
        if !draft.segments.is_empty() || !draft.deltas.is_empty() {
            reached(Situation::DraftRecovered);
        }
        draft.max_capture = entries.iter().map(|e| e.entry.capture).max().unwrap_or_default();
        if !draft.deltas.is_empty() {
            draft.max_capture = draft.max_capture.max(CaptureNumber(
                base_capture.0.saturating_add((sessions.len() as u64).saturating_mul(MAX_CAPTURES)),
            ));
        }
        draft.loose = Arc::new(Loose::new(entries));
        Ok(draft)
    }

    /// A segment was stored.
    pub fn add(&mut self, reference: SegmentRef, index: Vec<VolumeEntry>) {
        self.segments.push(reference);
        self.stored += index.iter().map(stored_len).sum::<u64>();
        self.max_capture = index.iter().map(|e| e.entry.capture).max().unwrap_or_default().max(self.max_capture);
        let loose = Arc::make_mut(&mut self.loose);
        loose.0.extend(index);
        loose.0.sort_by_key(VolumeEntry::sort_key);
    }

    /// Whether so much has come together that it should be folded.
    pub fn wants_fold(&self, limits: Limits) -> bool {
        self.segments.len() >= limits.segments || self.loose.0.len() >= limits.entries
    }

    /// Folds the loose segments into a delta map, and many delta maps into one.
    pub async fn fold(&mut self, target: &FoldTarget, ids: &mut IdSource) -> Result<(), ReadError> {
        reached(Situation::DraftFolded);
        let delta = fold::delta_of(target, &[], std::slice::from_ref(&self.loose), ids).await?;
        self.deltas.extend(delta);
        self.segments.clear();
        self.loose = Arc::default();
        if self.deltas.len() >= target.limits.deltas {
            let merged = fold::delta_of(target, &self.deltas, &[], ids).await?;
            self.deltas = merged.into_iter().collect();
        }
        Ok(())
    }

    /// The draft alone as a view: which blocks it holds. The volumes must be filled in.
    pub fn layer(&self) -> View {
        View { volumes: Vec::new(), deltas: self.deltas.clone(), loose: vec![self.loose.clone()] }
    }

    /// All pages that the draft touches, ascending.
    pub async fn pages(&self) -> Result<BTreeSet<(VolumeSlot, PageIndex)>, ReadError> {
        touched_pages(&self.deltas, std::slice::from_ref(&self.loose)).await
    }
}

fn stored_len(entry: &VolumeEntry) -> u64 {
    use backhaul_protocol::record::HEADER_LEN;
    use backhaul_protocol::store::entry::Content;
    match entry.entry.content {
        Content::Zero => HEADER_LEN as u64,
        Content::Data { location, .. } => u64::from(location.stored_len),
    }
}

async fn open_draft_map(
    store: &Arc<dyn ObjectStore>,
    keys: GroupKeys,
    key: &backhaul_protocol::store::key::ObjectKey,
    size: u64,
    binding: DraftBinding,
) -> Result<Option<MapReader>, ReadError> {
    let bytes = store.get_range(key, 0..PAGES_START as u64).await?;
    let (head, reference) = map::read_head(&bytes, size).map_err(ReadError::damaged(key))?;
    let bound = head.binding == binding || planted(Mutant::DraftOfAnotherBase);
    if !bound {
        reached(Situation::ForeignDraft);
    }
    if !bound || head.role != Role::Delta || keys.object_id(key) != Some(head.id) {
        return Ok(None);
    }
    Ok(Some(MapReader::with_head(store.clone(), keys, reference, head)))
}

async fn open_draft_segment(
    store: &dyn ObjectStore,
    keys: GroupKeys,
    id: ObjectId,
    size: u64,
    binding: DraftBinding,
) -> Result<Option<(SegmentRef, Vec<VolumeEntry>)>, ReadError> {
    let key = keys.segment(id);
    let head = store.get_range(&key, 0..RECORDS_START as u64).await?;
    let (found, reference) = segment::read_head(&head, size).map_err(ReadError::damaged(&key))?;
    if (found != binding && !planted(Mutant::DraftOfAnotherBase)) || reference.id != id {
        reached(Situation::ForeignDraft);
        return Ok(None);
    }
    let index = read_segment_index(store, keys, &reference).await?;
    Ok(Some((reference, index)))
}
