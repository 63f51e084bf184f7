//! Names and numbers that must not be mixed up.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};

use crate::limits::MAX_NAME;

/// A text that is not the id or name it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not 32 hex digits (dashes are allowed).
    #[error("\"{0}\" is not an id: want 32 hexadecimal digits")]
    Id(String),
    /// Not a name.
    #[error("\"{0}\" is not a name: want 1 to 63 of a-z, 0-9 and -, not beginning or ending with -")]
    Name(String),
}

macro_rules! uuid_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
        pub struct $name(pub [u8; 16]);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(s: &str) -> Result<Self, IdError> {
                uuid::Uuid::try_parse(s).map(|u| Self(u.into_bytes())).map_err(|_| IdError::Id(s.to_owned()))
            }
        }
    };
}

uuid_type!(
    /// What is protected and recovered together; never reused.
    GroupId
);
uuid_type!(
    /// One block device or image file of a group; never reused.
    VolumeId
);
uuid_type!(
    /// One joined agent.
    AgentId
);
uuid_type!(
    /// One commit, chosen by the writer: an equal id in the log is the writer's own lost success.
    CommitId
);
uuid_type!(
    /// What the writer must show to write the next point; rotates with every point.
    WriterNonce
);
uuid_type!(
    /// The state folder of an agent: a newer session of the same one takes over from an older one.
    StateId
);
uuid_type!(
    /// One store, chosen at `init`.
    RepositoryId
);

impl WriterNonce {
    /// In a `Promote`: the next writer may show any nonce.
    pub const OPEN: Self = Self([0; 16]);
}

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode, Default, Debug)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl $name {
            /// The one after; saturates.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }
    };
}

number_type!(
    /// A number in a group's log; that of a `Point` record is the number of the recovery point.
    LogSeq(u64)
);
number_type!(
    /// Fencing number of the writer, raised by every `Promote`.
    Generation(u16)
);
number_type!(
    /// Counts how often a volume's identity or size changed.
    Incarnation(u32)
);
number_type!(
    /// Orders the captures of a block: the highest wins, whatever order they arrive in.
    CaptureNumber(u64)
);
number_type!(
    /// Stands for a volume's uuid inside block records; given once per group and volume, never reused.
    VolumeSlot(u32)
);

impl LogSeq {
    /// Numbers end here: object ids have 48 bits for one.
    pub const END: Self = Self(1 << 48);

    /// Whether any record can have it.
    pub fn is_possible(self) -> bool {
        self < Self::END
    }
}

/// One session's writing into a draft, in object keys. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode, Debug)]
pub struct SessionTag(pub u32);

/// A group's, volume's or agent's name: `[a-z0-9-]{1,63}`, no dash at the ends. Safe in keys and paths.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Debug)]
pub struct Name(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = IdError;
    fn from_str(s: &str) -> Result<Self, IdError> {
        let legal = (1..=MAX_NAME).contains(&s.len())
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !s.starts_with('-')
            && !s.ends_with('-');
        if legal { Ok(Self(s.to_owned())) } else { Err(IdError::Name(s.chars().take(80).collect())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<C> Decode<C> for Name {
    fn decode<D: bincode::de::Decoder<Context = C>>(d: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let text = String::decode(d)?;
        text.parse().map_err(|_| bincode::error::DecodeError::Other("not a name"))
    }
}

impl<'de, C> bincode::BorrowDecode<'de, C> for Name {
    fn borrow_decode<D: bincode::de::BorrowDecoder<'de, Context = C>>(
        d: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        Self::decode(d)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_keys_and_paths() {
        for good in ["a", "db-1", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "-a", "a-", "A", "ä", "a\0", "a b", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }
}
