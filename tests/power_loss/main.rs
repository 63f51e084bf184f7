//! Power losses on real file systems: a workload is run once on a fault disk, which logs every write and flush; then the
//! disk is brought to every state that a power loss at any moment could have left, mounted, and looked at.
//!
//! Read first: [`backhaul_tests::faultdisk::log`] (which states there are), then [`store`].

mod bite;
mod disk;
mod state;
mod store;
mod told;
