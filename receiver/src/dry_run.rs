//! What a restore would do, without doing it.
//!
//! Read first: [`dry_run`]. The targets are opened for reading only.

use std::sync::Arc;

use backhaul_cli::{Progress, RestorePlan, VolumePlan};
use backhaul_protocol::geometry::PageIndex;
use backhaul_volume::rebuild::Comparer;
use backhaul_volume::target::CheckedTarget;

use crate::plan::restore::{Sums, plan_window, window_pages};
use crate::restore::Prepared;
use crate::restore_error::RestoreError;
use crate::view::{View, ViewVolume};

/// Compares every target with the point.
pub async fn dry_run(prepared: Prepared, progress: &mut Progress) -> Result<RestorePlan, RestoreError> {
    let point = prepared.point.0;
    let (view, jobs) = prepared.into_jobs();
    let total = jobs.iter().map(|j| j.volume.geometry.length()).sum();
    let phase = progress.phase("compare", total);
    let mut volumes = Vec::new();
    for job in jobs {
        let checked = Arc::new(job.checked);
        let sums = compare(&view, &job.volume, &checked, |n| phase.add(n)).await?;
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
    Ok(RestorePlan { point, volumes })
}

async fn compare(
    view: &View,
    volume: &ViewVolume,
    checked: &Arc<CheckedTarget>,
    progress: impl Fn(u64),
) -> Result<Sums, RestoreError> {
    let geometry = volume.geometry;
    let mut comparer = Some(Comparer::new(&**checked, geometry));
    let (mut sums, mut pages) = (Sums::default(), Vec::new());
    for index in (0..geometry.pages()).map(PageIndex) {
        let page = view.page(volume, index).await?;
        let (checked, mut own) = (checked.clone(), comparer.take().expect("put back below"));
        let look = move || (own.look(&*checked, index), own);
        let (found, own) = tokio::task::spawn_blocking(look).await.expect("comparing does not panic");
        comparer = Some(own);
        let (found, _) = found?;
        pages.push((index, page, found));
        if pages.len() as u64 == window_pages(geometry) || index.0 + 1 == geometry.pages() {
            sums += plan_window(geometry, volume.slot, &pages).sums;
            pages.clear();
        }
        progress(geometry.page_len(index));
    }
    Ok(sums)
}
