//! The formats of the store. Everything is immutable; a point exists if and only if its log record exists.
pub mod key;
