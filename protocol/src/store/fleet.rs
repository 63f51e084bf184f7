//! What receivers share about agents: group names, join tokens, who joined, who was revoked, who was seen.

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::ids::{AgentId, GroupId, Name};
use crate::store::envelope::{self, FormatError, Kind};
use crate::store::log::{MachineId, UnixMillis};

/// What an agent may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum AgentRole {
    /// Append to its own group and read its points.
    Writer,
    /// Read the points of its group.
    RestoreOnly,
}

impl AgentRole {
    fn to_byte(self) -> u8 {
        match self {
            Self::Writer => 1,
            Self::RestoreOnly => 2,
        }
    }
    fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        match r.u8("role")? {
            1 => Ok(Self::Writer),
            2 => Ok(Self::RestoreOnly),
            _ => Err(FieldError::Value("role")),
        }
    }
}

/// `names/<name>`: which group has the name. Body: group 16.
pub fn write_group_name(group: GroupId) -> Vec<u8> {
    let mut out = envelope::begin();
    out.extend_from_slice(&group.0);
    envelope::seal(Kind::Name, &mut out);
    out
}

/// The other way.
pub fn read_group_name(bytes: &[u8]) -> Result<GroupId, FormatError> {
    let mut r = envelope::open(Kind::Name, bytes)?;
    let group = GroupId(r.array("group")?);
    r.finish()?;
    Ok(group)
}

/// `tokens/<hash of the secret>`. Body: group 16, role 1, expiry ms 8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// Which group the bearer joins.
    pub group: GroupId,
    /// As what.
    pub role: AgentRole,
    /// By the receiver's clock.
    pub expires: UnixMillis,
}

impl Token {
    /// The stored bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.group.0);
        out.push(self.role.to_byte());
        out.put_i64(self.expires.0);
        envelope::seal(Kind::Token, &mut out);
        out
    }
    /// The other way.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = envelope::open(Kind::Token, bytes)?;
        let this = Self {
            group: GroupId(r.array("group")?),
            role: AgentRole::read(&mut r)?,
            expires: UnixMillis(r.i64("expires")?),
        };
        r.finish()?;
        Ok(this)
    }
}

/// `redeemed/<hash of the secret>`. Body: BLAKE3 of the requester's public key 32, the agent id that it got 16.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Redeemed {
    /// Of the requester.
    pub key_hash: [u8; 32],
    /// What it became.
    pub agent: AgentId,
}

impl Redeemed {
    /// The stored bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.key_hash);
        out.extend_from_slice(&self.agent.0);
        envelope::seal(Kind::Redeemed, &mut out);
        out
    }
    /// The other way.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = envelope::open(Kind::Redeemed, bytes)?;
        let this = Self { key_hash: r.array("key hash")?, agent: AgentId(r.array("agent")?) };
        r.finish()?;
        Ok(this)
    }
}

/// `groups/<group>/agents/<agent>`. Body: agent 16, role 1, key hash 32, machine 32, host name 1+n, joined ms 8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JoinedAgent {
    /// Its id.
    pub agent: AgentId,
    /// What it may do.
    pub role: AgentRole,
    /// BLAKE3 of its public key: a certificate is renewed for this key only.
    pub key_hash: [u8; 32],
    /// Where it joined.
    pub machine: MachineId,
    /// What the machine calls itself, made a legal name; for people.
    pub host: Name,
    /// By the receiver's clock.
    pub joined: UnixMillis,
}

impl JoinedAgent {
    /// The stored bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.agent.0);
        out.push(self.role.to_byte());
        out.extend_from_slice(&self.key_hash);
        out.extend_from_slice(&self.machine.0);
        out.put_text(self.host.as_str());
        out.put_i64(self.joined.0);
        envelope::seal(Kind::Agent, &mut out);
        out
    }
    /// The other way.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = envelope::open(Kind::Agent, bytes)?;
        let this = Self {
            agent: AgentId(r.array("agent")?),
            role: AgentRole::read(&mut r)?,
            key_hash: r.array("key hash")?,
            machine: MachineId(r.array("machine")?),
            host: r.text("host")?.parse().map_err(|_| FieldError::Value("host"))?,
            joined: UnixMillis(r.i64("joined")?),
        };
        r.finish()?;
        Ok(this)
    }
}

/// An object that holds one time: `revoked/<agent>` and `seen/<agent>`. Body: ms 8, then for `seen` the expiry of
/// the agent's certificate, ms 8.
pub fn write_times(kind: Kind, times: &[UnixMillis]) -> Vec<u8> {
    let mut out = envelope::begin();
    times.iter().for_each(|t| out.put_i64(t.0));
    envelope::seal(kind, &mut out);
    out
}

/// The other way: exactly `N` times.
pub fn read_times<const N: usize>(kind: Kind, bytes: &[u8]) -> Result<[UnixMillis; N], FormatError> {
    let mut r = envelope::open(kind, bytes)?;
    let mut times = [UnixMillis(0); N];
    for time in &mut times {
        *time = UnixMillis(r.i64("time")?);
    }
    r.finish()?;
    Ok(times)
}
