//! After a history one object of the store is harmed, as a disk or a person does it: whatever is restored is right, or the
//! restore fails, and `verify` knows of it (I8, I9).
//!
//! Read first: [`harm`].

use std::sync::Arc;

use backhaul_cli::Output;
use backhaul_protocol::ids::{LogSeq, Name};
use backhaul_protocol::session::sink::GroupHead;
use backhaul_protocol::store::key::{GroupKeys, ObjectKey};
use backhaul_protocol::store::map::{MapRef, PAGES_START};
use backhaul_protocol::wire::message::PointSpec;
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::scrub::{PointReport, Scrub, Share, verify_group};
use backhaul_receiver::store::ObjectStore;
use bytes::{Bytes, BytesMut};
use tokio::sync::Semaphore;

use crate::chance::Chance;
use crate::history::{Group, World};
use crate::oracle::{compare, is_named, restored};

/// Newest points that are looked at.
const POINTS: usize = 4;

/// Harms one object in a copy of the store and looks at what is left.
pub async fn harm(world: &World, chance: &Chance) {
    let group = &world.groups[chance.below(world.groups.len() as u64) as usize];
    let store = world.bucket.objects().fork();
    let own = format!("groups/{}/", group.id);
    let has_data =
        |key: &ObjectKey| ["/log/", "/segments/", "/maps/", "/checkpoints/"].iter().any(|p| key.as_str().contains(p));
    let objects = store.objects();
    let keys: Vec<&ObjectKey> = objects.keys().filter(|k| k.as_str().starts_with(&own) && has_data(k)).collect();
    if keys.is_empty() {
        return;
    }
    let key = keys[chance.below(keys.len() as u64) as usize];
    let body = objects[key].clone();
    let (what, harmed) = match chance.below(4) {
        0 => ("gone", None),
        1 => ("cut off", Some(body.slice(..chance.below(body.len() as u64) as usize))),
        2 => {
            let like = |k: &&&ObjectKey| k.as_str().split('/').nth(2) == key.as_str().split('/').nth(2);
            let others: Vec<&&ObjectKey> = keys.iter().filter(like).collect();
            ("another one", Some(objects[*others[chance.below(others.len() as u64) as usize]].clone()))
        }
        _ => ("flipped", Some(flipped(&body, chance))),
    };
    world.ledger.count("object harmed");
    world.ledger.trace(format_args!("harm: {key} is {what}"));
    let harmed_is_gone = harmed.is_none();
    store.tamper(key, harmed);
    let points = points(world, group).await;
    let store: Arc<dyn ObjectStore> = Arc::new(store);
    // A log that ends earlier is whole: what was its last record is missed by the agent only (I4, high water).
    let is_end = |seq: LogSeq| harmed_is_gone && *key == GroupKeys(group.id).log(seq);
    let points: Vec<LogSeq> = points.into_iter().rev().take(POINTS).collect();
    let newest = points.first().copied();
    for seq in points.into_iter().filter(|seq| Some(*seq) != newest || !is_end(*seq)) {
        look(world, &store, group, seq, key, what).await;
    }
}

fn flipped(body: &Bytes, chance: &Chance) -> Bytes {
    let mut body = BytesMut::from(&body[..]);
    let at = chance.below(body.len() as u64) as usize;
    body[at] ^= 1 << chance.below(8);
    body.freeze()
}

/// The points that there were before.
async fn points(world: &World, group: &Group) -> Vec<LogSeq> {
    let store: Arc<dyn ObjectStore> = Arc::new(world.bucket.objects().fork());
    let Ok(catalog) = Catalog::open(store).await else { return Vec::new() };
    let history = catalog.log(group.id).whole_history().await;
    history.map(|h| h.points.iter().map(|p| p.seq).collect()).unwrap_or_default()
}

async fn look(world: &World, store: &Arc<dyn ObjectStore>, group: &Group, seq: LogSeq, key: &ObjectKey, what: &str) {
    let (ledger, name) = (&world.ledger, &group.name);
    let Ok(Some((record, _))) = world.log(group.id).await.read(seq).await else { return };
    let (Some(point), Some(offer)) = (record.point(), ledger.offered(record.commit)) else { return };
    let mut failed = Vec::new();
    for volume in &point.volumes {
        let Some((_, offered)) = offer.volumes.iter().find(|(id, _)| *id == volume.id) else { continue };
        match restored(world, store.clone(), name, seq, &volume.name).await {
            // Wrong bytes are a violation, and `compare` says so.
            Ok(bytes) => compare(world, name, point, seq, &volume.name, offered, &bytes),
            Err(error) => {
                if !is_named(std::slice::from_ref(key), &error) && !is_numbered(key, &error) {
                    let what = format_args!("{key} is {what}: a restore of {name}@{seq} says {error:#}");
                    ledger.violation("I8", what);
                }
                failed.push(format!("{}: {error}", volume.name));
            }
        }
    }
    ledger.count(if failed.is_empty() { "harmless" } else { "harm prevented a restore" });
    if failed.is_empty() {
        return;
    }
    let found = found(store, name, group, seq).await;
    if !found.iter().any(|damaged| damaged.contains(key.as_str())) {
        ledger.violation("I8", format_args!("{key} is {what}: verify finds in {name}@{seq} {found:?}, and {failed:?}"));
    }
}

/// Whether the error is about this record of the log, by its number.
fn is_numbered(key: &ObjectKey, error: &anyhow::Error) -> bool {
    let number = key.as_str().rsplit_once("/log/").and_then(|(_, number)| number.parse::<u64>().ok());
    number.is_some_and(|number| format!("{error:#}").contains(&format!("record {number}:")))
}

/// `verify` of a store that nobody harmed: the newest point of each group, and an older one.
pub async fn verify(world: &World) {
    let store: Arc<dyn ObjectStore> = Arc::new(world.bucket.objects().fork());
    for group in &world.groups {
        let points = points(world, group).await;
        let older = points.len().checked_sub(4).and_then(|at| points.get(at));
        for seq in points.last().into_iter().chain(older) {
            let found = found(&store, &group.name, group, *seq).await;
            world.ledger.count("healthy point verified");
            if !found.is_empty() {
                world.ledger.violation("I8", format_args!("{}@{seq} is healthy, verify finds {found:?}", group.name));
            }
        }
    }
}

/// Harms a map that the newest point of an agent's group needs, so that who opens it must notice.
pub async fn harm_map(world: &World, node: usize, chance: &Chance) {
    let log = world.log(world.nodes[node].identity.group).await;
    let Ok((GroupHead { point: Some((_, point)), .. }, _)) = log.head().await else { return };
    let maps: Vec<MapRef> = point.volumes.iter().filter_map(|v| v.base).chain(point.deltas.iter().copied()).collect();
    if maps.is_empty() {
        return;
    }
    let key = log.keys().map(chance.pick(&maps).id);
    let Some(body) = world.bucket.objects().objects().get(&key).cloned() else { return };
    let harmed = match chance.below(3) {
        0 => None,
        1 => Some(body.slice(..chance.below(PAGES_START as u64) as usize)),
        _ => {
            let mut head = BytesMut::from(&body[..]);
            head[chance.below(PAGES_START as u64) as usize] ^= 1 << chance.below(8);
            Some(head.freeze())
        }
    };
    world.bucket.harm(&key, harmed);
    world.ledger.count("map harmed");
    world.ledger.trace(format_args!("harm: {key}"));
}

/// What `verify` finds: keys of objects, and why.
async fn found(store: &Arc<dyn ObjectStore>, name: &Name, group: &Group, seq: LogSeq) -> Vec<String> {
    let catalog = match Catalog::open(store.clone()).await {
        Ok(catalog) => catalog,
        Err(error) => return vec![error.to_string()],
    };
    let scrub = Scrub {
        group: name.clone(),
        log: catalog.log(group.id),
        volume: None,
        share: Share::parse("100%").expect("a percentage"),
        threads: Arc::new(Semaphore::new(2)),
    };
    let mut progress = Output::new(false, true, |_| None).progress(1);
    match verify_group(&scrub, PointSpec::Number(seq), |_, total| progress.phase("verify", total)).await {
        Ok(report) => {
            let wrong = |p: &PointReport| p.volumes.iter().filter(|v| !v.digest_matches).count();
            let mut found: Vec<String> =
                report.damaged.iter().map(|d| format!("{}: {}", d.lost.object, d.lost.cause)).collect();
            match report.point {
                Some(point) if wrong(&point) > 0 && found.is_empty() => found.push("a digest does not match".into()),
                None if found.is_empty() => found.push("no point".into()),
                _ => {}
            }
            found
        }
        Err(error) => vec![error.to_string()],
    }
}
