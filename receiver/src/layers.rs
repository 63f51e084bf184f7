//! Delta maps and loose entries without what lies below them: which pages they name, and what they say of one.
//!
//! Read first: [`layer_page`].

use std::collections::BTreeSet;
use std::sync::Arc;

use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::store::entry::{Entry, Page};
use backhaul_protocol::store::map::Row;

use backhaul_seams::mutant::{Mutant, planted};

use crate::read_error::ReadError;
use crate::view::{Loose, MapReader};

/// All pages that any of these layers names, ascending.
pub async fn touched_pages(
    deltas: &[Arc<MapReader>],
    loose: &[Arc<Loose>],
) -> Result<BTreeSet<(VolumeSlot, PageIndex)>, ReadError> {
    let mut pages: BTreeSet<_> = loose.iter().flat_map(|l| l.pages()).collect();
    for delta in deltas {
        let mut first = 0;
        loop {
            let rows = delta.rows(first).await?;
            if rows.is_empty() {
                break;
            }
            first += rows.len() as u64;
            pages.extend(rows.iter().map(Row::sort_key));
        }
    }
    Ok(pages)
}

/// Lets an entry win where its capture is the highest so far.
pub(crate) fn apply(page: &mut Page, entry: &Entry) {
    if planted(Mutant::CaptureNumbersIgnored) {
        return page.apply(&Entry { capture: CaptureNumber(0), ..*entry });
    }
    page.apply(entry);
}

/// One page of a layer, with nothing below it.
pub async fn layer_page(
    deltas: &[Arc<MapReader>],
    loose: &[Arc<Loose>],
    slot: VolumeSlot,
    index: PageIndex,
    blocks: usize,
) -> Result<Page, ReadError> {
    let mut page = Page::new(index, blocks);
    for delta in deltas {
        if let Some(row) = delta.row(slot, index).await? {
            delta.entries(&row).await?.iter().for_each(|e| apply(&mut page, e));
        }
    }
    for loose in loose {
        loose.page(slot, index).iter().for_each(|e| apply(&mut page, &e.entry));
    }
    Ok(page)
}
