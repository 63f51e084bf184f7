//! Runs a history: carries out its operations, then lets everything heal, and has the oracle look at what is left.
//!
//! Read first: [`run`], then [`World::step`] and [`World::heal`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_agent::replicate::CommitWhen;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{GroupId, LogSeq, Name, RepositoryId};
use backhaul_protocol::session::sink::GroupHead;
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat, read_seq, write_seq};
use backhaul_protocol::store::envelope::Kind as ObjectKind;
use backhaul_protocol::store::fleet::{AgentRole, JoinedAgent};
use backhaul_protocol::store::key::{self, GroupKeys};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_receiver::access;
use backhaul_receiver::catalog::{Catalog, GroupLog};
use backhaul_receiver::reachable::missing_segments;
use backhaul_receiver::salvage::{BadIndex, open_view};
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::mem::MemStore;
use backhaul_seams::mutant::Mutant;
use backhaul_seams::{clock, world};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::Link;
use bytes::Bytes;

use crate::agent::{Node, copy_folder, identity};
use crate::bucket::{Bucket, Door, Weather};
use crate::chance::Chance;
use crate::disk::Disks;
use crate::gate::{Gate, Process};
use crate::ledger::Ledger;
use crate::plan::{MAX_NODES, Op, Plan};
use crate::receiver::Receiver;
use crate::wire::{End, Network, connect};
use crate::{harm, oracle, panics};

/// Bytes of a block.
pub const BLOCK: u32 = backhaul_protocol::limits::MIN_BLOCK_SIZE;
/// A command of the operator is given up after this long.
const OPERATOR: Duration = Duration::from_secs(400);
/// An attempt that takes longer hangs: the longest wait in either program is five minutes, and some follow each other.
const HANG: Duration = Duration::from_secs(1800);

/// What came of a history.
#[derive(Clone, Debug)]
pub struct Report {
    /// What does not hold; empty is good.
    pub violations: Vec<String>,
    /// How often each situation was reached.
    pub situations: BTreeMap<String, u64>,
    /// Digest of everything that happened.
    pub digest: String,
    /// Everything that happened, if it was to be kept.
    pub lines: Vec<String>,
}

/// Whether the trace is kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trace {
    /// Only its digest.
    Digest,
    /// Every line.
    Keep,
}

/// Runs one history on this thread.
pub fn run(plan: &Plan, mutant: Option<Mutant>, trace: Trace) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime can be made");
    panics::hear();
    let mut report = runtime.block_on(async {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let _world = world::enter(plan.seed, start, mutant);
        let ledger = Arc::new(Ledger::new(trace == Trace::Keep));
        let mut history = World::new(plan, ledger.clone()).await;
        for op in &plan.ops {
            history.step(op).await;
        }
        history.heal().await;
        let mut situations: BTreeMap<String, u64> = BTreeMap::new();
        for (situation, count) in world::reached() {
            situations.insert(format!("{situation:?}"), count);
        }
        for (situation, count) in ledger.counts() {
            *situations.entry(situation.to_owned()).or_default() += count;
        }
        let violations = ledger.violations();
        Report { violations, situations, digest: ledger.digest(), lines: ledger.lines() }
    });
    runtime.shutdown_background();
    report.violations.extend(panics::heard().into_iter().map(|panic| format!("I19: {panic}")));
    report
}

/// A copy of an agent's state, and of its volumes.
struct Kept {
    state: PathBuf,
    node: Node,
}

/// A group, as its users know it.
pub struct Group {
    /// Its id.
    pub id: GroupId,
    /// Its name.
    pub name: Name,
}

/// Everything in a history.
pub struct World {
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) bucket: Arc<Bucket>,
    pub(crate) groups: Vec<Group>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) dir: tempfile::TempDir,
    chance: Chance,
    network: Network,
    receivers: Vec<Receiver>,
    kept: BTreeMap<usize, Kept>,
    kept_bucket: Option<MemStore>,
    folders: usize,
}

impl World {
    async fn new(plan: &Plan, ledger: Arc<Ledger>) -> Self {
        let chance = Chance::new(plan.seed ^ 0x5eed);
        let bucket = Bucket::new(ledger.clone());
        let shm = std::path::Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("backhaul-simulation-");
        let dir = if shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
        let mut world = Self {
            ledger,
            bucket: bucket.clone(),
            groups: Vec::new(),
            nodes: Vec::new(),
            dir: dir.expect("a folder"),
            chance: chance.clone(),
            network: Network::default(),
            receivers: (0..plan.receivers).map(|_| Receiver::new(bucket.clone(), chance.clone())).collect(),
            kept: BTreeMap::new(),
            kept_bucket: None,
            folders: 0,
        };
        let store = world.pristine();
        let format = StoreFormat { repository: RepositoryId([7; 16]), sharing: Sharing::ManyReceivers };
        store.put_new(&key::format(), Bytes::from(format.to_bytes())).await.expect("an empty store takes it");
        let catalog = Catalog::open(store).await.expect("just made");
        for (number, volumes) in plan.volumes.iter().enumerate() {
            world.add_group(&catalog, number, volumes).await;
        }
        for receiver in &mut world.receivers {
            receiver.start().await;
        }
        world
    }

    async fn add_group(&mut self, catalog: &Catalog, number: usize, volumes: &[u64]) {
        let name: Name = format!("group-{number}").parse().expect("legal");
        let log = access::ensure_group(catalog, &name, clock::now()).await.expect("nothing fails yet");
        let identity = identity(log.group());
        let folder = self.folder();
        let mut node = Node::new(number, identity, name.clone(), folder, self.ledger.clone());
        for (i, blocks) in volumes.iter().enumerate() {
            node.protect(&format!("v{i}"), self.geometry(*blocks));
        }
        let joined = JoinedAgent {
            agent: identity.agent,
            role: AgentRole::Writer,
            key_hash: identity.key_hash,
            machine: node.machine,
            host: "simulated".parse().expect("a name"),
            joined: UnixMillis(0),
        };
        let at = GroupKeys(log.group()).agent(identity.agent);
        catalog.store.put_new(&at, Bytes::from(joined.to_bytes())).await.expect("nothing fails yet");
        self.groups.push(Group { id: log.group(), name });
        self.ledger.add_agent(log.group());
        self.nodes.push(node);
    }

    /// Some blocks, the last one mostly short.
    fn geometry(&self, blocks: u64) -> Geometry {
        let short = if self.chance.happens(0.7) { self.chance.below(4000) } else { 0 };
        Geometry::new(BLOCK, blocks * u64::from(BLOCK) - short).expect("legal")
    }

    fn folder(&mut self) -> PathBuf {
        self.folders += 1;
        self.dir.path().join(format!("state-{}", self.folders))
    }

    /// The store without weather.
    pub(crate) fn pristine(&self) -> Arc<dyn ObjectStore> {
        Arc::new(Door::new(self.bucket.clone(), Gate::default(), Arc::default(), self.chance.clone()))
    }

    pub(crate) async fn log(&self, group: GroupId) -> GroupLog {
        Catalog::open(self.pristine()).await.expect("the description is never harmed").log(group)
    }

    pub(crate) fn group_of(&self, node: usize) -> usize {
        let id = self.nodes[node].identity.group;
        self.groups.iter().position(|g| g.id == id).expect("every agent has a group")
    }

    /// A connection, if the network gives one.
    pub(crate) fn dial(&mut self, node: usize, receiver: usize) -> Result<Arc<dyn Link>, TransportError> {
        let wire = self.network.wire(node, receiver);
        let process = self.receivers[receiver].process();
        let works = wire.is_up(End::Agent) && wire.is_up(End::Receiver) && process == Some(Process::Running);
        let Some(gate) = self.receivers[receiver].gate().filter(|_| works) else {
            self.ledger.count("no connection");
            return Err(TransportError::Connection(quinn::ConnectionError::TimedOut));
        };
        let n = &self.nodes[node];
        let (ours, theirs) = connect(wire, self.chance.clone(), [n.gate(), gate], n.tap());
        let identity = n.identity;
        self.receivers[receiver].serve(theirs, identity);
        Ok(ours)
    }

    async fn step(&mut self, op: &Op) {
        self.ledger.trace(format_args!("{op:?}"));
        for node in &mut self.nodes {
            node.outcome().await;
        }
        let (nodes, receivers) = (self.nodes.len(), self.receivers.len());
        match op.clone() {
            Op::Wait(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
            Op::Write { node, volume, writes } => {
                if let Some(disk) = self.disk(node % nodes, volume) {
                    disk.write(&writes);
                }
            }
            Op::WriteDuring { node, volume, reads, writes } => {
                if let Some(disk) = self.disk(node % nodes, volume) {
                    disk.arm(reads, writes);
                }
            }
            Op::Sync { node, receiver, when, keep } => self.sync(node % nodes, receiver % receivers, when.into(), keep),
            Op::Join { node, at_most } => {
                let _ = tokio::time::timeout(Duration::from_millis(at_most), self.nodes[node % nodes].wait()).await;
            }
            Op::KillAgent { node } => {
                let node = &mut self.nodes[node % nodes];
                self.ledger.count(if node.is_busy() { "agent killed at work" } else { "agent killed idle" });
                node.kill();
            }
            Op::KillReceiver { receiver } => self.receivers[receiver % receivers].kill(),
            Op::StopReceiver { receiver } => self.receivers[receiver % receivers].stop(),
            Op::StartReceiver { receiver } => {
                self.receivers[receiver % receivers].start().await;
            }
            Op::Pause { receiver } => self.receivers[receiver % receivers].pause(true),
            Op::Resume { receiver } => self.resume(receiver % receivers),
            Op::Cut { node, receiver, from_agent } => {
                let from = if from_agent { End::Agent } else { End::Receiver };
                self.network.wire(node % nodes, receiver % receivers).set_up(from, false);
                self.ledger.count("cut");
            }
            Op::Mend { node, receiver } => self.network.wire(node % nodes, receiver % receivers).heal(),
            Op::Delay { node, receiver, longest } => {
                self.network.wire(node % nodes, receiver % receivers).set_delay(1, longest);
            }
            Op::Weather { receiver, weather } => {
                *self.receivers[receiver % receivers].weather.lock().expect("nothing panics under it") = weather;
            }
            Op::Restore { node, receiver, back } => {
                oracle::restore_over_network(self, node % nodes, receiver % receivers, back).await;
            }
            other => self.step_of_operator(other).await,
        }
    }

    async fn step_of_operator(&mut self, op: Op) {
        let nodes = self.nodes.len();
        match op {
            Op::Keep { node } => self.keep(node % nodes),
            Op::PutBack { node, machine } => self.put_back(node % nodes, machine),
            Op::PutBackIndex { node } => self.put_back_index(node % nodes),
            Op::Clone { node, other_machine } => self.clone_node(node % nodes, other_machine),
            Op::Adopt { node } => {
                self.adopt(node % nodes).await;
            }
            Op::Grow { node, volume, blocks } => self.grow(node % nodes, volume, blocks),
            Op::Replace { node, volume, blocks } => self.replace(node % nodes, volume, blocks),
            Op::AddVolume { node, blocks } => self.add_volume(node % nodes, blocks),
            Op::DropVolume { node, volume } => self.drop_volume(node % nodes, volume),
            Op::ClockJump { forwards, hours } => {
                world::jump(forwards, Duration::from_secs(3600 * hours));
                self.ledger.count(if forwards { "clock jumped forwards" } else { "clock jumped back" });
            }
            Op::Prune { node, keep } => self.prune(self.group_of(node % nodes), keep).await,
            Op::KeepBucket => self.kept_bucket = Some(self.bucket.objects().fork()),
            Op::Harm { node, seed } => harm::harm_map(self, node % nodes, &Chance::new(seed)).await,
            Op::PutBackBucket { orphans } => self.put_back_bucket(orphans),
            Op::Hostile { node, receiver, seed } => {
                let receiver = receiver % self.receivers.len();
                crate::hostile::attack(self, node % nodes, receiver, seed).await;
            }
            _ => unreachable!("handled before"),
        }
    }

    fn sync(&mut self, node: usize, receiver: usize, when: CommitWhen, keep: bool) {
        if self.nodes[node].is_busy() {
            return;
        }
        let link = if self.nodes[node].has_session() { None } else { Some(self.dial(node, receiver)) };
        self.nodes[node].begin(link, when, keep);
    }

    fn resume(&mut self, receiver: usize) {
        if self.receivers[receiver].process() == Some(Process::Paused) {
            self.ledger.count("zombie woke up");
        }
        self.receivers[receiver].pause(false);
    }

    fn disk(&self, node: usize, volume: usize) -> Option<crate::disk::Disk> {
        let node = &self.nodes[node];
        let volume = node.volumes.get(volume % node.volumes.len().max(1))?;
        node.disks.get(volume.id)
    }

    fn keep(&mut self, node: usize) {
        let state = self.folder();
        let copy = self.nodes[node].copy(self.nodes[node].number, state.clone());
        self.kept.insert(node, Kept { state, node: copy });
    }

    /// The agent is restored from an old image.
    fn put_back(&mut self, node: usize, machine: bool) {
        let Some(kept) = self.kept.get(&node) else { return };
        let own = &mut self.nodes[node];
        own.kill();
        let _ = std::fs::remove_dir_all(&own.state);
        copy_folder(&kept.state, &own.state);
        if machine {
            own.volumes = kept.node.volumes.clone();
            let disks = Disks::default();
            for volume in &own.volumes {
                disks.set(volume.id, kept.node.disks.get(volume.id).expect("it has one").fork());
            }
            own.disks = disks;
        }
        self.ledger.suspect(node);
        self.ledger.count(if machine { "machine put back" } else { "state put back" });
    }

    fn put_back_index(&mut self, node: usize) {
        let Some(kept) = self.kept.get(&node) else { return };
        let own = &mut self.nodes[node];
        if own.is_busy() {
            return;
        }
        let index = own.state.join("index");
        let _ = std::fs::remove_dir_all(&index);
        copy_folder(&kept.state.join("index"), &index);
        self.ledger.count("old index put back");
    }

    fn clone_node(&mut self, node: usize, other_machine: bool) {
        if self.nodes.len() >= MAX_NODES {
            return;
        }
        let (number, state) = (self.nodes.len(), self.folder());
        let mut copy = self.nodes[node].copy(number, state);
        if other_machine {
            copy.machine.0[0] ^= 0x80 | number as u8;
        }
        let group = copy.identity.group;
        self.nodes.push(copy);
        self.ledger.add_agent(group);
        self.ledger.suspect_all(group);
        self.ledger.count("agent cloned");
    }

    /// The operator says who is the writer.
    async fn adopt(&mut self, node: usize) -> bool {
        let group = self.group_of(node);
        let Some(store) = self.receivers.first().map(|r| r.store(Gate::default())) else { return false };
        let (name, agent) = (self.groups[group].name.clone(), self.nodes[node].identity.agent);
        let command = async {
            let catalog = Catalog::open(store).await?;
            access::adopt(&catalog, &name, agent, clock::now()).await
        };
        match tokio::time::timeout(OPERATOR, command).await {
            Ok(Ok(_)) => {
                self.ledger.adopted(self.groups[group].id);
                self.ledger.count("adopted");
                true
            }
            _ => false,
        }
    }

    fn grow(&mut self, node: usize, volume: usize, blocks: u64) {
        let bytes = blocks * u64::from(BLOCK);
        let content = self.chance.below(5) as u32;
        let own = &mut self.nodes[node];
        if own.is_busy() || own.volumes.is_empty() {
            return;
        }
        let at = volume % own.volumes.len();
        let volume = &mut own.volumes[at];
        let Some(disk) = own.disks.get(volume.id) else { return };
        let geometry = Geometry::new(BLOCK, disk.geometry().length() + bytes).expect("small");
        disk.resize(geometry, content);
        volume.geometry = geometry;
        volume.incarnation = volume.incarnation.next();
        self.ledger.count("volume grew");
    }

    fn replace(&mut self, node: usize, volume: usize, blocks: u64) {
        let geometry = self.geometry(blocks);
        let content = self.chance.below(5) as u32;
        let own = &mut self.nodes[node];
        if own.is_busy() || own.volumes.is_empty() {
            return;
        }
        let at = volume % own.volumes.len();
        let volume = &mut own.volumes[at];
        let Some(disk) = own.disks.get(volume.id) else { return };
        disk.resize(geometry, content);
        volume.geometry = geometry;
        volume.incarnation = volume.incarnation.next();
        self.ledger.count("volume replaced");
    }

    fn add_volume(&mut self, node: usize, blocks: u64) {
        let geometry = self.geometry(blocks);
        let own = &mut self.nodes[node];
        if own.is_busy() || own.volumes.len() >= 4 {
            return;
        }
        let name = format!("v{}", self.chance.between(10, 1_000_000));
        own.protect(&name, geometry);
        self.ledger.count("volume added");
    }

    fn drop_volume(&mut self, node: usize, volume: usize) {
        let own = &mut self.nodes[node];
        if own.is_busy() || own.volumes.len() < 2 {
            return;
        }
        own.volumes.remove(volume % own.volumes.len());
        self.ledger.count("volume dropped");
    }

    /// What retention will do: a checkpoint, the floor, and the records below it go.
    async fn prune(&mut self, group: usize, keep: u64) {
        let id = self.groups[group].id;
        let log = self.log(id).await;
        let Ok((GroupHead { record, point: Some((point, _)) }, _)) = log.head().await else { return };
        // Never the newest point, also where the operator decided something since: a round may be built on it (I15).
        let (newest, wanted) = (record.seq, LogSeq(record.seq.0.saturating_sub(keep)).min(point));
        let floor = self.lowest_floor(&log, wanted, newest).await;
        if floor.0 == 0 || log.floor().await.is_ok_and(|f| f >= floor) || log.write_checkpoint(newest).await.is_err() {
            return;
        }
        let bytes = write_seq(ObjectKind::Floor, floor);
        log.store().put_hint(&log.keys().floor(), Bytes::from(bytes)).await.expect("no weather");
        for seq in (0..floor.0).map(LogSeq) {
            self.bucket.delete(&log.keys().log(seq));
        }
        self.ledger.pruned(id, floor);
        self.ledger.count("log pruned");
    }

    /// Records that lie inside log records keep those: the highest floor below which nothing is needed.
    async fn lowest_floor(&self, log: &GroupLog, wanted: LogSeq, newest: LogSeq) -> LogSeq {
        let mut floor = wanted;
        'lower: while floor.0 > 0 {
            let left = self.bucket.objects().fork();
            for seq in (0..floor.0).map(LogSeq) {
                left.tamper(&log.keys().log(seq), None);
            }
            let store: Arc<dyn ObjectStore> = Arc::new(left);
            let Ok(left) = Catalog::open(store.clone()).await else { return LogSeq(0) };
            let left = left.log(log.group());
            for seq in (floor.0..=newest.0).map(LogSeq) {
                let Ok(Some((record, _))) = log.read(seq).await else { return LogSeq(0) };
                let Some(point) = record.point() else { continue };
                let Ok(opened) = open_view(&left, point, BadIndex::LeaveOut).await else { return LogSeq(0) };
                let missing = missing_segments(&store, log.keys(), &opened.view).await;
                let is_whole = missing.is_ok_and(|(missing, unreadable)| missing.is_empty() && unreadable.is_empty());
                if !is_whole || !opened.holes.is_empty() {
                    floor.0 -= 1;
                    continue 'lower;
                }
            }
            break;
        }
        floor
    }

    /// The operator restores an old copy of the bucket.
    fn put_back_bucket(&mut self, orphans: bool) {
        let Some(kept) = &self.kept_bucket else { return };
        self.receivers.iter_mut().for_each(Receiver::kill);
        self.bucket.roll_back(kept, orphans);
        self.ledger.void_offers();
        let there = kept.objects();
        for group in &self.groups {
            let keys = GroupKeys(group.id);
            let floor = there.get(&keys.floor()).and_then(|bytes| read_seq(ObjectKind::Floor, bytes).ok());
            self.ledger.pruned(group.id, floor.unwrap_or_default());
            self.ledger.forget_acked(group.id, |seq| there.contains_key(&keys.log(seq)));
            self.ledger.suspect_all(group.id);
        }
        self.ledger.count("bucket put back");
    }

    /// Faults stop; everything must come to rest and go on.
    async fn heal(&mut self) {
        self.ledger.trace(format_args!("heal"));
        self.network.heal();
        for at in 0..self.receivers.len() {
            *self.receivers[at].weather.lock().expect("nothing panics under it") = Weather::default();
            self.resume(at);
        }
        for receiver in &mut self.receivers {
            if !receiver.start().await {
                self.ledger.violation("I14", format_args!("a receiver does not start"));
            }
        }
        for at in 0..self.nodes.len() {
            match tokio::time::timeout(HANG, self.nodes[at].wait()).await {
                Ok(_) => {}
                Err(_) => self.ledger.violation("I14", format_args!("an attempt of node {at} hangs")),
            }
            self.nodes[at].kill();
            self.nodes[at].disks.disarm();
        }
        if !self.bucket.harmed().is_empty() {
            // What they have in memory still would hide it.
            for receiver in &mut self.receivers {
                receiver.kill();
                receiver.start().await;
            }
        }
        for group in 0..self.groups.len() {
            if let Some(at) = (0..self.nodes.len()).find(|n| self.group_of(*n) == group) {
                self.converge(at).await;
            }
        }
        oracle::examine(self).await;
        // In every third history each: restores are what takes time.
        match self.chance.below(3) {
            _ if !self.bucket.harmed().is_empty() => {}
            0 => harm::harm(self, &self.chance.clone()).await,
            1 => harm::verify(self).await,
            _ => {}
        }
    }

    /// I14: a new point within three rounds, and a minute.
    async fn converge(&mut self, node: usize) {
        let mut adopted = false;
        let mut last = String::new();
        let mut tries = 0;
        while tries < 3 {
            let receiver = tries % self.receivers.len();
            let began = tokio::time::Instant::now();
            self.sync(node, receiver, CommitWhen::Always, false);
            let Ok(outcome) = tokio::time::timeout(HANG, self.nodes[node].wait()).await else {
                return self.ledger.violation("I14", format_args!("node {node} hangs although nothing fails any more"));
            };
            if began.elapsed() > Duration::from_secs(60) {
                self.ledger.violation("I14", format_args!("node {node} needs {:?}", began.elapsed()));
            }
            tries += 1;
            match outcome {
                Some(Ok(_)) => return oracle::newest_is_what_there_is(self, node).await,
                Some(Err(error)) if error.is_divergence() && !adopted => {
                    adopted = self.adopt(node).await;
                    tries = 0;
                }
                Some(Err(error)) => {
                    last = error.to_string();
                    self.ledger.trace(format_args!("converging: {error}"));
                }
                None => last = "no outcome".into(),
            }
        }
        self.ledger.violation("I14", format_args!("node {node} does not converge: {last}"));
    }
}
