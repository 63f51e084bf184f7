//! A store on a disk that fails: nothing is acknowledged that is not durable (I3, F6), what is damaged is named and
//! nothing else suffers (I8).

use std::path::{Path, PathBuf};

use backhaul_tests::faultdisk::{Effect, FileSystem, Op, Order, Rule};
use backhaul_tests::fixture::{Agent, Fixture, Serving, number};
use backhaul_tests::process::Ran;
use backhaul_tests::{Random, image, needs_fault_disk};

use super::{Disk, MIB, text};

struct Setup {
    // Order matters: ended, unmounted, removed.
    serving: Option<Serving>,
    disk: Disk,
    /// The receiver's programs; its store is on the disk.
    f: Fixture,
    /// Where the disk lies.
    _base: Fixture,
    agent: Agent,
    image: PathBuf,
    random: Random,
    /// Of every point that was acknowledged: its number and what it holds.
    acknowledged: Vec<(u64, Vec<u8>)>,
}

impl Setup {
    fn new(kind: FileSystem) -> Self {
        let base = Fixture::bare();
        let disk = Disk::new(&base.path(""), "disk", kind);
        let f = Fixture::with_store(&disk.path().join("store"));
        let serving = f.serve();
        let agent = f.joined("agent", &serving);
        let (image, mut random) = (f.path("disk.img"), Random::new(1));
        image::random(&image, 4 * MIB, &mut random);
        agent.protect("data", &image);
        let serving = Some(serving);
        let mut s = Self { serving, disk, f, _base: base, agent, image, random, acknowledged: Vec::new() };
        s.sync().ok();
        s
    }

    fn sync(&mut self) -> Ran {
        let ran = self.agent.run(&["sync"]);
        if ran.code == Some(0) {
            let bytes = std::fs::read(&self.image).expect("it is there");
            self.acknowledged.push((number(&ran.json(), "point"), bytes));
        }
        ran
    }

    fn change(&mut self) {
        let at = self.random.between(0, 3 * MIB);
        image::write(&self.image, at, &self.random.bytes(500_000));
    }

    fn key(&self, path: &Path) -> String {
        path.strip_prefix(self.f.store_path()).expect("in the store").to_string_lossy().into_owned()
    }

    /// Ends the receiver as hard as a power loss does.
    fn kill(&mut self) {
        self.serving.take().expect("it runs").child.kill();
    }

    fn start(&mut self) {
        let serving = self.f.serve();
        self.agent = self.agent.clone().through(&serving.address());
        self.serving = Some(serving);
    }

    fn restore(&self, point: u64, more: &[&str]) -> Ran {
        let to = self.f.path("to");
        let _ = std::fs::remove_file(&to);
        self.f.receiver(&[&["restore", &format!("web/data@{point}"), "--to", text(&to)], more].concat())
    }

    /// Every point that was acknowledged is there and right.
    #[track_caller]
    fn nothing_is_lost(&self, what: &str) {
        let listed: Vec<u64> = self.f.points().iter().map(|p| number(p, "point")).collect();
        for (point, bytes) in &self.acknowledged {
            assert!(listed.contains(point), "{what}: point {point} was acknowledged and is gone (I2): {listed:?}");
            self.restore(*point, &[]).ok();
            let found = std::fs::read(self.f.path("to")).expect("it was restored");
            assert!(found == *bytes, "{what}: point {point} differs (I1)");
        }
        self.f.receiver(&["verify"]).ok();
    }
}

/// The `n`th flush or write of a sync fails, once. Then the power does: what was acknowledged is there.
fn fails_once(kind: FileSystem, test: &str) {
    if !needs_fault_disk(test) {
        return;
    }
    let mut s = Setup::new(kind);
    let (mut failed, mut passed) = (0, 0);
    let cases = (0..7).map(|n| (Op::Flush, n)).chain((0..7).map(|n| (Op::Write, 2 * n)));
    for (op, n) in cases {
        let what = format!("{kind:?}: {op:?} {n}");
        s.change();
        let hits = s.disk.disk.told().hits;
        s.disk.disk.fault(Rule::new(op, Effect::Eio).skip(n).times(1));
        let ran = s.sync();
        let hit = s.disk.disk.told().hits > hits;
        if ran.code == Some(0) {
            passed += 1;
        } else {
            // XFS stops altogether: then what can't be read is said before what can't be written.
            let says = ran.json()["error"]["code"].clone();
            assert!(hit && (says == "E_STORE" || says == "E_DAMAGED"), "{what}: {ran:#?}");
            failed += 1;
            // The disk answers again, and has forgotten: the receiver must not ask it a second time (F6).
            let again = s.sync();
            let refused = again.code != Some(0);
            let restarted =
                again.out.contains("restart") || again.out.contains("read-only") || again.out.contains("kernel");
            assert!(refused && restarted, "{what}: nobody says what to do: {again:#?}");
        }
        s.kill();
        s.disk.lose_power();
        s.start();
        s.nothing_is_lost(&what);
        s.sync().ok();
    }
    println!("{kind:?}: {failed} syncs failed, {passed} did not need what failed");
    assert!(failed >= 7, "{failed}");
}

#[test]
fn a_flush_or_a_write_fails_on_ext4() {
    fails_once(FileSystem::Ext4, "a_flush_or_a_write_fails_on_ext4");
}

#[test]
fn a_flush_or_a_write_fails_on_xfs() {
    fails_once(FileSystem::Xfs, "a_flush_or_a_write_fails_on_xfs");
}

/// The bytes of a small object never reach the disk, and the kernel says so only at the flush: nothing is acknowledged,
/// and a second flush, which would succeed, is not tried (F6). A restart mends it: the file system is well.
#[test]
fn the_bytes_of_an_object_can_not_be_written() {
    if !needs_fault_disk("the_bytes_of_an_object_can_not_be_written") {
        return;
    }
    let mut s = Setup::new(FileSystem::Ext4);
    s.change();
    s.disk.disk.fault(Rule::new(Op::Write, Effect::Eio).containing(b"BACKHAUL\x02\0").times(1));
    s.sync().fails(1, "E_STORE");
    let failed = s.sync().fails(1, "E_STORE");
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains("restarted")), "{failed}");
    s.nothing_is_lost("before the restart");
    s.serving.take().expect("it runs").stop();
    s.disk.disk.heal();
    s.start();
    s.sync().ok();
    s.nothing_is_lost("after the restart");
}

/// A large object goes past the page cache, and the kernel says at once that a write failed: nothing is believed of that
/// file, and another one is written and flushed.
#[test]
fn the_bytes_of_a_large_object_are_written_again() {
    if !needs_fault_disk("the_bytes_of_a_large_object_are_written_again") {
        return;
    }
    let mut s = Setup::new(FileSystem::Ext4);
    s.change();
    s.disk.disk.fault(Rule::new(Op::Write, Effect::Eio).containing(b"BACKHAUL\x03\0").times(1));
    let synced = s.sync();
    synced.ok();
    assert!(synced.err.contains("trying again"), "{synced:?}");
    s.nothing_is_lost("after the second try");
}

/// A disk that says yes to every flush and keeps nothing: no receiver can know. The agent does, afterwards (F25).
#[test]
fn a_lying_disk_is_noticed_by_the_agent() {
    if !needs_fault_disk("a_lying_disk_is_noticed_by_the_agent") {
        return;
    }
    let mut s = Setup::new(FileSystem::Ext4);
    s.disk.disk.fault(Rule::new(Op::Flush, Effect::Lie));
    for _ in 0..2 {
        s.change();
        s.sync().ok();
    }
    s.kill();
    s.disk.lose_power();
    s.start();
    assert_eq!(s.f.points().len(), 1, "the lie worked: two points that were acknowledged are gone");
    let failed = s.sync().fails(4, "E_DIVERGED");
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains("rolled back")), "{failed}");
    assert_eq!(s.f.points().len(), 1, "nothing is built on it");
    s.acknowledged.truncate(1);
    s.nothing_is_lost("what was flushed before");
}

/// What happens to a segment below the file system.
enum Damage {
    /// To the write.
    Written(Effect),
    /// A bit flips later.
    Rots,
    /// A sector can't be read any more.
    Unreadable,
}

/// Bits that rot, writes that get lost or go elsewhere, sectors that can't be read: `verify` names the object, a
/// restore fails, `--salvage` has everything else, other points are whole.
#[test]
fn damage_below_the_file_system_is_named() {
    if !needs_fault_disk("damage_below_the_file_system_is_named") {
        return;
    }
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        damaged(kind, "a bit flips on the way", Damage::Written(Effect::Flip));
        damaged(kind, "a write is lost", Damage::Written(Effect::Drop));
        // Into what is free.
        damaged(kind, "a write goes elsewhere", Damage::Written(Effect::Shift(48 << 20)));
        damaged(kind, "a bit rots", Damage::Rots);
        damaged(kind, "a sector can't be read", Damage::Unreadable);
    }
}

fn damaged(kind: FileSystem, what: &str, damage: Damage) {
    let what = format!("{kind:?}: {what}");
    let mut s = Setup::new(kind);
    let before = s.f.objects();
    s.change();
    if let Damage::Written(effect) = damage {
        s.disk.disk.fault(Rule::new(Op::Write, effect).containing(b"BACKHAUL\x03\0").at_least(8192).times(1));
    }
    s.sync().ok();
    let (point, now) = s.acknowledged.pop().expect("it was acknowledged");
    s.kill();
    s.disk.disk.heal();
    let new: Vec<_> = s.f.objects_with("/segments/").into_iter().filter(|p| !before.contains_key(&s.key(p))).collect();
    let [new] = &new[..] else { panic!("{what}: one segment was written: {new:?}") };
    // Behind the first records, where there is data of the volume in any case.
    let middle = || s.disk.find(&std::fs::read(new).expect("it can be read")[..128]) + 8192;
    match damage {
        Damage::Written(_) => {}
        Damage::Rots => drop(s.disk.disk.order(&Order::Rot { at: middle(), mask: 4 })),
        Damage::Unreadable => s.disk.disk.fault(Rule::new(Op::Read, Effect::Eio).within(middle()..middle() + 512)),
    }
    s.disk.again();
    let key = s.key(new);
    let verified = s.f.receiver(&["verify", &format!("web@{point}")]);
    assert_eq!(verified.code, Some(6), "{what}: {verified:#?}");
    assert!(verified.out.contains(&key), "{what}: {key} is not named (I8): {verified:#?}");
    s.restore(point, &[]).fails(6, "E_DAMAGED");
    let salvaged = s.restore(point, &["--salvage"]);
    assert_eq!(salvaged.code, Some(6), "{what}: {salvaged:#?}");
    let lost = salvaged.json()["lost"].as_array().expect("a list").clone();
    assert!(!lost.is_empty(), "{what}: {salvaged:#?}");
    let found = std::fs::read(s.f.path("to")).expect("it was salvaged");
    let is_lost = |at: u64| lost.iter().any(|l| (number(l, "start")..number(l, "end")).contains(&at));
    let wrong = found.iter().zip(&now).enumerate().find(|(i, (a, b))| a != b && !is_lost(*i as u64));
    assert!(wrong.is_none(), "{what}: other blocks suffer (I8): {wrong:?}");
    for (point, bytes) in &s.acknowledged {
        s.restore(*point, &[]).ok();
        assert!(std::fs::read(s.f.path("to")).expect("it was restored") == *bytes, "{what}: point {point} suffers");
    }
}
