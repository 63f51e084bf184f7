//! Reads and checks what a point needs: its log record and those beside it, maps and indexes, digests, and the
//! payloads or a sample of them. Writes nothing.
//!
//! Read first: [`verify_group`].

use std::sync::Arc;

use backhaul_cli::text;
use backhaul_protocol::digest::{RangeDigest, VolumeDigester};
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{LogSeq, Name, VolumeSlot};
use backhaul_protocol::store::entry::{Content, Page};
use backhaul_protocol::store::log::{PointBody, PointVolume, Record};
use backhaul_protocol::wire::message::PointSpec;
use backhaul_seams::random;
use backhaul_volume::rebuild::block_range;
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::catalog::GroupLog;
use crate::fetch::{FetchError, Fetched, Fetcher, Purpose};
use crate::plan::reads::{MAX_READ, Wanted, plan_reads};
use crate::plan::restore::{RESTORE_GAP, window_pages};
use crate::read_error::ReadError;
use crate::salvage::{BadIndex, Lost, OpenedView, behind_holes, harmless, join_neighbours, object_of, open_view};
use crate::view::{View, ViewVolume};
use crate::whole::check_objects;

/// How much of the payloads is read: so many of a million blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share(u32);

const WHOLE: u32 = 1_000_000;

impl Share {
    /// Whether everything is read.
    pub fn is_whole(self) -> bool {
        self.0 == WHOLE
    }

    /// `100%`, `2.5%`.
    pub fn parse(typed: &str) -> Result<Self, String> {
        let wrong = || format!("\"{typed}\" is not a share: want a percentage like 100% or 2.5%");
        let percent: f64 = typed.trim().trim_end_matches('%').trim().parse().map_err(|_| wrong())?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(wrong());
        }
        Ok(Self((percent / 100.0 * f64::from(WHOLE)).round() as u32))
    }
}

/// Something that is damaged.
#[derive(Clone, Debug, Serialize)]
pub struct Damage {
    /// Of which group; `None`: of the store as such.
    pub group: Option<String>,
    /// Of which point; `None`: not of the point that was looked at.
    pub point: Option<u64>,
    /// Where, and why.
    #[serde(flatten)]
    pub lost: Lost,
}

impl Damage {
    /// An object of the store, or of a group, that is about no volume.
    pub fn of_object(group: Option<&Name>, object: String, cause: &ReadError) -> Self {
        Self { group: group.map(Name::to_string), point: None, lost: Lost::object(object, cause.to_string()) }
    }
}

/// What was found of a group.
#[derive(Clone, Debug, Default)]
pub struct GroupReport {
    /// Of the point; `None` if the group has none that can be read.
    pub point: Option<PointReport>,
    /// What is damaged, of the point and of the log.
    pub damaged: Vec<Damage>,
}

/// What was found of a point.
#[derive(Clone, Debug, Serialize)]
pub struct PointReport {
    /// Of the group.
    pub group: String,
    /// Its number.
    pub point: u64,
    /// When it was committed.
    pub time: String,
    /// What it claims.
    pub consistency: String,
    /// Each volume.
    pub volumes: Vec<VolumeReport>,
    /// Bytes of payloads that were read and are right.
    pub bytes_verified: u64,
}

/// What was found of a volume.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeReport {
    /// What the user calls it.
    pub name: String,
    /// Bytes of the volume.
    pub length: u64,
    /// What the point states.
    pub digest: String,
    /// Whether the block digests of the index add up to it.
    pub digest_matches: bool,
    /// Blocks with data.
    pub blocks: u64,
    /// Of them so many were read and hashed.
    pub blocks_read: u64,
    /// Bytes of payloads that were read and are right.
    pub bytes_verified: u64,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Scrub {
    /// Name of the group.
    pub group: Name,
    /// Its log.
    pub log: GroupLog,
    /// Which volume; `None` means all.
    pub volume: Option<Name>,
    /// How much of the payloads.
    pub share: Share,
    /// Threads that work at once.
    pub threads: Arc<Semaphore>,
}

/// Checks the log of a group and one of its points. Errors are about reaching the store, and about what is not there;
/// damage is in the report. Of [`PointSpec::Latest`] the newest point that can be read is checked, a fuzzy one only if
/// there is no other.
pub async fn verify_group(
    scrub: &Scrub,
    spec: PointSpec,
    begin: impl FnOnce(LogSeq, u64) -> backhaul_cli::Phase,
) -> Result<GroupReport, FetchError> {
    let history = scrub.log.whole_history().await?;
    let of = |e: &ReadError| Damage::of_object(Some(&scrub.group), scrub.log.object_of(e), e);
    let mut report = GroupReport { point: None, damaged: history.damage().map(of).collect() };
    let spec = match spec {
        PointSpec::Latest => match history.newest_readable() {
            Some(seq) => PointSpec::Number(seq),
            None => return Ok(report),
        },
        other => other,
    };
    let (record, point) = match scrub.log.find(spec).await {
        Ok(found) => found,
        // What is wrong was found in the log.
        Err(e) if e.is_damage() && !report.damaged.is_empty() => return Ok(report),
        Err(e) => return Err(e.into()),
    };
    let volumes: Vec<&PointVolume> = match &scrub.volume {
        Some(name) => {
            let none = || ReadError::NotFound(format!("no volume \"{name}\" in point {}", record.seq));
            vec![point.volume(name).ok_or_else(none)?]
        }
        None => point.volumes.iter().collect(),
    };
    let phase = begin(record.seq, volumes.iter().map(|v| v.geometry.length()).sum());
    // The chain since the last checkpoint is checked; a point from before it has its neighbours looked at.
    let mut lost = check_neighbours(&scrub.log, &record, &report.damaged).await?;
    let mut reports = Vec::new();
    lost.extend(check_volumes(scrub, (&record, &point), volumes, &phase, &mut reports).await?);
    phase.finish();
    join_neighbours(&mut lost);
    let damage = |lost| Damage { group: Some(scrub.group.to_string()), point: Some(record.seq.0), lost };
    report.damaged.extend(lost.into_iter().map(damage));
    report.point = Some(PointReport {
        group: scrub.group.to_string(),
        point: record.seq.0,
        time: text::time(record.time),
        consistency: point.consistency.to_string(),
        bytes_verified: reports.iter().map(|v| v.bytes_verified).sum(),
        volumes: reports,
    });
    Ok(report)
}

async fn check_volumes(
    scrub: &Scrub,
    (record, point): (&Record, &PointBody),
    volumes: Vec<&PointVolume>,
    phase: &backhaul_cli::Phase,
    reports: &mut Vec<VolumeReport>,
) -> Result<Vec<Lost>, FetchError> {
    let OpenedView { view, holes, mended: mut lost } = open_view(&scrub.log, point, BadIndex::Rebuild).await?;
    let slots: Vec<VolumeSlot> = volumes.iter().map(|v| v.slot).collect();
    for stated in volumes {
        let Some(own) = view.volume(stated.slot) else { continue };
        let behind = behind_holes(&view, own, &stated.name, &holes).await?;
        let mut pass = Pass::new(scrub, stated, own, &view);
        pass.run(phase).await?;
        let sum = VolumeDigester::of(stated.geometry, &pass.ranges);
        let matches = sum == stated.digest;
        if !matches && behind.is_empty() && pass.lost.is_empty() {
            let cause = format!("the block digests add up to {sum}, and the point states {}", stated.digest);
            let key = scrub.log.keys().log(record.seq).to_string();
            pass.lost.push(Lost::new(&stated.name, 0..stated.geometry.length(), key, cause));
        }
        reports.push(pass.report(matches));
        lost.append(&mut pass.lost);
        // Where the digests add up to what the point states, nothing else was in the holes.
        if !matches {
            lost.extend(behind);
        }
    }
    let unharmed = harmless(&holes, &slots, &lost);
    lost.extend(unharmed);
    if scrub.share.is_whole() {
        for error in check_objects(&scrub.log, point, &view).await? {
            let object = scrub.log.object_of(&error);
            if !lost.iter().any(|l| l.object == object) {
                lost.push(Lost::nothing(object, &error));
            }
        }
    }
    Ok(lost)
}

async fn check_neighbours(log: &GroupLog, record: &Record, known: &[Damage]) -> Result<Vec<Lost>, ReadError> {
    let mut lost = Vec::new();
    let mut broken = |seq: LogSeq, cause: String| {
        let object = log.keys().log(seq).to_string();
        if !known.iter().any(|d| d.lost.object == object) {
            lost.push(Lost::object(object, cause));
        }
    };
    let own = log.read(record.seq).await?.map(|(_, hash)| hash);
    let floor = log.readable_floor().await?;
    // What lies below the floor does not exist, whatever a writer that slept has put there.
    if let Some(before) = record.seq.0.checked_sub(1).map(LogSeq).filter(|before| *before >= floor) {
        match log.read(before).await {
            Ok(Some((_, hash))) if hash == record.previous => {}
            Ok(Some(_)) => broken(record.seq, format!("it does not continue record {before}")),
            Ok(None) => broken(before, "it is missing".into()),
            Err(e) if e.is_damage() => broken(before, e.to_string()),
            Err(e) => return Err(e),
        }
    }
    match log.read(record.seq.next()).await {
        Ok(None) => {}
        Ok(Some((next, _))) if Some(next.previous) == own => {}
        Ok(Some(_)) => broken(record.seq.next(), format!("it does not continue record {}", record.seq)),
        Err(e) if e.is_damage() => broken(record.seq.next(), e.to_string()),
        Err(e) => return Err(e),
    }
    Ok(lost)
}

/// One volume on its way through.
struct Pass<'a> {
    view: &'a View,
    own: &'a ViewVolume,
    stated: &'a PointVolume,
    fetcher: Fetcher,
    sampler: Sampler,
    ranges: Vec<RangeDigest>,
    lost: Vec<Lost>,
    blocks: u64,
    blocks_read: u64,
    good: u64,
}

impl<'a> Pass<'a> {
    fn new(scrub: &Scrub, stated: &'a PointVolume, own: &'a ViewVolume, view: &'a View) -> Self {
        let (store, keys) = (scrub.log.store().clone(), scrub.log.keys());
        Self {
            view,
            own,
            stated,
            fetcher: Fetcher::new(store, keys, own.geometry, Purpose::Check, scrub.threads.clone()),
            sampler: Sampler::new(scrub.share),
            ranges: Vec::new(),
            lost: Vec::new(),
            blocks: 0,
            blocks_read: 0,
            good: 0,
        }
    }

    async fn run(&mut self, phase: &backhaul_cli::Phase) -> Result<(), FetchError> {
        let geometry = self.own.geometry;
        let step = window_pages(geometry);
        let mut wanted = Vec::new();
        for index in (0..geometry.pages()).map(PageIndex) {
            match self.view.page(self.own, index).await {
                Ok(page) => {
                    self.ranges.push(page.range_digest());
                    self.pick(&page, &mut wanted);
                }
                Err(e) if e.is_damage() => {
                    self.ranges.push(RangeDigest::ZERO);
                    let lost = Lost::page(&self.stated.name, geometry, index, &e);
                    debug_assert_eq!(lost.object, object_of(&e));
                    self.lost.push(lost);
                }
                Err(e) => return Err(e.into()),
            }
            if (index.0 + 1) % step == 0 || index.0 + 1 == geometry.pages() {
                // A sample is not read together with what lies between.
                let gap = if self.sampler.takes_all() { RESTORE_GAP } else { 0 };
                for read in plan_reads(std::mem::take(&mut wanted), gap, MAX_READ) {
                    self.fetcher.start(read).await;
                    while let Some(fetched) = self.fetcher.try_next() {
                        self.take(fetched?);
                    }
                }
            }
            phase.add(geometry.page_len(index));
        }
        while let Some(fetched) = self.fetcher.next().await {
            self.take(fetched?);
        }
        Ok(())
    }

    fn pick(&mut self, page: &Page, wanted: &mut Vec<Wanted>) {
        for (block, held) in page.blocks() {
            let Some((_, Content::Data { digest, location })) = held else { continue };
            self.blocks += 1;
            if self.sampler.next() {
                self.blocks_read += 1;
                wanted.push(Wanted { volume: self.own.slot, block, digest, location });
            }
        }
    }

    fn take(&mut self, fetched: Fetched) {
        self.good += fetched.good;
        for block in fetched.lost {
            let range = block_range(self.own.geometry, block.block);
            self.lost.push(Lost::new(&self.stated.name, range, block.object.to_string(), block.cause));
        }
    }

    fn report(&self, matches: bool) -> VolumeReport {
        VolumeReport {
            name: self.stated.name.to_string(),
            length: self.stated.geometry.length(),
            digest: self.stated.digest.to_string(),
            digest_matches: matches,
            blocks: self.blocks,
            blocks_read: self.blocks_read,
            bytes_verified: self.good,
        }
    }
}

/// Chooses blocks evenly: of every stretch of so many one, at a random place in it.
struct Sampler {
    share: Share,
    /// Of a million, carried from block to block; begins at a random place.
    carried: u32,
    random: u64,
}

impl Sampler {
    fn new(share: Share) -> Self {
        let random = u64::from_le_bytes(random::bytes()) | 1;
        Self { share, carried: (random % u64::from(WHOLE)) as u32, random }
    }

    fn takes_all(&self) -> bool {
        self.share.is_whole()
    }

    fn next(&mut self) -> bool {
        self.carried += self.share.0;
        // A little jitter, so that a pattern on the disk and the stride do not fall together.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let jitter = if self.takes_all() { 0 } else { (self.random % u64::from(self.share.0.max(1))) as u32 };
        if self.carried + jitter >= WHOLE {
            self.carried = self.carried.saturating_sub(WHOLE);
            return self.share.0 > 0;
        }
        false
    }
}

#[cfg(test)]
#[path = "scrub_tests.rs"]
mod tests;
