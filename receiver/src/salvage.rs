//! What is lost when something in the store is damaged: where, why, and how to say it.
//!
//! Read first: [`Lost`], then [`open_view`].

use std::ops::Range;
use std::sync::Arc;

use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::{CommitId, Name};
use backhaul_protocol::record::split_record;
use backhaul_protocol::store::key::GroupKeys;
use backhaul_protocol::store::log::{PointBody, PointVolume};
use backhaul_protocol::store::segment::{DraftBinding, RECORDS_START, SegmentBuilder, SegmentRef, VolumeEntry};
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

/// Bytes of a volume that can't be had, or of which that can't be ruled out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Lost {
    /// What the user calls the volume.
    pub volume: String,
    /// First byte.
    pub start: u64,
    /// Byte after the last.
    pub end: u64,
    /// Key of the object that is damaged or gone.
    pub object: String,
    /// What is wrong.
    pub cause: String,
}

impl Lost {
    /// Bytes of a volume.
    pub fn new(volume: &Name, range: Range<u64>, object: String, cause: String) -> Self {
        Self { volume: volume.to_string(), start: range.start, end: range.end, object, cause }
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
        ReadError::NotFound(_) => String::new(),
    }
}

/// Sorts, and joins ranges that touch and have the same cause.
pub fn join_neighbours(lost: &mut Vec<Lost>) {
    lost.sort_by(|a, b| (&a.volume, a.start).cmp(&(&b.volume, b.start)));
    let mut out: Vec<Lost> = Vec::with_capacity(lost.len());
    for next in lost.drain(..) {
        match out.last_mut() {
            Some(last)
                if last.end >= next.start
                    && (&last.volume, &last.object, &last.cause) == (&next.volume, &next.object, &next.cause) =>
            {
                last.end = last.end.max(next.end);
            }
            _ => out.push(next),
        }
    }
    *lost = out;
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

/// Opens a point. With [`OnDamage::Salvage`] what can't be read of its index is left out and listed: whatever it named
/// is not known, so that all volumes that it may have named count as lost from end to end where nothing newer is known.
pub async fn open_view(log: &GroupLog, point: &PointBody, on_damage: OnDamage) -> Result<(View, Vec<Lost>), ReadError> {
    let (store, keys) = (log.store(), log.keys());
    match View::open(store, keys, point).await {
        Err(e) if on_damage == OnDamage::Salvage && e.is_damage() => {}
        other => return other.map(|view| (view, Vec::new())),
    }
    let mut lost = Vec::new();
    let mut note = |volumes: &[&PointVolume], e: &ReadError, what: &str| {
        lost.extend(volumes.iter().map(|v| {
            let cause = format!("{e}; {what}");
            Lost::new(&v.name, 0..v.geometry.length(), object_of(e), cause)
        }));
    };
    let mut view = View::default();
    for v in &point.volumes {
        let base = match v.base {
            None => None,
            Some(reference) => match MapReader::open(store.clone(), keys, reference).await {
                Ok(map) => Some(Arc::new(map)),
                Err(e) if e.is_damage() => {
                    note(&[v], &e, "blocks that changed since this map was written were restored, the others not");
                    None
                }
                Err(e) => return Err(e),
            },
        };
        view.volumes.push(ViewVolume { slot: v.slot, geometry: v.geometry, base });
    }
    let all: Vec<&PointVolume> = point.volumes.iter().collect();
    for reference in &point.deltas {
        match MapReader::open(store.clone(), keys, *reference).await {
            Ok(map) => view.deltas.push(Arc::new(map)),
            Err(e) if e.is_damage() => note(&all, &e, UNKNOWN),
            Err(e) => return Err(e),
        }
    }
    let mut entries = Vec::new();
    for reference in &point.segments {
        match read_segment_index(&**store, keys, reference).await {
            Ok(index) => entries.extend(index),
            Err(e) if e.is_damage() => match rebuild_index(&**store, keys, reference).await? {
                Some(index) => entries.extend(index),
                None => note(&all, &e, UNKNOWN),
            },
            Err(e) => return Err(e),
        }
    }
    view.loose.push(Arc::new(Loose::new(entries)));
    Ok((view, lost))
}

const UNKNOWN: &str = "which blocks it held is not known: some blocks may show an older state or zeroes";

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
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt) => return Ok(None),
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
