//! Which blocks of a page must be sent, and what a round adds up to.
//!
//! The Sink says what it has (its digests, and which blocks its draft holds), the Source compares with what it
//! read. A block that equals the base but not the draft differs from what the Sink has: A, B, A is sent again.

use crate::digest::{BlockDigest, DeltaDigest, DeltaDigester, RangeDigest, VolumeDigest, VolumeDigester};
use crate::geometry::{BlockIndex, Geometry, PageIndex};
use crate::ids::VolumeSlot;
use crate::limits::BLOCKS_PER_PAGE;

const WORDS: usize = BLOCKS_PER_PAGE as usize / 64;

/// Some of the blocks of one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BlockSet([u64; WORDS]);

impl BlockSet {
    /// Adds the block at this place of the page, below 1024.
    pub fn insert(&mut self, in_page: usize) {
        self.0[in_page / 64] |= 1 << (in_page % 64);
    }
    /// Whether the block at this place is one of them.
    pub fn contains(&self, in_page: usize) -> bool {
        self.0[in_page / 64] >> (in_page % 64) & 1 == 1
    }
    /// Adds all of the other's.
    pub fn insert_all(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, its)| *mine |= its);
    }
    /// How many.
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }
    /// All of them, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..BLOCKS_PER_PAGE as usize).filter(|i| self.contains(*i))
    }
    /// From bits, the lowest block first; what words are left out is none, and what is beyond a page is not looked at.
    pub fn from_words(words: &[u64]) -> Self {
        let mut set = Self::default();
        set.0.iter_mut().zip(words).for_each(|(mine, its)| *mine = *its);
        set
    }
    /// 128 bytes, the lowest block first.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
    /// The other way; `None` unless there are exactly 128 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, []) = bytes.as_chunks::<8>() else { return None };
        let words: &[[u8; 8]; WORDS] = words.try_into().ok()?;
        Some(Self(words.map(u64::from_le_bytes)))
    }
}

/// What the Sink has of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Of every block.
    pub digests: Vec<BlockDigest>,
    /// Those that the draft holds already.
    pub draft: BlockSet,
}

/// The blocks that differ: to be sent. Both lists have one digest for each block of the page.
pub fn differing(held: &[BlockDigest], actual: &[BlockDigest]) -> BlockSet {
    debug_assert_eq!(held.len(), actual.len());
    let mut set = BlockSet::default();
    held.iter().zip(actual).enumerate().filter(|(_, (h, a))| h != a).for_each(|(i, _)| set.insert(i));
    set
}

/// Adds up a round: pages come in order, volumes in the order of their slots.
#[derive(Default)]
pub struct RoundDigester {
    delta: DeltaDigester,
    volumes: Vec<(VolumeSlot, VolumeDigest)>,
    open: Option<(VolumeSlot, Geometry, u64, VolumeDigester)>,
}

/// What a round adds up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoundDigests {
    /// Of all winners of the draft.
    pub delta: DeltaDigest,
    /// How many there are.
    pub delta_blocks: u64,
    /// Of each volume, by slot.
    pub volumes: Vec<(VolumeSlot, VolumeDigest)>,
}

impl RoundDigester {
    /// The next volume; its slot is above those before.
    pub fn begin_volume(&mut self, volume: VolumeSlot, geometry: Geometry) {
        self.end_volume();
        self.open = Some((volume, geometry, 0, VolumeDigester::new(geometry)));
    }

    /// The next page of the volume: its digests, what the draft held before and what was sent now.
    ///
    /// # Panics
    /// If the page is not the next one: the order is part of the digests.
    pub fn push_page(&mut self, page: PageIndex, actual: &[BlockDigest], draft: &BlockSet, sent: &BlockSet) {
        self.push_range(page, RangeDigest::of(actual), actual, draft, sent);
    }

    /// The same where the range digest is known.
    pub fn push_range(
        &mut self,
        page: PageIndex,
        range: RangeDigest,
        actual: &[BlockDigest],
        draft: &BlockSet,
        sent: &BlockSet,
    ) {
        let (volume, _, next, digester) = self.open.as_mut().expect("a volume was begun");
        assert_eq!(page.0, *next, "pages come in order");
        *next += 1;
        digester.push(range);
        if draft.is_empty() && sent.is_empty() {
            return;
        }
        let first = page.first_block().0;
        for (i, digest) in actual.iter().enumerate().filter(|(i, _)| draft.contains(*i) || sent.contains(*i)) {
            self.delta.push(*volume, BlockIndex(first + i as u64), *digest);
        }
    }

    fn end_volume(&mut self) {
        if let Some((volume, _, _, digester)) = self.open.take() {
            self.volumes.push((volume, digester.finish()));
        }
    }

    /// The sums.
    pub fn finish(mut self) -> RoundDigests {
        self.end_volume();
        RoundDigests { delta: self.delta.finish(), delta_blocks: self.delta.count(), volumes: self.volumes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_returns_to_its_base_is_sent_again() {
        let [a, b] = [BlockDigest([1; 32]), BlockDigest([2; 32])];
        // The base has A, the draft got B, the volume is A again: what the Sink has is B.
        let held = Held {
            digests: vec![b, a],
            draft: BlockSet::from_bytes(&{
                let mut bytes = [0; 128];
                bytes[0] = 1;
                bytes
            })
            .expect("128 bytes"),
        };
        let sent = differing(&held.digests, &[a, a]);
        assert_eq!(sent.iter().collect::<Vec<_>>(), [0]);
        assert_eq!(BlockSet::from_bytes(&sent.to_bytes()), Some(sent));
        assert_eq!(BlockSet::from_bytes(&[0; 127]), None);
    }
}
