//! A receiver, its store and one agent, with a simulated network between them.
//!
//! Read first: [`Site`].

use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_agent::connection::{Connected, Session, SessionError, connect_from};
use backhaul_agent::pipeline::pace::Compression;
use backhaul_agent::replicate::{CommitWhen, Round, RoundError, RoundReport};
use backhaul_agent::state::{Joined, ProtectedVolume, StateDir};
use backhaul_agent::tracker::Tracking;
use backhaul_cli::Output;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{Incarnation, LogSeq, Name, RepositoryId, StateId, VolumeId};
use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::key::{self, GroupKeys};
use backhaul_protocol::store::log::MachineId;
use backhaul_protocol::wire::message::{AgentMessage, Join, Open, OpenVolume, PointSpec, ReceiverMessage, Refusal};
use backhaul_receiver::access::{self, TokenRequest};
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::restore::{Prepared, Request};
use backhaul_receiver::salvage::OnDamage;
use backhaul_receiver::server::{Server, ServerSettings, Shared};
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::fault::FaultStore;
use backhaul_receiver::store::mem::MemStore;
use backhaul_seams::clock;
use backhaul_simulation::chance::Chance;
use backhaul_simulation::disk::{Disk, Disks, bytes_of};
use backhaul_simulation::history::BLOCK;
use backhaul_simulation::packets::Packets;
use backhaul_transport::authority::Authority;
use backhaul_transport::endpoint::Endpoint;
use backhaul_volume::target::Durability;
use bytes::Bytes;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longer than anything that an attempt may wait for.
const HANG: Duration = Duration::from_secs(900);
/// Attempts until a point, on any path.
const TRIES: usize = 12;
/// Where the receiver is.
pub const RECEIVER: ([u8; 4], u16) = ([10, 0, 0, 1], 4433);
/// Where the agent joined.
pub const MACHINE: MachineId = MachineId([1; 32]);

/// A round that is under way.
pub type Attempt = JoinHandle<Result<RoundReport, RoundError>>;

pub struct Site {
    pub seed: u64,
    pub packets: Packets,
    pub chance: Chance,
    pub store: Arc<FaultStore<MemStore>>,
    pub authority: (String, String),
    pub receiver: Option<Receiver>,
    pub volume: ProtectedVolume,
    pub disks: Disks,
    pub machine: MachineId,
    joined: Option<Joined>,
    dir: tempfile::TempDir,
    ports: u16,
}

/// A receiver that runs.
pub struct Receiver {
    pub shared: Arc<Shared>,
    pub stop: CancellationToken,
    pub running: JoinHandle<()>,
}

fn name(text: &str) -> Name {
    text.parse().expect("legal")
}

/// What a receiver said no with.
pub fn refusal(error: &RoundError) -> Option<&Refusal> {
    match error {
        RoundError::Session(SessionError::Source(SourceError::Refused(refusal))) => Some(refusal),
        _ => None,
    }
}

impl Site {
    pub async fn new(seed: u64) -> Self {
        let chance = Chance::new(seed);
        let store = Arc::new(FaultStore::new(MemStore::new(), seed));
        let format = StoreFormat { repository: RepositoryId([7; 16]), sharing: Sharing::ManyReceivers };
        store.put_new(&key::format(), Bytes::from(format.to_bytes())).await.expect("an empty store takes it");
        let shm = FilePath::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.expect("a folder");
        let geometry = Geometry::new(BLOCK, chance.between(24, 60) * u64::from(BLOCK) - 77).expect("legal");
        let volume = ProtectedVolume {
            id: VolumeId([5; 16]),
            name: name("data"),
            path: "/simulated".into(),
            identity: "image 1 /simulated".parse().expect("an identity"),
            incarnation: Incarnation(1),
            geometry,
        };
        let disks = Disks::default();
        disks.set(volume.id, Disk::new(geometry));
        let packets = Packets::new(chance.clone());
        let authority = Authority::generate(SystemTime::now()).expect("an authority");
        let mut site = Self {
            seed,
            packets,
            chance,
            store,
            authority,
            receiver: None,
            volume,
            disks,
            machine: MACHINE,
            joined: None,
            dir,
            ports: 1000,
        };
        site.join(AgentRole::Writer).await;
        site.start().await;
        site
    }

    pub fn authority(&self) -> Authority {
        Authority::from_pem(&self.authority.0, &self.authority.1).expect("just made")
    }

    pub async fn catalog(&self) -> Catalog {
        Catalog::open(self.store.clone()).await.expect("a store")
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(&self.dir.path().join("state"))
    }

    pub fn joined(&self) -> Joined {
        self.joined.clone().expect("it joined")
    }

    pub async fn join(&mut self, role: AgentRole) {
        let (state, catalog) = (self.state(), self.catalog().await);
        let _ = std::fs::remove_dir_all(state.path());
        state.create().expect("a folder");
        let request = TokenRequest { group: name("g"), role, ttl: Duration::from_secs(60), address: "r:1".into() };
        let token = access::make_token(&catalog, self.authority().fingerprint(), request, clock::now()).await;
        let join = Join {
            secret: token.expect("a token").secret,
            request: state.ensure_key().expect("a key").request().expect("a request"),
            machine: MACHINE,
            host: name("server"),
        };
        let joined = access::join(&catalog, &self.authority(), &join, clock::now()).await.expect("it joins");
        let own = Joined {
            agent: joined.agent,
            group: joined.group,
            group_name: joined.group_name,
            role: joined.role,
            receiver: "r:1".into(),
            state: StateId([2; 16]),
        };
        state.write_joined(&own, &joined.certificates).expect("there is room");
        self.joined = Some(own);
    }

    pub async fn start(&mut self) {
        let catalog = self.catalog().await;
        let settings = ServerSettings { memory: 1 << 20, segment_size: 100 << 10, ..ServerSettings::default() };
        let medium = self.packets.bind(RECEIVER.into());
        let server = Server::over(medium, catalog, self.authority(), settings).expect("an endpoint");
        let stop = CancellationToken::new();
        let shared = server.shared();
        self.receiver = Some(Receiver { shared, running: tokio::spawn(server.run(stop.clone())), stop });
    }

    /// Kill -9.
    pub fn kill(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            self.packets.unbind(RECEIVER.into());
            receiver.running.abort();
        }
    }

    /// What the receiver's sessions share.
    pub fn shared(&self) -> &Shared {
        &self.receiver.as_ref().expect("it runs").shared
    }

    /// Where the newest attempt comes from.
    pub fn agent(&self) -> SocketAddr {
        ([10, 0, 1, 1], self.ports).into()
    }

    /// Kill -9 of the agent: nothing is said.
    pub async fn kill_agent(&self, attempt: Attempt) {
        self.packets.unbind(self.agent());
        attempt.abort();
        let _ = attempt.await;
    }

    /// Writes of chance.
    pub fn write(&self) {
        let disk = self.disks.get(self.volume.id).expect("it is there");
        let blocks = disk.blocks().len() as u64;
        let count = self.chance.between(1, blocks + 1);
        let writes: Vec<_> =
            (0..count).map(|_| (self.chance.below(blocks) as usize, self.chance.below(6) as u32)).collect();
        disk.write(&writes);
    }

    /// Every block becomes another one that does not compress; gives the bytes of records that this makes.
    pub fn write_all(&self) -> u64 {
        let disk = self.disks.get(self.volume.id).expect("it is there");
        let blocks = disk.blocks();
        let writes: Vec<_> = blocks.iter().enumerate().map(|(i, held)| (i, if *held == 5 { 7 } else { 5 })).collect();
        disk.write(&writes);
        blocks.len() as u64 * u64::from(BLOCK + 64)
    }

    /// An endpoint of the agent, at a new address.
    pub fn endpoint(&mut self) -> Endpoint {
        self.ports += 1;
        Endpoint::over(self.packets.bind(self.agent()), None).expect("an endpoint")
    }

    /// A connection of the agent, greeted.
    pub async fn connect(&mut self) -> Result<Connected, SessionError> {
        let endpoint = self.endpoint();
        connect_from(endpoint, &self.state(), RECEIVER.into()).await
    }

    pub fn round<'a>(&'a self, state: &'a StateDir, joined: &'a Joined) -> Round<'a> {
        Round {
            state,
            joined,
            machine: self.machine,
            volumes: std::slice::from_ref(&self.volume),
            provider: &self.disks,
            threads: 2,
            load: Arc::default(),
            compression: Compression::default(),
            when: CommitWhen::Always,
            progress: Output::new(false, true, |_| None).progress(1).phase("scan", 1),
            observe: &|_| {},
        }
    }

    /// Connects and makes a point.
    pub fn attempt(&mut self) -> Attempt {
        let endpoint = self.endpoint();
        let (state, joined, machine) = (self.state(), self.joined(), self.machine);
        let (disks, volumes) = (self.disks.clone(), [self.volume.clone()]);
        tokio::spawn(async move {
            let mut session = Session::new(connect_from(endpoint, &state, RECEIVER.into()).await?);
            let round = Round {
                state: &state,
                joined: &joined,
                machine,
                volumes: &volumes,
                provider: &disks,
                threads: 2,
                load: Arc::default(),
                compression: Compression::default(),
                when: CommitWhen::Always,
                progress: Output::new(false, true, |_| None).progress(1).phase("scan", 1),
                observe: &|_| {},
            };
            let report = round.run(&mut session, &mut Tracking::default()).await;
            session.close().await;
            report
        })
    }

    /// How an attempt ends, which it does.
    pub async fn ended(&self, attempt: Attempt) -> Result<RoundReport, RoundError> {
        let ended = tokio::time::timeout(HANG, attempt).await;
        let ended = ended.unwrap_or_else(|_| panic!("seed {}: an attempt hangs (I14)", self.seed));
        let ended = ended.expect("nothing panics (I19)");
        if let Ok(report) = &ended {
            self.is_stored(report);
        }
        ended
    }

    /// I3: what the agent was told is in the store.
    pub fn is_stored(&self, report: &RoundReport) {
        let seq = report.committed.map_or(LogSeq(0), |c| c.seq);
        let key = GroupKeys(self.joined().group).log(seq);
        let stored = self.store.inner().objects().contains_key(&key);
        assert!(stored, "seed {}: point {seq} was told and is not stored (I3)", self.seed);
    }

    /// Until a point is made: how many attempts it took, and the last one's report.
    pub async fn until_committed(&mut self) -> (usize, RoundReport) {
        let mut errors = Vec::new();
        for tries in 1..=TRIES {
            let attempt = self.attempt();
            match self.ended(attempt).await {
                Ok(report) => return (tries, report),
                Err(error) => {
                    assert!(error.is_retryable(), "seed {}: a network's fault is for good: {error}", self.seed);
                    errors.push(error.to_string());
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        panic!("seed {}: no point after many attempts (I14): {errors:?}", self.seed);
    }

    /// A point at the first attempt, and soon: nothing is in its way.
    pub async fn committed_within(&mut self, limit: Duration, what: &str) -> RoundReport {
        let began = Instant::now();
        let attempt = self.attempt();
        let report = self.ended(attempt).await;
        let report = report.unwrap_or_else(|error| panic!("seed {}: {what}: {error}", self.seed));
        assert!(began.elapsed() <= limit, "seed {}: {what}: {:?} (I14)", self.seed, began.elapsed());
        report
    }

    /// Opens a round by hand.
    pub async fn open(&mut self) -> Connected {
        let mut connected = self.connect().await.expect("a path that works");
        let writer = self.state().writer().expect("readable");
        let open = Open {
            state: self.joined().state,
            nonces: writer.nonce.into_iter().chain(writer.pending.iter().map(|p| p.nonce)).collect(),
            machine: self.machine,
            high_water: writer.high_water,
            volumes: vec![OpenVolume {
                id: self.volume.id,
                name: self.volume.name.clone(),
                incarnation: self.volume.incarnation,
                geometry: self.volume.geometry,
            }],
        };
        connected.sender.send(&AgentMessage::Open(open)).await.expect("a path that works");
        let answer = connected.receiver.receive().await.expect("a path that works");
        assert!(matches!(answer, Some(ReceiverMessage::Opened(_))), "seed {}: {answer:?}", self.seed);
        connected
    }

    /// Bytes of all segments.
    pub fn segments(&self) -> u64 {
        let objects = self.store.inner().objects();
        objects.iter().filter(|(key, _)| key.as_str().contains("/segments/")).map(|(_, body)| body.len() as u64).sum()
    }

    /// The newest point holds what the disk does.
    pub async fn is_right(&self) {
        let to = self.dir.path().join("restored");
        let _ = std::fs::remove_file(&to);
        let request = Request {
            group: name("g"),
            volume: Some(name("data")),
            point: PointSpec::Latest,
            targets: vec![to.display().to_string()],
            refuse: Vec::new(),
            confirm: Vec::new(),
            durability: Durability::Cached,
            on_damage: OnDamage::Fail,
        };
        let mut progress = Output::new(false, true, |_| None).progress(4);
        let prepared = Prepared::new(self.catalog().await, request, &mut progress).await;
        let prepared = prepared.expect("the point can be restored (I2)");
        prepared.run(&mut progress).await.expect("the point can be restored (I2)");
        let bytes = std::fs::read(&to).expect("it was restored");
        let mut expected = vec![0; BLOCK as usize];
        let blocks = self.disks.get(self.volume.id).expect("it is there").blocks();
        for (i, (held, content)) in bytes.chunks(BLOCK as usize).zip(blocks).enumerate() {
            bytes_of(content, &mut expected[..held.len()]);
            assert!(*held == expected[..held.len()], "seed {}: block {i} is wrong (I1)", self.seed);
        }
    }
}
