//! Where a round reads its volumes from, and how it learns whether they held still.
//!
//! Read first: [`Provider`] and [`Capture`]. [`Live`] reads volumes as they are; a snapshot is another provider.

use std::sync::Arc;

use backhaul_volume::scan::{DEVICE_READ, FILE_READ};
use backhaul_volume::stability::{Stability, Watch};
use backhaul_volume::sysfs::Dev;
use backhaul_volume::{Source, Volume, VolumeError};

use crate::state::ProtectedVolume;

/// Opens volumes for a round.
pub trait Provider: Send + Sync {
    /// Opens one, read-only.
    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError>;
}

/// A volume that is open for a round.
pub trait Capture: Volume {
    /// Begins to watch it. May block.
    fn watch(&self) -> Box<dyn Watching>;
    /// Whether it is still what was opened: same device, same size.
    fn recheck(&self) -> Result<(), VolumeError>;
    /// How much to read at once, bytes.
    fn read_len(&self) -> usize;
    /// The block device that it is.
    fn device(&self) -> Option<Dev> {
        None
    }
}

/// A watch over a volume, from before its first byte is read until after the last.
pub trait Watching: Send {
    /// Whether it is lost already. `false` proves nothing yet.
    fn has_moved(&self) -> bool;
    /// What it can't see, for people.
    fn caveats(&self) -> &[String];
    /// Ends it.
    fn finish(self: Box<Self>) -> Stability;
}

/// Volumes as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Live;

impl Provider for Live {
    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError> {
        Ok(Arc::new(Source::open(&volume.path)?))
    }
}

impl Capture for Source {
    fn watch(&self) -> Box<dyn Watching> {
        Box::new(Source::watch(self))
    }
    fn recheck(&self) -> Result<(), VolumeError> {
        Source::recheck(self)
    }
    fn read_len(&self) -> usize {
        if self.is_device() { DEVICE_READ } else { FILE_READ }
    }
    fn device(&self) -> Option<Dev> {
        Source::device(self)
    }
}

impl Watching for Watch {
    fn has_moved(&self) -> bool {
        Watch::has_moved(self)
    }
    fn caveats(&self) -> &[String] {
        Watch::caveats(self)
    }
    fn finish(self: Box<Self>) -> Stability {
        Watch::finish(*self)
    }
}
