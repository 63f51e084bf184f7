//! Who writes while a source is read is not kept waiting, and is noticed.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

use super::*;
use crate::Source;
use crate::testing::{LoopDevice, Mount, can, noise, patiently, root, run};

fn moved(stability: Stability) -> String {
    match stability {
        Stability::Moved(reason) => reason,
        Stability::Still => panic!("a write went unnoticed"),
    }
}

/// An image on a file system that has leases, and a source of it.
fn image() -> Option<(tempfile::TempDir, PathBuf, Source)> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.img");
    std::fs::write(&path, noise(1 << 20, 1)).expect("written");
    let source = Source::open(&path).expect("opened");
    let (granted, reason) = settle(&source);
    (granted || can(&format!("leases ({reason})"), false)).then_some((dir, path, source))
}

/// Waits until the source is still. Tests beside this one start programs, and between fork and exec a child holds every
/// descriptor of ours, those for writing too.
fn settle(source: &Source) -> (bool, String) {
    let mut last = String::new();
    for _ in 0..200 {
        match source.watch().finish() {
            Stability::Still => return (true, last),
            Stability::Moved(reason) => last = reason,
        }
        std::thread::sleep(LEASE_POLL);
    }
    (false, last)
}

#[test]
fn an_image_that_nobody_writes_is_still() {
    let Some((_dir, path, source)) = image() else { return };
    let watch = source.watch();
    assert!(!watch.has_moved(), "{:?}", watch.state.as_ref().err());
    // Reading it, and changing another file of the folder, is no change.
    std::fs::read(&path).expect("read");
    std::fs::write(path.with_extension("other"), b"x").expect("written");
    assert_eq!(watch.finish(), Stability::Still);
}

#[test]
fn a_writer_goes_on_at_once_and_is_noticed() {
    let Some((_dir, path, source)) = image() else { return };
    for how in ["open", "truncate", "nonblocking"] {
        settle(&source);
        let watch = source.watch();
        assert!(!watch.has_moved(), "{how}: {:?}", watch.state.as_ref().err());
        let start = Instant::now();
        match how {
            "open" => {
                drop(run("dd", &["if=/dev/zero", &format!("of={}", path.display()), "bs=1", "count=1", "conv=notrunc"]))
            }
            "truncate" => drop(OpenOptions::new().write(true).truncate(true).open(&path).expect("opened")),
            _ => {
                let open = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
                assert_eq!(open.err().and_then(|e| e.raw_os_error()), Some(libc::EWOULDBLOCK));
            }
        }
        let waited = start.elapsed();
        assert!(waited < Duration::from_millis(500), "{how}: the writer waited {waited:?}");
        if how == "nonblocking" {
            // It may open as soon as the lease is back, which is soon.
            std::thread::sleep(LEASE_POLL * 10);
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("free again");
        }
        assert!(watch.has_moved(), "{how}");
        assert!(moved(watch.finish()).contains("opened it for writing"), "{how}");
    }
}

#[test]
fn writers_that_were_there_first_are_seen() {
    let Some((_dir, path, source)) = image() else { return };
    let writer = OpenOptions::new().read(true).write(true).open(&path).expect("opened");
    assert!(moved(source.watch().finish()).contains("open for writing"));
    // A writable mapping outlives its descriptor.
    // SAFETY: the mapping is only held, never looked at.
    let map = unsafe { memmap2::MmapMut::map_mut(&writer) }.expect("mapped");
    drop(writer);
    assert!(moved(source.watch().finish()).contains("open for writing"));
    drop(map);
    assert!(settle(&source).0);
    if root() {
        let device = LoopDevice::over(&path, &[]);
        assert!(moved(source.watch().finish()).contains("open for writing"));
        drop(device);
    }
}

#[test]
fn a_dropped_watch_leaves_no_lease_behind() {
    let Some((_dir, path, source)) = image() else { return };
    drop(source.watch());
    OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("nobody is in the way");
    settle(&source);
    let (a, b) = (source.watch(), source.watch());
    assert_eq!((a.finish(), b.finish()), (Stability::Still, Stability::Still), "two readers do not disturb each other");
}

#[test]
fn many_breaks_do_not_end_the_process() {
    let Some((_dir, path, source)) = image() else { return };
    for _ in 0..50 {
        settle(&source);
        let watch = source.watch();
        OpenOptions::new().write(true).open(&path).expect("opened");
        moved(watch.finish());
    }
}

/// Writes one sector past the cache.
fn write_direct(node: &Path, at: u64) {
    let mut sector = crate::buffer::AlignedBuffer::new(512);
    sector.copy_from_slice(&noise(512, at));
    let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(node).expect("opened");
    file.write_all_at(&sector, at).expect("written");
}

#[test]
fn an_idle_device_is_still_and_any_write_is_noticed() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::new(dir.path(), "a", 16 << 20);
    // Left dirty in the cache by somebody who still has it open.
    let mut dirty = OpenOptions::new().write(true).open(&device.node).expect("opened");
    dirty.write_all(&noise(1 << 20, 1)).expect("written");
    let source = Source::open(&device.node).expect("opened");
    let watch = source.watch();
    run("sync", &[]);
    let mut buf = vec![0; 1 << 20];
    crate::Volume::read_at(&source, backhaul_protocol::geometry::ByteOffset(0), &mut buf).expect("read");
    assert_eq!(buf, noise(1 << 20, 1), "what was dirty is on the disk before the watch begins");
    assert!(watch.caveats()[0].contains("loop device"));
    assert_eq!(watch.finish(), Stability::Still, "a flush of what was dirty before is not a write");

    let watch = source.watch();
    write_direct(&device.node, 8 << 20);
    assert!(moved(watch.finish()).contains("was written to"));

    let watch = source.watch();
    dirty.write_all_at(&[9; 4096], 0).and_then(|()| dirty.sync_all()).expect("written");
    assert!(watch.has_moved());
    assert!(moved(watch.finish()).contains("was written to"));

    for mode in [&["-z"][..], &[]] {
        let watch = source.watch();
        run("blkdiscard", &[mode, &["-f", "-o", "1048576", "-l", "1048576", device.text()]].concat());
        assert!(watch.has_moved(), "{mode:?}: by the counters, not by the file beneath");
        assert!(moved(watch.finish()).contains("was written to"), "{mode:?}");
    }
    let watch = source.watch();
    OpenOptions::new().write(true).open(&device.image).and_then(|f| f.write_all_at(b"x", 5)).expect("written");
    assert!(moved(watch.finish()).contains("behind the loop device"));
}

#[test]
fn a_partition_is_not_idle_if_its_disk_is_written() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::new(dir.path(), "a", 16 << 20);
    let (one, two) = (device.partition(1, 1, 4), device.partition(2, 8, 4));
    let source = Source::open(&one).expect("opened");
    assert_eq!(source.watch().finish(), Stability::Still);

    let watch = source.watch();
    write_direct(&device.node, 2 << 20);
    assert!(moved(watch.finish()).contains(device.name()), "written through the whole disk");

    let watch = source.watch();
    write_direct(&one, 0);
    assert!(moved(watch.finish()).contains("was written to"));

    let whole = Source::open(&device.node).expect("opened");
    let watch = whole.watch();
    write_direct(&two, 0);
    assert!(moved(watch.finish()).contains("was written to"), "the disk changes with its partitions");

    // Another partition is another volume. (The file beneath both is one, so only the counters are asked.)
    let watch = source.watch();
    write_direct(&two, 4096);
    assert!(!watch.has_moved());
}

#[test]
fn a_claimed_device_is_never_still() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::new(dir.path(), "a", 64 << 20);
    let part = device.partition(1, 1, 60);
    run("mkfs.ext4", &["-q", part.to_str().expect("text")]);
    let (whole, source) = (Source::open(&device.node).expect("opened"), Source::open(&part).expect("opened"));
    let watch = source.watch();
    let mount = Mount::new(&part, &dir.path().join("m"));
    assert!(moved(watch.finish()).contains("in use"), "mounted in between");
    assert!(moved(source.watch().finish()).contains("in use"));
    assert!(moved(whole.watch().finish()).contains("in use"), "a partition of it is mounted");
    drop(mount);
    assert!(settle(&source).0);
    // In use at the start and no more at the end, without a write.
    let open = || File::options().read(true).custom_flags(libc::O_EXCL).open(&part);
    let claim = patiently(open, |e| e.raw_os_error() == Some(libc::EBUSY)).expect("free");
    let watch = source.watch();
    drop(claim);
    assert!(moved(watch.finish()).contains("in use"));
    assert!(settle(&source).0);
    // The probe does not stay: others may mount while we read.
    let watch = source.watch();
    drop(Mount::new(&part, &dir.path().join("m")));
    moved(watch.finish());
    assert!(settle(&source).0);
}
