//! Whether the objects that a point needs are there, before anything is written.
//!
//! Read first: [`missing_segments`], then [`blocks_in`].

use std::collections::BTreeSet;
use std::sync::Arc;

use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::entry::Content;
use backhaul_protocol::store::key::{GroupKeys, ObjectId};
use backhaul_protocol::store::map::Reached;
use backhaul_volume::rebuild::block_range;
use tokio::task::JoinSet;

use crate::read_error::ReadError;
use crate::salvage::{Lost, join_neighbours};
use crate::store::{Kind, ObjectStore, list_all};
use crate::view::{View, ViewVolume};

/// Objects that are asked for one by one; more are looked up in lists of 1000. Arbitrary.
const ASK: usize = 256;
/// Questions under way at once.
const AT_ONCE: usize = 32;

/// The segments (and log records) that the view points to and that are not there, and the maps whose reach can't be read:
/// what they need shows when it is fetched.
pub async fn missing_segments(
    store: &Arc<dyn ObjectStore>,
    keys: GroupKeys,
    view: &View,
) -> Result<(BTreeSet<ObjectId>, Vec<ReadError>), ReadError> {
    let mut unreadable = Vec::new();
    let mut needed: BTreeSet<ObjectId> = view
        .loose
        .iter()
        .flat_map(|l| &l.0)
        .filter_map(|e| match e.entry.content {
            Content::Data { location, .. } => Some(location.object),
            Content::Zero => None,
        })
        .collect();
    for map in view.volumes.iter().filter_map(|v| v.base.as_ref()).chain(&view.deltas) {
        match map.reach().await {
            Ok(reach) => needed.extend(reach.into_iter().filter_map(|(what, _)| match what {
                Reached::Segment(id) => Some(id),
                Reached::Map(_) => None,
            })),
            Err(e) if e.is_damage() => unreadable.push(e),
            Err(e) => return Err(e),
        }
    }
    if needed.len() > ASK {
        let listed = list(&**store, keys).await?;
        needed.retain(|id| !listed.contains(id));
    }
    Ok((ask(store, keys, needed).await?, unreadable))
}

async fn list(store: &dyn ObjectStore, keys: GroupKeys) -> Result<BTreeSet<ObjectId>, ReadError> {
    let found = list_all(store, &format!("groups/{}/segments/", keys.0)).await?;
    Ok(found.iter().filter_map(|(key, _)| keys.object_id(key)).collect())
}

/// Those that are not there. Lists of lesser stores may be old: only asking counts.
async fn ask(
    store: &Arc<dyn ObjectStore>,
    keys: GroupKeys,
    ids: BTreeSet<ObjectId>,
) -> Result<BTreeSet<ObjectId>, ReadError> {
    let mut missing = BTreeSet::new();
    let mut asked = JoinSet::new();
    let mut ids = ids.into_iter();
    loop {
        while asked.len() < AT_ONCE {
            let Some(id) = ids.next() else { break };
            let (store, key) = (store.clone(), keys.segment(id));
            asked.spawn(async move { (id, store.get_range(&key, 0..1).await) });
        }
        match asked.join_next().await.map(|joined| joined.expect("asking does not panic")) {
            None => return Ok(missing),
            Some((id, Err(e))) if matches!(e.kind(), Kind::NotFound | Kind::Corrupt | Kind::Unreadable) => {
                missing.insert(id);
            }
            Some((_, result)) => {
                result?;
            }
        }
    }
}

/// The blocks of a volume whose newest record is in one of these objects. Reads the whole index of the volume.
pub async fn blocks_in(
    view: &View,
    volume: &ViewVolume,
    name: &Name,
    keys: GroupKeys,
    missing: &BTreeSet<ObjectId>,
) -> Result<Vec<Lost>, ReadError> {
    let mut lost = Vec::new();
    for index in (0..volume.geometry.pages()).map(PageIndex) {
        for (block, held) in view.page(volume, index).await?.blocks() {
            if let Some((_, Content::Data { location, .. })) = held
                && missing.contains(&location.object)
            {
                let key = keys.segment(location.object).to_string();
                lost.push(Lost::new(name, block_range(volume.geometry, block), key, "it is missing".into()));
            }
        }
        join_neighbours(&mut lost);
    }
    Ok(lost)
}
