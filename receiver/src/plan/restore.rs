//! What a restore does to a window of pages: from what they must hold and what the target has.
//!
//! Read first: [`plan_window`]. Pure.

use std::ops::{AddAssign, Range};

use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::limits::BLOCKS_PER_PAGE;
use backhaul_protocol::store::entry::{Content, Page};
use backhaul_volume::rebuild::{Difference, Found};

use super::reads::{MAX_READ, Read, Wanted, plan_reads};

/// Gaps up to this many bytes are read over. Less than when an agent is served: many reads are under way here, so that
/// a request costs its share of the bandwidth and not its delay. Arbitrary within that.
pub const RESTORE_GAP: u64 = 128 << 10;

/// Bytes of volume that are planned together: more joins more reads, less starts sooner and needs less memory.
const WINDOW: u64 = 256 << 20;

/// Pages of one window: at least one, which of the largest blocks is 1 GiB.
pub fn window_pages(geometry: Geometry) -> u64 {
    (WINDOW / (BLOCKS_PER_PAGE * u64::from(geometry.block_size()))).max(1)
}

/// What is done to a window of pages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct WindowPlan {
    /// Ranges to read from the store.
    pub reads: Vec<Read>,
    /// Bytes of the target that must become zeroes, ascending.
    pub zero: Vec<Range<u64>>,
    /// What it comes to.
    pub sums: Sums,
}

/// What a plan comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sums {
    /// Bytes of volume that were looked at.
    pub looked_at: u64,
    /// Bytes that are as they must be.
    pub equal: u64,
    /// Bytes that become zeroes.
    pub zeroed: u64,
    /// Bytes that are written from the store.
    pub written: u64,
    /// Bytes that are read from the store for that.
    pub fetched: u64,
    /// In so many reads.
    pub reads: u64,
}

impl AddAssign for Sums {
    fn add_assign(&mut self, o: Self) {
        self.looked_at += o.looked_at;
        self.equal += o.equal;
        self.zeroed += o.zeroed;
        self.written += o.written;
        self.fetched += o.fetched;
        self.reads += o.reads;
    }
}

/// Plans a window: each page with what it must hold and what the target has of it, ascending.
pub fn plan_window(geometry: Geometry, slot: VolumeSlot, pages: &[(PageIndex, Page, Found)]) -> WindowPlan {
    let mut plan = WindowPlan::default();
    let mut wanted = Vec::new();
    for (index, page, found) in pages {
        let difference = Difference::of(geometry, *index, &page.digests(), found);
        for range in difference.zero {
            match plan.zero.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => plan.zero.push(range),
            }
        }
        for (block, _) in page.blocks().filter(|(b, _)| difference.fetch.contains(b.in_page())) {
            if let Content::Data { digest, location } = page.content(block) {
                wanted.push(Wanted { volume: slot, block, digest, location });
                plan.sums.written += geometry.block_len(block) as u64;
            }
        }
        plan.sums.looked_at += geometry.page_len(*index);
    }
    plan.reads = plan_reads(wanted, RESTORE_GAP, MAX_READ);
    plan.sums.zeroed = plan.zero.iter().map(|r| r.end - r.start).sum();
    plan.sums.equal = plan.sums.looked_at - plan.sums.zeroed - plan.sums.written;
    plan.sums.fetched = plan.reads.iter().map(|r| r.range.end - r.range.start).sum();
    plan.sums.reads = plan.reads.len() as u64;
    plan
}

#[cfg(test)]
mod tests {
    use backhaul_protocol::digest::BlockDigest;
    use backhaul_protocol::geometry::BlockIndex;
    use backhaul_protocol::ids::{CaptureNumber, LogSeq};
    use backhaul_protocol::store::entry::{Entry, Location};
    use backhaul_protocol::store::key::ObjectId;
    use proptest::prelude::*;

    use super::*;

    /// What a block is to hold or holds: 0 zero, else a digest of that byte.
    fn digest(kind: u8) -> BlockDigest {
        BlockDigest([kind; 32])
    }

    proptest! {
        /// Doing the plan to a model of the target gives exactly what is expected, touches nothing else, and fetches
        /// nothing that is there already.
        #[test]
        fn a_plan_makes_the_target_what_it_must_be(
            blocks in proptest::collection::vec((0u8..4, 0u8..4), 1..1500),
            short in 0u64..16384,
            fresh: bool,
        ) {
            let length = (blocks.len() as u64 * 16384).saturating_sub(short).max(1);
            let geometry = Geometry::new(16384, length).expect("legal");
            let blocks = &blocks[..geometry.blocks() as usize];
            let pages: Vec<_> = (0..geometry.pages()).map(|p| {
                let index = PageIndex(p);
                let count = geometry.page_blocks(index);
                let own = &blocks[p as usize * 1024..][..count];
                let mut page = Page::new(index, count);
                for (i, (want, _)) in own.iter().enumerate().filter(|(_, (want, _))| *want > 0) {
                    let block = BlockIndex(p * 1024 + i as u64);
                    let object = ObjectId::inline(LogSeq(u64::from(*want)));
                    let location = Location { object, offset: 160 + block.0 as u32 * 100, stored_len: 100 };
                    let content = Content::Data { digest: digest(*want), location };
                    page.apply(&Entry { block, count: 1, capture: CaptureNumber(1), content });
                }
                let found = if fresh { Found::Fresh } else {
                    Found::Digests(own.iter().map(|(_, have)| digest(*have)).collect())
                };
                (index, page, found)
            }).collect();

            let plan = plan_window(geometry, VolumeSlot(3), &pages);

            let have = |i: usize| if fresh { 0 } else { blocks[i].1 };
            let mut target: Vec<u8> = (0..blocks.len()).map(have).collect();
            for range in &plan.zero {
                prop_assert!(range.start < range.end && range.end <= length);
                for (i, held) in target.iter_mut().enumerate() {
                    let own = i as u64 * 16384..(i as u64 * 16384 + 16384).min(length);
                    if range.start <= own.start && own.end <= range.end {
                        prop_assert_ne!(*held, 0, "a block that is zero already");
                        *held = 0;
                    } else {
                        prop_assert!(own.end <= range.start || range.end <= own.start, "part of a block");
                    }
                }
            }
            for wanted in plan.reads.iter().flat_map(|r| &r.records) {
                let i = wanted.block.0 as usize;
                prop_assert_eq!(wanted.volume, VolumeSlot(3));
                prop_assert_ne!(digest(target[i]), wanted.digest, "fetched though it is there");
                target[i] = wanted.digest.0[0];
            }
            prop_assert_eq!(target, blocks.iter().map(|(want, _)| *want).collect::<Vec<_>>());
            let s = plan.sums;
            prop_assert_eq!(s.looked_at, length);
            prop_assert_eq!(s.equal + s.zeroed + s.written, length);
        }
    }
}
