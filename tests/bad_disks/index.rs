//! The agent's state on a disk that fails: the index is a cache, and everything else is said (F5, F8, F19).

use std::path::PathBuf;

use backhaul_tests::faultdisk::{Effect, FileSystem, Op, Order, Rule};
use backhaul_tests::fixture::{Agent, Fixture, Serving, number};
use backhaul_tests::{Random, SmallDisk, image, needs_fault_disk, needs_root};

use super::{Disk, MIB};

struct Setup {
    f: Fixture,
    _serving: Serving,
    agent: Agent,
    disk: Disk,
    image: PathBuf,
}

/// An agent with its state on a disk, at its second point.
fn setup() -> Setup {
    let f = Fixture::new();
    let serving = f.serve();
    let disk = Disk::new(&f.path(""), "disk", FileSystem::Ext4);
    let agent = f.agent("agent").with_state(&disk.path().join("state"));
    agent.join(&f.token(&serving.address(), &[])).ok();
    let image = f.path("disk.img");
    image::random(&image, 40 * MIB, &mut Random::new(1));
    agent.settings("block_size = \"16KiB\"");
    agent.protect("data", &image);
    agent.sync();
    image::write(&image, 7 * MIB, b"second");
    agent.sync();
    Setup { f, _serving: serving, agent, disk, image }
}

impl Setup {
    /// The next point is right.
    #[track_caller]
    fn right(&self, what: &str) {
        let synced = self.agent.run(&["sync"]).ok();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&self.image, 16_384), "{what}");
        self.f.receiver(&["verify"]).ok();
    }

    /// Where on the disk the digest of a block is: in the index.
    fn indexed(&self, block: u64) -> u64 {
        let path = self.agent.index_files().remove(0);
        let index = std::fs::read(path).expect("it can be read");
        let at = 4096 + (block * 32) as usize / 4096 * 4096;
        self.disk.find(&index[at..at + 512])
    }
}

/// Bits of the index rot: no point is wrong for it, and nothing equal is sent again.
#[test]
fn an_index_that_rots() {
    if !needs_fault_disk("an_index_that_rots") {
        return;
    }
    let mut s = setup();
    for (i, block) in [0_u64, 3, 1000, 1024, 2000, 2559].into_iter().enumerate() {
        let at = s.indexed(block) + 32 * (block % 128);
        s.disk.disk.order(&Order::Rot { at, mask: 1 << i });
        s.disk.again();
        // Also where the block that it is about has changed.
        image::write(&s.image, block * 16_384, &[i as u8; 100]);
        s.right(&format!("block {block}"));
        assert_eq!(number(&s.agent.sync(), "bytes_sent"), 0);
    }
}

/// Sectors of the index can't be read.
#[test]
fn an_index_that_can_not_be_read() {
    if !needs_fault_disk("an_index_that_can_not_be_read") {
        return;
    }
    let mut s = setup();
    for block in [0_u64, 1024, 2559] {
        let at = s.indexed(block);
        s.disk.again();
        s.disk.disk.fault(Rule::new(Op::Read, Effect::Eio).within(at..at + 512));
        image::write(&s.image, block * 16_384, b"changed");
        let ran = s.agent.run(&["sync"]);
        assert!(ran.code.is_some() && !ran.err.contains("panicked"), "block {block}: killed by a signal: {ran:#?}");
        println!("block {block}: exit {:?}: {}", ran.code, ran.out);
        s.disk.disk.heal();
        s.disk.again();
        s.right(&format!("block {block}"));
    }
}

/// Writes and flushes of the state fail: no point on top of what the agent could not write down, none is lost.
#[test]
fn a_state_that_can_not_be_written() {
    if !needs_fault_disk("a_state_that_can_not_be_written") {
        return;
    }
    let mut s = setup();
    let (mut failed, mut random) = (0, Random::new(2));
    for (op, n) in (0..8).map(|n| (Op::Flush, n)).chain((0..8).map(|n| (Op::Write, n))) {
        let what = format!("{op:?} {n}");
        image::write(&s.image, random.between(0, 39 * MIB), &random.bytes(1000));
        s.disk.disk.fault(Rule::new(op, Effect::Eio).skip(n).times(1));
        let ran = s.agent.run(&["sync"]);
        assert!(ran.code.is_some() && !ran.err.contains("panicked"), "{what}: {ran:#?}");
        if ran.code != Some(0) {
            failed += 1;
            let json = ran.json();
            assert!(json["error"]["message"].as_str().is_some_and(|m| m.contains("state")), "{what}: {json}");
        }
        s.disk.lose_power();
        let points = s.f.points().len() as u64;
        s.right(&what);
        assert_eq!(s.f.points().len() as u64, points + 1, "{what}");
    }
    println!("{failed} syncs failed");
    assert!(failed >= 4, "{failed}");
}

/// No room for the state at any moment: said with the exit code for it or not needed; room again, all is well (F19).
#[test]
fn no_room_for_the_state() {
    if !needs_root("no_room_for_the_state") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let disk = SmallDisk::new(&f.path(""), "small", 16 * MIB);
    let image = f.path("disk.img");
    image::random(&image, 40 * MIB, &mut Random::new(1));
    let mut refused = 0;
    for (i, but) in [0_u64, 4096, 8192, 16 << 10, 40 << 10, 100 << 10].into_iter().enumerate() {
        let agent = f.agent(&format!("agent-{i}")).with_state(&disk.path().join(format!("state-{i}")));
        agent.settings("block_size = \"16KiB\"");
        // Room for joining, not for what comes then; and no room at all.
        let token = f.receiver(&["token", "--group", &format!("g{i}"), "--address", &serving.address()]).ok();
        agent.join(token["token"].as_str().expect("a token")).ok();
        agent.protect("data", &image);
        let ballast = disk.fill_up(but);
        let ran = agent.run(&["sync"]);
        if ran.code != Some(0) {
            ran.fails(14, "E_NOSPACE");
            refused += 1;
        }
        ballast.iter().for_each(|file| drop(std::fs::remove_file(file)));
        image::write(&image, i as u64 * MIB, b"changed");
        let synced = agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&image, 16_384), "{but} bytes of room");
    }
    assert!(refused >= 2, "{refused}");
}
