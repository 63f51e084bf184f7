//! Marks by the kernel's own events (eBPF), for devices.
//!
//! Read first: [`KernelHints::track`]. What is pinned goes on without the agent, until the volume is
//! [no longer protected](KernelHints::keep) or the machine is rebooted.

use std::sync::Arc;

use backhaul_hints::{Baseline, Options, Subject, Tracker};
use backhaul_protocol::ids::{StateId, VolumeId};

use super::{Candidates, Hints};
use crate::capture::Capture;
use crate::state::ProtectedVolume;

/// Tracks devices, once one is to be tracked.
#[derive(Debug)]
pub struct KernelHints {
    options: Options,
    /// Why it can't be had is not asked again: a round would say it each time.
    tracker: Option<Result<Tracker, String>>,
}

impl KernelHints {
    /// For the agent with this state.
    pub fn new(state: StateId) -> Self {
        Self { options: Options::new(state.0), tracker: None }
    }
}

impl KernelHints {
    /// Forgets what is pinned of all but these volumes, and all if there are none. Makes nothing where nothing is pinned.
    pub fn keep(&mut self, volumes: &[VolumeId]) -> Result<(), String> {
        let name: String = self.options.owner.iter().map(|byte| format!("{byte:02x}")).collect();
        if !self.options.pin.join(name).exists() {
            return Ok(());
        }
        let tracker = Tracker::open(&self.options).map_err(|e| e.to_string())?;
        if volumes.is_empty() {
            self.tracker = None;
            return tracker.remove().map_err(|e| e.to_string());
        }
        for pinned in tracker.volumes().map_err(|e| e.to_string())? {
            if !volumes.contains(&VolumeId(pinned)) {
                tracker.forget(pinned).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

impl Hints for KernelHints {
    fn track(
        &mut self,
        volume: &ProtectedVolume,
        source: &dyn Capture,
        baseline: Baseline,
    ) -> Result<Arc<dyn Candidates>, String> {
        let dev = source.device().ok_or("an image file's writes are not tracked")?;
        let open = || Tracker::open(&self.options).map_err(|e| e.to_string());
        let tracker = self.tracker.get_or_insert_with(open).as_ref().map_err(Clone::clone)?;
        let subject = Subject {
            volume: volume.id.0,
            dev,
            block_size: volume.geometry.block_size(),
            length: volume.geometry.length(),
            baseline: Some(baseline),
        };
        let tracked = tracker.track(&subject).map_err(|e| e.to_string())?;
        Ok(Arc::new(tracked))
    }
}
