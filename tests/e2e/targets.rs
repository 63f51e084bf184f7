//! Targets of a restore that would destroy what they restore from, several targets at once, and a restore over the
//! network (I9, I10).

use std::path::Path;

use backhaul_tests::fixture::{GROUP, Serving, number};
use backhaul_tests::process::run;
use backhaul_tests::{Agent, Fixture, Random, image};

const MIB: u64 = 1 << 20;

/// Two volumes with one point each agent and receiver can restore.
fn setup() -> (Fixture, Serving, Agent) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    for (name, seed) in [("a", 1), ("b", 2)] {
        image::random(&f.path(name), MIB + seed, &mut Random::new(seed));
        agent.protect(name, &f.path(name));
    }
    agent.sync();
    (f, serving, agent)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Whoever restores, and by whatever name: what this machine replicates is not written to.
#[test]
fn what_is_protected_on_this_machine_is_no_target() {
    let (f, _serving, agent) = setup();
    image::write(&f.path("a"), 0, b"newer than the point");
    let before = image::digest(&f.path("a"), 65536);
    std::os::unix::fs::symlink(f.path("a"), f.path("link")).expect("it can be made");
    std::fs::hard_link(f.path("a"), f.path("hard")).expect("it can be made");
    for name in ["a", "link", "hard"] {
        let to = f.path(name);
        let mut command = f.receiver_command(&["restore", "web/b", "--to", text(&to)]);
        command.env("BACKHAUL_AGENT_STATE", &agent.state);
        run(command, None).fails(4, "E_TARGET");
        agent.run(&["restore", "b", "--to", text(&to)]).fails(4, "E_TARGET");
        agent.run(&["restore", "a", "--to", text(&to)]).fails(4, "E_TARGET");
    }
    assert_eq!(image::digest(&f.path("a"), 65536), before, "nothing was written");
}

#[test]
fn the_store_itself_is_no_target() {
    let (f, _serving, _agent) = setup();
    let before = f.objects();
    let inside = f.store_path().join("groups/restored.img");
    let object = f.objects_with("/log/").remove(0);
    std::os::unix::fs::symlink(f.store_path(), f.path("way")).expect("it can be made");
    for to in [&inside, &object, &f.path("way/x"), &f.store_path().join("../store/x")] {
        f.receiver(&["restore", "web/a", "--to", text(to)]).fails(4, "E_TARGET");
        let named = format!("a={}", to.display());
        let other = format!("b={}", f.path("to-b").display());
        f.receiver(&["restore", GROUP, "--to", &other, &named]).fails(4, "E_TARGET");
    }
    assert_eq!(f.objects(), before, "nothing was written");
    assert!(!f.path("to-b").exists());
}

#[test]
fn several_targets_after_one_option() {
    let (f, _serving, agent) = setup();
    let at = |name: &str| format!("{name}={}", f.path(&format!("to-{name}")).display());
    let restored = f.receiver(&["restore", GROUP, "--to", &at("a"), &at("b")]).ok();
    assert_eq!(restored["volumes"].as_array().map(Vec::len), Some(2));
    for name in ["a", "b"] {
        let to = f.path(&format!("to-{name}"));
        assert!(image::same(&to, &f.path(name)));
        std::fs::remove_file(to).expect("it was made");
    }
    let restored = agent.run(&["restore", "--to", &at("a"), &at("b")]).ok();
    assert_eq!(restored["volumes"].as_array().map(Vec::len), Some(2));
    assert!(["a", "b"].iter().all(|n| image::same(&f.path(n), &f.path(&format!("to-{n}")))));
}

/// More pages that differ than the agent asks about at once, some of the target's equal, some not, some beyond.
#[test]
fn many_pages_that_differ_over_the_network() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    agent.settings("block_size = \"16KiB\"\n");
    let (disk, to) = (f.path("disk.img"), f.path("to.img"));
    // A page is 16 MiB.
    let (page, pages) = (16 * MIB, 40);
    image::sparse(&disk, pages * page + 12_345);
    image::sparse(&to, pages * page + MIB);
    let mut random = Random::new(3);
    for i in 0..=pages {
        let at = i * page + random.between(0, 12_000);
        if i % 5 != 4 {
            image::write(&disk, at, &random.bytes(300));
        }
        match i % 4 {
            0 => image::write(&to, at, &random.bytes(40_000)),
            1 => image::write(&to, at + MIB, &random.bytes(10)),
            _ => {}
        }
    }
    agent.protect("data", &disk);
    agent.sync();
    let restored = agent.run(&["restore", "data", "--to", text(&to)]).ok();
    assert!(image::same(&disk, &to) && image::same(&to, &disk));
    assert_eq!(restored["digest"], image::digest(&disk, 16384));
    assert!(number(&restored, "bytes_fetched") < 2 * MIB, "{restored}");
    let again = agent.run(&["restore", "data", "--to", text(&to)]).ok();
    assert_eq!((number(&again, "bytes_fetched"), number(&again, "bytes_written")), (0, 0));
}
