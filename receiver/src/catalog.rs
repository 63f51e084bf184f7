//! What the store holds: groups, and each group's log.
//!
//! Read first: [`Catalog`], then [`GroupLog`]. A point exists if and only if its log record does; everything here
//! is read from the store anew, and nothing is believed that is not in the log. Which points there are, and what to
//! make of a log that is damaged, is told in [`crate::history`]; groups whose name is damaged in [`crate::locate`].

use std::sync::Arc;

use backhaul_protocol::digest::ObjectDigest;
use backhaul_protocol::ids::{GroupId, LogSeq, Name};
use backhaul_protocol::limits::MAX_LOG_RECORD;
use backhaul_protocol::session::sink::GroupHead;
use backhaul_protocol::store::checkpoint::{Checkpoint, Sharing, StoreFormat, read_seq, write_seq};
use backhaul_protocol::store::envelope::Kind as ObjectKind;
use backhaul_protocol::store::fleet::read_group_name;
use backhaul_protocol::store::key::{self, GroupKeys};
use backhaul_protocol::store::log::Record;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use bytes::Bytes;
use futures_util::future::try_join_all;

use crate::history::MAX_CHECKPOINT;
use crate::read_error::ReadError;
use crate::store::{Kind, ObjectStore, StoreError};

/// A small object's longest length: names, tokens, hints. All are under 300 bytes.
pub const SMALL: usize = 4096;

/// Records that a hint may be behind by: it is written half a minute after the last, and points are a second apart.
pub(crate) const STALE_HINT: u64 = 64;
/// How far beyond the newest record another one is looked for where the hint is new. A gap of up to four records is found
/// unless one record follows it, one of 16 unless eight do. Whoever reads the whole log finds all of them.
const PROBED_AHEAD: [u64; 11] = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

/// A store that holds recovery points.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// Where everything is.
    pub store: Arc<dyn ObjectStore>,
    /// What `init` wrote down.
    pub format: StoreFormat,
}

/// `Ok(None)` where the object is not there.
pub async fn get_optional(
    store: &dyn ObjectStore,
    key: &key::ObjectKey,
    max: usize,
) -> Result<Option<Bytes>, StoreError> {
    match store.get(key, max).await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

impl Catalog {
    /// Reads the store's description.
    pub async fn open(store: Arc<dyn ObjectStore>) -> Result<Self, ReadError> {
        let key = key::format();
        let Some(bytes) = get_optional(&*store, &key, SMALL).await? else {
            let text =
                format!("{} holds no Backhaul store; make one: backhaul-receiver init --store URL", store.describe());
            return Err(ReadError::NotFound(text));
        };
        let format = StoreFormat::parse(&bytes).map_err(ReadError::damaged(&key))?;
        Ok(Self { store, format })
    }

    /// The group of this name.
    pub async fn group(&self, name: &Name) -> Result<Option<GroupId>, ReadError> {
        let key = key::group_name(name);
        let Some(bytes) = get_optional(&*self.store, &key, SMALL).await? else { return Ok(None) };
        read_group_name(&bytes).map(Some).map_err(ReadError::damaged(&key))
    }

    /// The log of a group.
    pub fn log(&self, group: GroupId) -> GroupLog {
        GroupLog { store: self.store.clone(), keys: GroupKeys(group), sharing: self.format.sharing }
    }
}

/// What a key that ends in a number has in common with the others of its kind.
pub(crate) fn numbered_prefix(key: &key::ObjectKey) -> &str {
    key.as_str().trim_end_matches(|c: char| c.is_ascii_digit())
}

/// The log number that a key ends in; `None` if no record can have it.
pub(crate) fn number_of(key: &key::ObjectKey) -> Option<LogSeq> {
    let digits = &key.as_str()[numbered_prefix(key).len()..];
    digits.parse().ok().map(LogSeq).filter(|seq| seq.is_possible())
}

/// The log of one group.
#[derive(Clone, Debug)]
pub struct GroupLog {
    store: Arc<dyn ObjectStore>,
    keys: GroupKeys,
    sharing: Sharing,
}

/// How an append ended.
#[derive(Debug)]
pub enum Appended {
    /// The record is there, written by us now or earlier.
    Ours,
    /// Another record was first.
    Theirs(Box<Record>),
    /// The number is gone for good: this writer slept too long.
    BelowFloor,
}

impl GroupLog {
    /// Keys of the group.
    pub fn keys(&self) -> GroupKeys {
        self.keys
    }
    /// The store.
    pub fn store(&self) -> &Arc<dyn ObjectStore> {
        &self.store
    }
    /// Which group.
    pub fn group(&self) -> GroupId {
        self.keys.0
    }

    /// A record and the hash of its bytes; `None` if there is no such number.
    pub async fn read(&self, seq: LogSeq) -> Result<Option<(Record, ObjectDigest)>, ReadError> {
        let key = self.keys.log(seq);
        let Some(bytes) = get_optional(&*self.store, &key, MAX_LOG_RECORD).await? else { return Ok(None) };
        let record = Record::parse(self.group(), seq, &bytes).map_err(ReadError::damaged(&key))?;
        Ok(Some((record, Record::hash(&bytes))))
    }

    async fn exists(&self, seq: LogSeq) -> Result<bool, ReadError> {
        self.is_there(&self.keys.log(seq)).await
    }

    pub(crate) async fn is_there(&self, key: &key::ObjectKey) -> Result<bool, ReadError> {
        match self.store.get_range(key, 0..1).await {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == Kind::NotFound => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The lowest number that may exist.
    pub async fn floor(&self) -> Result<LogSeq, ReadError> {
        let key = self.keys.floor();
        match get_optional(&*self.store, &key, SMALL).await? {
            None => Ok(LogSeq(0)),
            Some(bytes) => read_seq(ObjectKind::Floor, &bytes).map_err(ReadError::damaged(&key)),
        }
    }

    /// The floor, or 0 where it is damaged: too much is looked for then, and nothing is passed over.
    pub(crate) async fn readable_floor(&self) -> Result<LogSeq, ReadError> {
        match self.floor().await {
            Err(e) if e.is_damage() => Ok(LogSeq(0)),
            other => other,
        }
    }

    /// The hint of the newest number; `None` where there is none.
    pub(crate) async fn hint(&self) -> Result<Option<LogSeq>, ReadError> {
        let key = self.keys.head();
        match get_optional(&*self.store, &key, SMALL).await? {
            None => Ok(None),
            Some(bytes) => read_seq(ObjectKind::Head, &bytes).map(Some).map_err(ReadError::damaged(&key)),
        }
    }

    /// The number of the newest record: from the hint, then onwards in growing steps, then between. Numbers are
    /// contiguous, so a few dozen probes find it whatever the hint says.
    pub async fn newest(&self) -> Result<LogSeq, ReadError> {
        let hint = match self.hint().await {
            Ok(hint) => hint,
            // A damaged hint is no loss: it is only where to begin.
            Err(e) if e.is_damage() => None,
            Err(e) => return Err(e),
        };
        self.newest_from(hint).await
    }

    pub(crate) async fn newest_from(&self, mut hint: Option<LogSeq>) -> Result<LogSeq, ReadError> {
        loop {
            let first = self.first_to_ask(hint.unwrap_or_default()).await?;
            let newest = self.probe(first).await?;
            let is_gap = match Some(first) == hint && newest.0 - first.0 <= STALE_HINT {
                true => self.is_gap_near(newest).await?,
                false => self.is_gap(newest).await?,
            };
            if self.readable_floor().await? > newest {
                // Pruned while this one looked, or slept: that is no gap, and the log is looked for anew.
                hint = Some(newest);
            } else if is_gap {
                return Err(ReadError::Log {
                    seq: newest.next(),
                    what: "it is missing, and there are records after it",
                });
            } else {
                return Ok(newest);
            }
        }
    }

    async fn probe(&self, first: LogSeq) -> Result<LogSeq, ReadError> {
        let mut low = first;
        let mut step = 1;
        let mut high = loop {
            let next = LogSeq(low.0 + step);
            if !self.exists(next).await? {
                break next;
            }
            low = next;
            step *= 2;
        };
        while high.0 - low.0 > 1 {
            let middle = LogSeq(low.0 + (high.0 - low.0) / 2);
            if self.exists(middle).await? { low = middle } else { high = middle }
        }
        Ok(low)
    }

    /// The hinted record, or the first of all. What lies below the floor does not exist, even where a writer that slept
    /// has put something: the log does not go on from there.
    async fn first_to_ask(&self, hint: LogSeq) -> Result<LogSeq, ReadError> {
        let mut floor = self.readable_floor().await?;
        if hint > floor && self.exists(hint).await? {
            return Ok(hint);
        }
        while !self.exists(floor).await? {
            // It may have been raised, and what lay below it deleted, since it was read.
            let raised = self.readable_floor().await?;
            if raised <= floor {
                return Err(ReadError::Log { seq: floor, what: "its first record is missing" });
            }
            floor = raised;
        }
        Ok(floor)
    }

    /// Numbers are contiguous: a record beyond the newest one that was found means that some between are gone. Nobody
    /// may write into such a gap, or take what lies before it for all there is. One LIST, which sees a gap of any length.
    pub(crate) async fn is_gap(&self, newest: LogSeq) -> Result<bool, ReadError> {
        let newest_key = self.keys.log(newest);
        let beyond = self.store.list(numbered_prefix(&newest_key), Some(&newest_key), 2).await?;
        let beyond = beyond.iter().filter_map(|(key, _)| number_of(key)).any(|seq| seq != newest.next());
        // The very next one may have been written while this one looked.
        Ok(beyond && !self.exists(newest.next()).await?)
    }

    /// The same for a search that began at the hint, which is half a minute old at most where its writer did not die:
    /// without a LIST, since all sessions and restores come this way.
    async fn is_gap_near(&self, newest: LogSeq) -> Result<bool, ReadError> {
        let probes = PROBED_AHEAD.map(|ahead| self.exists(LogSeq(newest.0.saturating_add(ahead))));
        let beyond = try_join_all(probes).await?.contains(&true);
        Ok(beyond && !self.exists(newest.next()).await?)
    }

    /// The newest record, its hash, and the newest point.
    pub async fn head(&self) -> Result<(GroupHead, ObjectDigest), ReadError> {
        let lost = |seq| ReadError::Log { seq, what: "the record went away" };
        let (record, hash) = loop {
            let seq = self.newest().await?;
            match self.read(seq).await? {
                Some(found) => break found,
                // Pruned since it was found: there are newer ones.
                None if self.readable_floor().await? > seq => {}
                None => return Err(lost(seq)),
            }
        };
        let mut candidate = record.clone();
        let point = loop {
            let at = candidate.seq;
            if let Some(point) = candidate.point() {
                break Some((at, point.clone()));
            }
            let Some(before) = at.0.checked_sub(1).map(LogSeq) else { break None };
            match self.read(before).await? {
                Some((record, _)) => candidate = record,
                // What was there before is not known: nobody may write as if there had been nothing.
                None if before >= self.floor().await? => return Err(lost(before)),
                None => break None,
            }
        };
        Ok((GroupHead { record, point }, hash))
    }

    /// THE commit: puts the record under its number, if nothing is there. A record with our own commit id in the way
    /// is our own lost success.
    pub async fn append(&self, record: &Record) -> Result<(Appended, ObjectDigest, usize), ReadError> {
        let bytes = Bytes::from(record.to_bytes());
        let (hash, len) = (Record::hash(&bytes), bytes.len());
        // A store that does not enforce the condition would overwrite: the only receiver looks first.
        if self.sharing == Sharing::OneReceiver
            && let Some((theirs, found)) = self.read(record.seq).await?
        {
            if theirs.commit != record.commit {
                return Ok((Appended::Theirs(Box::new(theirs)), found, len));
            }
            self.store.settle(self.keys.log(record.seq).as_str()).await?;
            return self.unless_pruned(record.seq, found, len).await;
        }
        let key = self.keys.log(record.seq);
        let put = match planted(Mutant::NoConditionalPut) {
            false => self.store.put_new(&key, bytes).await,
            true => self.store.put_hint(&key, bytes).await,
        };
        match put {
            Ok(()) => {}
            Err(e) if e.kind() == Kind::Exists => {
                let Some((theirs, found)) = self.read(record.seq).await? else {
                    // Somebody else's, and pruned since.
                    return match self.floor().await? > record.seq {
                        true => Ok((Appended::BelowFloor, hash, len)),
                        false => Err(ReadError::Log { seq: record.seq, what: "the record went away" }),
                    };
                };
                if theirs.commit != record.commit {
                    return Ok((Appended::Theirs(Box::new(theirs)), hash, len));
                }
                reached(Situation::AppendedBefore);
                return self.unless_pruned(record.seq, found, len).await;
            }
            Err(e) => return Err(e.into()),
        }
        self.unless_pruned(record.seq, hash, len).await
    }

    /// A record of our own is there. A writer that slept may have put a number that was deleted meanwhile: then it does
    /// not exist.
    async fn unless_pruned(
        &self,
        seq: LogSeq,
        hash: ObjectDigest,
        len: usize,
    ) -> Result<(Appended, ObjectDigest, usize), ReadError> {
        let is_pruned = !planted(Mutant::FloorNotRead) && self.floor().await? > seq;
        Ok((if is_pruned { Appended::BelowFloor } else { Appended::Ours }, hash, len))
    }

    /// Writes the hint of the newest number.
    pub async fn write_hint(&self, seq: LogSeq) -> Result<(), ReadError> {
        Ok(self.store.put_hint(&self.keys.head(), Bytes::from(write_seq(ObjectKind::Head, seq))).await?)
    }

    /// Writes the checkpoint at `seq` from the one before and the records since.
    pub async fn write_checkpoint(&self, seq: LogSeq) -> Result<(), ReadError> {
        let history = self.history().await?;
        // What is missing shows in any list of the log; what is damaged would be forgotten.
        let damaged = history.unreadable.iter().find(|(_, e)| !matches!(e, ReadError::Log { .. }));
        if let Some(e) = damaged.map(|(_, e)| e).or(history.broken.first()) {
            return Err(e.clone());
        }
        let mut points = history.points;
        points.retain(|p| p.seq <= seq);
        let lost = ReadError::Log { seq, what: "the record went away" };
        let (record, hash) = self.read(seq).await?.ok_or(lost)?;
        let checkpoint = Checkpoint { group: self.group(), seq, hash, generation: record.generation, points };
        let bytes = checkpoint.to_bytes();
        if bytes.len() > MAX_CHECKPOINT {
            // Nobody would read it.
            tracing::warn!(group = %self.group(), "too many points for another checkpoint: lists of points get slower");
            return Ok(());
        }
        match self.store.put_new(&self.keys.checkpoint(seq), Bytes::from(bytes)).await {
            Err(e) if e.kind() != Kind::Exists => Err(e.into()),
            _ => {
                reached(Situation::Checkpoint);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
#[path = "catalog_tests.rs"]
mod tests;
