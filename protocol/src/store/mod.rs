//! The formats of the store. Everything is immutable; a point exists if and only if its log record exists.
//!
//! Read first: [`log`] (what a point is), then [`segment`] (where the bytes are) and [`map`] (where the newest
//! record of each block is).
#![doc = include_str!("../../STORE.md")]

pub mod checkpoint;
pub mod entry;
pub mod envelope;
pub mod fleet;
pub mod key;
pub mod log;
pub mod map;
pub mod segment;
