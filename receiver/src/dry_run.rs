//! What a restore would do, without doing it.
//!
//! Read first: [`dry_run`]. The targets are opened for reading only.

use std::ops::Range;
use std::sync::Arc;

use backhaul_cli::{Progress, RestorePlan, VolumePlan};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::Name;
use backhaul_seams::threads;
use backhaul_volume::rebuild::Comparer;
use backhaul_volume::target::CheckedTarget;

use crate::plan::restore::{Sums, plan_window, window_pages};
use crate::rehydrate::as_unknown;
use crate::restore::{Prepared, gone};
use crate::restore_error::RestoreError;
use crate::salvage::{Lost, join_neighbours};
use crate::view::{View, ViewVolume};

/// Compares every target with the point.
pub async fn dry_run(prepared: Prepared, progress: &mut Progress) -> Result<RestorePlan, RestoreError> {
    let point = prepared.point.0;
    let (view, jobs, mut lost) = prepared.into_jobs();
    let total = jobs.iter().map(|j| j.volume.geometry.length()).sum();
    let phase = progress.phase("compare", total);
    let mut volumes = Vec::new();
    for job in jobs {
        let checked = Arc::new(job.checked);
        let unknown = gone(&lost, &job.name);
        let comparing = Comparing { view: &view, job: &job.volume, name: &job.name, unknown: &unknown };
        let (sums, more) = comparing.run(&checked, |n| phase.add(n)).await?;
        lost.extend(more);
        volumes.push(VolumePlan {
            name: job.name.to_string(),
            target: job.path.display().to_string(),
            length: job.volume.geometry.length(),
            equal: sums.equal,
            zeroed: sums.zeroed,
            written: sums.written,
            fetched: Some(sums.fetched),
            reads: Some(sums.reads),
            beyond: checked.beyond(),
        });
    }
    phase.finish();
    join_neighbours(&mut lost);
    let lost = lost.iter().filter_map(|l| serde_json::to_value(l).ok()).collect();
    Ok(RestorePlan { point, volumes, lost })
}

struct Comparing<'a> {
    view: &'a View,
    job: &'a ViewVolume,
    name: &'a Name,
    unknown: &'a [Range<u64>],
}

impl Comparing<'_> {
    /// What is to be done, and the pages whose index can't be read: a restore that does not salvage did not get here.
    async fn run(
        &self,
        checked: &Arc<CheckedTarget>,
        progress: impl Fn(u64),
    ) -> Result<(Sums, Vec<Lost>), RestoreError> {
        let geometry = self.job.geometry;
        let mut comparer = Some(Comparer::new(&**checked, geometry));
        let (mut sums, mut pages, mut lost) = (Sums::default(), Vec::new(), Vec::new());
        for index in (0..geometry.pages()).map(PageIndex) {
            match self.view.page(self.job, index).await {
                Ok(page) => {
                    let (checked, mut own) = (checked.clone(), comparer.take().expect("put back below"));
                    let look = move || (own.look(&*checked, index), own);
                    let (found, own) = threads::blocking(look).await;
                    comparer = Some(own);
                    pages.push((index, page, as_unknown(geometry, self.unknown, index, found?.0)));
                }
                Err(e) if e.is_damage() => lost.push(Lost::page(self.name, geometry, index, &e)),
                Err(e) => return Err(e.into()),
            }
            if pages.len() as u64 == window_pages(geometry) || index.0 + 1 == geometry.pages() {
                sums += plan_window(geometry, self.job.slot, &pages).sums;
                pages.clear();
            }
            progress(geometry.page_len(index));
        }
        Ok((sums, lost))
    }
}
