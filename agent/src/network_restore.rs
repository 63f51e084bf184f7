//! A restore over the network: the receiver is Source, this is Sink and writer.
//!
//! Read first: [`restore`], then `comparing`. The target's pages are compared with the point's range digests; of those
//! that differ the block digests are asked for, and of those the blocks that differ. Records come on streams of their
//! own, in any order; `incoming` knows which block is still wanted and takes no other.

mod asking;
mod comparing;
mod incoming;
mod types;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use backhaul_cli::{Phase, Progress, RestorePlan, VolumePlan, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::Name;
use backhaul_protocol::wire::message::{AgentMessage, ReadOpened, ReadVolume, ReceiverMessage};
use backhaul_seams::threads;
use backhaul_transport::control::{ControlReceiver, ControlSender};
use backhaul_transport::link::Link;
use backhaul_volume::aim;
use backhaul_volume::rebuild::verify_all;
use backhaul_volume::target::{CheckedTarget, Durability, Target, TargetError, TargetNeeds};

use tokio::time::Instant;

use asking::Asking;
use comparing::{Aim, Comparing, Sums};
use incoming::{Incoming, take_streams};
pub use types::{RestoreError, RestoreReport, RestoreRequest, VolumeReport};

/// The two halves of the control stream.
pub type Control = (ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>);

/// Restores over an open connection. `warn` hears of a fuzzy point before anything is written. Four phases of progress.
pub async fn restore(
    link: &dyn Link,
    control: Control,
    request: &RestoreRequest,
    progress: &mut Progress,
    warn: impl Fn(&str),
) -> Result<RestoreReport, RestoreError> {
    let started = Instant::now();
    let incoming = Arc::new(Incoming::default());
    let mut asking = Asking::new(control);
    let streams = take_streams(link, incoming.clone());
    let written = tokio::select! {
        biased;
        written = write(&mut asking, &incoming, request, progress, warn) => written?,
        error = streams => return Err(error),
    };
    // From here on nothing comes from the receiver, and a connection that breaks breaks nothing.
    let fetched = (incoming.lock().bytes, asking.bytes);
    prove(written, request.durability, fetched, started, progress).await
}

/// What [`restore`] would do; writes nothing. Two phases of progress.
pub async fn plan(
    control: Control,
    request: &RestoreRequest,
    progress: &mut Progress,
    warn: impl Fn(&str),
) -> Result<RestorePlan, RestoreError> {
    let (mut asking, incoming) = (Asking::new(control), Arc::new(Incoming::default()));
    let opened = open(&mut asking, request, warn).await?;
    let jobs = prepare(&mut asking, &opened, request, progress).await?;
    let phase = progress.phase("compare", total(&jobs));
    let mut volumes = Vec::new();
    for Job { volume, path, ranges, target } in jobs {
        let (length, beyond) = (volume.geometry.length(), target.beyond());
        let aim = Aim::Plan(Arc::new(target));
        let sums = Comparing::new(&mut asking, &incoming, &volume, &ranges, aim, &phase).run().await?;
        volumes.push(VolumePlan {
            name: volume.name.to_string(),
            target: path.display().to_string(),
            length,
            equal: length - sums.fetched - sums.zeroed,
            zeroed: sums.zeroed,
            written: sums.fetched,
            fetched: None,
            reads: None,
            beyond,
        });
    }
    phase.finish();
    Ok(RestorePlan { point: opened.seq.0, volumes, lost: Vec::new() })
}

/// A volume, and where it goes: a target that was checked, and later one that is open for writing.
struct Job<T> {
    volume: ReadVolume,
    path: PathBuf,
    ranges: Vec<RangeDigest>,
    target: T,
}

fn total<T>(jobs: &[Job<T>]) -> u64 {
    jobs.iter().map(|j| j.volume.geometry.length()).sum()
}

/// What was written, and waits to be flushed.
struct Written {
    opened: ReadOpened,
    jobs: Vec<(Job<Arc<Target>>, Sums)>,
}

/// Everything that needs the receiver: compares, fetches, writes.
async fn write(
    asking: &mut Asking,
    incoming: &Arc<Incoming>,
    request: &RestoreRequest,
    progress: &mut Progress,
    warn: impl Fn(&str),
) -> Result<Written, RestoreError> {
    let opened = open(asking, request, warn).await?;
    let mut targets = Vec::new();
    for Job { volume, path, ranges, target } in prepare(asking, &opened, request, progress).await? {
        let target = Arc::new(blocking(move || target.open()).await?);
        targets.push(Job { volume, path, ranges, target });
    }
    let phase = progress.phase("compare and write", total(&targets));
    let mut jobs = Vec::new();
    for job in targets {
        incoming.begin(&job.volume, job.target.clone(), request.durability, &phase);
        let aim = Aim::Write(job.target.clone());
        let sums = Comparing::new(asking, incoming, &job.volume, &job.ranges, aim, &phase).run().await?;
        jobs.push((job, sums));
    }
    phase.finish();
    Ok(Written { opened, jobs })
}

/// Flushes, and reads everything back. `fetched`: bytes of block records, and of all other messages.
async fn prove(
    Written { opened, jobs }: Written,
    durability: Durability,
    fetched: (u64, u64),
    started: Instant,
    progress: &mut Progress,
) -> Result<RestoreReport, RestoreError> {
    let changed = jobs.iter().map(|(_, sums)| sums.changed()).sum();
    let phase = progress.phase("flush", changed);
    for (job, sums) in &jobs {
        let target = job.target.clone();
        blocking(move || target.finish(durability)).await?;
        phase.add(sums.changed());
    }
    phase.finish();
    let phase = progress.phase("read back and compare", jobs.iter().map(|(j, _)| j.volume.geometry.length()).sum());
    let (mut from_device, mut verified, mut volumes) = (durability == Durability::Device, 0, Vec::new());
    for (job, sums) in &jobs {
        let (digest, bytes, device) = read_back(job, durability, &phase).await?;
        from_device &= device;
        verified += bytes;
        volumes.push(VolumeReport {
            name: job.volume.name.to_string(),
            target: job.path.display().to_string(),
            length: job.volume.geometry.length(),
            digest: digest.to_string(),
            bytes_written: sums.changed(),
            beyond: job.target.beyond(),
        });
    }
    phase.finish();
    Ok(RestoreReport {
        point: opened.seq.0,
        time: text::time(opened.time),
        consistency: opened.consistency.to_string(),
        bytes_read: jobs.iter().map(|(_, sums)| sums.read).sum(),
        bytes_fetched: fetched.0,
        metadata_bytes: fetched.1,
        bytes_written: changed,
        bytes_verified: verified,
        verified: if from_device { "device" } else { "cached" },
        digest: if let [one] = &volumes[..] { Some(one.digest.clone()) } else { None },
        seconds: started.elapsed().as_secs_f64(),
        volumes,
    })
}

async fn open(asking: &mut Asking, request: &RestoreRequest, warn: impl Fn(&str)) -> Result<ReadOpened, RestoreError> {
    let opened = asking.open(request.point).await?;
    if opened.consistency == Consistency::Fuzzy {
        warn(&format!(
            "point {} is fuzzy: it was read while it may have changed, and a file system in it may need repair",
            opened.seq
        ));
    }
    Ok(opened)
}

/// Asks for the digests of everything and checks every target; writes nothing.
async fn prepare(
    asking: &mut Asking,
    opened: &ReadOpened,
    request: &RestoreRequest,
    progress: &mut Progress,
) -> Result<Vec<Job<CheckedTarget>>, RestoreError> {
    let names = |of: &[&ReadVolume]| of.iter().map(|v| v.name.to_string()).collect::<Vec<_>>();
    let all: Vec<&ReadVolume> = opened.volumes.iter().collect();
    let wanted: Vec<&ReadVolume> = match &request.volume {
        None => all.clone(),
        Some(name) => all.iter().copied().filter(|v| v.name == *name).collect(),
    };
    if wanted.is_empty() {
        let (name, have) = (request.volume.as_ref().map_or("", Name::as_str), names(&all).join(", "));
        let text = format!("no volume \"{name}\" in point {}: it has {have}", opened.seq);
        return Err(RestoreError::NotFound(text));
    }
    let wanted_names: Vec<&str> = wanted.iter().map(|v| v.name.as_str()).collect();
    let matched = aim::match_targets(&wanted_names, &request.targets).map_err(RestoreError::Request)?;
    let phase = progress.phase("read the point's digests", wanted.iter().map(|v| v.geometry.length()).sum());
    let mut checked = Vec::new();
    for (at, path) in matched {
        let volume = wanted[at].clone();
        let ranges = asking.ranges(&volume).await?;
        let found = VolumeDigester::of(volume.geometry, &ranges);
        if found != volume.digest {
            return Err(RestoreError::Index { volume: volume.name, found, stated: volume.digest });
        }
        phase.add(volume.geometry.length());
        let most = at_most(&volume, &ranges);
        let check = |data_bytes| {
            let (length, refuse) = (volume.geometry.length(), request.refuse.clone());
            let needs = TargetNeeds { length, data_bytes: Some(data_bytes), refuse, ..TargetNeeds::default() };
            aim::check_confirmed(&path, &needs, &request.confirm, request.targets.len())
        };
        let target = match check(most) {
            // Where room is scarce it is worth asking how much is needed.
            Err(TargetError::NoSpace { .. }) => check(asking.data_bytes(&volume, &ranges).await?)?,
            checked => checked?,
        };
        checked.push(Job { volume, path, ranges, target });
    }
    phase.finish();
    Ok(checked)
}

/// Bytes that are not zero, at most: all of each page that is not all zeroes.
fn at_most(volume: &ReadVolume, ranges: &[RangeDigest]) -> u64 {
    let pages = ranges.iter().enumerate().filter(|(_, digest)| **digest != RangeDigest::ZERO);
    pages.map(|(i, _)| volume.geometry.page_len(PageIndex(i as u64))).sum()
}

async fn read_back(
    job: &Job<Arc<Target>>,
    durability: Durability,
    phase: &Phase,
) -> Result<(VolumeDigest, u64, bool), RestoreError> {
    let (target, geometry, phase) = (job.target.clone(), job.volume.geometry, phase.clone());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let read = blocking(move || verify_all(&target, geometry, durability, threads, &|n| phase.add(n))).await?;
    if read.digest != job.volume.digest {
        let range = |p: PageIndex| {
            let start = geometry.offset(p.first_block()).0;
            start..start + geometry.page_len(p)
        };
        let ranges = read.differing(&job.ranges).into_iter().map(range).collect();
        return Err(RestoreError::Differs { volume: job.volume.name.clone(), ranges });
    }
    Ok((read.digest, read.bytes, read.from_device))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TargetError> + Send + 'static,
) -> Result<T, TargetError> {
    threads::blocking(work).await
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
