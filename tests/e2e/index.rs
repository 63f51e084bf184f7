//! The agent's index is a cache: lost, damaged, old or somebody else's, the next point is right and nothing that the
//! receiver has is sent again (F23).

use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_tests::fixture::{Serving, number};
use backhaul_tests::{Agent, Fixture, Random, image};

const MIB: u64 = 1 << 20;
/// Three blocks with their headers, and one more header.
const THREE_BLOCKS: u64 = 3 * (65536 + 64) + 64;

struct Setup {
    f: Fixture,
    agent: Agent,
    _serving: Serving,
}

/// Two volumes of several pages each, at their second point.
fn setup() -> Setup {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    // 16 KiB blocks: a page is 16 MiB.
    agent.settings("block_size = \"16KiB\"");
    image::random(&f.path("a"), 40 * MIB + 5, &mut Random::new(1));
    image::random(&f.path("b"), 20 * MIB, &mut Random::new(2));
    agent.protect("a", &f.path("a"));
    agent.protect("b", &f.path("b"));
    agent.sync();
    Setup { f, agent, _serving: serving }
}

/// The next point is right, and cheap.
#[track_caller]
fn proves_right(s: &Setup) {
    image::write(&s.f.path("a"), 17 * MIB, b"changed");
    image::write(&s.f.path("b"), 3 * MIB, b"changed");
    let synced = s.agent.sync();
    let expected = [image::digest(&s.f.path("a"), 16384), image::digest(&s.f.path("b"), 16384)];
    let found: Vec<_> = synced["volumes"].as_array().expect("a list").iter().map(|v| v["digest"].clone()).collect();
    assert_eq!(found, expected);
    assert!(number(&synced, "bytes_sent") <= THREE_BLOCKS, "nothing equal is sent again: {synced}");
    assert_eq!(number(&s.agent.sync(), "bytes_sent"), 0, "and the index is right afterwards");
}

fn change_each(agent: &Agent, mut change: impl FnMut(&Path, u64)) {
    let files = agent.index_files();
    assert_eq!(files.len(), 2);
    for path in files {
        let len = std::fs::metadata(&path).expect("it is there").len();
        change(&path, len);
    }
}

fn open(path: &Path) -> std::fs::File {
    std::fs::OpenOptions::new().write(true).open(path).expect("it is there")
}

#[test]
fn deleted() {
    let s = setup();
    change_each(&s.agent, |path, _| std::fs::remove_file(path).expect("it is there"));
    proves_right(&s);
}

#[test]
fn truncated() {
    for keep in [0_u64, 1, 63, 64, 4095, 4096, 4097, 30_000] {
        let s = setup();
        change_each(&s.agent, |path, len| open(path).set_len(keep.min(len)).expect("it can shrink"));
        proves_right(&s);
    }
}

#[test]
fn flipped() {
    let mut random = Random::printed("index::flipped");
    let s = setup();
    for _ in 0..6 {
        change_each(&s.agent, |path, len| {
            for _ in 0..50 {
                open(path).write_all_at(&[random.number() as u8], random.between(0, len)).expect("there is room");
            }
        });
        proves_right(&s);
    }
}

#[test]
fn overwritten_with_noise_or_zeroes() {
    let s = setup();
    let mut random = Random::new(3);
    change_each(&s.agent, |path, len| {
        open(path).write_all_at(&random.bytes(len as usize), 0).expect("there is room");
    });
    proves_right(&s);
    change_each(&s.agent, |path, len| {
        open(path).write_all_at(&vec![0; len as usize], 0).expect("there is room");
    });
    proves_right(&s);
    change_each(&s.agent, |path, len| {
        open(path).write_all_at(&vec![0; len as usize - 4096], 4096).expect("there is room");
    });
    proves_right(&s);
}

#[test]
fn an_old_copy_is_put_back() {
    let s = setup();
    let old: Vec<_> = s.agent.index_files().iter().map(|p| (p.clone(), std::fs::read(p).expect("there"))).collect();
    let mut random = Random::new(4);
    for _ in 0..3 {
        image::write(&s.f.path("a"), random.between(0, 39 * MIB), &random.bytes(1 << 20));
        s.agent.sync();
    }
    for (path, bytes) in old {
        std::fs::write(path, bytes).expect("there is room");
    }
    proves_right(&s);
}

#[test]
fn that_of_another_volume() {
    let s = setup();
    let files = s.agent.index_files();
    let contents: Vec<_> = files.iter().map(|p| std::fs::read(p).expect("it is there")).collect();
    std::fs::write(&files[0], &contents[1]).expect("there is room");
    std::fs::write(&files[1], &contents[0]).expect("there is room");
    proves_right(&s);
}
