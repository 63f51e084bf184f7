//! A set of blocks of one volume.

use std::ops::Range;

/// One bit for each block. Its memory is taken once, when it is made, and all of it is written to then: using it later
/// neither allocates nor faults, unless it was swapped out (`mlock`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocks {
    blocks: u64,
    words: Vec<u64>,
}

impl Blocks {
    /// None of this many.
    pub fn none(blocks: u64) -> Self {
        let mut none = Self { blocks, words: vec![u64::MAX; blocks.div_ceil(64) as usize] };
        // Zeros from the allocator would be pages that are not there yet.
        std::hint::black_box(&mut none.words).fill(0);
        none
    }

    /// All of this many.
    pub fn all(blocks: u64) -> Self {
        let mut all = Self { blocks, words: vec![u64::MAX; blocks.div_ceil(64) as usize] };
        if let (Some(last), false) = (all.words.last_mut(), blocks.is_multiple_of(64)) {
            *last = (1 << (blocks % 64)) - 1;
        }
        all
    }

    /// How many there could be.
    pub fn capacity(&self) -> u64 {
        self.blocks
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Whether this one is in it.
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.words[(block / 64) as usize] >> (block % 64) & 1 == 1
    }

    /// Adds one that the volume has.
    pub fn insert(&mut self, block: u64) {
        assert!(block < self.blocks, "block {block} of {}", self.blocks);
        self.words[(block / 64) as usize] |= 1 << (block % 64);
    }

    /// Takes out all that are in the other.
    pub fn remove_all(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, its)| *mine &= !its);
    }

    /// Adds all that are in the other.
    pub fn insert_all(&mut self, other: &Self) {
        assert!(other.blocks <= self.blocks, "of another volume");
        self.words.iter_mut().zip(&other.words).for_each(|(mine, its)| *mine |= its);
    }

    /// Takes out all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// In order, neighbours together.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, 0)?;
            at = self.next(start, u64::MAX).unwrap_or(self.blocks).min(self.blocks);
            Some(start..at)
        })
    }

    /// The bits, 64 to a word, the lowest first; none beyond the last block.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// The next that is in it, or with `flip` all ones the next that is not.
    fn next(&self, from: u64, flip: u64) -> Option<u64> {
        let mut index = (from / 64) as usize;
        let mut word = (self.words.get(index)? ^ flip) & u64::MAX << (from % 64);
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        Some(index as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one range is what is expected")]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_what_was_inserted() {
        let mut blocks = Blocks::none(200);
        [0, 1, 63, 64, 65, 130, 199].into_iter().for_each(|b| blocks.insert(b));
        assert_eq!(blocks.ranges().collect::<Vec<_>>(), [0..2, 63..66, 130..131, 199..200]);
        assert_eq!((blocks.count(), blocks.contains(199), blocks.contains(198)), (7, true, false));
        assert_eq!(Blocks::all(200).ranges().collect::<Vec<_>>(), [0..200]);
        assert_eq!((Blocks::all(200).count(), Blocks::none(200).ranges().count()), (200, 0));
        let mut rest = Blocks::all(200);
        rest.remove_all(&blocks);
        rest.insert_all(&blocks);
        assert_eq!(rest, Blocks::all(200));
    }
}
