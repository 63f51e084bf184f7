//! A round: opens a session, looks where volumes may have changed, sends what differs, commits.
//!
//! Read first: [`Round::run`].
//!
//! | file | owns |
//! |---|---|
//! | [`looking`] | which passes there are, and what the point may claim |
//! | [`standing`] | making volumes stand still that are written to |
//! | [`checking`] | the background scan's portion |
//! | [`passes`] | one pass: pages to threads, records to streams |
//! | [`feeding`] | which pages, and what the receiver has of each |
//! | [`tally`] | what it adds up to |
//!
//! The order matters: the provider makes what is to be read first, and is told when all was; the watch over each volume
//! begins before its first byte is read and ends after the last byte of all volumes; the commit id and the next nonce are
//! on disk before the commit is asked for.

mod checking;
mod error;
mod feeding;
mod looking;
mod passes;
mod standing;
mod tally;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use backhaul_cli::Phase;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{RangeDigest, VolumeDigest};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CommitId, LogSeq, Name, VolumeId, VolumeSlot, WriterNonce};
use backhaul_protocol::session::source::{SourceError, SourceOutput};
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Committed, Open, OpenVolume, Opened, VolumesChanged,
};
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use backhaul_seams::{failpoint, random, threads};
use backhaul_transport::error::TransportError;
use tokio::time::Instant;

use crate::capture::{Capture, Provider};
use crate::condition::VolumeReport;
use crate::connection::{Session, SessionError, unix_millis};
use crate::pipeline::load::{Load, Paced};
use crate::pipeline::pace::Compression;
use crate::pipeline::scanner::ScanVolume;
use crate::state::{Joined, LastPoint, PendingCommit, ProtectedVolume, StateDir, WriterState};
use crate::tracker::Tracking;
use crate::tracker::hash_index::HashIndex;
pub use error::RoundError;
use feeding::{Known, PlannedVolume};
use looking::Looking;
use passes::Passes;
use standing::Course;
use tally::ScanSum;

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
    /// How much may be asked of the server.
    pub load: Arc<Load>,
    /// How hard blocks are compressed.
    pub compression: Compression,
    /// When to commit.
    pub when: CommitWhen,
    /// Told of every byte that was looked at.
    pub progress: Phase,
    /// Told once what the round begins with.
    pub observe: &'a (dyn Fn(&Stage) + Send + Sync),
}

/// What a round begins with.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Bytes of blocks that were written since the last round.
    pub marked: u64,
    /// Bytes that are looked at, with those of volumes of which all is.
    pub to_read: u64,
    /// Volumes whose marks can't be relied upon, and why: all of each is read.
    pub unknown: Vec<String>,
    /// All volumes.
    pub volumes: Vec<VolumeReport>,
}

/// What a commit states of its volumes, in the order in which they were offered.
struct Stated<'a> {
    digests: &'a [VolumeDigest],
    full_scans: &'a BTreeMap<VolumeId, UnixMillis>,
    consistency: Consistency,
    capture_start: UnixMillis,
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
    /// Bytes of blocks that were marked since the last round; `None` where nothing is marked.
    pub marked_bytes: Option<u64>,
    /// How long file systems were frozen, if they were.
    pub frozen_for: Option<Duration>,
    /// When all of every volume had last been read.
    pub full_scan: Option<UnixMillis>,
    /// Blocks that had changed and were not marked, since this process began.
    pub missed_blocks: u64,
    /// What was written before is in it.
    pub capture_start: UnixMillis,
    /// How long it all took.
    pub took: Duration,
    /// The volumes.
    pub volumes: Vec<RoundVolume>,
}

impl Round<'_> {
    /// Runs it to its end over an open connection.
    pub async fn run(self, session: &mut Session, tracking: &mut Tracking) -> Result<RoundReport, RoundError> {
        let result = self.try_run(session, tracking).await;
        if result.is_err() {
            // What was taken and not settled is pinned, and comes back with the next take.
            tracking.forget();
        }
        result
    }

    async fn try_run(&self, session: &mut Session, tracking: &mut Tracking) -> Result<RoundReport, RoundError> {
        let begun = Instant::now();
        let messages_before = session.message_bytes();
        let capture_start = unix_millis();
        if let Some(begin) = self.provider.begin() {
            threads::blocking(begin).await?;
        }
        let mut looking = Looking::open(self, tracking).await?;
        let mut writer = self.state.writer()?;
        let opened = self.open_session(session, &writer).await?;
        learn_outcome(&mut writer, &opened);
        let mut planned = self.plan(session, looking.parts(), &opened).await?;
        looking.sort_by_slot(&opened.volumes.iter().map(|v| v.slot).collect::<Vec<_>>());
        let mut passes = Passes::start(self, session, opened.next_capture)?;
        let course = Course { session: &mut *session, passes: &mut passes, planned: &mut planned };
        looking.look(tracking.quiescer.as_ref(), &mut tracking.checks, course, self.progress.clone()).await?;
        let scan = passes.finish(&planned).await?;
        looking.judge(tracking)?;
        let (found, mut caveats) = looking.label()?;
        let consistency = self.provider.finish(found, &mut caveats);
        let (frozen_for, marked_bytes) = (looking.frozen_for, looking.marked_bytes());
        let capture_start = looking.stood_at.unwrap_or(capture_start);
        let digest_of = |slot: &VolumeSlot| {
            scan.digests.volumes.iter().find(|(s, _)| s == slot).map(|(_, d)| *d).expect("every volume was scanned")
        };
        let digests: Vec<VolumeDigest> = opened.volumes.iter().map(|v| digest_of(&v.slot)).collect();
        let changed = scan.digests.delta_blocks > 0 || opened.volumes_changed == VolumesChanged::Yes;
        let wanted = match self.when {
            CommitWhen::Always => true,
            CommitWhen::Changed => changed,
            CommitWhen::ChangedOrBetterThan(last) => changed || consistency > last,
        };
        let mut committed = None;
        let full_scans = looking.full_scans(unix_millis());
        if wanted {
            let stated = Stated { digests: &digests, full_scans: &full_scans, consistency, capture_start };
            committed = Some(self.commit(session, &mut writer, &opened, &scan, stated).await?);
        } else {
            let (machine, _) = session.machine();
            machine.abandon();
            session.tell(&AgentMessage::StillEqual { at: capture_start }).await?;
        }
        if wanted || !changed {
            // What was read is what the receiver's newest point has.
            looking.settle(tracking, unix_millis())?;
        }
        let volumes = self.volumes.iter().zip(digests);
        Ok(RoundReport {
            head: committed.map_or(opened.head, |c| c.seq),
            metadata_bytes: session.message_bytes() - messages_before,
            committed,
            consistency,
            caveats,
            marked_bytes,
            frozen_for,
            full_scan: full_scans.values().min().copied(),
            missed_blocks: tracking.checks.misses(),
            bytes_scanned: scan.bytes_scanned,
            bytes_sent: scan.bytes_sent,
            capture_start,
            took: begun.elapsed(),
            volumes: volumes.map(|(v, digest)| RoundVolume { name: v.name.clone(), digest }).collect(),
        })
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

    /// What the receiver has, page by page as far as it is known without asking. In the order of slots, as digests are
    /// summed up.
    async fn plan(
        &self,
        session: &mut Session,
        parts: Vec<(Arc<dyn Capture>, Arc<HashIndex>)>,
        opened: &Opened,
    ) -> Result<Vec<PlannedVolume>, RoundError> {
        let mut planned = Vec::new();
        for ((v, (source, index)), opened) in self.volumes.iter().zip(parts).zip(&opened.volumes) {
            let (slot, geometry) = (opened.slot, v.geometry);
            let trusted = opened.digest == Some(index.volume_digest()) || planted(Mutant::IndexAdoptedUnseen);
            let known = if trusted {
                reached(Situation::IndexTrusted);
                Known::Indexed
            } else {
                reached(Situation::RangesCompared);
                Known::Ranges(ask_ranges(session, slot, geometry.pages()).await?)
            };
            let (read_len, load) = (source.read_len(), self.load.clone());
            let volume = Box::new(Paced { volume: source, load });
            let scan = ScanVolume { slot, geometry, read_len, volume, index };
            planned.push(PlannedVolume { scan: Arc::new(scan), known, opened: opened.clone() });
        }
        planned.sort_by_key(|p| p.opened.slot);
        Ok(planned)
    }

    async fn commit(
        &self,
        session: &mut Session,
        writer: &mut WriterState,
        opened: &Opened,
        scan: &ScanSum,
        stated: Stated<'_>,
    ) -> Result<Committed, RoundError> {
        let Stated { digests, full_scans, consistency, capture_start } = stated;
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
            volumes: self
                .volumes
                .iter()
                .zip(digests)
                .map(|(v, digest)| CommitVolume { digest: *digest, full_scan: full_scans[&v.id] })
                .collect(),
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
