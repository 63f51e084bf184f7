//! I8, F27: whatever object is gone, a salvaging restore gives everything else and tells of each block that may be wrong.

use std::path::Path;

use backhaul_cli::Output;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::wire::message::PointSpec;
use backhaul_volume::target::Durability;

use super::*;
use crate::restore::{Outcome, Prepared, Request};
use crate::restore_error::RestoreError;
use crate::scrub::{Scrub, Share, verify_group};
use crate::store::mem::MemStore;
use crate::testing::{TestGroup, noise};

const BLOCK: usize = 16 << 10;
const BLOCKS: usize = 1100;
const POINTS: u64 = 14;

/// Numbers that a seed gives.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }
}

/// Some blocks become new, zero, or what they were at some time before.
fn change(random: &mut Random, volume: &mut [u8], kinds: &[Vec<u8>], count: usize) {
    for _ in 0..count {
        // Few, so that most are written several times.
        let at = random.below(BLOCKS / 8) * 8 * BLOCK;
        match random.below(kinds.len() + 2).checked_sub(2) {
            None => volume[at..at + BLOCK].fill(0),
            Some(kind) => volume[at..at + BLOCK].copy_from_slice(&kinds[kind]),
        }
    }
}

async fn history(seed: u64) -> (Arc<MemStore>, TestGroup, Vec<Vec<u8>>) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let store = Arc::new(MemStore::new());
    // Segments of a record or so: many, and so maps of both kinds.
    let mut group = TestGroup::new(store.clone(), BLOCK).await;
    let kinds: Vec<Vec<u8>> = (0..6).map(|i| noise(BLOCK, seed * 10 + i)).collect();
    // Full, so that changes stay in delta maps for a while.
    let (mut disk, mut other) = (kinds[0].repeat(BLOCKS), vec![0; BLOCKS * BLOCK]);
    let mut points = Vec::new();
    for point in 0..POINTS {
        // At last some that are in no map yet, in segments and in log records.
        let count = match POINTS - point {
            3 => 90,
            2 => 40,
            1 => 2,
            _ => [2, 40, 90][random.below(3)],
        };
        change(&mut random, &mut disk, &kinds, count);
        change(&mut random, &mut other, &kinds, 1);
        let mut volumes = vec![("disk", BLOCK as u32, &*disk)];
        if point >= 5 {
            volumes.push(("other", BLOCK as u32, &*other));
        }
        group.commit(&volumes).await;
        points.push(disk.clone());
    }
    (store, group, points)
}

async fn salvage(group: &TestGroup, to: &Path) -> Result<Outcome, RestoreError> {
    let request = Request {
        group: group.name.clone(),
        volume: Some("disk".parse().expect("a name")),
        point: PointSpec::Number(LogSeq(POINTS)),
        targets: vec![to.to_str().expect("text").to_owned()],
        refuse: Vec::new(),
        confirm: Vec::new(),
        durability: Durability::Cached,
        on_damage: OnDamage::Salvage,
    };
    let mut progress = Output::new(false, true, crate::cmd::meaning).progress(4);
    Prepared::new(group.catalog.clone(), request, &mut progress).await?.run(&mut progress).await
}

async fn damage(group: &TestGroup) -> Vec<Lost> {
    let log = group.catalog.expect_group(&group.name).await.expect("a group");
    let share = Share::parse("100%").expect("right");
    let threads = Arc::new(tokio::sync::Semaphore::new(2));
    let scrub = Scrub { group: group.name.clone(), log, volume: None, share, threads };
    let begin = |_, total| Output::new(false, true, crate::cmd::meaning).progress(1).phase("verify", total);
    let report = verify_group(&scrub, PointSpec::Latest, begin).await.expect("the store works");
    report.damaged.into_iter().map(|d| d.lost).collect()
}

/// What a salvage that lacks `key` must hold to.
fn check(outcome: &Outcome, found: &[u8], before: Option<&[u8]>, points: &[Vec<u8>], key: &ObjectKey) -> usize {
    let want = points.last().expect("points");
    let told = |at: usize, loss: Loss| {
        let covers = |l: &&Lost| l.start <= at as u64 && (at + BLOCK) as u64 <= l.end;
        outcome.lost.iter().filter(covers).any(|l| l.loss == loss)
    };
    let mut wrong = 0;
    for at in (0..want.len()).step_by(BLOCK) {
        let own = at..at + BLOCK;
        let (gone, uncertain) = (told(at, Loss::Gone), told(at, Loss::Uncertain));
        if gone {
            let left = before.map_or_else(|| vec![0; BLOCK], |b| b[own.clone()].to_vec());
            assert!(found[own.clone()] == left, "{key}: block at {at} is called gone and was written");
        }
        if found[own.clone()] == want[own.clone()] {
            continue;
        }
        wrong += 1;
        assert!(gone || uncertain, "{key}: block at {at} is wrong, and nobody says so: {:?}", outcome.lost);
        if !gone {
            let older = points.iter().any(|p| p[own.clone()] == found[own.clone()])
                || found[own.clone()].iter().all(|b| *b == 0);
            assert!(older, "{key}: block at {at} was never so");
        }
    }
    assert!(outcome.lost.iter().all(|l| l.volume == "disk"), "{key}: {:?}", outcome.lost);
    assert_eq!(outcome.verified == "incomplete", !outcome.lost.is_empty());
    wrong
}

async fn every_object_is_missed(seed: u64) -> (usize, usize) {
    let dir = tempfile::tempdir().expect("a folder");
    let (store, group, points) = history(seed).await;
    let (new, used) = (dir.path().join("new"), dir.path().join("used"));
    let garbage = noise(BLOCKS * BLOCK, 999);
    let (mut harmful, mut uncertain) = (0, 0);
    let log = group.catalog.expect_group(&group.name).await.expect("a group");
    let (_, point) = log.find(PointSpec::Latest).await.expect("a point");
    for (i, (key, bytes)) in store.objects().into_iter().enumerate() {
        let named = log.keys().object_id(&key).is_some_and(|id| names(&point, id));
        let often = match key.as_str().split('/').nth(2) {
            // Most were folded into others long ago.
            Some("maps") => {
                if named {
                    1
                } else {
                    10
                }
            }
            // They are many and alike.
            Some("segments") => {
                if named {
                    5
                } else {
                    60
                }
            }
            Some("log") => 2,
            _ => continue,
        };
        if !(i as u64 + seed).is_multiple_of(often) {
            continue;
        }
        store.tamper(&key, None);
        let _ = std::fs::remove_file(&new);
        // The record of the latest point itself: there is nothing to salvage by.
        if let Ok(outcome) = salvage(&group, &new).await {
            let wrong = check(&outcome, &std::fs::read(&new).expect("read"), None, &points, &key);
            harmful += usize::from(wrong > 0);
            uncertain += usize::from(outcome.lost.iter().any(|l| l.loss == Loss::Uncertain));
            if wrong > 0 || named {
                let found = damage(&group).await;
                assert!(found.iter().any(|l| l.object == key.as_str()), "{key} is not named: {found:?}");
            }
            std::fs::write(&used, &garbage).expect("written");
            let outcome = salvage(&group, &used).await.expect("salvaged as before");
            check(&outcome, &std::fs::read(&used).expect("read"), Some(&garbage), &points, &key);
        }
        store.tamper(&key, Some(bytes));
    }
    (harmful, uncertain)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_wrong_is_said_whatever_is_missing() {
    let seed = std::env::var("BACKHAUL_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or(1);
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("BACKHAUL_TEST_SEED={seed}\n").as_bytes());
    let (harmful, uncertain) = every_object_is_missed(seed).await;
    assert!(harmful > 5 && uncertain > 3, "{harmful} objects mattered, {uncertain} left something uncertain");
}

/// A delta that went after others came costs nothing where the others are newer in every block.
#[tokio::test]
async fn what_is_newer_than_the_hole_is_certain() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut disk = noise(64 * BLOCK, 1);
    group.commit_as(Consistency::Crash, &[("disk", BLOCK as u32, &disk)]).await;
    let first = store.objects().into_keys().find(|k| k.as_str().contains("/segments/")).expect("a segment");
    // Everything but the first block is written again.
    disk[BLOCK..].copy_from_slice(&noise(63 * BLOCK, 2));
    group.commit_as(Consistency::Crash, &[("disk", BLOCK as u32, &disk)]).await;
    store.tamper(&first, None);
    let log = group.catalog.expect_group(&group.name).await.expect("a group");
    let (_, point) = log.find(PointSpec::Latest).await.expect("a point");
    let opened = open_view(&log, &point, BadIndex::Rebuild).await.expect("the store works");
    assert!(!opened.holes.is_empty());
    let volume = opened.view.volumes[0].clone();
    let name = point.volumes[0].name.clone();
    let mut lost = behind_holes(&opened.view, &volume, &name, &opened.holes).await.expect("the store works");
    join_neighbours(&mut lost);
    assert!(lost.iter().all(|l| l.end <= BLOCK as u64) && !lost.is_empty(), "{lost:?}");
}
