//! End to end: the real programs, real QUIC on loopback, real files and devices.

mod bad_input;
mod certificates;
mod clones;
mod damage;
mod devices;
mod hooks;
mod hostile;
mod identity;
mod index;
mod large_volume;
mod log;
mod overload;
mod plan;
mod replicate;
mod restore;
mod resume;
mod s3;
mod service;
mod service_limits;
mod service_metrics;
mod service_states;
mod stalled_store;
mod targets;
mod unwritable;
mod versions;
