//! Where a round looks, pass by pass, and what the point may claim in the end.
//!
//! Read first: [`Looking::open`], [`Looking::look`] and [`Looking::label`].
//!
//! A volume whose writes are marked is looked at where it may have changed, then where it changed meanwhile. Without
//! marks, or where they are in doubt, everything is read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backhaul_cli::Phase;
use backhaul_hints::{Blocks, Doubt, Proof};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{VolumeId, VolumeSlot};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::threads;
use backhaul_volume::stability::Stability;

use super::feeding::Look;
use super::standing::Course;
use super::{Round, RoundError, Stage};
use crate::capture::{Capture, Watching};
use crate::condition::VolumeReport;
use crate::quiesce::Quiescer;
use crate::state::ProtectedVolume;
use crate::tracker::checks::Checks;
use crate::tracker::hash_index::HashIndex;
use crate::tracker::{Candidates, Known, Since, Tracking};

/// A volume that is open for a round.
pub(super) struct Looked<'a> {
    pub(super) volume: &'a ProtectedVolume,
    pub(super) source: Arc<dyn Capture>,
    pub(super) index: Arc<HashIndex>,
    watch: Option<Box<dyn Watching>>,
    pub(super) marks: Option<Marks>,
    /// Why nothing is marked.
    unmarked: Option<String>,
    /// All of it was read in this round.
    scanned: bool,
    /// Something was taken that was not read: it comes back when tracking begins anew.
    pub(super) unread: bool,
    /// Something had changed that was not marked.
    pub(super) missed: bool,
    pub(super) stood: Stood,
}

/// How a volume stood still.
pub(super) enum Stood {
    /// As its watch says.
    Watched,
    /// The same, and why it could not be frozen.
    NotFrozen(String),
    /// Its file systems were frozen, or nothing was written to it of its own accord.
    Frozen,
    /// They were, but it is not sure that all that was written is marked.
    Uncertain(String),
    /// They were, and it was written to all the same.
    Late(String),
}

/// What is marked of a volume.
pub(super) struct Marks {
    pub(super) candidates: Arc<dyn Candidates>,
    pub(super) since: Since,
    /// Taken in this round, and read after that.
    pub(super) read: Blocks,
}

impl Looked<'_> {
    pub(super) fn doubted(&self, doubt: Doubt) -> RoundError {
        RoundError::Doubted { name: self.volume.name.clone(), doubt }
    }

    pub(super) fn has_moved(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.has_moved())
    }

    /// What was marked since the last look, and is read now.
    pub(super) fn take(&mut self) -> Result<Blocks, RoundError> {
        let mut taken = Blocks::none(self.volume.geometry.blocks());
        if let Some(marks) = &mut self.marks {
            let result = marks.candidates.take_into(&mut taken);
            marks.read.insert_all(&taken);
            result.map_err(|doubt| self.doubted(doubt))?;
        }
        Ok(taken)
    }

    /// Was taken otherwise, and is read now.
    pub(super) fn took(&mut self, taken: &Blocks) {
        if let Some(marks) = &mut self.marks {
            marks.read.insert_all(taken);
        }
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
    pub(super) volumes: Vec<Looked<'a>>,
    /// What a person should know.
    pub(super) caveats: Vec<String>,
    /// How long file systems were frozen.
    pub(super) frozen_for: Option<Duration>,
    /// A moment before that of which the point is, at which the volumes that are written to were not read yet.
    pub(super) stood_at: Option<UnixMillis>,
    observe: &'a (dyn Fn(&Stage) + Send + Sync),
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
            let (marks, unmarked) = match candidates {
                Ok(candidates) => (Some(Marks { candidates, since, read }), None),
                Err(cause) => (None, Some(cause)),
            };
            let watched = source.clone();
            let watch = threads::blocking(move || watched.watch()).await;
            volumes.push(Looked {
                volume,
                source,
                index,
                watch: Some(watch),
                marks,
                unmarked,
                scanned: false,
                unread: false,
                missed: false,
                stood: Stood::Watched,
            });
        }
        Ok(Self { volumes, caveats: Vec::new(), frozen_for: None, stood_at: None, observe: round.observe })
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
        quiescer: Option<&Quiescer>,
        checks: &mut Checks,
        mut course: Course<'_>,
        progress: Phase,
    ) -> Result<(), RoundError> {
        self.check(checks, &mut course).await?;
        let looks = self.volumes.iter_mut().map(Looked::first_look).collect::<Result<Vec<_>, _>>()?;
        (self.observe)(&self.stage(&looks));
        let Course { session, passes, planned } = course;
        passes.run(session, planned, &looks, Some(progress.clone()), |_| {}).await?;
        progress.finish();
        match quiescer {
            Some(quiescer) => self.stand_still(quiescer, Course { session, passes, planned }).await,
            None => Ok(()),
        }
    }

    /// What a round begins with.
    fn stage(&self, looks: &[Look]) -> Stage {
        let (mut marked, mut to_read, mut unknown, mut volumes) = (0, 0, Vec::new(), Vec::new());
        for (v, look) in self.volumes.iter().zip(looks) {
            let (name, bytes) = (v.volume.name.to_string(), v.volume.geometry.length());
            to_read += match look {
                Look::At(blocks) => blocks.count() * u64::from(v.volume.geometry.block_size()),
                Look::Everywhere => bytes,
            };
            volumes.push(VolumeReport { name, bytes, unmarked: v.unmarked.clone() });
            match (look, v.marks.as_ref().map(|m| &m.since)) {
                (Look::At(blocks), _) => marked += blocks.count() * u64::from(v.volume.geometry.block_size()),
                (Look::Everywhere, Some(Since::Now(why))) => unknown.push(format!("{}: {why}", v.volume.name)),
                (Look::Everywhere, _) => {}
            }
        }
        Stage { marked, to_read, unknown, volumes }
    }

    /// Bytes of blocks that were marked and looked at; `None` where nothing is marked.
    pub(super) fn marked_bytes(&self) -> Option<u64> {
        let marked =
            |v: &Looked<'_>| v.marks.as_ref().map(|m| m.read.count() * u64::from(v.volume.geometry.block_size()));
        self.volumes.iter().filter_map(marked).reduce(|a, b| a + b)
    }

    /// `Crash` only if every volume stood still: at one instant that all share, or from before the first byte was read
    /// until after the last.
    pub(super) fn label(&mut self) -> Result<(Consistency, Vec<String>), RoundError> {
        let mut consistency = Consistency::Crash;
        let mut caveats = std::mem::take(&mut self.caveats);
        for v in &mut self.volumes {
            let watch = v.watch.take().filter(|_| !planted(Mutant::WatchedOneByOne));
            let watch = watch.unwrap_or_else(|| v.source.watch());
            if matches!(v.stood, Stood::Watched | Stood::NotFrozen(_)) {
                caveats.extend(watch.caveats().iter().map(|c| format!("{}: {c}", v.volume.name)));
            }
            let moved = match (&v.stood, watch.finish()) {
                (Stood::Frozen, _) => match v.marks.as_ref().and_then(|m| m.candidates.doubt()) {
                    Some(doubt) => return Err(v.doubted(doubt)),
                    None => None,
                },
                (Stood::Uncertain(why) | Stood::Late(why), _) => Some(why.clone()),
                (_, Stability::Still) => v.unproven()?,
                (Stood::NotFrozen(cause), Stability::Moved(why)) => Some(format!("{why}, and {cause}")),
                (Stood::Watched, Stability::Moved(why)) => match &v.unmarked {
                    Some(cause) if v.source.device().is_some() => {
                        Some(format!("{why}, and is not frozen, since its writes are not tracked: {cause}"))
                    }
                    _ => Some(why),
                },
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
                if v.scanned {
                    v.index.scanned(now, now)?;
                    tracking.checks.forget(v.volume.id);
                }
                let baseline = v.index.advance()?;
                marks.candidates.settle(&marks.read, baseline);
                tracking.settled(v.volume.id);
            }
            if v.missed {
                tracking.distrust(v.volume.id);
            } else if v.unread || matches!(v.stood, Stood::Late(_)) {
                tracking.forget_one(v.volume.id);
            }
        }
        Ok(())
    }
}
