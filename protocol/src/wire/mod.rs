//! What goes over the wire: a frozen greeting, control frames, and block records as they are ([`crate::record`]).
//!
//! Read first: [`message`] (one enum per direction), then [`frame`].
#![doc = include_str!("../../WIRE.md")]

pub mod frame;
pub mod hello;
pub mod message;

/// What both sides name in the TLS handshake.
pub const ALPN: &[u8] = b"backhaul/1";
/// The name in every receiver's certificate: agents trust the authority, not an address.
pub const SERVER_NAME: &str = "receiver.backhaul.internal";
