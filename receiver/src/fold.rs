//! Folding: many loose segments into a delta map, many delta maps into one, all of it into base maps, as in an LSM
//! tree. By streaming: page by page, whatever the size of the volume.
//!
//! Read first: [`fold_point`], which keeps a point within `limits`, and [`delta_of`].
//!
//! Nothing here changes what a point says: maps are new objects, and the old ones stay for the points that use them.

use std::sync::Arc;

use backhaul_protocol::digest::{RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::store::entry::ZeroEntries;
use backhaul_protocol::store::key::GroupKeys;
use backhaul_protocol::store::map::{MapBuilder, MapObject, MapRef, Role};
use backhaul_protocol::store::segment::{DraftBinding, SegmentRef};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use bytes::Bytes;

use crate::layers::{layer_page, touched_pages};
use crate::limits::Limits;
use crate::object_ids::IdSource;
use crate::read_error::ReadError;
use crate::store::ObjectStore;
use crate::view::{Loose, MapReader, View, ViewVolume};

/// Where maps are written, and for which volumes: entries of others are left behind.
#[derive(Clone, Debug)]
pub struct FoldTarget {
    /// Where.
    pub store: Arc<dyn ObjectStore>,
    /// Under which keys.
    pub keys: GroupKeys,
    /// What the maps say they were made for.
    pub binding: DraftBinding,
    /// Slots and geometries of the volumes that are still there.
    pub volumes: Vec<(VolumeSlot, Geometry)>,
    /// When to fold.
    pub limits: Limits,
}

impl FoldTarget {
    async fn put(&self, object: MapObject) -> Result<u64, ReadError> {
        let len = object.bytes.len() as u64;
        self.store.put_new(&self.keys.map(object.id), Bytes::from(object.bytes)).await?;
        Ok(len)
    }

    async fn finish(&self, builder: MapBuilder, ids: &mut IdSource) -> Result<MapReader, ReadError> {
        let (object, reference, next) = builder.finish();
        ids.used_up_to(next);
        self.put(object).await?;
        MapReader::open(self.store.clone(), self.keys, reference).await
    }
}

/// One delta map with the winners of these layers; `None` if there are no entries of volumes that are still there.
pub async fn delta_of(
    target: &FoldTarget,
    deltas: &[Arc<MapReader>],
    loose: &[Arc<Loose>],
    ids: &mut IdSource,
) -> Result<Option<Arc<MapReader>>, ReadError> {
    let mut builder = MapBuilder::new(target.binding, Role::Delta, ids.peek());
    let mut any = false;
    for (slot, index) in touched_pages(deltas, loose).await? {
        let Some((_, geometry)) = target.volumes.iter().find(|(s, _)| *s == slot) else { continue };
        let page = layer_page(deltas, loose, slot, index, geometry.page_blocks(index)).await?;
        let zeroes = if planted(Mutant::FoldForgetsZeroes) { ZeroEntries::Drop } else { ZeroEntries::Keep };
        let entries = page.entries(zeroes);
        any |= !entries.is_empty();
        if let Some(part) = builder.push_page(slot, index, &entries, RangeDigest::ZERO) {
            target.put(part).await?;
        }
    }
    if !any {
        return Ok(None);
    }
    Ok(Some(Arc::new(target.finish(builder, ids).await?)))
}

/// A volume's base map with everything in it, its digest, and the ranges.
struct NewBase {
    map: Option<Arc<MapReader>>,
    digest: VolumeDigest,
}

/// A new base map of one volume: changed pages are written anew, the others are pointed to where they are.
async fn base_of(
    target: &FoldTarget,
    view: &View,
    volume: &ViewVolume,
    ids: &mut IdSource,
) -> Result<NewBase, ReadError> {
    let mut builder = MapBuilder::new(target.binding, Role::Base(volume.slot), ids.peek());
    // Where it can't be told what the old map reaches nothing of it is pointed to: every page is written anew.
    let mut is_reused = true;
    if let Some(old) = &volume.base {
        match old.checked_reach().await {
            Ok(reach) => builder.replace(old.reference.id, reach),
            Err(error) if error.is_damage() && !error.is_unreadable() => {
                tracing::warn!(%error, "the index of a volume is written anew");
                is_reused = false;
            }
            Err(error) => return Err(error),
        }
    }
    let mut digester = VolumeDigester::new(volume.geometry);
    let pages = volume.geometry.pages();
    let mut any = false;
    for index in (0..pages).map(PageIndex) {
        let old = match &volume.base {
            Some(base) => base.row(volume.slot, index).await?.map(|row| (base, row)),
            None => None,
        };
        let last = index.0 + 1 == pages;
        let forgotten = planted(Mutant::FoldForgetsPage) && index.0 == 0 && volume.base.is_some();
        let is_kept = is_reused || old.is_none();
        if !last && is_kept && (!view.is_changed(volume.slot, index).await? || forgotten) {
            digester.push(old.map_or(RangeDigest::ZERO, |(_, row)| row.range_digest));
            if let Some((_, row)) = old {
                builder.push_old_page(row);
                any = true;
            }
            continue;
        }
        if let Some((base, row)) = old.filter(|_| is_reused) {
            builder.release(&row, &base.entries(&row).await?);
        }
        let page = view.page(volume, index).await?;
        let range = page.range_digest();
        digester.push(range);
        let entries = page.entries(ZeroEntries::Drop);
        any |= !entries.is_empty();
        if let Some(part) = builder.push_page(volume.slot, index, &entries, range) {
            target.put(part).await?;
        }
    }
    let map = if any { Some(Arc::new(target.finish(builder, ids).await?)) } else { None };
    Ok(NewBase { map, digest: digester.finish() })
}

/// The layers of a point that is about to be committed.
#[derive(Clone, Debug)]
pub struct Layers {
    /// Everything, as it is restored.
    pub view: View,
    /// The loose segments.
    pub segments: Vec<SegmentRef>,
}

/// Folds until the point is within `limits`: gives, for each volume whose base was written anew, its recomputed
/// digest. `inline` is what the caller is going to add itself, as one more loose segment.
pub async fn fold_point(
    target: &FoldTarget,
    layers: &mut Layers,
    inline: Option<&Loose>,
    ids: &mut IdSource,
) -> Result<Vec<(VolumeSlot, VolumeDigest)>, ReadError> {
    let entries: usize = layers.view.loose.iter().map(|l| &**l).chain(inline).map(|l| l.0.len()).sum();
    let limits = target.limits;
    let fits = layers.segments.len() + usize::from(inline.is_some()) <= limits.segments && entries <= limits.entries;
    if fits && layers.view.deltas.len() <= limits.deltas {
        return Ok(Vec::new());
    }
    if !fits {
        reached(Situation::PointFolded);
        let delta = delta_of(target, &[], &layers.view.loose, ids).await?;
        layers.view.deltas.extend(delta);
        layers.view.loose.clear();
        layers.segments.clear();
    }
    let in_deltas: u64 = layers.view.deltas.iter().map(|d| d.reference.entries).sum();
    let in_bases: u64 = layers.view.volumes.iter().filter_map(|v| v.base.as_ref()).map(|b| b.reference.entries).sum();
    if in_deltas * 8 <= in_bases {
        if layers.view.deltas.len() > limits.deltas {
            let merged = delta_of(target, &layers.view.deltas, &[], ids).await?;
            layers.view.deltas = merged.into_iter().collect();
        }
        return Ok(Vec::new());
    }
    let mut digests = Vec::new();
    let mut volumes = layers.view.volumes.clone();
    for volume in &mut volumes {
        reached(Situation::BaseWritten);
        let base = base_of(target, &layers.view, volume, ids).await?;
        volume.base = base.map;
        digests.push((volume.slot, base.digest));
    }
    layers.view.volumes = volumes;
    layers.view.deltas.clear();
    layers.view.loose.clear();
    layers.segments.clear();
    Ok(digests)
}

/// How a point names the base map of a volume.
pub fn base_reference(view: &View, slot: VolumeSlot) -> Option<MapRef> {
    view.volume(slot).and_then(|v| v.base.as_ref()).map(|b| b.reference)
}
