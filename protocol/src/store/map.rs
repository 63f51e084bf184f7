//! Maps: where the newest record of each block is.
//!
//! A base map covers one volume, a delta map says what changed since in all volumes of the group. Both are pages of
//! entries and a table of rows, one row a page, sorted by (volume, page). A row may point to a page in another
//! object: an older base map whose page did not change, or a part (an object of pages only, written while a large
//! map grows). At the end stands the reach: every segment and map object that the map points to.
//!
//! Read first: [`MapBuilder`] (writing, page by page), [`MapRef`] (how a point names a map) and [`Row`].
//!
//! ```text
//!   0 64 envelope (kind 4)
//!  64 16 group
//!  80 16 what it was written for: the commit id of a draft's base record, or, where it was folded at a commit, the id of
//!        that commit, so that it is never taken for a draft's
//!  96 16 own id
//! 112  1 role: 1 base, 2 delta, 3 part      113 3 reserved 0
//! 116  4 volume slot (base only)
//! 120  8 number of rows                     128 8 where the rows begin
//! 136  8 number of reach entries            144 8 where the reach begins
//! 152  8 entries in all pages               160 32 BLAKE3 of the bytes 64 to 160
//! 192    pages, each a run of 72-byte entries
//!   ?    rows, 128 bytes each
//!   ?    reach, 32 bytes each: object id 16, what 1 (1 segment or log record, 2 map), reserved 7, live bytes 8
//! ```

use std::collections::BTreeMap;

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::digest::{ObjectDigest, RangeDigest};
use crate::geometry::PageIndex;
use crate::ids::{CommitId, GroupId, VolumeSlot};
use crate::limits::BLOCKS_PER_PAGE;
use crate::store::entry::{Content, ENTRY_LEN, Entry};
use crate::store::envelope::{self, ENVELOPE_LEN, FormatError, Kind};
use crate::store::key::ObjectId;
use crate::store::segment::DraftBinding;

/// Bytes before the first page.
pub const PAGES_START: usize = 192;
/// Bytes of a row.
pub const ROW_LEN: usize = 128;
/// Bytes of a reach entry.
pub const REACH_LEN: usize = 32;
/// A growing map writes its pages down as a part of its own at this size, bytes: one S3 PUT of ordinary size.
pub const PART_SIZE: usize = 16 << 20;

/// What a map object is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Covers one volume; what it does not name is zero.
    Base(VolumeSlot),
    /// What changed in any volume of the group.
    Delta,
    /// Pages of another map.
    Part,
}

/// How a point names a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapRef {
    /// Which object.
    pub id: ObjectId,
    /// Its bytes.
    pub size: u64,
    /// Entries in all its pages.
    pub entries: u64,
    /// BLAKE3 of the fields in its head (which are the bytes 64 to 160).
    pub head_digest: ObjectDigest,
}

impl MapRef {
    /// Bytes of a reference.
    pub const LEN: usize = 64;

    /// Appends the 64 bytes: id 16, size 8, entries 8, head digest 32.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.to_bytes());
        out.put_u64(self.size);
        out.put_u64(self.entries);
        out.extend_from_slice(&self.head_digest.0);
    }
    /// The other way.
    pub fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        Ok(Self {
            id: ObjectId::read(r)?,
            size: r.u64("map size")?,
            entries: r.u64("map entries")?,
            head_digest: ObjectDigest(r.array("map digest")?),
        })
    }
}

/// The head of a map, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapHead {
    /// What the draft was bound to that it was written for.
    pub binding: DraftBinding,
    /// Own id.
    pub id: ObjectId,
    /// What it is.
    pub role: Role,
    /// Number of rows.
    pub rows: u64,
    /// Where they begin.
    pub rows_offset: u64,
    /// Number of reach entries.
    pub reach: u64,
    /// Where they begin.
    pub reach_offset: u64,
    /// Entries in all pages.
    pub entries: u64,
}

/// Reads the first [`PAGES_START`] bytes of a map of `size` bytes.
pub fn read_head(bytes: &[u8], size: u64) -> Result<(MapHead, MapRef), FormatError> {
    let stated = envelope::open_head(Kind::Map, bytes)?;
    if stated != size || bytes.len() < PAGES_START {
        return Err(FormatError::Length { stated, found: size });
    }
    let fields = &bytes[ENVELOPE_LEN..PAGES_START - 32];
    let head_digest = ObjectDigest::of(fields);
    if bytes[PAGES_START - 32..PAGES_START] != head_digest.0 {
        return Err(FormatError::Checksum);
    }
    let mut r = FieldReader::new(fields);
    let binding = DraftBinding { group: GroupId(r.array("group")?), base_commit: CommitId(r.array("base commit")?) };
    let id = ObjectId::read(&mut r)?;
    let role = r.u32("role")?;
    let volume = VolumeSlot(r.u32("volume")?);
    let role = match role {
        1 => Role::Base(volume),
        2 => Role::Delta,
        3 => Role::Part,
        _ => return Err(FieldError::Value("role").into()),
    };
    let (rows, rows_offset) = (r.u64("rows")?, r.u64("rows")?);
    let (reach, reach_offset) = (r.u64("reach")?, r.u64("reach")?);
    let entries = r.u64("entries")?;
    let ends = |at: u64, n: u64, each: usize| n.checked_mul(each as u64).and_then(|l| l.checked_add(at));
    if ends(rows_offset, rows, ROW_LEN) != Some(reach_offset) || ends(reach_offset, reach, REACH_LEN) != Some(size) {
        return Err(FieldError::Value("map layout").into());
    }
    let head = MapHead { binding, id, role, rows, rows_offset, reach, reach_offset, entries };
    Ok((head, MapRef { id, size, entries, head_digest }))
}

/// One page of a map: where its entries are and what they hash to.
///
/// ```text
///   0 4 volume slot   4 4 number of entries   8 8 page
///  16 16 id of the object that holds it      32 8 offset there   40 8 reserved 0
///  48 32 range digest (base maps; else 0)    80 16 BLAKE3 of the page's bytes, first half
///  96 16 reserved 0                         112 16 BLAKE3 of the bytes 0 to 112, first half
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// Which volume.
    pub volume: VolumeSlot,
    /// Which page.
    pub page: PageIndex,
    /// Entries of the page.
    pub entries: u32,
    /// Which object holds them.
    pub object: ObjectId,
    /// Where they begin there.
    pub offset: u64,
    /// In a base map the digest of the page's blocks.
    pub range_digest: RangeDigest,
    /// BLAKE3 of the page's bytes, first half.
    pub checksum: [u8; 16],
}

fn half(bytes: &[u8]) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    out
}

impl Row {
    /// What rows are sorted by.
    pub fn sort_key(&self) -> (VolumeSlot, PageIndex) {
        (self.volume, self.page)
    }
    /// Bytes of the page.
    pub fn page_len(&self) -> u64 {
        u64::from(self.entries) * ENTRY_LEN as u64
    }

    fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.put_u32(self.volume.0);
        out.put_u32(self.entries);
        out.put_u64(self.page.0);
        out.extend_from_slice(&self.object.to_bytes());
        out.put_u64(self.offset);
        out.put_u64(0);
        out.extend_from_slice(&self.range_digest.0);
        out.extend_from_slice(&self.checksum);
        out.extend_from_slice(&[0; 16]);
        let checksum = half(&out[start..]);
        out.extend_from_slice(&checksum);
    }

    /// Checks and reads one row.
    pub fn parse(bytes: &[u8; ROW_LEN]) -> Result<Self, FormatError> {
        if half(&bytes[..ROW_LEN - 16]) != bytes[ROW_LEN - 16..] {
            return Err(FormatError::Checksum);
        }
        let mut r = FieldReader::new(bytes);
        let volume = VolumeSlot(r.u32("volume")?);
        let entries = r.u32("entries")?;
        let page = PageIndex(r.u64("page")?);
        let object = ObjectId::read(&mut r)?;
        let (offset, _) = (r.u64("offset")?, r.u64("zero")?);
        let range_digest = RangeDigest(r.array("range digest")?);
        let checksum = r.array("checksum")?;
        if u64::from(entries) > BLOCKS_PER_PAGE || page.0 > u64::MAX / BLOCKS_PER_PAGE {
            return Err(FieldError::Value("row").into());
        }
        Ok(Self { volume, page, entries, object, offset, range_digest, checksum })
    }

    /// Checks the page's bytes and gives its entries.
    pub fn read_page(&self, bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
        if bytes.len() as u64 != self.page_len() {
            return Err(FormatError::Length { stated: self.page_len(), found: bytes.len() as u64 });
        }
        if half(bytes) != self.checksum {
            return Err(FormatError::Checksum);
        }
        let mut r = FieldReader::new(bytes);
        let mut out = Vec::with_capacity(self.entries as usize);
        while r.remaining() > 0 {
            let entry = Entry::read(&mut r)?;
            if entry.block.page() != self.page {
                return Err(FieldError::Value("block outside its page").into());
            }
            out.push(entry);
        }
        Ok(out)
    }
}

/// What an object is that a map reaches.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reached {
    /// A segment, or a log record with inline records.
    Segment(ObjectId),
    /// A map whose pages are used.
    Map(ObjectId),
}

/// Reads the reach: every object that the map points to, with the bytes that it uses of it.
pub fn read_reach(bytes: &[u8]) -> Result<Vec<(Reached, u64)>, FormatError> {
    let mut r = FieldReader::new(bytes);
    let mut out = Vec::with_capacity(bytes.len() / REACH_LEN);
    while r.remaining() > 0 {
        let id = ObjectId::read(&mut r)?;
        let what = match r.u64("what")? {
            1 => Reached::Segment(id),
            2 => Reached::Map(id),
            _ => return Err(FieldError::Value("what is reached").into()),
        };
        out.push((what, r.u64("live bytes")?));
    }
    Ok(out)
}

/// Objects that a builder wants to be put into the store, in this order.
pub struct MapObject {
    /// Under which id.
    pub id: ObjectId,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Writes a map page by page, in bounded memory but for the rows: 128 bytes for each 1024 blocks.
pub struct MapBuilder {
    binding: DraftBinding,
    role: Role,
    next_id: ObjectId,
    pages: Vec<u8>,
    /// Rows whose pages lie in the object that is being collected.
    open_rows: usize,
    rows: Vec<Row>,
    reach: BTreeMap<Reached, u64>,
    replaced: Option<ObjectId>,
    entries: u64,
}

impl MapBuilder {
    /// An empty map. Its objects get ids from `first_id` on, counting `n` up.
    pub fn new(binding: DraftBinding, role: Role, first_id: ObjectId) -> Self {
        Self {
            binding,
            role,
            next_id: first_id,
            pages: Vec::new(),
            open_rows: 0,
            rows: Vec::new(),
            reach: BTreeMap::new(),
            replaced: None,
            entries: 0,
        }
    }

    /// The next page, after all pages before it. Gives a part to be stored when enough has come together.
    ///
    /// # Panics
    /// If the page does not come after the one before: rows are sorted.
    pub fn push_page(
        &mut self,
        volume: VolumeSlot,
        page: PageIndex,
        entries: &[Entry],
        range_digest: RangeDigest,
    ) -> Option<MapObject> {
        if entries.is_empty() {
            return None;
        }
        let start = self.pages.len();
        for entry in entries {
            entry.write(&mut self.pages);
            if let Content::Data { location, .. } = entry.content {
                *self.reach.entry(Reached::Segment(location.object)).or_default() += u64::from(location.stored_len);
            }
        }
        let row = Row {
            volume,
            page,
            entries: entries.len() as u32,
            object: self.next_id,
            offset: (PAGES_START + start) as u64,
            range_digest,
            checksum: half(&self.pages[start..]),
        };
        self.push_row(row);
        (self.pages.len() >= PART_SIZE).then(|| self.finish_part())
    }

    /// The next page, unchanged in the map that was given to [`Self::replace`].
    pub fn push_old_page(&mut self, row: Row) {
        if Some(row.object) == self.replaced {
            *self.reach.entry(Reached::Map(row.object)).or_default() += row.page_len();
        }
        self.push_row(row);
    }

    /// Begins with the reach of the map that this one replaces.
    pub fn replace(&mut self, old: ObjectId, reach: impl IntoIterator<Item = (Reached, u64)>) {
        self.replaced = Some(old);
        for (what, live) in reach {
            *self.reach.entry(what).or_default() += live;
        }
    }

    /// Takes a page of the replaced map off the reach: it is written anew, or gone.
    pub fn release(&mut self, row: &Row, entries: &[Entry]) {
        let segments = entries.iter().filter_map(|e| match e.content {
            Content::Data { location, .. } => Some((Reached::Segment(location.object), u64::from(location.stored_len))),
            Content::Zero => None,
        });
        // Pages in the replaced map itself are counted when they are kept, the others it had counted already.
        let page = (Some(row.object) != self.replaced).then_some((Reached::Map(row.object), row.page_len()));
        for (what, live) in segments.chain(page) {
            if let Some(left) = self.reach.get_mut(&what) {
                *left = left.saturating_sub(live);
                if *left == 0 {
                    self.reach.remove(&what);
                }
            }
        }
    }

    fn push_row(&mut self, row: Row) {
        assert!(self.rows.last().is_none_or(|l| l.sort_key() < row.sort_key()), "pages come in order");
        self.entries += u64::from(row.entries);
        self.rows.push(row);
    }

    fn finish_part(&mut self) -> MapObject {
        let id = self.next_id;
        self.next_id.n += 1;
        let pages = std::mem::take(&mut self.pages);
        let part: Vec<Row> = self.rows[self.open_rows..].iter().filter(|r| r.object == id).copied().collect();
        self.open_rows = self.rows.len();
        for row in &part {
            *self.reach.entry(Reached::Map(id)).or_default() += row.page_len();
        }
        let entries = part.iter().map(|r| u64::from(r.entries)).sum();
        MapObject { id, bytes: self.lay_out(id, Role::Part, pages, &part, &BTreeMap::new(), entries).0 }
    }

    /// The map itself: the last object to store, the one that a point names. Also the next unused id.
    pub fn finish(mut self) -> (MapObject, MapRef, ObjectId) {
        let id = self.next_id;
        let pages = std::mem::take(&mut self.pages);
        let (bytes, reference) = self.lay_out(id, self.role, pages, &self.rows, &self.reach, self.entries);
        (MapObject { id, bytes }, reference, ObjectId { n: id.n + 1, ..id })
    }

    fn lay_out(
        &self,
        id: ObjectId,
        role: Role,
        pages: Vec<u8>,
        rows: &[Row],
        reach: &BTreeMap<Reached, u64>,
        entries: u64,
    ) -> (Vec<u8>, MapRef) {
        let rows_offset = (PAGES_START + pages.len()) as u64;
        let reach_offset = rows_offset + (rows.len() * ROW_LEN) as u64;
        let size = reach_offset + (reach.len() * REACH_LEN) as u64;
        let mut out = envelope::begin();
        out.reserve_exact(size as usize - out.len());
        out.extend_from_slice(&self.binding.group.0);
        out.extend_from_slice(&self.binding.base_commit.0);
        out.extend_from_slice(&id.to_bytes());
        let (role, volume) = match role {
            Role::Base(volume) => (1, volume.0),
            Role::Delta => (2, 0),
            Role::Part => (3, 0),
        };
        out.put_u32(role);
        out.put_u32(volume);
        out.put_u64(rows.len() as u64);
        out.put_u64(rows_offset);
        out.put_u64(reach.len() as u64);
        out.put_u64(reach_offset);
        out.put_u64(entries);
        let head_digest = ObjectDigest::of(&out[ENVELOPE_LEN..]);
        out.extend_from_slice(&head_digest.0);
        out.extend_from_slice(&pages);
        rows.iter().for_each(|row| row.write(&mut out));
        for (what, live) in reach {
            let (id, what) = match what {
                Reached::Segment(id) => (id, 1),
                Reached::Map(id) => (id, 2),
            };
            out.extend_from_slice(&id.to_bytes());
            out.put_u64(what);
            out.put_u64(*live);
        }
        envelope::seal(Kind::Map, &mut out);
        (out, MapRef { id, size, entries, head_digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::BlockDigest;
    use crate::geometry::BlockIndex;
    use crate::ids::{CaptureNumber, Generation, LogSeq};
    use crate::store::entry::Location;

    #[test]
    fn a_map_is_read_as_it_was_written() {
        let id = ObjectId { seq: LogSeq(5), generation: Generation(1), session: 7, n: 3 };
        let binding = DraftBinding { group: GroupId([1; 16]), base_commit: CommitId([2; 16]) };
        let mut builder = MapBuilder::new(binding, Role::Base(VolumeSlot(2)), id);
        let segment = ObjectId { n: 9, ..id };
        let entries: Vec<Entry> = (0..1024)
            .map(|i| Entry {
                block: BlockIndex(1024 + i),
                count: 1,
                capture: CaptureNumber(i),
                content: Content::Data {
                    digest: BlockDigest([i as u8 | 1; 32]),
                    location: Location { object: segment, offset: 160 + i as u32 * 100, stored_len: 100 },
                },
            })
            .collect();
        assert!(builder.push_page(VolumeSlot(2), PageIndex(0), &[], RangeDigest::ZERO).is_none());
        assert!(builder.push_page(VolumeSlot(2), PageIndex(1), &entries, RangeDigest([3; 32])).is_none());
        let (object, reference, next) = builder.finish();
        assert_eq!((object.id, next.n), (id, 4));
        let (head, again) = read_head(&object.bytes[..PAGES_START], object.bytes.len() as u64).expect("own bytes");
        assert_eq!((again, head.rows, head.reach, head.entries), (reference, 1, 1, 1024));
        let at = head.rows_offset as usize;
        let row = Row::parse(object.bytes[at..at + ROW_LEN].try_into().expect("128 bytes")).expect("own bytes");
        let page = &object.bytes[row.offset as usize..(row.offset + row.page_len()) as usize];
        assert_eq!(row.read_page(page).as_deref(), Ok(&entries[..]));
        let reach = read_reach(&object.bytes[head.reach_offset as usize..]).expect("own bytes");
        assert_eq!(reach, [(Reached::Segment(segment), 102_400)]);
    }
}
