//! Finding out what a store really enforces. Accepting a header proves nothing: of the S3 servers that were tried one
//! ignores `If-None-Match`, and one honours it and still lets 2 to 8 of 8 racing writers win. Read [`probe`] and
//! [`Capabilities`].

use std::fmt;
use std::sync::Arc;

use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::{Kind, ObjectStore, StoreError, Verb};

/// Writers of one race. The racy server that was measured let two or more of 8 win in every race.
const WRITERS: usize = 12;
/// Races. A server that is caught in one race of two escapes all of them once in 32 runs.
const ROUNDS: usize = 5;
/// Bytes of each racing object: large enough that a server is busy between looking and writing. Arbitrary.
const BODY: usize = 4096;

/// What a store does with racing writers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConditionalPut {
    /// One of them wins, every time it was tried.
    Atomic,
    /// One after the other is told apart, and at the same time up to this many win.
    Racy {
        /// The most that won one race.
        winners: usize,
    },
    /// Everybody wins and the last one stays.
    Ignored,
}

/// What a store was seen to do. Prints as sentences for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// What put-if-absent is worth. Anything but atomic means one receiver only.
    pub conditional_put: ConditionalPut,
    /// What was written is read back at once, and what was removed is gone at once.
    pub read_after_write: bool,
    /// A range of an object is that range.
    pub ranges: bool,
    /// What was written is listed at once, sorted, and pages join.
    pub list: bool,
    /// Objects can be removed. Without it the probe's own objects stay under `probe/`.
    pub delete: bool,
}

impl Capabilities {
    /// Whether several receivers may use the store at the same time.
    pub fn several_receivers(&self) -> bool {
        self.conditional_put == ConditionalPut::Atomic && self.read_after_write
    }
    /// Whether a single receiver may use the store.
    pub fn usable(&self) -> bool {
        self.read_after_write && self.ranges
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.conditional_put {
            ConditionalPut::Atomic => {
                write!(f, "Of {WRITERS} writers racing for one object exactly one won, {ROUNDS} times.")?;
            }
            ConditionalPut::Racy { winners } => write!(
                f,
                "Of {WRITERS} writers racing for one object up to {winners} believed that they won. \
                 Only one receiver may use this store."
            )?,
            ConditionalPut::Ignored => write!(
                f,
                "It replaces an object that it was told to create only if absent. Only one receiver may use this store."
            )?,
        }
        let say =
            |f: &mut fmt::Formatter<'_>, good: bool, yes: &str, no: &str| write!(f, " {}", if good { yes } else { no });
        let no = "It does not always show at once what was written or removed: it cannot be used.";
        say(f, self.read_after_write, "What was written can be read at once.", no)?;
        say(f, self.ranges, "Parts of objects can be read.", "It cannot read parts of objects: it cannot be used.")?;
        let no = "Its lists are late, unsorted or incomplete: drafts are sent again after a crash.";
        say(f, self.list, "Lists are complete and sorted.", no)?;
        let no = "Objects cannot be removed, so those of this probe stay under probe/.";
        say(f, self.delete, "Objects can be removed.", no)
    }
}

/// Tries out the store with about a hundred small objects under `probe/`, and removes them. Several probes may run at
/// the same time. Fails only when a call fails in a way that says nothing about what the store enforces.
pub async fn probe(store: &Arc<dyn ObjectStore>) -> Result<Capabilities, StoreError> {
    let run = format!("probe/{}", uuid::Uuid::now_v7().simple());
    let mut keys = Vec::new();
    let seen = look(store, &run, &mut keys).await;
    let mut delete = true;
    for key in &keys {
        match store.delete(key).await {
            Ok(()) => {}
            // A role that may only append is a good role.
            Err(error) if matches!(error.kind(), Kind::Permission | Kind::Config) => delete = false,
            Err(error) => return seen.and(Err(error)),
        }
    }
    let mut seen = Capabilities { delete, ..seen? };
    if delete && let Some(key) = keys.first() {
        seen.read_after_write &= matches!(store.get(key, BODY).await, Err(error) if error.is_not_found());
    }
    Ok(seen)
}

async fn look(store: &Arc<dyn ObjectStore>, run: &str, keys: &mut Vec<ObjectKey>) -> Result<Capabilities, StoreError> {
    let mut seen = Capabilities {
        conditional_put: ConditionalPut::Atomic,
        read_after_write: true,
        ranges: true,
        list: true,
        delete: true,
    };
    let key = new_key(run, "order", keys)?;
    seen.conditional_put = in_turn(store, &key).await?;
    seen.ranges = match store.get_range(&key, 1..3).await {
        Ok(body) => body.len() == 2 && body[..] == contents(0)[1..3],
        Err(error) if error.is_retryable() => return Err(error),
        Err(_) => false,
    };
    let mut most = 1;
    for round in 0..ROUNDS {
        let key = new_key(run, &format!("race{round}"), keys)?;
        let race = race(store, &key, contents).await?;
        most = most.max(race.winners);
        seen.read_after_write &= race.read_back;
    }
    if most > 1 {
        // What one receiver does alone: a new object, and the same one once more before the first answer has come.
        let key = new_key(run, "alone", keys)?;
        store.put_new(&key, contents(3)).await?;
        seen.read_after_write &= reads_as(store, &key, &[contents(3)]).await?;
        let key = new_key(run, "again", keys)?;
        let again = race(store, &key, |_| contents(4)).await?;
        seen.read_after_write &= again.winners > 0 && reads_as(store, &key, &[contents(4)]).await?;
    }
    if most > 1 && seen.conditional_put == ConditionalPut::Atomic {
        seen.conditional_put = ConditionalPut::Racy { winners: most };
    }
    seen.list = lists(store, run, keys).await?;
    Ok(seen)
}

fn new_key(run: &str, name: &str, keys: &mut Vec<ObjectKey>) -> Result<ObjectKey, StoreError> {
    let text = format!("{run}-{name}");
    let key = ObjectKey::parse(&text).map_err(|e| StoreError::new(Kind::Other, Verb::Open, text, e.to_string()))?;
    keys.push(key.clone());
    Ok(key)
}

/// Each writer's own bytes.
fn contents(writer: usize) -> Bytes {
    Bytes::from(format!("{writer:016}").repeat(BODY / 16))
}

/// One writer after the other.
async fn in_turn(store: &Arc<dyn ObjectStore>, key: &ObjectKey) -> Result<ConditionalPut, StoreError> {
    store.put_new(key, contents(0)).await?;
    match store.put_new(key, contents(1)).await {
        Ok(()) => {
            // Leaves what the other checks expect.
            store.put_hint(key, contents(0)).await?;
            Ok(ConditionalPut::Ignored)
        }
        Err(error) if error.is_exists() => Ok(ConditionalPut::Atomic),
        Err(error) => Err(error),
    }
}

struct Race {
    winners: usize,
    /// The winner's bytes were read back. Several may have spoiled each other's: one receiver writes no two contents under
    /// one name.
    read_back: bool,
}

async fn race(store: &Arc<dyn ObjectStore>, key: &ObjectKey, contents: fn(usize) -> Bytes) -> Result<Race, StoreError> {
    let start = Arc::new(Barrier::new(WRITERS));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, key, start) = (Arc::clone(store), key.clone(), Arc::clone(&start));
        writers.spawn(async move {
            start.wait().await;
            (writer, store.put_new(&key, contents(writer)).await)
        });
    }
    let mut winners = Vec::new();
    let mut failed = None;
    while let Some(done) = writers.join_next().await {
        match done {
            Ok((writer, Ok(()))) => winners.push(writer),
            Ok((_, Err(error))) if error.is_exists() => {}
            Ok((_, Err(error))) => failed = Some(error),
            Err(error) => {
                return Err(StoreError::new(Kind::Other, Verb::PutNew, key, "a writer was stopped").because(error));
            }
        }
    }
    // After all writers are done: nothing of theirs may arrive while the probe cleans up.
    if let Some(error) = failed {
        return Err(error);
    }
    let theirs: Vec<Bytes> = winners.iter().map(|winner| contents(*winner)).collect();
    let read_back = theirs.len() > 1 || reads_as(store, key, &theirs).await?;
    Ok(Race { winners: winners.len(), read_back })
}

async fn reads_as(store: &Arc<dyn ObjectStore>, key: &ObjectKey, expected: &[Bytes]) -> Result<bool, StoreError> {
    match store.get(key, BODY).await {
        Ok(found) => Ok(expected.contains(&found)),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a list in pages of two shows what was written, in order.
async fn lists(store: &Arc<dyn ObjectStore>, run: &str, keys: &[ObjectKey]) -> Result<bool, StoreError> {
    let mut expected = keys.to_vec();
    expected.sort();
    let mut found: Vec<ObjectKey> = Vec::new();
    // One page more than there can be: a server that ignores `after` does not end.
    for _ in 0..=keys.len() {
        let page = match store.list(run, found.last(), 2).await {
            Ok(page) => page,
            Err(error) if error.is_retryable() => return Err(error),
            Err(_) => return Ok(false),
        };
        let end = page.len() < 2;
        found.extend(page.into_iter().map(|(key, _)| key));
        if end {
            break;
        }
    }
    Ok(found == expected)
}
