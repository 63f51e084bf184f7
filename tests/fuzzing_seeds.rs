//! Inputs that begin each corpus. Read [`all`].

use std::path::Path;

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{BlockDigest, DeltaDigest, RangeDigest, VolumeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::ids::{
    AgentId, CaptureNumber, CommitId, Generation, GroupId, Incarnation, LogSeq, StateId, VolumeId, VolumeSlot,
    WriterNonce,
};
use backhaul_protocol::record::{Encoder, encode_zeroes};
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::store::map::{self, Row};
use backhaul_protocol::wire::frame;
use backhaul_protocol::wire::hello::agent_hello;
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Committed, DraftPages, Open, OpenVolume, Opened, OpenedVolume, Reason,
    ReceiverMessage, Refusal, VolumesChanged,
};

type Seed = (&'static str, usize, Vec<u8>);

struct Seeds(Vec<Seed>);

impl Seeds {
    fn add(&mut self, target: &'static str, bytes: impl Into<Vec<u8>>) {
        let n = self.0.iter().filter(|(name, ..)| *name == target).count();
        self.0.push((target, n, bytes.into()));
    }
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)).expect("it is there")
}

/// All objects of one folder of the golden store, the first group's.
fn objects(folder: &str) -> Vec<Vec<u8>> {
    let groups = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/store/groups");
    let group = std::fs::read_dir(groups).expect("there is one").flatten().next().expect("there is one").path();
    let files = std::fs::read_dir(group.join(folder)).expect("it is there").flatten();
    files.map(|f| std::fs::read(f.path()).expect("it is there")).collect()
}

fn volume() -> OpenVolume {
    OpenVolume {
        id: VolumeId([0x50; 16]),
        name: "root".parse().expect("legal"),
        incarnation: Incarnation(1),
        geometry: Geometry::new(16_384, 82_620).expect("legal"),
    }
}

fn open() -> AgentMessage {
    AgentMessage::Open(Open {
        state: StateId([1; 16]),
        nonces: vec![WriterNonce([0x45; 16])],
        machine: MachineId([0x99; 32]),
        high_water: LogSeq(1),
        volumes: vec![volume()],
    })
}

fn commit() -> AgentMessage {
    AgentMessage::Commit(Box::new(Commit {
        commit: CommitId([7; 16]),
        base: LogSeq(1),
        generation: Generation(2),
        nonce: WriterNonce([8; 16]),
        consistency: Consistency::Crash,
        capture_start: UnixMillis(1),
        capture_end: UnixMillis(2),
        records: 1,
        max_capture: CaptureNumber(5),
        delta_digest: DeltaDigest([1; 32]),
        delta_blocks: 1,
        volumes: vec![CommitVolume { digest: VolumeDigest([2; 32]), full_scan: UnixMillis(1) }],
    }))
}

fn opened() -> Opened {
    Opened {
        generation: Generation(2),
        head: LogSeq(1),
        head_commit: CommitId([3; 16]),
        next_capture: CaptureNumber(1),
        volumes: vec![OpenedVolume { slot: VolumeSlot(0), digest: None, draft: DraftPages::default() }],
        volumes_changed: VolumesChanged::Yes,
    }
}

fn answers() -> Vec<ReceiverMessage> {
    vec![
        ReceiverMessage::Refused(Refusal { reason: Reason::Busy, text: "later".into() }),
        ReceiverMessage::Opened(Box::new(opened())),
        ReceiverMessage::Ranges { volume: VolumeSlot(0), first: 0, digests: vec![RangeDigest([1; 32])] },
        ReceiverMessage::Page {
            volume: VolumeSlot(0),
            page: 0,
            draft: vec![0; 128],
            digests: vec![BlockDigest([1; 32]); 6],
        },
        ReceiverMessage::Committed(Committed {
            seq: LogSeq(2),
            commit: CommitId([7; 16]),
            time: UnixMillis(5),
            metadata_bytes: 9,
        }),
        ReceiverMessage::Sent { volume: VolumeSlot(0), page: 0, records: 3 },
    ]
}

fn framed(operation: u8, frame: &[u8]) -> Vec<u8> {
    [&[operation][..], &(frame.len() as u16).to_le_bytes(), frame].concat()
}

fn body(message: &impl frame::Sendable) -> Vec<u8> {
    frame::encode(message).expect("fits")[4..].to_vec()
}

/// Target, number, bytes.
pub fn all() -> Vec<Seed> {
    let mut s = Seeds(Vec::new());
    wire(&mut s);
    stored(&mut s);
    sessions(&mut s);
    typed(&mut s);
    s.0
}

fn wire(s: &mut Seeds) {
    for message in [open(), commit(), AgentMessage::Page { volume: VolumeSlot(0), page: 3 }] {
        s.add("message", body(&message));
    }
    for answer in answers() {
        s.add("message", body(&answer));
    }
    s.add("hello", agent_hello());
    s.add("hello", *b"BKHL\x07\0\x09\0\0\0\0\0\0\0\0\0");
    let block: Vec<u8> = (0..16_384_u32).map(|i| (i / 100) as u8).collect();
    let mut records = Vec::new();
    let digest = BlockDigest::of(&block);
    Encoder::new(1).expect("zstd").encode(VolumeSlot(0), BlockIndex(1), CaptureNumber(2), digest, &block, &mut records);
    encode_zeroes(VolumeSlot(0), BlockIndex(5), 10, CaptureNumber(3), &mut records);
    s.add("records", [&[14][..], &(1_u64 << 20).to_le_bytes(), &records].concat());
}

fn stored(s: &mut Seeds) {
    for bytes in objects("log").into_iter().chain([golden("log-create.v1"), golden("log-promote.v1")]) {
        s.add("log_record", &bytes[64..]);
    }
    s.add("checkpoint", &golden("checkpoint.v1")[64..]);
    s.add("checkpoint", &objects("checkpoints")[0][64..]);
    for map in objects("maps") {
        s.add("map", [&[0], &map[64..]].concat());
        let (head, _) = map::read_head(&map[..map::PAGES_START], map.len() as u64).expect("golden");
        let row = &map[head.rows_offset as usize..][..map::ROW_LEN];
        let parsed = Row::parse(row.try_into().expect("a row")).expect("golden");
        if parsed.object == head.id {
            let page = &map[parsed.offset as usize..][..parsed.page_len() as usize];
            s.add("map", [&[1], row, page].concat());
        }
        s.add("map", [&[2], &map[head.reach_offset as usize..]].concat());
    }
    for segment in objects("segments") {
        s.add("segment", &segment[64..]);
    }
    for (which, name) in
        ["format", "name", "token", "redeemed", "agent", "revoked", "seen", "floor", "head"].iter().enumerate()
    {
        let bytes = golden(&format!("{name}.v1"));
        s.add("fleet", [&[which as u8], &bytes[64..]].concat());
        s.add("envelope", bytes);
    }
}

fn sessions(s: &mut Seeds) {
    let (opens, commits) = (framed(0, &body(&open())), framed(3, &body(&commit())));
    let answers: Vec<Vec<u8>> = answers().iter().map(|a| framed(6, &body(a))).collect();
    let ranges = [&[1, 0][..], &[0; 8]].concat();
    let page = [&[2, 0][..], &[0; 8]].concat();
    s.add(
        "source",
        [&opens[..], &answers[1], &ranges, &answers[2], &page, &answers[3], &commits, &answers[4]].concat(),
    );
    s.add("source", [&opens[..], &answers[1], &[4], &opens, &answers[0]].concat());
    s.add("source", [&opens[..], &[5, 255, 255, 0, 0, 0, 0, 0, 0], &answers[1]].concat());
    let commits = framed(1, &body(&commit()));
    let header = [&[4][..], &backhaul_header()].concat();
    s.add("sink", [&[0][..], &opens, &header, &commits, &[2, 0, 3]].concat());
    s.add("sink", [&[1][..], &opens, &commits, &[2, 1]].concat());
    let point = objects("log").into_iter().max_by_key(Vec::len).expect("a point");
    s.add("sink", [&framed(2, &point[64..])[..], &opens, &commits, &[2, 3, 3]].concat());
}

fn backhaul_header() -> [u8; 64] {
    let mut record = Vec::new();
    encode_zeroes(VolumeSlot(0), BlockIndex(1), 2, CaptureNumber(3), &mut record);
    record.try_into().expect("a header")
}

fn typed(s: &mut Seeds) {
    let keys = ["groups/11111111111111111111111111111111/log/00000000000000000001", "names/web", "format", "a.b/-/_"];
    let ids = [AgentId([0x88; 16]).to_string(), GroupId([0x11; 16]).to_string()];
    for text in keys.into_iter().chain(ids.iter().map(String::as_str)) {
        s.add("names", text);
    }
    let hex = "ab".repeat(32);
    s.add("token", format!("bh1.{hex}.{hex}.1763800000000.[::1]:4433"));
    for text in ["64KiB", "1.5 GiB", "15s", "7d", "web/root@latest", "@7", "2026-01-02T03:04:05Z", "[::1]:4433", "2.5%"]
    {
        s.add("arguments", text);
    }
    s.add("settings", "threads = 2\ncompression = 1\nblock_size = \"64KiB\"\nevery = \"15s\"\nreceiver = \"a:1\"\n");
    s.add("settings", "store = \"file:///x\"\nlisten = \"[::]:1\"\nmemory = \"96MiB\"\nmax_sessions = 5\n");
    for text in ["file:///srv/store", "s3://bucket/a/b?endpoint=http://h:1&region=eu-1", "s3://bucket"] {
        s.add("store_url", text);
    }
}
