//! A round: opens a session, scans every volume, sends what differs, commits.
//!
//! Read first: [`Round::run`].
//!
//! The order matters: the watch over each volume begins before its first byte is read and ends after the last byte of
//! all volumes; the commit id and the next nonce are on disk before the commit is asked for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backhaul_cli::Phase;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::{RangeDigest, VolumeDigest};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, CommitId, LogSeq, Name, VolumeSlot, WriterNonce};
use backhaul_protocol::session::compare::{RoundDigester, RoundDigests};
use backhaul_protocol::session::source::{SourceError, SourceOutput};
use backhaul_protocol::store::log::{MachineId, UnixMillis};
use backhaul_protocol::wire::message::{
    AgentMessage, Commit, CommitVolume, Committed, Open, OpenVolume, Opened, OpenedVolume, VolumesChanged,
};
use backhaul_volume::stability::{Stability, Watch};
use backhaul_volume::{Source, VolumeError};
use tokio::sync::mpsc;

use crate::connection::{Session, SessionError, unix_millis};
use crate::pipeline::scanner::{HeldPage, Job, ScanError, ScanShared, ScanVolume, Scanned, Scanner};
use crate::pipeline::sender::Sender;
use crate::state::{Joined, PendingCommit, ProtectedVolume, StateDir, StateError, WriterState};
use crate::tracker::hash_index::{HashIndex, IndexError};

/// Questions for pages that are under way at once: 32 KiB each on the way back.
const QUESTIONS: usize = 16;
/// Commits without an answer that are remembered. Arbitrary.
const MAX_PENDING: usize = 16;

/// How a round fails.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    /// The session.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// A volume.
    #[error("volume {name}: {source}")]
    Volume {
        /// Which.
        name: Name,
        /// Why.
        source: VolumeError,
    },
    /// Reading, hashing, compressing.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// Threads can't be had.
    #[error("can't start threads: {0}")]
    Threads(std::io::Error),
}

impl RoundError {
    /// Whether another round may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Session(e) => e.is_retryable(),
            Self::Volume { source, .. } | Self::Scan(ScanError::Volume(source)) => source.is_retryable(),
            Self::Scan(ScanError::Stopped) => true,
            Self::Scan(_) | Self::Threads(_) => false,
            Self::Index(e) => e.is_retryable(),
            Self::State(e) => e.is_retryable(),
        }
    }
}

impl From<SourceError> for RoundError {
    fn from(error: SourceError) -> Self {
        Self::Session(error.into())
    }
}

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
    /// Threads that scan.
    pub threads: usize,
    /// zstd level.
    pub level: i32,
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
    volume: ScanVolumeParts,
    watch: Watch,
}

struct ScanVolumeParts {
    source: Arc<Source>,
    index: HashIndex,
}

/// What the receiver has of a volume's pages.
enum Known {
    /// All as indexed, but for the draft's.
    Indexed,
    /// Range digests of what it has.
    Ranges(Vec<RangeDigest>),
}

struct PlannedVolume {
    scan: Arc<ScanVolume>,
    known: Known,
    opened: OpenedVolume,
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
        let (sources, watches): (Vec<_>, Vec<_>) =
            openings.into_iter().map(|o| ((o.volume.source.clone(), o.volume), o.watch)).unzip();
        let (sources, parts): (Vec<_>, Vec<_>) = sources.into_iter().unzip();
        let planned = self.plan(session, parts, &opened).await?;
        let scan = self.scan(session, &planned, opened.next_capture).await?;
        let (consistency, caveats) = self.label(&sources, watches)?;
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
            let source = Arc::new(Source::open(&v.path).map_err(failed)?);
            let index = HashIndex::open(&self.state.index_dir(), v.id, v.geometry)?;
            let watched = source.clone();
            let watch = tokio::task::spawn_blocking(move || watched.watch()).await.expect("watching does not panic");
            openings.push(Opening { volume: ScanVolumeParts { source, index }, watch });
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
        parts: Vec<ScanVolumeParts>,
        opened: &Opened,
    ) -> Result<Vec<PlannedVolume>, RoundError> {
        let mut planned = Vec::new();
        for ((v, part), opened) in self.volumes.iter().zip(parts).zip(&opened.volumes) {
            let trusted = opened.digest == Some(part.index.volume_digest());
            let known = if trusted {
                Known::Indexed
            } else {
                Known::Ranges(ask_ranges(session, opened.slot, v.geometry.pages()).await?)
            };
            let scan = ScanVolume {
                slot: opened.slot,
                geometry: v.geometry,
                read_len: ScanVolume::read_len(part.source.is_device()),
                volume: Box::new(part.source.clone()),
                index: part.index,
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
        let mut sender = Sender::start(&session.connection);
        let sent_bytes = sender.bytes();
        let shared = Arc::new(ScanShared {
            capture: AtomicU64::new(first_capture.0),
            stop: AtomicBool::new(false),
            level: self.level,
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
            let ready = feeder.ready();
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
    fn label(&self, sources: &[Arc<Source>], watches: Vec<Watch>) -> Result<(Consistency, Vec<String>), RoundError> {
        let mut consistency = Consistency::Crash;
        let mut caveats = Vec::new();
        for (v, watch) in self.volumes.iter().zip(watches) {
            caveats.extend(watch.caveats().iter().map(|c| format!("{}: {c}", v.name)));
            if let Stability::Moved(why) = watch.finish() {
                consistency = Consistency::Fuzzy;
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
        let commit = CommitId(uuid::Uuid::now_v7().into_bytes());
        let nonce = WriterNonce(uuid::Uuid::new_v4().into_bytes());
        // Bounded; a receiver that lets so many commits get lost on one record is not one to wait for.
        if writer.pending.len() >= MAX_PENDING {
            writer.pending.remove(0);
        }
        writer.pending.push(PendingCommit { base: opened.head, commit, nonce });
        self.state.write_writer(writer)?;
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
        let (machine, now) = session.machine();
        machine.commit(now, message);
        let SourceOutput::Committed(committed) = session.next().await? else {
            return Err(SourceError::Protocol("no answer to `Commit`").into());
        };
        writer.nonce = Some(nonce);
        writer.pending.clear();
        writer.high_water = committed.seq;
        self.state.write_writer(writer)?;
        Ok(committed)
    }
}

/// Commits whose answers were lost: the head tells whether one of them exists. Those that were built on the head itself
/// may still land, late: they are remembered.
fn learn_outcome(writer: &mut WriterState, opened: &Opened) {
    if let Some(landed) = writer.pending.iter().find(|p| p.commit == opened.head_commit) {
        writer.nonce = Some(landed.nonce);
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

/// Gives pages in order, asking for those that must be compared block by block a little ahead.
struct Feeder<'a> {
    planned: &'a [PlannedVolume],
    /// Pages of one job.
    batch: usize,
    /// Next page to look at.
    next: (usize, u64),
    /// Pages in order; those without an answer yet are `None`.
    window: VecDeque<(usize, PageIndex, Option<HeldPage>)>,
}

impl<'a> Feeder<'a> {
    fn new(planned: &'a [PlannedVolume], threads: usize) -> Self {
        let pages: u64 = planned.iter().map(|p| p.scan.geometry.pages()).sum();
        // Small volumes page by page, so that all threads have work to the end.
        let batch = (pages / (threads as u64 * 32)).clamp(1, QUESTIONS as u64) as usize;
        Self { planned, batch, next: (0, 0), window: VecDeque::new() }
    }

    fn ask(&mut self, session: &mut Session) {
        while self.window.len() < QUESTIONS {
            let Some(volume) = self.planned.get(self.next.0) else { return };
            if self.next.1 >= volume.scan.geometry.pages() {
                self.next = (self.next.0 + 1, 0);
                continue;
            }
            let page = PageIndex(self.next.1);
            self.next.1 += 1;
            let held = volume.held(page);
            if held.is_none() {
                let (machine, now) = session.machine();
                machine.ask_page(now, volume.opened.slot, page);
            }
            self.window.push_back((self.next.0, page, held));
        }
    }

    fn answer(&mut self, output: SourceOutput) -> Result<(), RoundError> {
        let SourceOutput::Page { volume, page, held } = output else {
            return Err(SourceError::Protocol("an answer to another question").into());
        };
        let waiting = self
            .window
            .iter_mut()
            .find(|(v, p, held)| held.is_none() && *p == page && self.planned[*v].opened.slot == volume);
        let slot = waiting.ok_or(SourceError::Protocol("an answer to no question"))?;
        slot.2 = Some(HeldPage::Digests { digests: held.digests, draft: held.draft });
        Ok(())
    }

    fn ready(&self) -> bool {
        self.window.front().is_some_and(|(_, _, held)| held.is_some())
    }

    /// The next pages that are known, of one volume.
    fn take(&mut self) -> Option<Job> {
        let volume = self.window.front()?.0;
        let mut pages = Vec::with_capacity(self.batch);
        while pages.len() < self.batch && self.window.front().is_some_and(|(v, _, held)| *v == volume && held.is_some())
        {
            let (_, page, held) = self.window.pop_front()?;
            pages.push((page, held?));
        }
        Some(Job { volume: self.planned[volume].scan.clone(), pages })
    }

    fn is_done(&self) -> bool {
        let (volume, page) = self.next;
        let last = self.planned.len().checked_sub(1);
        let exhausted =
            last.is_none_or(|l| volume > l || (volume == l && page >= self.planned[l].scan.geometry.pages()));
        self.window.is_empty() && exhausted
    }
}

impl PlannedVolume {
    /// What the receiver has of the page; `None` if it must be asked.
    fn held(&self, page: PageIndex) -> Option<HeldPage> {
        if self.opened.draft.contains(page.0) {
            return None;
        }
        match &self.known {
            Known::Indexed => Some(HeldPage::AsIndexed),
            Known::Ranges(ranges) => {
                let range = ranges[page.0 as usize];
                if range == RangeDigest::ZERO {
                    Some(HeldPage::Zero)
                } else if self.scan.index.range(page) == range {
                    Some(HeldPage::AsIndexed)
                } else {
                    None
                }
            }
        }
    }
}

/// What a scan adds up to.
struct ScanSum {
    digests: RoundDigests,
    records: u64,
    bytes_scanned: u64,
    bytes_sent: u64,
    max_capture: CaptureNumber,
}

/// Puts pages back in order and adds them up.
struct Summing<'a> {
    planned: &'a [PlannedVolume],
    digester: RoundDigester,
    /// The volume and page that come next.
    next: (usize, u64),
    begun: bool,
    early: BTreeMap<(VolumeSlot, PageIndex), Scanned>,
    records: u64,
    bytes_scanned: u64,
    progress: Phase,
}

impl<'a> Summing<'a> {
    fn new(planned: &'a [PlannedVolume], progress: Phase) -> Self {
        Self {
            planned,
            digester: RoundDigester::default(),
            next: (0, 0),
            begun: false,
            early: BTreeMap::new(),
            records: 0,
            bytes_scanned: 0,
            progress,
        }
    }

    fn add(&mut self, scanned: Scanned) {
        self.early.insert((scanned.slot, scanned.page), scanned);
        while let Some(volume) = self.planned.get(self.next.0) {
            if !self.begun {
                self.digester.begin_volume(volume.opened.slot, volume.scan.geometry);
                self.begun = true;
            }
            let page = PageIndex(self.next.1);
            let Some(s) = self.early.remove(&(volume.opened.slot, page)) else { return };
            self.digester.push_range(page, s.range, &s.digests, &s.draft, &s.sent);
            self.records += s.records;
            self.bytes_scanned += s.bytes_read;
            self.progress.add(volume.scan.geometry.page_len(page));
            self.next.1 += 1;
            if self.next.1 == volume.scan.geometry.pages() {
                self.next = (self.next.0 + 1, 0);
                self.begun = false;
            }
        }
    }

    fn is_complete(&self) -> bool {
        self.next.0 == self.planned.len()
    }

    fn finish(self, bytes_sent: u64, max_capture: CaptureNumber) -> ScanSum {
        self.progress.finish();
        ScanSum {
            digests: self.digester.finish(),
            records: self.records,
            bytes_scanned: self.bytes_scanned,
            bytes_sent,
            max_capture,
        }
    }
}
