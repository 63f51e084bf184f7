//! What people, disks and clocks get wrong: a clear error, its exit code, nothing lost (I13, I19).

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use backhaul_tests::fixture::{GROUP, Serving, number};
use backhaul_tests::process::{program, run, until};
use backhaul_tests::{Agent, Fixture, Mount, Random, SmallDisk, image, needs_root};

const MIB: u64 = 1 << 20;

fn setup() -> (Fixture, Serving, Agent) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), 2 * MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.sync();
    (f, serving, agent)
}

#[test]
fn wrong_usage_is_told_as_every_other_error() {
    let f = Fixture::bare();
    let agent = f.agent("agent");
    for bad in
        [&["sync", "--no-such-flag"][..], &["restore"], &["nonsense"], &["protect", "x"], &["run", "--every", "8d"]]
    {
        agent.run(bad).fails(2, "E_USAGE");
    }
    for bad in [&["points", "UPPER"][..], &["restore", "web"], &["token"], &["token", "--group", "a", "--address", "x"]]
    {
        f.receiver(bad).fails(2, "E_USAGE");
    }
    for program_name in ["backhaul-agent", "backhaul-receiver"] {
        let mut command = Command::new(program(program_name));
        command.arg("--help");
        let ran = run(command, None);
        assert!(ran.code == Some(0) && ran.out.contains("Usage") && ran.err.is_empty(), "{ran:#?}");
    }
}

#[test]
fn settings_that_are_wrong() {
    let f = Fixture::bare();
    let agent = f.agent("agent");
    agent.run(&["config", "check"]).ok();
    for bad in [
        "no_such_key = 1",
        "threads = 0",
        "threads = -1",
        "threads = 1e99",
        "threads = 100000",
        "compression = 99",
        "block_size = \"1000\"",
        "block_size = \"4KiB\"",
        "block_size = \"2MiB\"",
        "block_size = \"-64KiB\"",
        "block_size = \"99999999999TiB\"",
        "every = \"0s\"",
        "every = \"-5s\"",
        "every = \"1e99s\"",
        "every = \"5 parsecs\"",
        "every = 15",
        "snapshot = \"always\"",
        "snapshot = \"hooks\"",
        "snapshot = \"hooks\"\n[hooks]\npost = \"true\"",
        "snapshot = \"hooks\"\n[hooks]\npre = \"true\"",
        "snapshot = \"hooks\"\n[hooks]\npre = \"\"\npost = \"true\"",
        "snapshot = \"hooks\"\n[hooks]\npre = \"true\"\npost = \"true\"\ntimeout = \"0s\"",
        "snapshot = \"hooks\"\n[hooks]\npre = \"true\"\npost = \"true\"\nclaims = \"fuzzy\"",
        "snapshot = \"hooks\"\n[hooks]\npre = \"true\"\npost = \"true\"\nafter = \"true\"",
        "[hooks]\npre = \"true\"\npost = \"true\"",
        "snapshot = \"reflink\"\n[hooks]\npre = \"true\"\npost = \"true\"",
        "receiver = 5",
        "receiver = \"nowhere\"",
        "receiver = \"::1:4433\"",
        "threads = ",
        "[table]",
        "\u{0}",
    ] {
        agent.settings(bad);
        agent.run(&["config", "check"]).fails(78, "E_CONFIG");
        agent.run(&["sync"]).fails(78, "E_CONFIG");
    }
    let file = f.path("receiver.toml");
    for bad in [
        "no_such_key = 1",
        "memory = \"1KiB\"",
        "memory = \"-1\"",
        "memory = \"1e99\"",
        "segment_size = \"65MiB\"",
        "segment_size = \"1\"",
        "memory = \"16MiB\"\nsegment_size = \"16MiB\"",
        "max_sessions = 0",
        "max_sessions = -1",
        "listen = \"nowhere\"",
        "listen = \"1.2.3.4:99999\"",
        "store = \"ftp://x/y\"",
        "store = \"\"",
        "advertise = \"https://dr.example.com\"",
        "advertise = \"dr.example.com:0\"",
    ] {
        std::fs::write(&file, bad).expect("there is room");
        let mut command = Command::new(program("backhaul-receiver"));
        command.args(["config", "check", "--json", "--config"]).arg(&file).env_remove("BACKHAUL_STORE");
        let ran = run(command, None);
        assert!(ran.code == Some(78), "{bad}: {ran:#?}");
        ran.fails(78, "E_CONFIG");
    }
    let missing = f.path("missing.toml");
    f.receiver(&["config", "check", "--config", missing.to_str().expect("UTF-8")]).fails(78, "E_CONFIG");
}

#[test]
fn stores_that_are_wrong() {
    let f = Fixture::bare();
    let receiver = |store: &str, args: &[&str]| {
        let mut command = Command::new(program("backhaul-receiver"));
        command.args(args).args(["--json", "--store", store, "--state"]).arg(f.receiver_state());
        command.env_remove("BACKHAUL_STORE");
        run(command, None)
    };
    for bad in ["", "x", "/srv/store", "file://relative/path", "http://host/x", "s3://", "s3:///prefix", "file://"] {
        receiver(bad, &["points"]).fails(78, "E_CONFIG");
        receiver(bad, &["init"]).fails(78, "E_CONFIG");
    }
    let missing = format!("file://{}", f.path("no-such-store").display());
    for args in [&["points"][..], &["agents"], &["verify"], &["restore", "web/data", "--to", "/tmp/never"]] {
        let ran = receiver(&missing, args);
        assert!(matches!(ran.code, Some(10 | 78)), "{ran:#?}");
        assert!(!ran.err.contains("panicked"));
    }
    assert!(!f.path("no-such-store").exists(), "only init makes a store");
    // A folder that is no store.
    std::fs::create_dir(f.path("empty")).expect("it can be made");
    let empty = format!("file://{}", f.path("empty").display());
    let ran = receiver(&empty, &["points"]);
    assert!(ran.code != Some(0) && ran.json()["error"]["message"].is_string(), "{ran:#?}");
    // A file where a folder should be.
    std::fs::write(f.path("file"), "x").expect("there is room");
    let file = format!("file://{}", f.path("file").display());
    for args in [&["points"][..], &["init"]] {
        let ran = receiver(&file, args);
        assert!(ran.code != Some(0) && !ran.err.contains("panicked"), "{ran:#?}");
    }
    let ran = receiver(&missing, &["serve", "--listen", "127.0.0.1:0"]);
    assert!(matches!(ran.code, Some(10 | 78)), "{ran:#?}");
    let mut none = Command::new(program("backhaul-receiver"));
    none.args(["points", "--json"]).env_remove("BACKHAUL_STORE").arg("--state").arg(f.receiver_state());
    run(none, None).fails(2, "E_USAGE");
}

#[test]
fn init_again_changes_nothing() {
    let f = Fixture::new();
    let (objects, authority) = (f.objects(), std::fs::read(f.receiver_state().join("authority.pem")).expect("there"));
    let again = f.receiver(&["init"]).ok();
    assert_eq!((again["schema"].as_str(), again["created"].as_bool()), (Some("backhaul.init/1"), Some(false)));
    assert_eq!(f.objects(), objects);
    assert_eq!(std::fs::read(f.receiver_state().join("authority.pem")).expect("there"), authority);
    let mode = std::fs::metadata(f.receiver_state().join("authority.key")).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // A second receiver must be given the authority.
    let mut other = Command::new(program("backhaul-receiver"));
    other.args(["init", "--json", "--store", f.store_url(), "--state"]).arg(f.path("elsewhere"));
    run(other, None).fails(4, "E_STATE_DIR");
}

#[test]
fn sources_that_are_wrong() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let protect = |what: &str| agent.run(&["protect", what]);
    protect(&format!("data={}", f.path("missing").display())).fails(10, "E_SOURCE");
    for bad in ["data", "data=", "=x", "Data=/x", "../x=/x", "a b=/x"] {
        assert_eq!(protect(bad).code, Some(2), "{bad}");
    }
    let ran = protect(&format!("data={}", f.path("").display()));
    assert!(ran.code.is_some_and(|c| c != 0) && !ran.err.contains("panicked"), "a folder is no volume: {ran:#?}");
    assert_ne!(protect("data=/dev/null").code, Some(0), "a character device is none");
    let empty = f.path("empty");
    std::fs::write(&empty, "").expect("there is room");
    assert_ne!(protect(&format!("data={}", empty.display())).code, Some(0), "nor is an empty file");
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    agent.run(&["protect", &format!("again={}", f.path("disk.img").display())]).fails(2, "E_VOLUME");
    std::fs::remove_file(f.path("disk.img")).expect("it is there");
    agent.run(&["sync"]).fails(10, "E_SOURCE");
    assert!(f.points().is_empty());
}

#[test]
fn usage() {
    for name in ["backhaul-agent", "backhaul-receiver"] {
        for args in [&[][..], &["no-such-command"], &["--no-such-flag"], &["sync", "extra", "words"]] {
            let mut command = Command::new(program(name));
            command.args(args);
            assert_eq!(run(command, None).code, Some(2), "{name} {args:?}");
        }
        for args in [&["--help"][..], &["--version"]] {
            let mut command = Command::new(program(name));
            command.args(args);
            let ran = run(command, None);
            assert!(ran.code == Some(0) && ran.out.contains("backhaul"), "{ran:#?}");
        }
    }
}

/// Every kind of object, cut at many places, damaged, of a later version, of another kind: an error that names it.
#[test]
fn objects_that_are_damaged() {
    let (f, serving, agent) = setup();
    image::write(&f.path("disk.img"), 99, b"small");
    agent.sync();
    serving.stop();
    let verify = || f.receiver(&["verify", "web@1"]);
    verify().ok();
    let second = || f.receiver(&["verify", "web@2"]);
    second().ok();
    let one = |containing: &str| -> PathBuf { f.objects_with(containing).remove(0) };
    let victims = [one("/log/00000000000000000001"), one("/log/00000000000000000002"), one("format")];
    let mut random = Random::printed("objects_that_are_damaged");
    for path in victims {
        let bytes = std::fs::read(&path).expect("it is there");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
        let mut twins: Vec<(String, Vec<u8>)> = Vec::new();
        for keep in [0, 1, 7, 8, 63, 64, bytes.len() / 2, bytes.len() - 1] {
            twins.push((format!("cut to {keep}"), bytes[..keep.min(bytes.len() - 1)].to_vec()));
        }
        for _ in 0..6 {
            let at = random.between(0, bytes.len() as u64) as usize;
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << random.between(0, 8);
            twins.push((format!("flipped at {at}"), flipped));
        }
        twins.push(("longer".into(), [&bytes[..], &[0; 100]].concat()));
        twins.push(("zeroes".into(), vec![0; bytes.len()]));
        for (what, twin) in twins {
            std::fs::write(&path, &twin).expect("there is room");
            let ran = if path.ends_with("00000000000000000001") { verify() } else { second() };
            assert!(!ran.err.contains("panicked"), "{} {what}: {ran:#?}", path.display());
            assert_eq!(ran.code, Some(6), "{} {what}: {ran:#?}", path.display());
        }
        std::fs::write(&path, &bytes).expect("there is room");
    }
    verify().ok();
    second().ok();
}

/// What a restore refuses, `verify` must have found.
#[test]
fn a_segment_without_its_last_byte_is_found_by_verify() {
    let (f, serving, _agent) = setup();
    serving.stop();
    let path = f.objects_with("/segments/").remove(0);
    let bytes = std::fs::read(&path).expect("it is there");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("there is room");
    let restored = f.receiver(&["restore", "web/data@1", "--to", f.path("to").to_str().expect("UTF-8")]);
    let verified = f.receiver(&["verify", "web/data@1"]);
    // Nothing is lost by it: the records are whole. That it is damaged both say.
    let object = path.file_name().and_then(|n| n.to_str()).expect("UTF-8");
    assert!(restored.ok()["damaged"].to_string().contains(object));
    assert_eq!(verified.code, Some(6), "{verified:#?}");
    assert!(verified.out.contains(object), "{verified:#?}");
}

#[test]
fn a_damaged_head_of_the_log_stops_writers_and_earlier_points_can_be_had() {
    let (f, serving, agent) = setup();
    agent.sync();
    serving.stop();
    let path = f.objects_with("/log/00000000000000000002").remove(0);
    let bytes = std::fs::read(&path).expect("it is there");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    let mut flipped = bytes.clone();
    flipped[bytes.len() / 2] ^= 1;
    std::fs::write(&path, &flipped).expect("there is room");
    let serving = f.serve();
    let agent = agent.through(&serving.address());
    agent.run(&["sync"]).fails(6, "E_DAMAGED");
    assert_eq!(f.objects_with("/log/").len(), 3, "nothing is written after what can't be read");
    f.receiver(&["restore", "web/data@1", "--to", f.path("to").to_str().expect("UTF-8")]).ok();
    assert!(image::same(&f.path("to"), &f.path("disk.img")));
    std::fs::write(&path, &bytes).expect("there is room");
    assert_eq!(number(&agent.sync(), "point"), 3);
}

#[test]
fn state_files_that_are_damaged() {
    let (f, _serving, agent) = setup();
    for name in ["identity.json", "volumes.json", "writer.json", "agent.crt", "agent.key"] {
        let path = agent.state.join(name);
        let bytes = std::fs::read(&path).expect("it is there");
        let longer = [&bytes[..], b"x"].concat();
        for twin in [&b""[..], b"{", b"\xff\xfe\x00", &bytes[..bytes.len() / 2], &longer] {
            if name == "agent.key" && twin == longer {
                // What stands after the key is nothing to a PEM reader.
                continue;
            }
            std::fs::write(&path, twin).expect("there is room");
            let ran = agent.run(&["sync"]);
            assert!(!ran.err.contains("panicked") && ran.code != Some(0), "{name} {twin:?}: {ran:#?}");
            assert!(matches!(ran.code, Some(4 | 12 | 78)), "{name}: {ran:#?}");
        }
        std::fs::write(&path, &bytes).expect("there is room");
        agent.sync();
    }
    let authority = f.receiver_state().join("authority.key");
    std::fs::write(&authority, "garbage").expect("there is room");
    f.receiver(&["token", "--group", GROUP, "--address", "h:1"]).fails(78, "E_STATE_DIR");
}

/// Fills a disk; what needs it says exit 14, and goes on when there is room again.
#[test]
fn no_space_in_the_store() {
    if !needs_root("no_space_in_the_store") {
        return;
    }
    let f = Fixture::bare();
    let disk = SmallDisk::new(&f.path(""), "small", 128 * MIB);
    let store = Fixture::with_store(&disk.path().join("store"));
    let serving = store.serve();
    let agent = store.joined("agent", &serving);
    let image = store.path("disk.img");
    image::random(&image, 20 * MIB, &mut Random::new(1));
    agent.protect("data", &image);
    agent.sync();
    image::random(&image, 20 * MIB, &mut Random::new(2));
    let ballast = disk.fill(2 * MIB);
    agent.run(&["sync"]).fails(14, "E_NOSPACE");
    assert_eq!(store.points().len(), 1, "the old point is there");
    std::fs::remove_file(&ballast).expect("it is there");
    let synced = agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&image, 65536));
    store.receiver(&["verify", GROUP]).ok();
    // A service goes on by itself.
    let _running = agent.start(&["run", "--every", "1s"]);
    let points = store.points().len();
    let ballast = disk.fill(MIB);
    image::random(&image, 20 * MIB, &mut Random::new(3));
    let state = || agent.run(&["status"]).json()["state"].clone();
    until("it is noticed", Duration::from_secs(60), || state() == "disconnected" || state() == "stalled");
    std::fs::remove_file(&ballast).expect("it is there");
    // Each try that failed took room with it: what arrived is a draft that the next try builds on.
    until("room again, a point again", Duration::from_secs(90), || {
        store.points().len() > points && state() == "continuous"
    });
}

#[test]
fn no_space_for_the_agents_state() {
    if !needs_root("no_space_for_the_agents_state") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let small = Mount::tmpfs(&f.path("tiny"), MIB);
    let agent = f.agent("agent").with_state(&small.path().join("state"));
    agent.join(&f.token(&serving.address(), &[])).ok();
    agent.settings("block_size = \"16KiB\"");
    let image = f.path("disk.img");
    // 32 bytes for each of 4096 blocks.
    image::random(&image, 64 * MIB, &mut Random::new(1));
    agent.protect("data", &image);
    agent.sync();
    let room = rustix_free(small.path());
    std::fs::write(small.path().join("ballast"), vec![1; room as usize]).expect("just fits");
    image::write(&image, 5, b"changed");
    agent.run(&["sync"]).fails(14, "E_NOSPACE");
    std::fs::remove_file(small.path().join("ballast")).expect("it is there");
    let synced = agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&image, 16384));
}

fn rustix_free(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).expect("mounted");
    stat.f_bavail * stat.f_frsize
}

#[test]
fn no_space_on_the_target() {
    if !needs_root("no_space_on_the_target") {
        return;
    }
    let (f, _serving, agent) = setup();
    let small = Mount::tmpfs(&f.path("tiny"), MIB);
    let to = small.path().join("to");
    let to = to.to_str().expect("UTF-8");
    f.receiver(&["restore", "web/data", "--to", to]).fails(14, "E_NOSPACE");
    agent.run(&["restore", "data", "--to", to]).fails(14, "E_NOSPACE");
    assert!(!small.path().join("to").exists(), "nothing was written");
}

/// A volume that is mostly zeroes fits where there is room for the rest only.
#[test]
fn room_for_what_is_not_zero_is_enough() {
    if !needs_root("room_for_what_is_not_zero_is_enough") {
        return;
    }
    let (f, serving, _agent) = setup();
    let agent = f.joined("sparse", &serving);
    let disk = f.path("sparse.img");
    std::fs::File::create(&disk).and_then(|f| f.set_len(300 * MIB)).expect("a sparse file");
    image::write(&disk, 200 * MIB, b"something");
    agent.protect("sparse", &disk);
    f.receiver(&["adopt", GROUP, &agent.id()]).ok();
    agent.sync();
    let small = Mount::tmpfs(&f.path("tiny"), 2 * MIB);
    let to = small.path().join("to");
    agent.run(&["restore", "sparse", "--to", to.to_str().expect("UTF-8"), "--verify", "cached"]).ok();
}

#[test]
fn a_machine_id_that_can_not_be_read_is_no_other_machine() {
    let (f, _serving, agent) = setup();
    let file = f.path("agent.machine-id");
    let id = std::fs::read(&file).expect("it has one");
    std::fs::remove_file(&file).expect("it is there");
    for args in [&["sync"][..], &["config", "check"]] {
        let failed = agent.run(args).fails(78, "E_CONFIG");
        let message = failed["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("machine-id"), "{failed}");
    }
    std::fs::write(&file, id).expect("writable");
    agent.sync();
}

#[test]
fn a_state_folder_that_can_not_be_written() {
    if !needs_root("a_state_folder_that_can_not_be_written") {
        return;
    }
    let f = Fixture::new();
    let serving = f.serve();
    let small = Mount::tmpfs(&f.path("tiny"), 4 * MIB);
    let agent = f.agent("agent").with_state(&small.path().join("state"));
    agent.join(&f.token(&serving.address(), &[])).ok();
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    backhaul_tests::process::tool("mount", ["-o", "remount,ro", small.path().to_str().expect("UTF-8")]);
    for args in [&["sync"][..], &["unprotect", "data"]] {
        let ran = agent.run(args);
        assert!(matches!(ran.code, Some(78)), "{ran:#?}");
    }
    agent.run(&["status"]).ok();
}
