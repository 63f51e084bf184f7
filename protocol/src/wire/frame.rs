//! Control frames: four bytes of length, then one message in bincode 2 with a limit and no trailing bytes.
//! The only place where bincode is used.

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{Decode, Encode};

use crate::limits::MAX_FRAME;

/// Bytes of the length before a message.
pub const PREFIX_LEN: usize = 4;

/// A frame that is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`], or empty.
    #[error("control frame of {0} bytes: from 1 to 65536 are allowed")]
    Length(usize),
    /// Not one whole message.
    #[error("control frame that is no message: {0}")]
    Message(String),
}

fn config() -> Configuration<LittleEndian, Varint, Limit<MAX_FRAME>> {
    bincode::config::standard().with_little_endian().with_variable_int_encoding().with_limit::<MAX_FRAME>()
}

/// What can be put into a frame.
pub trait Sendable: Encode {}
impl<T: Encode> Sendable for T {}
/// What can be taken out of a frame.
pub trait Receivable: Decode<()> {}
impl<T: Decode<()>> Receivable for T {}

/// A message as a frame, its length in front.
pub fn encode<M: Sendable>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0; PREFIX_LEN];
    bincode::encode_into_std_write(message, &mut out, config()).map_err(|e| FrameError::Message(e.to_string()))?;
    let len = out.len() - PREFIX_LEN;
    if len > MAX_FRAME {
        return Err(FrameError::Length(len));
    }
    out[..PREFIX_LEN].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(out)
}

/// Checks the length in front of a frame: how many bytes to read next.
pub fn frame_len(prefix: [u8; PREFIX_LEN]) -> Result<usize, FrameError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if (1..=MAX_FRAME).contains(&len) { Ok(len) } else { Err(FrameError::Length(len)) }
}

/// The message in a frame without its length.
pub fn decode<M: Receivable>(frame: &[u8]) -> Result<M, FrameError> {
    let (message, used) =
        bincode::decode_from_slice(frame, config()).map_err(|e| FrameError::Message(e.to_string()))?;
    if used == frame.len() { Ok(message) } else { Err(FrameError::Message("bytes after the message".into())) }
}
