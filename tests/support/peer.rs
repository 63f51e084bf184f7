//! A peer that can say anything: tests of what a receiver makes of it.
//!
//! Read first: [`Target`].

use std::net::SocketAddr;
use std::time::Duration;

use backhaul_agent::machine::machine_id;
use backhaul_agent::state::StateDir;
use backhaul_protocol::wire::message::{AgentMessage, Open, OpenVolume, ReceiverMessage};
use backhaul_transport::control::{ControlReceiver, ControlSender, greet};
use backhaul_transport::endpoint::{Endpoint, Windows};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::QuicLink;
use backhaul_transport::tls::{ReceiverTrust, client_config};
use backhaul_transport::tuning::Tuning;

use crate::fixture::number;
use crate::{Agent, Fixture, Random, Serving, image};

const MIB: u64 = 1 << 20;

/// A receiver with one agent that has one point of 2 MiB, and its keys in hostile hands.
pub struct Target {
    /// Its folder.
    pub f: Fixture,
    /// The receiver.
    pub serving: Serving,
    /// The agent.
    pub agent: Agent,
}

/// One with these lines in the receiver's settings.
pub fn target_with(settings: &str) -> Target {
    let f = Fixture::new();
    let file = f.path("receiver.toml");
    std::fs::write(&file, settings).expect("there is room");
    let serving = f.serve_with(&["--config", file.to_str().expect("UTF-8")]);
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), 2 * MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    Target { f, serving, agent }
}

/// One with the settings that everybody has.
pub fn target() -> Target {
    target_with("")
}

/// What a peer shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum As {
    /// No certificate.
    Stranger,
    /// The agent's certificate.
    Agent,
}

impl Target {
    /// A connection that the receiver takes.
    pub async fn connect(&self, who: As) -> (Endpoint, Connection) {
        let (endpoint, connection) = self.try_connect(who).await;
        (endpoint, connection.expect("the receiver takes anybody"))
    }

    /// A connection, or why not.
    pub async fn try_connect(&self, who: As) -> (Endpoint, Result<Connection, TransportError>) {
        let state = StateDir::new(&self.agent.state);
        let chain = state.chain().expect("it joined");
        let key = state.ensure_key().expect("it has a key");
        let trust = ReceiverTrust::Authority(chain.last().cloned().expect("the authority's"));
        let shown = (who == As::Agent).then(|| (chain[..1].to_vec(), &key));
        let tls = client_config(trust, shown).expect("usable");
        let address: SocketAddr = self.serving.socket();
        let endpoint = Endpoint::client(address, Tuning::default()).expect("a free port");
        let connection = endpoint.connect(address, tls, Windows::BLOCKS).await.map(Connection);
        (endpoint, connection)
    }

    /// What the agent itself would offer.
    pub fn open(&self) -> Open {
        let state = StateDir::new(&self.agent.state);
        let writer = state.writer().expect("readable");
        Open {
            state: state.expect_joined().expect("joined").state,
            nonces: writer.nonce.into_iter().collect(),
            machine: machine_id(&self.f.path("agent.machine-id")).expect("it is there"),
            high_water: writer.high_water,
            volumes: state
                .volumes()
                .expect("readable")
                .iter()
                .map(|v| OpenVolume {
                    id: v.id,
                    name: v.name.clone(),
                    incarnation: v.incarnation,
                    geometry: v.geometry,
                })
                .collect(),
        }
    }

    /// Whatever was done: the receiver works, and no point came of it.
    #[track_caller]
    pub fn unharmed(&mut self, points: usize) {
        assert!(self.serving.child.is_running(), "{}", self.serving.child.err());
        assert!(!self.serving.child.err().contains("panicked"), "{}", self.serving.child.err());
        assert_eq!(self.f.points().len(), points);
        let synced = self.agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&self.f.path("disk.img"), 65536));
        assert_eq!(number(&synced, "point"), points as u64 + 1);
        self.f.receiver(&["verify"]).ok();
    }
}

/// A connection of a peer.
pub struct Connection(pub quinn::Connection);

/// Its control stream.
pub type Control = (ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>);

impl Connection {
    /// The greeting.
    pub async fn greet(&self) -> Control {
        greet(&*QuicLink::accepted(self.0.clone())).await.expect("the receiver greets")
    }

    /// The receiver must close it.
    pub async fn is_closed(&self, what: &str) {
        let closed = tokio::time::timeout(Duration::from_secs(15), self.0.closed()).await;
        assert!(closed.is_ok(), "{what}: still open");
    }
}
