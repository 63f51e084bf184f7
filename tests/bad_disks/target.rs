//! Targets that fail or lie (I9): a restore ends well only if what can be read back from the device is right. Whatever
//! happened, the same restore once more completes it (I11, F27).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_tests::faultdisk::{Effect, FaultDisk, FileSystem, Op, Rule};
use backhaul_tests::fixture::{Agent, Fixture, Serving};
use backhaul_tests::process::Ran;
use backhaul_tests::{Random, image, needs_fault_disk};

use super::{Disk, MIB, text};

const VOLUME: u64 = 6 * MIB;

struct Setup {
    f: Fixture,
    serving: Serving,
    agent: Agent,
    bytes: Vec<u8>,
}

/// One point of data, zeroes, and data.
fn setup() -> Setup {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, VOLUME, &mut Random::new(1));
    image::write(&disk, 2 * MIB, &vec![0; MIB as usize]);
    agent.protect("data", &disk);
    agent.sync();
    let bytes = std::fs::read(&disk).expect("it is there");
    Setup { f, serving, agent, bytes }
}

impl Setup {
    fn restore(&self, to: &Path) -> Ran {
        self.f.receiver(&["restore", "web/data", "--to", text(to), "--confirm-target", text(to)])
    }
}

/// What is really on the device.
fn content(disk: &mut FaultDisk) -> Vec<u8> {
    disk.reattach();
    let mut bytes = Vec::new();
    File::open(disk.path()).and_then(|mut f| f.read_to_end(&mut bytes)).expect("it can be read");
    bytes
}

/// Old content everywhere, so that what is not written is wrong.
fn fill(target: &Path) -> Vec<u8> {
    let old = Random::new(9).bytes(VOLUME as usize);
    let file = File::options().write(true).create(true).truncate(false).open(target).expect("it is there");
    file.write_all_at(&old, 0).and_then(|()| file.sync_all()).expect("it can be written");
    old
}

/// For each write, read and flush of a restore: it fails, is lost, is damaged on the way or goes elsewhere.
#[test]
fn a_device_that_fails_or_lies_at_any_moment() {
    if !needs_fault_disk("a_device_that_fails_or_lies_at_any_moment") {
        return;
    }
    let s = setup();
    let mut disk = FaultDisk::new(&s.f.path(""), "target", VOLUME);
    fill(disk.path());
    let before = disk.told();
    s.restore(disk.path()).ok();
    let after = disk.told();
    let (reads, writes) = (after.reads - before.reads, after.writes - before.writes);
    let flushes = after.flushes - before.flushes;
    println!("a restore does {reads} reads, {writes} writes, {flushes} flushes");
    assert!(content(&mut disk) == s.bytes);
    assert!(writes > 4 && flushes >= 2, "{after:?}");
    let mut cases = Vec::new();
    for effect in [Effect::Eio, Effect::Drop, Effect::Flip, Effect::Shift(-(MIB as i64)), Effect::Shift(4096)] {
        cases.extend((0..writes).map(|n| (Op::Write, effect, n)));
    }
    cases.extend([Effect::Eio, Effect::Drop].into_iter().flat_map(|e| (0..flushes).map(move |n| (Op::Flush, e, n))));
    cases.extend((0..reads).map(|n| (Op::Read, Effect::Eio, n)));
    let (mut found, mut harmless) = (0, 0);
    for (op, effect, n) in cases {
        let what = format!("{op:?} {n}: {effect:?}");
        let old = fill(disk.path());
        let hits = disk.told().hits;
        disk.fault(Rule::new(op, effect).skip(n).times(1));
        let ran = s.restore(disk.path());
        let hit = disk.told().hits > hits;
        disk.heal();
        let bytes = content(&mut disk);
        if ran.code == Some(0) {
            // Not hit, or hit where it makes no difference: a flush of nothing, zeroes over zeroes, a repeated read.
            assert!(bytes == s.bytes, "{what}: exit 0, and the device holds something else (I9)");
            assert_ne!(
                (op, effect, hit),
                (Op::Flush, Effect::Eio, true),
                "{what}: a failed flush was tried again (F6)"
            );
            harmless += 1;
            continue;
        }
        assert!(matches!(ran.code, Some(1 | 6)) && hit, "{what}: {ran:#?}");
        assert!(!ran.err.contains("panicked"), "{what}: {ran:#?}");
        // A write that fails is noticed before the end: the first MiB, which comes last, is not there. Where it was the
        // first one, which is to take the old MiB away, nothing else was touched.
        if effect == Effect::Eio && op == Op::Write {
            let untouched = bytes[MIB as usize..] == old[MIB as usize..];
            assert!(untouched || bytes[..4096] != s.bytes[..4096], "{what}: it looks finished (I9)");
            assert!(untouched || bytes[..4096].iter().all(|b| *b == 0), "{what}: it looks like the old one (I9)");
        }
        found += 1;
        s.restore(disk.path()).ok();
        assert!(content(&mut disk) == s.bytes, "{what}: once more does not complete it (I11)");
    }
    println!("{found} found, {harmless} harmless");
    assert!(found as u64 >= 4 * writes, "{found} of what went wrong was found");
}

/// The same in small over the network, where the agent writes.
#[test]
fn a_device_that_lies_to_an_agent() {
    if !needs_fault_disk("a_device_that_lies_to_an_agent") {
        return;
    }
    let s = setup();
    let mut disk = FaultDisk::new(&s.f.path(""), "target", VOLUME);
    let rule = |op, effect| Rule::new(op, effect).times(1);
    let far = VOLUME / 2..VOLUME;
    let cases = [
        rule(Op::Write, Effect::Eio).within(far.clone()),
        rule(Op::Write, Effect::Drop).within(far.clone()),
        rule(Op::Write, Effect::Flip).within(far.clone()),
        rule(Op::Write, Effect::Shift(4096)).within(far),
        rule(Op::Flush, Effect::Eio).skip(1),
        rule(Op::Flush, Effect::Drop).skip(1),
    ];
    for case in cases {
        fill(disk.path());
        disk.fault(case.clone());
        let args = |to: &Path| ["restore", "data", "--to", text(to), "--confirm-target", text(to)].map(str::to_owned);
        let restore = |to: &Path| s.agent.run(&args(to).each_ref().map(String::as_str));
        let ran = restore(disk.path());
        disk.heal();
        assert!(matches!(ran.code, Some(1 | 6)), "{case:?}: {ran:#?}");
        restore(disk.path()).ok();
        assert!(content(&mut disk) == s.bytes, "{case:?}");
    }
    s.serving.stop();
}

/// A file as target, on a disk that loses or damages what is written to it.
#[test]
fn a_file_on_a_disk_that_fails_or_lies() {
    if !needs_fault_disk("a_file_on_a_disk_that_fails_or_lies") {
        return;
    }
    let s = setup();
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        let mut disk = Disk::new(&s.f.path(""), &format!("{kind:?}"), kind);
        let to = disk.path().join("restored.img");
        // Content of the volume, so that only the file's data are hit.
        for at in [0, MIB + 4096, 4 * MIB, VOLUME - 65_536] {
            let needle = &s.bytes[at as usize..at as usize + 64];
            for effect in [Effect::Eio, Effect::Drop, Effect::Flip] {
                fill(&to);
                disk.disk.fault(Rule::new(Op::Write, effect).containing(needle).times(1));
                let hits = disk.disk.told().hits;
                let ran = s.restore(&to);
                assert!(disk.disk.told().hits > hits, "{at} {effect:?}");
                disk.disk.heal();
                assert!(matches!(ran.code, Some(1 | 6)), "{kind:?} {at} {effect:?}: exit is not true (I9): {ran:#?}");
                disk.again();
                s.restore(&to).ok();
                disk.again();
                assert!(std::fs::read(&to).expect("it is there") == s.bytes, "{kind:?} {at} {effect:?}");
            }
        }
        disk.disk.fault(Rule::new(Op::Flush, Effect::Eio).times(1));
        let _ = std::fs::remove_file(&to);
        let ran = s.restore(&to);
        assert!(matches!(ran.code, Some(1 | 6)), "{kind:?}: {ran:#?}");
        disk.disk.heal();
        disk.again();
        s.restore(&to).ok();
        disk.lose_power();
        assert!(std::fs::read(&to).expect("it is there") == s.bytes, "{kind:?}: it was flushed");
    }
}

/// A file system without room for the volume: said, marked, and completed when there is room (F19).
#[test]
fn no_room_for_the_target() {
    if !needs_fault_disk("no_room_for_the_target") {
        return;
    }
    let s = setup();
    let disk = backhaul_tests::SmallDisk::new(&s.f.path(""), "small", 64 * MIB);
    let to = disk.path().join("restored.img");
    for but in [0, 8 << 10, 64 << 10, MIB, 3 * MIB, 5 * MIB] {
        let _ = std::fs::remove_file(&to);
        let ballast = disk.fill_up(but);
        s.restore(&to).fails(14, "E_NOSPACE");
        let head = std::fs::read(&to).unwrap_or_default();
        assert!(head.iter().take(4096).all(|b| *b == 0), "{but}: it does not look finished (I9)");
        ballast.iter().for_each(|file| drop(std::fs::remove_file(file)));
        s.restore(&to).ok();
        assert!(std::fs::read(&to).expect("it is there") == s.bytes, "{but}");
    }
}
