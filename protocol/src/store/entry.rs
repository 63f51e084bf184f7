//! Where the newest record of a block is, and how several sources of such entries become one page.
//!
//! Read first: [`Entry`], then [`Page`].

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::digest::{BlockDigest, RangeDigest};
use crate::geometry::{BlockIndex, PageIndex};
use crate::ids::CaptureNumber;
use crate::limits::{BLOCKS_PER_PAGE, MAX_BLOCK_SIZE};
use crate::record::HEADER_LEN;
use crate::store::key::ObjectId;

/// Bytes of an entry in a map.
pub const ENTRY_LEN: usize = 72;

/// Where a record lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Location {
    /// In which segment (or log record).
    pub object: ObjectId,
    /// Of the record's header, from the object's first byte.
    pub offset: u32,
    /// Bytes of header and payload.
    pub stored_len: u32,
}

impl Location {
    /// The byte after the record.
    pub fn end(self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_len)
    }
}

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Zeroes; nothing is stored.
    Zero,
    /// Bytes with this digest, in this record.
    Data {
        /// Of the block's plain bytes.
        digest: BlockDigest,
        /// Where they are.
        location: Location,
    },
}

impl Content {
    /// The block's digest.
    pub fn digest(self) -> BlockDigest {
        match self {
            Self::Zero => BlockDigest::ZERO,
            Self::Data { digest, .. } => digest,
        }
    }
}

/// One block's newest record in some source, or a run of zero blocks within a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The block, or the first of the run.
    pub block: BlockIndex,
    /// 1 for data; for zeroes as many as there are, all in one page.
    pub count: u32,
    /// The highest capture of a block wins.
    pub capture: CaptureNumber,
    /// What it holds.
    pub content: Content,
}

impl Entry {
    /// Appends the 72 bytes.
    ///
    /// ```text
    ///  0  8 block    8 32 digest (0 for zeroes)    40 16 object id (0 for zeroes)
    /// 56  4 offset; of zeroes the count           60  4 stored length (0 for zeroes)    64 8 capture number
    /// ```
    pub fn write(&self, out: &mut Vec<u8>) {
        out.put_u64(self.block.0);
        match self.content {
            Content::Zero => {
                out.extend_from_slice(&[0; 48]);
                out.put_u32(self.count);
                out.put_u32(0);
            }
            Content::Data { digest, location } => {
                out.extend_from_slice(&digest.0);
                out.extend_from_slice(&location.object.to_bytes());
                out.put_u32(location.offset);
                out.put_u32(location.stored_len);
            }
        }
        out.put_u64(self.capture.0);
    }

    /// The other way, checked: lengths within limits, a run of zeroes within a page.
    pub fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        let block = BlockIndex(r.u64("block")?);
        let digest = BlockDigest(r.array("digest")?);
        let object = ObjectId::read(r)?;
        let (offset, stored_len) = (r.u32("offset")?, r.u32("stored length")?);
        let capture = CaptureNumber(r.u64("capture")?);
        if digest.is_zero() {
            let entry = Self { block, count: offset, capture, content: Content::Zero };
            return if stored_len == 0 && entry.in_one_page() { Ok(entry) } else { Err(FieldError::Value("zero run")) };
        }
        if !stored_len_is_legal(stored_len) {
            return Err(FieldError::Value("stored length"));
        }
        let location = Location { object, offset, stored_len };
        Ok(Self { block, count: 1, capture, content: Content::Data { digest, location } })
    }

    /// Whether the entry is about at least one block, all of them in one page.
    pub fn in_one_page(&self) -> bool {
        self.count >= 1
            && self
                .block
                .0
                .checked_add(u64::from(self.count) - 1)
                .is_some_and(|last| BlockIndex(last).page() == self.block.page())
    }
}

/// Whether a record of data can have this many bytes.
pub fn stored_len_is_legal(len: u32) -> bool {
    len > HEADER_LEN as u32 && len <= HEADER_LEN as u32 + MAX_BLOCK_SIZE
}

/// The blocks of one page, each with the entry of the highest capture that was applied.
///
/// Sources may be applied in any order. A block that no entry names is unmapped: zero.
pub struct Page {
    index: PageIndex,
    blocks: Vec<Option<(CaptureNumber, Content)>>,
}

impl Page {
    /// Of this many blocks, all unmapped.
    pub fn new(index: PageIndex, blocks: usize) -> Self {
        debug_assert!(blocks as u64 <= BLOCKS_PER_PAGE);
        Self { index, blocks: vec![None; blocks] }
    }

    /// Lets the entry win where its capture is the highest so far; of equal captures, which two sessions on the same
    /// base can make, the greater digest wins, so that the order of sources never matters. Blocks beyond the page's end are passed over:
    /// the volume may have been longer once.
    pub fn apply(&mut self, entry: &Entry) {
        debug_assert_eq!(entry.block.page(), self.index);
        let start = entry.block.in_page();
        for slot in self.blocks.iter_mut().skip(start).take(entry.count as usize) {
            let rank = (entry.capture, entry.content.digest());
            if slot.is_none_or(|(capture, content): (CaptureNumber, Content)| (capture, content.digest()) <= rank) {
                *slot = Some((entry.capture, entry.content));
            }
        }
    }

    /// What each block holds, in order; `None` is unmapped.
    pub fn blocks(&self) -> impl Iterator<Item = (BlockIndex, Option<(CaptureNumber, Content)>)> + '_ {
        let first = self.index.first_block().0;
        self.blocks.iter().enumerate().map(move |(i, c)| (BlockIndex(first + i as u64), *c))
    }

    /// What one block holds; unmapped is zero.
    pub fn content(&self, block: BlockIndex) -> Content {
        self.blocks.get(block.in_page()).copied().flatten().map_or(Content::Zero, |(_, c)| c)
    }

    /// Digests of the blocks, in order.
    pub fn digests(&self) -> Vec<BlockDigest> {
        self.blocks.iter().map(|b| b.map_or(BlockDigest::ZERO, |(_, c)| c.digest())).collect()
    }

    /// The digest of the digests.
    pub fn range_digest(&self) -> RangeDigest {
        RangeDigest::of(&self.digests())
    }

    /// The entries of the page, sorted, runs of zeroes joined where their captures are equal. With
    /// [`ZeroEntries::Drop`] zero blocks become unmapped, as in a base map, where nothing lies below.
    pub fn entries(&self, zeroes: ZeroEntries) -> Vec<Entry> {
        let mut out: Vec<Entry> = Vec::new();
        for (block, held) in self.blocks() {
            let Some((capture, content)) = held else { continue };
            if content == Content::Zero {
                if zeroes == ZeroEntries::Drop {
                    continue;
                }
                if let Some(last) = out.last_mut().filter(|l| {
                    l.content == Content::Zero && l.capture == capture && l.block.0 + u64::from(l.count) == block.0
                }) {
                    last.count += 1;
                    continue;
                }
            }
            out.push(Entry { block, count: 1, capture, content });
        }
        out
    }
}

/// What becomes of zero blocks when a page is written down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ZeroEntries {
    /// They hide what lies below: delta maps.
    Keep,
    /// They become unmapped: base maps.
    Drop,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::LogSeq;

    fn data(block: u64, capture: u64) -> Entry {
        let location = Location { object: ObjectId::inline(LogSeq(capture)), offset: 160, stored_len: 100 };
        let content = Content::Data { digest: BlockDigest([capture as u8; 32]), location };
        Entry { block: BlockIndex(block), count: 1, capture: CaptureNumber(capture), content }
    }

    proptest! {
        #[test]
        fn the_highest_capture_wins_in_any_order(
            ops in proptest::collection::vec((0u64..64, 1u32..20, any::<bool>()), 1..60),
            shuffle in any::<u64>(),
        ) {
            let mut model = [None; 64];
            let mut entries = Vec::new();
            for (i, (block, count, zero)) in ops.into_iter().enumerate() {
                let capture = i as u64 + 1;
                let entry = if zero {
                    let count = count.min(64 - block as u32);
                    Entry { block: BlockIndex(block), count, capture: CaptureNumber(capture), content: Content::Zero }
                } else {
                    data(block, capture)
                };
                for slot in &mut model[block as usize..block as usize + entry.count as usize] {
                    *slot = Some((entry.capture, entry.content));
                }
                entries.push(entry);
            }
            let n = entries.len() as u64;
            entries.sort_by_key(|e| (e.capture.0 ^ shuffle) % n);
            let mut page = Page::new(PageIndex(0), 64);
            entries.iter().for_each(|e| page.apply(e));
            prop_assert_eq!(page.blocks().map(|(_, c)| c).collect::<Vec<_>>(), model.to_vec());
            // What is written down and read again is the same page.
            let mut bytes = Vec::new();
            let written = page.entries(ZeroEntries::Keep);
            written.iter().for_each(|e| e.write(&mut bytes));
            let mut r = FieldReader::new(&bytes);
            let mut again = Page::new(PageIndex(0), 64);
            while r.remaining() > 0 {
                again.apply(&Entry::read(&mut r).expect("own bytes"));
            }
            prop_assert_eq!(again.blocks().collect::<Vec<_>>(), page.blocks().collect::<Vec<_>>());
        }
    }
}
