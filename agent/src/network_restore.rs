//! A restore over the network: the receiver is Source, this is Sink and writer.
//!
//! Read first: [`restore`]. The target's pages are compared with the point's range digests; of those that differ the block
//! digests are asked for, and of those the blocks that differ. Records come on streams of their own, in any order;
//! `incoming` knows which block is still wanted and takes no other.

mod asking;
mod incoming;
mod types;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use backhaul_cli::{Phase, Progress, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{BlockDigest, RangeDigest, VolumeDigest, VolumeDigester};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::Name;
use backhaul_protocol::wire::message::{AgentMessage, ReadOpened, ReadVolume, ReceiverMessage};
use backhaul_transport::control::{ControlReceiver, ControlSender};
use backhaul_volume::aim;
use backhaul_volume::rebuild::{Comparer, Difference, Found, verify_all};
use backhaul_volume::target::{Durability, Target, TargetError, TargetNeeds};
use tokio::task::JoinHandle;

use asking::{Asking, QUESTIONS};
use incoming::{Incoming, take_streams};
pub use types::{RestoreError, RestoreReport, RestoreRequest, VolumeReport};

/// Restores over an open connection. `warn` hears of a fuzzy point before anything is written. Four phases of progress.
pub async fn restore(
    connection: &quinn::Connection,
    control: (ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>),
    request: RestoreRequest,
    progress: &mut Progress,
    warn: impl Fn(&str),
) -> Result<RestoreReport, RestoreError> {
    let incoming = Arc::new(Incoming::default());
    let mut asking = Asking::new(control);
    let streams = take_streams(connection, incoming.clone());
    tokio::select! {
        biased;
        done = run(&mut asking, &incoming, request, progress, warn) => done,
        error = streams => Err(error),
    }
}

/// One volume on its way.
struct Job {
    volume: ReadVolume,
    path: PathBuf,
    ranges: Vec<RangeDigest>,
    target: Arc<Target>,
    read: u64,
    written: u64,
}

async fn run(
    asking: &mut Asking,
    incoming: &Arc<Incoming>,
    request: RestoreRequest,
    progress: &mut Progress,
    warn: impl Fn(&str),
) -> Result<RestoreReport, RestoreError> {
    let started = Instant::now();
    let opened = asking.open(request.point).await?;
    if opened.consistency == Consistency::Fuzzy {
        warn(&format!("point {} is fuzzy: it was read while it may have changed", opened.seq));
    }
    let mut jobs = prepare(asking, &opened, &request, progress).await?;
    let total = jobs.iter().map(|j| j.volume.geometry.length()).sum();
    let phase = progress.phase("compare and write", total);
    for job in &mut jobs {
        rebuild(asking, incoming, job, request.durability, &phase).await?;
    }
    phase.finish();
    let phase = progress.phase("flush", jobs.iter().map(|j| j.written).sum());
    for job in &jobs {
        let (target, durability) = (job.target.clone(), request.durability);
        blocking(move || target.finish(durability)).await?;
        phase.add(job.written);
    }
    phase.finish();
    let phase = progress.phase("read back and compare", total);
    let (mut from_device, mut verified, mut volumes) = (request.durability == Durability::Device, 0, Vec::new());
    for job in &jobs {
        let (digest, bytes, device) = read_back(job, request.durability, &phase).await?;
        from_device &= device;
        verified += bytes;
        volumes.push(VolumeReport {
            name: job.volume.name.to_string(),
            target: job.path.display().to_string(),
            length: job.volume.geometry.length(),
            digest: digest.to_string(),
            bytes_written: job.written,
        });
    }
    phase.finish();
    Ok(RestoreReport {
        point: opened.seq.0,
        time: text::time(opened.time),
        consistency: opened.consistency.to_string(),
        bytes_read: jobs.iter().map(|j| j.read).sum(),
        bytes_fetched: incoming.lock().bytes,
        metadata_bytes: asking.bytes,
        bytes_written: jobs.iter().map(|j| j.written).sum(),
        bytes_verified: verified,
        verified: if from_device { "device" } else { "cached" },
        digest: if let [one] = &volumes[..] { Some(one.digest.clone()) } else { None },
        seconds: started.elapsed().as_secs_f64(),
        volumes,
    })
}

/// Asks for the digests of everything, checks every target, and only then opens them: the first write.
async fn prepare(
    asking: &mut Asking,
    opened: &ReadOpened,
    request: &RestoreRequest,
    progress: &mut Progress,
) -> Result<Vec<Job>, RestoreError> {
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
        let needs =
            TargetNeeds { length: volume.geometry.length(), refuse: request.refuse.clone(), ..TargetNeeds::default() };
        let target = aim::check_confirmed(&path, &needs, &request.confirm, request.targets.len())?;
        checked.push((volume, path, ranges, target));
    }
    phase.finish();
    let mut jobs = Vec::new();
    for (volume, path, ranges, checked) in checked {
        let target = Arc::new(blocking(move || checked.open()).await?);
        jobs.push(Job { volume, path, ranges, target, read: 0, written: 0 });
    }
    Ok(jobs)
}

/// Compares one volume and has what differs sent and written.
async fn rebuild(
    asking: &mut Asking,
    incoming: &Arc<Incoming>,
    job: &mut Job,
    durability: Durability,
    phase: &Phase,
) -> Result<(), RestoreError> {
    let (slot, geometry) = (job.volume.slot, job.volume.geometry);
    incoming.begin(&job.volume, job.target.clone(), durability, phase);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let mut looking: VecDeque<(PageIndex, Looking)> = VecDeque::new();
    let comparers = Arc::new(Mutex::new(Vec::new()));
    let mut asked: VecDeque<(PageIndex, Found)> = VecDeque::new();
    let mut next = 0;
    loop {
        while looking.len() < 2 * threads && next < geometry.pages() {
            looking
                .push_back((PageIndex(next), look(job.target.clone(), geometry, PageIndex(next), comparers.clone())));
            next += 1;
        }
        let Some((page, looked)) = looking.pop_front() else { break };
        let (found, read) = looked.await.expect("comparing does not panic")?;
        job.read += read;
        let expected = job.ranges[page.0 as usize];
        let have = match &found {
            Found::Fresh => RangeDigest::ZERO,
            Found::Digests(digests) => RangeDigest::of(digests),
        };
        if have == expected {
            phase.add(geometry.page_len(page));
        } else if expected == RangeDigest::ZERO {
            let zeroes = vec![BlockDigest::ZERO; geometry.page_blocks(page)];
            change(asking, incoming, job, page, &zeroes, &found, phase).await?;
        } else {
            asking.send(&AgentMessage::Page { volume: slot, page: page.0 }).await?;
            asked.push_back((page, found));
        }
        while asked.len() >= QUESTIONS {
            answer(asking, incoming, job, &mut asked, phase).await?;
        }
    }
    while !asked.is_empty() {
        answer(asking, incoming, job, &mut asked, phase).await?;
    }
    asking.wait_for_blocks(incoming).await?;
    job.written += incoming.lock().written;
    Ok(())
}

type Looking = JoinHandle<Result<(Found, u64), TargetError>>;

fn look(target: Arc<Target>, geometry: Geometry, page: PageIndex, comparers: Arc<Mutex<Vec<Comparer>>>) -> Looking {
    tokio::task::spawn_blocking(move || {
        let own = lock(&comparers).pop();
        let mut own = own.unwrap_or_else(|| Comparer::new(&target, geometry));
        let found = own.look(&target, page);
        lock(&comparers).push(own);
        found
    })
}

/// Takes the answer to the oldest question.
async fn answer(
    asking: &mut Asking,
    incoming: &Arc<Incoming>,
    job: &mut Job,
    asked: &mut VecDeque<(PageIndex, Found)>,
    phase: &Phase,
) -> Result<(), RestoreError> {
    let Some((page, found)) = asked.pop_front() else { return Ok(()) };
    let digests = asking.page(job.volume.slot, page, incoming).await?;
    let right = digests.len() == job.volume.geometry.page_blocks(page)
        && RangeDigest::of(&digests) == job.ranges[page.0 as usize];
    if !right {
        return Err(RestoreError::Protocol("block digests that do not add up to their range digest"));
    }
    change(asking, incoming, job, page, &digests, &found, phase).await
}

/// Zeroes what must be zero, and asks for what must come.
async fn change(
    asking: &mut Asking,
    incoming: &Arc<Incoming>,
    job: &mut Job,
    page: PageIndex,
    expected: &[BlockDigest],
    found: &Found,
    phase: &Phase,
) -> Result<(), RestoreError> {
    let (slot, geometry) = (job.volume.slot, job.volume.geometry);
    let difference = Difference::of(geometry, page, expected, found);
    if !difference.zero.is_empty() {
        let (target, ranges) = (job.target.clone(), difference.zero);
        job.written += blocking(move || {
            ranges.iter().try_fold(0, |sum, range| {
                target.write_zeroes(range.clone())?;
                Ok::<u64, TargetError>(sum + range.end - range.start)
            })
        })
        .await?;
    }
    let first = page.first_block().0;
    let fetch: u64 = difference.fetch.iter().map(|i| geometry.block_len(BlockIndex(first + i as u64)) as u64).sum();
    phase.add(geometry.page_len(page) - fetch);
    if difference.fetch.is_empty() {
        return Ok(());
    }
    let permit = asking.room(incoming).await?;
    incoming.want(page, expected.to_vec(), difference.fetch, permit);
    asking.send(&AgentMessage::Want { volume: slot, page: page.0, blocks: difference.fetch.to_bytes() }).await
}

async fn read_back(
    job: &Job,
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
    tokio::task::spawn_blocking(work).await.expect("work on the target does not panic")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
