//! Somebody who has an agent's keys and says anything: no point may come of it that is not one, and nobody else's may
//! be harmed (I17, I18, I19).
//!
//! Read first: [`attack`].

use std::time::Duration;

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{BlockDigest, DeltaDigest, VolumeDigest};
use backhaul_protocol::geometry::BlockIndex;
use backhaul_protocol::ids::{CaptureNumber, CommitId, Generation, LogSeq, StateId, VolumeSlot, WriterNonce};
use backhaul_protocol::record::{Encoder, encode_zeroes};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Open, OpenVolume, PointSpec, ReceiverMessage,
};
use backhaul_transport::control::{self, ControlReceiver, ControlSender};
use backhaul_transport::link::Link;
use bytes::Bytes;

use crate::chance::Chance;
use crate::history::World;

/// Connects as the agent and says what the seed says.
pub async fn attack(world: &mut World, node: usize, receiver: usize, seed: u64) {
    let chance = Chance::new(seed);
    let Ok(link) = world.dial(node, receiver) else { return };
    // It may take the session over and leave a draft; no more than that.
    world.ledger.count("hostile agent");
    let writer = backhaul_agent::state::StateDir::new(&world.nodes[node].state).writer().unwrap_or_default();
    let open = Open {
        state: StateId([9; 16]),
        nonces: writer.nonce.into_iter().collect(),
        machine: world.nodes[node].machine,
        high_water: LogSeq(0),
        volumes: world.nodes[node]
            .volumes
            .iter()
            .map(|v| OpenVolume { id: v.id, name: v.name.clone(), incarnation: v.incarnation, geometry: v.geometry })
            .collect(),
    };
    let attack = async {
        let Ok((sender, receiver)) = control::greet(&*link).await else { return };
        talk(&chance, &*link, sender, receiver, open).await;
    };
    let _ = tokio::time::timeout(Duration::from_secs(60), attack).await;
    link.goodbye().await;
}

async fn talk(
    chance: &Chance,
    link: &dyn Link,
    mut sender: ControlSender<AgentMessage>,
    mut receiver: ControlReceiver<ReceiverMessage>,
    open: Open,
) {
    let mut capture = 1;
    let mut records = 0;
    let (mut head, mut generation) = (LogSeq(0), Generation(1));
    for _ in 0..chance.between(2, 12) {
        let volume = VolumeSlot(chance.below(3) as u32);
        let message = match chance.below(9) {
            0..3 => AgentMessage::Open(open.clone()),
            3 => AgentMessage::Ranges { volume, first: chance.below(3) },
            4 => AgentMessage::Page { volume, page: chance.below(3) },
            5 => AgentMessage::OpenRead(backhaul_protocol::wire::message::OpenRead { point: PointSpec::Latest }),
            6 => AgentMessage::Want { volume, page: 0, blocks: vec![0xff; 128] },
            7 => {
                records += garbage(chance, link, volume, &mut capture).await;
                continue;
            }
            _ => AgentMessage::Commit(Box::new(commit(chance, &open, head, generation, records, capture))),
        };
        if sender.send(&message).await.is_err() {
            return;
        }
        let answer = tokio::time::timeout(Duration::from_secs(5), receiver.receive()).await;
        match answer {
            Ok(Ok(Some(ReceiverMessage::Opened(opened)))) => {
                (head, generation, capture, records) = (opened.head, opened.generation, opened.next_capture.0, 0);
            }
            Ok(Ok(Some(ReceiverMessage::Refused(_)) | None) | Err(_)) => return,
            _ => {}
        }
    }
}

/// Records that nobody's volume ever held.
async fn garbage(chance: &Chance, link: &dyn Link, volume: VolumeSlot, capture: &mut u64) -> u64 {
    let mut bytes = Vec::new();
    let count = chance.between(1, 6);
    for _ in 0..count {
        let block = BlockIndex(chance.below(8));
        let at = CaptureNumber(*capture + chance.below(3));
        *capture = at.0 + 1;
        if chance.happens(0.3) {
            encode_zeroes(volume, block, 1, at, &mut bytes);
        } else {
            let plain = [chance.below(256) as u8 | 1; crate::history::BLOCK as usize];
            let mut encoder = Encoder::new(1).expect("there is memory");
            encoder.encode(volume, block, at, BlockDigest::of(&plain), &plain, &mut bytes);
        }
    }
    if chance.happens(0.2) {
        let at = chance.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1;
    }
    if let Ok(mut stream) = link.open_blocks().await {
        let _ = stream.write(Bytes::from(bytes)).await;
        stream.finish();
    }
    count
}

fn commit(chance: &Chance, open: &Open, head: LogSeq, generation: Generation, records: u64, capture: u64) -> Commit {
    let near = |n: u64| if chance.happens(0.8) { n } else { chance.below(u64::MAX) };
    Commit {
        commit: CommitId([chance.below(256) as u8; 16]),
        base: LogSeq(near(head.0)),
        generation,
        nonce: WriterNonce([7; 16]),
        consistency: Consistency::Crash,
        capture_start: UnixMillis(0),
        capture_end: UnixMillis(i64::MAX),
        records: near(records),
        max_capture: CaptureNumber(near(capture)),
        delta_digest: DeltaDigest([chance.below(256) as u8; 32]),
        delta_blocks: near(records),
        volumes: open
            .volumes
            .iter()
            .map(|_| CommitVolume { digest: VolumeDigest([chance.below(256) as u8; 32]), full_scan: UnixMillis(0) })
            .collect(),
    }
}
