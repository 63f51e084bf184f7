//! Sessions: operations and messages in any order, instead of bytes.

use std::time::Duration;

use backhaul_protocol::digest::ObjectDigest;
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{AgentId, CaptureNumber, LogSeq, VolumeSlot};
use backhaul_protocol::record::{HEADER_LEN, RecordHeader};
use backhaul_protocol::session::sink::{GroupHead, Peer, Sealed, Sink};
use backhaul_protocol::session::source::{Source, SourceOutput};
use backhaul_protocol::store::log::{Body, CreateBody, MachineId, PromoteBody, Record, UnixMillis};
use backhaul_protocol::wire::frame;
use backhaul_protocol::wire::message::{AgentMessage, Commit, Open, ReceiverMessage};

use crate::Choices;

/// Where the model has the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Idle,
    Opening,
    Ready,
    Committing,
    Over,
}

/// A message out of the input: two bytes of length, and a frame.
fn frame_of<'a>(choices: &mut Choices<'a>) -> &'a [u8] {
    let len = choices.bytes(2).iter().rev().fold(0, |len, byte| len << 8 | usize::from(*byte));
    choices.bytes(len)
}

fn open_of(choices: &mut Choices<'_>) -> Option<Open> {
    match frame::decode::<AgentMessage>(frame_of(choices)) {
        Ok(AgentMessage::Open(open)) => Some(open),
        _ => None,
    }
}

fn commit_of(choices: &mut Choices<'_>) -> Option<Commit> {
    match frame::decode::<AgentMessage>(frame_of(choices)) {
        Ok(AgentMessage::Commit(commit)) => Some(*commit),
        _ => None,
    }
}

pub(crate) fn source(data: &[u8]) {
    let mut choices = Choices(data);
    let mut source = Source::new(Duration::from_secs(10));
    let (mut at, mut now, mut asked, mut commit) = (At::Idle, Duration::ZERO, 0_i64, None);
    while let Some(operation) = choices.byte() {
        match operation % 8 {
            0 if at == At::Idle => {
                if let Some(open) = open_of(&mut choices) {
                    source.open(now, open);
                    at = At::Opening;
                }
            }
            1 => {
                source.ask_ranges(now, VolumeSlot(u32::from(choices.byte().unwrap_or(0))), PageIndex(choices.number()))
            }
            2 => source.ask_page(now, VolumeSlot(u32::from(choices.byte().unwrap_or(0))), PageIndex(choices.number())),
            3 => {
                if let Some(wanted) = commit_of(&mut choices) {
                    if at == At::Ready {
                        (at, commit) = (At::Committing, Some(wanted.commit));
                    }
                    source.commit(now, wanted);
                }
            }
            4 => {
                source.abandon();
                if at == At::Ready && asked == 0 {
                    at = At::Idle;
                }
            }
            5 => {
                now += Duration::from_millis(choices.number() % 20_000);
                source.handle_timeout(now);
            }
            _ => {
                if let Ok(message) = frame::decode::<ReceiverMessage>(frame_of(&mut choices)) {
                    source.handle_message(now, message);
                }
            }
        }
        while let Some(output) = source.poll_output() {
            assert_ne!(at, At::Over, "after its end a session says nothing: {output:?}");
            match output {
                SourceOutput::Send(AgentMessage::Ranges { .. } | AgentMessage::Page { .. }) => asked += 1,
                SourceOutput::Send(_) => {}
                SourceOutput::Opened(_) => {
                    assert_eq!(at, At::Opening);
                    at = At::Ready;
                }
                SourceOutput::Ranges { .. } | SourceOutput::Page { .. } => asked -= 1,
                SourceOutput::Committed(done) => {
                    // I3: the agent's baseline moves only for what it asked for.
                    assert_eq!((at, Some(done.commit)), (At::Committing, commit));
                    (at, asked) = (At::Idle, 0);
                }
                SourceOutput::Failed(_) => at = At::Over,
            }
            assert!(asked >= 0, "an answer to no question");
        }
        assert!(at != At::Over || source.poll_timeout().is_none());
    }
}

/// A head out of the input: a record with a right checksum, or one of two that are always there.
fn head_of(choices: &mut Choices<'_>) -> GroupHead {
    let group = backhaul_protocol::ids::GroupId([0x11; 16]);
    let mut record = Record {
        group,
        seq: LogSeq(1),
        previous: ObjectDigest([0; 32]),
        generation: backhaul_protocol::ids::Generation(2),
        commit: backhaul_protocol::ids::CommitId([3; 16]),
        nonce: backhaul_protocol::ids::WriterNonce::OPEN,
        time: UnixMillis(0),
        body: Body::Promote(PromoteBody { agent: PEER.agent }),
    };
    match choices.byte().unwrap_or(0) % 3 {
        0 => {}
        1 => {
            let name = "web".parse().expect("legal");
            record.body = Body::Create(CreateBody { repository: backhaul_protocol::ids::RepositoryId([0; 16]), name });
        }
        _ => {
            let mut object = backhaul_protocol::store::envelope::begin();
            object.extend_from_slice(frame_of(choices));
            backhaul_protocol::store::envelope::seal(backhaul_protocol::store::envelope::Kind::Log, &mut object);
            let seq = object.get(80..88).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("eight")));
            if let Ok(parsed) = Record::parse(group, LogSeq(seq), &object) {
                record = parsed;
            }
        }
    }
    let point = record.point().cloned().map(|p| (record.seq, p));
    GroupHead { record, point }
}

const PEER: Peer = Peer { agent: AgentId([0x88; 16]), joined_machine: MachineId([0x99; 32]) };

pub(crate) fn sink(data: &[u8]) {
    let mut choices = Choices(data);
    let head = head_of(&mut choices);
    let mut sink = Sink::new(PEER);
    let (mut taken, mut asked) = (None, None);
    while let Some(operation) = choices.byte() {
        match operation % 5 {
            0 => {
                let Some(open) = open_of(&mut choices) else { continue };
                taken = sink.open(&head, &open).ok();
                asked = None;
                if let Some(taken) = &taken {
                    let mut slots: Vec<VolumeSlot> = taken.volumes.iter().map(|v| v.slot).collect();
                    slots.sort();
                    slots.dedup();
                    assert_eq!(slots.len(), open.volumes.len(), "a slot for each volume");
                    assert!(slots.iter().all(|s| *s < taken.next_slot));
                }
            }
            1 => {
                let Some(commit) = commit_of(&mut choices) else { continue };
                let was_taking = sink.is_taking();
                let done = sink.commit(commit.clone());
                assert!(done.is_err() || was_taking, "a commit without a round");
                asked = done.ok().and(Some(commit));
            }
            2 => {
                // What is right but for one number.
                let Some(stated) = &asked else { continue };
                let wrong = choices.byte().unwrap_or(0) % 4;
                let found = Sealed {
                    delta_digest: stated.delta_digest,
                    delta_blocks: stated.delta_blocks.wrapping_add(u64::from(wrong == 1)),
                    max_capture: CaptureNumber(stated.max_capture.0.wrapping_add(u64::from(wrong == 2))),
                    volumes: stated.volumes.iter().map(|v| (wrong == 3).then_some(v.digest)).collect(),
                };
                let approved = sink.sealed(&found);
                if let Ok((_, approved)) = &approved {
                    // I5: only what was stated, on the base that was opened.
                    assert_eq!(&approved.commit, stated);
                    assert!(wrong != 1 && found.max_capture <= stated.max_capture);
                    assert_eq!(Some(approved.commit.base), taken.as_ref().map(|t| t.base));
                }
                asked = None;
            }
            3 => sink.appended(),
            _ => {
                let (Some(taken), Some(bytes)) = (&taken, choices.bytes(HEADER_LEN).first_chunk::<HEADER_LEN>()) else {
                    continue;
                };
                let admission = Sink::admission(taken, CaptureNumber(1), CaptureNumber(1 << 40));
                if let Ok(header) = RecordHeader::parse(bytes)
                    && let Ok(geometry) = admission.check(&header)
                {
                    assert!(geometry.contains(header.block) && header.capture < CaptureNumber(1 << 40));
                }
            }
        }
    }
}
