//! Making volumes that are written to stand still: passes until little is left, then a freeze in which the rest is read.
//!
//! Read first: [`Looking::stand_still`].

use std::sync::Arc;
use std::time::Instant;

use backhaul_cli::text;
use backhaul_hints::{Blocks, Proof};

use super::RoundError;
use super::feeding::{Known, Look, PlannedVolume};
use super::looking::{Looking, Stood};
use super::passes::Passes;
use crate::connection::{Session, unix_millis};
use crate::pipeline::scanner::ScanVolume;
use crate::quiesce::{Instant as FrozenInstant, Part, QuiesceError, Quiescer, Verdict};

/// Passes over what changed during the pass before, until it is given up that they become shorter. Arbitrary.
const PASSES: usize = 8;
/// Freezes that may find more than fits, or be broken, before the point is given up. Arbitrary.
const FREEZES: usize = 3;

/// Where passes go: the same for all of a round.
pub(super) struct Course<'r> {
    pub(super) session: &'r mut Session,
    pub(super) passes: &'r mut Passes,
    pub(super) planned: &'r mut Vec<PlannedVolume>,
}

impl Course<'_> {
    async fn pass(&mut self, looks: &[Look]) -> Result<(), RoundError> {
        self.passes.run(self.session, self.planned, looks, None, |_| {}).await
    }
}

impl Looking<'_> {
    /// Has all volumes that are written to stand still at one instant, and reads them as they were then. If that cannot
    /// be had here at all, it is noted why, and the point will be `Fuzzy`.
    pub(super) async fn stand_still(&mut self, quiescer: &Quiescer, mut course: Course<'_>) -> Result<(), RoundError> {
        let moving: Vec<usize> = (0..self.volumes.len()).filter(|i| self.volumes[*i].has_moved()).collect();
        if moving.is_empty() || moving.iter().any(|i| self.volumes[*i].marks.is_none()) {
            return Ok(());
        }
        let devices = moving.iter().filter_map(|i| self.volumes[*i].source.device()).collect();
        // What was marked so far is sent before anything is held, so that volumes can be unmounted meanwhile.
        let left = self.catch_up(&moving, quiescer, &mut course).await?;
        course.pass(&left.into_iter().map(Look::At).collect::<Vec<_>>()).await?;
        match quiescer.hold(devices).await {
            Ok(caveats) => self.caveats.extend(caveats),
            Err(error) if error.is_retryable() => return Err(RoundError::Moving(error.to_string())),
            Err(error) => {
                let cause = format!("its file systems can't be frozen: {error}");
                moving.iter().for_each(|i| self.volumes[*i].stood = Stood::NotFrozen(cause.clone()));
                return Ok(());
            }
        }
        let frozen = self.freeze(&moving, quiescer, &mut course).await;
        quiescer.release();
        frozen
    }

    /// Passes until what is left fits into a freeze: that is given back, taken and not read. One set for each volume.
    async fn catch_up(
        &mut self,
        moving: &[usize],
        quiescer: &Quiescer,
        course: &mut Course<'_>,
    ) -> Result<Vec<Blocks>, RoundError> {
        let fits = quiescer.limits.memory as u64 / 2;
        let mut begun = Instant::now();
        let (mut bytes, mut took) = (0, begun.elapsed());
        for pass in 0..PASSES {
            let mut left: Vec<Blocks> = self.volumes.iter().map(|v| Blocks::none(v.volume.geometry.blocks())).collect();
            bytes = 0;
            for i in moving {
                left[*i] = self.volumes[*i].take()?;
                bytes += left[*i].count() * u64::from(self.volumes[*i].volume.geometry.block_size());
            }
            if bytes <= fits {
                return Ok(left);
            }
            if pass > 0 {
                took = begun.elapsed();
            }
            begun = Instant::now();
            course.pass(&left.into_iter().map(Look::At).collect::<Vec<_>>()).await?;
        }
        let rate = bytes as f64 / took.as_secs_f64().max(0.001);
        Err(RoundError::Moving(format!(
            "dirty rate: blocks of {} change each second, faster than they are sent; at most {} may be left for the freeze",
            text::bytes(rate as u64),
            text::bytes(fits)
        )))
    }

    /// Freezes what is held until that was short enough.
    async fn freeze(
        &mut self,
        moving: &[usize],
        quiescer: &Quiescer,
        course: &mut Course<'_>,
    ) -> Result<(), RoundError> {
        let mut cause = String::new();
        for _ in 0..FREEZES {
            let mut left = self.catch_up(moving, quiescer, course).await?;
            if self.is_quiet(moving, &mut left)? {
                moving.iter().for_each(|i| self.volumes[*i].stood = Stood::Frozen);
                return Ok(());
            }
            let parts = moving.iter().zip(moving.iter().map(|i| left[*i].clone())).map(|(i, left)| self.part(*i, left));
            let now = unix_millis();
            let instant = quiescer.instant(parts.collect(), quiescer.limits.freeze).await;
            let instant = instant.map_err(|e| match e {
                QuiesceError::Read(source) => {
                    RoundError::Volume { name: self.volumes[moving[0]].volume.name.clone(), source }
                }
                e => RoundError::Moving(e.to_string()),
            })?;
            let mut looks: Vec<Look> =
                self.volumes.iter().map(|v| Look::At(Blocks::none(v.volume.geometry.blocks()))).collect();
            for (i, part) in moving.iter().zip(&instant.parts) {
                self.volumes[*i].took(&part.taken);
                if let Err(doubt) = part.proof {
                    return Err(self.volumes[*i].doubted(doubt));
                }
                looks[*i] = Look::At(part.taken.clone());
            }
            cause = match instant.verdict {
                Verdict::Read { frozen_for } => {
                    (self.frozen_for, self.stood_at) = (Some(frozen_for), Some(now));
                    return self.read_frozen(moving, instant, &looks, course).await;
                }
                Verdict::TooMuch { marked } => {
                    let (marked, limit) = (text::bytes(marked), quiescer.limits.freeze.as_millis());
                    format!("dirty rate: {marked} to read while frozen are more than {limit} ms or the memory allow")
                }
                Verdict::Broken(why) => why,
            };
            course.pass(&looks).await?;
        }
        Err(RoundError::Moving(cause))
    }

    /// Whether what was read is of one instant without a freeze: nothing was marked, then no write was under way anywhere
    /// and all are marked, then nothing was marked still. So nothing was written or under way at the moment before the
    /// second look. What is marked meanwhile is added to what is left.
    fn is_quiet(&mut self, moving: &[usize], left: &mut [Blocks]) -> Result<bool, RoundError> {
        if moving.iter().any(|i| !left[*i].is_empty()) {
            return Ok(false);
        }
        let now = unix_millis();
        for i in moving {
            let v = &self.volumes[*i];
            let proof = v.marks.as_ref().map_or(Ok(Proof::Busy), |m| m.candidates.proof());
            if proof.map_err(|doubt| v.doubted(doubt))? == Proof::Busy {
                return Ok(false);
            }
        }
        for i in moving {
            left[*i].insert_all(&self.volumes[*i].take()?);
        }
        let quiet = moving.iter().all(|i| left[*i].is_empty());
        if quiet {
            self.stood_at = Some(now);
        }
        Ok(quiet)
    }

    fn part(&self, index: usize, left: Blocks) -> Part {
        let v = &self.volumes[index];
        let marks = v.marks.as_ref().expect("only marked volumes are frozen");
        Part::new(v.source.clone(), v.volume.geometry, marks.candidates.clone(), left)
    }

    /// Sends what was read while all was frozen.
    async fn read_frozen(
        &mut self,
        moving: &[usize],
        instant: FrozenInstant,
        looks: &[Look],
        course: &mut Course<'_>,
    ) -> Result<(), RoundError> {
        let mut planned = Vec::new();
        for (i, p) in course.planned.iter().enumerate() {
            let part = moving.iter().position(|m| *m == i);
            let scan = match part {
                None => p.scan.clone(),
                Some(part) => Arc::new(ScanVolume {
                    slot: p.scan.slot,
                    geometry: p.scan.geometry,
                    volume: Box::new(instant.volume(part)),
                    read_len: p.scan.read_len,
                    index: p.scan.index.clone(),
                }),
            };
            planned.push(PlannedVolume { scan, known: Known::Sent, opened: p.opened.clone() });
        }
        course.passes.run(course.session, &mut planned, looks, None, |_| {}).await?;
        for (i, part) in moving.iter().zip(&instant.parts) {
            let late = part.late.count() * u64::from(part.geometry.block_size());
            self.volumes[*i].stood = match (late, part.proof) {
                (0, Ok(Proof::Complete)) => Stood::Frozen,
                (0, _) => Stood::Uncertain("its disk is so busy that writes cannot be counted".into()),
                _ => Stood::Late(format!(
                    "{} of it were written while its file systems were frozen: by something that is none, as swap",
                    text::bytes(late)
                )),
            };
        }
        Ok(())
    }
}
