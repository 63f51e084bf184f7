//! A simulated store: one bucket for all receivers, and each receiver's own bad luck with it. Whatever happens to log
//! records is watched: once there, they never change.
//!
//! Read first: [`Bucket`], then [`Door`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use backhaul_protocol::ids::{GroupId, LogSeq};
use backhaul_protocol::store::checkpoint::read_seq;
use backhaul_protocol::store::envelope::Kind as ObjectKind;
use backhaul_protocol::store::key::{GroupKeys, ObjectKey};
use backhaul_protocol::store::log::Record;
use backhaul_receiver::store::mem::MemStore;
use backhaul_receiver::store::{Kind, ObjectStore, StoreError, Verb};
use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use crate::chance::Chance;
use crate::gate::Gate;
use crate::ledger::Ledger;

/// How likely what goes wrong, 0 to 1.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Weather {
    /// Fails, and nothing was done.
    pub refused: f64,
    /// Is done, and the reply is lost.
    pub ambiguous: f64,
    /// Takes long: up to a minute.
    pub slow: f64,
    /// A read has one bit flipped.
    pub flipped: f64,
    /// No answer at all, for a quarter of an hour.
    pub silent: f64,
    /// No room for new objects.
    pub full: f64,
    /// Something on the way sends a write twice, and passes on what it is told the second time.
    #[serde(default)]
    pub resent: f64,
    /// A list does not have what was written within the last minute or less.
    #[serde(default)]
    pub stale: f64,
}

/// Where all objects are.
#[derive(Debug)]
pub struct Bucket {
    objects: MemStore,
    ledger: Arc<Ledger>,
    /// Of every log record that was ever there, its bytes; a changed one is a violation of I4. `None` once it was
    /// deleted: it may come back only below the floor, where it does not exist.
    records: Mutex<BTreeMap<ObjectKey, Option<Bytes>>>,
    /// Objects that were harmed, as they were.
    harmed: Mutex<BTreeMap<ObjectKey, Bytes>>,
    /// When each object was written last.
    written: Mutex<BTreeMap<ObjectKey, Instant>>,
}

impl Bucket {
    /// An empty one.
    pub fn new(ledger: Arc<Ledger>) -> Arc<Self> {
        Arc::new(Self {
            objects: MemStore::new(),
            ledger,
            records: Mutex::default(),
            harmed: Mutex::default(),
            written: Mutex::default(),
        })
    }
    /// Its objects, without weather.
    pub fn objects(&self) -> &MemStore {
        &self.objects
    }
    /// Puts the bucket back to what it was: an operator restored an old copy of it.
    pub fn roll_back(&self, to: &MemStore, orphans: bool) {
        let stays =
            |key: &ObjectKey| orphans && (key.as_str().contains("/segments/") || key.as_str().contains("/maps/"));
        for key in self.objects.objects().keys().filter(|k| !stays(k)) {
            self.objects.tamper(key, None);
        }
        for (key, body) in to.objects() {
            self.objects.tamper(&key, Some(body));
        }
        let records = self.objects.objects().into_iter().filter(|(key, _)| is_record(key));
        *lock(&self.records) = records.map(|(key, body)| (key, Some(body))).collect();
    }

    /// An object is not what it was any more.
    pub fn harm(&self, key: &ObjectKey, harmed: Option<Bytes>) {
        if let Some(before) = self.objects.objects().get(key) {
            lock(&self.harmed).entry(key.clone()).or_insert_with(|| before.clone());
            self.objects.tamper(key, harmed);
            self.ledger.harmed();
        }
    }

    /// Keys of what was harmed.
    pub fn harmed(&self) -> Vec<ObjectKey> {
        lock(&self.harmed).keys().cloned().collect()
    }

    /// A copy in which nothing was harmed.
    pub fn unharmed(&self) -> MemStore {
        let copy = self.objects.fork();
        for (key, body) in &*lock(&self.harmed) {
            copy.tamper(key, Some(body.clone()));
        }
        copy
    }

    /// Takes an object away for good, as retention does.
    pub fn delete(&self, key: &ObjectKey) {
        self.objects.tamper(key, None);
        if is_record(key) {
            lock(&self.records).insert(key.clone(), None);
        }
    }

    fn watch(&self, key: &ObjectKey) {
        if !is_record(key) {
            return;
        }
        let Some(now) = self.objects.objects().get(key).cloned() else { return };
        match lock(&self.records).insert(key.clone(), Some(now.clone())) {
            Some(Some(before)) if before == now => return,
            Some(Some(_)) => self.ledger.violation("I4", format_args!("log record {key} was replaced")),
            Some(None) => {
                self.ledger.count("record revived");
                if !self.is_below_floor(key) {
                    self.ledger.violation("I4", format_args!("log record {key} was deleted, and is there again"));
                }
            }
            None => {}
        }
        if self.is_below_floor(key) {
            self.ledger.count("record below the floor");
            let (group, seq) = place(key);
            if let Ok(record) = Record::parse(group, seq, &now) {
                self.ledger.below_floor(record.commit);
            }
        }
    }

    fn is_below_floor(&self, key: &ObjectKey) -> bool {
        let (group, seq) = place(key);
        let floor = self.objects.objects().get(&GroupKeys(group).floor()).cloned();
        floor.is_some_and(|bytes| read_seq(ObjectKind::Floor, &bytes).is_ok_and(|floor| seq < floor))
    }
}

/// Group and number of a log record's key.
fn place(key: &ObjectKey) -> (GroupId, LogSeq) {
    let parts: Vec<&str> = key.as_str().split('/').collect();
    let [_, group, _, number] = parts[..] else { panic!("{key} is no log record's") };
    let number = number.parse().expect("a number");
    (group.parse().expect("a group's id"), LogSeq(number))
}

fn is_record(key: &ObjectKey) -> bool {
    key.as_str().contains("/log/")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bucket as one process reaches it.
pub struct Door {
    bucket: Arc<Bucket>,
    gate: Gate,
    weather: Arc<Mutex<Weather>>,
    chance: Chance,
}

/// What happens to a call.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Luck {
    Good,
    Refused(Kind),
    Ambiguous,
    Flipped,
    Resent,
}

impl Door {
    /// For a process.
    pub fn new(bucket: Arc<Bucket>, gate: Gate, weather: Arc<Mutex<Weather>>, chance: Chance) -> Self {
        Self { bucket, gate, weather, chance }
    }

    async fn arrive(&self, verb: Verb, key: &str) -> (Luck, Duration) {
        let (w, chance) = (*lock(&self.weather), &self.chance);
        let writes = matches!(verb, Verb::PutNew | Verb::PutHint);
        let luck = if chance.happens(w.refused) {
            Luck::Refused(Kind::Unavailable)
        } else if writes && chance.happens(w.full) {
            Luck::Refused(Kind::NoSpace)
        } else if chance.happens(w.ambiguous) {
            Luck::Ambiguous
        } else if !writes && chance.happens(w.flipped) {
            Luck::Flipped
        } else if verb == Verb::PutNew && w.resent > 0.0 && chance.happens(w.resent) {
            Luck::Resent
        } else {
            Luck::Good
        };
        let mut delay = chance.millis(1, 15);
        if chance.happens(w.slow) {
            delay = chance.millis(100, 60_000);
        }
        if chance.happens(w.silent) {
            delay = Duration::from_secs(900);
        }
        // Before or after it is done.
        let before = if chance.happens(0.5) { delay } else { delay / 8 };
        tokio::time::sleep(before).await;
        self.gate.pass().await;
        self.bucket.ledger.trace(format_args!("{verb:?} {key} {luck:?}"));
        (luck, delay.saturating_sub(before))
    }

    async fn leave<T>(
        &self,
        (luck, after): (Luck, Duration),
        verb: Verb,
        key: &str,
        done: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        tokio::time::sleep(after).await;
        self.gate.pass().await;
        match luck {
            Luck::Ambiguous => Err(StoreError::new(Kind::Unavailable, verb, key, "the reply was lost")),
            _ => done,
        }
    }

    async fn write(&self, verb: Verb, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        let luck = self.arrive(verb, key.as_str()).await;
        if let Luck::Refused(kind) = luck.0 {
            return Err(StoreError::new(kind, verb, key, "simulated"));
        }
        let done = match verb {
            Verb::PutNew => self.bucket.objects.put_new(key, body).await,
            _ => self.bucket.objects.put_hint(key, body).await,
        };
        if done.is_ok() {
            lock(&self.bucket.written).insert(key.clone(), Instant::now());
        }
        self.bucket.watch(key);
        if luck.0 == Luck::Resent {
            self.bucket.ledger.resent();
            let exists = StoreError::new(Kind::Exists, verb, key, "sent twice on the way");
            return self.leave(luck, verb, key.as_str(), Err(exists)).await;
        }
        self.leave(luck, verb, key.as_str(), done).await
    }

    async fn read<T>(
        &self,
        verb: Verb,
        key: &str,
        call: impl Future<Output = Result<T, StoreError>> + Send,
        flip: impl FnOnce(T) -> T + Send,
    ) -> Result<T, StoreError>
    where
        T: Send,
    {
        let luck = self.arrive(verb, key).await;
        if let Luck::Refused(kind) = luck.0 {
            return Err(StoreError::new(kind, verb, key, "simulated"));
        }
        let done = call.await;
        let done = match luck.0 {
            Luck::Flipped => {
                self.bucket.ledger.harmed();
                done.map(flip)
            }
            _ => done,
        };
        self.leave(luck, verb, key, done).await
    }

    fn flip(&self, body: Bytes) -> Bytes {
        if body.is_empty() {
            return body;
        }
        let mut body = BytesMut::from(&body[..]);
        let at = self.chance.below(body.len() as u64) as usize;
        body[at] ^= 1 << self.chance.below(8);
        body.freeze()
    }
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Door")
    }
}

#[async_trait]
impl ObjectStore for Door {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.write(Verb::PutNew, key, body).await
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.write(Verb::PutHint, key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        let call = self.bucket.objects.get(key, max);
        self.read(Verb::Get, key.as_str(), call, |b| self.flip(b)).await
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        let call = self.bucket.objects.get_range(key, range);
        self.read(Verb::GetRange, key.as_str(), call, |b| self.flip(b)).await
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        let stale = lock(&self.weather).stale;
        let hidden =
            if stale > 0.0 && self.chance.happens(stale) { self.chance.millis(1, 60_000) } else { Duration::ZERO };
        let call = async {
            let mut listed = self.bucket.objects.list(prefix, after, limit).await?;
            let written = lock(&self.bucket.written);
            let before = listed.len();
            listed.retain(|(key, _)| written.get(key).is_none_or(|at| at.elapsed() >= hidden));
            if listed.len() < before {
                self.bucket.ledger.count("stale list");
            }
            Ok(listed)
        };
        self.read(Verb::List, prefix, call, |l| l).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        let luck = self.arrive(Verb::Delete, key.as_str()).await;
        if let Luck::Refused(kind) = luck.0 {
            return Err(StoreError::new(kind, Verb::Delete, key, "simulated"));
        }
        self.bucket.delete(key);
        self.leave(luck, Verb::Delete, key.as_str(), Ok(())).await
    }
    fn describe(&self) -> String {
        "a simulated bucket".into()
    }
}
