//! The agent's state folder: who it is, what it protects, what it may write next.
//!
//! Read first: [`StateDir`]. Every file is replaced whole (temporary file, fsync, rename), so that a power loss leaves
//! the old or the new one. None of it is needed for truth: the receiver's log is the truth.
//!
//! | file | what |
//! |---|---|
//! | `identity.json` | who the agent is and where its receiver is, since it joined |
//! | `agent.key`, `agent.crt` | key (PEM, 0600); certificate chain (DER with lengths), the authority's last |
//! | `volumes.json` | what is protected |
//! | `writer.json` | nonces and the newest commits |
//! | `hooks.json` | that a post hook is owed, see [`crate::capture::hooks::debt`] |
//! | `index/` | digests of blocks, see [`crate::tracker::hash_index`] |
//! | `paused.json` | while somebody wants `run` to make no points |
//! | `lock` | held by `sync` or `run` |
//! | `volumes.lock` | held while `volumes.json` is read and replaced |

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{AgentId, CommitId, GroupId, Incarnation, LogSeq, Name, StateId, VolumeId, WriterNonce};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_transport::authority::AgentKey;
use backhaul_transport::tls::TlsError;
use backhaul_volume::Identity;
use backhaul_volume::durable::{self, DurableError, Lock, LockError};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

/// How the state folder fails.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Never joined.
    #[error("this agent has not joined a group ({} does not exist)", .0.display())]
    NotJoined(PathBuf),
    /// A file can't be read or is not what it should be.
    #[error("{}: {what}", path.display())]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file can't be written.
    #[error(transparent)]
    Write(#[from] DurableError),
    /// The folder can't be made.
    #[error("can't make the state folder {}: {source}", path.display())]
    Folder {
        /// Which folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `sync` or `run` is at work already.
    #[error("can't have the state folder for this command alone: {0}")]
    Locked(#[from] LockError),
    /// The key is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl StateError {
    /// Whether trying again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Locked(e) if e.is_retryable())
    }
}

/// How long another command's change of the list of volumes is waited for; it takes milliseconds.
const VOLUMES_LOCK: Duration = Duration::from_secs(10);

const PAUSED: &str = "paused.json";

/// Who the agent is since it joined.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinedIdentity {
    agent: String,
    group: String,
    /// The group's name.
    pub group_name: String,
    restore_only: bool,
    /// Where the receiver is.
    pub receiver: String,
    state: String,
}

/// The same with the types that it is used with.
#[derive(Clone, Debug)]
pub struct Joined {
    /// Own id.
    pub agent: AgentId,
    /// The group.
    pub group: GroupId,
    /// Its name.
    pub group_name: Name,
    /// What this agent may do.
    pub role: AgentRole,
    /// Where the receiver is.
    pub receiver: String,
    /// This state folder.
    pub state: StateId,
}

/// A protected volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProtectedVolume {
    /// For good.
    pub id: VolumeId,
    /// What the user calls it.
    pub name: Name,
    /// Where it is.
    pub path: PathBuf,
    /// What it was known by when it was last looked at.
    pub identity: Identity,
    /// How often identity or size changed.
    pub incarnation: Incarnation,
    /// Block size and length.
    pub geometry: Geometry,
}

#[derive(Serialize, Deserialize)]
struct VolumeFile {
    id: String,
    name: String,
    path: PathBuf,
    identity: String,
    incarnation: u32,
    block_size: u32,
    length: u64,
}

/// What the writer must remember.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriterState {
    /// Nonce of the newest commit that is known to exist.
    pub nonce: Option<WriterNonce>,
    /// Commits that were asked for and whose answer is not known to have come: any of them may still appear in the log
    /// while the record that they were built on is the newest.
    pub pending: Vec<PendingCommit>,
    /// The newest point that was seen committed.
    pub high_water: LogSeq,
    /// The newest point that this agent made.
    pub last: Option<LastPoint>,
    /// Bytes of block records of all points that this agent made.
    pub sent: u64,
}

/// Somebody wants `run` to make no points.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Paused {
    /// Since when, ms since 1970.
    pub since_ms: i64,
    /// Until when; `None`: until it is resumed.
    pub until_ms: Option<i64>,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: Option<String>,
}

impl Paused {
    /// Whether it is over.
    pub fn is_over(&self, now: UnixMillis) -> bool {
        self.until_ms.is_some_and(|until| until <= now.0)
    }
}

impl std::fmt::Display for Paused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let time = |ms| backhaul_cli::text::time(UnixMillis(ms));
        match self.until_ms {
            Some(until) => write!(f, "until {}", time(until))?,
            None => f.write_str("until `backhaul-agent resume`")?,
        }
        write!(f, ", by {} at {}", self.by, time(self.since_ms))?;
        self.reason.iter().try_for_each(|reason| write!(f, ": {reason}"))
    }
}

/// A point that this agent made, for `status`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LastPoint {
    /// Its number.
    pub point: u64,
    /// What it claims.
    pub consistency: String,
    /// When its first block was read, by this machine's clock; ms since 1970. What the lag counts from.
    pub protected_until: i64,
}

/// A commit that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingCommit {
    /// The record that it was built on.
    pub base: LogSeq,
    /// Its id.
    pub commit: CommitId,
    /// What the next writer must show if it exists.
    pub nonce: WriterNonce,
}

#[derive(Default, Serialize, Deserialize)]
struct WriterFile {
    nonce: Option<String>,
    #[serde(default)]
    pending: Vec<PendingFile>,
    high_water: u64,
    #[serde(default)]
    last: Option<LastPoint>,
    #[serde(default)]
    sent: u64,
}

#[derive(Serialize, Deserialize)]
struct PendingFile {
    base: u64,
    commit: String,
    nonce: String,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// At this path; nothing is touched yet.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Makes the folder, for this user only.
    pub fn create(&self) -> Result<(), StateError> {
        let failed = |source| StateError::Folder { path: self.path.clone(), source };
        std::fs::create_dir_all(self.path.join("index")).map_err(failed)?;
        let private: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&self.path, private).map_err(failed)
    }

    /// The folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the indexes are.
    pub fn index_dir(&self) -> PathBuf {
        self.path.join("index")
    }

    /// Only one `sync` or `run` at a time.
    pub fn lock(&self) -> Result<Lock, StateError> {
        Ok(durable::lock(&self.path.join("lock"))?)
    }

    /// Held from reading the list of volumes to replacing it. Waits for another command that is at it.
    pub fn lock_volumes(&self) -> Result<Lock, StateError> {
        let begun = Instant::now();
        loop {
            match durable::lock(&self.path.join("volumes.lock")) {
                Err(LockError::Held { .. }) if begun.elapsed() < VOLUMES_LOCK => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                locked => return Ok(locked?),
            }
        }
    }

    fn unusable(&self, name: &str, what: impl std::fmt::Display) -> StateError {
        StateError::Unusable { path: self.path.join(name), what: what.to_string() }
    }

    fn read_optional(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        match std::fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.unusable(name, e)),
        }
    }

    /// A file's content; `None` if it is not there.
    pub(crate) fn read_json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let Some(bytes) = self.read_optional(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| self.unusable(name, e))
    }

    /// Replaces a file.
    pub(crate) fn write_json<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let bytes = serde_json::to_vec_pretty(value).map_err(|e| self.unusable(name, e))?;
        Ok(durable::replace(&self.path.join(name), &bytes, 0o600)?)
    }

    /// Removes a file, if it is there.
    pub(crate) fn remove(&self, name: &str) -> std::io::Result<()> {
        match std::fs::remove_file(self.path.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Who the agent is; `None` if it never joined.
    pub fn joined(&self) -> Result<Option<Joined>, StateError> {
        let name = "identity.json";
        let Some(file) = self.read_json::<JoinedIdentity>(name)? else { return Ok(None) };
        let wrong = |e: backhaul_protocol::ids::IdError| self.unusable(name, e);
        Ok(Some(Joined {
            agent: file.agent.parse().map_err(wrong)?,
            group: file.group.parse().map_err(wrong)?,
            group_name: file.group_name.parse().map_err(wrong)?,
            role: if file.restore_only { AgentRole::RestoreOnly } else { AgentRole::Writer },
            receiver: file.receiver,
            state: file.state.parse().map_err(wrong)?,
        }))
    }

    /// Who the agent is.
    pub fn expect_joined(&self) -> Result<Joined, StateError> {
        self.joined()?.ok_or_else(|| StateError::NotJoined(self.path.join("identity.json")))
    }

    /// Writes down what joining gave; the last of its files is the one that counts.
    pub fn write_joined(&self, joined: &Joined, chain: &[Vec<u8>]) -> Result<(), StateError> {
        self.write_chain(chain)?;
        let file = JoinedIdentity {
            agent: joined.agent.to_string(),
            group: joined.group.to_string(),
            group_name: joined.group_name.to_string(),
            restore_only: joined.role == AgentRole::RestoreOnly,
            receiver: joined.receiver.clone(),
            state: joined.state.to_string(),
        };
        self.write_json("identity.json", &file)
    }

    /// The certificate chain, own first, the authority's last.
    pub fn chain(&self) -> Result<Vec<CertificateDer<'static>>, StateError> {
        let name = "agent.crt";
        let bytes = self.read_optional(name)?.ok_or_else(|| self.unusable(name, "it is missing: join again"))?;
        let mut chain = Vec::new();
        let mut rest = &bytes[..];
        while let Some((len, tail)) = rest.split_first_chunk::<4>() {
            let (der, tail) = tail
                .split_at_checked(u32::from_le_bytes(*len) as usize)
                .ok_or_else(|| self.unusable(name, "it is damaged: join again"))?;
            chain.push(CertificateDer::from(der.to_vec()));
            rest = tail;
        }
        if chain.len() < 2 || !rest.is_empty() {
            return Err(self.unusable(name, "it is damaged: join again"));
        }
        Ok(chain)
    }

    /// Replaces the certificate chain.
    pub fn write_chain(&self, chain: &[Vec<u8>]) -> Result<(), StateError> {
        let mut bytes = Vec::new();
        for der in chain {
            bytes.extend_from_slice(&(der.len() as u32).to_le_bytes());
            bytes.extend_from_slice(der);
        }
        Ok(durable::replace(&self.path.join("agent.crt"), &bytes, 0o600)?)
    }

    /// The key, if there is one.
    pub fn key(&self) -> Result<Option<AgentKey>, StateError> {
        let name = "agent.key";
        let Some(bytes) = self.read_optional(name)? else { return Ok(None) };
        let text = String::from_utf8(bytes).map_err(|e| self.unusable(name, e))?;
        AgentKey::from_pem(&text).map(Some).map_err(|e| self.unusable(name, e))
    }

    /// The key, made if there is none. It never leaves this folder.
    pub fn ensure_key(&self) -> Result<AgentKey, StateError> {
        if let Some(key) = self.key()? {
            return Ok(key);
        }
        if self.joined()?.is_some() {
            // The certificate is that of the key that is gone: another one opens nothing.
            return Err(self.unusable("agent.key", "it is gone"));
        }
        let key = AgentKey::generate()?;
        durable::create_new(&self.path.join("agent.key"), key.to_pem().as_bytes(), 0o600)?;
        Ok(key)
    }

    /// What is protected.
    pub fn volumes(&self) -> Result<Vec<ProtectedVolume>, StateError> {
        let name = "volumes.json";
        let files: Vec<VolumeFile> = self.read_json(name)?.unwrap_or_default();
        files
            .into_iter()
            .map(|f| {
                Ok(ProtectedVolume {
                    id: f.id.parse().map_err(|e| self.unusable(name, e))?,
                    name: f.name.parse().map_err(|e| self.unusable(name, e))?,
                    path: f.path,
                    identity: f.identity.parse().map_err(|e| self.unusable(name, e))?,
                    incarnation: Incarnation(f.incarnation),
                    geometry: Geometry::new(f.block_size, f.length).map_err(|e| self.unusable(name, e))?,
                })
            })
            .collect()
    }

    /// Replaces the list of what is protected.
    pub fn write_volumes(&self, volumes: &[ProtectedVolume]) -> Result<(), StateError> {
        let files: Vec<VolumeFile> = volumes
            .iter()
            .map(|v| VolumeFile {
                id: v.id.to_string(),
                name: v.name.to_string(),
                path: v.path.clone(),
                identity: v.identity.to_string(),
                incarnation: v.incarnation.0,
                block_size: v.geometry.block_size(),
                length: v.geometry.length(),
            })
            .collect();
        self.write_json("volumes.json", &files)
    }

    /// Whether somebody wants no points, and it is not over.
    pub fn paused(&self, now: UnixMillis) -> Result<Option<Paused>, StateError> {
        Ok(self.read_json::<Paused>(PAUSED)?.filter(|paused| !paused.is_over(now)))
    }

    /// Outlives a restart.
    pub fn pause(&self, paused: &Paused) -> Result<(), StateError> {
        self.write_json(PAUSED, paused)
    }

    /// Ends it.
    pub fn resume(&self) -> Result<(), StateError> {
        match std::fs::remove_file(self.path.join(PAUSED)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.unusable(PAUSED, e)),
            // A power loss may bring it back: then it is said that it is paused, and by whom.
            _ => Ok(()),
        }
    }

    /// What the writer must remember. A file that is lost or damaged means a nonce that is not known, and that the
    /// receiver calls diverged: never a guess.
    pub fn writer(&self) -> Result<WriterState, StateError> {
        let name = "writer.json";
        let Some(f) = self.read_json::<WriterFile>(name)? else { return Ok(WriterState::default()) };
        let wrong = |e: backhaul_protocol::ids::IdError| self.unusable(name, e);
        let mut pending = Vec::new();
        for p in f.pending {
            let (commit, nonce) = (p.commit.parse().map_err(wrong)?, p.nonce.parse().map_err(wrong)?);
            pending.push(PendingCommit { base: LogSeq(p.base), commit, nonce });
        }
        let nonce = f.nonce.map(|t| t.parse::<WriterNonce>()).transpose().map_err(wrong)?;
        Ok(WriterState { nonce, pending, high_water: LogSeq(f.high_water), last: f.last, sent: f.sent })
    }

    /// Replaces what the writer must remember.
    pub fn write_writer(&self, writer: &WriterState) -> Result<(), StateError> {
        let file = WriterFile {
            nonce: writer.nonce.map(|n| n.to_string()),
            pending: writer
                .pending
                .iter()
                .map(|p| PendingFile { base: p.base.0, commit: p.commit.to_string(), nonce: p.nonce.to_string() })
                .collect(),
            high_water: writer.high_water.0,
            last: writer.last.clone(),
            sent: writer.sent,
        };
        self.write_json("writer.json", &file)
    }
}
