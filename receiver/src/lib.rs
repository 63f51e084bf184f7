//! Placeholder
pub mod store;
