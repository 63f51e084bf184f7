//! What a point or a draft looks like: for every block the newest record, found in base maps, delta maps and loose
//! segments.
//!
//! Read first: [`View::page`]. A view never holds more than a few pages and table chunks of a map, whatever the size
//! of the volume; loose entries are bounded by `limits`.

use std::ops::Range;
use std::sync::Arc;

use backhaul_protocol::digest::{RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::limits::BLOCKS_PER_PAGE;
use backhaul_protocol::store::entry::{Entry, Page};
use backhaul_protocol::store::envelope::{self, FormatError, Kind};
use backhaul_protocol::store::key::GroupKeys;
use backhaul_protocol::store::log::PointBody;
use backhaul_protocol::store::map::{self, MapHead, MapRef, PAGES_START, REACH_LEN, ROW_LEN, Reached, Row};
use backhaul_protocol::store::segment::{SegmentRef, VolumeEntry, read_index};
use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::layers::apply;
use crate::read_error::ReadError;
use crate::store::ObjectStore;

/// Rows that are read at once: 128 KiB, 64 GiB of a volume with 64 KiB blocks.
const ROW_CHUNK: u64 = 1024;
/// Bytes of neighbouring pages that are read at once.
const PAGE_READ_AHEAD: u64 = 1 << 20;

/// One map of the store, read piece by piece.
#[derive(Debug)]
pub struct MapReader {
    store: Arc<dyn ObjectStore>,
    keys: GroupKeys,
    /// How points name it.
    pub reference: MapRef,
    head: MapHead,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    chunk: Option<(u64, Arc<Vec<Row>>)>,
    pages: Option<(backhaul_protocol::store::key::ObjectId, Range<u64>, Bytes)>,
}

impl MapReader {
    /// Reads and checks the map's head.
    pub async fn open(store: Arc<dyn ObjectStore>, keys: GroupKeys, reference: MapRef) -> Result<Self, ReadError> {
        let key = keys.map(reference.id);
        let bytes = store.get_range(&key, 0..PAGES_START as u64).await?;
        let (head, found) = map::read_head(&bytes, reference.size).map_err(ReadError::damaged(&key))?;
        if found != reference {
            let cause = backhaul_protocol::store::envelope::FormatError::Checksum;
            return Err(ReadError::Damaged { key, cause });
        }
        Ok(Self::with_head(store, keys, reference, head))
    }

    /// Of a map whose head was read and checked.
    pub fn with_head(store: Arc<dyn ObjectStore>, keys: GroupKeys, reference: MapRef, head: MapHead) -> Self {
        Self { store, keys, reference, head, cache: Mutex::default() }
    }

    /// The head.
    pub fn head(&self) -> &MapHead {
        &self.head
    }

    async fn chunk(&self, n: u64) -> Result<Arc<Vec<Row>>, ReadError> {
        if let Some((_, rows)) = self.cache.lock().await.chunk.as_ref().filter(|(have, _)| *have == n) {
            return Ok(rows.clone());
        }
        let key = self.keys.map(self.reference.id);
        let rows = n * ROW_CHUNK..((n + 1) * ROW_CHUNK).min(self.head.rows);
        let at = |row: u64| self.head.rows_offset + row * ROW_LEN as u64;
        let bytes = self.store.get_range(&key, at(rows.start)..at(rows.end)).await?;
        let (rows, _) = bytes.as_chunks::<ROW_LEN>();
        let rows: Result<Vec<Row>, _> = rows.iter().map(Row::parse).collect();
        let rows = Arc::new(rows.map_err(ReadError::damaged(&key))?);
        self.cache.lock().await.chunk = Some((n, rows.clone()));
        Ok(rows)
    }

    /// The row of a page, if the map names any of its blocks.
    pub async fn row(&self, volume: VolumeSlot, page: PageIndex) -> Result<Option<Row>, ReadError> {
        let (mut low, mut high) = (0, self.head.rows.div_ceil(ROW_CHUNK));
        if let Some((n, rows)) = &self.cache.lock().await.chunk {
            // Pages are mostly asked for in order: begin where the last one was found.
            if rows.first().is_some_and(|r| r.sort_key() <= (volume, page)) {
                low = *n;
                if rows.last().is_some_and(|r| r.sort_key() >= (volume, page)) {
                    high = n + 1;
                }
            }
        }
        while low < high {
            let middle = low + (high - low) / 2;
            let rows = self.chunk(middle).await?;
            match rows.binary_search_by_key(&(volume, page), Row::sort_key) {
                Ok(i) => return Ok(Some(rows[i])),
                Err(0) => high = middle,
                Err(i) if i == rows.len() => low = middle + 1,
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// The rows from number `first` on, as many as one read gives; empty at the end.
    pub async fn rows(&self, first: u64) -> Result<Vec<Row>, ReadError> {
        if first >= self.head.rows {
            return Ok(Vec::new());
        }
        let rows = self.chunk(first / ROW_CHUNK).await?;
        Ok(rows[(first % ROW_CHUNK) as usize..].to_vec())
    }

    /// The entries of a row's page.
    pub async fn entries(&self, row: &Row) -> Result<Vec<Entry>, ReadError> {
        let key = self.keys.map(row.object);
        let want = row.offset..row.offset + row.page_len();
        let cached = {
            let cache = self.cache.lock().await;
            let hit = cache
                .pages
                .as_ref()
                .filter(|(o, have, _)| *o == row.object && have.start <= want.start && want.end <= have.end);
            hit.map(|(_, have, bytes)| {
                bytes.slice((want.start - have.start) as usize..(want.end - have.start) as usize)
            })
        };
        let bytes = match cached {
            Some(bytes) => bytes,
            None => {
                let end = self.read_ahead(row, want.end).await;
                let bytes = self.store.get_range(&key, want.start..end).await?;
                let own = bytes.slice(..row.page_len() as usize);
                self.cache.lock().await.pages = Some((row.object, want.start..end, bytes));
                own
            }
        };
        row.read_page(&bytes).map_err(ReadError::damaged(&key))
    }

    /// How far the pages of the following rows lie one after the other in the same object.
    async fn read_ahead(&self, row: &Row, mut end: u64) -> u64 {
        let limit = row.offset + PAGE_READ_AHEAD;
        let cache = self.cache.lock().await;
        let Some((_, rows)) = &cache.chunk else { return end };
        let after = rows.partition_point(|r| r.sort_key() <= row.sort_key());
        for next in &rows[after..] {
            if next.object != row.object || next.offset != end || end + next.page_len() > limit {
                break;
            }
            end += next.page_len();
        }
        end
    }

    /// Every object that the map reaches, with the bytes that it uses of it.
    pub async fn reach(&self) -> Result<Vec<(Reached, u64)>, ReadError> {
        let key = self.keys.map(self.reference.id);
        let end = self.head.reach_offset + self.head.reach * REACH_LEN as u64;
        let bytes = self.store.get_range(&key, self.head.reach_offset..end).await?;
        map::read_reach(&bytes).map_err(ReadError::damaged(&key))
    }

    /// The same for who writes it down elsewhere. The reach has no checksum of its own: the whole object's is checked, and
    /// of one that is too large for that the reach is read a second time.
    pub async fn checked_reach(&self) -> Result<Vec<(Reached, u64)>, ReadError> {
        let key = self.keys.map(self.reference.id);
        if self.reference.size > MAX_CHECKED {
            let reach = self.reach().await?;
            let is_same = self.reach().await? == reach;
            return if is_same { Ok(reach) } else { Err(ReadError::damaged(&key)(FormatError::Checksum)) };
        }
        let bytes = self.store.get(&key, MAX_CHECKED as usize).await?;
        envelope::open(Kind::Map, &bytes).map_err(ReadError::damaged(&key))?;
        let reach = bytes.get(self.head.reach_offset as usize..).unwrap_or_default();
        map::read_reach(reach).map_err(ReadError::damaged(&key))
    }
}

/// Maps up to this size are read whole for their reach: all but those of volumes of terabytes. Arbitrary.
const MAX_CHECKED: u64 = 64 << 20;

/// Reads a segment's index.
pub async fn read_segment_index(
    store: &dyn ObjectStore,
    keys: GroupKeys,
    reference: &SegmentRef,
) -> Result<Vec<VolumeEntry>, ReadError> {
    let key = keys.segment(reference.id);
    let start = u64::from(reference.index_offset);
    let bytes = store.get_range(&key, start..start + reference.index_len()).await?;
    read_index(reference, &bytes).map_err(ReadError::damaged(&key))
}

/// Sorted entries of segments that no map covers yet.
#[derive(Clone, Debug, Default)]
pub struct Loose(pub Vec<VolumeEntry>);

impl Loose {
    /// Sorts.
    pub fn new(mut entries: Vec<VolumeEntry>) -> Self {
        entries.sort_by_key(VolumeEntry::sort_key);
        Self(entries)
    }
    /// The entries of one page.
    pub fn page(&self, volume: VolumeSlot, page: PageIndex) -> &[VolumeEntry] {
        let first = (volume, page.first_block());
        let after = (volume, BlockIndex(page.0.saturating_add(1).saturating_mul(BLOCKS_PER_PAGE)));
        let at = |key: (VolumeSlot, BlockIndex)| self.0.partition_point(|e| (e.volume, e.entry.block) < key);
        &self.0[at(first)..at(after)]
    }
    /// The pages that any entry is about, ascending.
    pub fn pages(&self) -> impl Iterator<Item = (VolumeSlot, PageIndex)> + '_ {
        let mut last = None;
        self.0.iter().map(|e| (e.volume, e.entry.block.page())).filter(move |p| last.replace(*p) != Some(*p))
    }
}

/// Loads the indexes of a point's loose segments.
pub async fn load_loose(
    store: &Arc<dyn ObjectStore>,
    keys: GroupKeys,
    segments: &[SegmentRef],
) -> Result<Vec<VolumeEntry>, ReadError> {
    let mut entries = Vec::new();
    for chunk in segments.chunks(16) {
        let mut reads = JoinSet::new();
        for &reference in chunk {
            let store = store.clone();
            reads.spawn(async move { read_segment_index(&*store, keys, &reference).await });
        }
        while let Some(joined) = reads.join_next().await {
            entries.extend(joined.expect("reading an index does not panic")?);
        }
    }
    Ok(entries)
}

/// One volume of a view.
#[derive(Clone, Debug)]
pub struct ViewVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// Block size and length.
    pub geometry: Geometry,
    /// What lies under everything else.
    pub base: Option<Arc<MapReader>>,
}

/// Layers of maps and loose entries; for every block the highest capture wins.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The volumes.
    pub volumes: Vec<ViewVolume>,
    /// Delta maps.
    pub deltas: Vec<Arc<MapReader>>,
    /// Entries that no map covers; several lists, so that they can be shared.
    pub loose: Vec<Arc<Loose>>,
}

impl View {
    /// Of a committed point: a bounded number of reads.
    pub async fn open(store: &Arc<dyn ObjectStore>, keys: GroupKeys, point: &PointBody) -> Result<Self, ReadError> {
        let mut volumes = Vec::new();
        for v in &point.volumes {
            let base = match v.base {
                Some(reference) => Some(Arc::new(MapReader::open(store.clone(), keys, reference).await?)),
                None => None,
            };
            volumes.push(ViewVolume { slot: v.slot, geometry: v.geometry, base });
        }
        let mut deltas = Vec::new();
        for reference in &point.deltas {
            deltas.push(Arc::new(MapReader::open(store.clone(), keys, *reference).await?));
        }
        let loose = Loose::new(load_loose(store, keys, &point.segments).await?);
        Ok(Self { volumes, deltas, loose: vec![Arc::new(loose)] })
    }

    /// The volume of this slot.
    pub fn volume(&self, slot: VolumeSlot) -> Option<&ViewVolume> {
        self.volumes.iter().find(|v| v.slot == slot)
    }

    /// Applies what the deltas and loose entries say of a page; whether they say anything.
    async fn apply_changes(&self, slot: VolumeSlot, page: &mut Page, index: PageIndex) -> Result<bool, ReadError> {
        let mut any = false;
        for delta in &self.deltas {
            if let Some(row) = delta.row(slot, index).await? {
                delta.entries(&row).await?.iter().for_each(|e| apply(page, e));
                any = true;
            }
        }
        for loose in &self.loose {
            for e in loose.page(slot, index) {
                apply(page, &e.entry);
                any = true;
            }
        }
        Ok(any)
    }

    /// The newest record of every block of a page.
    pub async fn page(&self, volume: &ViewVolume, index: PageIndex) -> Result<Page, ReadError> {
        let mut page = Page::new(index, volume.geometry.page_blocks(index));
        if let Some(base) = &volume.base
            && let Some(row) = base.row(volume.slot, index).await?
        {
            base.entries(&row).await?.iter().for_each(|e| apply(&mut page, e));
        }
        self.apply_changes(volume.slot, &mut page, index).await?;
        Ok(page)
    }

    /// Whether anything but the base map names blocks of the page.
    pub async fn is_changed(&self, slot: VolumeSlot, index: PageIndex) -> Result<bool, ReadError> {
        if self.loose.iter().any(|l| !l.page(slot, index).is_empty()) {
            return Ok(true);
        }
        for delta in &self.deltas {
            if delta.row(slot, index).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The range digest of a page: from the base map's table where nothing changed since, else from the entries. Of
    /// the last page always from the entries: the volume may have been longer when the base map was written.
    pub async fn range_digest(&self, volume: &ViewVolume, index: PageIndex) -> Result<RangeDigest, ReadError> {
        let last = index.0 + 1 == volume.geometry.pages();
        if last || self.is_changed(volume.slot, index).await? {
            return Ok(self.page(volume, index).await?.range_digest());
        }
        match &volume.base {
            Some(base) => Ok(base.row(volume.slot, index).await?.map_or(RangeDigest::ZERO, |r| r.range_digest)),
            None => Ok(RangeDigest::ZERO),
        }
    }

    /// The range digests of all pages, and with them the digest of the volume.
    pub async fn volume_digest(&self, volume: &ViewVolume) -> Result<(Vec<RangeDigest>, VolumeDigest), ReadError> {
        let pages = volume.geometry.pages();
        let mut ranges = Vec::with_capacity(pages as usize);
        for page in 0..pages {
            ranges.push(self.range_digest(volume, PageIndex(page)).await?);
        }
        let digest = VolumeDigester::of(volume.geometry, &ranges);
        Ok((ranges, digest))
    }
}
