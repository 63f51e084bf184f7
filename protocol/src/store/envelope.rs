//! The 64 bytes at the start of every object: what it is, how long, and a BLAKE3 of its stored bytes.

use crate::bytes::{FieldError, FieldReader};

/// Bytes before an object's own fields.
pub const ENVELOPE_LEN: usize = 64;
const MAGIC: [u8; 8] = *b"BACKHAUL";
/// The version that this program writes, of every kind of object.
pub const VERSION: u16 = 1;
const CHECKED_HEAD: usize = 32;

/// What an object is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Kind {
    /// The store itself.
    Format = 1,
    /// A log record.
    Log = 2,
    /// A segment of block records.
    Segment = 3,
    /// A base or delta map, or a part of one.
    Map = 4,
    /// A checkpoint of the log.
    Checkpoint = 5,
    /// The lowest log number that may still exist.
    Floor = 6,
    /// A hint of the newest log number.
    Head = 7,
    /// A group's name.
    Name = 8,
    /// A join token.
    Token = 9,
    /// Who redeemed a join token.
    Redeemed = 10,
    /// A joined agent.
    Agent = 11,
    /// An agent that may not come in any more.
    Revoked = 12,
    /// When an agent was last seen.
    Seen = 13,
    /// Which receiver serves a store that takes only one.
    Receiver = 14,
}

/// Why an object can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first eight bytes are others.
    #[error("not an object of Backhaul (wrong magic)")]
    Magic,
    /// An object of another kind lies under this name.
    #[error("an object of kind {found} where kind {expected:?} belongs")]
    Kind {
        /// What belongs here.
        expected: Kind,
        /// What is here.
        found: u16,
    },
    /// Written by a newer version.
    #[error(
        "format version {0}, which this version of Backhaul can't read: use the version that wrote it or a newer one"
    )]
    Version(u16),
    /// Written with features that this version does not know.
    #[error("needs features {0:#x}, which this version of Backhaul does not know: use a newer version")]
    Features(u32),
    /// Longer or shorter than it says.
    #[error("{found} bytes where the object says {stated}: truncated or overwritten")]
    Length {
        /// What the envelope says.
        stated: u64,
        /// What is there.
        found: u64,
    },
    /// Some byte is not as it was written.
    #[error("its checksum does not match its bytes: damaged")]
    Checksum,
    /// The bytes are whole, and yet a field is not as it may be.
    #[error("damaged or hostile: {0}")]
    Field(#[from] FieldError),
}

/// Starts an object: room for the envelope, to be filled by [`seal`].
pub fn begin() -> Vec<u8> {
    vec![0; ENVELOPE_LEN]
}

/// Fills in the envelope of an object that was begun with [`begin`].
pub fn seal(kind: Kind, object: &mut [u8]) {
    let len = object.len() as u64;
    object[..8].copy_from_slice(&MAGIC);
    object[8..10].copy_from_slice(&(kind as u16).to_le_bytes());
    object[10..12].copy_from_slice(&VERSION.to_le_bytes());
    object[12..16].copy_from_slice(&0u32.to_le_bytes());
    object[16..24].copy_from_slice(&len.to_le_bytes());
    let checksum = checksum(object);
    object[CHECKED_HEAD..ENVELOPE_LEN].copy_from_slice(&checksum);
}

fn checksum(object: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&object[..CHECKED_HEAD]).update(&object[ENVELOPE_LEN..]);
    *hasher.finalize().as_bytes()
}

/// Checks the envelope's fields, not the checksum: for objects of which only a part is read. Gives the length
/// that the object states.
pub fn open_head(kind: Kind, object: &[u8]) -> Result<u64, FormatError> {
    let mut r = FieldReader::new(object);
    if r.array("magic")? != MAGIC {
        return Err(FormatError::Magic);
    }
    let found = r.u16("kind")?;
    let version = r.u16("version")?;
    if found != kind as u16 {
        return Err(FormatError::Kind { expected: kind, found });
    }
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    match r.u32("features")? {
        0 => Ok(r.u64("length")?),
        features => Err(FormatError::Features(features)),
    }
}

/// Whether the checksum is right, as this version computes it, whatever else is in the envelope.
pub fn is_whole(object: &[u8]) -> bool {
    object.len() >= ENVELOPE_LEN && object[CHECKED_HEAD..ENVELOPE_LEN] == checksum(object)
}

/// Checks everything and gives the object's own fields.
pub fn open(kind: Kind, object: &[u8]) -> Result<FieldReader<'_>, FormatError> {
    let stated = open_head(kind, object)?;
    if stated != object.len() as u64 || object.len() < ENVELOPE_LEN {
        return Err(FormatError::Length { stated, found: object.len() as u64 });
    }
    if object[CHECKED_HEAD..ENVELOPE_LEN] != checksum(object) {
        return Err(FormatError::Checksum);
    }
    Ok(FieldReader::new(&object[ENVELOPE_LEN..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_byte_is_noticed() {
        let mut object = begin();
        object.extend_from_slice(b"fields");
        seal(Kind::Floor, &mut object);
        assert_eq!(
            open(Kind::Floor, &object).map(|mut r| r.bytes(6, "x").map(<[u8]>::to_vec)),
            Ok(Ok(b"fields".to_vec()))
        );
        for at in 0..object.len() {
            object[at] ^= 0x10;
            assert!(open(Kind::Floor, &object).is_err(), "byte {at}");
            object[at] ^= 0x10;
        }
        for len in 0..object.len() {
            assert!(open(Kind::Floor, &object[..len]).is_err(), "length {len}");
        }
        assert!(matches!(open(Kind::Head, &object), Err(FormatError::Kind { .. })));
    }
}
