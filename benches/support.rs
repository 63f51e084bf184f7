//! What the micro benches share: data that looks like disks, and pieces of it.

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::BlockIndex;
use backhaul_protocol::ids::{CaptureNumber, Generation, LogSeq, VolumeSlot};
use backhaul_protocol::record::Encoder;
use backhaul_protocol::store::key::ObjectId;

/// Block size of all benches: the default.
pub const BLOCK: usize = 64 << 10;

/// Bytes that compress about three to one, as files of an operating system do: half of each 512 bytes is random, half
/// is text. The same on every run.
pub fn mixed(len: usize) -> Vec<u8> {
    let mut random = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut random);
    for chunk in random.chunks_mut(512) {
        let text = b"the quick brown fox jumps over the lazy dog; ";
        let half = chunk.len() * 2 / 3;
        chunk[..half].iter_mut().zip(text.iter().cycle()).for_each(|(b, t)| *b = *t);
    }
    random
}

/// Records of `mixed` data, one after the other, blocks from 0 on.
pub fn records(blocks: usize) -> Vec<u8> {
    let plain = mixed(blocks * BLOCK);
    let mut encoder = Encoder::new(1).expect("zstd");
    let mut out = Vec::new();
    for (i, block) in plain.chunks(BLOCK).enumerate() {
        let (index, capture) = (BlockIndex(i as u64), CaptureNumber(i as u64 + 1));
        encoder.encode(VolumeSlot(0), index, capture, BlockDigest::of(block), block, &mut out);
    }
    out
}

/// Some object's id.
pub fn object(n: u32) -> ObjectId {
    ObjectId { seq: LogSeq(1), generation: Generation(1), session: 7, n }
}
