//! What is checked before a draft becomes a point: the digest of what changed, and the volumes' digests where their
//! pages are at hand.
//!
//! Read first: [`Round::examine`].

use std::collections::BTreeMap;
use std::sync::Arc;

use backhaul_protocol::consistency::Checked;
use backhaul_protocol::digest::{DeltaDigester, RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::session::sink::{Approved, Known, Sealed, Taken};
use backhaul_protocol::wire::message::{Reason, Refusal};

use super::Round;
use super::group_state::KnownHead;
use crate::layers::{layer_page, touched_pages};
use crate::read_error::ReadError;
use crate::view::{Loose, View};

/// A `VolumeDigest` is recomputed at a commit when at most so many pages must be read for it: 4 GiB of a volume's index
/// would be 300 MB, this is 72 MB. More is left to folding and to `verify`. Arbitrary.
const PAGES_AT_HAND: usize = 1024;
/// Range digests that are kept for a group, of all volumes: 32 MiB. Larger groups are checked by folding and `verify`.
const MAX_RANGES: u64 = 1 << 20;

impl Round {
    /// Recomputes the digest of what changed, and the volumes' digests where their pages are at hand.
    pub(super) async fn examine(
        &self,
        known: &mut KnownHead,
        view: &View,
        inline: &Arc<Loose>,
    ) -> Result<(Sealed, BTreeMap<VolumeSlot, Vec<RangeDigest>>, VolumeSlot), ReadError> {
        let draft = [known.draft.loose.clone(), inline.clone()];
        let touched = touched_pages(&known.draft.deltas, &draft).await?;
        let mut delta = DeltaDigester::default();
        for (slot, index) in &touched {
            let Some(volume) = view.volume(*slot) else { continue };
            let blocks = volume.geometry.page_blocks(*index);
            let page = layer_page(&known.draft.deltas, &draft, *slot, *index, blocks).await?;
            for (block, held) in page.blocks() {
                if let Some((_, content)) = held {
                    delta.push(*slot, block, content.digest());
                }
            }
        }
        let inline_max = inline.0.iter().map(|e| e.entry.capture).max().unwrap_or_default();
        let in_memory = view.deltas.is_empty() && view.volumes.iter().all(|v| v.base.is_none());
        let all_pages: u64 = view.volumes.iter().map(|v| v.geometry.pages()).sum();
        let mut ranges = BTreeMap::new();
        let mut volumes = Vec::new();
        for taken in &self.taken.volumes {
            let volume = view.volume(taken.slot).expect("every taken volume is in the view");
            let pages: Vec<PageIndex> = touched.iter().filter(|(s, _)| *s == taken.slot).map(|(_, p)| *p).collect();
            let few = in_memory || known.is_mending || pages.len() <= PAGES_AT_HAND;
            let at_hand = all_pages <= MAX_RANGES && few;
            let before = if at_hand { self.ranges_before(known, taken.slot, taken.known).await? } else { None };
            let Some(mut own) = before else {
                volumes.push(None);
                continue;
            };
            let page_count = volume.geometry.pages();
            let unchanged = if taken.head_digest.is_some() { page_count } else { (own.len() as u64).min(page_count) };
            own.resize(page_count as usize, RangeDigest::ZERO);
            // Of another length than before: what lay beyond the end once may show again.
            if taken.known == Known::Yes {
                for index in unchanged.saturating_sub(1)..page_count {
                    own[index as usize] = view.range_digest(volume, PageIndex(index)).await?;
                }
            }
            // The last page too: its length may have changed with the volume's.
            for index in pages.into_iter().filter(|p| p.0 < page_count).chain([PageIndex(page_count - 1)]) {
                own[index.0 as usize] = view.page(volume, index).await?.range_digest();
            }
            volumes.push(Some(VolumeDigester::of(volume.geometry, &own)));
            ranges.insert(taken.slot, own);
        }
        let sealed = Sealed {
            delta_digest: delta.finish(),
            delta_blocks: delta.count(),
            max_capture: known.draft.max_capture.max(inline_max),
            volumes,
        };
        // Slots are never used again, also those of volumes that a draft held and that are not in the point.
        let highest = touched.last().map(|(slot, _)| slot.next()).unwrap_or_default();
        Ok((sealed, ranges, highest.max(self.taken.next_slot)))
    }

    /// Range digests of a volume in the newest point, from memory or computed if that is cheap.
    async fn ranges_before(
        &self,
        known: &mut KnownHead,
        slot: VolumeSlot,
        is_known: Known,
    ) -> Result<Option<Vec<RangeDigest>>, ReadError> {
        if is_known == Known::No {
            return Ok(Some(Vec::new()));
        }
        if let Some(ranges) = known.ranges.get(&slot) {
            return Ok(Some(ranges.clone()));
        }
        let view = &known.layers.view;
        let Some(volume) = view.volume(slot) else { return Ok(Some(Vec::new())) };
        let in_memory = view.deltas.is_empty() && volume.base.is_none();
        let changed = touched_pages(&view.deltas, &view.loose).await?.len();
        if !in_memory && !known.is_mending && changed > PAGES_AT_HAND {
            return Ok(None);
        }
        let (ranges, _) = view.volume_digest(volume).await?;
        known.ranges.insert(slot, ranges.clone());
        Ok(Some(ranges))
    }
}

/// What folding recomputed must be what the agent states too.
pub(super) fn check_folded(
    taken: &Taken,
    approved: &Approved,
    folded: &[(VolumeSlot, VolumeDigest)],
    complete: bool,
) -> Result<Vec<Checked>, Refusal> {
    let mut checked = approved.checked.clone();
    for ((volume, stated), checked) in taken.volumes.iter().zip(&approved.commit.volumes).zip(&mut checked) {
        let Some((_, digest)) = folded.iter().find(|(slot, _)| *slot == volume.slot).filter(|_| complete) else {
            continue;
        };
        if *digest != stated.digest {
            let text = format!(
                "volume {}: folding gives digest {digest}, the agent states {}",
                volume.offer.name, stated.digest
            );
            return Err(Refusal { reason: Reason::Digest, text });
        }
        *checked = Checked::Digest;
    }
    Ok(checked)
}
