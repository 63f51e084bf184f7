//! Where bytes are: block sizes, indexes, offsets and lengths, each a type of its own.

use std::fmt;

use bincode::{Decode, Encode};

use crate::limits::{BLOCKS_PER_PAGE, MAX_BLOCK_SIZE, MAX_VOLUME_LENGTH, MIN_BLOCK_SIZE};

/// A block's number in its volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct BlockIndex(pub u64);

/// The number of a run of 1024 blocks: the unit of range digests and of map pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct PageIndex(pub u64);

/// A byte position in a volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct ByteOffset(pub u64);

impl BlockIndex {
    /// The page that holds this block.
    pub fn page(self) -> PageIndex {
        PageIndex(self.0 / BLOCKS_PER_PAGE)
    }
    /// The block's place in its page, below 1024.
    pub fn in_page(self) -> usize {
        (self.0 % BLOCKS_PER_PAGE) as usize
    }
}

impl PageIndex {
    /// The page's first block.
    pub fn first_block(self) -> BlockIndex {
        BlockIndex(self.0 * BLOCKS_PER_PAGE)
    }
}

impl fmt::Display for BlockIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A geometry that no volume may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two from 16 KiB to 1 MiB.
    #[error("block size {0} is not a power of two from 16 KiB to 1 MiB")]
    BlockSize(u32),
    /// Zero, or over 64 TiB.
    #[error("volume length {0} is not from 1 byte to 64 TiB")]
    Length(u64),
}

/// Block size and length of a volume. Any value of this type is within `limits`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    block_size: u32,
    length: u64,
}

impl Geometry {
    /// Checks both numbers against the limits. Both in bytes.
    pub fn new(block_size: u32, length: u64) -> Result<Self, GeometryError> {
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            return Err(GeometryError::BlockSize(block_size));
        }
        if length == 0 || length > MAX_VOLUME_LENGTH {
            return Err(GeometryError::Length(length));
        }
        Ok(Self { block_size, length })
    }
    /// Bytes of every block but a short last one.
    pub fn block_size(self) -> u32 {
        self.block_size
    }
    /// Bytes of the volume.
    pub fn length(self) -> u64 {
        self.length
    }
    /// Number of blocks, the short last one included.
    pub fn blocks(self) -> u64 {
        self.length.div_ceil(u64::from(self.block_size))
    }
    /// Number of pages, the short last one included.
    pub fn pages(self) -> u64 {
        self.blocks().div_ceil(BLOCKS_PER_PAGE)
    }
    /// Whether the block is inside the volume.
    pub fn contains(self, block: BlockIndex) -> bool {
        block.0 < self.blocks()
    }
    /// Where the block begins. The one place where an index becomes an offset.
    pub fn offset(self, block: BlockIndex) -> ByteOffset {
        ByteOffset(block.0 * u64::from(self.block_size))
    }
    /// Bytes of this block: the block size, or less for the last one; 0 outside the volume.
    pub fn block_len(self, block: BlockIndex) -> usize {
        let start = block.0.saturating_mul(u64::from(self.block_size));
        self.length.saturating_sub(start).min(u64::from(self.block_size)) as usize
    }
    /// Blocks of this page: 1024, or fewer for the last one; 0 outside the volume.
    pub fn page_blocks(self, page: PageIndex) -> usize {
        self.blocks().saturating_sub(page.0.saturating_mul(BLOCKS_PER_PAGE)).min(BLOCKS_PER_PAGE) as usize
    }
    /// Bytes of this page's blocks.
    pub fn page_len(self, page: PageIndex) -> u64 {
        let start = self.offset(page.first_block()).0;
        self.length.saturating_sub(start).min(BLOCKS_PER_PAGE * u64::from(self.block_size))
    }
}

impl Encode for Geometry {
    fn encode<E: bincode::enc::Encoder>(&self, e: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.block_size.encode(e)?;
        self.length.encode(e)
    }
}

impl<C> Decode<C> for Geometry {
    fn decode<D: bincode::de::Decoder<Context = C>>(d: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let (block_size, length) = (u32::decode(d)?, u64::decode(d)?);
        Self::new(block_size, length).map_err(|_| bincode::error::DecodeError::Other("geometry out of bounds"))
    }
}

impl<'de, C> bincode::BorrowDecode<'de, C> for Geometry {
    fn borrow_decode<D: bincode::de::BorrowDecoder<'de, Context = C>>(
        d: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        Self::decode(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_last_block_and_page() {
        let g = Geometry::new(65536, 1024 * 65536 + 65536 + 1).expect("legal");
        assert_eq!((g.blocks(), g.pages()), (1026, 2));
        assert_eq!(g.block_len(BlockIndex(1025)), 1);
        assert_eq!(g.block_len(BlockIndex(1026)), 0);
        assert_eq!(g.page_blocks(PageIndex(1)), 2);
        assert_eq!(g.page_len(PageIndex(1)), 65537);
        assert!(Geometry::new(65537, 1).is_err() && Geometry::new(65536, 0).is_err());
        assert!(Geometry::new(65536, u64::MAX).is_err());
    }
}
