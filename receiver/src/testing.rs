//! Stores with points in them, made by the real round without an agent and without a network.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{
    AgentId, CaptureNumber, CommitId, Incarnation, LogSeq, Name, RepositoryId, StateId, VolumeId, VolumeSlot,
    WriterNonce,
};
use backhaul_protocol::limits::BLOCKS_PER_PAGE;
use backhaul_protocol::record::{Encoder, encode_zeroes, split_record};
use backhaul_protocol::session::compare::{BlockSet, RoundDigester, RoundDigests, differing};
use backhaul_protocol::session::sink::{Peer, Sink};
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat, write_seq};
use backhaul_protocol::store::envelope::Kind as ObjectKind;
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::key;
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::message::{Commit, CommitVolume, Open, OpenVolume, Opened, Refusal};
use backhaul_seams::random;
use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::access::{TokenRequest, make_token};
use crate::catalog::Catalog;
use crate::limits::Limits;
use crate::round::{GroupState, Round, RoundResources};
use crate::segment_writer::Budget;
use crate::store::ObjectStore;

const AGENT: AgentId = AgentId([9; 16]);
const MACHINE: MachineId = MachineId([5; 32]);

/// A group in a store, and what its volumes hold in the newest point.
pub(crate) struct TestGroup {
    pub(crate) catalog: Catalog,
    pub(crate) name: Name,
    pub(crate) state: GroupState,
    nonce: WriterNonce,
    resources: RoundResources,
    held: Vec<(String, Vec<BlockDigest>)>,
    /// The receiver's clock.
    pub(crate) now: UnixMillis,
}

impl TestGroup {
    /// A new store with the group "web", whose segments have about `segment_size` bytes.
    pub(crate) async fn new(store: Arc<dyn ObjectStore>, segment_size: usize) -> Self {
        let format = StoreFormat { repository: RepositoryId([1; 16]), sharing: Sharing::ManyReceivers };
        store.put_new(&key::format(), Bytes::from(format.to_bytes())).await.expect("put");
        let catalog = Catalog::open(store).await.expect("a store");
        let name: Name = "web".parse().expect("a name");
        let request = TokenRequest {
            group: name.clone(),
            role: AgentRole::Writer,
            ttl: Duration::from_secs(60),
            address: "localhost:1".into(),
        };
        make_token(&catalog, [0; 32], request, SystemTime::now()).await.expect("a group");
        let state = GroupState::new(catalog.expect_group(&name).await.expect("a group"), None);
        let resources = RoundResources {
            budget: Budget::new(64 << 20),
            verifiers: Arc::new(Semaphore::new(2)),
            segment_size,
            limits: Limits::default(),
        };
        Self {
            catalog,
            name,
            state,
            nonce: WriterNonce([0; 16]),
            resources,
            held: Vec::new(),
            now: UnixMillis(1_700_000_000_000),
        }
    }

    /// Raises the floor and removes what is below it, as retention does.
    pub(crate) async fn prune(&self, floor: LogSeq) {
        let (log, store) = (self.state.log(), &self.catalog.store);
        let bytes = Bytes::from(write_seq(ObjectKind::Floor, floor));
        store.put_hint(&log.keys().floor(), bytes).await.expect("put");
        for seq in 0..floor.0 {
            store.delete(&log.keys().log(LogSeq(seq))).await.expect("deleted");
        }
    }

    /// Commits a point of these volumes: name, block size, content. Only what differs from the point before is sent.
    pub(crate) async fn commit(&mut self, volumes: &[(&str, u32, &[u8])]) -> LogSeq {
        self.commit_as(Consistency::Crash, volumes).await
    }

    pub(crate) async fn commit_as(&mut self, consistency: Consistency, volumes: &[(&str, u32, &[u8])]) -> LogSeq {
        self.try_commit_as(consistency, volumes).await.expect("a point")
    }

    /// The same, or why not; then what was sent is taken for lost, which it is where it was to lie in the log record.
    pub(crate) async fn try_commit_as(
        &mut self,
        consistency: Consistency,
        volumes: &[(&str, u32, &[u8])],
    ) -> Result<LogSeq, Refusal> {
        let held = self.held.clone();
        let (mut round, mut sink, opened, capture, sums) = self.begin(volumes).await?;
        let digest = |slot| sums.volumes.iter().find(|(s, _)| *s == slot).expect("summed up").1;
        let nonce = WriterNonce(random::bytes());
        let commit = Commit {
            commit: CommitId(random::bytes()),
            base: opened.head,
            generation: opened.generation,
            nonce,
            consistency,
            capture_start: UnixMillis(1),
            capture_end: UnixMillis(2),
            records: 0,
            max_capture: capture,
            delta_digest: sums.delta,
            delta_blocks: sums.delta_blocks,
            volumes: opened
                .volumes
                .iter()
                .map(|v| CommitVolume { digest: digest(v.slot), full_scan: UnixMillis(2) })
                .collect(),
        };
        let now = self.now;
        let committed = round.commit(&mut self.state, &mut sink, AGENT, commit, || now).await;
        match &committed {
            Ok(_) => self.nonce = nonce,
            Err(_) => self.held = held,
        }
        Ok(committed?.seq)
    }

    /// What an agent is told that offers the same again, from a receiver that has just started.
    pub(crate) async fn reopened(&mut self, volumes: &[(&str, u32, &[u8])]) -> Opened {
        self.state = GroupState::new(self.state.log().clone(), None);
        let (round, _, opened, ..) = self.begin(volumes).await.expect("a round");
        round.abandon(&mut self.state).await;
        opened
    }

    /// Sends what differs and goes away: a draft is left.
    pub(crate) async fn leave_draft(&mut self, volumes: &[(&str, u32, &[u8])]) {
        let held = self.held.clone();
        let (round, ..) = self.begin(volumes).await.expect("a round");
        round.abandon(&mut self.state).await;
        self.held = held;
    }

    async fn begin(
        &mut self,
        volumes: &[(&str, u32, &[u8])],
    ) -> Result<(Round, Sink, Opened, CaptureNumber, RoundDigests), Refusal> {
        let mut sink = Sink::new(Peer { agent: AGENT, joined_machine: MACHINE });
        let open = Open {
            state: StateId([3; 16]),
            nonces: vec![self.nonce],
            machine: MACHINE,
            high_water: LogSeq(0),
            volumes: volumes.iter().map(offer).collect(),
        };
        let (round, opened) = Round::open(&mut self.state, &mut sink, &open, &self.resources).await?;
        let mut digester = RoundDigester::default();
        let mut capture = opened.next_capture;
        let mut order: Vec<usize> = (0..volumes.len()).collect();
        order.sort_by_key(|i| opened.volumes[*i].slot);
        for i in order {
            capture = self.send(&round, opened.volumes[i].slot, volumes[i], capture, &mut digester).await;
        }
        Ok((round, sink, opened, capture, digester.finish()))
    }

    async fn send(
        &mut self,
        round: &Round,
        slot: VolumeSlot,
        (name, block_size, bytes): (&str, u32, &[u8]),
        mut capture: CaptureNumber,
        digester: &mut RoundDigester,
    ) -> CaptureNumber {
        let geometry = Geometry::new(block_size, bytes.len() as u64).expect("legal");
        let digests: Vec<BlockDigest> = bytes.chunks(block_size as usize).map(BlockDigest::of).collect();
        let mut held = self.held.iter().find(|(n, _)| n == name).map(|(_, d)| d.clone()).unwrap_or_default();
        held.resize(digests.len(), BlockDigest::ZERO);
        let mut encoder = Encoder::new(1).expect("zstd");
        digester.begin_volume(slot, geometry);
        for page in (0..geometry.pages()).map(PageIndex) {
            let own = (page.0 * BLOCKS_PER_PAGE) as usize..;
            let own = own.start..own.start + geometry.page_blocks(page);
            let sent = differing(&held[own.clone()], &digests[own.clone()]);
            digester.push_page(page, &digests[own.clone()], &BlockSet::default(), &sent);
            for i in sent.iter().map(|i| own.start + i) {
                let mut record = Vec::new();
                let (block, plain) = (BlockIndex(i as u64), bytes.chunks(block_size as usize).nth(i).expect("inside"));
                if digests[i].is_zero() {
                    encode_zeroes(slot, block, 1, capture, &mut record);
                } else {
                    encoder.encode(slot, block, capture, digests[i], plain, &mut record);
                }
                capture = CaptureNumber(capture.0 + 1);
                let header = split_record(&record).expect("own").expect("whole").header;
                let records = [(header, 0)];
                let mut push = std::pin::pin!(round.ingest.writer().push(&record, &records));
                // As a session does it now and then: who pushes may wait for it.
                while tokio::time::timeout(Duration::from_millis(20), &mut push).await.is_err() {
                    round.absorb(&mut self.state).await.expect("stored");
                }
                if i % 16 == 0 {
                    round.absorb(&mut self.state).await.expect("stored");
                }
            }
        }
        self.held.retain(|(n, _)| n != name);
        self.held.push((name.to_owned(), digests));
        capture
    }
}

fn offer((name, block_size, bytes): &(&str, u32, &[u8])) -> OpenVolume {
    let mut id = [0; 16];
    id[..name.len()].copy_from_slice(name.as_bytes());
    OpenVolume {
        id: VolumeId(id),
        name: name.parse().expect("a name"),
        incarnation: Incarnation(1),
        geometry: Geometry::new(*block_size, bytes.len() as u64).expect("legal"),
    }
}

/// Bytes that differ from place to place and seed to seed, and compress by half.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |i: usize| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if i.is_multiple_of(2) { (x >> 32) as u8 | 1 } else { 7 }
    };
    (0..len).map(next).collect()
}

/// Whether loop devices can be made. If not, says why, and fails where all tests are required.
pub(crate) fn root() -> bool {
    let can = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/loop-control").exists();
    if !can {
        assert!(std::env::var("BACKHAUL_REQUIRE_ALL").as_deref() != Ok("1"), "needs root and loop devices");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED: needs root and loop devices\n");
    }
    can
}

/// A loop device over a new image; detached when dropped, also by a panic.
pub(crate) struct LoopDevice(pub(crate) String);

impl LoopDevice {
    pub(crate) fn over(image: &std::path::Path, bytes: &[u8]) -> Self {
        std::fs::write(image, &bytes[..bytes.len() / 512 * 512]).expect("an image");
        let out = std::process::Command::new("losetup").args(["-f", "--show"]).arg(image).output().expect("losetup");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Self(String::from_utf8(out.stdout).expect("text").trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).output();
    }
}
