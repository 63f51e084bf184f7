//! A simulated agent process: the real rounds over simulated volumes and network, with its state in a real folder.
//!
//! Read first: [`Node`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use backhaul_agent::connection::{Connected, Session, greet};
use backhaul_agent::pipeline::pace::Compression;
use backhaul_agent::replicate::{CommitWhen, Round, RoundError, RoundReport};
use backhaul_agent::state::{Joined, ProtectedVolume, StateDir};
use backhaul_agent::tracker::Tracking;
use backhaul_cli::Output;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{Incarnation, Name, StateId, VolumeId};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::frame::{self, PREFIX_LEN};
use backhaul_protocol::wire::message::AgentMessage;
use backhaul_transport::error::TransportError;
use backhaul_transport::link::Link;
use backhaul_transport::tls::AgentIdentity;
use tokio::task::JoinHandle;

use crate::census;
use crate::disk::{Disk, Disks};
use crate::gate::{Gate, Process};
use crate::ledger::{Ledger, Offer, Shown};
use crate::wire::Tap;

/// An agent and the machine that it runs on.
pub struct Node {
    /// Its number.
    pub number: usize,
    /// Who it is.
    pub identity: AgentIdentity,
    /// The group's name.
    pub group: Name,
    /// The machine.
    pub machine: MachineId,
    /// Its state folder.
    pub state: PathBuf,
    /// What it protects.
    pub volumes: Vec<ProtectedVolume>,
    /// Where that is.
    pub disks: Disks,
    /// An attempt that is under way.
    running: Option<JoinHandle<Outcome>>,
    gate: Gate,
    /// Kept between attempts, as the service does.
    session: Arc<Mutex<Option<Session>>>,
    ledger: Arc<Ledger>,
}

/// How an attempt ended.
pub type Outcome = Result<RoundReport, RoundError>;

impl Node {
    /// One with an empty state folder and no volumes.
    pub fn new(number: usize, identity: AgentIdentity, group: Name, state: PathBuf, ledger: Arc<Ledger>) -> Self {
        let machine = MachineId([number as u8 + 1; 32]);
        StateDir::new(&state).create().expect("a folder in memory");
        let (volumes, disks) = (Vec::new(), Disks::default());
        Self {
            number,
            identity,
            group,
            machine,
            state,
            volumes,
            disks,
            running: None,
            gate: Gate::default(),
            session: Arc::default(),
            ledger,
        }
    }

    /// The same agent on another machine, or twice on one: state, volumes and all.
    pub fn copy(&self, number: usize, state: PathBuf) -> Self {
        copy_folder(&self.state, &state);
        let disks = Disks::default();
        for volume in &self.volumes {
            disks.set(volume.id, self.disks.get(volume.id).expect("it has one").fork());
        }
        let (group, ledger) = (self.group.clone(), self.ledger.clone());
        let (volumes, identity, machine) = (self.volumes.clone(), self.identity, self.machine);
        Self {
            number,
            identity,
            group,
            machine,
            state,
            volumes,
            disks,
            running: None,
            gate: Gate::default(),
            session: Arc::default(),
            ledger,
        }
    }

    /// Protects one more volume.
    pub fn protect(&mut self, name: &str, geometry: Geometry) {
        let id = VolumeId(backhaul_seams::random::id());
        self.volumes.push(ProtectedVolume {
            id,
            name: name.parse().expect("a name"),
            path: PathBuf::from("/simulated"),
            identity: "image 1 /simulated".parse().expect("an identity"),
            incarnation: Incarnation(1),
            geometry,
        });
        self.disks.set(id, Disk::new(geometry));
    }

    /// Whether an attempt is under way.
    pub fn is_busy(&self) -> bool {
        self.running.as_ref().is_some_and(|a| !a.is_finished())
    }

    /// The gate of the process.
    pub fn gate(&self) -> Gate {
        self.gate.clone()
    }

    /// Kill -9.
    pub fn kill(&mut self) {
        std::mem::take(&mut self.gate).set(Process::Dead);
        if let Some(task) = self.running.take() {
            task.abort();
        }
        self.session.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Whether there is a session to go on with.
    pub fn has_session(&self) -> bool {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Begins an attempt over this connection, or over the one that is kept.
    pub fn begin(&mut self, link: Option<Result<Arc<dyn Link>, TransportError>>, when: CommitWhen, keep: bool) {
        self.disks.forget_looks();
        let kept = self.session.clone();
        let (state, disks, volumes) = (StateDir::new(&self.state), self.disks.clone(), self.volumes.clone());
        let (machine, joined) = (self.machine, self.joined());
        let (ledger, node) = (self.ledger.clone(), self.number);
        let began = ledger.standing(node);
        let attempt = async move {
            let own = kept.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut session = match (own, link) {
                (_, Some(link)) => connected(link).await?,
                (Some(session), None) => session,
                (None, None) => return Err(lost().into()),
            };
            let progress = Output::new(false, true, |_| None).progress(1).phase("scan", 1);
            let round = Round {
                state: &state,
                joined: &joined,
                machine,
                volumes: &volumes,
                provider: &disks,
                threads: 2,
                load: Arc::default(),
                compression: Compression::default(),
                when,
                progress,
                observe: &|_| {},
            };
            let report = round.run(&mut session, &mut Tracking::default()).await;
            if let Ok(report) = &report
                && let Some(committed) = report.committed
            {
                ledger.trace(format_args!("acknowledged {} {}", committed.seq, committed.commit));
                ledger.acked(node, began, committed.seq, committed.commit);
            }
            if keep && report.is_ok() {
                *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
            } else {
                session.close().await;
            }
            report
        };
        let ledger = self.ledger.clone();
        self.running = Some(tokio::spawn(async move {
            let outcome = attempt.await;
            census::note(&ledger, node, began, &outcome);
            outcome
        }));
    }

    /// The outcome of an attempt that has ended.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        if self.is_busy() {
            return None;
        }
        self.wait().await
    }

    /// Waits for the attempt that is under way.
    pub async fn wait(&mut self) -> Option<Outcome> {
        let outcome = self.running.as_mut()?.await;
        self.running = None;
        // Killed, or a panic, which is heard elsewhere.
        outcome.ok()
    }

    fn joined(&self) -> Joined {
        Joined {
            agent: self.identity.agent,
            group: self.identity.group,
            group_name: self.group.clone(),
            role: AgentRole::Writer,
            receiver: String::new(),
            state: StateId([self.number as u8; 16]),
        }
    }

    /// Hears what this agent says: the moment at which it asks for a commit is when its volumes were offered.
    pub fn tap(&self) -> Tap {
        let (ledger, disks) = (self.ledger.clone(), self.disks.clone());
        // Of this connection: others of the same agent may show other things.
        let shown = Mutex::new(Shown::default());
        let (node, group) = (self.number, self.identity.group);
        Arc::new(move |bytes: &[u8]| {
            let Some(frame) = bytes.get(PREFIX_LEN..) else { return };
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            match frame::decode::<AgentMessage>(frame) {
                Ok(AgentMessage::Open(open)) => {
                    *shown = Shown { nonces: open.nonces, machine: Some(open.machine), high_water: open.high_water };
                }
                Ok(AgentMessage::Commit(commit)) => {
                    ledger.trace(format_args!("node {node} asks for {} on {}", commit.commit, commit.base));
                    let offer = Offer { node, group, volumes: disks.snapshots(), shown: shown.clone() };
                    ledger.offer(commit.commit, offer);
                }
                _ => {}
            }
        })
    }
}

fn lost() -> backhaul_agent::connection::SessionError {
    TransportError::Stream("no connection".into()).into()
}

async fn connected(link: Result<Arc<dyn Link>, TransportError>) -> Result<Session, RoundError> {
    let link = match link {
        Ok(link) => link,
        Err(error) => {
            // As long as QUIC tries.
            tokio::time::sleep(backhaul_transport::endpoint::IDLE_TIMEOUT).await;
            return Err(backhaul_agent::connection::SessionError::from(error).into());
        }
    };
    let connected: Connected = greet(link).await.map_err(backhaul_agent::connection::SessionError::from)?;
    Ok(Session::new(connected))
}

/// Who an agent of a group is.
pub fn identity(group: backhaul_protocol::ids::GroupId) -> AgentIdentity {
    let agent = backhaul_protocol::ids::AgentId(backhaul_seams::random::id());
    AgentIdentity {
        agent,
        group,
        role: AgentRole::Writer,
        key_hash: backhaul_seams::random::bytes(),
        not_after: UnixMillis(i64::MAX),
    }
}

/// Copies a folder of files and folders.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder in memory");
    for entry in std::fs::read_dir(from).expect("it is there") {
        let entry = entry.expect("readable");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("known").is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("there is room");
        }
    }
}
