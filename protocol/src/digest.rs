//! Digests: of a block, of 1024 blocks, of a volume, of what a commit changed.
//!
//! A block of zeroes has the digest [`BlockDigest::ZERO`] (32 zero bytes) whatever its length: it is recognised by
//! looking at every byte, which is as strong as hashing and ten times as fast, and unmapped blocks then need no
//! digest of their own. A run of 1024 zero blocks likewise has [`RangeDigest::ZERO`].

use std::fmt;

use bincode::{Decode, Encode};

use crate::geometry::{BlockIndex, Geometry};
use crate::ids::VolumeSlot;
use crate::limits::BLOCKS_PER_PAGE;

const RANGE_CONTEXT: &str = "backhaul 2026-11 range digest";
const VOLUME_CONTEXT: &str = "backhaul 2026-11 volume digest";
const DELTA_CONTEXT: &str = "backhaul 2026-11 delta digest";

macro_rules! digest_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
        #[repr(transparent)]
        pub struct $name(pub [u8; 32]);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:.16})"), self.to_string())
            }
        }
        impl Default for $name {
            fn default() -> Self {
                Self([0; 32])
            }
        }
    };
}

digest_type!(
    /// BLAKE3 of a block's bytes, or 32 zero bytes for a block of zeroes.
    BlockDigest
);
digest_type!(
    /// Digest of the digests of one page's blocks, or 32 zero bytes if all of them are zeroes.
    RangeDigest
);
digest_type!(
    /// Digest of a whole volume: its geometry and its range digests.
    VolumeDigest
);
digest_type!(
    /// Digest of the (volume, block, digest) winners of a commit.
    DeltaDigest
);
digest_type!(
    /// BLAKE3 of a stored object's bytes.
    ObjectDigest
);

impl BlockDigest {
    /// A block of zeroes.
    pub const ZERO: Self = Self([0; 32]);

    /// Looks at every byte: all zero gives [`Self::ZERO`], anything else its BLAKE3.
    pub fn of(block: &[u8]) -> Self {
        if is_zero(block) { Self::ZERO } else { Self(*blake3::hash(block).as_bytes()) }
    }
    /// Whether this is the digest of a block of zeroes.
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

impl ObjectDigest {
    /// BLAKE3 of the bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // OR over whole lanes compiles to vector code; stopping every 4 KiB makes ordinary data cheap to tell.
    bytes.chunks(4096).all(|c| c.iter().fold(0, |acc, b| acc | b) == 0)
}

impl RangeDigest {
    /// 1024 blocks of zeroes.
    pub const ZERO: Self = Self([0; 32]);

    /// Of the digests of one page's blocks, in order; at most 1024 of them. Zero blocks at the end do not count, so
    /// that the digest of a page stays the same when its volume grows.
    pub fn of(blocks: &[BlockDigest]) -> Self {
        debug_assert!(blocks.len() as u64 <= BLOCKS_PER_PAGE);
        let Some(last) = blocks.iter().rposition(|d| !d.is_zero()) else { return Self::ZERO };
        let blocks = &blocks[..=last];
        let mut hasher = blake3::Hasher::new_derive_key(RANGE_CONTEXT);
        // One copy, so that BLAKE3 sees 32 KiB at once and can use its vector lanes.
        let mut bytes = Vec::with_capacity(blocks.len() * 32);
        blocks.iter().for_each(|d| bytes.extend_from_slice(&d.0));
        hasher.update(&bytes);
        Self(*hasher.finalize().as_bytes())
    }
}

/// Takes range digests in order and gives the digest of the volume.
#[derive(Clone)]
pub struct VolumeDigester {
    hasher: blake3::Hasher,
    left: u64,
}

impl VolumeDigester {
    /// For a volume of this geometry.
    pub fn new(geometry: Geometry) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(VOLUME_CONTEXT);
        hasher.update(&geometry.block_size().to_le_bytes());
        hasher.update(&geometry.length().to_le_bytes());
        Self { hasher, left: geometry.pages() }
    }
    /// The next page's range digest.
    ///
    /// # Panics
    /// If there are more pages than the geometry has: the caller counts them.
    pub fn push(&mut self, range: RangeDigest) {
        self.left = self.left.checked_sub(1).expect("no more ranges than pages");
        self.hasher.update(&range.0);
    }
    /// The digest, once every page was pushed.
    ///
    /// # Panics
    /// If pages are missing.
    pub fn finish(self) -> VolumeDigest {
        assert_eq!(self.left, 0, "every page has a range digest");
        VolumeDigest(*self.hasher.finalize().as_bytes())
    }
    /// Of all range digests at once; `ranges` must have one for each page.
    pub fn of(geometry: Geometry, ranges: &[RangeDigest]) -> VolumeDigest {
        let mut digester = Self::new(geometry);
        ranges.iter().for_each(|r| digester.push(*r));
        digester.finish()
    }
}

/// Takes the winners of a commit, sorted by (volume, block), and gives their digest.
#[derive(Clone)]
pub struct DeltaDigester {
    hasher: blake3::Hasher,
    count: u64,
    last: Option<(VolumeSlot, BlockIndex)>,
}

impl Default for DeltaDigester {
    fn default() -> Self {
        Self { hasher: blake3::Hasher::new_derive_key(DELTA_CONTEXT), count: 0, last: None }
    }
}

impl DeltaDigester {
    /// The next winner.
    ///
    /// # Panics
    /// If it does not come after the one before: the order is part of the digest.
    pub fn push(&mut self, volume: VolumeSlot, block: BlockIndex, digest: BlockDigest) {
        assert!(self.last < Some((volume, block)), "winners are sorted and unique");
        self.last = Some((volume, block));
        let mut row = [0; 44];
        row[..4].copy_from_slice(&volume.0.to_le_bytes());
        row[4..12].copy_from_slice(&block.0.to_le_bytes());
        row[12..].copy_from_slice(&digest.0);
        self.hasher.update(&row);
        self.count += 1;
    }
    /// How many winners there were.
    pub fn count(&self) -> u64 {
        self.count
    }
    /// The digest.
    pub fn finish(&self) -> DeltaDigest {
        DeltaDigest(*self.hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;

    #[test]
    fn zero_blocks_have_the_zero_digest() {
        assert!(BlockDigest::of(&[0; 70_000]).is_zero());
        for at in [0, 4095, 4096, 69_999] {
            let mut block = vec![0; 70_000];
            block[at] = 1;
            assert_eq!(BlockDigest::of(&block).0, *blake3::hash(&block).as_bytes());
        }
        assert_eq!(RangeDigest::of(&[BlockDigest::ZERO; 1024]), RangeDigest::ZERO);
    }

    #[test]
    fn volume_digest_depends_on_geometry_and_content() {
        let a = Geometry::new(65536, 1 << 20).expect("legal");
        let b = Geometry::new(65536, (1 << 20) - 1).expect("legal");
        let zero = VolumeDigester::of(a, &[RangeDigest::ZERO]);
        assert_ne!(zero, VolumeDigester::of(b, &[RangeDigest::ZERO]));
        assert_ne!(zero, VolumeDigester::of(a, &[RangeDigest::of(&[BlockDigest::of(b"x")])]));
    }
}
