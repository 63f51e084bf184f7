//! Sessions over real QUIC and TLS on a simulated network: nothing hangs longer than QUIC's idle timeout allows, what is
//! broken off goes on, refusals are clean, and points are right.
//!
//! Read first: [`session`]. A failing seed is run alone with `BACKHAUL_TEST_SEED`.

use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_agent::connection::{Session, connect_from};
use backhaul_agent::replicate::{CommitWhen, Round, RoundError, RoundReport};
use backhaul_agent::state::{Joined, ProtectedVolume, StateDir};
use backhaul_cli::Output;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{Incarnation, Name, RepositoryId, StateId, VolumeId};
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::key;
use backhaul_protocol::store::log::MachineId;
use backhaul_protocol::wire::message::{Join, PointSpec, Reason};
use backhaul_receiver::access::{self, TokenRequest};
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::restore::{Prepared, Request};
use backhaul_receiver::salvage::OnDamage;
use backhaul_receiver::server::{Server, ServerSettings};
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::mem::MemStore;
use backhaul_seams::{clock, world};
use backhaul_simulation::chance::Chance;
use backhaul_simulation::disk::{Disk, Disks, bytes_of};
use backhaul_simulation::history::BLOCK;
use backhaul_simulation::packets::{Packets, Path};
use backhaul_transport::authority::Authority;
use backhaul_transport::endpoint::{Endpoint, IDLE_TIMEOUT};
use backhaul_volume::target::Durability;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const SESSIONS: u64 = 500;
/// An attempt that reaches nobody ends after the idle timeout of its first packets; a second is for its end.
const NOBODY: Duration = Duration::from_secs(IDLE_TIMEOUT.as_secs() + 1);

struct Site {
    packets: Packets,
    chance: Chance,
    store: Arc<MemStore>,
    authority: (String, String),
    receiver: Option<(watch::Sender<bool>, JoinHandle<()>)>,
    dir: tempfile::TempDir,
    ports: u16,
    volume: ProtectedVolume,
    disks: Disks,
    joined: Option<Joined>,
}

const RECEIVER: ([u8; 4], u16) = ([10, 0, 0, 1], 4433);

fn name(text: &str) -> Name {
    text.parse().expect("legal")
}

impl Site {
    async fn new(seed: u64) -> Self {
        let chance = Chance::new(seed);
        let store = Arc::new(MemStore::new());
        let format = StoreFormat { repository: RepositoryId([7; 16]), sharing: Sharing::ManyReceivers };
        store.put_new(&key::format(), Bytes::from(format.to_bytes())).await.expect("an empty store takes it");
        let shm = FilePath::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.expect("a folder");
        let geometry = Geometry::new(BLOCK, chance.between(10, 60) * u64::from(BLOCK) - 77).expect("legal");
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
        let mut site =
            Self { packets, chance, store, authority, receiver: None, dir, ports: 1000, volume, disks, joined: None };
        site.join(AgentRole::Writer).await;
        site.start().await;
        site
    }

    fn authority(&self) -> Authority {
        Authority::from_pem(&self.authority.0, &self.authority.1).expect("just made")
    }

    fn state(&self) -> StateDir {
        StateDir::new(&self.dir.path().join("state"))
    }

    async fn join(&mut self, role: AgentRole) {
        let (state, catalog) = (self.state(), Catalog::open(self.store.clone()).await.expect("a store"));
        let _ = std::fs::remove_dir_all(state.path());
        state.create().expect("a folder");
        let request = TokenRequest { group: name("g"), role, ttl: Duration::from_secs(60), address: "r:1".into() };
        let token = access::make_token(&catalog, self.authority().fingerprint(), request, clock::now()).await;
        let join = Join {
            secret: token.expect("a token").secret,
            request: state.ensure_key().expect("a key").request().expect("a request"),
            machine: MachineId([1; 32]),
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

    async fn start(&mut self) {
        let catalog = Catalog::open(self.store.clone()).await.expect("a store");
        let settings = ServerSettings { memory: 1 << 20, segment_size: 200 << 10, ..ServerSettings::default() };
        let medium = self.packets.bind(RECEIVER.into());
        let server = Server::over(medium, catalog, self.authority(), settings).expect("an endpoint");
        let (stop, stopped) = watch::channel(false);
        self.receiver = Some((stop, tokio::spawn(server.run(stopped))));
    }

    /// Kill -9.
    fn kill(&mut self) {
        if let Some((_, running)) = self.receiver.take() {
            self.packets.unbind(RECEIVER.into());
            running.abort();
        }
    }

    fn write(&self) {
        let disk = self.disks.get(self.volume.id).expect("it is there");
        let blocks = disk.blocks().len() as u64;
        let count = self.chance.between(1, blocks + 1);
        let writes: Vec<_> =
            (0..count).map(|_| (self.chance.below(blocks) as usize, self.chance.below(6) as u32)).collect();
        disk.write(&writes);
    }

    fn attempt(&mut self) -> JoinHandle<Result<RoundReport, RoundError>> {
        self.ports += 1;
        let own: SocketAddr = ([10, 0, 1, 1], self.ports).into();
        let medium = self.packets.bind(own);
        let (state, disks, volumes) = (self.state(), self.disks.clone(), [self.volume.clone()]);
        let joined = self.joined.clone().expect("it joined");
        tokio::spawn(async move {
            let endpoint = Endpoint::over(medium, None).map_err(backhaul_agent::connection::SessionError::from)?;
            let mut session = Session::new(connect_from(endpoint, &state, RECEIVER.into()).await?);
            let round = Round {
                state: &state,
                joined: &joined,
                machine: MachineId([1; 32]),
                volumes: &volumes,
                provider: &disks,
                threads: 2,
                level: 1,
                when: CommitWhen::Always,
                progress: Output::new(false, true, |_| None).progress(1).phase("scan", 1),
            };
            let report = round.run(&mut session).await;
            session.close().await;
            report
        })
    }

    /// Until a point is made; how many attempts it took.
    async fn until_committed(&mut self) -> usize {
        let mut errors = Vec::new();
        for tries in 1..=12 {
            let running = self.attempt();
            let done = tokio::time::timeout(Duration::from_secs(600), running).await;
            match done.expect("an attempt hangs (I14)").expect("nothing panics (I19)") {
                Ok(_) => return tries,
                Err(error) => {
                    assert!(error.is_retryable(), "a network's fault is for good: {error}");
                    errors.push(error.to_string());
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        panic!("no point after many attempts: {errors:?}");
    }

    async fn is_right(&self, seed: u64) {
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
        let catalog = Catalog::open(self.store.clone()).await.expect("a store");
        let prepared = Prepared::new(catalog, request, &mut progress).await.expect("the point can be restored (I2)");
        prepared.run(&mut progress).await.expect("the point can be restored (I2)");
        let bytes = std::fs::read(&to).expect("it was restored");
        let mut expected = vec![0; BLOCK as usize];
        let blocks = self.disks.get(self.volume.id).expect("it is there").blocks();
        for (i, (held, content)) in bytes.chunks(BLOCK as usize).zip(blocks).enumerate() {
            bytes_of(content, &mut expected[..held.len()]);
            assert!(*held == expected[..held.len()], "seed {seed}: block {i} is wrong (I1)");
        }
    }
}

/// What one seed does: points over a bad path, with the network cut and the receiver killed in between.
async fn session(seed: u64) {
    let _world = world::enter(seed, SystemTime::now(), None);
    let mut site = Site::new(seed).await;
    let chance = site.chance.clone();
    let loss = chance.pick(&[0.0, 1.0, 5.0, 10.0, 20.0, 30.0]);
    let path = Path {
        loss,
        double: chance.pick(&[0.0, 1.0, 10.0]),
        delay: chance.pick(&[(1, 3), (1, 60), (40, 60), (100, 400)]),
        mtu: chance.pick(&[1200, 1252, 1500, 9000]),
    };
    for round in 0..3 {
        site.write();
        site.packets.set(path);
        let running = site.attempt();
        tokio::time::sleep(chance.millis(0, 3000)).await;
        match chance.below(5) {
            0 => {
                site.kill();
                tokio::time::sleep(chance.millis(0, 8000)).await;
                site.start().await;
            }
            1 => {
                let who: SocketAddr =
                    if chance.happens(0.5) { RECEIVER.into() } else { ([10, 0, 1, 1], site.ports).into() };
                site.packets.mute(who, true);
                tokio::time::sleep(chance.millis(0, 60_000)).await;
                site.packets.mute(who, false);
            }
            2 => running.abort(),
            _ => {}
        }
        // Whatever became of it: it does not hang.
        let began = tokio::time::Instant::now();
        let ended = tokio::time::timeout(Duration::from_secs(900), running).await;
        assert!(ended.is_ok(), "seed {seed}: an attempt hangs (I14)");
        let (took, sent) = (began.elapsed(), site.packets.sent());
        let tries = site.until_committed().await;
        println!("seed {seed} round {round} {path:?}: ended after {took:?} more, then {tries} tries, {sent} datagrams");
        site.is_right(seed).await;
    }
    nobody_answers(&mut site, seed).await;
    if chance.happens(0.5) {
        refused(&mut site, seed).await;
    }
    site.kill();
}

/// I14: an attempt that reaches nobody ends soon, and helps no longer than that.
async fn nobody_answers(site: &mut Site, seed: u64) {
    site.packets.set(Path::default());
    site.packets.mute(RECEIVER.into(), true);
    let began = tokio::time::Instant::now();
    let error = site.attempt().await.expect("nothing panics").expect_err("nobody is heard");
    assert!(error.is_retryable() && began.elapsed() <= NOBODY, "seed {seed}: {error} after {:?}", began.elapsed());
    site.packets.mute(RECEIVER.into(), false);
    let began = tokio::time::Instant::now();
    site.until_committed().await;
    assert!(began.elapsed() < Duration::from_secs(60), "seed {seed}: {:?} on a path that works", began.elapsed());
}

/// Refusals come as such, and at once.
async fn refused(site: &mut Site, seed: u64) {
    site.join(AgentRole::RestoreOnly).await;
    let began = tokio::time::Instant::now();
    let error = site.attempt().await.expect("nothing panics").expect_err("it may not write");
    let RoundError::Session(backhaul_agent::connection::SessionError::Source(
        backhaul_protocol::session::source::SourceError::Refused(refusal),
    )) = &error
    else {
        panic!("seed {seed}: {error}");
    };
    assert_eq!(refusal.reason, Reason::Denied, "seed {seed}: {refusal}");
    assert!(began.elapsed() < Duration::from_secs(5), "seed {seed}: {:?}", began.elapsed());
}

fn run(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime can be made");
    runtime.block_on(session(seed));
    runtime.shutdown_background();
}

#[test]
fn sessions_of_real_quic_over_a_bad_network() {
    if let Some(seed) = std::env::var("BACKHAUL_TEST_SEED").ok().and_then(|s| s.parse().ok()) {
        return run(seed);
    }
    let next = std::sync::atomic::AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if seed >= SESSIONS {
                        return;
                    }
                    run(seed);
                }
            });
        }
    });
}
