//! I9: what is restored is what is on the medium, whole, and never half without showing it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};

use backhaul_protocol::geometry::BlockIndex;

use super::*;
use crate::rebuild::Existing;
use crate::testing::{LoopDevice, Mount, can, noise, patiently, root, run, verified};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;

fn geometry(length: u64) -> Geometry {
    Geometry::new(BLOCK as u32, length).expect("legal")
}

fn open(path: &Path, length: u64) -> Target {
    let confirm = path.starts_with("/dev").then(|| path.display().to_string());
    let needs = TargetNeeds { length, confirm, ..TargetNeeds::default() };
    let busy = |e: &TargetError| matches!(e, TargetError::Refused { why: Refusal::Busy, .. });
    patiently(|| Target::check(path, &needs), busy).expect("accepted").open().expect("opened")
}

/// Writes every block of `want`, zero blocks as zeroes, in the given order of blocks.
fn restore(target: &Target, want: &[u8], blocks: impl Iterator<Item = u64>) {
    let g = geometry(want.len() as u64);
    for n in blocks {
        let start = g.offset(BlockIndex(n)).0;
        let plain = &want[start as usize..][..g.block_len(BlockIndex(n))];
        if is_zero(plain) {
            target.write_zeroes(start..start + plain.len() as u64).expect("zeroed");
        } else {
            verified(g, n, plain, |b| target.write_block(b, g)).expect("written");
        }
    }
}

fn content(target: &Target) -> Vec<u8> {
    let mut all = vec![0; target.length() as usize];
    target.read_at(ByteOffset(0), &mut all).expect("read");
    all
}

fn read_back(target: &Target) -> (Vec<u8>, ReadBack) {
    let mut all = vec![0; target.length() as usize];
    let how = target.read_back(ByteOffset(0), &mut all).expect("read back");
    (all, how)
}

/// Noise with a hole of zero blocks and a tail of no particular length.
fn volume(len: u64, seed: u64) -> Vec<u8> {
    let mut bytes = noise(len as usize, seed);
    bytes[(2 * MIB) as usize..(3 * MIB) as usize].fill(0);
    bytes
}

#[test]
fn files_new_longer_shorter_and_empty() {
    let dir = tempfile::tempdir().expect("a folder");
    let want = volume(5 * MIB + 777, 1);
    let g = geometry(want.len() as u64);
    for (name, old) in [("new", None), ("longer", Some(9 * MIB)), ("shorter", Some(3 * MIB)), ("empty", Some(0))] {
        let path = dir.path().join(name);
        if let Some(len) = old {
            std::fs::write(&path, noise(len as usize, 99)).expect("written");
        }
        let target = open(&path, g.length());
        assert_eq!(target.is_fresh(), old.unwrap_or(0) == 0, "{name}");
        if target.is_fresh() {
            assert_eq!(target.next_data(ByteOffset(0)).expect("asked"), None);
            assert!(is_zero(&content(&target)));
        }
        restore(&target, &want, (0..g.blocks()).rev());
        assert!(content(&target) == want, "{name}: what will be");
        assert_eq!(target.next_data(ByteOffset(5)).expect("asked"), Some(5..MIB), "{name}: the waiting MiB is data");
        assert!(is_zero(&std::fs::read(&path).expect("read")[..MIB as usize]), "{name}: the first MiB waits");
        target.finish(Durability::Device).expect("finished");
        assert!(std::fs::read(&path).expect("read") == want, "{name}");
        let (back, how) = read_back(&target);
        assert!(back == want && how != ReadBack::Cached, "{name}: {how:?}");
        let allocated = std::fs::metadata(&path).expect("stat").blocks() * 512;
        assert!(allocated <= 5 * MIB, "{name}: zeroes are a hole, not {allocated} bytes");
    }
}

#[test]
fn memory_is_not_called_a_device() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        can("a tmpfs at /dev/shm", false);
        return;
    };
    let want = volume(4 * MIB + 1, 2);
    let target = open(&dir.path().join("a"), want.len() as u64);
    restore(&target, &want, 0..geometry(want.len() as u64).blocks());
    target.finish(Durability::Device).expect("finished");
    assert!(read_back(&target) == (want, ReadBack::Cached));
}

#[test]
fn a_killed_restore_shows_and_is_continued() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a");
    let (old, want) = (volume(4 * MIB, 3), volume(4 * MIB, 4));
    std::fs::write(&path, &old).expect("written");
    let target = open(&path, 4 * MIB);
    assert!(content(&target) == old, "opening changes nothing");
    restore(&target, &want, [60].into_iter());
    assert_eq!(content(&target)[..MIB as usize], old[..MIB as usize], "the old MiB is kept in memory to compare with");
    assert!(is_zero(&std::fs::read(&path).expect("read")[..MIB as usize]), "and gone from the medium");
    drop(target);

    let target = open(&path, 4 * MIB);
    restore(&target, &want, 0..64);
    target.finish(Durability::Cached).expect("finished");
    assert!(std::fs::read(&path).expect("read") == want);
    drop(target);

    // Nothing to change: nothing is touched, not even its times.
    let before = std::fs::metadata(&path).expect("stat");
    let target = open(&path, 4 * MIB);
    assert!(content(&target) == want);
    target.finish(Durability::Device).expect("finished");
    let after = std::fs::metadata(&path).expect("stat");
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
}

#[test]
fn a_file_that_is_cut_or_grown_is_marked_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    for length in [2 * MIB, 5 * MIB] {
        let path = dir.path().join("a");
        std::fs::write(&path, noise((3 * MIB) as usize, 5)).expect("written");
        drop(open(&path, length));
        let now = std::fs::read(&path).expect("read");
        assert!(now.len() as u64 == length && is_zero(&now[..MIB as usize]));
    }
}

#[test]
fn device_first_mib_last_short_tail_and_nothing_behind() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 8 * MIB);
    let old = noise((8 * MIB) as usize, 6);
    File::options().write(true).open(&disk.node).and_then(|f| f.write_all_at(&old, 0)).expect("written");
    let want = volume(5 * MIB + 777, 7);
    let g = geometry(want.len() as u64);
    let target = open(&disk.node, g.length());
    assert!(!target.is_fresh() && target.is_device());
    assert!(content(&target) == old[..want.len()]);
    assert!(std::fs::read(&disk.image).expect("read") == old, "opening writes nothing");

    let mut run_of = VerifiedRun::new(g, 4 << 20);
    for n in 0..g.blocks() {
        let start = g.offset(BlockIndex(n)).0;
        let plain = &want[start as usize..][..g.block_len(BlockIndex(n))];
        if is_zero(plain) {
            target.write_zeroes(start..start + BLOCK).expect("zeroed");
            continue;
        }
        if !verified(g, n, plain, |b| run_of.push(b)) {
            target.write_run(&run_of).expect("written");
            run_of.clear();
            assert!(verified(g, n, plain, |b| run_of.push(b)));
        }
    }
    target.write_run(&run_of).expect("written");
    let on_disk = std::fs::read(&disk.image).expect("read");
    assert!(is_zero(&on_disk[..MIB as usize]), "nothing takes it for a disk yet");
    assert!(on_disk[MIB as usize..want.len()] == want[MIB as usize..]);
    assert!(content(&target) == want);

    target.finish(Durability::Device).expect("finished");
    assert!(read_back(&target) == (want.clone(), ReadBack::Direct));
    let on_disk = std::fs::read(&disk.image).expect("read");
    assert!(on_disk[..want.len()] == want);
    assert!(on_disk[want.len()..] == old[want.len()..], "behind the volume is not ours");
    drop(target);
    assert!(std::fs::read(&disk.node).expect("read")[..want.len()] == want, "through the cache, too");
}

/// Random writes and zeroes against bytes in memory: no stale byte, whatever the alignment.
fn same_as_model(path: &Path, length: u64, seed: u64) {
    let g = geometry(length);
    let target = open(path, length);
    let mut model = content(&target);
    let mut x = seed;
    let mut random = |below: u64| {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (x >> 33) % below
    };
    for i in 0..300 {
        if random(2) == 0 {
            let n = random(g.blocks());
            let plain = noise(g.block_len(BlockIndex(n)), i);
            verified(g, n, &plain, |b| target.write_block(b, g)).expect("written");
            let at = g.offset(BlockIndex(n)).0 as usize;
            model[at..at + plain.len()].copy_from_slice(&plain);
        } else {
            let start = random(length);
            let end = start + random(300_000).min(length - start);
            target.write_zeroes(start..end).expect("zeroed");
            model[start as usize..end as usize].fill(0);
        }
        if i % 50 == 0 {
            assert!(content(&target) == model, "seed {seed} step {i}");
        }
        if i % 90 == 0 {
            target.finish(if i % 180 == 0 { Durability::Device } else { Durability::Cached }).expect("finished");
        }
    }
    target.finish(Durability::Device).expect("finished");
    assert!(content(&target) == model && read_back(&target).0 == model, "seed {seed}");
}

#[test]
fn zeroing_leaves_no_stale_byte_in_files() {
    let dir = tempfile::tempdir().expect("a folder");
    for seed in 0..4 {
        same_as_model(&dir.path().join("a"), 3 * MIB + 12_345, seed);
    }
    same_as_model(&dir.path().join("small"), 70_001, 9);
}

#[test]
fn zeroing_leaves_no_stale_byte_on_devices() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    for (sector, seed) in [("512", 10), ("4096", 11)] {
        let image = dir.path().join(sector);
        std::fs::write(&image, noise((4 * MIB) as usize, seed)).expect("written");
        let disk = LoopDevice::over(&image, &["-b", sector]);
        same_as_model(&disk.node, 3 * MIB + 12_345, seed);
        let rest = std::fs::read(&image).expect("read").split_off((3 * MIB + 12_345) as usize);
        assert_eq!(rest, noise((4 * MIB) as usize, seed)[(3 * MIB + 12_345) as usize..], "behind the volume");
    }
}

#[test]
fn several_threads_write_at_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = root().then(|| LoopDevice::new(dir.path(), "a", 8 * MIB));
    let paths = disk.iter().map(|d| d.node.clone()).chain([dir.path().join("file")]);
    for path in paths {
        let want = volume(6 * MIB + 5, 12);
        let blocks = geometry(want.len() as u64).blocks();
        let target = open(&path, want.len() as u64);
        std::thread::scope(|s| {
            for t in 0..4 {
                let (target, want) = (&target, &want);
                s.spawn(move || restore(target, want, (t..blocks).step_by(4)));
            }
        });
        target.finish(Durability::Device).expect("finished");
        assert!(read_back(&target).0 == want, "{}", path.display());
    }
}

#[test]
fn only_what_fits_gets_in() {
    let dir = tempfile::tempdir().expect("a folder");
    let target = open(&dir.path().join("a"), 3 * BLOCK);
    let (g, longer) = (geometry(3 * BLOCK), geometry(4 * BLOCK));
    let block = noise(BLOCK as usize, 1);
    let misfit = |r: Result<(), TargetError>| assert!(matches!(r, Err(TargetError::Misfit { .. })), "{r:?}");
    misfit(verified(longer, 3, &block, |b| target.write_block(b, g)));
    misfit(verified(longer, 1, &block, |b| target.write_block(b, longer)));
    misfit(target.write_zeroes(0..3 * BLOCK + 1));
    assert!(target.read_back(ByteOffset(3 * BLOCK), &mut [0]).is_err());
    assert!(target.read_at(ByteOffset(3 * BLOCK), &mut [0]).is_err());

    let mut run = VerifiedRun::new(g, 2 * BLOCK as usize);
    target.write_run(&run).expect("nothing to do");
    assert!(!verified(longer, 3, &block, |b| run.push(b)) && run.is_empty(), "not of this volume");
    assert!(verified(g, 1, &block, |b| run.push(b)));
    assert!(!verified(g, 1, &block, |b| run.push(b)) && !verified(g, 0, &block, |b| run.push(b)), "not adjacent");
    assert!(verified(g, 2, &block, |b| run.push(b)));
    assert_eq!((run.offset(), run.bytes().len() as u64), (ByteOffset(BLOCK), 2 * BLOCK));
    target.write_run(&run).expect("written");
    target.finish(Durability::Cached).expect("finished");
    assert_eq!(read_back(&target).0, [vec![0; BLOCK as usize], block.clone(), block].concat());
}

#[test]
fn caches_of_earlier_users_do_not_win() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 8 * MIB);
    let part = disk.partition(1, 2, 4);
    // Dirty in the partition's cache, and clean in the disk's, held by somebody who has both open and claims nothing.
    let user = OpenOptions::new().read(true).write(true).open(&part).expect("opened");
    user.write_all_at(&noise(MIB as usize, 13), 0).expect("written");
    let reader = File::open(&disk.node).expect("opened");
    let mut seen = vec![0; (8 * MIB) as usize];
    reader.read_exact_at(&mut seen, 0).expect("read");

    let want = volume(8 * MIB, 14);
    let target = open(&disk.node, 8 * MIB);
    // Cached anew while the restore is under way.
    let mut in_part = vec![0; (4 * MIB) as usize];
    user.read_exact_at(&mut in_part, 0).expect("read");
    restore(&target, &want, 0..128);
    target.finish(Durability::Device).expect("finished");
    drop(target);
    user.read_exact_at(&mut in_part, 0).expect("read");
    assert!(in_part == want[(2 * MIB) as usize..(6 * MIB) as usize], "a reader of the partition sees the disk");
    reader.read_exact_at(&mut seen, 0).expect("read");
    assert!(seen == want, "the reader sees the disk");
    drop((user, reader));
    run("sync", &[]);
    assert!(std::fs::read(&disk.image).expect("read") == want, "nothing was written over it");
}

#[test]
fn a_restored_file_system_mounts() {
    if !root() {
        return;
    }
    for mkfs in ["mkfs.ext4", "mkfs.xfs"] {
        let dir = tempfile::tempdir().expect("a folder");
        let source = LoopDevice::new(dir.path(), "a", 320 * MIB);
        run(mkfs, &["-q", source.text()]);
        let mount = Mount::new(&source.node, &dir.path().join("m"));
        std::fs::write(mount.0.join("f"), noise(3_000_000, 15)).expect("written");
        drop(mount);
        let image = std::fs::read(&source.image).expect("read");
        let other = LoopDevice::new(dir.path(), "b", 330 * MIB);
        let target = open(&other.node, 320 * MIB);
        restore(&target, &image, 0..geometry(320 * MIB).blocks());
        let early = std::process::Command::new("mount").args([other.text(), "/mnt"]).output().expect("ran");
        assert!(!early.status.success(), "{mkfs}: it is claimed and has no superblock");
        target.finish(Durability::Device).expect("finished");
        drop(target);
        drop(source);
        let mount = Mount::new(&other.node, &dir.path().join("n"));
        assert_eq!(std::fs::read(mount.0.join("f")).expect("read"), noise(3_000_000, 15));
    }
}

#[test]
fn a_full_or_failing_medium_is_an_error_and_never_completed() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 24 * MIB);
    run("mkfs.ext4", &["-q", "-m", "0", disk.text()]);
    let mount = Mount::new(&disk.node, &dir.path().join("m"));
    let want = noise((30 * MIB) as usize, 16);
    let g = geometry(30 * MIB);

    let fill = |target: &Target| {
        (0..g.blocks()).find_map(|n| {
            let plain = &want[(n * BLOCK) as usize..][..BLOCK as usize];
            verified(g, n, plain, |b| target.write_block(b, g)).err()
        })
    };
    let path = mount.0.join("restored");
    let target = open(&path, g.length());
    let e = fill(&target).expect("it does not fit");
    assert_eq!(e.kind(), TargetErrorKind::NoSpace, "{e}");
    assert!(e.to_string().contains("restored"), "{e}");
    assert!(matches!(target.finish(Durability::Device), Err(TargetError::Lost { .. })));
    assert!(is_zero(&std::fs::read(&path).expect("read")[..MIB as usize]), "not completed");
    drop(target);
    std::fs::remove_file(&path).expect("removed");

    // A device whose medium gives out in the middle.
    let thin = LoopDevice::new(&mount.0, "thin", g.length());
    let target = open(&thin.node, g.length());
    let e = fill(&target).expect("it does not fit");
    assert!(matches!(e.kind(), TargetErrorKind::Io | TargetErrorKind::NoSpace), "{e}");
    assert!(matches!(target.finish(Durability::Device), Err(TargetError::Lost { .. })));
    assert!(matches!(target.write_zeroes(0..1), Err(TargetError::Lost { .. })));
    drop(target);
    drop(thin);
}
