//! QUIC and TLS: what carries the messages of `protocol`.
//!
//! Read first: [`link`] (what a session sees of a connection), [`endpoint`] (a thread of its own for QUIC), [`tuning`]
//! (how it treats its path), [`tls`] (who
//! is who), [`control`] and [`blocks`] (what goes over a connection).

pub mod authority;
pub mod blocks;
pub mod congestion;
pub mod control;
pub mod endpoint;
pub mod error;
pub mod link;
pub mod tls;
pub mod token;
pub mod tuning;
