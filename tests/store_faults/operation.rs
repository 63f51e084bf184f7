//! The operations: those of `ObjectStore`, opening a store, a race of two writers, and the probe of `init`.

use std::sync::Arc;

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::record::{Encoder, Verifier, split_record};
use backhaul_protocol::store::key::ObjectKey;
use backhaul_receiver::store::probe::probe;
use backhaul_receiver::store::{Kind, ObjectStore, StoreError, list_all};
use backhaul_tests::Random;
use backhaul_tests::s3::TestS3;
use bytes::Bytes;

use crate::cell::open;

/// One column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Opening a store.
    Open,
    /// `put_new` of a small object.
    Record,
    /// `put_new` of 1 MiB, more than sockets buffer.
    Segment,
    /// `put_new` of different bodies under one key, by two receivers at the same time.
    Race,
    /// `put_hint` over an older hint.
    Hint,
    /// `get`
    Get,
    /// `get_range` of a block record in a larger object.
    Range,
    /// `list` of more names than fit on a page.
    List,
    /// `delete`
    Delete,
    /// What `init` finds out.
    Probe,
}

/// How an operation ended, when it did not fail.
pub enum Done {
    /// As it should.
    Well,
    /// Other bytes than those of the object; whether the reader's own check finds it.
    Other { found_out: bool },
    /// So many of two writers believe that they won.
    Winners(usize),
    /// One receiver only, says the probe.
    OneReceiver,
    /// It is there still.
    Left,
    /// Of no use as a store, says the probe.
    Unfit,
}

/// Names in the list: one page and a little more.
const NAMES: usize = 1003;
/// Where the record of the range lies in its object.
const RECORD_AT: u64 = 1000;
const BLOCK: u32 = 16384;

pub fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

pub fn name_in_bucket(key: &ObjectKey) -> String {
    format!("p/{key}")
}

fn noise(seed: u64, len: usize) -> Bytes {
    Random::new(seed).bytes(len).into()
}

fn geometry() -> Geometry {
    Geometry::new(BLOCK, u64::from(BLOCK) * 10).unwrap()
}

/// A block record.
fn record() -> Vec<u8> {
    let block = Random::new(5).bytes(BLOCK as usize);
    let mut out = Vec::new();
    let mut encoder = Encoder::new(1).unwrap();
    encoder.encode(VolumeSlot(0), BlockIndex(3), CaptureNumber(9), BlockDigest::of(&block), &block, &mut out);
    out
}

/// Whether a reader would take these bytes for the block.
fn reader_takes(bytes: &[u8]) -> bool {
    let Ok(Some(split)) = split_record(bytes) else { return false };
    let mut verifier = Verifier::new().unwrap();
    let taken = verifier.verify(&split.header, split.payload, geometry()).is_ok();
    taken && split.header.block == BlockIndex(3) && split.header.capture == CaptureNumber(9)
}

impl Operation {
    pub const ALL: [Operation; 10] = [
        Operation::Open,
        Operation::Record,
        Operation::Segment,
        Operation::Race,
        Operation::Hint,
        Operation::Get,
        Operation::Range,
        Operation::List,
        Operation::Delete,
        Operation::Probe,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Operation::Open => "open",
            Operation::Record => "put",
            Operation::Segment => "put 1MiB",
            Operation::Race => "race",
            Operation::Hint => "hint",
            Operation::Get => "get",
            Operation::Range => "range",
            Operation::List => "list",
            Operation::Delete => "delete",
            Operation::Probe => "probe",
        }
    }

    /// The key that it is about.
    pub fn key(self) -> ObjectKey {
        key(match self {
            Operation::Record => "groups/a/log/00000000000000000001",
            Operation::Race => "groups/a/log/00000000000000000002",
            Operation::Segment => "groups/a/segments/one",
            Operation::Hint => "groups/a/head",
            Operation::Get => "groups/a/maps/one",
            Operation::Range => "groups/a/segments/there",
            Operation::Delete => "probe/gone",
            Operation::Open | Operation::List | Operation::Probe => "names/0000",
        })
    }

    /// What a write writes.
    pub fn body(self) -> Option<Bytes> {
        match self {
            Operation::Record => Some(noise(1, 900)),
            Operation::Segment => Some(noise(2, 1 << 20)),
            Operation::Hint => Some(noise(3, 72)),
            _ => None,
        }
    }

    /// What must be in the store before.
    pub async fn prepare(self, store: &dyn ObjectStore, s3: &TestS3) {
        match self {
            Operation::Hint => store.put_hint(&self.key(), noise(30, 72)).await.unwrap(),
            Operation::Get => store.put_new(&self.key(), noise(4, 20_000)).await.unwrap(),
            Operation::Delete => store.put_new(&self.key(), noise(6, 10)).await.unwrap(),
            Operation::Range => {
                let around = Random::new(7).bytes(RECORD_AT as usize);
                let body = [&around[..], &record(), &around].concat();
                store.put_new(&self.key(), body.into()).await.unwrap();
            }
            Operation::List => {
                for n in 0..NAMES {
                    s3.tamper(&format!("p/names/{n:04}"), Some(Bytes::new()));
                }
            }
            Operation::Open | Operation::Record | Operation::Segment | Operation::Race | Operation::Probe => {}
        }
    }

    /// Does it.
    pub async fn run(self, store: &Arc<dyn ObjectStore>, s3: &TestS3) -> Result<Done, StoreError> {
        let key = self.key();
        match self {
            Operation::Open => open(s3).await.map(|_| Done::Well),
            Operation::Record | Operation::Segment => {
                store.put_new(&key, self.body().expect("a write")).await.map(|()| Done::Well)
            }
            Operation::Hint => store.put_hint(&key, self.body().expect("a write")).await.map(|()| Done::Well),
            Operation::Delete => {
                store.delete(&key).await?;
                let is_there = s3.objects().contains_key(&name_in_bucket(&key));
                Ok(if is_there { Done::Left } else { Done::Well })
            }
            Operation::Race => race(store, &key, s3).await,
            Operation::Get => {
                let same = store.get(&key, 1 << 20).await? == noise(4, 20_000);
                Ok(if same { Done::Well } else { Done::Other { found_out: false } })
            }
            Operation::Range => {
                let record = record();
                let found = store.get_range(&key, RECORD_AT..RECORD_AT + record.len() as u64).await?;
                let other = Done::Other { found_out: !reader_takes(&found) };
                Ok(if found == record { Done::Well } else { other })
            }
            Operation::List => {
                let found = list_all(store, "names/").await?;
                let right = found.len() == NAMES
                    && found
                        .iter()
                        .enumerate()
                        .all(|(n, (key, size))| key.as_str() == format!("names/{n:04}") && *size == 0);
                Ok(if right { Done::Well } else { Done::Other { found_out: false } })
            }
            Operation::Probe => {
                let seen = probe(store).await?;
                Ok(match (seen.usable(), seen.several_receivers()) {
                    (false, _) => Done::Unfit,
                    (true, false) => Done::OneReceiver,
                    (true, true) => Done::Well,
                })
            }
        }
    }
}

/// I4: of two that write the same number at most one may believe that it did, and then its bytes are there.
async fn race(store: &Arc<dyn ObjectStore>, key: &ObjectKey, s3: &TestS3) -> Result<Done, StoreError> {
    let other = crate::cell::connect(s3).await;
    let bodies = [noise(11, 900), noise(12, 900)];
    let (one, two) = tokio::join!(store.put_new(key, bodies[0].clone()), other.put_new(key, bodies[1].clone()));
    let stored = s3.objects().get(&name_in_bucket(key)).cloned();
    let won: Vec<&Bytes> = bodies.iter().zip([&one, &two]).filter(|(_, r)| r.is_ok()).map(|(body, _)| body).collect();
    if let Some(body) = won.first()
        && won.len() == 1
        && stored.as_ref() != Some(body)
    {
        return Ok(Done::Other { found_out: false });
    }
    if !won.is_empty() {
        return Ok(Done::Winners(won.len()));
    }
    // The loser of a race that nobody seems to have won has seen the winner's object.
    let errors: Vec<StoreError> = [one, two].into_iter().filter_map(Result::err).collect();
    let first = errors.iter().find(|e| e.kind() != Kind::Exists).or(errors.first());
    Err(first.expect("both failed").clone())
}
