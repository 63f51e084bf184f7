//! Marks by the kernel's own events (eBPF), for devices.
//!
//! Read first: [`KernelHints::track`].

use std::sync::Arc;

use backhaul_hints::{Baseline, Options, Subject, Tracker};
use backhaul_protocol::ids::StateId;

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
