//! Which ranges of which objects to read for the blocks that are wanted: neighbours together, small gaps read over.
//!
//! Read first: [`plan_reads`], then [`records_of`].

use std::ops::Range;

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::BlockIndex;
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::record::{RecordBody, RecordError, RecordHeader, split_record};
use backhaul_protocol::store::entry::Location;
use backhaul_protocol::store::key::ObjectId;

/// Gaps up to this many bytes are read over: at the 100 MB/s of one S3 stream they cost less than the 20 ms and more
/// of another request.
pub const MAX_GAP: u64 = 1 << 20;
/// One read is at most this long, bytes: several are under way at once, and each is held in memory whole.
pub const MAX_READ: u64 = 4 << 20;

/// A block and where its record is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Which volume.
    pub volume: VolumeSlot,
    /// Which block.
    pub block: BlockIndex,
    /// What it must hash to.
    pub digest: BlockDigest,
    /// Where its record is.
    pub location: Location,
}

/// One range of one object, and the records in it that are wanted, by offset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    /// Which segment or log record.
    pub object: ObjectId,
    /// Which bytes.
    pub range: Range<u64>,
    /// What for.
    pub records: Vec<Wanted>,
}

/// Sorts what is wanted by object and offset and joins what lies close together.
pub fn plan_reads(mut wanted: Vec<Wanted>, max_gap: u64, max_read: u64) -> Vec<Read> {
    wanted.sort_by_key(|w| (w.location.object, w.location.offset));
    let mut reads: Vec<Read> = Vec::new();
    for w in wanted {
        let (start, end) = (u64::from(w.location.offset), w.location.end());
        match reads.last_mut() {
            Some(last)
                if last.object == w.location.object
                    && start <= last.range.end.saturating_add(max_gap)
                    && end.max(last.range.end) - last.range.start <= max_read =>
            {
                last.range.end = last.range.end.max(end);
                last.records.push(w);
            }
            _ => reads.push(Read { object: w.location.object, range: start..end, records: vec![w] }),
        }
    }
    reads
}

/// The bytes of one wanted record within what was read, its header checked against what is wanted. The payload is
/// for a verifier to hash.
pub fn record_in<'a>(
    read: &Read,
    bytes: &'a [u8],
    wanted: &Wanted,
) -> Result<(RecordHeader, &'a [u8], &'a [u8]), RecordError> {
    let start = u64::from(wanted.location.offset).checked_sub(read.range.start).ok_or(RecordError::Bounds("place"))?;
    let end = start + u64::from(wanted.location.stored_len);
    let raw = bytes.get(start as usize..end as usize).ok_or(RecordError::Bounds("place"))?;
    let split = split_record(raw)?.filter(|s| s.rest.is_empty()).ok_or(RecordError::Bounds("length"))?;
    let header = split.header;
    let right = header.volume == wanted.volume
        && header.block == wanted.block
        && matches!(header.body, RecordBody::Data { digest, .. } if digest == wanted.digest);
    if right { Ok((header, split.payload, raw)) } else { Err(RecordError::Bounds("identity: another block's record")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use backhaul_protocol::ids::LogSeq;

    proptest! {
        #[test]
        fn every_record_is_read_once_and_no_read_is_too_long(
            places in proptest::collection::vec((0u64..3, 0u32..10_000_000, 65u32..60_000), 0..200),
        ) {
            let wanted: Vec<Wanted> = places.iter().enumerate().map(|(i, (seq, offset, stored_len))| Wanted {
                volume: VolumeSlot(0),
                block: BlockIndex(i as u64),
                digest: BlockDigest([1; 32]),
                location: Location { object: ObjectId::inline(LogSeq(*seq)), offset: *offset, stored_len: *stored_len },
            }).collect();
            let reads = plan_reads(wanted.clone(), 4096, 1 << 20);
            let mut blocks: Vec<u64> = reads.iter().flat_map(|r| &r.records).map(|w| w.block.0).collect();
            blocks.sort_unstable();
            prop_assert_eq!(blocks, (0..wanted.len() as u64).collect::<Vec<_>>());
            for read in &reads {
                prop_assert!(read.range.end - read.range.start <= 1 << 20);
                for w in &read.records {
                    prop_assert_eq!(w.location.object, read.object);
                    prop_assert!(read.range.start <= u64::from(w.location.offset) && w.location.end() <= read.range.end);
                }
            }
        }
    }
}
