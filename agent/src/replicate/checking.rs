//! The background scan's part of a round: a portion is read before anything is taken, and judged when all marks are known.
//!
//! Read first: [`Looking::check`], then [`Looking::judge`].

use backhaul_hints::{Blocks, Proof};

use super::RoundError;
use super::feeding::Look;
use super::looking::{Looking, Stood};
use super::standing::Course;
use crate::connection::unix_millis;
use crate::tracker::checks::Checks;
use crate::tracker::{Since, Tracking};

impl Looking<'_> {
    /// Reads what is due. What is not as the index has it is sent, and suspected.
    pub(super) async fn check(&mut self, checks: &mut Checks, course: &mut Course<'_>) -> Result<(), RoundError> {
        let mut due = Vec::new();
        for v in &self.volumes {
            let marked = v.marks.as_ref().is_some_and(|m| m.since == Since::Index);
            let geometry = v.volume.geometry;
            let next = v.index.scan_progress().next.min(geometry.blocks());
            due.push(if marked { checks.due(v.volume.id, geometry, next) } else { next..next });
        }
        if due.iter().all(|range| range.is_empty()) {
            return Ok(());
        }
        let looks = self.volumes.iter().zip(&due).map(|(v, due)| {
            let mut blocks = Blocks::none(v.volume.geometry.blocks());
            due.clone().for_each(|block| blocks.insert(block));
            Look::At(blocks)
        });
        let looks: Vec<Look> = looks.collect();
        let mut differed: Vec<Blocks> = self.volumes.iter().map(|v| Blocks::none(v.volume.geometry.blocks())).collect();
        let slots: Vec<_> = course.planned.iter().map(|p| p.opened.slot).collect();
        let found = |page: &crate::pipeline::scanner::Scanned| {
            let Some(volume) = slots.iter().position(|slot| *slot == page.slot) else { return };
            let first = page.page.first_block().0;
            let changed = page.differed.iter().map(|i| first + i as u64).filter(|b| due[volume].contains(b));
            changed.for_each(|block| differed[volume].insert(block));
        };
        course.passes.run(course.session, course.planned, &looks, None, found).await?;
        for ((v, due), differed) in self.volumes.iter().zip(&due).zip(&differed).filter(|((_, due), _)| !due.is_empty())
        {
            checks.suspect(v.volume.id, v.volume.geometry, differed);
            if due.end == v.volume.geometry.blocks() {
                v.index.scanned(v.index.scan_progress().begun, unix_millis())?;
            } else {
                v.index.scanned_to(due.end)?;
            }
        }
        Ok(())
    }

    /// Says which suspects nothing explains, where that can be known now. To be called after the last look.
    pub(super) fn judge(&mut self, tracking: &mut Tracking) -> Result<(), RoundError> {
        for v in &mut self.volumes {
            let (id, geometry) = (v.volume.id, v.volume.geometry);
            let Some(marks) = v.marks.as_ref().filter(|_| tracking.checks.has_suspects(id)) else { continue };
            // With nothing under way every write that has ended is marked; a busy disk is asked after another round.
            if marks.candidates.proof().map_err(|doubt| v.doubted(doubt))? == Proof::Busy {
                continue;
            }
            let mut marked = marks.read.clone();
            let mut late = Blocks::none(geometry.blocks());
            marks.candidates.take_into(&mut late).map_err(|doubt| v.doubted(doubt))?;
            if !late.is_empty() {
                marked.insert_all(&late);
                v.unread = true;
            }
            let missed = tracking.checks.judge(id, geometry, &marked);
            if missed > 0 {
                let why = format!("{missed} blocks had changed and were not marked; everything is read again");
                tracing::error!(volume = %v.volume.name, missed, "writes were not marked: marks are not believed until all is read");
                v.missed = true;
                v.stood = Stood::Uncertain(why);
            }
        }
        Ok(())
    }
}
