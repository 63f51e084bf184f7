//! What a volume holds, from some of its blocks: how much is data, how far that compresses, how fast it is read.
//!
//! Read first: [`look`]. Bounded in bytes and time, and as long idle as at work: a volume in use hardly notices.

use std::time::{Duration, Instant};

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, ByteOffset};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::record::{Effort, Encoder};
use backhaul_seams::random;
use backhaul_volume::buffer::AlignedBuffer;
use backhaul_volume::scan::{DEVICE_READ, FILE_READ};
use backhaul_volume::{Volume, VolumeError};

use super::{Estimate, Subject};

/// Blocks that are looked at: what half of the blocks have is known to 3 %. Fewer of large blocks.
const BLOCKS: u64 = 1024;
/// Bytes that are looked at.
const BYTES: u64 = 64 << 20;
/// Looking at one volume takes no longer.
const TIME: Duration = Duration::from_secs(10);
/// Bytes that are read in a row to see how fast that is, in so many places.
const ROW: u64 = 8 << 20;
const ROWS: u64 = 4;
/// Data ranges of a sparse image that are told apart; the rest of it counts as data.
const RANGES: usize = 100_000;

/// How a look fails.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// zstd.
    #[error("can't set up the compressor: {0}")]
    Compressor(std::io::Error),
}

/// What is known of some blocks.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Tally {
    /// Looked at.
    pub blocks: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Not all zero.
    pub data: u64,
    /// Bytes of those.
    pub data_bytes: u64,
    data_squares: f64,
    /// Bytes of their records.
    pub stored: u64,
    stored_squares: f64,
    /// Hashing and compressing, one thread.
    pub worked: Duration,
    /// Hashing alone.
    pub hashed: Duration,
}

/// What a volume holds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Contents {
    /// What was looked at.
    pub tally: Tally,
    /// Blocks that may hold data: those outside the holes of an image.
    pub population: u64,
    /// Bytes that are not zero.
    pub data: Estimate,
    /// Bytes that a first sync sends and stores: records.
    pub stored: Estimate,
    /// Bytes a second, read in a row by one thread.
    pub read_rate: f64,
}

/// Looks at a volume. Not for an async task.
pub fn look(subject: &Subject, effort: Effort) -> Result<Contents, SampleError> {
    let ranges = data_blocks(subject)?;
    let population: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let most = BLOCKS.min(BYTES / u64::from(subject.geometry.block_size())).max(1);
    let wanted = most.min(population);
    // One in each of as many equal parts; in an order of chance, so that what a slow disk leaves out is no part of it.
    let mut places: Vec<u64> = (0..wanted)
        .map(|i| {
            let from = u128::from(i) * u128::from(population) / u128::from(wanted);
            let to = u128::from(i + 1) * u128::from(population) / u128::from(wanted);
            from as u64 + u64::from(random::number()) % ((to - from) as u64).max(1)
        })
        .collect();
    shuffle(&mut places);
    let blocks = places.iter().map(|place| nth(&ranges, *place));
    let tally = tally(subject, effort, blocks, TIME)?;
    let block = f64::from(subject.geometry.block_size());
    let (n, data, stored) = (tally.blocks, tally.data_bytes as f64, tally.stored as f64);
    Ok(Contents {
        data: Estimate::of_sum(population, n, data, tally.data_squares, block),
        stored: Estimate::of_sum(population, n, stored, tally.stored_squares, block),
        tally,
        population,
        read_rate: read_rate(subject, &ranges)?,
    })
}

/// Reads, hashes and compresses these blocks, until the time is over.
pub fn tally(
    subject: &Subject,
    effort: Effort,
    blocks: impl IntoIterator<Item = u64>,
    time: Duration,
) -> Result<Tally, SampleError> {
    let geometry = subject.geometry;
    let mut encoder = Encoder::new(1).map_err(SampleError::Compressor)?;
    encoder.set_effort(effort).map_err(SampleError::Compressor)?;
    let mut buffer = AlignedBuffer::new(geometry.block_size() as usize);
    let (mut record, mut tally, begun) = (Vec::new(), Tally::default(), Instant::now());
    for block in blocks.into_iter().map(BlockIndex) {
        let at = Instant::now();
        if at - begun >= time && tally.blocks > 0 {
            break;
        }
        let bytes = &mut buffer[..geometry.block_len(block)];
        subject.source.read_at(geometry.offset(block), bytes)?;
        let read = Instant::now();
        let digest = BlockDigest::of(bytes);
        tally.hashed += read.elapsed();
        tally.blocks += 1;
        tally.bytes += bytes.len() as u64;
        if !digest.is_zero() {
            record.clear();
            encoder.encode(VolumeSlot(0), block, CaptureNumber(0), digest, bytes, &mut record);
            tally.worked += read.elapsed();
            tally.data += 1;
            tally.data_bytes += bytes.len() as u64;
            tally.data_squares += (bytes.len() as f64).powi(2);
            tally.stored += record.len() as u64;
            tally.stored_squares += (record.len() as f64).powi(2);
        }
        std::thread::sleep((read - at).min(Duration::from_millis(50)));
    }
    Ok(tally)
}

/// Blocks that may hold something: all of a device, those outside the holes of an image.
fn data_blocks(subject: &Subject) -> Result<Vec<std::ops::Range<u64>>, SampleError> {
    let block = u64::from(subject.geometry.block_size());
    let mut out: Vec<std::ops::Range<u64>> = Vec::new();
    let mut from = 0;
    while let Some(data) = subject.source.next_data(ByteOffset(from))? {
        let end = if out.len() < RANGES { data.end } else { subject.geometry.length() };
        let (first, last) = (data.start / block, end.div_ceil(block));
        match out.last_mut() {
            Some(before) if before.end >= first => before.end = last.max(before.end),
            _ => out.push(first..last),
        }
        from = end;
    }
    Ok(out)
}

fn nth(ranges: &[std::ops::Range<u64>], mut place: u64) -> u64 {
    for range in ranges {
        let len = range.end - range.start;
        if place < len {
            return range.start + place;
        }
        place -= len;
    }
    unreachable!("a place below the sum of all ranges")
}

/// Bytes a second, in a row.
fn read_rate(subject: &Subject, ranges: &[std::ops::Range<u64>]) -> Result<f64, SampleError> {
    let piece = if subject.source.is_device() { DEVICE_READ } else { FILE_READ };
    let length = subject.geometry.length();
    let population: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    let mut buffer = AlignedBuffer::new(piece);
    let (mut bytes, mut took) = (0, Duration::ZERO);
    for row in 0..ROWS.min(population) {
        let block = nth(ranges, population * row / ROWS.min(population));
        let first = subject.geometry.offset(BlockIndex(block)).0;
        let end = (first + ROW).min(length);
        let mut at = first;
        let begun = Instant::now();
        while at < end {
            let len = ((end - at) as usize).min(piece);
            subject.source.read_at(ByteOffset(at), &mut buffer[..len])?;
            at += len as u64;
        }
        took += begun.elapsed();
        bytes += end - first;
        std::thread::sleep(begun.elapsed().min(Duration::from_millis(200)));
        if took > TIME / 3 {
            break;
        }
    }
    Ok(bytes as f64 / took.as_secs_f64().max(1e-9))
}

/// Fisher and Yates.
pub fn shuffle(items: &mut [u64]) {
    for i in (1..items.len()).rev() {
        items.swap(i, random::number() as usize % (i + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backhaul_protocol::geometry::Geometry;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    const BLOCK: u32 = 64 << 10;

    fn subject(file: &std::path::Path) -> Subject {
        let source = Arc::new(backhaul_volume::Source::open(file).expect("an image"));
        let geometry = Geometry::new(BLOCK, source.length()).expect("legal");
        Subject { name: "x".into(), source, geometry }
    }

    #[test]
    fn holes_are_not_sampled_and_data_is() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("image");
        let file = std::fs::File::create(&path).expect("made");
        file.set_len(1 << 40).expect("sparse");
        // 200 blocks of bytes that do not compress, and 100 of zeroes, in a TiB.
        let mut noise = vec![0; 200 * BLOCK as usize];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        file.write_all_at(&noise, 1 << 39).expect("room");
        file.write_all_at(&vec![0; 100 * BLOCK as usize], 1 << 30).expect("room");
        let found = look(&subject(&path), Effort::Level(1)).expect("readable");
        assert_eq!((found.population, found.tally.blocks), (300, 300), "all of it, and no hole");
        assert_eq!(found.data, Estimate { value: f64::from(200 * BLOCK), margin: 0.0 });
        let stored = f64::from(200 * (BLOCK + 64));
        assert_eq!(found.stored, Estimate { value: stored, margin: 0.0 }, "raw, each with its header");
    }

    #[test]
    fn a_sample_tells_how_far_it_may_be_off() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("image");
        let file = std::fs::File::create(&path).expect("made");
        // Every third block of 3,000 is data, half of it compressible to nothing.
        let mut noise = vec![0; BLOCK as usize];
        blake3::Hasher::new().finalize_xof().fill(&mut noise[..BLOCK as usize / 2]);
        // Zeroes that are there: neither a hole nor room that is set aside.
        for block in 0..3000 {
            file.write_all_at(&[0; BLOCK as usize], block * u64::from(BLOCK)).expect("room");
        }
        for block in (0..3000).step_by(3) {
            file.write_all_at(&noise, block * u64::from(BLOCK)).expect("room");
        }
        let found = look(&subject(&path), Effort::Level(1)).expect("readable");
        assert!(found.tally.blocks <= BLOCKS && found.tally.bytes <= BYTES, "bounded: {found:?}");
        let truth = f64::from(1000 * BLOCK);
        // Twice the margin: once in ten thousand runs.
        assert!((found.data.value - truth).abs() < 2.0 * found.data.margin, "{found:?}");
        assert!(found.data.margin > 0.0 && found.data.margin < truth / 5.0, "{found:?}");
        let stored = found.stored.value / found.data.value;
        assert!((0.49..0.53).contains(&stored), "{stored}");
    }
}
