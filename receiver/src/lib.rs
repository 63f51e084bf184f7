//! The receiver: keeps recovery points in a store, and restores them.
//!
//! Read first: [`catalog`] (what the store holds), [`round`] (how a point is made) and [`view`] (what a point looks
//! like).

pub mod access;
pub mod catalog;
pub mod cmd;
pub mod config;
pub mod counting;
pub mod credit;
pub mod draft;
pub mod dry_run;
pub mod fetch;
pub mod fold;
pub mod history;
pub mod ingest;
pub mod keys;
pub mod layers;
pub mod limits;
pub mod locate;
pub mod measuring;
pub mod membership;
pub mod metering;
pub mod metrics;
pub mod notices;
pub mod object_ids;
pub mod plan;
pub mod presence;
pub mod quota;
pub mod reachable;
pub mod read_error;
pub mod read_session;
pub mod rehydrate;
pub mod restore;
pub mod restore_error;
pub mod round;
pub mod salvage;
pub mod scrub;
pub mod seen;
pub mod segment_writer;
pub mod server;
pub mod session;
pub mod store;
pub mod survey;
#[cfg(test)]
mod testing;
pub mod view;
pub mod whole;
