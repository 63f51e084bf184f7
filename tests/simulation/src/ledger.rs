//! What a history must not forget: what agents offered, what they were told, what was violated, which situations were
//! reached, and a digest of everything that happened in its order.
//!
//! Read first: [`Ledger`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Arguments;
use std::sync::{Mutex, MutexGuard, PoisonError};

use backhaul_protocol::ids::{CommitId, GroupId, LogSeq, VolumeId, WriterNonce};
use backhaul_protocol::store::log::MachineId;
use tokio::time::Instant;

use crate::disk::Snapshot;

/// What an agent asked to be made a point.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Which agent, by its number in the history.
    pub node: usize,
    /// In which group.
    pub group: GroupId,
    /// What each volume held.
    pub volumes: Vec<(VolumeId, Snapshot)>,
    /// What the agent showed when it opened the round.
    pub shown: Shown,
}

/// What an agent shows of itself.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Its nonces.
    pub nonces: Vec<WriterNonce>,
    /// Its machine.
    pub machine: Option<MachineId>,
    /// The newest point that it saw committed.
    pub high_water: LogSeq,
}

/// The ledger of one history.
#[derive(Debug)]
pub struct Ledger(Mutex<Inner>, Instant);

#[derive(Debug)]
struct Inner {
    offers: BTreeMap<CommitId, Offer>,
    /// Offers whose answer does not count any more: the bucket that it is about was replaced.
    void: BTreeSet<CommitId>,
    acked: BTreeMap<(GroupId, LogSeq), CommitId>,
    /// The lowest number that exists of each group whose log was pruned.
    floors: BTreeMap<GroupId, LogSeq>,
    violations: Vec<String>,
    counts: BTreeMap<&'static str, u64>,
    hasher: blake3::Hasher,
    lines: Option<Vec<String>>,
    /// By the number of the agent.
    standing: Vec<Standing>,
    /// Commits whose records were written under numbers that had been deleted.
    below_floor: BTreeSet<CommitId>,
    /// Whether anything was given out or left in the store that is not what was written.
    harmed: bool,
    /// Whether a write was ever sent twice on its way.
    resent: bool,
}

/// Whether an agent may rightly be called diverged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    group: GroupId,
    /// Somebody else may be the writer of the group: state was copied or put back, or the operator chose.
    pub is_suspect: bool,
    /// How often it became so.
    pub times: u64,
}

impl Ledger {
    /// Empty. `keep` keeps every line of the trace.
    pub fn new(keep: bool) -> Self {
        let inner = Inner {
            offers: BTreeMap::new(),
            void: BTreeSet::new(),
            acked: BTreeMap::new(),
            floors: BTreeMap::new(),
            violations: Vec::new(),
            counts: BTreeMap::new(),
            hasher: blake3::Hasher::new(),
            lines: keep.then(Vec::new),
            standing: Vec::new(),
            below_floor: BTreeSet::new(),
            harmed: false,
            resent: false,
        };
        Self(Mutex::new(inner), Instant::now())
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Something happened.
    pub fn trace(&self, what: Arguments<'_>) {
        let line = format!("{:>9} {what}", self.1.elapsed().as_millis());
        let mut inner = self.lock();
        inner.hasher.update(line.as_bytes());
        if let Some(lines) = &mut inner.lines {
            lines.push(line);
        }
    }
    /// An invariant does not hold.
    pub fn violation(&self, invariant: &str, what: Arguments<'_>) {
        self.trace(format_args!("VIOLATION {invariant}: {what}"));
        self.lock().violations.push(format!("{invariant}: {what}"));
    }
    /// A situation was reached.
    pub fn count(&self, situation: &'static str) {
        *self.lock().counts.entry(situation).or_default() += 1;
    }
    /// An agent asks for a commit.
    pub fn offer(&self, commit: CommitId, offer: Offer) {
        self.lock().offers.insert(commit, offer);
    }
    /// What was offered under this id.
    pub fn offered(&self, commit: CommitId) -> Option<Offer> {
        self.lock().offers.get(&commit).cloned()
    }
    /// The next agent, by its number, is one of this group.
    pub fn add_agent(&self, group: GroupId) {
        self.lock().standing.push(Standing { group, is_suspect: false, times: 0 });
    }
    /// Whether an agent may be called diverged.
    pub fn standing(&self, node: usize) -> Standing {
        self.lock().standing[node]
    }
    /// From now on this agent may be called diverged.
    pub fn suspect(&self, node: usize) {
        self.lock().suspect(|number, _| number == node);
    }
    /// From now on all agents of the group may be.
    pub fn suspect_all(&self, group: GroupId) {
        self.lock().suspect(|_, standing| standing.group == group);
    }
    /// The operator made this group's agent the writer: where there are several copies of it, any of them.
    pub fn adopted(&self, group: GroupId) {
        let mut inner = self.lock();
        let own: Vec<usize> = (0..inner.standing.len()).filter(|n| inner.standing[*n].group == group).collect();
        match own[..] {
            [only] => inner.standing[only].is_suspect = false,
            _ => inner.suspect(|_, standing| standing.group == group),
        }
    }
    /// An agent was told that its point exists; what it was when it began the attempt.
    pub fn acked(&self, node: usize, began: Standing, seq: LogSeq, commit: CommitId) {
        let mut inner = self.lock();
        if inner.void.contains(&commit) {
            return;
        }
        let group = began.group;
        let newest = inner.acked.range((group, LogSeq(0))..=(group, LogSeq(u64::MAX))).next_back();
        // Nobody else may commit behind this one, unless something happened since.
        if newest.is_none_or(|((_, newest), _)| *newest <= seq) && inner.standing[node].times == began.times {
            inner.standing[node].is_suspect = false;
            inner.suspect(|number, standing| number != node && standing.group == group);
        }
        // What was told late may have been pruned since it was written.
        let is_pruned = inner.floors.get(&group).is_some_and(|floor| seq < *floor);
        let before = if is_pruned { None } else { inner.acked.insert((group, seq), commit) };
        let is_below = inner.below_floor.contains(&commit);
        drop(inner);
        if let Some(before) = before.filter(|b| *b != commit) {
            self.violation("I4", format_args!("point {seq} was acknowledged as {before} and as {commit}"));
        }
        if is_below {
            self.violation("I4", format_args!("point {seq} was acknowledged, and lay below the floor from the first"));
        }
    }
    /// A record was written under a number that had been deleted.
    pub fn below_floor(&self, commit: CommitId) {
        self.lock().below_floor.insert(commit);
    }
    /// Something is not what was written.
    pub fn harmed(&self) {
        self.lock().harmed = true;
    }
    /// A write was sent twice on its way.
    pub fn resent(&self) {
        self.lock().resent = true;
    }
    /// Whether any ever was.
    pub fn is_resent(&self) -> bool {
        self.lock().resent
    }
    /// Whether anything ever was.
    pub fn is_harmed(&self) -> bool {
        self.lock().harmed
    }
    /// Every acknowledged point of a group.
    pub fn all_acked(&self, group: GroupId) -> BTreeMap<LogSeq, CommitId> {
        let inner = self.lock();
        inner.acked.iter().filter(|((g, _), _)| *g == group).map(|((_, s), c)| (*s, *c)).collect()
    }
    /// Answers that are under way are about a bucket that is gone.
    pub fn void_offers(&self) {
        let mut inner = self.lock();
        inner.void = inner.offers.keys().copied().collect();
    }
    /// Points below the floor are gone, and more may come that are.
    pub fn pruned(&self, group: GroupId, floor: LogSeq) {
        self.lock().floors.insert(group, floor);
        self.forget_acked(group, |seq| seq >= floor);
    }
    /// Points that are gone because an operator wanted it.
    pub fn forget_acked(&self, group: GroupId, keep: impl Fn(LogSeq) -> bool) {
        self.lock().acked.retain(|(g, s), _| *g != group || keep(*s));
    }
    /// What does not hold.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }
    /// How often each situation was reached.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().counts.clone()
    }
    /// Digest of everything that happened.
    pub fn digest(&self) -> String {
        self.lock().hasher.finalize().to_hex()[..16].to_owned()
    }
    /// The trace, if it was kept.
    pub fn lines(&self) -> Vec<String> {
        self.lock().lines.clone().unwrap_or_default()
    }
    /// Groups with offers.
    pub fn groups(&self) -> BTreeSet<GroupId> {
        self.lock().offers.values().map(|o| o.group).collect()
    }
}

impl Inner {
    fn suspect(&mut self, whom: impl Fn(usize, Standing) -> bool) {
        for (number, standing) in self.standing.iter_mut().enumerate() {
            if whom(number, *standing) {
                standing.is_suspect = true;
                standing.times += 1;
            }
        }
    }
}
