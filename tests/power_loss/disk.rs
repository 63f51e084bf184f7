//! The fault disk itself: a flush above arrives below, and each thing that goes wrong goes wrong.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use backhaul_tests::faultdisk::{Crash, Effect, FaultDisk, FileSystem, Kept, Op, Order, Replica, Rule};
use backhaul_tests::needs_fault_disk;

const MIB: u64 = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder")
}

/// Each `fsync` of a file or a folder on the file system reaches the disk as a flush before it returns, and what was
/// flushed is in the image of a power loss at that moment.
#[test]
fn a_flush_above_is_a_flush_below() {
    if !needs_fault_disk("a_flush_above_is_a_flush_below") {
        return;
    }
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        let dir = folder();
        let disk = FaultDisk::new(dir.path(), "disk", kind.size());
        kind.make(disk.path());
        let mounted = kind.mount(disk.path(), &dir.path().join("mnt")).expect("it was just made");
        let mut moments = Vec::new();
        for i in 0..20 {
            let before = disk.told();
            let mut file = File::create(mounted.join(&format!("f{i}"))).expect("there is room");
            file.write_all(&[i; 10_000]).and_then(|()| file.sync_all()).expect("it can be flushed");
            File::open(mounted.path()).and_then(|f| f.sync_all()).expect("it can be flushed");
            let after = disk.told();
            assert!(after.flushes > before.flushes && after.writes > before.writes, "{kind:?}: {before:?} {after:?}");
            moments.push(after.position);
        }
        drop(mounted);
        let log = disk.log();
        let mut replica = Replica::new(dir.path(), "replica", kind);
        for (i, at) in moments.iter().enumerate() {
            let flushes = log.windows(0).into_iter().map(|w| w.start);
            let durable = flushes.filter(|f| f <= at).max().expect("it was flushed");
            let crash = Crash { durable, at: *at, kept: Kept::Nothing, sector: kind.sector() };
            let mounted = replica.after(&log, &crash).expect("it mounts");
            for n in 0..=i {
                let found = std::fs::read(mounted.join(&format!("f{n}"))).expect("it was flushed");
                assert!(found == [n as u8; 10_000], "{kind:?}: {crash:?}: {n}");
            }
        }
    }
}

#[test]
fn what_goes_wrong_goes_wrong() {
    if !needs_fault_disk("what_goes_wrong_goes_wrong") {
        return;
    }
    let dir = folder();
    let mut disk = FaultDisk::new(dir.path(), "disk", 4 * MIB);
    // Past every cache but the disk's own.
    let device = |disk: &FaultDisk| File::options().read(true).write(true).open(disk.path()).expect("it is there");
    let write = |disk: &FaultDisk, at: u64, byte: u8| {
        let device = device(disk);
        device.write_all_at(&[byte; 4096], at).and_then(|()| device.sync_all())
    };
    let read = |disk: &mut FaultDisk, at: u64| {
        disk.reattach();
        let mut bytes = [0; 4096];
        device(disk).read_exact_at(&mut bytes, at).map(|()| bytes)
    };
    write(&disk, 0, 1).expect("nothing is wrong yet");
    assert_eq!(read(&mut disk, 0).expect("nothing is wrong yet"), [1; 4096]);

    disk.fault(Rule::new(Op::Read, Effect::Eio).within(8192..8200));
    read(&mut disk, 8192).expect_err("it can't be read");
    read(&mut disk, MIB).expect("this can");
    disk.heal();
    disk.fault(Rule::new(Op::Write, Effect::Eio).containing(&[7; 16]).times(1));
    write(&disk, 0, 7).expect_err("it can't be written");
    disk.heal();
    disk.fault(Rule::new(Op::Flush, Effect::Eio).times(1));
    write(&disk, 0, 2).expect_err("it can't be flushed");
    write(&disk, 0, 3).expect("it can the second time");

    disk.order(&Order::Rot { at: 5, mask: 0x80 });
    assert_eq!(read(&mut disk, 0).expect("it can be read")[..6], [3, 3, 3, 3, 3, 0x83]);
    disk.fault(Rule::new(Op::Write, Effect::Shift(8192)).times(1));
    write(&disk, MIB, 9).expect("it says so");
    assert_eq!(read(&mut disk, MIB).expect("it can be read"), [0; 4096]);
    assert_eq!(read(&mut disk, MIB + 8192).expect("it can be read"), [9; 4096]);
    disk.fault(Rule::new(Op::Write, Effect::Flip).times(1));
    write(&disk, MIB, 4).expect("it says so");
    assert_eq!(read(&mut disk, MIB).expect("it can be read")[2048], 5);

    // A lie holds until the power goes; an honest flush keeps.
    write(&disk, 2 * MIB, 1).expect("nothing is wrong");
    disk.fault(Rule::new(Op::Flush, Effect::Lie));
    write(&disk, 2 * MIB, 2).expect("it says so");
    assert_eq!(read(&mut disk, 2 * MIB).expect("it can be read"), [2; 4096]);
    disk.order(&Order::PowerLoss);
    assert_eq!(read(&mut disk, 2 * MIB).expect("it can be read"), [1; 4096]);
    disk.heal();
    disk.fault(Rule::new(Op::Flush, Effect::Drop).times(1));
    write(&disk, 2 * MIB, 3).expect("it says so");
    assert_eq!(read(&mut disk, 2 * MIB).expect("it can be read"), [1; 4096]);
    assert!(disk.told().hits >= 8);
}
