//! What a point's index says of a volume, before any payload is read.
//!
//! Read first: [`survey`].

use backhaul_protocol::digest::{RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::Name;

use crate::read_error::ReadError;
use crate::salvage::{Lost, OnDamage};
use crate::view::{View, ViewVolume};

/// What the point's index says of a volume.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Range digests of all pages; zero where the page's index can't be read.
    pub ranges: Vec<RangeDigest>,
    /// What they add up to.
    pub digest: VolumeDigest,
    /// Bytes of the blocks that are not zero; an upper bound.
    pub data_bytes: u64,
    /// Pages whose index can't be read; none unless that is tolerated.
    pub lost: Vec<Lost>,
}

/// Reads the index of a whole volume: everything that is known before a payload is read.
pub async fn survey(
    view: &View,
    volume: &ViewVolume,
    name: &Name,
    on_damage: OnDamage,
    progress: impl Fn(u64),
) -> Result<Survey, ReadError> {
    let geometry = volume.geometry;
    let mut ranges = Vec::with_capacity(geometry.pages() as usize);
    let (mut data_bytes, mut lost) = (0, Vec::new());
    for page in (0..geometry.pages()).map(PageIndex) {
        match survey_page(view, volume, page).await {
            Ok((range, blocks)) => {
                ranges.push(range);
                data_bytes += (blocks * u64::from(geometry.block_size())).min(geometry.page_len(page));
            }
            Err(e) if on_damage == OnDamage::Salvage && e.is_damage() => {
                ranges.push(RangeDigest::ZERO);
                lost.push(Lost::page(name, geometry, page, &e));
            }
            Err(e) => return Err(e),
        }
        progress(geometry.page_len(page));
    }
    let digest = VolumeDigester::of(geometry, &ranges);
    Ok(Survey { ranges, digest, data_bytes, lost })
}

/// Range digest and number of data blocks of a page, from the base map's row where nothing is newer.
async fn survey_page(view: &View, volume: &ViewVolume, index: PageIndex) -> Result<(RangeDigest, u64), ReadError> {
    let last = index.0 + 1 == volume.geometry.pages();
    if !last && !view.is_changed(volume.slot, index).await? {
        let row = match &volume.base {
            Some(base) => base.row(volume.slot, index).await?,
            None => None,
        };
        return Ok(row.map_or((RangeDigest::ZERO, 0), |r| (r.range_digest, u64::from(r.entries))));
    }
    let digests = view.page(volume, index).await?.digests();
    Ok((RangeDigest::of(&digests), digests.iter().filter(|d| !d.is_zero()).count() as u64))
}
