//! Damage of one object costs what lies in it and nothing else, and is named with what to type next (I8, I10).

use std::path::{Path, PathBuf};
use std::process::Command;

use backhaul_tests::fixture::{GROUP, number};
use backhaul_tests::process::{Ran, program};
use backhaul_tests::{Fixture, Random, image};

const MIB: u64 = 1 << 20;

/// Three points: the first in segments, the others inside their log records or in segments of their own.
struct Setup {
    f: Fixture,
    then: Vec<PathBuf>,
}

fn setup() -> Setup {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let mut random = Random::new(7);
    image::random(&disk, 6 * MIB, &mut random);
    agent.protect("data", &disk);
    let mut then = Vec::new();
    for point in 1..=3 {
        agent.sync();
        let copy = f.path(&format!("then-{point}"));
        std::fs::copy(&disk, &copy).expect("there is room");
        then.push(copy);
        image::write(&disk, MIB * point, &random.bytes(600_000));
    }
    serving.stop();
    Setup { f, then }
}

impl Setup {
    fn one(&self, containing: &str) -> PathBuf {
        self.f.objects_with(containing).remove(0)
    }

    fn flip(&self, path: &Path) -> Vec<u8> {
        let whole = std::fs::read(path).expect("it is there");
        let mut bytes = whole.clone();
        bytes[whole.len() / 2] ^= 1;
        overwrite(path, &bytes);
        whole
    }

    fn restore(&self, what: &str, to: &str) -> Ran {
        let to = self.f.path(to);
        self.f.receiver(&["restore", what, "--to", to.to_str().expect("UTF-8")])
    }

    fn restores(&self, what: &str, point: usize) {
        let _ = std::fs::remove_file(self.f.path("to"));
        self.restore(what, "to").ok();
        assert!(image::same(&self.f.path("to"), &self.then[point - 1]));
    }

    /// Keys that `verify` calls damaged; it must go on to the end.
    fn verify(&self, more: &[&str]) -> Vec<String> {
        let ran = self.f.receiver(&[&["verify"], more].concat());
        assert_eq!(ran.code, Some(6), "{ran:#?}");
        assert_eq!(ran.json()["schema"], "backhaul.verify/1");
        let damaged = ran.json()["damaged"].as_array().expect("a list").clone();
        damaged.iter().map(|d| d["object"].as_str().expect("a key").to_owned()).collect()
    }
}

fn overwrite(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).expect("it is there");
    std::fs::write(path, bytes).expect("there is room");
}

fn log(seq: u64) -> String {
    format!("/log/{seq:020}")
}

#[test]
fn one_damaged_record_is_named_and_all_other_points_are_listed_and_restored() {
    let s = setup();
    s.flip(&s.one(&log(2)));
    let ran = s.f.receiver(&["points"]);
    assert_eq!(ran.code, Some(6), "{ran:#?}");
    let listed = ran.json();
    let numbers: Vec<u64> = listed["points"].as_array().expect("a list").iter().map(|p| number(p, "point")).collect();
    assert_eq!(numbers, [1, 3]);
    let damaged = &listed["damaged"][0];
    assert_eq!((damaged["group"].as_str(), number(damaged, "record")), (Some(GROUP), 2));
    assert!(damaged["object"].as_str().is_some_and(|o| o.ends_with(&log(2))), "{damaged}");
    assert!(s.verify(&[]).iter().any(|o| o.ends_with(&log(2))));
    s.restores("web/data@1", 1);
    s.restores("web/data@3", 3);
    s.restores("web/data", 3);
    let failed = s.restore("web/data@2", "none").fails(6, "E_DAMAGED");
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(&log(2))), "{failed}");
}

#[test]
fn the_latest_fails_when_its_record_is_damaged_and_the_next_line_restores_the_one_before() {
    let s = setup();
    s.flip(&s.one(&log(3)));
    for what in ["web/data", "web/data@latest"] {
        let failed = s.restore(what, "to").fails(6, "E_DAMAGED");
        let message = failed["error"]["message"].as_str().expect("a text");
        assert!(message.contains(&log(3)) && message.contains("@2"), "{message}");
        assert!(!s.f.path("to").exists(), "nothing was written");
        // As it is printed, by a shell.
        let next = failed["error"]["next"].as_str().expect("a command");
        let folder = program("backhaul-receiver").parent().expect("a folder").to_owned();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        let done = Command::new("sh").args(["-c", next]).env("PATH", path).output().expect("a shell");
        assert!(done.status.success(), "{next}: {}", String::from_utf8_lossy(&done.stderr));
        assert!(image::same(&s.f.path("to"), &s.then[1]), "{next}");
        std::fs::remove_file(s.f.path("to")).expect("it was restored");
    }
}

#[test]
fn an_agent_that_wants_the_latest_is_told_which_point_it_can_have() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    agent.sync();
    let path = f.objects_with(&log(2)).remove(0);
    overwrite(&path, b"no record");
    let to = f.path("to");
    let failed = agent.run(&["restore", "data", "--to", to.to_str().expect("UTF-8")]).fails(6, "E_DAMAGED");
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains("@1")), "{failed}");
    agent.run(&["restore", "data@1", "--to", to.to_str().expect("UTF-8")]).ok();
    assert!(image::same(&to, &f.path("disk.img")));
}

#[test]
fn damaged_descriptions_and_names_are_named_and_points_can_be_had() {
    let s = setup();
    for (path, key) in [(s.f.store_path().join("format"), "format"), (s.one("names/"), "names/web")] {
        let whole = std::fs::read(&path).expect("it is there");
        for at in [0, 8, 10, 12, 16, 40, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            overwrite(&path, &bytes);
            assert_eq!(s.verify(&[]), [key], "byte {at}");
            assert_eq!(s.verify(&["web/data@2"]), [key], "byte {at}");
        }
        let ran = s.f.receiver(&["points"]);
        assert_eq!(ran.code, Some(6), "{ran:#?}");
        assert_eq!(ran.json()["points"].as_array().map(Vec::len), Some(3), "{ran:#?}");
        s.restores("web/data@2", 2);
        std::fs::remove_file(&path).expect("it is there");
        assert_eq!(s.verify(&[]), [key]);
        s.restores("web/data", 3);
        std::fs::write(&path, &whole).expect("there is room");
    }
    s.f.receiver(&["verify"]).ok();
}

#[test]
fn verify_names_everything_that_is_damaged_at_once() {
    let s = setup();
    let segment = s.one("/segments/");
    s.flip(&segment);
    s.flip(&s.one(&log(1)));
    s.flip(&s.f.store_path().join("format"));
    let found = s.verify(&[]);
    let name = segment.file_name().expect("a name").to_string_lossy().into_owned();
    for want in ["format", &log(1), &name] {
        assert!(found.iter().any(|o| o.ends_with(want)), "{want} in {found:?}");
    }
}

#[test]
fn a_restore_that_meets_damage_says_how_to_salvage() {
    let s = setup();
    let segment = s.one("/segments/");
    std::fs::remove_file(&segment).expect("it is there");
    let failed = s.restore("web/data@1", "to").fails(6, "E_DAMAGED");
    let next = failed["error"]["next"].as_str().expect("advice");
    assert!(next.contains("--salvage") && next.contains("verify"), "{next}");
    let name = segment.file_name().expect("a name").to_string_lossy().into_owned();
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(&name)), "{failed}");
    assert!(!s.f.path("to").exists(), "nothing was written");
}

/// The index of the newest point is damaged: the agent has it all, and the next point is whole again.
#[test]
fn what_the_newest_point_lost_is_sent_again() {
    let f = Fixture::new();
    let serving = f.serve();
    let mut agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let mut random = Random::new(3);
    image::random(&disk, 6 * MIB, &mut random);
    agent.protect("data", &disk);
    // Enough small points that there are maps.
    for i in 0..66 {
        image::write(&disk, i * 65_536, &random.bytes(100));
        agent.sync();
    }
    image::write(&disk, MIB, &random.bytes(2_000_000));
    let newest = number(&agent.sync(), "point");
    let mut serving = Some(serving);
    let mut mended = 0;
    for kind in ["/segments/", "/maps/"] {
        for path in f.objects_with(kind) {
            serving.take().expect("it serves").stop();
            let whole = std::fs::read(&path).expect("it is there");
            std::fs::remove_file(&path).expect("it is ours");
            let needed = f.receiver(&["verify", GROUP]).code == Some(6);
            let again = f.serve();
            agent = agent.through(&again.address());
            // Blocks that changed meanwhile, became zero, and became what they were at some time before.
            image::write(&disk, 5 * MIB, &random.bytes(1000));
            image::write(&disk, 2 * MIB, &[0; 65_536]);
            let point = number(&agent.sync(), "point");
            assert!(point > newest);
            serving = Some(again);
            if f.receiver(&["verify", GROUP]).code == Some(6) {
                // Its index is in a map, which is whole: that the records are gone only `verify` can tell.
                assert_eq!(kind, "/segments/", "{}", path.display());
                std::fs::write(&path, whole).expect("there is room");
                continue;
            }
            let to = f.path("to");
            let _ = std::fs::remove_file(&to);
            f.receiver(&["restore", "web/data", "--to", to.to_str().expect("UTF-8")]).ok();
            assert!(image::same(&to, &disk), "{}", path.display());
            assert_eq!(number(&agent.sync(), "bytes_sent"), 0, "{}", path.display());
            mended += usize::from(needed);
        }
    }
    assert!(mended >= 2, "{mended} objects were needed");
}

/// One object that lets an agent in is damaged: the others are listed, and everybody names it.
#[test]
fn a_damaged_member_hides_no_other() {
    let f = Fixture::new();
    let serving = f.serve();
    let (one, _two) = (f.joined("one", &serving), f.joined("two", &serving));
    let id = one.id();
    let path = f.objects_with("/agents/").into_iter().find(|p| p.to_string_lossy().contains(&id)).expect("it joined");
    let mut bytes = std::fs::read(&path).expect("it is there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    overwrite(&path, &bytes);
    let agents = f.receiver(&["agents"]);
    assert_eq!(agents.code, Some(6), "{agents:#?}");
    let said = agents.json();
    assert_eq!(said["agents"].as_array().map(Vec::len), Some(1), "{said}");
    assert!(said["damaged"].to_string().contains(&id), "{said}");
    let verified = f.receiver(&["verify"]);
    assert!(verified.code == Some(6) && verified.out.contains(&id), "{verified:#?}");
}

/// Agents that fail leave no session behind that keeps the next one out.
#[test]
fn an_agent_that_fails_again_and_again_locks_nobody_out() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    let writer = agent.state.join("writer.json");
    let whole = std::fs::read(&writer).expect("it synced");
    std::fs::write(&writer, b"{").expect("it is ours");
    for _ in 0..12 {
        agent.run(&["sync"]).fails(78, "E_STATE_DIR");
    }
    std::fs::write(&writer, whole).expect("it is ours");
    let ran = agent.run(&["sync"]);
    ran.ok();
    assert!(!ran.err.contains("as many sessions"), "{ran:#?}");
}
