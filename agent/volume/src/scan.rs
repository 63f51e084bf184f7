//! Reading a volume page by page and hashing it: the same for replication, for a restore that compares first, and for
//! reading back.
//!
//! Read first: [`PageScanner::scan`].

use std::ops::Range;

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, ByteOffset, Geometry, PageIndex};

use crate::buffer::AlignedBuffer;
use crate::{Volume, VolumeError};

/// Bytes read at once from a file: what is hashed right after is still in the second-level cache.
pub const FILE_READ: usize = 256 << 10;
/// Bytes read at once from a device: at one request at a time the usual disk needs this much for its full speed.
pub const DEVICE_READ: usize = 1 << 20;

/// What a scan of a page found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScannedPage {
    /// Of every block of the page, in order.
    pub digests: Vec<BlockDigest>,
    /// Bytes that were read; holes are not.
    pub bytes_read: u64,
}

/// Reads and hashes pages; keeps its buffer. One for each thread.
pub struct PageScanner {
    buffer: AlignedBuffer,
    /// The last data range that was found, and that from `.1` on to its start there is none.
    data: Option<(Range<u64>, u64)>,
}

impl PageScanner {
    /// `read_len` is [`FILE_READ`] or [`DEVICE_READ`]; at least a block is read at once.
    pub fn new(geometry: Geometry, read_len: usize) -> Self {
        Self { buffer: AlignedBuffer::new(read_len.max(geometry.block_size() as usize)), data: None }
    }

    /// Reads the page, but not its holes, and gives `each` every block that was read, with its digest. Each block
    /// is read once: what is hashed is what is sent.
    pub fn scan<E: From<VolumeError>>(
        &mut self,
        volume: &dyn Volume,
        geometry: Geometry,
        page: PageIndex,
        each: impl FnMut(BlockIndex, BlockDigest, &[u8]) -> Result<(), E>,
    ) -> Result<ScannedPage, E> {
        let count = geometry.page_blocks(page);
        let mut digests = vec![BlockDigest::ZERO; count];
        let bytes_read = self.scan_range(volume, geometry, page, 0..count, &mut digests, each)?;
        Ok(ScannedPage { digests, bytes_read })
    }

    /// The same for some neighbouring blocks of the page, by their places in it. Replaces their digests and gives how
    /// many bytes were read.
    pub fn scan_range<E: From<VolumeError>>(
        &mut self,
        volume: &dyn Volume,
        geometry: Geometry,
        page: PageIndex,
        blocks: Range<usize>,
        digests: &mut [BlockDigest],
        mut each: impl FnMut(BlockIndex, BlockDigest, &[u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        digests[blocks.clone()].fill(BlockDigest::ZERO);
        let mut bytes_read = 0;
        let mut at = page.first_block().0 + blocks.start as u64;
        let end = page.first_block().0 + blocks.end as u64;
        while at < end {
            let Some(data) = self.data_from(volume, geometry.offset(BlockIndex(at)))? else { break };
            at = at.max(data.start / u64::from(geometry.block_size()));
            // Whole blocks, also where data begins or ends inside one.
            let stop = data.end.div_ceil(u64::from(geometry.block_size())).min(end);
            while at < stop {
                let blocks = (self.buffer.len() as u64 / u64::from(geometry.block_size())).min(stop - at);
                let offset = geometry.offset(BlockIndex(at));
                let last = BlockIndex(at + blocks - 1);
                let len = (geometry.offset(last).0 - offset.0) as usize + geometry.block_len(last);
                let bytes = &mut self.buffer[..len];
                volume.read_at(offset, bytes)?;
                bytes_read += len as u64;
                for (i, block) in bytes.chunks(geometry.block_size() as usize).enumerate() {
                    let index = BlockIndex(at + i as u64);
                    let digest = BlockDigest::of(block);
                    digests[index.in_page()] = digest;
                    each(index, digest, block)?;
                }
                at += blocks;
            }
        }
        Ok(bytes_read)
    }

    /// The data range that `from` lies in or that comes next, from memory where that is known.
    fn data_from(&mut self, volume: &dyn Volume, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        if let Some((data, since)) = &self.data
            && (*since..data.end).contains(&from.0)
        {
            return Ok(Some(data.clone()));
        }
        let found = volume.next_data(from)?;
        self.data = found.clone().map(|data| (data, from.0));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemVolume;

    #[test]
    fn pages_are_hashed_block_by_block() {
        let geometry = Geometry::new(16384, 1024 * 16384 + 16384 * 2 + 5).expect("legal");
        let volume = MemVolume::zeroed(geometry.length() as usize);
        volume.set(16384 * 3 + 7, b"x");
        volume.set(geometry.length() - 1, b"y");
        let mut scanner = PageScanner::new(geometry, FILE_READ);
        let mut seen = Vec::new();
        for page in [0, 1] {
            let found = scanner
                .scan::<VolumeError>(&volume, geometry, PageIndex(page), |block, digest, bytes| {
                    assert_eq!(BlockDigest::of(bytes), digest);
                    if !digest.is_zero() {
                        seen.push((block.0, bytes.len()));
                    }
                    Ok(())
                })
                .expect("memory reads");
            assert_eq!(found.digests.len(), geometry.page_blocks(PageIndex(page)));
        }
        assert_eq!(seen, [(3, 16384), (1026, 5)]);
    }
}
