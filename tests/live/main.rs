//! Volumes that are mounted and written to while points are taken, by the real programs, on real devices: every point is
//! restored and proven.
//!
//! Read first: [`server::Server`], then `order`.

mod order;
mod paths;
mod server;
mod stops;
