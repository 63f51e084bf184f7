//! A simulation of Backhaul on one thread, decided by a seed: the real session machines, rounds, receivers, catalog,
//! folding and restores, over a simulated network, store, clock, volumes and processes that are killed, paused, cut off,
//! copied and put back.
//!
//! Read first: [`plan`] (what happens), [`history`] (how it is carried out), [`oracle`] (what must hold). The world is
//! put in the place of the real one by `backhaul_seams` and by the traits `Link`, `ObjectStore` and `Provider`.
//!
//! What keeps it deterministic: one thread, tokio's clock paused, every `select!` biased, chance from seeded sources
//! only, blocking work done at once.

pub mod agent;
pub mod bucket;
pub mod census;
pub mod chance;
pub mod disk;
pub mod gate;
pub mod harm;
pub mod history;
pub mod hostile;
pub mod ledger;
pub mod oracle;
pub mod packets;
pub mod panics;
pub mod plan;
pub mod receiver;
pub mod search;
pub mod wire;
