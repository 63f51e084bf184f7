//! A store that takes nothing more, read-only or full: said with the exit code that is true, and still good for reading.

use std::process::Command;

use backhaul_tests::process::{program, run};
use backhaul_tests::{Fixture, Random, SmallDisk, image, needs_root};

const MIB: u64 = 1 << 20;

#[test]
fn a_store_that_can_not_be_written_is_said_and_can_be_read() {
    if !needs_root("a_store_that_can_not_be_written_is_said_and_can_be_read") {
        return;
    }
    let base = Fixture::bare();
    let disk = SmallDisk::new(&base.path(""), "small", 128 * MIB);
    let f = Fixture::with_store(&disk.path().join("store"));
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), 2 * MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    serving.stop();
    let remount = |how: &str| {
        let path = disk.path().to_str().expect("UTF-8").to_owned();
        backhaul_tests::process::tool("mount", ["-o", how, &path]);
    };
    remount("remount,ro");
    let read_only = |failed: serde_json::Value| {
        let message = failed["error"]["message"].as_str().expect("a text").to_owned();
        assert!(message.contains("read-only"), "{message}");
    };
    let new = Fixture::bare();
    let url = format!("file://{}", disk.path().join("another").display());
    let mut init = Command::new(program("backhaul-receiver"));
    init.args(["init", "--json", "--store", &url, "--state"]).arg(new.receiver_state());
    read_only(run(init, None).fails(78, "E_STORE"));
    read_only(f.receiver(&["token", "--group", "other", "--address", "127.0.0.1:1"]).fails(78, "E_STORE"));
    // Reading goes on: a receiver serves restores from it, and says what a sync can't do.
    let serving = f.serve();
    let agent = agent.through(&serving.address());
    read_only(agent.run(&["sync"]).fails(1, "E_STORE"));
    let to = f.path("to");
    agent.run(&["restore", "data", "--to", to.to_str().expect("UTF-8")]).ok();
    f.receiver(&["verify"]).ok();
    assert_eq!(f.points().len(), 1);
    serving.stop();
    remount("remount,rw");
    // Full: nothing that was there is lost, and what is new is refused.
    let _ballast = disk.fill(MIB);
    let more = (0..10_000).take_while(|i| std::fs::write(disk.path().join(format!("more-{i}")), [1; 4096]).is_ok());
    assert!(more.count() < 10_000, "the disk is full");
    f.receiver(&["token", "--group", "other", "--address", "127.0.0.1:1"]).fails(14, "E_NOSPACE");
    let mut init = Command::new(program("backhaul-receiver"));
    init.args(["init", "--json", "--store", &url, "--state"]).arg(new.receiver_state());
    run(init, None).fails(14, "E_NOSPACE");
    assert_eq!(f.points().len(), 1);
}
