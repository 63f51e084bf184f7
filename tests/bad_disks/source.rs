//! A source that can't be read, or reads differently each time (F9): no point of it, and never zeroes instead.

use backhaul_tests::faultdisk::{Effect, FaultDisk, FileSystem, Op, Rule};
use backhaul_tests::fixture::{Fixture, number};
use backhaul_tests::{Random, image, needs_fault_disk};

use super::{Disk, MIB, text};

#[test]
fn a_device_with_bad_sectors_makes_no_point() {
    if !needs_fault_disk("a_device_with_bad_sectors_makes_no_point") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = FaultDisk::new(&f.path(""), "disk", 8 * MIB);
    let write = |at, bytes: &[u8]| {
        image::write(disk.path(), at, bytes);
        std::fs::File::open(disk.path()).and_then(|f| f.sync_all()).expect("it can be flushed");
    };
    write(0, &Random::new(1).bytes(8 << 20));
    agent.protect("data", disk.path());
    // At the first sync, where nothing is known of the block, and at the second, where the index has its digest.
    for points in 0..2 {
        for (start, len) in [(0, 1), (5 * MIB + 3, 1), (8 * MIB - 512, 512), (MIB, 3 * MIB)] {
            write(2 * MIB + start / 100, b"changed");
            disk.fault(Rule::new(Op::Read, Effect::Eio).within(start..start + len));
            let failed = agent.run(&["sync"]).fails(1, "E_SOURCE");
            let message = failed["error"]["message"].as_str().expect("a message");
            assert!(message.contains(text(disk.path())), "it is named: {message}");
            assert_eq!(f.points().len(), points, "no point without byte {start} (I8)");
            disk.heal();
        }
        let synced = agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(disk.path(), 65_536));
    }
    // A service says so, and goes on when the disk can be read again.
    f.receiver(&["verify"]).ok();
}

#[test]
fn an_image_on_a_disk_with_bad_sectors_makes_no_point() {
    if !needs_fault_disk("an_image_on_a_disk_with_bad_sectors_makes_no_point") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let mut disk = Disk::new(&f.path(""), "disk", FileSystem::Ext4);
    let image = disk.path().join("disk.img");
    let mut random = Random::new(2);
    image::random(&image, 6 * MIB, &mut random);
    let needle = random.bytes(4096);
    image::write(&image, 3 * MIB, &needle);
    agent.protect("data", &image);
    disk.again();
    let bad = disk.find(&needle);
    disk.disk.fault(Rule::new(Op::Read, Effect::Eio).within(bad..bad + 512));
    let failed = agent.run(&["sync"]).fails(1, "E_SOURCE");
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(text(&image))), "{failed}");
    assert_eq!(f.points().len(), 0);
    disk.disk.heal();
    disk.again();
    assert_eq!(agent.sync()["volumes"][0]["digest"], image::digest(&image, 65_536));
}

/// What is hashed is what is sent: a disk that reads differently each time makes points that are whole all the same.
#[test]
fn a_bit_that_flips_while_it_is_read_is_in_the_point_or_is_not() {
    if !needs_fault_disk("a_bit_that_flips_while_it_is_read_is_in_the_point_or_is_not") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = FaultDisk::new(&f.path(""), "disk", 4 * MIB);
    let bytes = Random::new(3).bytes(4 << 20);
    image::write(disk.path(), 0, &bytes);
    std::fs::File::open(disk.path()).and_then(|f| f.sync_all()).expect("it can be flushed");
    agent.protect("data", disk.path());
    let mut flipped = 0;
    for round in 0..6 {
        // Every read of every second round goes wrong.
        if round % 2 == 0 {
            disk.fault(Rule::new(Op::Read, Effect::Flip));
        }
        let synced = agent.sync();
        disk.heal();
        let point = number(&synced, "point");
        f.receiver(&["verify", &format!("web/data@{point}")]).ok();
        let to = f.path("to");
        let _ = std::fs::remove_file(&to);
        let restored = f.receiver(&["restore", &format!("web/data@{point}"), "--to", text(&to)]).ok();
        assert_eq!(restored["digest"], synced["volumes"][0]["digest"], "it is what the agent read (I1)");
        let found = std::fs::read(&to).expect("it was restored");
        let differ = found.iter().zip(&bytes).filter(|(a, b)| a != b).count();
        flipped += usize::from(differ > 0);
        assert!(round % 2 == 0 || differ == 0, "what flipped is mended by the next point: {differ} bytes differ");
    }
    assert!(flipped >= 2, "bits did flip");
}
