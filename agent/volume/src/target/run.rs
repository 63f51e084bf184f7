//! Adjacent verified blocks, gathered for one large write.

use std::fmt;

use backhaul_protocol::geometry::{BlockIndex, ByteOffset, Geometry};
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::record::VerifiedBlock;

use crate::buffer::AlignedBuffer;

/// Bytes that came out of [`VerifiedBlock`]s and from nowhere else. The copy into page-aligned memory is the one that
/// O_DIRECT needs anyway. Reusable: [`VerifiedRun::clear`].
pub struct VerifiedRun {
    geometry: Geometry,
    bytes: AlignedBuffer,
    len: usize,
    first: Option<(VolumeSlot, BlockIndex)>,
    blocks: u64,
}

impl VerifiedRun {
    /// For blocks of a volume of this geometry; holds at most `capacity` bytes, and at least one block.
    pub fn new(geometry: Geometry, capacity: usize) -> Self {
        let bytes = AlignedBuffer::new(capacity.max(geometry.block_size() as usize));
        Self { geometry, bytes, len: 0, first: None, blocks: 0 }
    }

    /// Appends the block. `false`, and nothing happens, if it is not the next one of the same volume, if there is no
    /// room, or if it is not as long as the geometry says: write the run, clear it, and push again. A block that an
    /// empty run refuses is not of this volume.
    #[must_use = "a block that was not taken must be pushed again"]
    pub fn push(&mut self, block: &VerifiedBlock<'_>) -> bool {
        let bytes = block.bytes();
        let (slot, first) = *self.first.get_or_insert((block.volume(), block.block()));
        let is_next = slot == block.volume() && block.block().0.checked_sub(first.0) == Some(self.blocks);
        let right = self.geometry.contains(block.block()) && bytes.len() == self.geometry.block_len(block.block());
        if !is_next || !right || self.len + bytes.len() > self.bytes.len() {
            if self.blocks == 0 {
                self.first = None;
            }
            return false;
        }
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self.blocks += 1;
        true
    }

    /// Empties it.
    pub fn clear(&mut self) {
        (self.len, self.first, self.blocks) = (0, None, 0);
    }

    /// Whether there is no block in it.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The geometry of its volume.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where its bytes belong; 0 if it is empty.
    pub fn offset(&self) -> ByteOffset {
        self.first.map_or(ByteOffset(0), |(_, block)| self.geometry.offset(block))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl fmt::Debug for VerifiedRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifiedRun({} bytes at {})", self.len, self.offset().0)
    }
}
