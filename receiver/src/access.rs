//! Who may do what: tokens, joining, renewal, revocation, adoption. All of it is in the store, so that any receiver
//! knows it; only the authority's key is not.
//!
//! Read first: [`join`] and [`adopt`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_protocol::digest::ObjectDigest;
use backhaul_protocol::ids::{AgentId, CommitId, Generation, GroupId, LogSeq, Name, WriterNonce};
use backhaul_protocol::store::envelope::{FormatError, Kind as ObjectKind};
use backhaul_protocol::store::fleet::{
    AgentRole, JoinedAgent, Redeemed, Token, read_times, write_group_name, write_times,
};
use backhaul_protocol::store::key::{self, GroupKeys, ObjectKey};
use backhaul_protocol::store::log::{Body, CreateBody, PromoteBody, Record, UnixMillis};
use backhaul_protocol::wire::message::{Join, Joined, Reason, Refusal};
use backhaul_seams::random;
use backhaul_transport::authority::Authority;
use backhaul_transport::tls::{AgentIdentity, TlsError};
use backhaul_transport::token::JoinToken;
use bytes::Bytes;

use backhaul_seams::mutant::{Mutant, planted};

use crate::catalog::{Appended, Catalog, GroupLog, SMALL, get_optional};
use crate::read_error::ReadError;
use crate::store::{Kind, ObjectStore, StoreError, list_all};

/// How managing agents fails.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The store.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Not allowed.
    #[error("{0}")]
    Denied(String),
    /// Asked for an agent or group that is not there.
    #[error("{0}")]
    NotFound(String),
}

impl From<StoreError> for AccessError {
    fn from(error: StoreError) -> Self {
        Self::Read(error.into())
    }
}

impl AccessError {
    /// Whether trying again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Read(e) if e.is_retryable())
    }
    /// What an agent is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Read(e) => e.refusal(),
            Self::Tls(_) | Self::Denied(_) => Refusal { reason: Reason::Authentication, text: self.to_string() },
            Self::NotFound(_) => Refusal { reason: Reason::NotFound, text: self.to_string() },
        }
    }
}

/// The clock, as the log and tokens have it.
pub fn unix_millis(now: SystemTime) -> UnixMillis {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    UnixMillis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Whether there was nothing under the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Put {
    New,
    WasThere,
}

async fn put_new(store: &dyn ObjectStore, key: &ObjectKey, bytes: Vec<u8>) -> Result<Put, StoreError> {
    match store.put_new(key, Bytes::from(bytes)).await {
        Ok(()) => Ok(Put::New),
        Err(e) if e.kind() == Kind::Exists => Ok(Put::WasThere),
        Err(e) => Err(e),
    }
}

async fn read<T>(
    store: &dyn ObjectStore,
    key: &ObjectKey,
    parse: impl FnOnce(&[u8]) -> Result<T, FormatError>,
) -> Result<Option<T>, ReadError> {
    let Some(bytes) = get_optional(store, key, SMALL).await? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(ReadError::damaged(key))
}

/// The group of this name, made if there is none.
pub async fn ensure_group(catalog: &Catalog, name: &Name, now: SystemTime) -> Result<GroupLog, AccessError> {
    let store = &*catalog.store;
    let group = match catalog.group(name).await? {
        Some(group) => group,
        None => {
            let group = GroupId(random::id());
            match put_new(store, &key::group_name(name), write_group_name(group)).await? {
                Put::New => group,
                Put::WasThere => catalog
                    .group(name)
                    .await?
                    .ok_or_else(|| AccessError::NotFound(format!("group \"{name}\" went away")))?,
            }
        }
    };
    let log = catalog.log(group);
    // Also after a crash between the name and the log.
    let create = Record {
        group,
        seq: LogSeq(0),
        previous: ObjectDigest([0; 32]),
        generation: Generation(1),
        commit: CommitId(random::bytes()),
        nonce: WriterNonce::OPEN,
        time: unix_millis(now),
        body: Body::Create(CreateBody { repository: catalog.format.repository, name: name.clone() }),
    };
    if let Put::New = put_new(store, &log.keys().log(LogSeq(0)), create.to_bytes()).await?
        && let Err(error) = log.write_hint(LogSeq(0)).await
    {
        tracing::warn!(%error, "could not write the head hint; the log is listed where it is looked for");
    }
    Ok(log)
}

/// What a token is to be good for.
#[derive(Clone, Debug)]
pub struct TokenRequest {
    /// Which group.
    pub group: Name,
    /// As what.
    pub role: AgentRole,
    /// How long.
    pub ttl: Duration,
    /// Where the agent finds a receiver.
    pub address: String,
}

/// Makes a token and the group if there is none. The store keeps its hash only.
pub async fn make_token(
    catalog: &Catalog,
    fingerprint: [u8; 32],
    request: TokenRequest,
    now: SystemTime,
) -> Result<JoinToken, AccessError> {
    let log = ensure_group(catalog, &request.group, now).await?;
    let secret: [u8; 32] = random::bytes();
    let expires = unix_millis(now + request.ttl);
    let token = Token { group: log.group(), role: request.role, expires };
    put_new(&*catalog.store, &key::token(&JoinToken::secret_hash(&secret)), token.to_bytes()).await?;
    Ok(JoinToken { fingerprint, secret, expires, address: request.address })
}

/// A token for a certificate. The same key may come again until the token expires: its answer may have been lost.
pub async fn join(
    catalog: &Catalog,
    authority: &Authority,
    join: &Join,
    now: SystemTime,
) -> Result<Joined, AccessError> {
    let denied = |text: &str| AccessError::Denied(text.to_owned());
    let store = &*catalog.store;
    let hash = JoinToken::secret_hash(&join.secret);
    let unknown = "the token is not known here: make a new one with `backhaul-receiver token`";
    let token = read(store, &key::token(&hash), Token::parse).await?.ok_or_else(|| denied(unknown))?;
    if unix_millis(now) >= token.expires {
        return Err(denied("the token has expired: make a new one with `backhaul-receiver token`"));
    }
    let key_hash = backhaul_transport::tls::request_key_hash(&join.request)?;
    let fresh = Redeemed { key_hash, agent: AgentId(random::id()) };
    let redeemed = match put_new(store, &key::redeemed(&hash), fresh.to_bytes()).await? {
        Put::New => fresh,
        Put::WasThere => {
            let earlier = read(store, &key::redeemed(&hash), Redeemed::parse).await?;
            earlier.filter(|r| r.key_hash == key_hash).ok_or_else(|| {
                denied("the token was used already by another server: make a new one with `backhaul-receiver token`")
            })?
        }
    };
    let (chain, _) = authority.issue_agent(&join.request, redeemed.agent, token.group, token.role, now)?;
    let joined = JoinedAgent {
        agent: redeemed.agent,
        role: token.role,
        key_hash,
        machine: join.machine,
        host: join.host.clone(),
        joined: unix_millis(now),
    };
    put_new(store, &GroupKeys(token.group).agent(redeemed.agent), joined.to_bytes()).await?;
    let log = catalog.log(token.group);
    let lost = ReadError::Log { seq: LogSeq(0), what: "it is missing" };
    let (create, _) = log.read(LogSeq(0)).await?.ok_or(lost)?;
    let Body::Create(create) = create.body else {
        return Err(ReadError::Log { seq: LogSeq(0), what: "it is no `Create`" }.into());
    };
    Ok(Joined {
        certificates: chain.iter().map(|c| c.to_vec()).collect(),
        agent: redeemed.agent,
        group: token.group,
        group_name: create.name,
        role: token.role,
    })
}

/// What was written down when the agent joined.
pub async fn joined_agent(catalog: &Catalog, identity: &AgentIdentity) -> Result<JoinedAgent, AccessError> {
    let key = GroupKeys(identity.group).agent(identity.agent);
    let joined = read(&*catalog.store, &key, JoinedAgent::parse).await?;
    joined
        .filter(|j| j.key_hash == identity.key_hash)
        .ok_or_else(|| AccessError::Denied("this agent is not known here: join again with a new token".into()))
}

/// Whether the agent was revoked.
pub async fn is_revoked(catalog: &Catalog, agent: AgentId) -> Result<bool, ReadError> {
    let revoked = read(&*catalog.store, &key::revoked(agent), |b| read_times::<1>(ObjectKind::Revoked, b)).await;
    match revoked {
        Ok(found) => Ok(found.is_some()),
        // Something lies there: a damaged revocation is one.
        Err(ReadError::Damaged { .. }) => Ok(true),
        Err(e) => Err(e),
    }
}

/// A new certificate for the key that has one.
pub async fn renew(
    catalog: &Catalog,
    authority: &Authority,
    identity: &AgentIdentity,
    request: &[u8],
    now: SystemTime,
) -> Result<Vec<Vec<u8>>, AccessError> {
    joined_agent(catalog, identity).await?;
    let (chain, key_hash) = authority.issue_agent(request, identity.agent, identity.group, identity.role, now)?;
    if key_hash != identity.key_hash {
        return Err(AccessError::Denied("a certificate is renewed for the same key only".into()));
    }
    Ok(chain.iter().map(|c| c.to_vec()).collect())
}

/// An agent as `agents` shows it.
#[derive(Clone, Debug)]
pub struct AgentRow {
    /// Its group.
    pub group: Name,
    /// What was written down when it joined.
    pub joined: JoinedAgent,
    /// By the receiver's clock.
    pub last_seen: Option<UnixMillis>,
    /// The end of the certificate that it showed last.
    pub certificate_until: Option<UnixMillis>,
    /// Since when.
    pub revoked: Option<UnixMillis>,
}

/// All agents of all groups, and what can't be read of them.
pub async fn agents(catalog: &Catalog) -> Result<(Vec<AgentRow>, Vec<ReadError>), AccessError> {
    let store: &Arc<dyn ObjectStore> = &catalog.store;
    let located = catalog.locate().await?;
    let (mut out, mut damaged) = (Vec::new(), located.damaged);
    for (group, log) in located.groups {
        for (key, _) in list_all(&**store, &GroupKeys(log.group()).agents()).await? {
            match agent(&**store, &group, &key).await {
                Ok(row) => out.extend(row),
                Err(e) if e.is_damage() => damaged.push(e),
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok((out, damaged))
}

async fn agent(store: &dyn ObjectStore, group: &Name, key: &ObjectKey) -> Result<Option<AgentRow>, ReadError> {
    let Some(joined) = read(store, key, JoinedAgent::parse).await? else { return Ok(None) };
    let seen = read(store, &key::seen(joined.agent), |b| read_times::<2>(ObjectKind::Seen, b)).await;
    // Last seen is only a hint.
    let seen = seen.unwrap_or(None);
    let revoked = read(store, &key::revoked(joined.agent), |b| read_times::<1>(ObjectKind::Revoked, b)).await?;
    Ok(Some(AgentRow {
        group: group.clone(),
        joined,
        last_seen: seen.map(|s| s[0]),
        certificate_until: seen.map(|s| s[1]),
        revoked: revoked.map(|r| r[0]),
    }))
}

async fn find_agent(catalog: &Catalog, agent: AgentId) -> Result<AgentRow, AccessError> {
    let row = agents(catalog).await?.0.into_iter().find(|r| r.joined.agent == agent);
    row.ok_or_else(|| {
        AccessError::NotFound(format!("no agent {agent}; `backhaul-receiver agents` lists those that joined"))
    })
}

/// The agent may not come in any more, and is thrown out within 30 s.
pub async fn revoke(catalog: &Catalog, agent: AgentId, now: SystemTime) -> Result<(), AccessError> {
    find_agent(catalog, agent).await?;
    let bytes = write_times(ObjectKind::Revoked, &[unix_millis(now)]);
    put_new(&*catalog.store, &key::revoked(agent), bytes).await?;
    Ok(())
}

/// Remembers when an agent was here, and until when its certificate is good.
pub async fn write_seen(store: &dyn ObjectStore, identity: &AgentIdentity, now: SystemTime) -> Result<(), StoreError> {
    let bytes = write_times(ObjectKind::Seen, &[unix_millis(now), identity.not_after]);
    store.put_hint(&key::seen(identity.agent), Bytes::from(bytes)).await
}

/// Makes an agent the writer of its group, whatever nonce it shows: appends a `Promote`.
pub async fn adopt(
    catalog: &Catalog,
    group: &Name,
    agent: AgentId,
    now: SystemTime,
) -> Result<(LogSeq, Generation), AccessError> {
    let row = find_agent(catalog, agent).await?;
    if row.group != *group {
        return Err(AccessError::Denied(format!("agent {agent} belongs to group \"{}\", not \"{group}\"", row.group)));
    }
    if row.joined.role != AgentRole::Writer {
        return Err(AccessError::Denied(format!("agent {agent} joined with a restore-only token: it can't write")));
    }
    if row.revoked.is_some() {
        return Err(AccessError::Denied(format!("agent {agent} was revoked")));
    }
    let log = catalog.expect_group(group).await?;
    let commit = CommitId(random::bytes());
    loop {
        let (head, hash) = log.head().await?;
        let seq = head.record.seq.next();
        // No agent vouches for what it has seen: a gap of any length must show.
        if log.is_gap(head.record.seq).await? {
            return Err(ReadError::Log { seq, what: "it is missing, and there are records after it" }.into());
        }
        let generation = Generation(
            head.record.generation.0.checked_add(1).ok_or(ReadError::Log { seq, what: "no generation is left" })?,
        );
        let record = Record {
            group: log.group(),
            seq,
            previous: hash,
            generation,
            commit,
            nonce: if planted(Mutant::AdoptKeepsNonce) { head.record.nonce } else { WriterNonce::OPEN },
            time: unix_millis(now).max(head.record.time),
            body: Body::Promote(PromoteBody { agent }),
        };
        match log.append(&record).await?.0 {
            Appended::Ours => return Ok((seq, generation)),
            // The writer that is being replaced committed just now: after it, then.
            Appended::Theirs(_) | Appended::BelowFloor => {}
        }
    }
}
