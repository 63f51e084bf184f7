//! I8, I9, I11, F27: what is restored is what the point holds, or it is said what is not.

use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_cli::Output;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::digest::is_zero;
use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::wire::message::PointSpec;
use bytes::Bytes;

use super::*;
use crate::dry_run::dry_run;
use crate::read_error::ReadError;
use crate::restore::{Outcome, Prepared, Request};
use crate::salvage::Loss;
use crate::store::mem::MemStore;
use crate::survey::survey;
use crate::testing::{TestGroup, noise};

const BLOCK: usize = 16 << 10;

fn request(to: &[&str]) -> Request {
    Request {
        group: "web".parse().expect("a name"),
        volume: None,
        point: PointSpec::Latest,
        targets: to.iter().map(|t| (*t).to_owned()).collect(),
        refuse: Vec::new(),
        confirm: Vec::new(),
        durability: Durability::Device,
        on_damage: OnDamage::Fail,
    }
}

async fn restore(group: &TestGroup, request: Request) -> Result<Outcome, RestoreError> {
    let mut progress = progress();
    Prepared::new(group.catalog.clone(), request, &mut progress).await?.run(&mut progress).await
}

fn progress() -> backhaul_cli::Progress {
    Output::new(false, true, crate::cmd::meaning).progress(4)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Two and a half pages with zero runs in the middle and at the end, and a short last block.
fn volume(seed: u64) -> Vec<u8> {
    let mut bytes = noise(2500 * BLOCK + 777, seed);
    bytes[100 * BLOCK..180 * BLOCK].fill(0);
    bytes[1020 * BLOCK..1500 * BLOCK].fill(0);
    bytes[2400 * BLOCK..2450 * BLOCK].fill(0);
    bytes
}

async fn group_with(volumes: &[(&str, u32, &[u8])]) -> (Arc<MemStore>, TestGroup) {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 2 << 20).await;
    group.commit(volumes).await;
    (store, group)
}

fn segments(store: &MemStore) -> Vec<ObjectKey> {
    store.objects().into_keys().filter(|k| k.as_str().contains("/segments/")).collect()
}

fn tamper(store: &MemStore, key: &ObjectKey, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = store.objects()[key].to_vec();
    change(&mut bytes);
    store.tamper(key, Some(Bytes::from(bytes)));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_new_longer_shorter_equal_and_nearly_equal() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(1);
    let (_, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let mut near = want.clone();
    near[5 * BLOCK] ^= 1;
    near[1200 * BLOCK..1300 * BLOCK].fill(3);
    let cases: [(&str, Option<Vec<u8>>); 5] = [
        ("new", None),
        ("longer", Some(noise(want.len() + 70_000, 9))),
        ("shorter", Some(noise(want.len() / 3, 9))),
        ("equal", Some(want.clone())),
        ("near", Some(near)),
    ];
    for (name, before) in cases {
        let path = dir.path().join(name);
        if let Some(before) = &before {
            std::fs::write(&path, before).expect("written");
        }
        for durability in [Durability::Device, Durability::Cached] {
            let outcome = restore(&group, Request { durability, ..request(&[text(&path)]) }).await.expect("restored");
            assert!(std::fs::read(&path).expect("read") == want, "{name}");
            assert_eq!(outcome.digest.as_deref(), Some(&*outcome.volumes[0].expected), "{name}");
            assert_eq!(outcome.bytes_verified, want.len() as u64);
            assert!(outcome.lost.is_empty() && outcome.metadata_bytes > 0);
            match (name, durability) {
                ("new", Durability::Device) => {
                    assert_eq!(outcome.bytes_read, 0, "a new file is not read");
                    let data = want.chunks(BLOCK).filter(|c| !is_zero(c)).map(<[u8]>::len).sum::<usize>() as u64;
                    assert_eq!(outcome.bytes_written, data, "and its zeroes are not written");
                }
                ("near", Durability::Device) => assert_eq!(outcome.bytes_written, 101 * BLOCK as u64),
                (_, Durability::Cached) | ("equal", _) => {
                    assert_eq!((outcome.bytes_written, outcome.bytes_fetched), (0, 0), "{name}");
                    assert!(outcome.bytes_read > 0);
                }
                _ => assert!(outcome.bytes_written > 0),
            }
            assert_eq!(outcome.verified == "cached", durability == Durability::Cached, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn points_of_a_group_that_grows_and_changes() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut content: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let (mut a, mut b) = (volume(2), noise(3 << 20, 3));
    for round in 0..6u64 {
        a[(round as usize * 300) * BLOCK..][..20 * BLOCK].copy_from_slice(&noise(20 * BLOCK, 100 + round));
        a[(round as usize * 100 + 7) * BLOCK..][..BLOCK].fill(0);
        b.extend_from_slice(&noise(100_000, 50 + round));
        group.commit(&[("a", BLOCK as u32, &a), ("b", 65536, &b)]).await;
        content.push((a.clone(), b.clone()));
    }
    let (to_a, to_b) = (dir.path().join("a"), dir.path().join("b"));
    let to = [format!("a={}", text(&to_a)), format!("b={}", text(&to_b))];
    for seq in [3u64, 1, 6, 2, 5, 4] {
        let wanted = Request { point: PointSpec::Number(LogSeq(seq)), ..request(&[&to[0], &to[1]]) };
        let outcome = restore(&group, wanted).await.expect("restored");
        let (want_a, want_b) = &content[seq as usize - 1];
        assert!(&std::fs::read(&to_a).expect("read") == want_a && &std::fs::read(&to_b).expect("read") == want_b);
        assert_eq!((outcome.point, outcome.volumes.len(), outcome.digest), (seq, 2, None));
    }
    let one = Request { volume: Some("b".parse().expect("a name")), ..request(&[text(&to_a)]) };
    restore(&group, one).await.expect("restored");
    assert!(std::fs::read(&to_a).expect("read") == content[5].1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_write_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let bytes = noise(100_000, 4);
    let (_, group) = group_with(&[("a", 65536, &bytes), ("b", 65536, &bytes)]).await;
    let path = dir.path().join("x");
    let [a, b] = ["a", "b"].map(|n| format!("{n}={}", text(&path)));
    let other = format!("b={}/y", text(dir.path()));
    for to in [vec![text(&path)], vec![&a], vec![&a, &b], vec![&a, &a], vec![&a, &other, &b], vec!["c=/x", &a]] {
        let refused = restore(&group, request(&to)).await.expect_err("refused");
        assert!(matches!(refused, RestoreError::Request(_)), "{to:?}: {refused}");
    }
    let missing = [
        Request { volume: Some("c".parse().expect("a name")), ..request(&[text(&path)]) },
        Request { group: "mail".parse().expect("a name"), ..request(&[&a, &other]) },
        Request { point: PointSpec::Number(LogSeq(7)), ..request(&[&a, &other]) },
    ];
    for wanted in missing {
        let refused = restore(&group, wanted).await.expect_err("refused");
        assert!(matches!(refused, RestoreError::Read(ReadError::NotFound(_))), "{refused}");
    }
    // The second target is refused: the first is not touched.
    let bad = format!("b={}", text(dir.path()));
    let refused = restore(&group, request(&[&a, &bad])).await.expect_err("refused");
    assert!(matches!(refused, RestoreError::Target(TargetError::Refused { .. })), "{refused}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("a folder").count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn fuzzy_points_only_by_number() {
    let dir = tempfile::tempdir().expect("a folder");
    let bytes = noise(100_000, 4);
    let mut group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
    group.commit_as(Consistency::Fuzzy, &[("a", 65536, &bytes)]).await;
    let path = dir.path().join("x");
    let refused = restore(&group, request(&[text(&path)])).await.expect_err("refused");
    assert!(matches!(refused, RestoreError::Read(ReadError::NotFound(_))) && !path.exists());
    let named = Request { point: PointSpec::Number(LogSeq(1)), ..request(&[text(&path)]) };
    assert_eq!(restore(&group, named).await.expect("restored").consistency, "fuzzy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_costs_one_block() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(5);
    let (store, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let key = segments(&store).into_iter().nth(3).expect("several segments");
    tamper(&store, &key, |bytes| bytes[40_000] ^= 0x40);

    let path = dir.path().join("fails");
    let error = restore(&group, request(&[text(&path)])).await.expect_err("damaged");
    let RestoreError::Damaged(lost) = &error else { panic!("{error}") };
    assert!(lost.iter().all(|l| l.object == key.as_str()), "{error}");
    let said = error.to_string();
    assert!(said.contains(key.as_str()) && said.contains("volume disk, bytes"), "{said}");
    assert!(is_zero(&std::fs::read(&path).expect("read")[..1 << 20]), "the target shows that it is not whole");

    for (name, before) in [("new", None), ("used", Some(noise(want.len(), 77)))] {
        let path = dir.path().join(name);
        if let Some(before) = &before {
            std::fs::write(&path, before).expect("written");
        }
        let salvage = Request { on_damage: OnDamage::Salvage, ..request(&[text(&path)]) };
        let outcome = restore(&group, salvage).await.expect("salvaged");
        let [lost] = &outcome.lost[..] else { panic!("{:?}", outcome.lost) };
        assert_eq!((lost.end - lost.start, lost.start % BLOCK as u64), (BLOCK as u64, 0));
        assert_eq!((&*lost.volume, &*lost.object), ("disk", key.as_str()));
        let mut expected = want.clone();
        let range = lost.start as usize..lost.end as usize;
        match &before {
            Some(before) => expected[range.clone()].copy_from_slice(&before[range]),
            None => expected[range].fill(0),
        }
        assert!(std::fs::read(&path).expect("read") == expected, "{name}: everything else is there");
        assert_eq!(outcome.volumes[0].lost_blocks, if before.is_some() { "left as they were" } else { "zero" });
        assert_ne!(outcome.volumes[0].digest, outcome.volumes[0].expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_segment_index_is_made_anew_from_the_records() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(15);
    let (store, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let key = segments(&store).into_iter().nth(2).expect("several segments");
    tamper(&store, &key, |bytes| *bytes.last_mut().expect("bytes") ^= 1);
    let path = dir.path().join("x");
    let outcome = restore(&group, request(&[text(&path)])).await.expect("nothing is lost");
    let [told] = &outcome.damaged[..] else { panic!("{:?}", outcome.damaged) };
    assert_eq!(told.object, key.as_str());
    assert!(outcome.lost.is_empty() && std::fs::read(&path).expect("read") == want);
}

/// One whose blocks are known from a map, and one whose blocks nobody knows any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_segment() {
    let dir = tempfile::tempdir().expect("a folder");
    for mapped in [true, false] {
        let want = volume(16);
        let store = Arc::new(MemStore::new());
        // Segments of one record or so: so many are folded into maps.
        let size = if mapped { BLOCK } else { 2 << 20 };
        let mut group = TestGroup::new(store.clone(), size).await;
        group.commit(&[("disk", BLOCK as u32, &want)]).await;
        let key = segments(&store).into_iter().nth(2).expect("several segments");
        store.tamper(&key, None);
        let path = dir.path().join(format!("x{mapped}"));
        let error = restore(&group, request(&[text(&path)])).await.expect_err("damaged");
        assert!(error.is_damage() && error.to_string().contains(key.as_str()), "{error}");
        assert!(!path.exists(), "it is missed before anything is written");
        let salvage = Request { on_damage: OnDamage::Salvage, ..request(&[text(&path)]) };
        let outcome = restore(&group, salvage).await.expect("salvaged");
        assert!(
            !outcome.lost.is_empty() && outcome.lost.iter().all(|l| l.object.contains(key.as_str())),
            "{outcome:?}"
        );
        let found = std::fs::read(&path).expect("read");
        assert_eq!(found.len(), want.len());
        let differing = found.chunks(BLOCK).zip(want.chunks(BLOCK)).enumerate().filter(|(_, (a, b))| a != b);
        let differing: Vec<u64> = differing.map(|(i, _)| (i * BLOCK) as u64).collect();
        assert!(!differing.is_empty() && differing.len() < 500, "{}", differing.len());
        let gone: Vec<_> = outcome.lost.iter().filter(|l| l.loss == Loss::Gone).collect();
        assert!(differing.iter().all(|at| gone.iter().any(|l| (l.start..l.end).contains(at))));
        let sure = |l: &&&Lost| want[l.start as usize..l.end as usize].chunks(BLOCK).all(|b| !is_zero(b));
        assert!(gone.iter().find(sure).is_some() && gone[0].start > 0, "{gone:?}");
        assert!(error.to_string().contains("volume disk, bytes"), "{error}");
        if mapped {
            let listed: u64 = outcome.lost.iter().map(|l| l.end - l.start).sum();
            assert_eq!(listed, (differing.len() * BLOCK) as u64, "not one more is called lost");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_restore_is_continued() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(6);
    let (store, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let path = dir.path().join("x");
    // Stopped by damage half-way: what was written stays.
    let key = segments(&store).into_iter().next_back().expect("several segments");
    let whole = store.objects()[&key].clone();
    tamper(&store, &key, |bytes| bytes[5000] ^= 1);
    restore(&group, request(&[text(&path)])).await.expect_err("damaged");
    store.tamper(&key, Some(whole));
    let outcome = restore(&group, request(&[text(&path)])).await.expect("restored");
    assert!(std::fs::read(&path).expect("read") == want);
    assert!(outcome.bytes_written < want.len() as u64 / 2, "{} written again", outcome.bytes_written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_changes_behind_our_back_is_noticed() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(7);
    let (_, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let path = dir.path().join("x");
    let mut progress = progress();
    let prepared =
        Prepared::new(group.catalog.clone(), request(&[text(&path)]), &mut progress).await.expect("prepared");
    std::fs::write(&path, b"mine").expect("written");
    let refused = prepared.run(&mut progress).await.expect_err("it appeared");
    assert!(matches!(refused, RestoreError::Target(TargetError::Refused { .. })), "{refused}");
    assert_eq!(std::fs::read(&path).expect("read"), b"mine");

    let log = group.catalog.expect_group(&group.name).await.expect("a group");
    let (_, point) = log.find(PointSpec::Latest).await.expect("a point");
    let view = View::open(log.store(), log.keys(), &point).await.expect("a view");
    let volume = view.volumes[0].clone();
    let name = point.volumes[0].name.clone();
    let survey = survey(&view, &volume, &name, OnDamage::Fail, |_| ()).await.expect("an index");
    let needs = backhaul_volume::target::TargetNeeds { length: want.len() as u64, ..Default::default() };
    let target = Arc::new(Target::check(&path, &needs).expect("fits").open().expect("opened"));
    let mut restoring = Restoring {
        store: log.store().clone(),
        keys: log.keys(),
        view: Arc::new(view),
        volume,
        name,
        target: target.clone(),
        durability: Durability::Device,
        on_damage: OnDamage::Fail,
        unknown: Arc::default(),
        threads: Arc::new(Semaphore::new(2)),
    };
    restoring.write(|_| ()).await.expect("written");
    for durability in [Durability::Device, Durability::Cached] {
        restoring.durability = durability;
        restoring.finish().await.expect("finished");
        let verified = restoring.verify(&survey, &[], |_| ()).await.expect("equal");
        assert_eq!(verified.digest, point.volumes[0].digest);
    }
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
    for at in [1030 * BLOCK, 2000 * BLOCK, 2001 * BLOCK] {
        file.write_all_at(b"\x55", at as u64).expect("written");
    }
    file.sync_all().expect("flushed");
    for durability in [Durability::Device, Durability::Cached] {
        restoring.durability = durability;
        let error = restoring.verify(&survey, &[], |_| ()).await.expect_err("differs");
        let RestoreError::Differs { ranges, .. } = &error else { panic!("{error}") };
        let b = BLOCK as u64;
        assert_eq!(ranges[..], [1030 * b..1031 * b, 2000 * b..2002 * b]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(8);
    let (_, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let path = dir.path().join("x");
    for before in [None, Some(want[..want.len() / 2].to_vec()), Some(noise(want.len() + 5, 3))] {
        if let Some(before) = &before {
            std::fs::write(&path, before).expect("written");
        }
        let mut progress = progress();
        let prepared =
            Prepared::new(group.catalog.clone(), request(&[text(&path)]), &mut progress).await.expect("prepared");
        let plan = dry_run(prepared, &mut progress).await.expect("planned");
        assert_eq!(std::fs::read(&path).ok(), before);
        let v = &plan.volumes[0];
        assert_eq!(v.equal + v.zeroed + v.written, want.len() as u64);
        let copy = dir.path().join("copy");
        let _ = std::fs::remove_file(&copy);
        if let Some(before) = &before {
            std::fs::write(&copy, before).expect("written");
        }
        let outcome = restore(&group, request(&[text(&copy)])).await.expect("restored");
        assert!(outcome.bytes_written >= v.written + v.zeroed, "shortening a file erases its first MiB");
        assert!(outcome.bytes_written <= v.written + v.zeroed + (1 << 20));
        assert!(plan.to_string().contains("nothing was written"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_restored_in_place() {
    if !crate::testing::root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(10);
    let (_, group) = group_with(&[("disk", BLOCK as u32, &want)]).await;
    let device = crate::testing::LoopDevice::over(&dir.path().join("disk"), &noise(want.len() + (3 << 20), 12));
    let refused = restore(&group, request(&[&device.0])).await.expect_err("it has content");
    assert!(matches!(&refused, RestoreError::Target(TargetError::Refused { .. })), "{refused}");
    for (confirm, fits) in [("/dev/sdx", false), (&*device.0, true)] {
        let wanted = Request { confirm: vec![confirm.to_owned()], ..request(&[&device.0]) };
        let outcome = restore(&group, wanted).await;
        assert_eq!(outcome.is_ok(), fits, "{confirm}: {outcome:?}");
        if let Ok(outcome) = outcome {
            assert_eq!((outcome.verified, outcome.bytes_read), ("device", want.len() as u64));
        }
    }
    let mut back = vec![0; want.len()];
    std::fs::File::open(dir.path().join("disk")).and_then(|f| f.read_exact_at(&mut back, 0)).expect("read");
    assert!(back == want);
}
