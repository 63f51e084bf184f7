//! Loop devices, file systems, partitions: labels that are true.

use std::path::Path;

use backhaul_tests::fixture::number;
use backhaul_tests::process::tool;
use backhaul_tests::{Fixture, Loop, Mount, Random, image, needs_root};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn make(device: &Path, kind: &str) {
    match kind {
        "ext4" => drop(tool("mkfs.ext4", ["-q", "-F", text(device)])),
        _ => drop(tool("mkfs.xfs", ["-q", "-f", text(device)])),
    }
}

/// A file system in use, then not: fuzzy while it is mounted, crash when nobody has it.
fn file_system(kind: &str) {
    if !needs_root(&format!("a_device_with_{kind}")) {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let device = Loop::new(&f.path("disk"), 320 * MIB);
    make(device.path(), kind);
    agent.protect("data", device.path());
    let idle = agent.run(&["sync"]);
    assert_eq!(idle.ok()["consistency"], "crash", "{idle:#?}");
    assert!(idle.err.contains("loop device"), "what the label can't see is said: {}", idle.err);
    assert_eq!(idle.ok()["volumes"][0]["digest"], image::digest(device.path(), 65536));

    {
        let mounted = Mount::new(device.path(), &f.path("mnt"));
        std::fs::write(mounted.path().join("a file"), Random::new(1).bytes(3 << 20)).expect("there is room");
        tool("sync", ["-f", text(mounted.path())]);
        let ran = agent.run(&["sync"]);
        assert_eq!(ran.ok()["consistency"], "fuzzy", "mounted: {ran:#?}");
        assert!(number(&ran.ok(), "bytes_sent") > 3 * MIB, "what is on the disk is read, not the cache: {ran:#?}");
        tool("umount", [text(mounted.path())]);
    }
    let after = agent.sync();
    assert_eq!(after["consistency"], "crash");
    assert_eq!(after["volumes"][0]["digest"], image::digest(device.path(), 65536));
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0);
}

#[test]
fn a_device_with_ext4() {
    file_system("ext4");
}

#[test]
fn a_device_with_xfs() {
    file_system("xfs");
}

#[test]
fn a_partition_and_its_disk() {
    if !needs_root("a_partition_and_its_disk") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let device = Loop::new(&f.path("disk"), 48 * MIB);
    let partition = device.partition();
    make(&partition, "ext4");
    let named = agent.protect("root", &partition);
    assert!(number(&named["volumes"][0], "bytes") < 48 * MIB);
    let idle = agent.sync();
    assert_eq!(idle["consistency"], "crash");
    assert_eq!(idle["volumes"][0]["digest"], image::digest(&partition, 65536));

    // The whole disk is in use when one of its partitions is.
    agent.protect("disk", device.path());
    let mounted = Mount::new(&partition, &f.path("mnt"));
    assert_eq!(agent.sync()["consistency"], "fuzzy");
    tool("umount", [text(mounted.path())]);
    let both = agent.sync();
    assert_eq!(both["consistency"], "crash", "{both}");
    assert_eq!(both["volumes"][1]["digest"], image::digest(device.path(), 65536));
}

#[test]
fn a_device_that_is_written_while_it_is_read_is_fuzzy() {
    if !needs_root("a_device_that_is_written_while_it_is_read_is_fuzzy") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk"), 256 * MIB, &mut Random::new(2));
    let device = Loop::attach(&f.path("disk"));
    agent.protect("data", device.path());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ran = std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                image::write(device.path(), 5 * MIB, b"written behind its back");
                std::fs::File::open(device.path()).and_then(|f| f.sync_all()).expect("it can be flushed");
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        let ran = agent.run(&["sync"]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        ran
    });
    assert_eq!(ran.ok()["consistency"], "fuzzy", "{ran:#?}");
    assert_eq!(agent.sync()["consistency"], "crash");
}

#[test]
fn a_device_that_grows_shrinks_or_is_replaced() {
    if !needs_root("a_device_that_grows_shrinks_or_is_replaced") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk"), 8 * MIB, &mut Random::new(3));
    let device = Loop::attach(&f.path("disk"));
    let ran = agent.run(&["protect", &format!("data={}", text(device.path()))]);
    ran.ok();
    assert!(ran.err.contains("no serial"), "a loop device is known by its path only, and that is said: {}", ran.err);
    agent.sync();
    let backing = std::fs::OpenOptions::new().write(true).open(f.path("disk")).expect("it is there");
    backing.set_len(9 * MIB).expect("there is room");
    device.resized();
    let grown = agent.run(&["sync"]);
    assert_eq!(grown.ok()["volumes"][0]["digest"], image::digest(device.path(), 65536));
    assert!(grown.err.contains("grew"), "{}", grown.err);
    backing.set_len(7 * MIB).expect("it can shrink");
    device.resized();
    agent.run(&["sync"]).fails(4, "E_VOLUME");
    agent.protect("data", device.path());
    assert_eq!(agent.sync()["volumes"][0]["digest"], image::digest(device.path(), 65536));
    // A file where a device was is a replacement.
    let other = f.path("disk-2");
    image::random(&other, 7 * MIB, &mut Random::new(4));
    let link = f.path("link");
    std::os::unix::fs::symlink(device.path(), &link).expect("a link can be made");
    agent.run(&["unprotect", "data"]).ok();
    agent.protect("linked", &link);
    agent.sync();
    std::fs::remove_file(&link).and_then(|()| std::os::unix::fs::symlink(&other, &link)).expect("a link can be made");
    let ran = agent.run(&["sync"]);
    if ran.code == Some(0) {
        // What was resolved when it was named is what is protected: then the link's new target is nothing to us.
        assert_eq!(ran.ok()["volumes"][0]["digest"], image::digest(device.path(), 65536));
    } else {
        ran.fails(4, "E_VOLUME");
    }
}
