//! The first 16 bytes of each direction of the control stream. Frozen: every version reads every other's.
//!
//! ```text
//! agent:     0 4 magic "BKHL"  4 2 lowest version  6 2 highest version  8 8 features, 0
//! receiver:  0 4 magic "BKHL"  4 2 chosen version, 0 if none fits  6 2 own highest version  8 8 features, 0
//! ```

use crate::bytes::{FieldError, FieldReader};

/// Bytes of a greeting.
pub const HELLO_LEN: usize = 16;
const MAGIC: [u8; 4] = *b"BKHL";
/// The version of the messages that this program speaks.
pub const VERSION: u16 = 1;

/// The greeting is none, or no version fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Wrong bytes.
    #[error("the other side does not speak Backhaul's protocol")]
    Magic,
    /// No common version.
    #[error("no common protocol version: here {VERSION}, there {theirs}; update the older side")]
    Version {
        /// The other side's highest.
        theirs: u16,
    },
}

impl From<FieldError> for HelloError {
    fn from(_: FieldError) -> Self {
        Self::Magic
    }
}

fn greeting(a: u16, b: u16) -> [u8; HELLO_LEN] {
    let mut out = [0; HELLO_LEN];
    out[..4].copy_from_slice(&MAGIC);
    out[4..6].copy_from_slice(&a.to_le_bytes());
    out[6..8].copy_from_slice(&b.to_le_bytes());
    out
}

fn parse(bytes: &[u8; HELLO_LEN]) -> Result<(u16, u16), HelloError> {
    let mut r = FieldReader::new(bytes);
    if r.array("magic")? != MAGIC {
        return Err(HelloError::Magic);
    }
    Ok((r.u16("version")?, r.u16("version")?))
}

/// What the agent says.
pub fn agent_hello() -> [u8; HELLO_LEN] {
    greeting(VERSION, VERSION)
}

/// What the receiver answers, and whether the session goes on.
pub fn answer(agent: &[u8; HELLO_LEN]) -> Result<([u8; HELLO_LEN], Result<(), HelloError>), HelloError> {
    let (low, high) = parse(agent)?;
    if (low..=high).contains(&VERSION) {
        Ok((greeting(VERSION, VERSION), Ok(())))
    } else {
        Ok((greeting(0, VERSION), Err(HelloError::Version { theirs: high })))
    }
}

/// Whether the receiver's answer lets the session go on.
pub fn accept(receiver: &[u8; HELLO_LEN]) -> Result<(), HelloError> {
    match parse(receiver)? {
        (VERSION, _) => Ok(()),
        (_, theirs) => Err(HelloError::Version { theirs }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_frozen() {
        assert_eq!(agent_hello(), *b"BKHL\x01\0\x01\0\0\0\0\0\0\0\0\0");
        let (bytes, goes_on) = answer(&agent_hello()).expect("legal");
        assert_eq!((bytes, goes_on), (*b"BKHL\x01\0\x01\0\0\0\0\0\0\0\0\0", Ok(())));
        assert_eq!(accept(&bytes), Ok(()));
        let (bytes, goes_on) = answer(b"BKHL\x07\0\x09\0\0\0\0\0\0\0\0\0").expect("legal");
        assert_eq!(goes_on, Err(HelloError::Version { theirs: 9 }));
        assert_eq!(accept(&bytes), Err(HelloError::Version { theirs: 1 }));
        assert_eq!(answer(b"GET / HTTP/1.1\r\n"), Err(HelloError::Magic));
    }
}
