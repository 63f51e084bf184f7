//! Segments: immutable objects of block records with an index at their end.
//!
//! Read first: [`SegmentBuilder`] (writing) and [`SegmentRef`] (how a point names one), then [`read_index`].
//!
//! ```text
//!   0 64 envelope (kind 3)
//!  64 16 group
//!  80 16 commit id of the base point
//!  96 16 own id: base seq 6, generation 2, session 4, n 4
//! 112  4 number of records
//! 116  4 where the index begins
//! 120  8 reserved 0
//! 128 32 BLAKE3 of the index
//! 160    records, each 64 bytes header and its payload
//!   ?    index: one 64-byte row a record, sorted by (volume, block, capture)
//! ```

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::digest::{BlockDigest, ObjectDigest};
use crate::geometry::BlockIndex;
use crate::ids::{CaptureNumber, CommitId, GroupId, VolumeSlot};
use crate::limits::{MAX_SEGMENT_RECORDS, MAX_SEGMENT_SIZE};
use crate::record::{HEADER_LEN, RecordBody, RecordHeader};
use crate::store::entry::{Content, Entry, Location, stored_len_is_legal};
use crate::store::envelope::{self, ENVELOPE_LEN, FormatError, Kind};
use crate::store::key::ObjectId;

/// Bytes before the first record.
pub const RECORDS_START: usize = 160;
/// Bytes of an index row.
pub const INDEX_ROW_LEN: usize = 64;

/// What a draft is bound to; in every segment and map, so that a draft commits only on its base.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DraftBinding {
    /// Whose draft.
    pub group: GroupId,
    /// Commit id of the base point's log record.
    pub base_commit: CommitId,
}

/// An index entry and the volume that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolumeEntry {
    /// Which volume.
    pub volume: VolumeSlot,
    /// Which block, and where.
    pub entry: Entry,
}

impl VolumeEntry {
    /// The order of indexes: (volume, block, capture).
    pub fn sort_key(&self) -> (VolumeSlot, BlockIndex, CaptureNumber) {
        (self.volume, self.entry.block, self.entry.capture)
    }
}

/// How a point names a segment: where its index is, and what the index hashes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentRef {
    /// Which segment; inline for the records inside a log record.
    pub id: ObjectId,
    /// Bytes of the object; 0 for an inline one, whose log record is still being written.
    pub size: u32,
    /// Where the index begins, from the object's first byte.
    pub index_offset: u32,
    /// Rows of the index.
    pub records: u32,
    /// BLAKE3 of the index.
    pub index_digest: ObjectDigest,
}

impl SegmentRef {
    /// Bytes of a reference.
    pub const LEN: usize = 64;

    /// Bytes of the index.
    pub fn index_len(&self) -> u64 {
        u64::from(self.records) * INDEX_ROW_LEN as u64
    }

    /// Appends the 64 bytes: id 16, size 4, index offset 4, records 4, reserved 4, index digest 32.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_bytes());
        out.put_u32(self.size);
        out.put_u32(self.index_offset);
        out.put_u32(self.records);
        out.put_u32(0);
        out.extend_from_slice(&self.index_digest.0);
    }

    /// The other way, checked against the limits.
    pub fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        let id = ObjectId::read(r)?;
        let (size, index_offset, records, _) = (r.u32("size")?, r.u32("index")?, r.u32("records")?, r.u32("zero")?);
        let this = Self { id, size, index_offset, records, index_digest: ObjectDigest(r.array("index digest")?) };
        let whole = u64::from(index_offset) + this.index_len() == u64::from(size) || id.is_inline();
        if records > MAX_SEGMENT_RECORDS || size > MAX_SEGMENT_SIZE || !whole {
            return Err(FieldError::Value("segment"));
        }
        Ok(this)
    }
}

/// Collects records into a segment.
pub struct SegmentBuilder {
    bytes: Vec<u8>,
    index: Vec<VolumeEntry>,
}

/// A finished segment.
pub struct Sealed {
    /// The object's bytes.
    pub bytes: Vec<u8>,
    /// How to name it.
    pub reference: SegmentRef,
    /// Its index, sorted.
    pub index: Vec<VolumeEntry>,
}

impl SegmentBuilder {
    /// An empty one; `capacity` bytes are set aside at once.
    pub fn with_capacity(capacity: usize) -> Self {
        Self::in_buffer(Vec::with_capacity(capacity))
    }
    /// An empty one in memory that was used before.
    pub fn in_buffer(mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        bytes.resize(RECORDS_START, 0);
        Self { bytes, index: Vec::new() }
    }

    /// Whether nothing was added yet.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }
    /// Bytes so far, with the index that they will need.
    pub fn size(&self) -> usize {
        self.bytes.len() + self.index.len() * INDEX_ROW_LEN
    }
    /// Number of records so far.
    pub fn records(&self) -> usize {
        self.index.len()
    }

    /// Adds a record whose block was verified. The entry's location is filled in when the segment is sealed.
    ///
    /// # Panics
    /// If the payload is not as long as the header says.
    pub fn push(&mut self, header: &RecordHeader, payload: &[u8]) {
        assert_eq!(payload.len(), header.payload_len(), "header and payload belong together");
        let offset = self.bytes.len() as u32;
        self.bytes.extend_from_slice(&header.to_bytes());
        self.bytes.extend_from_slice(payload);
        let object = ObjectId::inline(crate::ids::LogSeq(0));
        let stored_len = (HEADER_LEN + payload.len()) as u32;
        let (count, content) = match header.body {
            RecordBody::Data { digest, .. } => {
                (1, Content::Data { digest, location: Location { object, offset, stored_len } })
            }
            RecordBody::Zeroes { count } => (count as u32, Content::Zero),
        };
        let entry = Entry { block: header.block, count, capture: header.capture, content };
        self.index.push(VolumeEntry { volume: header.volume, entry });
    }

    /// Sorts the index and lays out the object.
    pub fn seal(mut self, binding: DraftBinding, id: ObjectId) -> Sealed {
        let index_offset = self.bytes.len() as u32;
        let index = sorted_index(self.index, id, 0);
        let rows = write_index(&index, 0);
        let index_digest = ObjectDigest::of(&rows);
        self.bytes.extend_from_slice(&rows);
        let mut head = Vec::with_capacity(RECORDS_START - ENVELOPE_LEN);
        head.extend_from_slice(&binding.group.0);
        head.extend_from_slice(&binding.base_commit.0);
        head.extend_from_slice(&id.to_bytes());
        head.put_u32(index.len() as u32);
        head.put_u32(index_offset);
        head.put_u64(0);
        head.extend_from_slice(&index_digest.0);
        self.bytes[ENVELOPE_LEN..RECORDS_START].copy_from_slice(&head);
        envelope::seal(Kind::Segment, &mut self.bytes);
        let size = self.bytes.len() as u32;
        let reference = SegmentRef { id, size, index_offset, records: index.len() as u32, index_digest };
        Sealed { bytes: self.bytes, reference, index }
    }

    /// The records alone, and their index with locations from the first record's byte on: to lie inside a log
    /// record.
    pub fn into_inline(self, id: ObjectId) -> Inline {
        let records = self.bytes[RECORDS_START..].to_vec();
        let mut index = sorted_index(self.index, id, 0);
        for row in &mut index {
            if let Content::Data { location, .. } = &mut row.entry.content {
                location.offset -= RECORDS_START as u32;
            }
        }
        Inline { records, index }
    }
}

/// The records of a small commit; see [`crate::store::log`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inline {
    /// Headers and payloads.
    pub records: Vec<u8>,
    /// Sorted; locations count from the first byte of `records`.
    pub index: Vec<VolumeEntry>,
}

fn sorted_index(mut index: Vec<VolumeEntry>, id: ObjectId, shift: u32) -> Vec<VolumeEntry> {
    for row in &mut index {
        if let Content::Data { location, .. } = &mut row.entry.content {
            location.object = id;
            location.offset += shift;
        }
    }
    index.sort_by_key(VolumeEntry::sort_key);
    index
}

/// The rows of an index. `shift` is added to every offset.
///
/// ```text
///  0 4 volume slot  4 4 stored length (0 for zeroes)  8 8 block  16 8 capture  24 4 offset (0 for zeroes)
/// 28 4 count       32 32 digest (0 for zeroes)
/// ```
pub fn write_index(index: &[VolumeEntry], shift: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(index.len() * INDEX_ROW_LEN);
    for VolumeEntry { volume, entry } in index {
        let (offset, stored_len, digest) = match entry.content {
            Content::Zero => (0, 0, BlockDigest::ZERO),
            Content::Data { digest, location } => (location.offset + shift, location.stored_len, digest),
        };
        out.put_u32(volume.0);
        out.put_u32(stored_len);
        out.put_u64(entry.block.0);
        out.put_u64(entry.capture.0);
        out.put_u32(offset);
        out.put_u32(entry.count);
        out.extend_from_slice(&digest.0);
    }
    out
}

/// Checks an index against its reference and gives its entries, sorted.
pub fn read_index(reference: &SegmentRef, rows: &[u8]) -> Result<Vec<VolumeEntry>, FormatError> {
    if rows.len() as u64 != reference.index_len() {
        return Err(FormatError::Length { stated: reference.index_len(), found: rows.len() as u64 });
    }
    if ObjectDigest::of(rows) != reference.index_digest {
        return Err(FormatError::Checksum);
    }
    let mut r = FieldReader::new(rows);
    let mut out: Vec<VolumeEntry> = Vec::with_capacity(reference.records as usize);
    while r.remaining() > 0 {
        let row = read_row(&mut r, reference)?;
        if out.last().is_some_and(|last| last.sort_key() > row.sort_key()) {
            return Err(FieldError::Value("order of the index").into());
        }
        out.push(row);
    }
    Ok(out)
}

fn read_row(r: &mut FieldReader<'_>, reference: &SegmentRef) -> Result<VolumeEntry, FieldError> {
    let volume = VolumeSlot(r.u32("volume")?);
    let stored_len = r.u32("stored length")?;
    let block = BlockIndex(r.u64("block")?);
    let capture = CaptureNumber(r.u64("capture")?);
    let (offset, count) = (r.u32("offset")?, r.u32("count")?);
    let digest = BlockDigest(r.array("digest")?);
    let content = if digest.is_zero() {
        if stored_len != 0 || offset != 0 {
            return Err(FieldError::Value("zero run"));
        }
        Content::Zero
    } else {
        let location = Location { object: reference.id, offset, stored_len };
        if !stored_len_is_legal(stored_len) || location.end() > u64::from(reference.index_offset) || count != 1 {
            return Err(FieldError::Value("record's place"));
        }
        Content::Data { digest, location }
    };
    let entry = Entry { block, count, capture, content };
    if !entry.in_one_page() {
        return Err(FieldError::Value("zero run"));
    }
    Ok(VolumeEntry { volume, entry })
}

/// What the first [`RECORDS_START`] bytes of a segment say: enough to read its index where no point names it yet.
pub fn read_head(head: &[u8], size: u64) -> Result<(DraftBinding, SegmentRef), FormatError> {
    let stated = envelope::open_head(Kind::Segment, head)?;
    if stated != size || size > u64::from(MAX_SEGMENT_SIZE) || head.len() < RECORDS_START {
        return Err(FormatError::Length { stated, found: size });
    }
    let mut r = FieldReader::new(&head[ENVELOPE_LEN..RECORDS_START]);
    let group = GroupId(r.array("group")?);
    let base_commit = CommitId(r.array("base commit")?);
    let id = ObjectId::read(&mut r)?;
    let (records, index_offset, _) = (r.u32("records")?, r.u32("index")?, r.u64("zero")?);
    let index_digest = ObjectDigest(r.array("index digest")?);
    let reference = SegmentRef { id, size: size as u32, index_offset, records, index_digest };
    if u64::from(index_offset) + reference.index_len() != size || records > MAX_SEGMENT_RECORDS {
        return Err(FieldError::Value("segment").into());
    }
    Ok((DraftBinding { group, base_commit }, reference))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, LogSeq};
    use crate::record::Encoder;

    #[test]
    fn a_segment_is_read_as_it_was_written() {
        let mut builder = SegmentBuilder::with_capacity(1 << 16);
        let mut encoder = Encoder::new(1).expect("zstd");
        for (block, capture) in [(9, 1), (3, 2), (9, 3)] {
            let plain = vec![capture as u8; 65536];
            let mut out = Vec::new();
            let digest = BlockDigest::of(&plain);
            encoder.encode(VolumeSlot(1), BlockIndex(block), CaptureNumber(capture), digest, &plain, &mut out);
            let split = crate::record::split_record(&out).expect("own").expect("whole");
            builder.push(&split.header, split.payload);
        }
        let body = RecordBody::Zeroes { count: 24 };
        builder.push(
            &RecordHeader { volume: VolumeSlot(0), block: BlockIndex(1000), capture: CaptureNumber(4), body },
            &[],
        );
        let binding = DraftBinding { group: GroupId([1; 16]), base_commit: CommitId([2; 16]) };
        let id = ObjectId { seq: LogSeq(5), generation: Generation(1), session: 7, n: 0 };
        let sealed = builder.seal(binding, id);
        assert!(envelope::open(Kind::Segment, &sealed.bytes).is_ok());
        let (found, reference) =
            read_head(&sealed.bytes[..RECORDS_START], sealed.bytes.len() as u64).expect("own bytes");
        assert_eq!((found, reference), (binding, sealed.reference));
        let index = read_index(&reference, &sealed.bytes[reference.index_offset as usize..]).expect("own bytes");
        assert_eq!(index, sealed.index);
        let order: Vec<_> = index.iter().map(|e| (e.volume.0, e.entry.block.0, e.entry.capture.0)).collect();
        assert_eq!(order, [(0, 1000, 4), (1, 3, 2), (1, 9, 1), (1, 9, 3)]);
        for row in index {
            let Content::Data { location, digest } = row.entry.content else { continue };
            let record = &sealed.bytes[location.offset as usize..location.end() as usize];
            let header = crate::record::split_record(record).expect("own").expect("whole").header;
            assert!(matches!(header.body, RecordBody::Data { digest: d, .. } if d == digest));
        }
    }
}
