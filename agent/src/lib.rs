//! The agent: finds changed blocks and sends them to a receiver.
//!
//! Read first: [`replicate`] (a round from `Open` to `Committed`), [`pipeline`] and [`state`].

pub mod capture;
pub mod cmd;
pub mod condition;
pub mod config;
pub mod connection;
pub mod machine;
pub mod metrics;
pub mod network_restore;
pub mod pipeline;
pub mod plan;
pub mod protect;
pub mod quiesce;
pub mod replicate;
pub mod state;
pub mod status;
pub mod tracker;
