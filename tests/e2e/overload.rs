//! More peers than there is room for, and sessions that must end whatever they are doing (I12, I14, I17).

use std::time::{Duration, Instant};

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::ids::{CaptureNumber, VolumeId, VolumeSlot};
use backhaul_protocol::record::{Encoding, RecordBody, RecordHeader};
use backhaul_protocol::wire::message::{AgentMessage, CloseCode, OpenRead, PointSpec, ReceiverMessage};
use backhaul_tests::memory::resident;
use backhaul_tests::peer::{As, Connection, Control, Target, target, target_with};
use backhaul_transport::endpoint::Endpoint;
use backhaul_transport::error::TransportError;

use crate::hostile::{empty_commit, refused};

const ENDS: Duration = Duration::from_secs(30);

/// Strangers that connect and say nothing, more than there is room for: some are refused, memory stays, and the agent
/// works on beside them.
#[tokio::test]
async fn strangers_take_nobodys_place() {
    let mut target = target();
    let before = resident(target.serving.child.pid());
    let mut open = Vec::new();
    for _ in 0..120 {
        let (endpoint, connection) = target.try_connect(As::Stranger).await;
        open.push((endpoint, connection.expect("who it is shows after the handshake")));
    }
    // The transport refuses nobody who goes on after a handshake: those too many are shown out at once.
    tokio::time::sleep(Duration::from_secs(1)).await;
    open.retain(|(_, connection)| connection.0.close_reason().is_none());
    assert!((16..=32).contains(&open.len()), "{} are in", open.len());
    let grown = resident(target.serving.child.pid()).saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes for {} strangers", open.len());
    // They are shown out after a while, and then there is room again.
    for (_, connection) in &open {
        connection.is_closed("a stranger that says nothing").await;
    }
    target.unharmed(1);
}

/// An agent that is in hostile hands: every stream that it may have says that a block of 1 MiB comes, and stops one byte
/// short of it. Its volume has such blocks. All its sessions do so (I12).
#[tokio::test]
async fn records_that_never_end_take_bounded_memory() {
    const SESSIONS: usize = 4;
    const MIB: usize = 1 << 20;
    let mut target = target();
    let before = resident(target.serving.child.pid());
    let mut open = Vec::new();
    for session in 0..SESSIONS {
        let (endpoint, connection) = target.connect(As::Agent).await;
        let (mut sender, mut receiver) = connection.greet().await;
        let mut offer = target.open();
        offer.volumes[0].geometry = Geometry::new(MIB as u32, 64 << 20).expect("legal");
        offer.volumes[0].id = VolumeId([session as u8; 16]);
        sender.send(&AgentMessage::Open(offer)).await.expect("sent");
        let opened = receiver.receive().await.expect("an answer").expect("an answer");
        assert!(matches!(opened, ReceiverMessage::Opened(_)), "{opened:?}");
        let mut streams = Vec::new();
        for block in 0..32 {
            let stream = tokio::time::timeout(Duration::from_millis(300), connection.0.open_uni()).await;
            let Ok(Ok(mut stream)) = stream else { break };
            let body =
                RecordBody::Data { digest: BlockDigest([1; 32]), encoding: Encoding::Raw, payload_len: MIB as u32 };
            let capture = CaptureNumber(1 << 20);
            let header = RecordHeader { volume: VolumeSlot(0), block: BlockIndex(block), capture, body };
            let _ = stream.write_all(&header.to_bytes()).await;
            let payload = tokio::time::timeout(Duration::from_secs(5), stream.write_all(&[7; MIB - 1]));
            let _ = payload.await;
            streams.push(stream);
        }
        assert!(streams.len() <= 8, "{} streams at once", streams.len());
        open.push((endpoint, connection, sender, receiver, streams));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let grown = resident(target.serving.child.pid()).saturating_sub(before);
    assert!(grown < (SESSIONS * 16 * MIB) as u64, "{grown} bytes for {SESSIONS} sessions");
    drop(open);
    target.unharmed(1);
}

async fn reading(target: &Target) -> (Endpoint, Connection, Control, Option<ReceiverMessage>) {
    let (endpoint, connection) = target.connect(As::Agent).await;
    let mut control = connection.greet().await;
    let _ = control.0.send(&AgentMessage::OpenRead(OpenRead { point: PointSpec::Latest })).await;
    let answer = control.1.receive().await.unwrap_or_default();
    (endpoint, connection, control, answer)
}

/// Whoever is not in yet is not waited for when the receiver stops (I14).
#[tokio::test]
async fn a_peer_that_says_nothing_does_not_hold_up_a_stop() {
    let mut target = target();
    let (_endpoint, connection) = target.connect(As::Agent).await;
    let (_other, stranger) = target.try_connect(As::Stranger).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let begun = Instant::now();
    target.serving.child.signal(rustix::process::Signal::TERM);
    assert!(target.serving.child.wait(ENDS).success());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    drop((connection, stranger));
}

#[tokio::test]
async fn one_agent_has_a_bounded_number_of_sessions() {
    let mut target = target();
    let mut open = Vec::new();
    for _ in 0..7 {
        let session = reading(&target).await;
        assert!(matches!(session.3, Some(ReceiverMessage::ReadOpened(_))), "{:?}", session.3);
        open.push(session);
    }
    target.unharmed(1);
    open.push(reading(&target).await);
    let (_endpoint, _connection, _control, answer) = reading(&target).await;
    let Some(ReceiverMessage::Refused(refusal)) = answer else { panic!("{answer:?}") };
    assert!(refusal.reason.is_retryable() && refusal.text.contains("as many sessions as it may have"), "{refusal:?}");
    for (endpoint, ..) in &open {
        endpoint.close(CloseCode::Done, "").await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    target.unharmed(2);
}

#[tokio::test]
async fn a_receiver_has_a_bounded_number_of_sessions() {
    let mut target = target_with("max_sessions = 2\n");
    let open = [reading(&target).await, reading(&target).await];
    let (_endpoint, _connection, mut control, answer) = reading(&target).await;
    let Some(ReceiverMessage::Refused(refusal)) = answer else { panic!("{answer:?}") };
    assert!(refusal.text.contains("this receiver has as many sessions"), "{refusal:?}");
    control.0.finish();
    drop(_connection);
    for (endpoint, ..) in &open {
        endpoint.close(CloseCode::Done, "").await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    target.unharmed(1);
}

/// How a session can be busy.
#[derive(Clone, Copy, Debug)]
enum Busy {
    /// A commit waits for records that do not come.
    Committing,
    /// Answers are waited for by nobody.
    Deaf,
    /// Blocks are wanted and not taken.
    Wanting,
}

const BUSY: [Busy; 3] = [Busy::Committing, Busy::Deaf, Busy::Wanting];

async fn busy(target: &Target, how: Busy) -> (Endpoint, Connection, Control) {
    let (endpoint, connection) = target.connect(As::Agent).await;
    let (mut sender, mut receiver) = connection.greet().await;
    if let Busy::Wanting = how {
        let open = OpenRead { point: PointSpec::Latest };
        sender.send(&AgentMessage::OpenRead(open)).await.expect("sent");
        assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::ReadOpened(_)))));
    } else {
        let mut commit = empty_commit(target, &mut sender, &mut receiver).await;
        commit.records = 1;
        if let Busy::Committing = how {
            sender.send(&AgentMessage::Commit(Box::new(commit))).await.expect("sent");
        }
    }
    let question = match how {
        Busy::Committing => return (endpoint, connection, (sender, receiver)),
        Busy::Deaf => AgentMessage::Ranges { volume: VolumeSlot(0), first: 0 },
        Busy::Wanting => AgentMessage::Want { volume: VolumeSlot(0), page: 0, blocks: vec![255; 128] },
    };
    // Until nothing more goes in: then the session waits for us.
    while let Ok(sent) = tokio::time::timeout(Duration::from_secs(1), sender.send(&question)).await {
        sent.expect("sent");
    }
    (endpoint, connection, (sender, receiver))
}

async fn ends(connection: &Connection, code: CloseCode, how: Busy) {
    let began = Instant::now();
    let closed = tokio::time::timeout(ENDS, connection.0.closed()).await;
    let reason = closed.unwrap_or_else(|_| panic!("{how:?}: not within {ENDS:?}"));
    let error = TransportError::from(reason);
    assert_eq!(error.close_code(), Some(code), "{how:?} after {:?}: {error}", began.elapsed());
}

#[tokio::test]
async fn a_revocation_ends_a_session_that_is_busy() {
    let mut sessions = Vec::new();
    for how in BUSY {
        let target = target();
        let (endpoint, connection, control) = busy(&target, how).await;
        target.f.receiver(&["revoke", &target.agent.id()]).ok();
        sessions.push((how, target, endpoint, connection, control));
    }
    for (how, _, _, connection, _) in &sessions {
        ends(connection, CloseCode::Revoked, *how).await;
    }
}

#[tokio::test]
async fn a_shutdown_ends_a_session_that_is_busy() {
    for how in BUSY {
        let target = target();
        let (_endpoint, connection, _control) = busy(&target, how).await;
        target.serving.child.signal(rustix::process::Signal::TERM);
        ends(&connection, CloseCode::ShuttingDown, how).await;
        target.serving.stop();
    }
}

#[tokio::test]
async fn a_newer_session_takes_over_from_one_that_is_busy() {
    for how in [Busy::Committing, Busy::Deaf] {
        let mut target = target();
        let (_endpoint, connection, _control) = busy(&target, how).await;
        let began = Instant::now();
        target.unharmed(1);
        assert!(began.elapsed() < Duration::from_secs(20), "{how:?}: {:?}", began.elapsed());
        ends(&connection, CloseCode::Superseded, how).await;
    }
}

/// Nobody says anything for longer than the idle timeout: the keep-alive does.
#[tokio::test]
async fn a_session_that_is_idle_is_kept_alive() {
    let mut target = target();
    let (_endpoint, connection, _control, _) = reading(&target).await;
    assert!(tokio::time::timeout(Duration::from_secs(26), connection.0.closed()).await.is_err());
    target.unharmed(1);
}

/// Agents that send nothing for a commit of theirs do not keep their refusal from being heard.
#[tokio::test]
async fn a_commit_out_of_place_is_refused_on_a_session_that_reads() {
    let mut target = target();
    let (_endpoint, connection) = target.connect(As::Agent).await;
    let (mut sender, mut receiver) = connection.greet().await;
    let commit = empty_commit(&target, &mut sender, &mut receiver).await;
    sender.send(&AgentMessage::OpenRead(OpenRead { point: PointSpec::Latest })).await.expect("sent");
    assert!(matches!(receiver.receive().await, Ok(Some(ReceiverMessage::ReadOpened(_)))));
    sender.send(&AgentMessage::Commit(Box::new(commit))).await.expect("sent");
    refused(&mut receiver, "`Commit` without `Open`").await;
    target.unharmed(1);
}
