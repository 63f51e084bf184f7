//! End to end: the real programs, real QUIC on loopback, real files and devices.

mod devices;
mod index;
mod replicate;
mod resume;
