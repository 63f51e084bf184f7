//! A restore of one volume or of a whole group, from a point in the store onto files and devices.
//!
//! Read first: [`Prepared::new`] (contacts and checks everything and writes nothing) and [`Prepared::run`].
//!
//! The volumes are restored one after the other; none is finished before all are written, so that a group that failed
//! half-way shows it on every target that was changed.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use backhaul_cli::{Progress, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::VolumeDigest;
use backhaul_protocol::ids::{LogSeq, Name};
use backhaul_protocol::store::log::{PointBody, PointVolume, UnixMillis};
use backhaul_protocol::wire::message::PointSpec;
use backhaul_seams::threads;
use backhaul_volume::aim;
use backhaul_volume::rebuild::Existing;
use backhaul_volume::target::{CheckedTarget, Durability, TargetNeeds};
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::catalog::{Catalog, GroupLog};
use crate::counting::Counting;
use crate::reachable::{blocks_in, missing_segments};
use crate::read_error::ReadError;
use crate::rehydrate::{Restoring, Verified, Written};
use crate::restore_error::RestoreError;
use crate::salvage::{
    BadIndex, Loss, Lost, OnDamage, OpenedView, behind_holes, harmless, join_neighbours, object_of, open_view,
};
use crate::survey::{Survey, survey};
use crate::view::{View, ViewVolume};

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which group.
    pub group: Name,
    /// Which volume of it; `None` means all.
    pub volume: Option<Name>,
    /// Which point.
    pub point: PointSpec,
    /// `TARGET` or `NAME=TARGET`, as typed.
    pub targets: Vec<String>,
    /// Serials or names of devices that may be overwritten.
    pub confirm: Vec<String>,
    /// Paths that are being replicated from this machine.
    pub refuse: Vec<PathBuf>,
    /// What is waited for, and how it is read back.
    pub durability: Durability,
    /// What to do about damage.
    pub on_damage: OnDamage,
}

/// Everything was contacted and checked; nothing was written. Devices are claimed.
pub struct Prepared {
    request: Request,
    log: GroupLog,
    counting: Arc<Counting>,
    view: Arc<View>,
    jobs: Vec<Job>,
    started: Instant,
    /// The point.
    pub point: LogSeq,
    /// When it was committed.
    pub time: UnixMillis,
    /// What it claims.
    pub consistency: Consistency,
    damaged: Vec<Lost>,
    unharmed: Vec<Lost>,
}

/// One volume of a restore.
pub(crate) struct Job {
    pub(crate) name: Name,
    pub(crate) path: PathBuf,
    pub(crate) volume: ViewVolume,
    survey: Survey,
    stated: VolumeDigest,
    pub(crate) checked: CheckedTarget,
}

/// What was done, as it is printed.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Of the group.
    pub group: String,
    /// Number of the point.
    pub point: u64,
    /// When it was committed.
    pub time: String,
    /// What it claims.
    pub consistency: String,
    /// Bytes of the targets that were read to compare.
    pub bytes_read: u64,
    /// Bytes of block records that were read from the store.
    pub bytes_fetched: u64,
    /// All other bytes that were read from the store.
    pub metadata_bytes: u64,
    /// Bytes that were written or zeroed.
    pub bytes_written: u64,
    /// Bytes that were read back and compared.
    pub bytes_verified: u64,
    /// `device` or `cached`.
    pub verified: &'static str,
    /// Of the volume, if it is one.
    pub digest: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Each volume.
    pub volumes: Vec<VolumeOutcome>,
    /// What could not be restored.
    pub lost: Vec<Lost>,
    /// What is damaged in the store and costs this restore nothing: the rest adds up to the point's digest.
    pub damaged: Vec<Lost>,
}

/// What was done to one target.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeOutcome {
    /// Of the volume.
    pub name: String,
    /// As it was named.
    pub target: String,
    /// Bytes of the volume.
    pub length: u64,
    /// What was read back.
    pub digest: String,
    /// What the point states.
    pub expected: String,
    /// Bytes that were written or zeroed.
    pub bytes_written: u64,
    /// Bytes of a device behind the volume's end, which stay as they were.
    pub beyond: u64,
    /// What the blocks hold now of which nothing can be had.
    pub lost_blocks: &'static str,
}

impl Prepared {
    /// Opens the point, reads its index, looks whether what it needs is there, checks and claims every target.
    pub async fn new(catalog: Catalog, request: Request, progress: &mut Progress) -> Result<Self, RestoreError> {
        let started = Instant::now();
        let (counting, catalog) = Counting::catalog(catalog);
        let log = catalog.expect_group(&request.group).await?;
        let (record, point) = log.find(request.point).await?;
        let wanted = match_targets(&request, &point)?;
        let OpenedView { view, holes, mended } = open_view(&log, &point, BadIndex::Rebuild).await?;
        let mut damaged = Vec::new();
        let total = wanted.iter().map(|(v, _)| v.geometry.length()).sum();
        let phase = progress.phase("read the point's index", total);
        let mut surveyed = Vec::new();
        for (volume, path) in wanted {
            let own = view.volume(volume.slot).expect("a view has all volumes of its point");
            let survey = survey(&view, own, &volume.name, request.on_damage, |n| phase.add(n)).await?;
            if survey.digest != volume.digest {
                let known = behind_holes(&view, own, &volume.name, &holes).await?;
                // With a cause that is known already this says nothing new.
                if survey.lost.is_empty() && known.is_empty() {
                    let (name, stated) = (volume.name.clone(), volume.digest);
                    let error = RestoreError::Index { volume: name, found: survey.digest, stated };
                    if request.on_damage == OnDamage::Fail {
                        return Err(error);
                    }
                    let key = log.keys().log(record.seq).to_string();
                    let whole = 0..volume.geometry.length();
                    damaged.push(Lost::new(&volume.name, whole, key, error.to_string()).uncertain());
                }
                damaged.extend(known);
            }
            surveyed.push((volume, path, own.clone(), survey));
        }
        if request.on_damage == OnDamage::Fail && !damaged.is_empty() {
            return Err(RestoreError::Damaged(damaged));
        }
        let (missing, unreachable) = missing_segments(log.store(), log.keys(), &view).await?;
        if !missing.is_empty() && request.on_damage == OnDamage::Fail {
            let mut lost = Vec::new();
            for (stated, _, volume, _) in &surveyed {
                lost.extend(blocks_in(&view, volume, &stated.name, log.keys(), &missing).await?);
            }
            if !lost.is_empty() {
                return Err(RestoreError::Damaged(lost));
            }
        }
        phase.finish();
        damaged.extend(surveyed.iter().flat_map(|(.., survey)| survey.lost.iter().cloned()));
        let slots: Vec<_> = surveyed.iter().map(|(stated, ..)| stated.slot).collect();
        let mut unharmed = harmless(&holes, &slots, &damaged);
        unharmed.extend(mended);
        // What a map reaches is for those who delete: a restore does without it.
        unharmed.extend(unreachable.iter().map(|e| Lost::nothing(object_of(e), e)));
        let jobs = check_targets(&request, surveyed)?;
        let (seq, time, consistency) = (record.seq, record.time, point.consistency);
        let view = Arc::new(view);
        Ok(Self { request, log, counting, view, jobs, started, point: seq, time, consistency, damaged, unharmed })
    }

    pub(crate) fn into_jobs(self) -> (Arc<View>, Vec<Job>, Vec<Lost>) {
        (self.view, self.jobs, self.damaged)
    }

    /// Restores, and reads everything back.
    pub async fn run(self, progress: &mut Progress) -> Result<Outcome, RestoreError> {
        let durability = self.request.durability;
        let threads = Arc::new(Semaphore::new(parallelism()));
        let total: u64 = self.jobs.iter().map(|j| j.volume.geometry.length()).sum();
        let mut open = Vec::new();
        for job in self.jobs {
            let unknown = gone(&self.damaged, &job.name);
            let checked = job.checked;
            let target = threads::blocking(move || checked.open()).await?;
            let restoring = Restoring {
                store: self.log.store().clone(),
                keys: self.log.keys(),
                view: self.view.clone(),
                volume: job.volume,
                name: job.name,
                target: Arc::new(target),
                durability,
                on_damage: self.request.on_damage,
                unknown: unknown.into(),
                threads: threads.clone(),
            };
            open.push((restoring, job.survey, job.path, job.stated));
        }
        let phase = progress.phase("compare and write", total);
        let mut written = Vec::new();
        for (restoring, ..) in &open {
            let mut done = restoring.write(|n| phase.add(n)).await?;
            done.lost.extend(self.damaged.iter().filter(|l| *l.volume == *restoring.name.as_str()).cloned());
            join_neighbours(&mut done.lost);
            written.push(done);
        }
        phase.finish();
        let phase = progress.phase("flush", written.iter().map(|w| w.written).sum());
        for ((restoring, ..), done) in open.iter().zip(&written) {
            restoring.finish().await?;
            phase.add(done.written);
        }
        phase.finish();
        let phase = progress.phase("read back and compare", total);
        let mut verified = Vec::new();
        for ((restoring, survey, ..), done) in open.iter().zip(&written) {
            let own = phase.clone();
            let gone = gone(&done.lost, &restoring.name);
            verified.push(restoring.verify(survey, &gone, move |n| own.add(n)).await?);
        }
        phase.finish();
        let volumes = open.iter().zip(&written).zip(&verified);
        let volumes = volumes.map(|(((r, _, path, stated), w), v)| volume_outcome(r, *stated, path, w, v)).collect();
        let head = (&self.request.group, self.point, self.time, self.consistency);
        let outcome = outcome(head, durability, self.counting.bytes_read(), written, &verified, volumes, self.started);
        Ok(Outcome { damaged: self.unharmed, ..outcome })
    }
}

/// The ranges of a volume of which nothing can be had.
pub(crate) fn gone(lost: &[Lost], volume: &Name) -> Vec<Range<u64>> {
    let own = lost.iter().filter(|l| l.loss == Loss::Gone && l.volume == volume.as_str());
    let mut ranges: Vec<Range<u64>> = own.map(|l| l.start..l.end).collect();
    ranges.sort_by_key(|r| (r.start, r.end));
    ranges.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    ranges
}

fn volume_outcome(r: &Restoring, stated: VolumeDigest, path: &Path, w: &Written, v: &Verified) -> VolumeOutcome {
    VolumeOutcome {
        name: r.name.to_string(),
        target: path.display().to_string(),
        length: r.volume.geometry.length(),
        digest: v.digest.to_string(),
        expected: stated.to_string(),
        bytes_written: w.written,
        beyond: r.target.beyond(),
        lost_blocks: match (r.target.is_fresh(), r.target.was_resized()) {
            (true, _) => "zero",
            (false, true) => "left as they were, or zero: in the first MiB, and where the file had to grow",
            (false, false) => "left as they were",
        },
    }
}

fn outcome(
    (group, point, time, consistency): (&Name, LogSeq, UnixMillis, Consistency),
    durability: Durability,
    store_read: u64,
    written: Vec<Written>,
    verified: &[Verified],
    volumes: Vec<VolumeOutcome>,
    started: Instant,
) -> Outcome {
    let fetched = written.iter().map(|w| w.fetched).sum();
    let lost: Vec<Lost> = written.iter().flat_map(|w| w.lost.iter().cloned()).collect();
    // What a file system without a device holds is in memory, whatever was asked for.
    let from_device = durability == Durability::Device && verified.iter().all(|v| v.from_device);
    Outcome {
        group: group.to_string(),
        point: point.0,
        time: text::time(time),
        consistency: consistency.to_string(),
        bytes_read: written.iter().map(|w| w.read).sum(),
        bytes_fetched: fetched,
        metadata_bytes: store_read.saturating_sub(fetched),
        bytes_written: written.iter().map(|w| w.written).sum(),
        bytes_verified: verified.iter().map(|v| v.bytes).sum(),
        verified: match (lost.is_empty(), from_device) {
            (false, _) => "incomplete",
            (true, true) => "device",
            (true, false) => "cached",
        },
        digest: match &volumes[..] {
            [one] => Some(one.digest.clone()),
            _ => None,
        },
        seconds: started.elapsed().as_secs_f64(),
        volumes,
        lost,
        damaged: Vec::new(),
    }
}

/// Threads that work at once.
pub fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Which volume goes where.
fn match_targets<'a>(request: &Request, point: &'a PointBody) -> Result<Vec<(&'a PointVolume, PathBuf)>, RestoreError> {
    let names = || point.volumes.iter().map(|v| v.name.to_string()).collect::<Vec<_>>().join(", ");
    let wanted: Vec<&PointVolume> =
        match &request.volume {
            Some(name) => vec![point.volume(name).ok_or_else(|| {
                ReadError::NotFound(format!("no volume \"{name}\" in this point: it has {}", names()))
            })?],
            None => point.volumes.iter().collect(),
        };
    let names: Vec<&str> = wanted.iter().map(|v| v.name.as_str()).collect();
    let matched = aim::match_targets(&names, &request.targets).map_err(RestoreError::Request)?;
    Ok(matched.into_iter().map(|(i, path)| (wanted[i], path)).collect())
}

fn check_targets(
    request: &Request,
    surveyed: Vec<(&PointVolume, PathBuf, ViewVolume, Survey)>,
) -> Result<Vec<Job>, RestoreError> {
    let mut jobs = Vec::new();
    for (stated, path, volume, survey) in surveyed {
        let needs = TargetNeeds {
            length: volume.geometry.length(),
            data_bytes: Some(survey.data_bytes),
            refuse: request.refuse.clone(),
            ..TargetNeeds::default()
        };
        let checked = aim::check_confirmed(&path, &needs, &request.confirm, request.targets.len())?;
        jobs.push(Job { name: stated.name.clone(), path, volume, survey, checked, stated: stated.digest });
    }
    Ok(jobs)
}
