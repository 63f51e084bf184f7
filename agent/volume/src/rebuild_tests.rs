//! I9: what is compared, written and read back is what is there.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::target::TargetNeeds;
use crate::testing::{LoopDevice, noise, patiently, root, verified};

const BLOCK: u64 = 16 << 10;

fn open(path: &Path, length: u64) -> Target {
    let confirm = path.starts_with("/dev").then(|| path.display().to_string());
    let needs = TargetNeeds { length, confirm, ..TargetNeeds::default() };
    patiently(|| Target::check(path, &needs), |_| true).expect("accepted").open().expect("opened")
}

fn digests(g: Geometry, want: &[u8], page: PageIndex) -> Vec<BlockDigest> {
    let start = g.offset(page.first_block()).0 as usize;
    want[start..start + g.page_len(page) as usize].chunks(BLOCK as usize).map(BlockDigest::of).collect()
}

/// What a restore does, without a store: bytes changed.
fn rebuild(target: &Target, g: Geometry, want: &[u8]) -> u64 {
    let (mut comparer, mut writer) = (Comparer::new(target, g), BlockWriter::new(target, g, Durability::Device));
    let mut changed = 0;
    for page in (0..g.pages()).map(PageIndex) {
        let (found, read) = comparer.look(target, page).expect("read");
        assert_eq!(target.is_fresh(), found == Found::Fresh && read == 0);
        let difference = Difference::of(g, page, &digests(g, want, page), &found);
        for range in difference.zero {
            changed += range.end - range.start;
            target.write_zeroes(range).expect("zeroed");
        }
        for i in difference.fetch.iter() {
            let block = page.first_block().0 + i as u64;
            let range = block_range(g, BlockIndex(block));
            let plain = &want[range.start as usize..range.end as usize];
            verified(g, block, plain, |b| writer.push(target, b)).expect("written");
            changed += plain.len() as u64;
        }
        writer.flush(target).expect("written");
    }
    changed
}

fn check(target: &Target, g: Geometry, want: &[u8]) {
    let ranges: Vec<RangeDigest> = (0..g.pages()).map(|p| RangeDigest::of(&digests(g, want, PageIndex(p)))).collect();
    for durability in [Durability::Device, Durability::Cached] {
        target.finish(durability).expect("finished");
        let told = AtomicU64::new(0);
        let progress = |n| {
            told.fetch_add(n, Ordering::Relaxed);
        };
        let read = verify_all(target, g, durability, 3, &progress).expect("read");
        assert_eq!(read.ranges, ranges, "{durability:?}");
        assert_eq!(read.digest, VolumeDigester::of(g, &ranges));
        assert_eq!((read.bytes, told.into_inner()), (g.length(), g.length()));
        assert_eq!(read.from_device, durability == Durability::Device);
        assert!(read.differing(&ranges).is_empty());
    }
}

/// Two pages and a bit, with zeroes at the start of a page and at the end, and a short last block.
fn volume(seed: u64) -> (Geometry, Vec<u8>) {
    let mut want = noise((2100 * BLOCK + 333) as usize, seed);
    want[(1024 * BLOCK) as usize..(1100 * BLOCK) as usize].fill(0);
    want[(2050 * BLOCK) as usize..(2080 * BLOCK) as usize].fill(0);
    (Geometry::new(BLOCK as u32, want.len() as u64).expect("legal"), want)
}

#[test]
fn files_become_what_they_must_be() {
    let dir = tempfile::tempdir().expect("a folder");
    let (g, want) = volume(1);
    let mut near = want.clone();
    near[(7 * BLOCK + 1) as usize] ^= 1;
    near[(1030 * BLOCK) as usize] = 9;
    for (name, before, changes) in [
        ("new", None, Some(g.length() - 106 * BLOCK)),
        ("used", Some(noise(want.len() + 5000, 2)), None),
        ("near", Some(near), Some(2 * BLOCK)),
        ("equal", Some(want.clone()), Some(0)),
    ] {
        let path = dir.path().join(name);
        if let Some(before) = before {
            std::fs::write(&path, before).expect("written");
        }
        let target = open(&path, g.length());
        let changed = rebuild(&target, g, &want);
        assert!(changes.is_none_or(|c| c == changed), "{name}: {changed}");
        check(&target, g, &want);
        assert!(std::fs::read(&path).expect("read") == want, "{name}");
    }
}

#[test]
fn what_changed_since_is_found_block_by_block() {
    let dir = tempfile::tempdir().expect("a folder");
    let (g, want) = volume(3);
    let path = dir.path().join("x");
    std::fs::write(&path, &want).expect("written");
    let target = open(&path, g.length());
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("opened");
    for at in [1050 * BLOCK + 5, 1051 * BLOCK, g.length() - 1] {
        file.write_all_at(b"\xee", at).expect("written");
    }
    file.sync_all().expect("flushed");
    let ranges: Vec<RangeDigest> = (0..g.pages()).map(|p| RangeDigest::of(&digests(g, &want, PageIndex(p)))).collect();
    for durability in [Durability::Device, Durability::Cached] {
        let read = verify_all(&target, g, durability, 2, &|_| ()).expect("read");
        assert_eq!(read.differing(&ranges), [PageIndex(1), PageIndex(2)]);
        let found = |page| {
            let expected = digests(g, &want, page);
            differing_ranges(&target, g, durability, page, &expected).expect("read")
        };
        assert_eq!(found(PageIndex(1))[..], *std::slice::from_ref(&(1050 * BLOCK..1052 * BLOCK)));
        assert_eq!(found(PageIndex(2))[..], *std::slice::from_ref(&(2100 * BLOCK..g.length())));
        assert!(found(PageIndex(0)).is_empty());
    }
}

#[test]
fn devices_become_what_they_must_be() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (g, want) = volume(4);
    let image = dir.path().join("disk");
    std::fs::write(&image, noise((2200 * BLOCK) as usize, 5)).expect("an image");
    let device = LoopDevice::over(&image, &[]);
    for expected in [None, Some(0)] {
        let target = open(&device.node, g.length());
        let changed = rebuild(&target, g, &want);
        assert!(expected.is_none_or(|e| e == changed), "{changed}");
        check(&target, g, &want);
    }
    assert!(std::fs::read(&image).expect("read")[..want.len()] == want);
}

#[test]
fn a_volume_that_cannot_be_read_back_is_an_error() {
    let dir = tempfile::tempdir().expect("a folder");
    let (g, want) = volume(6);
    let path = dir.path().join("x");
    std::fs::write(&path, &want).expect("written");
    let target = open(&path, g.length());
    std::fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(1500 * BLOCK)).expect("cut off");
    for durability in [Durability::Device, Durability::Cached] {
        let read = verify_all(&target, g, durability, 2, &|_| ());
        assert!(matches!(read, Err(TargetError::Io { .. })), "{durability:?}: {read:?}");
    }
}
