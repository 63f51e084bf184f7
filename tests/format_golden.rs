//! One stored object of every kind, written once and never edited: today's reader reads them, today's writer writes the
//! same bytes, and no damaged twin of them is believed (I8, I19, I21).
//!
//! A new format gets new files beside the old ones. Files that are missing are written by
//! `BACKHAUL_WRITE_GOLDEN=1 cargo nextest run -p backhaul-tests golden`.

use std::path::PathBuf;

use backhaul_protocol::consistency::{Checked, Consistency};
use backhaul_protocol::digest::{BlockDigest, DeltaDigest, ObjectDigest, RangeDigest, VolumeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{
    AgentId, CaptureNumber, CommitId, Generation, GroupId, Incarnation, LogSeq, Name, RepositoryId, VolumeId,
    VolumeSlot, WriterNonce,
};
use backhaul_protocol::record::{Encoding, RecordBody, RecordHeader};
use backhaul_protocol::store::checkpoint::{
    Checkpoint, PointSummary, Sharing, StoreFormat, VolumeSummary, read_seq, write_seq,
};
use backhaul_protocol::store::entry::{Content, Entry, Location};
use backhaul_protocol::store::envelope::{FormatError, Kind};
use backhaul_protocol::store::fleet::{
    AgentRole, JoinedAgent, Redeemed, Token, read_group_name, read_times, write_group_name, write_times,
};
use backhaul_protocol::store::key::ObjectId;
use backhaul_protocol::store::log::{
    Body, CreateBody, MachineId, PointBody, PointVolume, PromoteBody, Record, UnixMillis,
};
use backhaul_protocol::store::map::{self, MapBuilder, MapRef, Role};
use backhaul_protocol::store::segment::{self, DraftBinding, SegmentBuilder, SegmentRef};

const GROUP: GroupId = GroupId([0x11; 16]);

fn name(text: &str) -> Name {
    text.parse().expect("legal")
}

fn object(n: u32) -> ObjectId {
    ObjectId { seq: LogSeq(7), generation: Generation(2), session: 0xdead_beef, n }
}

fn binding() -> DraftBinding {
    DraftBinding { group: GROUP, base_commit: CommitId([0x22; 16]) }
}

/// A block that can be made again.
fn block(seed: u8) -> Vec<u8> {
    (0..16_384_u32).map(|i| (i.wrapping_mul(i).wrapping_add(u32::from(seed)) >> 3) as u8).collect()
}

fn records() -> SegmentBuilder {
    let mut builder = SegmentBuilder::with_capacity(1 << 16);
    for (volume, index, seed) in [(1, 5, 1), (0, 9, 2), (0, 3, 3)] {
        let bytes = block(seed);
        let body = RecordBody::Data { digest: BlockDigest::of(&bytes), encoding: Encoding::Raw, payload_len: 16_384 };
        let header = RecordHeader {
            volume: VolumeSlot(volume),
            block: BlockIndex(index),
            capture: CaptureNumber(100 + u64::from(seed)),
            body,
        };
        builder.push(&header, &bytes);
    }
    let zeroes = RecordHeader {
        volume: VolumeSlot(0),
        block: BlockIndex(20),
        capture: CaptureNumber(104),
        body: RecordBody::Zeroes { count: 12 },
    };
    builder.push(&zeroes, &[]);
    builder
}

fn map_object(role: Role) -> (Vec<u8>, MapRef) {
    let mut builder = MapBuilder::new(binding(), role, object(40));
    for page in [0, 2] {
        let entry = |i: u64| Entry {
            block: BlockIndex(page * 1024 + i),
            count: 1,
            capture: CaptureNumber(i),
            content: Content::Data {
                digest: BlockDigest([i as u8 + 1; 32]),
                location: Location { object: object(i as u32), offset: 160, stored_len: 64 + 16_384 },
            },
        };
        let entries: Vec<Entry> = (0..5).map(entry).collect();
        let none = builder.push_page(VolumeSlot(0), PageIndex(page), &entries, RangeDigest([page as u8 + 1; 32]));
        assert!(none.is_none(), "small");
    }
    let (object, reference, _) = builder.finish();
    (object.bytes, reference)
}

fn record(seq: u64, body: Body) -> Record {
    Record {
        group: GROUP,
        seq: LogSeq(seq),
        previous: ObjectDigest([seq as u8; 32]),
        generation: Generation(2),
        commit: CommitId([0x33; 16]),
        nonce: WriterNonce([0x44; 16]),
        time: UnixMillis(1_763_800_000_000),
        body,
    }
}

fn point() -> Record {
    let geometry = Geometry::new(16_384, 50_000_001).expect("legal");
    let volume = |slot: u32, text: &str, base| PointVolume {
        slot: VolumeSlot(slot),
        id: VolumeId([slot as u8 + 0x50; 16]),
        name: name(text),
        incarnation: Incarnation(3),
        geometry,
        digest: VolumeDigest([slot as u8 + 0x60; 32]),
        checked: Checked::Digest,
        full_scan: UnixMillis(1_763_799_999_000),
        base,
    };
    let sealed = records().seal(binding(), object(1));
    let (_, base) = map_object(Role::Base(VolumeSlot(0)));
    record(
        8,
        Body::Point(Box::new(PointBody {
            base: LogSeq(7),
            consistency: Consistency::Crash,
            capture_start: UnixMillis(1_763_799_990_000),
            capture_end: UnixMillis(1_763_799_999_500),
            max_capture: CaptureNumber(104),
            delta_digest: DeltaDigest([0x77; 32]),
            delta_blocks: 15,
            delta_stored: 49_408,
            agent: AgentId([0x88; 16]),
            machine: MachineId([0x99; 32]),
            next_slot: VolumeSlot(2),
            volumes: vec![volume(0, "root", Some(base)), volume(1, "data", None)],
            deltas: vec![map_object(Role::Delta).1],
            segments: vec![sealed.reference],
            inline: Some(records().into_inline(ObjectId::inline(LogSeq(8)))),
        })),
    )
}

fn checkpoint() -> Checkpoint {
    let volumes = vec![VolumeSummary { name: name("root"), bytes: 50_000_001, digest: VolumeDigest([0x60; 32]) }];
    let point = |seq| PointSummary {
        seq: LogSeq(seq),
        time: UnixMillis(1_763_800_000_000),
        consistency: Consistency::Fuzzy,
        checked: Checked::Delta,
        volumes: volumes.clone(),
    };
    Checkpoint {
        group: GROUP,
        seq: LogSeq(1024),
        hash: ObjectDigest([0xaa; 32]),
        generation: Generation(2),
        points: vec![point(1), point(3)],
    }
}

/// Reads an object whole; an error if it is not to be believed.
type Read = fn(&[u8]) -> Result<(), FormatError>;

/// (file, today's bytes, how it is read)
fn kinds() -> Vec<(&'static str, Vec<u8>, Read)> {
    let format = StoreFormat { repository: RepositoryId([0x10; 16]), sharing: Sharing::ManyReceivers };
    let joined = JoinedAgent {
        agent: AgentId([0x88; 16]),
        role: AgentRole::Writer,
        key_hash: [0xbb; 32],
        machine: MachineId([0x99; 32]),
        host: name("web1"),
        joined: UnixMillis(1_763_800_000_000),
    };
    let token = Token { group: GROUP, role: AgentRole::RestoreOnly, expires: UnixMillis(1_763_803_600_000) };
    let redeemed = Redeemed { key_hash: [0xbb; 32], agent: AgentId([0x88; 16]) };
    let create = record(0, Body::Create(CreateBody { repository: RepositoryId([0x10; 16]), name: name("web") }));
    let promote = record(9, Body::Promote(PromoteBody { agent: AgentId([0x88; 16]) }));
    let now = UnixMillis(1_763_800_000_000);
    vec![
        ("format", format.to_bytes(), |b| StoreFormat::parse(b).map(drop)),
        ("name", write_group_name(GROUP), |b| read_group_name(b).map(drop)),
        ("token", token.to_bytes(), |b| Token::parse(b).map(drop)),
        ("redeemed", redeemed.to_bytes(), |b| Redeemed::parse(b).map(drop)),
        ("agent", joined.to_bytes(), |b| JoinedAgent::parse(b).map(drop)),
        ("revoked", write_times(Kind::Revoked, &[now]), |b| read_times::<1>(Kind::Revoked, b).map(drop)),
        ("seen", write_times(Kind::Seen, &[now, now]), |b| read_times::<2>(Kind::Seen, b).map(drop)),
        ("floor", write_seq(Kind::Floor, LogSeq(3)), |b| read_seq(Kind::Floor, b).map(drop)),
        ("head", write_seq(Kind::Head, LogSeq(9)), |b| read_seq(Kind::Head, b).map(drop)),
        ("log-create", create.to_bytes(), |b| Record::parse(GROUP, LogSeq(0), b).map(drop)),
        ("log-point", point().to_bytes(), |b| Record::parse(GROUP, LogSeq(8), b).map(drop)),
        ("log-promote", promote.to_bytes(), |b| Record::parse(GROUP, LogSeq(9), b).map(drop)),
        ("checkpoint", checkpoint().to_bytes(), |b| Checkpoint::parse(GROUP, LogSeq(1024), b).map(drop)),
    ]
}

fn path(kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{kind}.v1"))
}

/// The file; written now if it was asked for and there is none.
fn golden(kind: &str, today: &[u8]) -> Vec<u8> {
    let path = path(kind);
    if !path.exists() && std::env::var("BACKHAUL_WRITE_GOLDEN").as_deref() == Ok("1") {
        std::fs::write(&path, today).expect("the folder is there");
    }
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn golden_objects_are_read_and_written_the_same() {
    for (kind, today, read) in kinds() {
        let bytes = golden(kind, &today);
        assert!(bytes == today, "{kind}: today's writer writes other bytes than those in the tree");
        read(&bytes).unwrap_or_else(|e| panic!("{kind}: {e}"));
    }
}

#[test]
fn golden_objects_cut_or_flipped_anywhere_are_not_believed() {
    for (kind, today, read) in kinds() {
        let bytes = golden(kind, &today);
        // A point holds three blocks of data: not every one of its bytes, but of every region.
        let step = (bytes.len() / 4000).max(1);
        for at in (0..bytes.len()).step_by(step) {
            assert!(read(&bytes[..at]).is_err(), "{kind}: cut to {at} bytes");
            let mut twin = bytes.clone();
            twin[at] ^= 1 << (at % 8);
            assert!(read(&twin).is_err(), "{kind}: byte {at} flipped");
        }
        assert!(read(&[&bytes[..], &[0]].concat()).is_err(), "{kind}: a byte more");
        assert!(read(&vec![0; bytes.len()]).is_err(), "{kind}: zeroes");
    }
}

#[test]
fn golden_objects_are_not_taken_for_another() {
    let all = kinds();
    for (kind, bytes, _) in &all {
        for (other, _, read) in &all {
            assert!(kind == other || read(bytes).is_err(), "{kind} is taken for {other}");
        }
    }
    // Of another group, or under another number.
    let point = point().to_bytes();
    assert!(Record::parse(GroupId([9; 16]), LogSeq(8), &point).is_err());
    assert!(Record::parse(GROUP, LogSeq(7), &point).is_err());
    let points = checkpoint().to_bytes();
    assert!(Checkpoint::parse(GroupId([9; 16]), LogSeq(1024), &points).is_err());
    assert!(Checkpoint::parse(GROUP, LogSeq(2048), &points).is_err());
}

/// A later version is refused for what it is, not as damage.
#[test]
fn golden_objects_of_a_later_version_say_so() {
    for (kind, today, read) in kinds() {
        let bytes = golden(kind, &today);
        let later = later_version(&bytes);
        let error = read(&later).expect_err(kind).to_string();
        assert!(error.contains("version 9"), "{kind}: {error}");
    }
}

/// The same with version 9, at its place in the envelope.
fn later_version(bytes: &[u8]) -> Vec<u8> {
    let mut later = bytes.to_vec();
    later[10..12].copy_from_slice(&9_u16.to_le_bytes());
    later
}

fn segment_golden() -> (Vec<u8>, SegmentRef) {
    let sealed = records().seal(binding(), object(1));
    (golden("segment", &sealed.bytes), sealed.reference)
}

#[test]
fn golden_segment() {
    let (bytes, reference) = segment_golden();
    let today = records().seal(binding(), object(1));
    assert!(bytes == today.bytes, "today's writer writes other bytes than those in the tree");
    let (found_binding, found) =
        segment::read_head(&bytes[..segment::RECORDS_START], bytes.len() as u64).expect("whole");
    assert_eq!((found_binding, found), (binding(), reference));
    let rows = &bytes[reference.index_offset as usize..];
    assert_eq!(segment::read_index(&reference, rows).expect("whole"), today.index);
    // Each row leads to a record whose bytes have its digest.
    for row in &today.index {
        if let Content::Data { digest, location } = row.entry.content {
            let record = &bytes[location.offset as usize..location.end() as usize];
            assert_eq!(BlockDigest::of(&record[64..]), digest);
        }
    }
    for at in 0..segment::RECORDS_START {
        let mut twin = bytes[..segment::RECORDS_START].to_vec();
        twin[at] ^= 1;
        let other = segment::read_head(&twin, bytes.len() as u64);
        // The envelope's checksum is for who reads all of it, and eight bytes are reserved; the rest is checked at once.
        assert!(
            other.is_err() || other.is_ok_and(|o| o != (binding(), reference)) || at < 64 || (120..128).contains(&at),
            "byte {at}"
        );
        assert!(segment::read_head(&bytes[..at], bytes.len() as u64).is_err(), "cut to {at}");
    }
    for at in 0..rows.len() {
        let mut twin = rows.to_vec();
        twin[at] ^= 1;
        assert!(segment::read_index(&reference, &twin).is_err(), "index byte {at}");
        assert!(segment::read_index(&reference, &rows[..at]).is_err(), "index cut to {at}");
    }
}

#[test]
fn golden_maps() {
    for (kind, role) in [("map-base", Role::Base(VolumeSlot(0))), ("map-delta", Role::Delta)] {
        let (today, reference) = map_object(role);
        let bytes = golden(kind, &today);
        assert!(bytes == today, "{kind}: today's writer writes other bytes than those in the tree");
        let (head, found) = map::read_head(&bytes[..map::PAGES_START], bytes.len() as u64).expect("whole");
        assert_eq!((found, head.role, head.rows, head.entries), (reference, role, 2, 10));
        let rows = &bytes[head.rows_offset as usize..];
        for i in 0..2 {
            let row: &[u8; map::ROW_LEN] = rows[i * map::ROW_LEN..][..map::ROW_LEN].try_into().expect("its length");
            let row = map::Row::parse(row).expect("whole");
            let page = &bytes[row.offset as usize..][..row.page_len() as usize];
            assert_eq!(row.read_page(page).expect("whole").len(), 5);
            for at in 0..page.len() {
                let mut twin = page.to_vec();
                twin[at] ^= 1;
                assert!(row.read_page(&twin).is_err(), "{kind}: page byte {at}");
            }
        }
        let reach = &bytes[head.reach_offset as usize..][..head.reach as usize * map::REACH_LEN];
        assert_eq!(map::read_reach(reach).expect("whole").len(), 5, "five segments");
        for at in 0..map::PAGES_START {
            assert!(map::read_head(&bytes[..at], bytes.len() as u64).is_err(), "{kind}: cut to {at}");
        }
    }
}
