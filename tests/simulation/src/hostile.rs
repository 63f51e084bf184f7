//! Somebody who has an agent's keys and says anything: no point may come of it that is not one, and nobody else's may
//! be harmed (I17, I18, I19).
//!
//! Read first: [`attack`].

use std::collections::BTreeMap;
use std::time::Duration;

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{BlockDigest, DeltaDigest, DeltaDigester, VolumeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::ids::{CaptureNumber, CommitId, Generation, LogSeq, StateId, VolumeSlot, WriterNonce};
use backhaul_protocol::record::{Encoder, encode_zeroes};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Open, OpenVolume, Opened, PointSpec, Reason, ReceiverMessage,
};
use backhaul_transport::control::{self, ControlReceiver, ControlSender};
use backhaul_transport::link::Link;
use bytes::Bytes;

use crate::agent::Node;
use crate::chance::Chance;
use crate::history::World;
use crate::ledger::Ledger;

/// Connects as the agent and says what the seed says.
pub async fn attack(world: &mut World, node: usize, receiver: usize, seed: u64) {
    let chance = Chance::new(seed);
    let Ok(link) = world.dial(node, receiver) else { return };
    // It may take the session over and leave a draft; no more than that.
    world.ledger.count("hostile agent");
    let writer = backhaul_agent::state::StateDir::new(&world.nodes[node].state).writer().unwrap_or_default();
    let offered = |node: &Node| {
        let volumes = node.volumes.iter();
        volumes
            .map(|v| OpenVolume { id: v.id, name: v.name.clone(), incarnation: v.incarnation, geometry: v.geometry })
            .collect()
    };
    let open = Open {
        state: StateId([9; 16]),
        nonces: writer.nonce.into_iter().collect(),
        machine: world.nodes[node].machine,
        high_water: LogSeq(0),
        volumes: offered(&world.nodes[node]),
    };
    let group = world.nodes[node].identity.group;
    let foreign = world.nodes.iter().find(|n| n.identity.group != group);
    let theirs = foreign.map(|node| Open { volumes: offered(node), ..open.clone() });
    let ledger = world.ledger.clone();
    let attack = async {
        let Ok((sender, receiver)) = control::greet(&*link).await else { return };
        talk(&chance, &ledger, &*link, (sender, receiver), open, theirs).await;
    };
    let _ = tokio::time::timeout(Duration::from_secs(60), attack).await;
    link.goodbye().await;
}

async fn talk(
    chance: &Chance,
    ledger: &Ledger,
    link: &dyn Link,
    (mut sender, mut receiver): (ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>),
    own: Open,
    theirs: Option<Open>,
) {
    let mut lie = Lie::default();
    for _ in 0..chance.between(2, 12) {
        let volume = VolumeSlot(chance.below(3) as u32);
        let message = match chance.below(12) {
            0..3 => {
                let theirs = theirs.clone().filter(|_| chance.happens(0.4));
                if theirs.is_some() {
                    ledger.count("hostile: volumes of another group");
                }
                let open = theirs.unwrap_or_else(|| own.clone());
                lie.volumes = open.volumes.iter().map(|v| (VolumeSlot(0), v.geometry)).collect();
                AgentMessage::Open(open)
            }
            3 => AgentMessage::Ranges { volume, first: chance.below(3) },
            4 => AgentMessage::Page { volume, page: chance.below(3) },
            5 => AgentMessage::OpenRead(backhaul_protocol::wire::message::OpenRead { point: PointSpec::Latest }),
            6 => AgentMessage::Want { volume, page: 0, blocks: vec![0xff; 128] },
            7..9 => {
                lie.garbage(chance, link).await;
                continue;
            }
            _ => AgentMessage::Commit(Box::new(lie.commit(chance))),
        };
        if sender.send(&message).await.is_err() {
            return;
        }
        let answer = tokio::time::timeout(Duration::from_secs(5), receiver.receive()).await;
        match answer {
            Ok(Ok(Some(ReceiverMessage::Opened(opened)))) => {
                lie.opened(&opened);
            }
            Ok(Ok(Some(ReceiverMessage::Refused(refusal)))) => {
                if refusal.reason == Reason::Digest && refusal.text.starts_with("volume") {
                    ledger.count("hostile: only the volume's digest is wrong");
                }
                return;
            }
            Ok(Ok(Some(ReceiverMessage::Committed(_)))) => {
                ledger.violation("I18", format_args!("a hostile agent's commit became a point"));
            }
            Ok(Ok(None)) | Err(_) => return,
            _ => {}
        }
    }
}

/// What it said so far, and what it knows.
#[derive(Default)]
struct Lie {
    head: LogSeq,
    generation: Generation,
    /// Of the next record.
    capture: u64,
    /// As offered; the slots once they are known.
    volumes: Vec<(VolumeSlot, Geometry)>,
    digests: Vec<Option<VolumeDigest>>,
    records: u64,
    /// The newest of each block.
    sent: BTreeMap<(VolumeSlot, BlockIndex), BlockDigest>,
    /// Whether the receiver has what it was sent, and nothing else.
    is_exact: bool,
}

impl Lie {
    fn opened(&mut self, opened: &Opened) {
        (self.head, self.generation, self.capture) = (opened.head, opened.generation, opened.next_capture.0);
        (self.records, self.sent) = (0, BTreeMap::new());
        self.is_exact = opened.volumes.iter().all(|v| v.draft.0.is_empty());
        self.volumes.iter_mut().zip(&opened.volumes).for_each(|(own, theirs)| own.0 = theirs.slot);
        self.digests = opened.volumes.iter().map(|v| v.digest).collect();
    }

    /// Records that nobody's volume ever held.
    async fn garbage(&mut self, chance: &Chance, link: &dyn Link) {
        let mut bytes = Vec::new();
        for _ in 0..chance.between(1, 6) {
            let known =
                if self.volumes.is_empty() || chance.happens(0.1) { None } else { Some(chance.pick(&self.volumes)) };
            let block = BlockIndex(chance.below(8));
            let (slot, len) = match known {
                Some((slot, geometry)) => (slot, geometry.block_len(block)),
                None => (VolumeSlot(chance.below(3) as u32), crate::history::BLOCK as usize),
            };
            // Beyond the end of the volume now and then, which ends everything.
            if len == 0 && chance.happens(0.8) {
                continue;
            }
            let at = CaptureNumber(self.capture + chance.below(3));
            self.capture = at.0 + 1;
            self.records += 1;
            if chance.happens(0.3) {
                encode_zeroes(slot, block, 1, at, &mut bytes);
                self.sent.insert((slot, block), BlockDigest::ZERO);
            } else {
                let plain = vec![chance.below(256) as u8 | 1; len.max(1)];
                let mut encoder = Encoder::new(1).expect("there is memory");
                let digest = BlockDigest::of(&plain);
                encoder.encode(slot, block, at, digest, &plain, &mut bytes);
                self.sent.insert((slot, block), digest);
            }
        }
        if chance.happens(0.1) && !bytes.is_empty() {
            let at = chance.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1;
        }
        if let Ok(mut stream) = link.open_blocks().await {
            let _ = stream.write(Bytes::from(bytes)).await;
            stream.finish();
        }
    }

    /// Mostly everything is right but for one volume's digest; or nothing is.
    fn commit(&self, chance: &Chance) -> Commit {
        let is_exact = self.is_exact && chance.happens(0.8);
        let near = |n: u64| if is_exact || chance.happens(0.8) { n } else { chance.below(u64::MAX) };
        let mut delta = DeltaDigester::default();
        self.sent.iter().for_each(|((slot, block), digest)| delta.push(*slot, *block, *digest));
        let wrong = || VolumeDigest([chance.below(256) as u8; 32]);
        let mut volumes: Vec<VolumeDigest> =
            self.digests.iter().map(|held| held.filter(|_| is_exact).unwrap_or_else(wrong)).collect();
        if let Some(one) = volumes.first_mut() {
            *one = wrong();
        }
        Commit {
            commit: CommitId([chance.below(256) as u8; 16]),
            base: LogSeq(near(self.head.0)),
            generation: self.generation,
            nonce: WriterNonce([7; 16]),
            consistency: Consistency::Crash,
            capture_start: UnixMillis(0),
            capture_end: UnixMillis(i64::MAX),
            records: near(self.records),
            max_capture: CaptureNumber(near(self.capture)),
            delta_digest: if is_exact { delta.finish() } else { DeltaDigest([chance.below(256) as u8; 32]) },
            delta_blocks: if is_exact { delta.count() } else { near(self.records) },
            volumes: volumes.into_iter().map(|digest| CommitVolume { digest, full_scan: UnixMillis(0) }).collect(),
        }
    }
}
