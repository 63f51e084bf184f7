//! What is lost when something in the store is damaged: where, why, and how to say it.
//!
//! Read first: [`Lost`], then [`open_view`] and [`behind_holes`].

use std::ops::Range;
use std::sync::Arc;

use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::{CaptureNumber, CommitId, LogSeq, Name, VolumeSlot};
use backhaul_protocol::record::split_record;
use backhaul_protocol::store::key::{GroupKeys, ObjectId};
use backhaul_protocol::store::log::PointBody;
use backhaul_protocol::store::segment::{DraftBinding, RECORDS_START, SegmentBuilder, SegmentRef, VolumeEntry};
use backhaul_volume::rebuild::block_range;
use serde::Serialize;

use crate::catalog::GroupLog;
use crate::read_error::ReadError;
use crate::store::{Kind, ObjectStore};
use crate::view::{Loose, MapReader, View, ViewVolume, read_segment_index};

/// Ranges that a text lists; the rest are counted.
const MAX_LISTED: usize = 8;

/// What to do when something is damaged or gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnDamage {
    /// Stop: the target stays incomplete.
    Fail,
    /// Restore everything else and list what is lost.
    Salvage,
}

/// What a salvaging restore does about bytes that are lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Nothing of them can be had: of a new target they are zero, of another they are left as they were.
    Gone,
    /// The newest content that can be had is restored, and a newer one may have been in what is damaged.
    Uncertain,
}

/// Bytes of a volume that can't be had, or of which that can't be ruled out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Lost {
    /// What the user calls the volume.
    pub volume: String,
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// What is restored of them.
    pub loss: Loss,
    /// Key of the object that is damaged or gone.
    pub object: String,
    /// What is wrong.
    pub cause: String,
}

impl Lost {
    /// Bytes of a volume that are gone.
    pub fn new(volume: &Name, range: Range<u64>, object: String, cause: String) -> Self {
        Self { volume: volume.to_string(), start: range.start, end: range.end, loss: Loss::Gone, object, cause }
    }

    /// The same, of which an older content may be had.
    pub fn uncertain(self) -> Self {
        Self { loss: Loss::Uncertain, ..self }
    }

    /// An object that is about no volume, or by which no byte of one is lost.
    pub fn object(object: String, cause: String) -> Self {
        Self { volume: String::new(), start: 0, end: 0, loss: Loss::Gone, object, cause }
    }

    /// An object that is damaged, without loss to what was looked at.
    pub fn nothing(object: String, error: &ReadError) -> Self {
        Self::object(object, format!("{error}; no block that was looked at is lost by it"))
    }

    /// A whole page, whose part of a map can't be read.
    pub fn page(volume: &Name, geometry: Geometry, page: PageIndex, error: &ReadError) -> Self {
        Self::new(volume, page_range(geometry, page), object_of(error), error.to_string())
    }
}

/// The bytes of a page.
pub fn page_range(geometry: Geometry, page: PageIndex) -> Range<u64> {
    let start = geometry.offset(page.first_block()).0;
    start..start + geometry.page_len(page)
}

/// The object that an error is about.
pub fn object_of(error: &ReadError) -> String {
    match error {
        ReadError::Damaged { key, .. } | ReadError::Record { key, .. } => key.to_string(),
        ReadError::Store(e) => e.object().to_owned(),
        ReadError::Log { seq, .. } => format!("log record {seq}"),
        ReadError::Point { cause, .. } => object_of(cause),
        ReadError::NotFound(_) => String::new(),
    }
}

/// Sorts, and joins ranges that touch and have the same cause.
pub fn join_neighbours(lost: &mut Vec<Lost>) {
    lost.sort_by(|a, b| (&a.volume, a.start).cmp(&(&b.volume, b.start)));
    let mut out = Vec::with_capacity(lost.len());
    lost.drain(..).for_each(|next| push_joined(&mut out, next));
    *lost = out;
}

/// Appends, or joins with the last one.
fn push_joined(lost: &mut Vec<Lost>, next: Lost) {
    let same =
        |a: &Lost, b: &Lost| (&a.volume, a.loss, &a.object, &a.cause) == (&b.volume, b.loss, &b.object, &b.cause);
    match lost.last_mut() {
        Some(last) if last.end >= next.start && same(last, &next) => last.end = last.end.max(next.end),
        _ => lost.push(next),
    }
}

/// For people, in one line.
pub fn describe(lost: &[Lost]) -> String {
    let one = |l: &Lost| format!("volume {}, bytes {} to {}: {} ({})", l.volume, l.start, l.end, l.object, l.cause);
    list(lost.iter().map(one), lost.len())
}

/// For people, in one line.
pub fn describe_ranges(ranges: &[Range<u64>]) -> String {
    list(ranges.iter().map(|r| format!("bytes {} to {}", r.start, r.end)), ranges.len())
}

fn list(texts: impl Iterator<Item = String>, count: usize) -> String {
    let mut out = texts.take(MAX_LISTED).collect::<Vec<_>>().join("; ");
    if count > MAX_LISTED {
        out.push_str(&format!("; and {} more", count - MAX_LISTED));
    }
    out
}

/// A part of a point's index that can't be read: what it named is not known.
#[derive(Clone, Debug)]
pub struct Hole {
    /// Which map or segment.
    pub id: ObjectId,
    /// Of which volume it is; `None`: maybe of all.
    slot: Option<VolumeSlot>,
    /// It holds no record of a higher capture.
    up_to: CaptureNumber,
    /// What is wrong.
    error: ReadError,
}

impl Hole {
    /// Whether it may hold blocks of this volume.
    pub fn is_about(&self, volume: VolumeSlot) -> bool {
        self.slot.is_none_or(|slot| slot == volume)
    }

    /// What is wrong.
    pub fn error(&self) -> &ReadError {
        &self.error
    }
}

/// Holes that may be about these volumes, and by which nothing is lost all the same.
pub fn harmless(holes: &[Hole], volumes: &[VolumeSlot], lost: &[Lost]) -> Vec<Lost> {
    let about = holes.iter().filter(|h| volumes.iter().any(|v| h.is_about(*v)));
    let all = about.map(|h| Lost::nothing(object_of(&h.error), &h.error));
    all.filter(|h| !lost.iter().any(|l| l.object == h.object)).collect()
}

/// What becomes of a segment whose index is damaged and whose records are whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadIndex {
    /// It is made anew: enough for reading.
    Rebuild,
    /// It is a hole: nobody builds on it.
    LeaveOut,
}

/// A point whose index may be damaged.
#[derive(Clone, Debug, Default)]
pub struct OpenedView {
    /// What can be read of it.
    pub view: View,
    /// What can't.
    pub holes: Vec<Hole>,
    /// Damage that costs no block: an index that was made anew from its records. Of no volume and no bytes.
    pub mended: Vec<Lost>,
}

/// Opens a point. What can't be read of its index is left out of the view.
pub async fn open_view(log: &GroupLog, point: &PointBody, bad_index: BadIndex) -> Result<OpenedView, ReadError> {
    let (store, keys) = (log.store(), log.keys());
    match View::open(store, keys, point).await {
        Err(e) if e.is_damage() => {}
        other => return other.map(|view| OpenedView { view, ..OpenedView::default() }),
    }
    let OpenedView { mut view, mut holes, mut mended } = OpenedView::default();
    for v in &point.volumes {
        let base = match v.base {
            None => None,
            Some(map) => match MapReader::open(store.clone(), keys, map).await {
                Ok(map) => Some(Arc::new(map)),
                Err(error) if error.is_damage() => {
                    holes.push(hole(log, point, map.id, Some(v.slot), error).await?);
                    None
                }
                Err(e) => return Err(e),
            },
        };
        view.volumes.push(ViewVolume { slot: v.slot, geometry: v.geometry, base });
    }
    for map in &point.deltas {
        match MapReader::open(store.clone(), keys, *map).await {
            Ok(map) => view.deltas.push(Arc::new(map)),
            Err(error) if error.is_damage() => holes.push(hole(log, point, map.id, None, error).await?),
            Err(e) => return Err(e),
        }
    }
    let mut entries = Vec::new();
    for segment in &point.segments {
        match read_segment_index(&**store, keys, segment).await {
            Ok(index) => entries.extend(index),
            Err(error) if error.is_damage() && bad_index == BadIndex::LeaveOut => {
                holes.push(hole(log, point, segment.id, None, error).await?);
            }
            Err(error) if error.is_damage() => match rebuild_index(&**store, keys, segment).await? {
                Some(index) => {
                    entries.extend(index);
                    let cause = format!("{error}; its index can be made anew from its records, and no block is lost");
                    mended.push(Lost::object(object_of(&error), cause));
                }
                None => holes.push(hole(log, point, segment.id, None, error).await?),
            },
            Err(e) => return Err(e),
        }
    }
    view.loose.push(Arc::new(Loose::new(entries)));
    Ok(OpenedView { view, holes, mended })
}

/// Points after the base of a hole's draft that are looked at for the one that brought it: usually it is the first.
/// Others than points may lie between, and records that can't be read. Arbitrary.
const LOOK_FOR_ORIGIN: u64 = 16;

/// The first point that names what is damaged tells the highest capture in it: captures count up from point to point.
async fn hole(
    log: &GroupLog,
    point: &PointBody,
    id: ObjectId,
    slot: Option<VolumeSlot>,
    error: ReadError,
) -> Result<Hole, ReadError> {
    let mut up_to = point.max_capture;
    let first = if id.is_inline() { id.seq } else { id.seq.next() };
    for seq in (first.0..first.0.saturating_add(LOOK_FOR_ORIGIN)).map(LogSeq) {
        match log.read(seq).await {
            Ok(Some((record, _))) => match record.point() {
                Some(found) if names(found, id) => {
                    up_to = up_to.min(found.max_capture);
                    break;
                }
                _ => {}
            },
            Ok(None) => {}
            Err(e) if e.is_damage() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Hole { id, slot, up_to, error })
}

fn names(point: &PointBody, id: ObjectId) -> bool {
    let maps = point.volumes.iter().filter_map(|v| v.base.as_ref()).chain(&point.deltas);
    maps.map(|m| m.id).chain(point.segments.iter().map(|s| s.id)).any(|named| named == id)
}

/// The blocks of a volume that a hole may have named: those of which nothing newer is known. Reads the whole index of
/// the volume. Some of them may be whole in truth, above all blocks that are zero.
pub async fn behind_holes(
    view: &View,
    volume: &ViewVolume,
    name: &Name,
    holes: &[Hole],
) -> Result<Vec<Lost>, ReadError> {
    let about: Vec<&Hole> = holes.iter().filter(|h| h.is_about(volume.slot)).collect();
    let mut lost = vec![Vec::new(); about.len()];
    if about.is_empty() {
        return Ok(Vec::new());
    }
    for index in (0..volume.geometry.pages()).map(PageIndex) {
        let page = match view.page(volume, index).await {
            Ok(page) => page,
            // Lost for a reason of its own, which is told when the page is restored.
            Err(e) if e.is_damage() => continue,
            Err(e) => return Err(e),
        };
        for (block, held) in page.blocks() {
            for (hole, lost) in about.iter().zip(&mut lost) {
                let of = |what: &str| {
                    let range = block_range(volume.geometry, block);
                    let cause = format!("{}; which blocks it held is not known, and of this one {what}", hole.error);
                    Lost::new(name, range, object_of(&hole.error), cause)
                };
                match held {
                    Some((capture, _)) if capture > hole.up_to => {}
                    Some(_) => push_joined(lost, of("nothing newer is").uncertain()),
                    // What a base map does not name was zero when it was written.
                    None if volume.base.is_some() => push_joined(lost, of("nothing newer is").uncertain()),
                    None => push_joined(lost, of("nothing else is")),
                }
            }
        }
    }
    Ok(lost.concat())
}

/// The index of a segment from its records, which tell it all: `None` unless it is the very one that the point names.
async fn rebuild_index(
    store: &dyn ObjectStore,
    keys: GroupKeys,
    reference: &SegmentRef,
) -> Result<Option<Vec<VolumeEntry>>, ReadError> {
    if reference.id.is_inline() {
        return Ok(None);
    }
    let range = RECORDS_START as u64..u64::from(reference.index_offset);
    let bytes = match store.get_range(&keys.segment(reference.id), range).await {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt | Kind::Unreadable) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let mut builder = SegmentBuilder::with_capacity(bytes.len());
    let mut rest = &bytes[..];
    while let Ok(Some(split)) = split_record(rest) {
        builder.push(&split.header, split.payload);
        rest = split.rest;
    }
    let binding = DraftBinding { group: keys.0, base_commit: CommitId([0; 16]) };
    let sealed = builder.seal(binding, reference.id);
    let same = rest.is_empty() && sealed.reference.index_digest == reference.index_digest;
    Ok(same.then_some(sealed.index))
}

#[cfg(test)]
#[path = "salvage_tests.rs"]
mod tests;
