//! Which points a group has, and what of its log can't be read: damage of one record costs that point and no other.
//!
//! Read first: [`History`], then [`GroupLog::find`]. Nothing here ever takes an older point for the latest: where the
//! record that may be the wanted one can't be read, that is an error that names the next older point.

use std::collections::BTreeSet;
use std::ops::Range;

use backhaul_cli::text;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::ObjectDigest;
use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::limits::CHECKPOINT_INTERVAL;
use backhaul_protocol::store::checkpoint::{Checkpoint, PointSummary};
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::store::log::{PointBody, Record, UnixMillis};
use backhaul_protocol::wire::message::PointSpec;
use tokio::task::JoinSet;

use crate::catalog::{GroupLog, STALE_HINT, get_optional, number_of, numbered_prefix};
use crate::read_error::ReadError;
use crate::store::list_all;

/// Longest checkpoint that is read: over 500,000 points of one volume.
pub(crate) const MAX_CHECKPOINT: usize = 64 << 20;
/// Log records that are read at once.
const READ_AHEAD: usize = 16;
/// Records in a gap of the log that are told one by one; of a longer gap the first ones and the last. A gap that long is
/// no loss of records but a wrong number somewhere. Arbitrary.
const MAX_GAP: u64 = 1000;
/// Records that are looked at one by one for the latest point, before the whole log is read. Arbitrary.
const LOOK_BACK: u64 = 8;

/// What a group's log tells, as far as it can be read.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// All points that can be read, ascending.
    pub points: Vec<PointSummary>,
    /// Records that can't be read, ascending: each may have been a point.
    pub unreadable: Vec<(LogSeq, ReadError)>,
    /// Records that can be read and do not continue the one before.
    pub broken: Vec<ReadError>,
    /// Checkpoints and hints: no point is lost with them.
    pub aside: Vec<ReadError>,
    /// The checkpoint that it begins with: of the points up to there the records were not read.
    checkpoint: Option<LogSeq>,
}

impl History {
    /// Everything that is damaged.
    pub fn damage(&self) -> impl Iterator<Item = &ReadError> {
        self.unreadable.iter().map(|(_, e)| e).chain(&self.broken).chain(&self.aside)
    }

    /// The newest point that can be read, a fuzzy one only if there is no other.
    pub fn newest_readable(&self) -> Option<LogSeq> {
        self.older(LogSeq(u64::MAX)).or_else(|| self.points.last().map(|p| p.seq))
    }

    /// The newest point below `seq` that can be restored without being asked for by its number.
    fn older(&self, seq: LogSeq) -> Option<LogSeq> {
        self.points.iter().rev().find(|p| p.seq < seq && is_default(p.consistency)).map(|p| p.seq)
    }

    /// The newest point up to `time` that is not fuzzy. That there is none is `Ok(None)`, that it can't be told an
    /// error.
    fn latest(&self, time: Option<UnixMillis>) -> Result<Option<LogSeq>, ReadError> {
        let in_time = |p: &PointSummary| time.is_none_or(|time| p.time <= time);
        let found = self.points.iter().rev().find(|p| in_time(p) && is_default(p.consistency)).map(|p| p.seq);
        // What can't be read may be the one, unless it comes after a point that is too late.
        let too_late = |seq: LogSeq| self.points.iter().any(|p| Some(p.seq) > found && p.seq < seq && !in_time(p));
        let Some((seq, cause)) = self.unreadable.iter().rev().find(|(n, _)| Some(*n) > found && !too_late(*n)) else {
            return Ok(found);
        };
        let which = if time.is_some() { "the one of that time" } else { "the latest" };
        let what = format!("so it is not known which point is {which}");
        Err(ReadError::Point { cause: Box::new(cause.clone()), what, older: self.older(*seq) })
    }

    /// Why there is no such point, and which there are.
    fn absent(&self, spec: PointSpec) -> ReadError {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return ReadError::NotFound("no points yet".into());
        };
        let by_number = "name one by its number to take it all the same: `backhaul-receiver points` lists them";
        let text = match spec {
            PointSpec::Number(seq) => {
                format!(
                    "no point {seq}: they go from {} to {}, with gaps; `backhaul-receiver points` lists them",
                    first.seq, last.seq
                )
            }
            PointSpec::Time(time) if time < first.time => {
                let (time, first) = (text::time(time), (first.seq, text::time(first.time)));
                format!("no point of {time} or before: the first is {} of {}", first.0, first.1)
            }
            PointSpec::Time(time) => format!("every point up to {} is fuzzy; {by_number}", text::time(time)),
            PointSpec::Latest => format!("every point is fuzzy, the newest is {}; {by_number}", last.seq),
        };
        ReadError::NotFound(text)
    }
}

impl GroupLog {
    /// Reads the newest checkpoint and the records after it, and checks their chain. Errors are about reaching the
    /// store; damage is in the result.
    pub async fn history(&self) -> Result<History, ReadError> {
        let mut history = History::default();
        // Listed before the newest record is looked for: what a checkpoint tells of was there before it.
        let checkpoints = self.list(&self.keys().checkpoint(LogSeq(0))).await?;
        let extent = self.extent(checkpoints.last().and_then(number_of), &mut history).await?;
        let mut previous = self.checkpoint(checkpoints, &mut history).await?;
        let floor = self.readable_floor().await?;
        let from = history.checkpoint.map_or(floor, LogSeq::next).0;
        for numbers in extent.numbers(from).chunks(READ_AHEAD) {
            let mut reads = JoinSet::new();
            for &seq in numbers {
                let log = self.clone();
                reads.spawn(async move { (seq, log.read(seq).await) });
            }
            let mut records = reads.join_all().await;
            records.sort_by_key(|(seq, _)| *seq);
            for (seq, record) in records {
                let missing = ReadError::Log { seq, what: "it is missing" };
                match record.and_then(|found| found.ok_or(missing)) {
                    Ok((record, hash)) => {
                        if previous.is_some_and(|p| p != record.previous) {
                            history.broken.push(ReadError::Log { seq, what: "it does not continue the record before" });
                        }
                        previous = Some(hash);
                        history.points.extend(PointSummary::of(&record));
                    }
                    Err(e) if e.is_damage() => {
                        previous = None;
                        history.unreadable.push((seq, e));
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        // What a checkpoint lists may be deleted since, and what lies below the floor does not exist: a writer that
        // slept may have put it there.
        history.points.retain(|p| p.seq >= floor);
        history.unreadable.retain(|(seq, _)| *seq >= floor);
        Ok(history)
    }

    /// The same, and whether the records of the points that a checkpoint lists are still there: a list of all keys.
    pub async fn whole_history(&self) -> Result<History, ReadError> {
        let mut history = self.history().await?;
        let (listed, floor) = (self.listed().await?, self.readable_floor().await?);
        let extent = Extent { hint: history.checkpoint, listed };
        let known: BTreeSet<LogSeq> = history.unreadable.iter().map(|(seq, _)| *seq).collect();
        let missing: BTreeSet<LogSeq> = extent.gaps(floor.0).into_iter().collect();
        // What is newer than the checkpoint was read one by one.
        history.points.retain(|p| Some(p.seq) > history.checkpoint || extent.has(p.seq));
        let missing = missing.difference(&known).map(|seq| (*seq, ReadError::Log { seq: *seq, what: "it is missing" }));
        history.unreadable.extend(missing.collect::<Vec<_>>());
        history.unreadable.sort_by_key(|(seq, _)| *seq);
        Ok(history)
    }

    /// Which numbers there are or were. `known`: there was a record of this number.
    async fn extent(&self, known: Option<LogSeq>, history: &mut History) -> Result<Extent, ReadError> {
        let hint = match self.hint().await {
            Ok(hint) => hint,
            Err(e) if e.is_damage() => {
                history.aside.push(e);
                None
            }
            Err(e) => return Err(e),
        };
        // Without a hint the log is listed: the number that is known may be far from the newest one.
        let start = hint.map(|hint| known.map_or(hint, |known| hint.max(known)));
        let hint = hint.max(known);
        match self.newest_from(start).await {
            Ok(newest) => Ok(Extent { listed: std::iter::once(0..newest.0 + 1).collect(), hint }),
            Err(e) if e.is_damage() => {
                if let Err(e) = self.floor().await {
                    history.aside.push(e);
                }
                let listed = self.listed().await?;
                // Stopped after the name and before the log: a group that is still empty.
                if listed.is_empty() && !self.is_untouched().await? {
                    history.unreadable.push((LogSeq(0), e));
                }
                let hint = hint.filter(|_| !listed.is_empty());
                Ok(Extent { listed, hint })
            }
            Err(e) => Err(e),
        }
    }

    async fn is_untouched(&self) -> Result<bool, ReadError> {
        let any = format!("groups/{}/", self.group());
        Ok(self.store().list(&any, None, 1).await?.is_empty())
    }

    /// The numbers among the keys of log records. For logs with gaps: a list costs a request for 1000 records.
    async fn listed(&self) -> Result<Vec<Range<u64>>, ReadError> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for key in self.list(&self.keys().log(LogSeq(0))).await? {
            match (number_of(&key), found.last_mut()) {
                (Some(seq), Some(last)) if last.end == seq.0 => last.end += 1,
                (Some(seq), _) => found.push(seq.0..seq.0 + 1),
                (None, _) => {}
            }
        }
        Ok(found)
    }

    /// All keys that end in a number, as this one does.
    async fn list(&self, one: &ObjectKey) -> Result<Vec<ObjectKey>, ReadError> {
        let found = list_all(&**self.store(), numbered_prefix(one)).await?;
        Ok(found.into_iter().map(|(key, _)| key).collect())
    }

    /// Points and number of the newest checkpoint that can be read; gives the hash of its record.
    async fn checkpoint(&self, keys: Vec<ObjectKey>, history: &mut History) -> Result<Option<ObjectDigest>, ReadError> {
        for key in keys.into_iter().rev() {
            let Some(at) = number_of(&key) else { continue };
            let read = get_optional(&**self.store(), &key, MAX_CHECKPOINT).await.map_err(ReadError::from);
            let parsed = read.and_then(|found| {
                let bytes = found.as_deref();
                bytes.map(|b| Checkpoint::parse(self.group(), at, b).map_err(ReadError::damaged(&key))).transpose()
            });
            match parsed {
                Ok(Some(checkpoint)) => {
                    history.points = checkpoint.points;
                    history.checkpoint = Some(at);
                    return Ok(Some(checkpoint.hash));
                }
                Ok(None) => {}
                Err(e) if e.is_damage() => history.aside.push(e),
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// The point that is meant, and its record.
    pub async fn find(&self, spec: PointSpec) -> Result<(Record, PointBody), ReadError> {
        let seq = match spec {
            PointSpec::Number(seq) => Some(seq),
            PointSpec::Latest => self.latest().await?,
            PointSpec::Time(time) => self.history().await?.latest(Some(time))?,
        };
        let Some(seq) = seq else { return Err(self.whole_history().await?.absent(spec)) };
        let cause = match self.read_above_floor(seq).await {
            Ok(Some((record, _))) => match record.point().cloned() {
                Some(point) => return Ok((record, point)),
                None => None,
            },
            Ok(None) => None,
            Err(e) if e.is_damage() => Some(e),
            Err(e) => return Err(e),
        };
        let history = self.whole_history().await?;
        let listed = history.unreadable.iter().find(|(n, _)| *n == seq).map(|(_, e)| e.clone());
        Err(match cause.or(listed) {
            Some(cause) => {
                let what = format!("so point {seq} can't be had");
                ReadError::Point { cause: Box::new(cause), what, older: history.older(seq) }
            }
            None => history.absent(spec),
        })
    }

    /// The record, unless the floor says that there is none.
    async fn read_above_floor(&self, seq: LogSeq) -> Result<Option<(Record, ObjectDigest)>, ReadError> {
        if seq < self.readable_floor().await? {
            return Ok(None);
        }
        self.read(seq).await
    }

    /// The newest point that is not fuzzy: usually the newest record, so the log is read backwards, and the list of
    /// all points only when many are fuzzy or something is damaged.
    async fn latest(&self) -> Result<Option<LogSeq>, ReadError> {
        match self.look_back().await {
            Ok(Some(found)) => Ok(Some(found)),
            Ok(None) => self.history().await?.latest(None),
            Err(e) if e.is_damage() => self.history().await?.latest(None),
            Err(e) => Err(e),
        }
    }

    async fn look_back(&self) -> Result<Option<LogSeq>, ReadError> {
        let hint = self.hint().await?;
        let newest = self.newest_from(hint).await?;
        let next_checkpoint = LogSeq((newest.0 / CHECKPOINT_INTERVAL + 1) * CHECKPOINT_INTERVAL);
        let known = match hint {
            // No LIST where the hint is as new as it is while its writers live.
            Some(hint) if newest.0.saturating_sub(hint.0) <= STALE_HINT => {
                let beyond = self.is_there(&self.keys().checkpoint(next_checkpoint)).await?;
                Some(if beyond { next_checkpoint } else { hint })
            }
            _ => self.list(&self.keys().checkpoint(LogSeq(0))).await?.last().and_then(number_of),
        };
        if let Some(seq) = known.filter(|known| newest < *known) {
            return Err(ReadError::Log { seq, what: "it is missing" });
        }
        for back in 0..LOOK_BACK.min(newest.0 + 1) {
            let seq = LogSeq(newest.0 - back);
            let missing = ReadError::Log { seq, what: "it is missing" };
            let (record, _) = self.read(seq).await?.ok_or(missing)?;
            if record.point().is_some_and(|p| is_default(p.consistency)) {
                return Ok(Some(seq));
            }
        }
        Ok(None)
    }

    /// Key of the object that an error is about.
    pub fn object_of(&self, error: &ReadError) -> String {
        match error {
            ReadError::Log { seq, .. } => self.keys().log(*seq).to_string(),
            ReadError::Point { cause, .. } => self.object_of(cause),
            other => crate::salvage::object_of(other),
        }
    }
}

/// Which numbers of a log there are, and what the hint says.
struct Extent {
    /// Numbers of records, ascending and apart; usually one range.
    listed: Vec<Range<u64>>,
    /// The newest number there was at some time.
    hint: Option<LogSeq>,
}

impl Extent {
    /// The numbers to read from `from` on: those that are there, and those that should be.
    fn numbers(&self, from: u64) -> Vec<LogSeq> {
        let there = self.listed.iter().flat_map(|r| r.start.max(from)..r.end).map(LogSeq);
        let mut out: Vec<LogSeq> = there.chain(self.gaps(from)).collect();
        out.sort_unstable();
        out
    }

    fn has(&self, seq: LogSeq) -> bool {
        let at = self.listed.partition_point(|r| r.end <= seq.0);
        self.listed.get(at).is_some_and(|r| r.start <= seq.0)
    }

    /// The numbers from `from` on that should be there and are not.
    fn gaps(&self, from: u64) -> Vec<LogSeq> {
        let hint = self.hint.map(|hint| hint.0 + 1..hint.0 + 1);
        let mut out = Vec::new();
        let mut next = from;
        for range in self.listed.iter().cloned().chain(hint).filter(|r| r.end > from) {
            if next < range.start {
                out.extend(next..range.start.min(next + MAX_GAP));
                out.extend((range.start - next > MAX_GAP).then_some(range.start - 1));
            }
            next = next.max(range.end);
        }
        out.into_iter().map(LogSeq).collect()
    }
}

fn is_default(consistency: Consistency) -> bool {
    consistency != Consistency::Fuzzy
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
