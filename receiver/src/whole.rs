//! Whether the objects that a point needs are, byte for byte, what was written: also the bytes that no block of the
//! point lies in, so that damage is known before something else needs them.
//!
//! Read first: [`check_objects`].

use std::collections::BTreeSet;
use std::sync::Arc;

use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::limits::MAX_SEGMENT_SIZE;
use backhaul_protocol::store::entry::Content;
use backhaul_protocol::store::envelope::{self, Kind as ObjectKind};
use backhaul_protocol::store::key::{ObjectId, ObjectKey};
use backhaul_protocol::store::log::PointBody;
use backhaul_protocol::store::map::Reached;
use tokio::task::JoinSet;

use crate::catalog::GroupLog;
use crate::read_error::ReadError;
use crate::store::ObjectStore;
use crate::view::View;

/// Longest map that is read: the root of a map of 64 TiB with the smallest blocks has 512 MiB of rows; its pages are
/// in parts of 16 MiB.
const MAX_MAP: usize = 1 << 30;
/// Segments that are read at once, each held whole: 16 MiB as a rule and at most 64.
const AT_ONCE: usize = 4;

/// Everything that a point reaches.
#[derive(Clone, Debug, Default)]
struct Objects {
    /// Segments, and log records that hold records.
    segments: BTreeSet<ObjectId>,
    maps: BTreeSet<ObjectId>,
}

/// Reads every object that the point reaches whole; gives those that are damaged or gone. Errors are about reaching
/// the store.
pub async fn check_objects(log: &GroupLog, point: &PointBody, view: &View) -> Result<Vec<ReadError>, ReadError> {
    let Objects { segments, maps } = reached(point, view).await?;
    let (inline, segments): (Vec<_>, Vec<_>) = segments.into_iter().partition(|id| id.is_inline());
    let mut damaged = Vec::new();
    let mut note = |result: Result<(), ReadError>| match result {
        Err(e) if e.is_damage() => {
            damaged.push(e);
            Ok(())
        }
        other => other,
    };
    for id in inline {
        let missing = ReadError::Log { seq: id.seq, what: "it is missing" };
        note(log.read(LogSeq(id.seq.0)).await.and_then(|found| found.map(drop).ok_or(missing)))?;
    }
    let check = |key: ObjectKey, kind, max| {
        let store = log.store().clone();
        async move { check_one(&store, key, kind, max).await }
    };
    for id in maps {
        note(check(log.keys().map(id), ObjectKind::Map, MAX_MAP).await)?;
    }
    let mut reads = JoinSet::new();
    for id in segments {
        if reads.len() >= AT_ONCE
            && let Some(joined) = reads.join_next().await
        {
            note(joined.expect("checking does not panic"))?;
        }
        reads.spawn(check(log.keys().segment(id), ObjectKind::Segment, MAX_SEGMENT_SIZE as usize));
    }
    while let Some(joined) = reads.join_next().await {
        note(joined.expect("checking does not panic"))?;
    }
    Ok(damaged)
}

async fn check_one(
    store: &Arc<dyn ObjectStore>,
    key: ObjectKey,
    kind: ObjectKind,
    max: usize,
) -> Result<(), ReadError> {
    let bytes = store.get(&key, max).await?;
    let checked = tokio::task::spawn_blocking(move || envelope::open(kind, &bytes).map(drop));
    checked.await.expect("hashing does not panic").map_err(ReadError::damaged(&key))
}

/// What the point itself names, and what its maps say that they reach. A map whose own list can't be read is damaged
/// itself, and checked as such.
async fn reached(point: &PointBody, view: &View) -> Result<Objects, ReadError> {
    let mut found = Objects::default();
    found.segments.extend(point.segments.iter().map(|s| s.id));
    found.maps.extend(point.deltas.iter().map(|m| m.id));
    found.maps.extend(point.volumes.iter().filter_map(|v| v.base).map(|m| m.id));
    for entry in view.loose.iter().flat_map(|l| &l.0) {
        if let Content::Data { location, .. } = entry.entry.content {
            found.segments.insert(location.object);
        }
    }
    for map in view.volumes.iter().filter_map(|v| v.base.as_ref()).chain(&view.deltas) {
        match map.reach().await {
            Ok(reach) => {
                for (what, _) in reach {
                    match what {
                        Reached::Segment(id) => found.segments.insert(id),
                        Reached::Map(id) => found.maps.insert(id),
                    };
                }
            }
            Err(e) if e.is_damage() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}
