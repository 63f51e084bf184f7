//! Points are right, and cost what they should.

use backhaul_tests::fixture::{GROUP, number};
use backhaul_tests::{Fixture, Random, image};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Of a record.
const HEADER: u64 = 64;

#[test]
fn a_first_point_then_nothing_then_just_what_changed() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    // A short last block, and holes.
    image::sparse(&disk, 40 * MIB + 12_345);
    let mut random = Random::new(1);
    image::write(&disk, 3 * MIB, &random.bytes(5 << 20));
    image::write(&disk, 40 * MIB + 12_000, &random.bytes(345));
    agent.protect("data", &disk);

    let first = agent.sync();
    assert_eq!(number(&first, "point"), 1);
    assert_eq!(first["schema"], "backhaul.sync/1");
    assert_eq!(first["volumes"][0]["digest"], image::digest(&disk, 65536));
    // 80 full blocks, 1 short one; holes are not even read.
    let sent = number(&first, "bytes_sent");
    assert!((5 * MIB + 81 * HEADER..5 * MIB + 100 * KIB).contains(&sent), "{sent}");
    assert!(number(&first, "bytes_scanned") < 8 * MIB, "holes are not read: {first}");

    let stored = f.stored("segments");
    let second = agent.sync();
    assert_eq!(number(&second, "point"), 2, "sync always commits");
    assert_eq!(number(&second, "bytes_sent"), 0, "no record at all");
    assert_eq!(second["volumes"][0]["digest"], first["volumes"][0]["digest"]);
    assert_eq!(f.stored("segments"), stored);

    // Three blocks: one in the middle, one that was a hole, the short one.
    image::write(&disk, 4 * MIB + 5, &[1]);
    image::write(&disk, 30 * MIB, &random.bytes(64 << 10));
    image::write(&disk, 40 * MIB + 12_344, &[9]);
    let third = agent.sync();
    let sent = number(&third, "bytes_sent");
    assert!((2 * 64 * KIB..3 * (64 * KIB + HEADER) + HEADER).contains(&sent), "{sent}");
    assert_eq!(third["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert_eq!(f.points().iter().map(|p| number(p, "point")).collect::<Vec<_>>(), [1, 2, 3]);
    serving.stop();
}

#[test]
fn zeroes_cost_a_header_and_no_payload() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, 32 * MIB, &mut Random::new(2));
    agent.protect("data", &disk);
    agent.sync();
    image::write(&disk, 8 * MIB, &vec![0; 16 << 20]);
    let zeroed = agent.sync();
    assert!(number(&zeroed, "bytes_sent") <= 4 * HEADER, "256 blocks of zeroes are one run: {zeroed}");
    assert_eq!(zeroed["volumes"][0]["digest"], image::digest(&disk, 65536));
    // Written zeroes and a hole are the same thing.
    std::fs::remove_file(&disk).expect("it is there");
    image::sparse(&disk, 32 * MIB);
    let emptied = agent.sync();
    assert!(number(&emptied, "bytes_sent") <= 8 * HEADER, "{emptied}");
    assert_eq!(number(&emptied, "bytes_scanned"), 0, "{emptied}");
    assert_eq!(emptied["volumes"][0]["digest"], image::digest(&disk, 65536));
}

#[test]
fn what_compresses_is_sent_compressed() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let text: Vec<u8> = (0..200_000).flat_map(|i| format!("line {i} of a log\n").into_bytes()).collect();
    std::fs::write(&disk, &text).expect("there is room");
    agent.protect("data", &disk);
    let synced = agent.sync();
    assert!(number(&synced, "bytes_sent") < text.len() as u64 / 2, "{synced}");
    assert!(number(&synced, "bytes_scanned") >= text.len() as u64);
}

#[test]
fn several_volumes_and_block_sizes_in_one_point() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let mut random = Random::new(3);
    let sizes = [
        ("small", "16KiB", 16 * KIB, 3 * MIB + 1),
        ("usual", "64KiB", 64 * KIB, 5 * MIB),
        ("large", "1MiB", MIB, 7 * MIB + 4097),
    ];
    for (name, setting, _, len) in sizes {
        image::random(&f.path(name), len, &mut random);
        agent.settings(&format!("block_size = \"{setting}\""));
        agent.protect(name, &f.path(name));
    }
    let first = agent.sync();
    for (i, (name, _, block, len)) in sizes.into_iter().enumerate() {
        let volume = &first["volumes"][i];
        assert_eq!(volume["name"], name);
        assert_eq!(volume["digest"], image::digest(&f.path(name), block as u32));
        let listed = &f.points()[0]["volumes"][i];
        assert_eq!((listed["name"].as_str(), number(listed, "bytes")), (Some(name), len));
        assert_eq!(listed["digest"], volume["digest"]);
    }
    // A byte in each costs one block of each.
    for (name, ..) in sizes {
        image::write(&f.path(name), 2 * MIB + 7, b"x");
    }
    let second = agent.sync();
    let blocks: u64 = sizes.iter().map(|s| s.2 + HEADER).sum();
    assert!(number(&second, "bytes_sent") <= blocks, "{second}");
    for (i, (name, _, block, _)) in sizes.into_iter().enumerate() {
        assert_eq!(second["volumes"][i]["digest"], image::digest(&f.path(name), block as u32));
    }
}

#[test]
fn two_groups_in_one_store_know_nothing_of_each_other() {
    let f = Fixture::new();
    let serving = f.serve();
    let (one, two) = (f.joined("one", &serving), f.agent("two"));
    let token = f.receiver(&["token", "--group", "db", "--address", &serving.address()]).ok();
    assert_eq!(two.join(token["token"].as_str().expect("a token")).ok()["group"], "db");
    image::random(&f.path("a"), 2 * MIB, &mut Random::new(4));
    image::random(&f.path("b"), 3 * MIB, &mut Random::new(5));
    one.protect("data", &f.path("a"));
    two.protect("data", &f.path("b"));
    assert_eq!(number(&one.sync(), "point"), 1);
    assert_eq!(number(&two.sync(), "point"), 1);
    assert_eq!(number(&one.sync(), "point"), 2);
    let listed = |group: &str| {
        let points = f.receiver(&["points", group]).ok();
        let points = points["points"].as_array().expect("a list").clone();
        assert!(points.iter().all(|p| p["group"] == group));
        points.len()
    };
    assert_eq!((listed(GROUP), listed("db")), (2, 1));
    f.receiver(&["points", "nosuch"]).fails(10, "E_NOTFOUND");
}

#[test]
fn volumes_come_and_go_and_keep_their_name() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let mut random = Random::new(6);
    image::random(&f.path("a"), 2 * MIB, &mut random);
    image::random(&f.path("b"), 2 * MIB, &mut random);
    agent.run(&["sync"]).fails(78, "E_NOTHING");
    agent.protect("first", &f.path("a"));
    agent.sync();
    agent.protect("second", &f.path("b"));
    let both = agent.sync();
    assert_eq!(both["volumes"].as_array().map(Vec::len), Some(2));
    assert!(number(&both, "bytes_sent") < 3 * MIB, "the first is there already: {both}");
    agent.run(&["unprotect", "first"]).ok();
    agent.run(&["unprotect", "first"]).fails(10, "E_NOTFOUND");
    let one = agent.sync();
    assert_eq!(one["volumes"].as_array().map(Vec::len), Some(1));
    assert_eq!(one["volumes"][0]["name"], "second");
    assert_eq!(number(&one, "bytes_sent"), 0);
    // Named again it is a new volume that is compared anew; nothing is mixed up with the old one.
    agent.protect("first", &f.path("a"));
    let again = agent.sync();
    let digests: Vec<_> = again["volumes"].as_array().expect("a list").iter().map(|v| v["digest"].clone()).collect();
    assert_eq!(digests, [image::digest(&f.path("b"), 65536), image::digest(&f.path("a"), 65536)]);
}

#[test]
fn a_volume_that_grew_is_accepted_and_one_that_shrank_is_not() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let mut random = Random::new(7);
    image::random(&disk, 4 * MIB + 100, &mut random);
    agent.protect("data", &disk);
    agent.sync();
    // The last block was short and becomes longer.
    let file = std::fs::OpenOptions::new().write(true).open(&disk).expect("it is there");
    file.set_len(6 * MIB + 50).expect("there is room");
    image::write(&disk, 6 * MIB, b"new at the end");
    let ran = agent.run(&["sync"]);
    let grown = ran.ok();
    assert!(ran.err.contains("grew"), "it is said: {}", ran.err);
    assert!(number(&grown, "bytes_sent") < 200 * KIB, "what was there already is not sent again: {grown}");
    assert_eq!(grown["volumes"][0]["digest"], image::digest(&disk, 65536));

    file.set_len(5 * MIB).expect("it can shrink");
    let refused = agent.run(&["sync"]).fails(4, "E_VOLUME");
    let next = refused["error"]["next"].as_str().expect("what to type next");
    assert!(next.contains("protect data="), "{next}");
    assert_eq!(f.points().len(), 2, "nothing was committed");
    let named = agent.protect("data", &disk);
    assert_eq!(number(&named["volumes"][0], "incarnation"), 3);
    let shrunk = agent.sync();
    assert_eq!(shrunk["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert_eq!(number(&f.points()[2]["volumes"][0], "bytes"), 5 * MIB);
    // Grown again over what had been cut off: that was zero in between, and must be zero now.
    file.set_len(6 * MIB + 50).expect("there is room");
    let again = agent.sync();
    assert_eq!(again["volumes"][0]["digest"], image::digest(&disk, 65536));
}

#[test]
fn a_new_file_under_the_same_path_is_the_same_volume_and_another_path_a_new_incarnation() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let (disk, other) = (f.path("disk.img"), f.path("other.img"));
    image::random(&disk, 2 * MIB, &mut Random::new(8));
    agent.protect("data", &disk);
    agent.sync();
    std::fs::copy(&disk, f.path("copy")).expect("there is room");
    std::fs::rename(f.path("copy"), &disk).expect("the same folder");
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0, "another inode is no replacement");

    image::random(&other, 3 * MIB, &mut Random::new(9));
    let named = agent.protect("data", &other);
    assert_eq!(number(&named["volumes"][0], "incarnation"), 2);
    let third = agent.sync();
    assert_eq!(third["volumes"][0]["digest"], image::digest(&other, 65536));
    // The same again changes nothing.
    let named = agent.protect("data", &other);
    assert_eq!(number(&named["volumes"][0], "incarnation"), 2);
    // And the same bytes elsewhere are not sent again.
    std::fs::copy(&other, f.path("moved")).expect("there is room");
    agent.protect("data", &f.path("moved"));
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0);
}

#[test]
fn a_block_that_changes_back_is_right() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, MIB, &mut Random::new(10));
    agent.protect("data", &disk);
    let a = agent.sync()["volumes"][0]["digest"].clone();
    image::write(&disk, 70_000, b"B");
    let old = std::fs::read(&disk).expect("it is there");
    let b = agent.sync()["volumes"][0]["digest"].clone();
    assert_ne!(a, b);
    image::random(&disk, MIB, &mut Random::new(10));
    let back = agent.sync();
    assert_eq!(back["volumes"][0]["digest"], a);
    assert!(number(&back, "bytes_sent") > 60_000, "A, B, A is sent again: {back}");
    std::fs::write(&disk, old).expect("there is room");
    assert_eq!(agent.sync()["volumes"][0]["digest"], b);
}

#[test]
fn many_points_and_folds_stay_right() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let mut random = Random::new(11);
    image::random(&disk, 24 * MIB, &mut random);
    agent.protect("data", &disk);
    agent.sync();
    for round in 0..40 {
        // More than fits into the record every other time: segments and records inside are mixed.
        for _ in 0..if round % 2 == 0 { 2 } else { 12 } {
            let at = random.between(0, 24 * MIB - 5000);
            image::write(&disk, at, &random.bytes(5000));
        }
        let synced = agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536), "round {round}");
    }
    assert_eq!(f.points().len(), 41);
    serving.stop();
    // A receiver that knows nothing opens the same.
    let serving = f.serve();
    let agent = agent.through(&serving.address());
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0);
}

#[test]
fn a_writer_during_the_sync_makes_the_point_fuzzy() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, 2 * MIB, &mut Random::new(12));
    agent.protect("data", &disk);
    assert_eq!(agent.sync()["consistency"], "crash", "a file that nobody has open earns its label by a lease");
    // Open for writing is enough: the agent can't know that nothing is written.
    let writer = std::fs::OpenOptions::new().write(true).open(&disk).expect("it is there");
    let ran = agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "fuzzy");
    assert!(ran.err.contains("warning:"), "{}", ran.err);
    drop(writer);
    assert_eq!(agent.sync()["consistency"], "crash");
    let labels: Vec<_> = f.points().iter().map(|p| p["consistency"].clone()).collect();
    assert_eq!(labels, ["crash", "fuzzy", "crash"]);
}
