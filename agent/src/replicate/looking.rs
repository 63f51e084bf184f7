//! Where a round looks, pass by pass, and what the point may claim in the end.
//!
//! Read first: [`Looking::open`], [`Looking::look`] and [`Looking::label`].
//!
//! A volume whose writes are marked is looked at where it may have changed, then where it changed meanwhile. Without
//! marks, or where they are in doubt, everything is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use backhaul_cli::Phase;
use backhaul_hints::{Blocks, Doubt, Proof};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{VolumeId, VolumeSlot};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::threads;
use backhaul_volume::stability::Stability;

use super::feeding::{Look, PlannedVolume};
use super::passes::Passes;
use super::{Round, RoundError};
use crate::capture::{Capture, Watching};
use crate::connection::Session;
use crate::state::ProtectedVolume;
use crate::tracker::hash_index::HashIndex;
use crate::tracker::{Candidates, Known, Since, Tracking};

/// A volume that is open for a round.
struct Looked<'a> {
    volume: &'a ProtectedVolume,
    source: Arc<dyn Capture>,
    index: Arc<HashIndex>,
    watch: Option<Box<dyn Watching>>,
    marks: Option<Marks>,
    /// All of it was read in this round.
    scanned: bool,
}

/// What is marked of a volume.
struct Marks {
    candidates: Arc<dyn Candidates>,
    since: Since,
    /// Taken in this round, and read after that.
    read: Blocks,
}

impl Looked<'_> {
    fn doubted(&self, doubt: Doubt) -> RoundError {
        RoundError::Doubted { name: self.volume.name.clone(), doubt }
    }

    /// What was marked since the last look.
    fn take(&mut self) -> Result<Blocks, RoundError> {
        let blocks = self.volume.geometry.blocks();
        let mut taken = Blocks::none(blocks);
        if let Some(marks) = &mut self.marks {
            let result = marks.candidates.take_into(&mut taken);
            marks.read.insert_all(&taken);
            result.map_err(|doubt| self.doubted(doubt))?;
        }
        Ok(taken)
    }

    /// Why it is not sure that all that changed was marked, if that matters: what was read is what was there.
    fn unproven(&self) -> Result<Option<String>, RoundError> {
        let Some(marks) = self.marks.as_ref().filter(|_| !self.scanned) else { return Ok(None) };
        match marks.candidates.proof() {
            Ok(Proof::Complete) => Ok(None),
            Ok(Proof::Busy) => Ok(Some("its disk is so busy that writes cannot be counted".into())),
            Err(doubt) => Err(self.doubted(doubt)),
        }
    }

    /// Where the first pass looks.
    fn first_look(&mut self) -> Result<Look, RoundError> {
        if self.marks.as_ref().is_some_and(|m| m.since == Since::Index) {
            return Ok(Look::At(self.take()?));
        }
        self.scanned = true;
        Ok(Look::Everywhere)
    }
}

/// All volumes of a round.
pub(super) struct Looking<'a> {
    volumes: Vec<Looked<'a>>,
}

impl<'a> Looking<'a> {
    /// Opens them: marks first, then the watch, and nothing is read before both.
    pub(super) async fn open(round: &Round<'a>, tracking: &mut Tracking) -> Result<Self, RoundError> {
        let mut volumes = Vec::new();
        for volume in round.volumes {
            let failed = |source| RoundError::Volume { name: volume.name.clone(), source };
            let source = round.provider.open(volume).map_err(failed)?;
            let Known { index, candidates, since, .. } = tracking.of(&round.state.index_dir(), volume, &*source)?;
            let read = Blocks::none(volume.geometry.blocks());
            let marks = candidates.ok().map(|candidates| Marks { candidates, since, read });
            let watched = source.clone();
            let watch = threads::blocking(move || watched.watch()).await;
            volumes.push(Looked { volume, source, index, watch: Some(watch), marks, scanned: false });
        }
        Ok(Self { volumes })
    }

    /// What is read, and what is known of it.
    pub(super) fn parts(&self) -> Vec<(Arc<dyn Capture>, Arc<HashIndex>)> {
        self.volumes.iter().map(|v| (v.source.clone(), v.index.clone())).collect()
    }

    /// Puts the volumes in the order of these slots, of which each has its own.
    pub(super) fn sort_by_slot(&mut self, slots: &[VolumeSlot]) {
        let mut volumes: Vec<_> = slots.iter().zip(std::mem::take(&mut self.volumes)).collect();
        volumes.sort_by_key(|(slot, _)| **slot);
        self.volumes = volumes.into_iter().map(|(_, v)| v).collect();
    }

    /// Reads and sends.
    pub(super) async fn look(
        &mut self,
        session: &mut Session,
        passes: &mut Passes,
        planned: &mut [PlannedVolume],
        progress: Phase,
    ) -> Result<(), RoundError> {
        let looks = self.volumes.iter_mut().map(Looked::first_look).collect::<Result<Vec<_>, _>>()?;
        passes.run(session, planned, &looks, progress.clone(), |_| {}).await?;
        progress.finish();
        Ok(())
    }

    /// `Crash` only if every volume held still from before the first byte was read until after the last.
    pub(super) fn label(&mut self) -> Result<(Consistency, Vec<String>), RoundError> {
        let mut consistency = Consistency::Crash;
        let mut caveats = Vec::new();
        for v in &mut self.volumes {
            let watch = v.watch.take().filter(|_| !planted(Mutant::WatchedOneByOne));
            let watch = watch.unwrap_or_else(|| v.source.watch());
            caveats.extend(watch.caveats().iter().map(|c| format!("{}: {c}", v.volume.name)));
            let moved = match watch.finish() {
                Stability::Moved(why) => Some(why),
                Stability::Still => v.unproven()?,
            };
            if let Some(why) = moved {
                if !planted(Mutant::FuzzyCalledCrash) {
                    consistency = Consistency::Fuzzy;
                }
                caveats.push(format!("{}: {why}", v.volume.name));
            }
        }
        for v in &self.volumes {
            let failed = |source| RoundError::Volume { name: v.volume.name.clone(), source };
            v.source.recheck().map_err(failed)?;
        }
        Ok((consistency, caveats))
    }

    /// When all of each volume was last read.
    pub(super) fn full_scans(&self, now: UnixMillis) -> BTreeMap<VolumeId, UnixMillis> {
        let at = |v: &Looked<'_>| if v.scanned { now } else { v.index.full_scan().unwrap_or(UnixMillis(0)) };
        self.volumes.iter().map(|v| (v.volume.id, at(v))).collect()
    }

    /// What was read is what the receiver has: it need not be read again before it is written again.
    pub(super) fn settle(self, tracking: &mut Tracking, now: UnixMillis) -> Result<(), RoundError> {
        for v in self.volumes {
            if let Some(marks) = v.marks
                && (v.scanned || !marks.read.is_empty())
            {
                let baseline = v.index.advance(v.scanned.then_some(now))?;
                marks.candidates.settle(&marks.read, baseline);
                tracking.settled(v.volume.id);
            }
        }
        Ok(())
    }
}
