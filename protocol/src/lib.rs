//! What both ends of Backhaul agree on: types, wire messages, sessions and store formats.
//!
//! This crate never opens a socket or a file, never reads a clock, never draws a random number and knows no
//! runtime. Everything it does is a function of what it is given, so all of it can be tested with virtual time.
//! `clippy.toml` beside it bans the rest.
//!
//! Read first: [`record`] (the bytes of a block on the wire, in a segment and on the way back), [`store::log`]
//! (what makes a recovery point exist) and [`session`] (who says what when). The byte tables are in
#![doc = "[`wire`] and [`store`]."]

pub mod bytes;
pub mod consistency;
pub mod digest;
pub mod geometry;
pub mod ids;
pub mod limits;
pub mod record;
pub mod session;

pub mod store;
pub mod wire;
