//! The golden store: a small one with all that a store can hold, in files that were written once and are never edited.
//!
//! Read [`load`] for what is in it. `BACKHAUL_WRITE_GOLDEN=1` writes it where there is none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use backhaul_protocol::consistency::{Checked, Consistency};
use backhaul_protocol::digest::{BlockDigest, DeltaDigester, ObjectDigest, RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{
    AgentId, CaptureNumber, CommitId, Generation, GroupId, Incarnation, LogSeq, Name, RepositoryId, VolumeId,
    VolumeSlot, WriterNonce,
};
use backhaul_protocol::record::{Encoder, encode_zeroes, split_record};
use backhaul_protocol::store::checkpoint::{Checkpoint, PointSummary, Sharing, StoreFormat, write_seq};
use backhaul_protocol::store::entry::Entry;
use backhaul_protocol::store::envelope::Kind;
use backhaul_protocol::store::fleet::{AgentRole, JoinedAgent, Redeemed, Token, write_group_name, write_times};
use backhaul_protocol::store::key::{self, GroupKeys, ObjectId, ObjectKey};
use backhaul_protocol::store::log::{
    Body, CreateBody, MachineId, PointBody, PointVolume, PromoteBody, Record, UnixMillis,
};
use backhaul_protocol::store::map::{self, MapBuilder, MapRef, Role, Row};
use backhaul_protocol::store::segment::{DraftBinding, SegmentBuilder, SegmentRef, VolumeEntry};
use bytes::Bytes;

const GROUP: GroupId = GroupId([0x11; 16]);
const REPOSITORY: RepositoryId = RepositoryId([0x10; 16]);
const AGENT: AgentId = AgentId([0x88; 16]);
const MACHINE: MachineId = MachineId([0x99; 32]);
const BLOCK: u32 = 16_384;
const TIME: i64 = 1_763_800_000_000;

/// The name of the group.
pub const NAME: &str = "web";
/// Its volumes, and their lengths: one ends in a short block, one is mostly holes.
pub const VOLUMES: [(&str, u64); 2] = [("root", 5 * BLOCK as u64 + 700), ("data", 40 * BLOCK as u64)];
/// Its points: one in a segment, one in its log record, one folded into base maps, one on an older map with a delta map
/// and a segment of its own.
pub const POINTS: [u64; 4] = [2, 3, 4, 5];

/// A block of the volume when it was written for the `version`th time: the short one does not compress.
fn block(slot: u32, index: u64, version: u8, len: usize) -> Vec<u8> {
    let seed = blake3::hash(&[slot as u8, index as u8, version]);
    if len < BLOCK as usize {
        let mut out = vec![0; len];
        blake3::Hasher::new_keyed(seed.as_bytes()).finalize_xof().fill(&mut out);
        return out;
    }
    seed.as_bytes().iter().copied().cycle().take(len).collect()
}

/// Which version of which block each point has; what is not named is zero.
fn contents(point: u64) -> BTreeMap<(u32, u64), u8> {
    let mut blocks: BTreeMap<(u32, u64), u8> = (0..6).map(|i| ((0, i), 1)).collect();
    blocks.extend([((1, 1), 1), ((1, 30), 1), ((1, 31), 1)]);
    if point >= 3 {
        blocks.insert((0, 2), 2);
        blocks.remove(&(1, 31));
    }
    if point >= 5 {
        blocks.insert((0, 1), 3);
        blocks.insert((1, 3), 3);
    }
    blocks
}

fn geometry(slot: u32) -> Geometry {
    Geometry::new(BLOCK, VOLUMES[slot as usize].1).expect("legal")
}

fn block_of(slot: u32, index: u64, version: u8) -> Vec<u8> {
    block(slot, index, version, geometry(slot).block_len(BlockIndex(index)))
}

/// What a volume holds in a point, from its definition and not from the store.
pub fn image(point: u64, slot: u32) -> Vec<u8> {
    let mut out = vec![0; VOLUMES[slot as usize].1 as usize];
    for ((own, index), version) in contents(point) {
        if own == slot {
            let bytes = block_of(slot, index, version);
            out[index as usize * BLOCK as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
    }
    out
}

fn digests(point: u64, slot: u32) -> Vec<BlockDigest> {
    image(point, slot).chunks(BLOCK as usize).map(BlockDigest::of).collect()
}

fn volume_digest(point: u64, slot: u32) -> VolumeDigest {
    VolumeDigester::of(geometry(slot), &[RangeDigest::of(&digests(point, slot))])
}

fn name(text: &str) -> Name {
    text.parse().expect("legal")
}

/// What changed since the point before, as records of this capture.
fn changes(point: u64, builder: &mut SegmentBuilder, only: impl Fn(u32) -> bool) {
    let (before, now) = (if point == 2 { BTreeMap::new() } else { contents(point - 1) }, contents(point));
    let mut encoder = Encoder::new(1).expect("zstd");
    let mut push = |record: &[u8]| {
        let split = split_record(record).expect("own").expect("whole");
        builder.push(&split.header, split.payload);
    };
    let capture = CaptureNumber(point * 10);
    for ((slot, index), version) in now.iter().filter(|(at, version)| before.get(at) != Some(version)) {
        if only(*slot) {
            let (bytes, mut record) = (block_of(*slot, *index, *version), Vec::new());
            let digest = BlockDigest::of(&bytes);
            encoder.encode(VolumeSlot(*slot), BlockIndex(*index), capture, digest, &bytes, &mut record);
            push(&record);
        }
    }
    for (slot, index) in before.keys().filter(|at| !now.contains_key(at)) {
        let mut record = Vec::new();
        encode_zeroes(VolumeSlot(*slot), BlockIndex(*index), 1, capture, &mut record);
        push(&record);
    }
}

/// Objects under their keys, as they come to be.
#[derive(Default)]
struct Store {
    objects: BTreeMap<ObjectKey, Bytes>,
    records: Vec<(Record, ObjectDigest)>,
}

impl Store {
    fn put(&mut self, key: ObjectKey, bytes: Vec<u8>) {
        assert!(self.objects.insert(key.clone(), bytes.into()).is_none(), "{key} twice");
    }

    fn id(&self, n: u32) -> ObjectId {
        ObjectId { seq: self.head(), generation: Generation(2), session: 0xdead_beef, n }
    }

    fn head(&self) -> LogSeq {
        LogSeq(self.records.len() as u64 - 1)
    }

    fn binding(&self) -> DraftBinding {
        DraftBinding { group: GROUP, base_commit: self.records.last().expect("a record").0.commit }
    }

    fn append(&mut self, generation: u16, body: Body) {
        let seq = LogSeq(self.records.len() as u64);
        let record = Record {
            group: GROUP,
            seq,
            previous: self.records.last().map_or(ObjectDigest([0; 32]), |(_, hash)| *hash),
            generation: Generation(generation),
            commit: CommitId([0x30 + seq.0 as u8; 16]),
            nonce: WriterNonce([0x40 + seq.0 as u8; 16]),
            time: UnixMillis(TIME + seq.0 as i64 * 1000),
            body,
        };
        let bytes = record.to_bytes();
        // Read back: the places of inline records are known only when the record is laid out.
        let read = Record::parse(GROUP, seq, &bytes).expect("own");
        self.records.push((read, Record::hash(&bytes)));
        self.put(GroupKeys(GROUP).log(seq), bytes);
    }

    fn segment(&mut self, n: u32, point: u64, only: impl Fn(u32) -> bool) -> (SegmentRef, Vec<VolumeEntry>) {
        let mut builder = SegmentBuilder::with_capacity(1 << 16);
        changes(point, &mut builder, only);
        let sealed = builder.seal(self.binding(), self.id(n));
        self.put(GroupKeys(GROUP).segment(sealed.reference.id), sealed.bytes);
        (sealed.reference, sealed.index)
    }

    fn map(&mut self, builder: MapBuilder) -> MapRef {
        let (object, reference, _) = builder.finish();
        self.put(GroupKeys(GROUP).map(object.id), object.bytes);
        reference
    }

    fn row_of(&self, reference: MapRef) -> Row {
        let bytes = &self.objects[&GroupKeys(GROUP).map(reference.id)];
        let (head, _) = map::read_head(&bytes[..map::PAGES_START], bytes.len() as u64).expect("own");
        let rows = &bytes[head.rows_offset as usize..];
        Row::parse(rows[..map::ROW_LEN].try_into().expect("its length")).expect("own")
    }

    fn point(
        &self,
        point: u64,
        bases: [Option<MapRef>; 2],
        deltas: Vec<MapRef>,
        segments: Vec<SegmentRef>,
    ) -> PointBody {
        let mut delta = DeltaDigester::default();
        let before = |slot| if point == 2 { Vec::new() } else { digests(point - 1, slot) };
        for slot in [0, 1] {
            for (i, digest) in digests(point, slot).into_iter().enumerate() {
                if before(slot).get(i).copied().unwrap_or(BlockDigest::ZERO) != digest {
                    delta.push(VolumeSlot(slot), BlockIndex(i as u64), digest);
                }
            }
        }
        let volume = |slot: u32| PointVolume {
            slot: VolumeSlot(slot),
            id: VolumeId([slot as u8 + 0x50; 16]),
            name: name(VOLUMES[slot as usize].0),
            incarnation: Incarnation(1),
            geometry: geometry(slot),
            digest: volume_digest(point, slot),
            checked: Checked::Digest,
            full_scan: UnixMillis(TIME),
            base: bases[slot as usize],
        };
        PointBody {
            base: self.head(),
            consistency: Consistency::Crash,
            capture_start: UnixMillis(TIME),
            capture_end: UnixMillis(TIME),
            max_capture: CaptureNumber(point * 10),
            delta_digest: delta.finish(),
            delta_blocks: delta.count(),
            delta_stored: 0,
            agent: AGENT,
            machine: MACHINE,
            next_slot: VolumeSlot(2),
            volumes: vec![volume(0), volume(1)],
            deltas,
            segments,
            inline: None,
        }
    }
}

/// The winners of one volume among some indexes.
fn winners(slot: u32, indexes: &[&[VolumeEntry]], drop_zeroes: bool) -> Vec<Entry> {
    let mut best: BTreeMap<BlockIndex, Entry> = BTreeMap::new();
    for row in indexes.iter().flat_map(|i| i.iter()).filter(|row| row.volume == VolumeSlot(slot)) {
        let newer = best.get(&row.entry.block).is_none_or(|e| e.capture < row.entry.capture);
        if newer {
            best.insert(row.entry.block, row.entry);
        }
    }
    let zero = |e: &Entry| matches!(e.content, backhaul_protocol::store::entry::Content::Zero);
    best.into_values().filter(|e| !drop_zeroes || !zero(e)).collect()
}

/// Lays the store out by the protocol's own builders. The same every time, as long as zstd makes the same frames.
fn build() -> BTreeMap<ObjectKey, Bytes> {
    let mut s = Store::default();
    let keys = GroupKeys(GROUP);
    s.put(key::format(), StoreFormat { repository: REPOSITORY, sharing: Sharing::ManyReceivers }.to_bytes());
    s.put(key::group_name(&name(NAME)), write_group_name(GROUP));
    s.append(1, Body::Create(CreateBody { repository: REPOSITORY, name: name(NAME) }));
    s.append(2, Body::Promote(PromoteBody { agent: AGENT }));

    let (first, first_index) = s.segment(0, 2, |_| true);
    let point = s.point(2, [None; 2], Vec::new(), vec![first]);
    s.append(2, Body::Point(Box::new(point)));

    let mut builder = SegmentBuilder::with_capacity(1 << 16);
    changes(3, &mut builder, |_| true);
    let mut point = s.point(3, [None; 2], Vec::new(), vec![first]);
    point.inline = Some(builder.into_inline(ObjectId::inline(LogSeq(3))));
    s.append(2, Body::Point(Box::new(point)));
    let inline = s.records[3].0.point().expect("a point").segments[1];
    let record = &s.objects[&keys.log(LogSeq(3))];
    let rows = &record[inline.index_offset as usize..];
    let inline_index = backhaul_protocol::store::segment::read_index(&inline, rows).expect("own");

    let mut bases = [None; 2];
    for slot in [0, 1] {
        let mut builder = MapBuilder::new(s.binding(), Role::Base(VolumeSlot(slot)), s.id(10 + slot));
        let entries = winners(slot, &[&first_index, &inline_index], true);
        let range = RangeDigest::of(&digests(4, slot));
        assert!(builder.push_page(VolumeSlot(slot), PageIndex(0), &entries, range).is_none(), "small");
        bases[slot as usize] = Some(s.map(builder));
    }
    let point = s.point(4, bases, Vec::new(), Vec::new());
    s.append(2, Body::Point(Box::new(point)));

    // What is about `root` went into a delta map, `data` has a base map whose only page lies in the one before.
    let (folded, folded_index) = s.segment(0, 5, |slot| slot == 0);
    let (loose, _) = s.segment(1, 5, |slot| slot == 1);
    let mut builder = MapBuilder::new(s.binding(), Role::Delta, s.id(10));
    let entries = winners(0, &[&folded_index], false);
    assert!(builder.push_page(VolumeSlot(0), PageIndex(0), &entries, RangeDigest::ZERO).is_none(), "small");
    let delta = s.map(builder);
    assert!(folded.records == 1 && loose.records == 1);
    let old = bases[1].expect("folded");
    let mut builder = MapBuilder::new(s.binding(), Role::Base(VolumeSlot(1)), s.id(11));
    builder.replace(old.id, Vec::new());
    builder.push_old_page(s.row_of(old));
    bases[1] = Some(s.map(builder));
    let point = s.point(5, bases, vec![delta], vec![loose]);
    s.append(2, Body::Point(Box::new(point)));
    beside(&mut s);
    s.objects
}

/// Everything that no point needs.
fn beside(s: &mut Store) {
    let keys = GroupKeys(GROUP);
    let points = s.records.iter().take(4).filter_map(|(record, _)| PointSummary::of(record)).collect();
    let (record, hash) = &s.records[3];
    let checkpoint = Checkpoint { group: GROUP, seq: LogSeq(3), hash: *hash, generation: record.generation, points };
    s.put(keys.checkpoint(LogSeq(3)), checkpoint.to_bytes());
    s.put(keys.floor(), write_seq(Kind::Floor, LogSeq(0)));
    s.put(keys.head(), write_seq(Kind::Head, LogSeq(5)));
    let now = UnixMillis(TIME);
    let joined = JoinedAgent {
        agent: AGENT,
        role: AgentRole::Writer,
        key_hash: [0xbb; 32],
        machine: MACHINE,
        host: name("web1"),
        joined: now,
    };
    s.put(keys.agent(AGENT), joined.to_bytes());
    s.put(key::token(&[0xcc; 32]), Token { group: GROUP, role: AgentRole::Writer, expires: now }.to_bytes());
    s.put(key::redeemed(&[0xcc; 32]), Redeemed { key_hash: [0xbb; 32], agent: AGENT }.to_bytes());
    s.put(key::revoked(AgentId([0x77; 16])), write_times(Kind::Revoked, &[now]));
    s.put(key::seen(AGENT), write_times(Kind::Seen, &[now, now]));
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/store")
}

/// The objects of the tree.
pub fn load() -> BTreeMap<ObjectKey, Bytes> {
    if !folder().exists() && std::env::var("BACKHAUL_WRITE_GOLDEN").as_deref() == Ok("1") {
        for (key, bytes) in build() {
            let path = folder().join(key.as_str());
            std::fs::create_dir_all(path.parent().expect("below the folder")).expect("it can be made");
            std::fs::write(path, bytes).expect("there is room");
        }
    }
    let mut objects = BTreeMap::new();
    read(&folder(), &folder(), &mut objects);
    assert!(!objects.is_empty(), "{} is missing", folder().display());
    objects
}

fn read(root: &Path, folder: &Path, objects: &mut BTreeMap<ObjectKey, Bytes>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            read(root, &entry.path(), objects);
            continue;
        }
        let path = entry.path();
        let key = path.strip_prefix(root).expect("below").to_str().expect("ASCII");
        objects.insert(ObjectKey::parse(key).expect("a key"), std::fs::read(&path).expect("it is there").into());
    }
}
