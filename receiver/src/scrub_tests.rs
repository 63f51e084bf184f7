//! I8: damage is found, wherever it is, and named.

use bytes::Bytes;

use super::*;
use crate::catalog::Catalog;
use crate::salvage::object_of;
use crate::store::mem::MemStore;
use crate::testing::{TestGroup, noise};

async fn check(group: &TestGroup, share: &str) -> Result<GroupReport, FetchError> {
    let scrub = Scrub {
        group: group.name.clone(),
        log: group.catalog.expect_group(&group.name).await?,
        volume: None,
        share: Share::parse(share).expect("right"),
        threads: Arc::new(Semaphore::new(2)),
    };
    let mut progress = backhaul_cli::Output::new(false, true, crate::cmd::meaning).progress(1);
    verify_group(&scrub, PointSpec::Latest, |_, total| progress.phase("", total)).await
}

/// Two points, the second with records inside its log record.
async fn group() -> (Arc<MemStore>, TestGroup, usize) {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut bytes = noise(4 << 20, 1);
    group.commit(&[("disk", 16384, &bytes)]).await;
    bytes[100_000] ^= 1;
    group.commit(&[("disk", 16384, &bytes)]).await;
    (store, group, bytes.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_whole_is_called_so() {
    let (_, group, len) = group().await;
    let report = check(&group, "100%").await.expect("checked");
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
    let report = report.point.expect("a point");
    assert_eq!((report.point, report.bytes_verified), (2, len as u64));
    assert!(report.volumes[0].digest_matches && report.volumes[0].blocks_read == 256);
    let report = check(&group, "0%").await.expect("checked").point.expect("a point");
    assert_eq!((report.bytes_verified, report.volumes[0].blocks), (0, 256));
    for _ in 0..20 {
        let report = check(&group, "25%").await.expect("checked").point.expect("a point");
        assert!((62..=66).contains(&report.volumes[0].blocks_read), "{}", report.volumes[0].blocks_read);
    }
    assert!(Share::parse("101%").is_err() && Share::parse("-1").is_err() && Share::parse("x").is_err());
}

/// What a writer that slept has put below the floor does not exist, and is no damage.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_is_revived_below_the_floor_is_no_damage() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    for point in 0..3 {
        group.commit(&[("disk", 16384, &noise(4 << 20, point))]).await;
    }
    group.prune(LogSeq(3)).await;
    // One that record 3 does not continue.
    let keys = group.state.log().keys();
    store.tamper(&keys.log(LogSeq(2)), Some(Bytes::from_static(b"something else")));
    let report = check(&group, "100%").await.expect("checked");
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
}

/// Objects that no restore reads: who may come in, and who was seen when.
const NOT_FOR_RESTORES: [&str; 5] = ["tokens/", "redeemed/", "revoked/", "seen/", "/agents/"];

/// Keys of everything that `verify` calls damaged, of all points of all groups.
async fn damaged(store: &Arc<MemStore>, all_points: bool) -> Vec<String> {
    let (catalog, format) = Catalog::open_to_read(store.clone()).await.expect("the store works");
    let located = catalog.locate().await.expect("the store works");
    let mut found: Vec<String> = format.iter().chain(&located.damaged).map(object_of).collect();
    for (name, log) in located.groups {
        let numbers = log.history().await.expect("the store works").points;
        let older = numbers.iter().map(|p| PointSpec::Number(p.seq)).filter(|_| all_points);
        let share = Share::parse("100%").expect("right");
        let scrub = Scrub { group: name, log, volume: None, share, threads: Arc::new(Semaphore::new(2)) };
        for spec in std::iter::once(PointSpec::Latest).chain(older) {
            let mut progress = backhaul_cli::Output::new(false, true, crate::cmd::meaning).progress(1);
            let report = verify_group(&scrub, spec, |_, total| progress.phase("", total)).await;
            found.extend(report.expect("the store works").damaged.into_iter().map(|d| d.lost.object));
        }
    }
    found
}

/// A store with every kind of object: segments, folded maps, records inside the log, a hint, a checkpoint's place.
async fn one_of_each() -> Arc<MemStore> {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 24 << 10).await;
    let mut bytes = noise(140 * 16384, 1);
    group.commit(&[("disk", 16384, &bytes)]).await;
    bytes[100_000] ^= 1;
    group.commit(&[("disk", 16384, &bytes)]).await;
    let log = group.catalog.expect_group(&group.name).await.expect("a group");
    log.write_hint(LogSeq(2)).await.expect("the store works");
    for part in ["format", "names/", "/log/", "/segments/", "/maps/", "/head"] {
        assert!(store.objects().keys().any(|k| k.as_str().contains(part)), "no {part} in the store");
    }
    store
}

/// Places to flip: all of the ends, where heads, indexes and tables are, and some in between.
fn places(len: usize, dense: bool) -> Vec<usize> {
    let (ends, steps) = if dense { (200, 40) } else { (0, 5) };
    let between = (0..len).step_by(len / steps + 1);
    let mut all: Vec<usize> = (0..ends.min(len)).chain(len.saturating_sub(ends)..len).chain(between).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// There is no byte of any object that a point needs whose damage `verify` passes over.
#[tokio::test(flavor = "multi_thread")]
async fn any_flipped_byte_is_found() {
    let store = one_of_each().await;
    assert_eq!(damaged(&store, true).await, Vec::<String>::new());
    let mut dense = std::collections::BTreeMap::<String, usize>::new();
    for (key, whole) in store.objects() {
        if NOT_FOR_RESTORES.iter().any(|part| key.as_str().contains(part)) {
            continue;
        }
        store.tamper(&key, None);
        let needed = !damaged(&store, true).await.is_empty();
        store.tamper(&key, Some(whole.clone()));
        // What a fold left behind.
        if !needed && key.as_str().contains("/maps/") {
            continue;
        }
        let kind = key.as_str().rsplit_once('/').map_or(key.as_str(), |(folder, _)| folder).to_owned();
        let so_far = dense.entry(kind).or_default();
        *so_far += 1;
        for at in places(whole.len(), *so_far <= 2) {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 0x10;
            store.tamper(&key, Some(Bytes::from(bytes)));
            let mut found = damaged(&store, false).await;
            if !found.iter().any(|object| object == key.as_str()) {
                found = damaged(&store, true).await;
            }
            assert!(
                found.iter().any(|object| object == key.as_str()),
                "{key}: byte {at} of {}: {found:?}",
                whole.len()
            );
        }
        store.tamper(&key, Some(whole));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_index_is_damage_all_the_same() {
    let (store, group, len) = group().await;
    let key = store.objects().into_keys().find(|k| k.as_str().contains("/segments/")).expect("a segment");
    let mut bytes = store.objects()[&key].to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    store.tamper(&key, Some(Bytes::from(bytes)));
    let report = check(&group, "100%").await.expect("checked");
    let [damage] = &report.damaged[..] else { panic!("{:?}", report.damaged) };
    assert_eq!(damage.lost.object, key.as_str());
    assert_eq!(report.point.expect("a point").bytes_verified, len as u64, "no block is lost");
}
