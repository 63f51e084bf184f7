//! What a restore would do, without doing it.
//!
//! Read first: [`dry_run`]. The targets are opened for reading only.

use std::fmt;
use std::ops::Range;

use backhaul_cli::{Progress, text};
use backhaul_protocol::geometry::{ByteOffset, PageIndex};
use backhaul_volume::rebuild::Found;
use backhaul_volume::scan::{FILE_READ, PageScanner};
use backhaul_volume::{Source, Volume, VolumeError};
use serde::Serialize;

use crate::plan::restore::{Sums, plan_window, window_pages};
use crate::restore::{Job, Prepared};
use crate::restore_error::RestoreError;
use crate::view::View;

/// What would be done, as it is printed.
#[derive(Clone, Debug, Serialize)]
pub struct DryRun {
    /// Number of the point.
    pub point: u64,
    /// Each volume.
    pub volumes: Vec<VolumePlan>,
}

/// What would be done to one target.
#[derive(Clone, Debug, Serialize)]
pub struct VolumePlan {
    /// Of the volume.
    pub name: String,
    /// As it was named.
    pub target: String,
    /// Bytes of the volume.
    pub length: u64,
    /// Bytes that are as they must be.
    pub equal: u64,
    /// Bytes that would become zeroes.
    pub zeroed: u64,
    /// Bytes that would be written from the store.
    pub written: u64,
    /// Bytes that would be read from the store.
    pub fetched: u64,
    /// In so many reads.
    pub reads: u64,
    #[serde(skip)]
    sums: Sums,
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nothing was written; a restore of point {} would do:", self.point)?;
        self.volumes
            .iter()
            .try_for_each(|v| write!(f, "\n  {} to {} ({}) {}", v.name, v.target, text::bytes(v.length), v.sums))
    }
}

/// Compares every target with the point.
pub async fn dry_run(prepared: &Prepared, progress: &mut Progress) -> Result<DryRun, RestoreError> {
    let total = prepared.jobs().iter().map(|j| j.volume.geometry.length()).sum();
    let phase = progress.phase("compare", total);
    let mut volumes = Vec::new();
    for job in prepared.jobs() {
        let sums = compare(prepared.view(), job, |n| phase.add(n)).await?;
        volumes.push(VolumePlan {
            name: job.name.to_string(),
            target: job.path.display().to_string(),
            length: job.volume.geometry.length(),
            equal: sums.equal,
            zeroed: sums.zeroed,
            written: sums.written,
            fetched: sums.fetched,
            reads: sums.reads,
            sums,
        });
    }
    phase.finish();
    Ok(DryRun { point: prepared.point.0, volumes })
}

async fn compare(view: &View, job: &Job, progress: impl Fn(u64)) -> Result<Sums, RestoreError> {
    let geometry = job.volume.geometry;
    let there = std::fs::metadata(&job.path).is_ok_and(|m| !m.is_file() || m.len() > 0);
    let source =
        if there { Some(Source::open(&job.path).map_err(backhaul_volume::target::TargetError::from)?) } else { None };
    let mut existing = source.map(|source| {
        let length = geometry.length();
        (std::sync::Arc::new(Resized { source, length }), Some(PageScanner::new(geometry, FILE_READ)))
    });
    let (mut sums, mut pages) = (Sums::default(), Vec::new());
    for index in (0..geometry.pages()).map(PageIndex) {
        let page = view.page(&job.volume, index).await?;
        let found = match &mut existing {
            None => Found::Fresh,
            Some((volume, scanner)) => {
                let (volume, mut own) = (volume.clone(), scanner.take().expect("put back below"));
                let scan = move || {
                    let found = own.scan::<VolumeError>(&volume, geometry, index, |_, _, _| Ok(()));
                    (found, own)
                };
                let (found, own) = tokio::task::spawn_blocking(scan).await.expect("scanning does not panic");
                *scanner = Some(own);
                Found::Digests(found.map_err(backhaul_volume::target::TargetError::from)?.digests)
            }
        };
        pages.push((index, page, found));
        if pages.len() as u64 == window_pages(geometry) || index.0 + 1 == geometry.pages() {
            sums += plan_window(geometry, job.volume.slot, &pages).sums;
            pages.clear();
        }
        progress(geometry.page_len(index));
    }
    Ok(sums)
}

/// A file or device as it would be with another length.
struct Resized {
    source: Source,
    length: u64,
}

impl Volume for Resized {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let has = self.source.length().saturating_sub(at.0).min(buf.len() as u64) as usize;
        buf[has..].fill(0);
        if has == 0 { Ok(()) } else { self.source.read_at(at, &mut buf[..has]) }
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        if from.0 >= self.source.length() { Ok(None) } else { self.source.next_data(from) }
    }

    fn describe(&self) -> String {
        self.source.describe()
    }
}
