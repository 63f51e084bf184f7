//! Which blocks changed, by reading them twice: for image files, and where the kernel can't be asked.
//!
//! Read first: [`Comparer::begin`]. Of a volume that takes too long to read, pieces are compared that were chosen by
//! chance and stand for the rest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_protocol::geometry::ByteOffset;
use backhaul_volume::buffer::AlignedBuffer;
use backhaul_volume::{Source, Volume, VolumeError};

use super::rate::UNIT;
use super::sample::shuffle;
use super::{Estimate, Subject};

/// Bytes of a piece: as many units as a word has bits.
const PIECE: u64 = UNIT as u64 * 64;
/// Bytes of one volume that are compared.
const BYTES: u64 = 1 << 30;

/// What a volume held when it was last read.
pub struct Comparer {
    source: Arc<Source>,
    /// In order.
    pieces: Vec<u64>,
    all_pieces: u64,
    /// 64 for each piece.
    hashes: Vec<u64>,
    buffer: AlignedBuffer,
}

impl Comparer {
    /// Reads for the first time, for so long at most. Then it is known how much can be compared each time.
    pub fn begin(subject: &Subject, time: Duration) -> Result<Self, VolumeError> {
        let all_pieces = subject.geometry.length().div_ceil(PIECE);
        let wanted = all_pieces.min(BYTES / PIECE);
        let mut chosen: Vec<u64> = (0..wanted)
            .map(|i| {
                let (from, to) = (i * all_pieces / wanted, (i + 1) * all_pieces / wanted);
                from + u64::from(backhaul_seams::random::number()) % (to - from).max(1)
            })
            .collect();
        // What there is no time for must be no part of it.
        shuffle(&mut chosen);
        let buffer = AlignedBuffer::new(PIECE as usize);
        let mut comparer =
            Self { source: subject.source.clone(), pieces: Vec::new(), all_pieces, hashes: Vec::new(), buffer };
        let begun = Instant::now();
        let mut read: Vec<(u64, [u64; 64])> = Vec::new();
        for piece in chosen {
            if begun.elapsed() >= time && !read.is_empty() {
                break;
            }
            read.push((piece, comparer.read(piece)?));
        }
        read.sort_unstable_by_key(|(piece, _)| *piece);
        comparer.pieces = read.iter().map(|(piece, _)| *piece).collect();
        comparer.hashes = read.iter().flat_map(|(_, hashes)| *hashes).collect();
        Ok(comparer)
    }

    /// Reads again: a word for each piece, a bit for each unit that is another than the last time.
    pub fn differences(&mut self) -> Result<Vec<u64>, VolumeError> {
        let mut words = Vec::with_capacity(self.pieces.len());
        for i in 0..self.pieces.len() {
            let now = self.read(self.pieces[i])?;
            let before = &mut self.hashes[i * 64..][..64];
            let differ = now.iter().zip(before.iter()).enumerate().filter(|(_, (a, b))| a != b);
            words.push(differ.fold(0, |word, (bit, _)| word | 1 << bit));
            before.copy_from_slice(&now);
        }
        Ok(words)
    }

    /// How many pieces one that is compared stands for.
    pub fn scale(&self) -> f64 {
        self.all_pieces as f64 / self.pieces.len().max(1) as f64
    }

    /// Part of the volume that is compared, from 0 to 1.
    pub fn share(&self) -> f64 {
        1.0 / self.scale()
    }

    /// Bytes that changed in all, from what changed in each piece.
    pub fn changed(&self, bytes: impl Iterator<Item = f64> + Clone, block: f64) -> Estimate {
        let squares = bytes.clone().map(|b| b * b).sum();
        Estimate::of_sum(self.all_pieces, self.pieces.len() as u64, bytes.sum(), squares, block)
    }

    /// The volume's unit that a bit of a word stands for.
    pub fn unit(&self, word: usize, bit: u32) -> u64 {
        self.pieces[word] * 64 + u64::from(bit)
    }

    fn read(&mut self, piece: u64) -> Result<[u64; 64], VolumeError> {
        let begun = Instant::now();
        let at = piece * PIECE;
        let len = (self.source.length() - at).min(PIECE) as usize;
        self.source.read_at(ByteOffset(at), &mut self.buffer[..len])?;
        let mut hashes = [0; 64];
        for (hash, unit) in hashes.iter_mut().zip(self.buffer[..len].chunks(UNIT as usize)) {
            // Changes are counted, not proven: eight bytes do.
            let digest = blake3::hash(unit);
            *hash = u64::from_le_bytes(*digest.as_bytes().first_chunk().expect("a digest has 32 bytes"));
        }
        // As long idle as at work.
        std::thread::sleep(begun.elapsed().min(Duration::from_millis(50)));
        Ok(hashes)
    }
}

impl std::fmt::Debug for Comparer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Comparer({} of {} pieces)", self.pieces.len(), self.all_pieces)
    }
}
