//! A round: opens a session, scans every volume, sends what differs, commits.
//!
//! Read first: [`Round::run`].
//!
//! The order matters: the watch over each volume begins before its first byte is read and ends after the last byte of
//! all volumes; the commit id and the next nonce are on disk before the commit is asked for.

mod error;
mod feeding;
mod summing;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use backhaul_cli::Phase;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{RangeDigest, VolumeDigest};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, CommitId, LogSeq, Name, VolumeSlot, WriterNonce};
use backhaul_protocol::session::source::{SourceError, SourceOutput};
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Committed, Open, OpenVolume, Opened, VolumesChanged,
};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use backhaul_seams::{failpoint, random, threads};
use backhaul_transport::error::TransportError;
use backhaul_volume::stability::Stability;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::capture::{Capture, Provider, Watching};
use crate::connection::{Session, SessionError, unix_millis};
use crate::pipeline::pace::{Compression, Pace};
use crate::pipeline::scanner::{Job, ScanError, ScanShared, ScanVolume, Scanner};
use crate::pipeline::sender::Sender;
use crate::state::{Joined, LastPoint, PendingCommit, ProtectedVolume, StateDir, WriterState};
use crate::tracker::hash_index::HashIndex;
pub use error::RoundError;
use feeding::{Feeder, Known, PlannedVolume};
use summing::{ScanSum, Summing};

/// Commits without an answer that are remembered. Arbitrary.
const MAX_PENDING: usize = 16;

/// When a round commits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CommitWhen {
    /// Always.
    Always,
    /// Only if something changed.
    Changed,
    /// Also if only the label is better than that of the newest point: a fuzzy point is not left as the last word.
    ChangedOrBetterThan(Consistency),
}

/// What a round is made of.
pub struct Round<'a> {
    /// The state folder.
    pub state: &'a StateDir,
    /// Who we are.
    pub joined: &'a Joined,
    /// Where we are.
    pub machine: MachineId,
    /// What is protected.
    pub volumes: &'a [ProtectedVolume],
    /// Where it is read from.
    pub provider: &'a dyn Provider,
    /// Threads that scan.
    pub threads: usize,
    /// How hard blocks are compressed.
    pub compression: Compression,
    /// When to commit.
    pub when: CommitWhen,
    /// Told of every byte that was looked at.
    pub progress: Phase,
}

/// One volume of a finished round.
#[derive(Clone, Debug)]
pub struct RoundVolume {
    /// Its name.
    pub name: Name,
    /// Of every byte.
    pub digest: VolumeDigest,
}

/// How a round ended.
#[derive(Clone, Debug)]
pub struct RoundReport {
    /// The point, if one was made.
    pub committed: Option<Committed>,
    /// The newest record of the log.
    pub head: LogSeq,
    /// What the point claims.
    pub consistency: Consistency,
    /// Why it is not `Crash`, and what the label can't see.
    pub caveats: Vec<String>,
    /// Bytes of volumes that were read.
    pub bytes_scanned: u64,
    /// Bytes of records that were sent.
    pub bytes_sent: u64,
    /// Bytes of all messages, in both directions.
    pub metadata_bytes: u64,
    /// When the look began.
    pub capture_start: UnixMillis,
    /// How long it all took.
    pub took: Duration,
    /// The volumes.
    pub volumes: Vec<RoundVolume>,
}

/// A volume that was opened for a round.
struct Opening {
    source: Arc<dyn Capture>,
    index: HashIndex,
    watch: Box<dyn Watching>,
}

impl Round<'_> {
    /// Runs it to its end over an open connection.
    pub async fn run(self, session: &mut Session) -> Result<RoundReport, RoundError> {
        let begun = Instant::now();
        let messages_before = session.message_bytes();
        let capture_start = unix_millis();
        let openings = self.open_volumes().await?;
        let mut writer = self.state.writer()?;
        let opened = self.open_session(session, &writer).await?;
        learn_outcome(&mut writer, &opened);
        let (mut watched, mut parts) = (Vec::new(), Vec::new());
        for Opening { source, index, watch } in openings {
            watched.push((source.clone(), watch));
            parts.push((source, index));
        }
        let planned = self.plan(session, parts, &opened).await?;
        let scan = self.scan(session, &planned, opened.next_capture).await?;
        let (consistency, caveats) = self.label(watched)?;
        let order: Vec<VolumeSlot> = opened.volumes.iter().map(|v| v.slot).collect();
        let digest_of = |slot: &VolumeSlot| {
            scan.digests.volumes.iter().find(|(s, _)| s == slot).map(|(_, d)| *d).expect("every volume was scanned")
        };
        let digests: Vec<VolumeDigest> = order.iter().map(digest_of).collect();
        let changed = scan.digests.delta_blocks > 0 || opened.volumes_changed == VolumesChanged::Yes;
        let mut committed = None;
        let wanted = match self.when {
            CommitWhen::Always => true,
            CommitWhen::Changed => changed,
            CommitWhen::ChangedOrBetterThan(last) => changed || consistency > last,
        };
        if wanted {
            committed =
                Some(self.commit(session, &mut writer, &opened, &scan, &digests, consistency, capture_start).await?);
        } else {
            let (machine, _) = session.machine();
            machine.abandon();
            session.tell(&AgentMessage::StillEqual { at: capture_start }).await?;
        }
        let volumes = self.volumes.iter().zip(digests);
        Ok(RoundReport {
            head: committed.map_or(opened.head, |c| c.seq),
            metadata_bytes: session.message_bytes() - messages_before,
            committed,
            consistency,
            caveats,
            bytes_scanned: scan.bytes_scanned,
            bytes_sent: scan.bytes_sent,
            capture_start,
            took: begun.elapsed(),
            volumes: volumes.map(|(v, digest)| RoundVolume { name: v.name.clone(), digest }).collect(),
        })
    }

    async fn open_volumes(&self) -> Result<Vec<Opening>, RoundError> {
        let mut openings = Vec::new();
        for v in self.volumes {
            let failed = |source| RoundError::Volume { name: v.name.clone(), source };
            let source = self.provider.open(v).map_err(failed)?;
            let index = HashIndex::open(&self.state.index_dir(), v.id, v.geometry)?;
            let watched = source.clone();
            let watch = threads::blocking(move || watched.watch()).await;
            openings.push(Opening { source, index, watch });
        }
        Ok(openings)
    }

    async fn open_session(&self, session: &mut Session, writer: &WriterState) -> Result<Opened, RoundError> {
        let nonces = writer.nonce.into_iter().chain(writer.pending.iter().map(|p| p.nonce)).collect();
        let open = Open {
            state: self.joined.state,
            nonces,
            machine: self.machine,
            high_water: writer.high_water,
            volumes: self
                .volumes
                .iter()
                .map(|v| OpenVolume {
                    id: v.id,
                    name: v.name.clone(),
                    incarnation: v.incarnation,
                    geometry: v.geometry,
                })
                .collect(),
        };
        let (machine, now) = session.machine();
        machine.open(now, open);
        match session.next().await? {
            SourceOutput::Opened(opened) => Ok(*opened),
            _ => Err(SourceError::Protocol("no answer to `Open`").into()),
        }
    }

    /// What the receiver has, page by page as far as it is known without asking.
    async fn plan(
        &self,
        session: &mut Session,
        parts: Vec<(Arc<dyn Capture>, HashIndex)>,
        opened: &Opened,
    ) -> Result<Vec<PlannedVolume>, RoundError> {
        let mut planned = Vec::new();
        for ((v, (source, index)), opened) in self.volumes.iter().zip(parts).zip(&opened.volumes) {
            let trusted = opened.digest == Some(index.volume_digest()) || planted(Mutant::IndexAdoptedUnseen);
            let known = if trusted {
                reached(Situation::IndexTrusted);
                Known::Indexed
            } else {
                reached(Situation::RangesCompared);
                Known::Ranges(ask_ranges(session, opened.slot, v.geometry.pages()).await?)
            };
            let scan = ScanVolume {
                slot: opened.slot,
                geometry: v.geometry,
                read_len: source.read_len(),
                volume: Box::new(source),
                index,
            };
            planned.push(PlannedVolume { scan: Arc::new(scan), known, opened: opened.clone() });
        }
        // Digests of a round are summed up in the order of slots.
        planned.sort_by_key(|p| p.opened.slot);
        Ok(planned)
    }

    async fn scan(
        &self,
        session: &mut Session,
        planned: &[PlannedVolume],
        first_capture: CaptureNumber,
    ) -> Result<ScanSum, RoundError> {
        let mut sender = Sender::start(&session.link);
        let sent_bytes = sender.bytes();
        let shared = Arc::new(ScanShared {
            capture: AtomicU64::new(first_capture.0),
            stop: AtomicBool::new(false),
            pace: Pace::new(self.compression, Some(session.link.clone())),
        });
        let pieces = sender.pieces.clone();
        let mut scanner = Scanner::start(self.threads, shared.clone(), pieces).map_err(RoundError::Threads)?;
        let mut sum = Summing::new(planned, self.progress.clone());
        let mut feeder = Feeder::new(planned, self.threads);
        let jobs = std::mem::replace(&mut scanner.jobs, mpsc::channel(1).0);
        let mut jobs = Some(jobs);
        while !sum.is_complete() {
            feeder.ask(session);
            // Sent here and not inside the select: a message that is cut off would break the stream.
            session.send_pending().await?;
            if feeder.is_done() {
                jobs = None;
            }
            let ready = feeder.ready(sum.pages());
            tokio::select! {
                biased;
                error = sender.failed() => return Err(SessionError::from(error).into()),
                scanned = scanner.scanned.recv() => match scanned {
                    Some(scanned) => scanned?.into_iter().for_each(|s| sum.add(s)),
                    None => return Err(ScanError::Stopped.into()),
                },
                permit = reserve(&jobs), if ready => {
                    let (Some(permit), Some(job)) = (permit, feeder.take()) else { return Err(ScanError::Stopped.into()) };
                    permit.send(job);
                }
                output = session.next() => feeder.answer(output?)?,
            }
        }
        drop(jobs);
        drop(scanner);
        sender.finish().await.map_err(SessionError::from)?;
        let next_capture = shared.capture.load(Ordering::Relaxed);
        Ok(sum.finish(sent_bytes.load(Ordering::Relaxed), CaptureNumber(next_capture.saturating_sub(1))))
    }

    /// `Crash` only if every volume held still from before the first byte was read until after the last.
    fn label(
        &self,
        watched: Vec<(Arc<dyn Capture>, Box<dyn Watching>)>,
    ) -> Result<(Consistency, Vec<String>), RoundError> {
        let mut consistency = Consistency::Crash;
        let mut caveats = Vec::new();
        let (sources, watches): (Vec<_>, Vec<_>) = watched.into_iter().unzip();
        for ((v, watch), source) in self.volumes.iter().zip(watches).zip(&sources) {
            let watch = if planted(Mutant::WatchedOneByOne) { source.watch() } else { watch };
            caveats.extend(watch.caveats().iter().map(|c| format!("{}: {c}", v.name)));
            if let Stability::Moved(why) = watch.finish() {
                if !planted(Mutant::FuzzyCalledCrash) {
                    consistency = Consistency::Fuzzy;
                }
                caveats.push(format!("{}: {why}", v.name));
            }
        }
        for (v, source) in self.volumes.iter().zip(sources) {
            source.recheck().map_err(|source| RoundError::Volume { name: v.name.clone(), source })?;
        }
        Ok((consistency, caveats))
    }

    #[expect(clippy::too_many_arguments, reason = "a commit states all of it")]
    async fn commit(
        &self,
        session: &mut Session,
        writer: &mut WriterState,
        opened: &Opened,
        scan: &ScanSum,
        digests: &[VolumeDigest],
        consistency: Consistency,
        capture_start: UnixMillis,
    ) -> Result<Committed, RoundError> {
        let commit = CommitId(random::id());
        let nonce = WriterNonce(random::bytes());
        // Bounded; a receiver that lets so many commits get lost on one record is not one to wait for.
        if writer.pending.len() >= MAX_PENDING {
            writer.pending.remove(0);
        }
        writer.pending.push(PendingCommit { base: opened.head, commit, nonce });
        if !planted(Mutant::PendingNotWritten) {
            self.state.write_writer(writer)?;
        }
        let capture_end = unix_millis();
        let message = Commit {
            commit,
            base: opened.head,
            generation: opened.generation,
            nonce,
            consistency,
            capture_start,
            capture_end,
            records: scan.records,
            max_capture: scan.max_capture,
            delta_digest: scan.digests.delta,
            delta_blocks: scan.digests.delta_blocks,
            // Every block was read in this round.
            volumes: digests.iter().map(|d| CommitVolume { digest: *d, full_scan: capture_end }).collect(),
        };
        step("commit.decided")?;
        let (machine, now) = session.machine();
        machine.commit(now, message);
        let SourceOutput::Committed(committed) = session.next().await? else {
            return Err(SourceError::Protocol("no answer to `Commit`").into());
        };
        step("commit.answered")?;
        writer.nonce = Some(nonce);
        writer.pending.clear();
        writer.high_water = committed.seq;
        let (point, consistency) = (committed.seq.0, consistency.to_string());
        writer.last = Some(LastPoint { point, consistency, protected_until: capture_start.0 });
        writer.sent += scan.bytes_sent;
        self.state.write_writer(writer)?;
        Ok(committed)
    }
}

/// Where a test may stop. It fails as a connection that breaks.
fn step(name: &'static str) -> Result<(), SessionError> {
    Ok(failpoint::reach(|| name).map_err(|e| TransportError::Stream(e.to_string()))?)
}

/// Commits whose answers were lost: the head tells whether one of them exists. Those that were built on the head itself
/// may still land, late: they are remembered.
fn learn_outcome(writer: &mut WriterState, opened: &Opened) {
    if let Some(landed) = writer.pending.iter().find(|p| p.commit == opened.head_commit) {
        reached(Situation::PendingLanded);
        if !planted(Mutant::LandedCommitForgotten) {
            writer.nonce = Some(landed.nonce);
        }
    } else if !writer.pending.is_empty() {
        reached(Situation::PendingLost);
    }
    writer.pending.retain(|p| p.base >= opened.head);
    writer.high_water = writer.high_water.max(opened.head);
}

async fn ask_ranges(session: &mut Session, slot: VolumeSlot, pages: u64) -> Result<Vec<RangeDigest>, RoundError> {
    let mut ranges = Vec::with_capacity(pages as usize);
    while (ranges.len() as u64) < pages {
        let (machine, now) = session.machine();
        machine.ask_ranges(now, slot, PageIndex(ranges.len() as u64));
        match session.next().await? {
            SourceOutput::Ranges { digests, .. } => ranges.extend(digests),
            _ => return Err(SourceError::Protocol("no answer to `Ranges`").into()),
        }
    }
    Ok(ranges)
}

async fn reserve(jobs: &Option<mpsc::Sender<Job>>) -> Option<mpsc::Permit<'_, Job>> {
    jobs.as_ref()?.reserve().await.ok()
}
