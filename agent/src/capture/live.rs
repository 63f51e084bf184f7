//! Volumes as they are.

use std::sync::Arc;

use backhaul_volume::scan::{DEVICE_READ, FILE_READ};
use backhaul_volume::stability::{Stability, Watch};
use backhaul_volume::sysfs::Dev;
use backhaul_volume::{Source, VolumeError};

use super::{Capture, Provider, Watching};
use crate::state::ProtectedVolume;

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
