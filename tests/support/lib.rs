//! What the end-to-end tests share: receivers and agents as real programs in a folder of their own, images and
//! devices, a network that can be cut.
//!
//! Read first: [`Fixture`], then [`Agent`], [`Serving`] and [`Ran`].
//!
//! Everything that is started here is ended by its own id when the value is dropped, also when a test panics.

pub mod device;
pub mod faultdisk;
pub mod faults;
pub mod fixture;
pub mod image;
pub mod inside;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod noting;
pub mod peer;
pub mod process;
pub mod s3;

pub use device::{Loop, Mount, SmallDisk, needs_fault_disk, needs_root};
pub use fixture::{Agent, Fixture, Serving};
pub use image::Random;
pub use network::{Network, Weather};
pub use process::{Child, Ran};
