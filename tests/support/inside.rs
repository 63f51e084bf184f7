//! Both libraries in one process with real QUIC in between: for tests that must hold the store in their hands.
//!
//! Read first: [`Inside`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_agent::cmd::Context;
use backhaul_agent::config::{Config, PlaceArgs};
use backhaul_agent::connection::{Session, connect};
use backhaul_agent::machine::machine_id;
use backhaul_agent::pipeline::pace::Compression;
use backhaul_agent::protect;
use backhaul_agent::replicate::{CommitWhen, Round, RoundError, RoundReport};
use backhaul_agent::state::StateDir;
use backhaul_agent::tracker::Tracking;
use backhaul_cli::Output;
use backhaul_protocol::ids::{LogSeq, Name, RepositoryId};
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::key;
use backhaul_protocol::wire::message::PointSpec;
use backhaul_receiver::access::{TokenRequest, make_token};
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::fetch::FetchError;
use backhaul_receiver::read_error::ReadError;
use backhaul_receiver::restore::{Prepared, Request};
use backhaul_receiver::restore_error::RestoreError;
use backhaul_receiver::salvage::OnDamage;
use backhaul_receiver::scrub::{GroupReport, Scrub, Share, verify_group};
use backhaul_receiver::server::{Server, ServerSettings};
use backhaul_receiver::store::ObjectStore;
use backhaul_transport::authority::Authority;
use backhaul_volume::target::Durability;
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::fixture::GROUP;

/// Segments are small, so that small volumes have several.
const SEGMENT: usize = 2 << 20;

/// An agent's state and a certificate authority in a folder.
pub struct Inside {
    dir: tempfile::TempDir,
    authority: (String, String),
}

/// A receiver over some store.
pub struct Receiving {
    /// Where it listens.
    pub address: String,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl Receiving {
    /// Ends it and waits.
    pub async fn end(self) {
        self.stop.cancel();
        self.running.await.expect("the server does not panic");
    }
}

/// Puts the object into an empty store that makes it one.
pub async fn init(store: &dyn ObjectStore) {
    let format = StoreFormat { repository: RepositoryId([7; 16]), sharing: Sharing::ManyReceivers };
    store.put_new(&key::format(), Bytes::from(format.to_bytes())).await.expect("an empty store takes it");
}

fn name(text: &str) -> Name {
    text.parse().expect("a legal name")
}

impl Inside {
    /// In a temporary folder; `in_memory` where nothing of it needs to survive and fsync is not the point.
    pub fn new(in_memory: bool) -> Self {
        let shm = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("backhaul-test-");
        let dir = if in_memory && shm.is_dir() { builder.tempdir_in(shm) } else { builder.tempdir() };
        Self { dir: dir.expect("a folder"), authority: Authority::generate(SystemTime::now()).expect("an authority") }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a receiver over a store.
    pub async fn serve(&self, store: Arc<dyn ObjectStore>) -> Receiving {
        let catalog = Catalog::open(store).await.expect("it is a store");
        let authority = Authority::from_pem(&self.authority.0, &self.authority.1).expect("just made");
        let settings = ServerSettings {
            listen: ([127, 0, 0, 1], 0).into(),
            segment_size: SEGMENT,
            memory: 8 * SEGMENT,
            ..ServerSettings::default()
        };
        let server = Server::bind(catalog, authority, settings).expect("a free port");
        let address = server.local_addr().expect("bound").to_string();
        let stop = CancellationToken::new();
        Receiving { address, running: tokio::spawn(server.run(stop.clone())), stop }
    }

    fn context(&self, state: &Path) -> Context {
        let file = self.path("agent.toml");
        let machine = self.path("machine-id");
        std::fs::write(&machine, "the first machine").expect("there is room");
        std::fs::write(&file, format!("machine_id_file = \"{}\"\n", machine.display())).expect("there is room");
        let place = PlaceArgs { state: Some(state.to_owned()), receiver: None };
        Context { config: Config::build(Some(&file), &place).expect("right") }
    }

    fn quiet() -> Output {
        Output::new(false, true, backhaul_agent::cmd::meaning)
    }

    /// Joins an agent and protects a volume.
    pub async fn join(&self, store: Arc<dyn ObjectStore>, receiving: &Receiving, state: &Path, volume: &Path) {
        let catalog = Catalog::open(store).await.expect("it is a store");
        let authority = Authority::from_pem(&self.authority.0, &self.authority.1).expect("just made");
        let request = TokenRequest {
            group: name(GROUP),
            role: AgentRole::Writer,
            ttl: Duration::from_secs(600),
            address: receiving.address.clone(),
        };
        let token = make_token(&catalog, authority.fingerprint(), request, SystemTime::now()).await.expect("a token");
        let args = backhaul_agent::cmd::join::JoinArgs {
            token: Some(token.reveal()),
            token_file: None,
            token_on_command_line: true,
        };
        backhaul_agent::cmd::join::run(args, &self.context(state), Self::quiet()).await.expect("it joins");
        protect::protect(&StateDir::new(state), &[(name("data"), volume.to_owned())], 65536).expect("it is protected");
    }

    /// One round of an agent: no second try.
    pub async fn round(&self, receiving: &Receiving, state: &Path) -> Result<RoundReport, RoundError> {
        let context = self.context(state);
        let dir = StateDir::new(state);
        let joined = dir.expect_joined()?;
        let (volumes, _) = protect::refresh(&dir).expect("the volume is as it was");
        let mut session = Session::new(
            connect(&dir, &joined, Some(&receiving.address), context.config.tuning).await.map_err(RoundError::from)?,
        );
        let round = Round {
            state: &dir,
            joined: &joined,
            machine: machine_id(&context.config.machine_id_file).expect("it is there"),
            volumes: &volumes,
            provider: &backhaul_agent::capture::Live,
            threads: 2,
            load: Arc::default(),
            compression: Compression::default(),
            when: CommitWhen::Always,
            progress: Self::quiet().progress(1).phase("scan", 1),
            observe: &|_| {},
        };
        let report = round.run(&mut session, &mut Tracking::default()).await;
        // Also after a failure, so that the receiver does not wait for us.
        session.close().await;
        report
    }

    /// Restores a point from a store and gives its bytes.
    pub async fn restored(&self, store: Arc<dyn ObjectStore>, point: u64) -> Vec<u8> {
        self.try_restored(store, point).await.expect("a committed point can be restored")
    }

    /// The same where it may fail.
    pub async fn try_restored(&self, store: Arc<dyn ObjectStore>, point: u64) -> Result<Vec<u8>, RestoreError> {
        let to = self.path("restored.img");
        // Never onto what is right already.
        let _ = std::fs::remove_file(&to);
        let request = Request {
            group: name(GROUP),
            volume: Some(name("data")),
            point: PointSpec::Number(LogSeq(point)),
            targets: vec![to.display().to_string()],
            refuse: Vec::new(),
            confirm: Vec::new(),
            durability: Durability::Cached,
            on_damage: OnDamage::Fail,
        };
        let catalog = Catalog::open(store).await?;
        let mut progress = Self::quiet().progress(4);
        let prepared = Prepared::new(catalog, request, &mut progress).await?;
        prepared.run(&mut progress).await?;
        Ok(std::fs::read(&to).expect("it was restored"))
    }

    /// What `verify` finds of a point: its log and its data.
    pub async fn verify(&self, store: Arc<dyn ObjectStore>, point: u64) -> Result<GroupReport, FetchError> {
        let catalog = Catalog::open(store).await?;
        let log = catalog.expect_group(&name(GROUP)).await?;
        let share = Share::parse("100%").expect("legal");
        let scrub = Scrub { group: name(GROUP), log, volume: None, share, threads: Arc::new(Semaphore::new(2)) };
        let mut progress = Self::quiet().progress(1);
        verify_group(&scrub, PointSpec::Number(LogSeq(point)), |_, total| progress.phase("verify", total)).await
    }

    /// Numbers of the points that a store shows.
    pub async fn points(&self, store: Arc<dyn ObjectStore>) -> Vec<u64> {
        self.try_points(store).await.expect("the log can be read")
    }

    /// The same where the log may be damaged.
    pub async fn try_points(&self, store: Arc<dyn ObjectStore>) -> Result<Vec<u64>, ReadError> {
        let catalog = Catalog::open(store).await?;
        let history = catalog.expect_group(&name(GROUP)).await?.whole_history().await?;
        match history.damage().next() {
            Some(damage) => Err(damage.clone()),
            None => Ok(history.points.iter().map(|p| p.seq.0).collect()),
        }
    }
}
