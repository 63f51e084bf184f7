//! What changed: the digests of what the receiver has, and where to look.
//!
//! Read first: [`Tracking`], then [`Candidates`].
//!
//! | file | owns | does not own |
//! |---|---|---|
//! | [`hash_index`] | the digest of every block as it was last read | whether that is what the receiver has |
//! | [`checks`] | the background scan that shows whether marks are missed | reading |
//! | [`hints`] | which blocks were written since, as the kernel tells | what is in them |
//!
//! The hash is the truth: hints say where to look. While they are believed this holds at any moment, and after any kill:
//! **a block is as the index has it, or it is marked** (in what the kernel notes, or in what was taken and not settled).
//! The index is changed when a block was read, and marks are settled only after that; a reboot, which may lose what was
//! not flushed of the index, ends the marks too.

pub mod checks;
pub mod hash_index;
pub mod hints;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backhaul_hints::{Baseline, Blocks, Doubt, Proof, Start, Tracked};
use backhaul_protocol::ids::VolumeId;
use backhaul_volume::sysfs::Dev;

use crate::capture::Capture;
use crate::quiesce::Quiescer;
use crate::state::ProtectedVolume;
use checks::Checks;
use hash_index::{HashIndex, IndexError};

/// Everything is read within this time, whatever the marks say.
pub const DEFAULT_FULL_SCAN: Duration = Duration::from_secs(7 * 86_400);

/// Where a volume may differ from its index.
pub trait Candidates: Send + Sync {
    /// Whether what was written before can be relied upon; otherwise everything is to be read.
    fn start(&self) -> Start;
    /// Adds what was marked since the last take.
    fn take_into(&self, blocks: &mut Blocks) -> Result<u64, Doubt>;
    /// Whether all marks are there.
    fn proof(&self) -> Result<Proof, Doubt>;
    /// Whether something speaks against them. Not for a freeze.
    fn doubt(&self) -> Option<Doubt>;
    /// What was taken, was read after that, and is in the index, which is what the receiver has.
    fn settle(&self, read: &Blocks, baseline: Baseline);
}

impl Candidates for Tracked {
    fn start(&self) -> Start {
        Self::start(self)
    }
    fn take_into(&self, blocks: &mut Blocks) -> Result<u64, Doubt> {
        Self::take_into(self, blocks)
    }
    fn proof(&self) -> Result<Proof, Doubt> {
        Self::proof(self)
    }
    fn doubt(&self) -> Option<Doubt> {
        Self::doubt(self).or_else(|| self.device_doubt())
    }
    fn settle(&self, read: &Blocks, baseline: Baseline) {
        Self::settle(self, read, baseline);
    }
}

/// Who marks what is written.
pub trait Hints: Send {
    /// Begins to mark, or goes on. `Err` says why this volume's writes are not marked.
    fn track(
        &mut self,
        volume: &ProtectedVolume,
        source: &dyn Capture,
        baseline: Baseline,
    ) -> Result<Arc<dyn Candidates>, String>;
}

/// Nobody does: every round reads everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHints;

impl Hints for NoHints {
    fn track(&mut self, _: &ProtectedVolume, _: &dyn Capture, _: Baseline) -> Result<Arc<dyn Candidates>, String> {
        Err("not asked for".into())
    }
}

/// What is known of one volume between rounds.
#[derive(Clone)]
pub struct Known {
    /// What it held when it was last read.
    pub index: Arc<HashIndex>,
    /// Where it may differ from that; or why nobody knows.
    pub candidates: Result<Arc<dyn Candidates>, String>,
    /// What was read: marks are of one device.
    pub device: Option<Dev>,
    /// Whether all that differs is marked. Otherwise, why not: everything is to be read once.
    pub since: Since,
}

/// From when on writes are marked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Since {
    /// From what the index holds.
    Index,
    /// From now on. What was written before is not known, for this reason.
    Now(String),
}

/// What an agent knows of its volumes between rounds. Forgotten when a round fails: what is pinned and on the disk says
/// the same, and is compared again.
pub struct Tracking {
    hints: Box<dyn Hints>,
    /// Who freezes, if anybody is to.
    pub quiescer: Option<Quiescer>,
    /// Whether marks are missed.
    pub checks: Checks,
    known: BTreeMap<VolumeId, Known>,
}

impl Tracking {
    /// With these hints.
    pub fn new(hints: Box<dyn Hints>, quiescer: Option<Quiescer>, checks: Checks) -> Self {
        Self { hints, quiescer, checks, known: BTreeMap::new() }
    }

    /// Forgets one volume.
    pub fn forget_one(&mut self, volume: VolumeId) {
        self.known.remove(&volume);
    }

    /// Forgets everything but who marks.
    pub fn forget(&mut self) {
        self.known.clear();
    }

    /// What is known of a volume. To be called before anything is read.
    pub fn of(&mut self, folder: &Path, volume: &ProtectedVolume, source: &dyn Capture) -> Result<Known, IndexError> {
        let fits = |known: &&Known| {
            let doubted = known.candidates.as_ref().is_ok_and(|c| c.doubt().is_some());
            known.index.geometry() == volume.geometry && known.device == source.device() && !doubted
        };
        if let Some(known) = self.known.get(&volume.id).filter(fits) {
            return Ok(known.clone());
        }
        let index = Arc::new(HashIndex::open(folder, volume.id, volume.geometry)?);
        let candidates = if source.stands_in() {
            // What differs from it need not have been written, and is not marked.
            index.renounce()?;
            Err("something else is read in its place".to_owned())
        } else {
            self.hints.track(volume, source, index.baseline())
        };
        let since = match candidates.as_ref().map(|c| c.start()) {
            Ok(Start::Continued) => Since::Index,
            Ok(Start::Fresh(doubt)) => Since::Now(doubt.to_string()),
            Err(cause) => Since::Now(format!("its writes are not tracked: {cause}")),
        };
        let known = Known { index, candidates, device: source.device(), since };
        self.known.insert(volume.id, known.clone());
        Ok(known)
    }

    /// Marks of this volume were missed: all of it is read in the next round.
    pub fn distrust(&mut self, volume: VolumeId) {
        if let Some(known) = self.known.get_mut(&volume) {
            known.since = Since::Now("a write had not been marked".into());
        }
    }

    /// What was read of a volume is settled.
    pub fn settled(&mut self, volume: VolumeId) {
        if let Some(known) = self.known.get_mut(&volume) {
            known.since = Since::Index;
        }
    }
}

impl Default for Tracking {
    fn default() -> Self {
        Self::new(Box::new(NoHints), None, Checks::new(DEFAULT_FULL_SCAN))
    }
}
