//! Block records: a 64-byte header and a payload, the same bytes on the wire, in a segment and on the way back.
//!
//! Read first: [`RecordHeader`] (the layout), [`Encoder`] (block to record) and [`VerifiedBlock`] (record to block,
//! only by hashing).
//!
//! ```text
//!  0  4  magic "BHB1"
//!  4  1  kind      1 data, 2 zeroes, (3 patch: reserved)
//!  5  1  encoding  0 raw, 1 zstd
//!  6  1  cipher    0 none (others reserved)
//!  7  1  reserved  0
//!  8  4  volume slot
//! 12  4  payload length, bytes; 0 for zeroes
//! 16  8  block index; of zeroes the first
//! 24  8  capture number
//! 32 32  block digest; of zeroes: 8 bytes block count, 24 bytes 0
//! ```

use crate::bytes::FieldReader;
use crate::digest::BlockDigest;
use crate::geometry::{BlockIndex, Geometry};
use crate::ids::{CaptureNumber, VolumeSlot};
use crate::limits::MAX_BLOCK_SIZE;

/// Bytes of a record header.
pub const HEADER_LEN: usize = 64;
const MAGIC: [u8; 4] = *b"BHB1";

/// Why bytes are not a record, or not the block that they say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The header does not begin as a record does.
    #[error("not a block record (wrong magic)")]
    Magic,
    /// A header field has a value that this version does not know.
    #[error("block record with {field} {value}, which this version does not know")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
    /// A length or index outside its bounds.
    #[error("block record with {0} out of bounds")]
    Bounds(&'static str),
    /// The payload does not decompress to a block.
    #[error("the payload of block {0} does not decompress to a block")]
    Decompress(BlockIndex),
    /// The bytes are not those that were hashed at the source.
    #[error("block {block}: digest {found} where {expected} was stated")]
    Digest {
        /// Which block.
        block: BlockIndex,
        /// What the header states.
        expected: BlockDigest,
        /// What the bytes hash to.
        found: BlockDigest,
    },
}

/// How a payload is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// The block's bytes.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// What a record says of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordBody {
    /// One block, its bytes in the payload.
    Data {
        /// Digest of the plain bytes.
        digest: BlockDigest,
        /// How the payload is stored.
        encoding: Encoding,
        /// Bytes of the payload.
        payload_len: u32,
    },
    /// This many blocks of zeroes, beginning with the header's block; no payload. All in one page.
    Zeroes {
        /// How many, at least 1.
        count: u64,
    },
}

/// The 64 bytes before a payload, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader {
    /// Which volume of the group.
    pub volume: VolumeSlot,
    /// Which block, or the first of the zeroes.
    pub block: BlockIndex,
    /// Orders several records of the same block.
    pub capture: CaptureNumber,
    /// The rest.
    pub body: RecordBody,
}

impl RecordHeader {
    /// Bytes of the payload that follows.
    pub fn payload_len(&self) -> usize {
        match self.body {
            RecordBody::Data { payload_len, .. } => payload_len as usize,
            RecordBody::Zeroes { .. } => 0,
        }
    }

    /// Number of blocks that the record is about.
    pub fn block_count(&self) -> u64 {
        match self.body {
            RecordBody::Data { .. } => 1,
            RecordBody::Zeroes { count } => count,
        }
    }

    /// The 64 bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let (kind, encoding, payload_len) = match self.body {
            RecordBody::Data { encoding: Encoding::Raw, payload_len, .. } => (1, 0, payload_len),
            RecordBody::Data { encoding: Encoding::Zstd, payload_len, .. } => (1, 1, payload_len),
            RecordBody::Zeroes { .. } => (2, 0, 0),
        };
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = kind;
        out[5] = encoding;
        out[8..12].copy_from_slice(&self.volume.0.to_le_bytes());
        out[12..16].copy_from_slice(&payload_len.to_le_bytes());
        out[16..24].copy_from_slice(&self.block.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.capture.0.to_le_bytes());
        match self.body {
            RecordBody::Data { digest, .. } => out[32..].copy_from_slice(&digest.0),
            RecordBody::Zeroes { count } => out[32..40].copy_from_slice(&count.to_le_bytes()),
        }
        out
    }

    /// Checks every field against what this version knows and against `limits`; the volume's geometry is checked
    /// by [`Self::check_geometry`].
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, RecordError> {
        let short = |_| RecordError::Bounds("length");
        let mut r = FieldReader::new(bytes);
        if r.array("magic").map_err(short)? != MAGIC {
            return Err(RecordError::Magic);
        }
        let [kind, encoding, cipher, reserved] = r.array("kinds").map_err(short)?;
        let volume = VolumeSlot(r.u32("volume").map_err(short)?);
        let payload_len = r.u32("payload length").map_err(short)?;
        let block = BlockIndex(r.u64("block").map_err(short)?);
        let capture = CaptureNumber(r.u64("capture").map_err(short)?);
        let tail: [u8; 32] = r.array("digest").map_err(short)?;
        for (field, value) in [("cipher", cipher), ("reserved byte", reserved)] {
            if value != 0 {
                return Err(RecordError::Unknown { field, value });
            }
        }
        let body = match kind {
            1 => {
                let encoding = match encoding {
                    0 => Encoding::Raw,
                    1 => Encoding::Zstd,
                    value => return Err(RecordError::Unknown { field: "encoding", value }),
                };
                if payload_len == 0 || payload_len > MAX_BLOCK_SIZE {
                    return Err(RecordError::Bounds("payload length"));
                }
                if tail == [0; 32] {
                    return Err(RecordError::Bounds("digest of a data block"));
                }
                RecordBody::Data { digest: BlockDigest(tail), encoding, payload_len }
            }
            2 => {
                let (count, rest) = tail.split_first_chunk::<8>().ok_or(RecordError::Bounds("count"))?;
                let count = u64::from_le_bytes(*count);
                let same_page = count >= 1
                    && block.0.checked_add(count - 1).is_some_and(|last| BlockIndex(last).page() == block.page());
                if encoding != 0 || payload_len != 0 || rest != [0; 24] || !same_page {
                    return Err(RecordError::Bounds("zero run"));
                }
                RecordBody::Zeroes { count }
            }
            value => return Err(RecordError::Unknown { field: "kind", value }),
        };
        Ok(Self { volume, block, capture, body })
    }

    /// Whether the record fits a volume of this geometry: inside it, and no payload longer than its block.
    pub fn check_geometry(&self, geometry: Geometry) -> Result<(), RecordError> {
        let last = self.block.0.checked_add(self.block_count() - 1).ok_or(RecordError::Bounds("block index"))?;
        if !geometry.contains(BlockIndex(last)) {
            return Err(RecordError::Bounds("block index"));
        }
        if let RecordBody::Data { encoding, payload_len, .. } = self.body {
            let block_len = geometry.block_len(self.block);
            let fits = match encoding {
                Encoding::Raw => payload_len as usize == block_len,
                Encoding::Zstd => (payload_len as usize) < block_len,
            };
            if !fits {
                return Err(RecordError::Bounds("payload length"));
            }
        }
        Ok(())
    }
}

/// How much is done to make blocks smaller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// Nothing.
    None,
    /// A zstd level.
    Level(i32),
}

/// Makes records; keeps its compressor, since a new one per block costs a fifth more.
pub struct Encoder {
    compressor: zstd::bulk::Compressor<'static>,
    effort: Effort,
    /// A block is compressed into here: the records' memory need not be cleared for what it may come to.
    packed: Vec<u8>,
    /// Blocks in a row that were not worth it.
    raw_run: u32,
}

/// Blocks in a row that did not become smaller, after which one that looks random is not tried.
const RAW_RUN: u32 = 4;
/// But one of so many is.
const TRIED_AGAIN: u32 = 16;
/// Bytes of a block that are counted to see whether it looks random, in so many places.
const SAMPLE: usize = 1024;
const SAMPLES: usize = 4;
/// Pairs of equal bytes in the sample, squares summed up: random bytes have 69,600 and hardly ever 72,000 of 4,096;
/// what an entropy coder makes smaller by three in a hundred has more than 73,000.
const RANDOM: u32 = 73_000;

/// Whether each byte is about as frequent as any other, by a sample.
fn looks_random(plain: &[u8]) -> bool {
    if plain.len() < SAMPLE * SAMPLES {
        return false;
    }
    let mut counts = [0u32; 256];
    for place in plain.chunks(plain.len() / SAMPLES).take(SAMPLES) {
        for byte in &place[..SAMPLE] {
            counts[usize::from(*byte)] += 1;
        }
    }
    counts.iter().map(|n| n * n).sum::<u32>() < RANDOM
}

impl Encoder {
    /// With this zstd level.
    pub fn new(level: i32) -> std::io::Result<Self> {
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        // The receiver knows the block's length and digest: neither is stored again in the frame.
        compressor.set_parameter(zstd::zstd_safe::CParameter::ContentSizeFlag(false))?;
        compressor.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(false))?;
        compressor.set_parameter(zstd::zstd_safe::CParameter::DictIdFlag(false))?;
        Ok(Self { compressor, effort: Effort::Level(level), packed: Vec::new(), raw_run: 0 })
    }

    /// From the next block on.
    pub fn set_effort(&mut self, effort: Effort) -> std::io::Result<()> {
        if let (Effort::Level(level), true) = (effort, effort != self.effort) {
            self.compressor.set_compression_level(level)?;
        }
        self.effort = effort;
        Ok(())
    }

    /// Bytes of the compressed block, in `packed`; `None` where it does not become smaller, or hardly can.
    fn pack(&mut self, plain: &[u8]) -> Option<usize> {
        if self.effort == Effort::None {
            return None;
        }
        let is_hopeless = self.raw_run >= RAW_RUN && !self.raw_run.is_multiple_of(TRIED_AGAIN) && looks_random(plain);
        let packed = if is_hopeless {
            None
        } else {
            if self.packed.len() < plain.len() {
                self.packed.resize(plain.len(), 0);
            }
            // A buffer one byte short of the block makes zstd give up where it would not gain anything.
            self.compressor.compress_to_buffer(plain, &mut self.packed[..plain.len() - 1]).ok()
        };
        self.raw_run = if packed.is_none() { self.raw_run.wrapping_add(1) } else { 0 };
        packed
    }

    /// Appends the record of one block that is not all zeroes. Raw where zstd does not make it smaller.
    pub fn encode(
        &mut self,
        volume: VolumeSlot,
        block: BlockIndex,
        capture: CaptureNumber,
        digest: BlockDigest,
        plain: &[u8],
        out: &mut Vec<u8>,
    ) {
        debug_assert!(!digest.is_zero() && plain.len() <= MAX_BLOCK_SIZE as usize);
        let packed = self.pack(plain);
        let (encoding, payload) = match packed {
            Some(len) => (Encoding::Zstd, &self.packed[..len]),
            None => (Encoding::Raw, plain),
        };
        let body = RecordBody::Data { digest, encoding, payload_len: payload.len() as u32 };
        out.reserve(HEADER_LEN + payload.len());
        out.extend_from_slice(&RecordHeader { volume, block, capture, body }.to_bytes());
        out.extend_from_slice(payload);
    }
}

/// Appends the record of a run of zero blocks, all in one page.
pub fn encode_zeroes(volume: VolumeSlot, block: BlockIndex, count: u64, capture: CaptureNumber, out: &mut Vec<u8>) {
    let header = RecordHeader { volume, block, capture, body: RecordBody::Zeroes { count } };
    out.extend_from_slice(&header.to_bytes());
}

/// Bytes that were hashed and have the digest that their record states. There is no other way to make one.
#[derive(Debug)]
pub struct VerifiedBlock<'a> {
    volume: VolumeSlot,
    block: BlockIndex,
    digest: BlockDigest,
    bytes: &'a [u8],
}

impl<'a> VerifiedBlock<'a> {
    /// Which volume of the group.
    pub fn volume(&self) -> VolumeSlot {
        self.volume
    }
    /// Which block.
    pub fn block(&self) -> BlockIndex {
        self.block
    }
    /// Its digest.
    pub fn digest(&self) -> BlockDigest {
        self.digest
    }
    /// The block's bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// Opens records; keeps its decompressor and its buffer.
pub struct Verifier {
    decompressor: zstd::bulk::Decompressor<'static>,
    scratch: Vec<u8>,
}

impl Verifier {
    /// A fresh one.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { decompressor: zstd::bulk::Decompressor::new()?, scratch: Vec::new() })
    }

    /// Decompresses into at most one block and hashes it. The record must be of kind data and fit the geometry.
    pub fn verify<'a>(
        &'a mut self,
        header: &RecordHeader,
        payload: &'a [u8],
        geometry: Geometry,
    ) -> Result<VerifiedBlock<'a>, RecordError> {
        header.check_geometry(geometry)?;
        let RecordBody::Data { digest, encoding, payload_len } = header.body else {
            return Err(RecordError::Bounds("kind"));
        };
        if payload.len() != payload_len as usize {
            return Err(RecordError::Bounds("payload length"));
        }
        let block_len = geometry.block_len(header.block);
        let bytes = match encoding {
            Encoding::Raw => payload,
            Encoding::Zstd => {
                if !is_plain_frame(payload) {
                    return Err(RecordError::Decompress(header.block));
                }
                self.scratch.resize(block_len, 0);
                // The output buffer bounds what a hostile frame can make of itself.
                let n = self.decompressor.decompress_to_buffer(payload, &mut self.scratch[..block_len]);
                if n.ok() != Some(block_len) {
                    return Err(RecordError::Decompress(header.block));
                }
                &self.scratch[..block_len]
            }
        };
        let found = BlockDigest::of(bytes);
        if found != digest {
            return Err(RecordError::Digest { block: header.block, expected: digest, found });
        }
        Ok(VerifiedBlock { volume: header.volume, block: header.block, digest, bytes })
    }
}

/// Whether it is exactly one zstd frame as [`Encoder`] writes them: without content size, checksum and dictionary, and
/// with a window of at most the longest block. Only what every reader can read may become a point.
fn is_plain_frame(payload: &[u8]) -> bool {
    /// RFC 8878, 3.1.1.
    const MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();
    let Some(([m @ .., descriptor, window], _)) = payload.split_first_chunk::<6>() else { return false };
    // RFC 8878, 3.1.1.1.2.
    let base = 1u64 << (10 + (window >> 3));
    let window = base + base / 8 * u64::from(window & 7);
    *m == MAGIC
        && *descriptor == 0
        && window <= u64::from(MAX_BLOCK_SIZE)
        && zstd::zstd_safe::find_frame_compressed_size(payload) == Ok(payload.len())
}

/// The first record of some bytes, and what follows it.
#[derive(Debug)]
pub struct Split<'a> {
    /// The record's header.
    pub header: RecordHeader,
    /// The record's payload.
    pub payload: &'a [u8],
    /// The bytes after the record.
    pub rest: &'a [u8],
}

/// Splits the first record off `bytes`: `None` if it is not whole yet.
pub fn split_record(bytes: &[u8]) -> Result<Option<Split<'_>>, RecordError> {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let header = RecordHeader::parse(header)?;
    let split = rest.split_at_checked(header.payload_len());
    Ok(split.map(|(payload, rest)| Split { header, payload, rest }))
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
