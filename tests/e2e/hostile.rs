//! Peers that do not keep to the protocol, with and without a certificate: thrown out, nothing committed, the receiver
//! lives on (I17, I18, I19).

use std::time::Duration;

use backhaul_agent::connection::unix_millis;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{BlockDigest, DeltaDigest, VolumeDigest};
use backhaul_protocol::geometry::BlockIndex;
use backhaul_protocol::ids::{CaptureNumber, CommitId, Generation, LogSeq, VolumeSlot, WriterNonce};
use backhaul_protocol::limits::MAX_PROBE_BYTES;
use backhaul_protocol::record::{Encoding, RecordBody, RecordHeader};
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::frame;
use backhaul_protocol::wire::hello::agent_hello;
use backhaul_protocol::wire::message::{
    AgentMessage, CloseCode, Commit, CommitVolume, Join, Open, OpenRead, PointSpec, Probed, ReceiverMessage,
};
use backhaul_tests::Random;
use backhaul_tests::peer::{As, Target, target, target_with};
use backhaul_transport::control::{ControlReceiver, ControlSender};

/// Says these bytes on the control stream; the receiver must close the connection.
async fn says(target: &Target, who: As, what: &str, bytes: Vec<u8>) {
    let (_endpoint, connection) = target.connect(who).await;
    let (mut send, _recv) = connection.0.open_bi().await.expect("a stream");
    // It may be thrown out while it still talks.
    let _ = send.write_all(&bytes).await;
    let _ = send.finish();
    connection.is_closed(what).await;
}

fn after_hello(bytes: &[u8]) -> Vec<u8> {
    [&agent_hello()[..], bytes].concat()
}

fn bad_streams() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = Random::printed("hostile");
    let message = |m: &AgentMessage| frame::encode(m).expect("fits");
    let renew = message(&AgentMessage::Renew { request: vec![0x30; 60_000] });
    vec![
        ("nothing", vec![]),
        ("a hello of noise", random.bytes(16)),
        ("half a hello", agent_hello()[..7].to_vec()),
        ("a hello of another version", b"BKHL\x63\0\x63\0\0\0\0\0\0\0\0\0".to_vec()),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a frame of no bytes", after_hello(&[0; 4])),
        ("a frame of 4 GiB", after_hello(&[0xff; 4])),
        ("a frame one byte too long", after_hello(&65_537_u32.to_le_bytes())),
        ("a frame that is cut", after_hello(&[100, 0, 0, 0, 1, 2, 3])),
        ("an unknown message", after_hello(&[1, 0, 0, 0, 250])),
        ("a message and more", after_hello(&[&[12, 0, 0, 0][..], &[5; 12]].concat())),
        ("a list of 2^64 items", after_hello(&[10, 0, 0, 0, 1, 253, 255, 255, 255, 255, 255, 255, 255, 255])),
        ("a request that is none", after_hello(&renew)),
        ("noise", after_hello(&[&1000_u32.to_le_bytes()[..], &random.bytes(1000)].concat())),
        ("a commit of nothing", after_hello(&message(&AgentMessage::Commit(Box::new(commit(LogSeq(1))))))),
        (
            "a question out of place",
            after_hello(&message(&AgentMessage::Page { volume: VolumeSlot(9), page: u64::MAX })),
        ),
        (
            "ranges out of place",
            after_hello(&message(&AgentMessage::Ranges { volume: VolumeSlot(0), first: u64::MAX })),
        ),
        (
            "wants out of place",
            after_hello(&message(&AgentMessage::Want { volume: VolumeSlot(0), page: 0, blocks: vec![255; 128] })),
        ),
    ]
}

fn commit(base: LogSeq) -> Commit {
    Commit {
        commit: CommitId([1; 16]),
        base,
        generation: Generation(1),
        nonce: WriterNonce([1; 16]),
        consistency: Consistency::Crash,
        capture_start: UnixMillis(0),
        capture_end: UnixMillis(0),
        records: 0,
        max_capture: CaptureNumber(0),
        delta_digest: DeltaDigest([0; 32]),
        delta_blocks: 0,
        volumes: Vec::new(),
    }
}

#[tokio::test]
async fn nonsense_from_a_stranger() {
    let mut target = target();
    for (what, bytes) in bad_streams() {
        says(&target, As::Stranger, what, bytes).await;
    }
    // A stranger with a right message that is not `Join`, and with a token that was never made.
    let open = AgentMessage::Open(target.open());
    says(&target, As::Stranger, "an open", after_hello(&frame::encode(&open).expect("fits"))).await;
    let join = Join {
        secret: [3; 32],
        request: vec![1, 2, 3],
        machine: MachineId([7; 32]),
        host: "h".parse().expect("legal"),
    };
    let join = frame::encode(&AgentMessage::Join(join)).expect("fits");
    says(&target, As::Stranger, "a join with a token out of nothing", after_hello(&join)).await;
    target.unharmed(1);
}

#[tokio::test]
async fn nonsense_from_an_agent() {
    let mut target = target();
    for (what, bytes) in bad_streams() {
        says(&target, As::Agent, what, bytes).await;
    }
    target.unharmed(1);
}

#[tokio::test]
async fn silence() {
    let mut target = target();
    let mut open = Vec::new();
    for who in [As::Stranger, As::Stranger, As::Stranger] {
        open.push(target.connect(who).await);
    }
    let (_, greeted) = &open[0];
    let control = greeted.greet().await;
    for (_, connection) in &open {
        connection.is_closed("a stranger that says nothing").await;
    }
    drop(control);
    target.unharmed(1);
}

fn header(block: u64, body: RecordBody) -> RecordHeader {
    // Above those of the first point, and no higher than a round may go: never the reason why a record is refused.
    RecordHeader { volume: VolumeSlot(0), block: BlockIndex(block), capture: CaptureNumber(1 << 20), body }
}

fn data(block: u64, digest: BlockDigest, encoding: Encoding, payload: &[u8]) -> Vec<u8> {
    let body = RecordBody::Data { digest, encoding, payload_len: payload.len() as u32 };
    [&header(block, body).to_bytes()[..], payload].concat()
}

#[tokio::test]
async fn records_that_are_wrong() {
    let mut target = target();
    let block = Random::new(3).bytes(65536);
    let right = BlockDigest::of(&block);
    // 1 GiB of zeroes in some 30 KiB, and one that says it holds one block's length.
    let bomb = bomb();
    let wrong_magic = {
        let mut bytes = data(0, right, Encoding::Raw, &block);
        bytes[0] ^= 1;
        bytes
    };
    let mut flipped = data(0, right, Encoding::Raw, &block);
    flipped[1000] ^= 1;
    let mut reserved = data(0, right, Encoding::Raw, &block);
    reserved[6] = 0xee;
    let mut other_volume = header(0, RecordBody::Data { digest: right, encoding: Encoding::Raw, payload_len: 65536 });
    other_volume.volume = VolumeSlot(77);
    let cases: Vec<(&str, &str, Vec<u8>)> = vec![
        ("noise", "wrong magic", Random::new(4).bytes(5000)),
        ("another magic", "wrong magic", wrong_magic),
        ("bytes that do not hash to the digest", "digest", flipped),
        ("reserved bytes in use", "does not know", reserved),
        ("a block beyond the end", "block", data(32, right, Encoding::Raw, &block)),
        ("a block far beyond the end", "block", data(u64::MAX, right, Encoding::Raw, &block)),
        (
            "a block that is too short",
            "payload length",
            data(0, BlockDigest::of(&block[..100]), Encoding::Raw, &block[..100]),
        ),
        ("zstd that is none", "decompress", data(0, right, Encoding::Zstd, &block[..4000])),
        ("a bomb", "decompress", data(0, right, Encoding::Zstd, &bomb)),
        ("a volume that is not in the session", "volume", [&other_volume.to_bytes()[..], &block].concat()),
        ("zeroes across pages", "zero run", header(0, RecordBody::Zeroes { count: 1025 }).to_bytes().to_vec()),
        ("zeroes beyond the end", "block", header(31, RecordBody::Zeroes { count: 2 }).to_bytes().to_vec()),
        ("no zeroes", "zero run", header(0, RecordBody::Zeroes { count: 0 }).to_bytes().to_vec()),
        ("endless zeroes", "zero run", header(0, RecordBody::Zeroes { count: u64::MAX }).to_bytes().to_vec()),
        ("half a header", "middle of a record", data(0, right, Encoding::Raw, &block)[..30].to_vec()),
        ("half a payload", "middle of a record", data(0, right, Encoding::Raw, &block)[..30_000].to_vec()),
    ];
    for (what, why, bytes) in cases {
        let (_endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        sender.send(&AgentMessage::Open(target.open())).await.expect("sent");
        let opened = receiver.receive().await.expect("an answer").expect("an answer");
        assert!(matches!(opened, ReceiverMessage::Opened(_)), "{what}: {opened:?}");
        let mut stream = connection.0.open_uni().await.expect("a stream");
        let _ = stream.write_all(&bytes).await;
        let _ = stream.finish();
        let answer = tokio::time::timeout(Duration::from_secs(15), receiver.receive()).await;
        match answer.unwrap_or_else(|_| panic!("{what}: no answer")) {
            Ok(Some(ReceiverMessage::Refused(refusal))) => {
                assert!(refusal.text.contains(why), "{what}: {}", refusal.text);
            }
            other => panic!("{what}: {other:?}"),
        }
        sender.finish();
        connection.is_closed(what).await;
    }
    target.unharmed(1);
}

/// One zstd frame that grows to 128 MiB: blocks of repeated bytes (RLE), laid out by hand.
fn bomb() -> Vec<u8> {
    // Magic; a window of 128 KiB, no content size.
    let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for i in 0..1024_u32 {
        let last = u32::from(i == 1023);
        let header = last | (1 << 1) | ((128 << 10) << 3);
        out.extend_from_slice(&header.to_le_bytes()[..3]);
        out.push(0);
    }
    out
}

#[tokio::test]
async fn commits_that_are_wrong() {
    let mut target = target();
    type Change = fn(&mut Commit);
    let changes: Vec<(&str, Change)> = vec![
        ("another base", |c| c.base = LogSeq(0)),
        ("a base in the future", |c| c.base = LogSeq(u64::MAX)),
        ("another generation", |c| c.generation = Generation(9)),
        ("too few volumes", |c| c.volumes.clear()),
        ("too many volumes", |c| c.volumes = vec![c.volumes[0]; 60]),
        ("a digest that is not true", |c| c.volumes[0].digest = VolumeDigest([9; 32])),
        ("another delta", |c| c.delta_digest = DeltaDigest([9; 32])),
        ("blocks that never came", |c| c.delta_blocks = 5),
        ("the open nonce", |c| c.nonce = WriterNonce::OPEN),
    ];
    for (what, change) in changes {
        let (endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        let mut message = empty_commit(&target, &mut sender, &mut receiver).await;
        change(&mut message);
        sender.send(&AgentMessage::Commit(Box::new(message))).await.expect("sent");
        match receiver.receive().await {
            Ok(Some(ReceiverMessage::Refused(_))) | Err(_) | Ok(None) => {}
            other => panic!("{what}: {other:?}"),
        }
        endpoint.close(CloseCode::Done, "").await;
    }
    target.unharmed(1);
}

#[tokio::test]
async fn offers_that_are_wrong() {
    let mut target = target();
    type Change = fn(&mut Open);
    let changes: Vec<(&str, Change)> = vec![
        ("no volume", |o| o.volumes.clear()),
        ("one volume twice", |o| o.volumes.push(o.volumes[0].clone())),
        ("a thousand volumes", |o| o.volumes = vec![o.volumes[0].clone(); 1000]),
        ("a nonce out of nothing", |o| o.nonces = vec![WriterNonce([5; 16])]),
        ("the open nonce", |o| o.nonces = vec![WriterNonce::OPEN]),
        ("no nonce", |o| o.nonces.clear()),
        ("a thousand nonces", |o| o.nonces = (0..1000_u32).map(|i| WriterNonce([i as u8; 16])).collect()),
        ("more than the store has", |o| o.high_water = LogSeq(1000)),
    ];
    for (what, change) in changes {
        let (endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        let mut open = target.open();
        change(&mut open);
        sender.send(&AgentMessage::Open(open)).await.expect("sent");
        match receiver.receive().await {
            Ok(Some(ReceiverMessage::Refused(_))) | Err(_) | Ok(None) => {}
            other => panic!("{what}: {other:?}"),
        }
        endpoint.close(CloseCode::Done, "").await;
    }
    // Reading what is not there, and other than asked for.
    for point in [PointSpec::Number(LogSeq(99)), PointSpec::Number(LogSeq(0)), PointSpec::Time(UnixMillis(i64::MIN))] {
        let (endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        sender.send(&AgentMessage::OpenRead(OpenRead { point })).await.expect("sent");
        assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::Refused(_)))), "{point:?}");
        endpoint.close(CloseCode::Done, "").await;
    }
    for (page, blocks) in [(0, vec![255; 127]), (0, vec![255; 129]), (99, vec![255; 128]), (0, Vec::new())] {
        let (endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        sender.send(&AgentMessage::OpenRead(OpenRead { point: PointSpec::Latest })).await.expect("sent");
        let answer = receiver.receive().await;
        assert!(matches!(answer, Ok(Some(ReceiverMessage::ReadOpened(_)))), "{answer:?}");
        sender.send(&AgentMessage::Want { volume: VolumeSlot(0), page, blocks }).await.expect("sent");
        match receiver.receive().await {
            // Beyond the end there is nothing to send.
            Ok(Some(ReceiverMessage::Refused(_) | ReceiverMessage::Sent { records: 0, .. })) => {}
            other => panic!("page {page}: {other:?}"),
        }
        endpoint.close(CloseCode::Done, "").await;
    }
    target.unharmed(1);
}

/// A path may be measured by who has a certificate, for so many bytes, and beside rounds, not in one.
#[tokio::test]
async fn probes_that_do_not_end() {
    let mut target = target();
    let probe = frame::encode(&AgentMessage::Probe).expect("fits");
    says(&target, As::Stranger, "a probe", after_hello(&probe)).await;
    // In the middle of a round.
    let (_endpoint, connection) = target.connect(As::Agent).await;
    let (mut sender, mut receiver) = connection.greet().await;
    sender.send(&AgentMessage::Open(target.open())).await.expect("sent");
    assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::Opened(_)))));
    sender.send(&AgentMessage::Probe).await.expect("sent");
    refused(&mut receiver, "in a round").await;
    // As much as the receiver takes, and then more.
    let (_endpoint, connection) = target.connect(As::Agent).await;
    let (mut sender, mut receiver) = connection.greet().await;
    sender.send(&AgentMessage::Probe).await.expect("sent");
    let first = receiver.receive().await.expect("an answer");
    assert!(
        matches!(first, Some(ReceiverMessage::Probed(Probed { bytes: 0, left: MAX_PROBE_BYTES, .. }))),
        "{first:?}"
    );
    let junk = vec![7; 1 << 20];
    let mut sent = 0;
    for _ in 0..(2 * MAX_PROBE_BYTES) >> 20 {
        // A stream that is stopped, and another that is stopped at once.
        let mut stream = connection.0.open_uni().await.expect("a stream");
        if stream.write_all(&junk).await.is_ok() {
            sent += junk.len() as u64;
        }
        let _ = stream.finish();
        sender.send(&AgentMessage::Probe).await.expect("sent");
        let answer = receiver.receive().await.expect("an answer");
        let Some(ReceiverMessage::Probed(probed)) = answer else { panic!("{answer:?}") };
        assert!(probed.bytes <= MAX_PROBE_BYTES + (8 << 20), "I12: {probed:?}");
        if probed.left == 0 {
            break;
        }
    }
    assert!(sent > 0);
    // Its turn is over, though it is still there.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (_other, second) = target.connect(As::Agent).await;
    let (mut second_sender, mut second_receiver) = second.greet().await;
    second_sender.send(&AgentMessage::Probe).await.expect("sent");
    let answer = second_receiver.receive().await.expect("an answer");
    assert!(matches!(answer, Some(ReceiverMessage::Probed(_))), "{answer:?}");
    // Nobody else measures meanwhile.
    let (_third, third) = target.connect(As::Agent).await;
    let (mut third_sender, mut third_receiver) = third.greet().await;
    third_sender.send(&AgentMessage::Probe).await.expect("sent");
    refused(&mut third_receiver, "being measured").await;
    // Who has measured may go on with a round, and bytes without meaning are no records then.
    second_sender.send(&AgentMessage::Open(target.open())).await.expect("sent");
    let answer = second_receiver.receive().await.expect("an answer");
    assert!(matches!(answer, Some(ReceiverMessage::Opened(_))), "{answer:?}");
    let mut stream = second.0.open_uni().await.expect("a stream");
    let _ = stream.write_all(&junk[..5000]).await;
    refused(&mut second_receiver, "wrong magic").await;
    target.unharmed(1);
}

/// A capture number at the end of all numbers would leave none for the rounds to come.
#[tokio::test]
async fn the_last_capture_numbers_do_not_end_a_group() {
    let mut target = target();
    for capture in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let (_endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        sender.send(&AgentMessage::Open(target.open())).await.expect("sent");
        assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::Opened(_)))));
        let mut zeroes = header(0, RecordBody::Zeroes { count: 1 });
        zeroes.capture = CaptureNumber(capture);
        let mut stream = connection.0.open_uni().await.expect("a stream");
        stream.write_all(&zeroes.to_bytes()).await.expect("sent");
        let _ = stream.finish();
        refused(&mut receiver, "capture number").await;
        // Nor one that only the commit states.
        let (_endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        let mut message = empty_commit(&target, &mut sender, &mut receiver).await;
        message.max_capture = CaptureNumber(capture);
        sender.send(&AgentMessage::Commit(Box::new(message))).await.expect("sent");
        refused(&mut receiver, "capture number").await;
    }
    target.unharmed(1);
}

/// Records that come after a commit which does not count them, and a commit that counts what never comes.
#[tokio::test]
async fn a_commit_and_then_a_flood() {
    let mut target = target();
    for counted in [1, 1 << 40, u64::MAX] {
        let (_endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        let mut message = empty_commit(&target, &mut sender, &mut receiver).await;
        message.records = counted;
        sender.send(&AgentMessage::Commit(Box::new(message))).await.expect("sent");
        let flood = tokio::spawn(async move {
            let Ok(mut stream) = connection.0.open_uni().await else { return };
            let record = header(0, RecordBody::Zeroes { count: 1 }).to_bytes();
            while stream.write_all(&record.repeat(100)).await.is_ok() {}
        });
        refused(&mut receiver, "the commit counts").await;
        let ended = tokio::time::timeout(Duration::from_secs(15), flood).await;
        assert!(ended.is_ok(), "the flood goes on");
    }
    target.unharmed(1);
}

/// Whatever is wanted: the answer is a refusal, and the same agent can come again as often as it likes.
#[tokio::test]
async fn wants_beyond_the_end_cost_no_session() {
    let mut target = target_with("max_sessions = 3\n");
    for page in [1, 99, u64::MAX / 1024, u64::MAX / 1024 + 1, u64::MAX - 1, u64::MAX, 1 << 63, 2] {
        let (_endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        sender.send(&AgentMessage::OpenRead(OpenRead { point: PointSpec::Latest })).await.expect("sent");
        assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::ReadOpened(_)))));
        sender.send(&AgentMessage::Want { volume: VolumeSlot(0), page, blocks: vec![255; 128] }).await.expect("sent");
        refused(&mut receiver, "a page that is not in this session").await;
        sender.finish();
        connection.is_closed("a want beyond the end").await;
    }
    target.unharmed(1);
}

/// A commit of an unchanged volume, right in everything; its session is open.
pub(crate) async fn empty_commit(
    target: &Target,
    sender: &mut ControlSender<AgentMessage>,
    receiver: &mut ControlReceiver<ReceiverMessage>,
) -> Commit {
    sender.send(&AgentMessage::Open(target.open())).await.expect("sent");
    let Some(ReceiverMessage::Opened(opened)) = receiver.receive().await.expect("an answer") else {
        panic!("not opened")
    };
    let now = unix_millis();
    Commit {
        generation: opened.generation,
        capture_start: now,
        capture_end: now,
        delta_digest: backhaul_protocol::digest::DeltaDigester::default().finish(),
        volumes: vec![CommitVolume { digest: opened.volumes[0].digest.expect("known"), full_scan: now }],
        ..commit(opened.head)
    }
}

pub(crate) async fn refused(receiver: &mut ControlReceiver<ReceiverMessage>, why: &str) {
    let answer = tokio::time::timeout(Duration::from_secs(15), receiver.receive()).await;
    match answer.unwrap_or_else(|_| panic!("no answer where one must say: {why}")) {
        Ok(Some(ReceiverMessage::Refused(refusal))) => assert!(refusal.text.contains(why), "{why}: {}", refusal.text),
        other => panic!("{why}: {other:?}"),
    }
}
