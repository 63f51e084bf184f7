//! One command, one file.

pub mod check;
pub mod join;
pub mod pause;
pub mod plan;
pub mod protect;
pub mod restore;
pub mod run;
pub mod status;
pub mod sync;

use backhaul_cli::{Exit, Failure, Meaning};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_seams::threads;
use backhaul_volume::VolumeError;
use backhaul_volume::durable::LockError;

use crate::capture::hooks::debt;
use crate::config::Config;
use crate::connection::SessionError;
use crate::machine::MachineIdError;
use crate::pipeline::scanner::ScanError;
use crate::protect::ProtectError;
use crate::replicate::RoundError;
use crate::state::{Joined, StateDir, StateError};

/// What every command is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// What is meant by flags, environment and file.
    pub config: Config,
}

impl Context {
    /// The state folder.
    pub fn state(&self) -> StateDir {
        StateDir::new(&self.config.state)
    }

    /// Runs the `post` hook that a killed agent owes, if there is one. Only who holds the state folder's lock.
    pub async fn pay_hooks(&self) -> Result<(), StateError> {
        let (state, snapshot) = (self.state(), self.config.snapshot.clone());
        threads::blocking(move || debt::pay(&state, snapshot.hooks())).await
    }

    /// Who this agent is, if it may write.
    pub fn joined_writer(&self) -> anyhow::Result<Joined> {
        let joined = self.state().expect_joined()?;
        if joined.role == AgentRole::RestoreOnly {
            let text = "this agent joined with a restore-only token: it restores, and makes no points";
            return Err(Failure::new(Exit::Authentication, "E_DENIED", text)
                .next("with a token for writing, and a state folder of its own: backhaul-agent --state DIR join -")
                .into());
        }
        Ok(joined)
    }
}

/// What the agent's own errors mean to the shell.
pub fn meaning(cause: &(dyn std::error::Error + 'static)) -> Option<Meaning> {
    if let Some(error) = cause.downcast_ref::<StateError>() {
        return Some(match error {
            StateError::NotJoined(_) => {
                let next = "on the receiver: backhaul-receiver token --group NAME; here: backhaul-agent join -";
                (Exit::Config, "E_NOT_JOINED", Some(next.into()))
            }
            StateError::Locked(LockError::Held { .. }) => {
                let next = "wait for it, or end it; the service: systemctl stop backhaul-agent";
                (Exit::Busy, "E_BUSY", Some(next.into()))
            }
            StateError::Locked(e) => of_state_io(std::error::Error::source(e)),
            StateError::Write(e) => of_state_io(std::error::Error::source(e)),
            StateError::Folder { source, .. } => of_state_io(Some(source)),
            StateError::Unusable { .. } | StateError::Tls(_) => {
                let next = "bring the state folder back from a backup; or move it away, join again with a new token, \
                            protect the volumes again, and on the receiver: adopt";
                (Exit::Config, "E_STATE_DIR", Some(next.into()))
            }
        });
    }
    if let Some(error) = cause.downcast_ref::<ProtectError>() {
        return match error {
            ProtectError::Changed { name, path, .. } => {
                let next = format!("if this is meant: backhaul-agent protect {name}={}", path.display());
                Some((Exit::Refused, "E_VOLUME", Some(next)))
            }
            ProtectError::Refused(_) | ProtectError::Geometry { .. } => Some((Exit::Usage, "E_VOLUME", None)),
            ProtectError::Volume { source, .. } => Some(of_volume(source)),
            ProtectError::State(e) => meaning(e),
        };
    }
    if let Some(error) = cause.downcast_ref::<RoundError>() {
        return match error {
            RoundError::State(e) => meaning(e),
            RoundError::Session(e) => meaning(e),
            RoundError::Hook(_) => {
                let next =
                    "run it by hand, with what docs/snapshots.md says that it is given; -v logs all that it says";
                Some((Exit::Failure, "E_HOOK", Some(next.into())))
            }
            RoundError::Volume { source, .. } | RoundError::Scan(ScanError::Volume(source)) => Some(of_volume(source)),
            _ => None,
        };
    }
    if cause.downcast_ref::<MachineIdError>().is_some() {
        let next = "name a file that is there and stays as it is, or leave machine_id_file out";
        return Some((Exit::Config, "E_CONFIG", Some(next.into())));
    }
    match cause.downcast_ref::<SessionError>()? {
        SessionError::State(e) => meaning(e),
        // Their meaning is known to all programs: the chain goes on with them.
        SessionError::Transport(_) | SessionError::Source(_) => None,
    }
}

fn of_state_io(cause: Option<&(dyn std::error::Error + 'static)>) -> Meaning {
    let kind = cause.and_then(|s| s.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
    match kind {
        Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => {
            (Exit::NoSpace, "E_NOSPACE", Some("make room where the state folder is, and run it again".into()))
        }
        _ => (Exit::Config, "E_STATE_DIR", None),
    }
}

fn of_volume(error: &VolumeError) -> Meaning {
    let cause = std::error::Error::source(error).and_then(|s| s.downcast_ref::<std::io::Error>());
    let exit = match (error, cause.map(std::io::Error::kind)) {
        (VolumeError::NotAVolume { .. }, _) => Exit::Refused,
        (_, Some(std::io::ErrorKind::NotFound)) => Exit::NotFound,
        _ => Exit::Failure,
    };
    (exit, "E_SOURCE", None)
}
