//! Files and block devices as Backhaul reads and writes them. Linux only; synchronous; every type is `Send + Sync`.
//!
//! Read first: [`Volume`] (the read side that everything shares), [`Source`] (what is protected; opened read-only, always)
//! with [`stability`] (whether it held still while it was read), and [`target`] (where a restore writes, and all that
//! it refuses).
//!
//! What this crate never does: hash, compress, talk to a network, or decide what to read. All `unsafe` of the project
//! is here, in `sys` (system calls that rustix lacks); every other crate denies it.

pub mod aim;
pub mod buffer;
mod direct;
pub mod durable;
mod error;
pub mod identity;
pub mod mem;
pub mod priority;
pub mod rebuild;
pub mod reflink;
pub mod scan;
pub mod source;
pub mod stability;
mod sys;
pub mod sysfs;
pub mod target;
mod usage;

#[cfg(test)]
mod testing;

use std::ops::Range;

use backhaul_protocol::geometry::ByteOffset;

pub use error::VolumeError;
pub use identity::{Identity, IdentityMatch};
pub use source::Source;
pub use sys::give_back_large_blocks;

/// What freezing file systems needs of the kernel and rustix does not have.
pub mod frozen {
    pub use crate::sys::{btrfs_id, ending_signals, freeze, lock_byte, loop_file, thaw, unlock_byte};
}

/// The read side of a block device, an image file, or memory in tests.
pub trait Volume: Send + Sync {
    /// Bytes. Does not change while the value lives, even if what is beneath grows.
    fn length(&self) -> u64;

    /// Fills all of `buf` with what is at `at`.
    ///
    /// Never hands out bytes that were not read: a range that reaches past the end, a short read and EIO are errors
    /// that name path and range. For a device, a page-aligned `buf` ([`buffer::AlignedBuffer`]) at a multiple of the
    /// sector size is read into directly; any other is copied once.
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError>;

    /// The next range at or after `from` that may hold something other than zeroes, in bytes; `None` if only holes are
    /// left. What is not named reads as zeroes. Where the system cannot tell, everything is data.
    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError>;

    /// What it is, for people: "image /srv/a.img" or "device /dev/sda".
    fn describe(&self) -> String;
}

impl<V: Volume + ?Sized> Volume for std::sync::Arc<V> {
    fn length(&self) -> u64 {
        (**self).length()
    }
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        (**self).read_at(at, buf)
    }
    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        (**self).next_data(from)
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
}

/// `at..at + len` if that is inside `length`.
fn checked_range(at: ByteOffset, len: usize, length: u64) -> Option<Range<u64>> {
    let end = at.0.checked_add(len as u64)?;
    (end <= length).then_some(at.0..end)
}
