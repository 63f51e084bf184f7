//! Names of objects, built and parsed in one place.

use std::fmt;

use crate::bytes::{FieldError, FieldReader};
use crate::ids::{AgentId, Generation, GroupId, LogSeq, Name};

/// The name of an object below the store's prefix. Only `[a-z0-9._-]` and `/` between parts, so that it is a safe
/// path in a folder and a safe key in S3; parts are never empty, `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectKey(String);

/// A text that is no object key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not the name of an object")]
pub struct KeyError(String);

impl ObjectKey {
    /// Checks the characters and parts.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let legal = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if text.len() <= 512 && text.split('/').all(legal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(KeyError(text.to_owned()))
        }
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which segment or map: enough to build its key, in 16 bytes, so that every map entry can carry it.
///
/// `seq` is the number of the point that the draft was built on. A session of zero means the log record `seq`
/// itself, which holds the records of a small point.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectId {
    /// Of the base point; below 2^48.
    pub seq: LogSeq,
    /// Of the writer.
    pub generation: Generation,
    /// Of the writing session; random, never zero but for inline records.
    pub session: u32,
    /// Counts the objects of the session.
    pub n: u32,
}

impl ObjectId {
    /// Bytes of an id.
    pub const LEN: usize = 16;

    /// The records that lie inside the log record `seq`.
    pub fn inline(seq: LogSeq) -> Self {
        Self { seq, generation: Generation(0), session: 0, n: 0 }
    }
    /// Whether the records lie inside a log record.
    pub fn is_inline(self) -> bool {
        self.session == 0
    }
    /// `seq` 6 bytes, generation 2, session 4, n 4.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..6].copy_from_slice(&self.seq.0.to_le_bytes()[..6]);
        out[6..8].copy_from_slice(&self.generation.0.to_le_bytes());
        out[8..12].copy_from_slice(&self.session.to_le_bytes());
        out[12..].copy_from_slice(&self.n.to_le_bytes());
        out
    }
    /// The other way.
    pub fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        let mut seq = [0; 8];
        seq[..6].copy_from_slice(r.bytes(6, "object id")?);
        let this = Self {
            seq: LogSeq(u64::from_le_bytes(seq)),
            generation: Generation(r.u16("object id")?),
            session: r.u32("object id")?,
            n: r.u32("object id")?,
        };
        // The records of a log record have one name.
        if this.is_inline() && this != Self::inline(this.seq) {
            return Err(FieldError::Value("object id"));
        }
        Ok(this)
    }
    fn tail(self) -> String {
        format!("{}{:08x}-{:08}", draft_prefix(self.generation, self.seq), self.session, self.n)
    }
    fn parse_tail(tail: &str) -> Option<Self> {
        let mut parts = tail.split('-');
        let mut next = || parts.next();
        let (generation, seq, session, n) = (next()?, next()?, next()?, next()?);
        let id = Self {
            generation: Generation(generation.parse().ok()?),
            seq: LogSeq(seq.parse().ok()?),
            session: u32::from_str_radix(session, 16).ok()?,
            n: n.parse().ok()?,
        };
        (id.tail() == tail && id.session != 0).then_some(id)
    }
}

fn draft_prefix(generation: Generation, base: LogSeq) -> String {
    format!("{:05}-{:020}-", generation.0, base.0)
}

/// Builds the keys of one group.
#[derive(Clone, Copy, Debug)]
pub struct GroupKeys(pub GroupId);

impl GroupKeys {
    fn key(self, rest: impl fmt::Display) -> ObjectKey {
        ObjectKey(format!("groups/{}/{rest}", self.0))
    }
    /// THE commit of number `seq`.
    pub fn log(self, seq: LogSeq) -> ObjectKey {
        self.key(format_args!("log/{:020}", seq.0))
    }
    /// A segment, or the log record that holds its records.
    pub fn segment(self, id: ObjectId) -> ObjectKey {
        if id.is_inline() { self.log(id.seq) } else { self.key(format_args!("segments/{}", id.tail())) }
    }
    /// A map or a part of one.
    pub fn map(self, id: ObjectId) -> ObjectKey {
        self.key(format_args!("maps/{}", id.tail()))
    }
    /// What all segments of a draft begin with.
    pub fn draft_segments(self, generation: Generation, base: LogSeq) -> String {
        self.key(format_args!("segments/{}", draft_prefix(generation, base))).0
    }
    /// What all maps of a draft begin with.
    pub fn draft_maps(self, generation: Generation, base: LogSeq) -> String {
        self.key(format_args!("maps/{}", draft_prefix(generation, base))).0
    }
    /// The id in a segment's or map's key.
    pub fn object_id(self, key: &ObjectKey) -> Option<ObjectId> {
        let prefix = format!("groups/{}/", self.0);
        let rest = key.0.strip_prefix(&prefix)?;
        ObjectId::parse_tail(rest.strip_prefix("segments/").or_else(|| rest.strip_prefix("maps/"))?)
    }
    /// The checkpoint at `seq`.
    pub fn checkpoint(self, seq: LogSeq) -> ObjectKey {
        self.key(format_args!("checkpoints/{:020}", seq.0))
    }
    /// The lowest log number that may exist.
    pub fn floor(self) -> ObjectKey {
        self.key("floor")
    }
    /// The hint of the newest log number.
    pub fn head(self) -> ObjectKey {
        self.key("head")
    }
    /// A joined agent.
    pub fn agent(self, agent: AgentId) -> ObjectKey {
        self.key(format_args!("agents/{agent}"))
    }
    /// What all agents of the group begin with.
    pub fn agents(self) -> String {
        self.key("agents/").0
    }
}

/// The store's own description.
pub fn format() -> ObjectKey {
    ObjectKey("format".into())
}
/// Which receiver serves a store that takes only one.
pub fn receiver() -> ObjectKey {
    ObjectKey("receiver".into())
}
/// The group of this name.
pub fn group_name(name: &Name) -> ObjectKey {
    ObjectKey(format!("names/{name}"))
}
/// What all group names begin with.
pub const GROUP_NAMES: &str = "names/";
/// What all tokens begin with.
pub const TOKENS: &str = "tokens/";
/// What all redemptions begin with.
pub const REDEEMED: &str = "redeemed/";
/// What all revocations begin with.
pub const REVOKED: &str = "revoked/";
/// What all notes of when an agent was seen begin with.
pub const SEEN: &str = "seen/";
/// A token, by the hash of its secret.
pub fn token(secret_hash: &[u8; 32]) -> ObjectKey {
    ObjectKey(format!("{TOKENS}{}", blake3::Hash::from_bytes(*secret_hash).to_hex()))
}
/// Who redeemed the token.
pub fn redeemed(secret_hash: &[u8; 32]) -> ObjectKey {
    ObjectKey(format!("{REDEEMED}{}", blake3::Hash::from_bytes(*secret_hash).to_hex()))
}
/// The revocation of an agent.
pub fn revoked(agent: AgentId) -> ObjectKey {
    ObjectKey(format!("{REVOKED}{agent}"))
}
/// When the agent was last seen.
pub fn seen(agent: AgentId) -> ObjectKey {
    ObjectKey(format!("{SEEN}{agent}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_safe_paths() {
        for bad in ["", "/a", "a/", "a//b", "../a", "a/./b", "A", "a b", "a\0"] {
            assert!(ObjectKey::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn ids_survive_key_and_bytes(seq in 0u64..1 << 48, generation: u16, session in 1u32.., n: u32) {
            let id = ObjectId { seq: LogSeq(seq), generation: Generation(generation), session, n };
            let keys = GroupKeys(GroupId([7; 16]));
            prop_assert_eq!(ObjectId::read(&mut FieldReader::new(&id.to_bytes())), Ok(id));
            for key in [keys.segment(id), keys.map(id)] {
                prop_assert_eq!(ObjectKey::parse(key.as_str()), Ok(key.clone()));
                prop_assert_eq!(keys.object_id(&key), Some(id));
            }
            prop_assert!(keys.segment(id).as_str().starts_with(&keys.draft_segments(id.generation, id.seq)));
        }
    }
}
