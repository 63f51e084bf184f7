//! Restores are exact, cost what differs, refuse what they must, and say what is lost (I1, I8, I9, I10).

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_tests::fixture::{GROUP, number};
use backhaul_tests::process::{Ran, tool, until};
use backhaul_tests::{Fixture, Loop, Mount, Random, image, needs_root};

const MIB: u64 = 1 << 20;
const LEN: u64 = 24 * MIB + 4321;

/// Three points of a volume with data and holes; copies of what it was at each.
struct Setup {
    f: Fixture,
    then: Vec<PathBuf>,
}

fn setup() -> Setup {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    let mut random = Random::new(1);
    image::sparse(&disk, LEN);
    image::write(&disk, MIB, &random.bytes(12 << 20));
    image::write(&disk, LEN - 1000, &random.bytes(1000));
    agent.protect("data", &disk);
    let mut then = Vec::new();
    for point in 1..=3 {
        agent.sync();
        let copy = f.path(&format!("then-{point}"));
        std::fs::copy(&disk, &copy).expect("there is room");
        then.push(copy);
        image::write(&disk, random.between(0, LEN - 300_000), &random.bytes(300_000));
        image::write(&disk, random.between(0, LEN - (1 << 20)), &vec![0; 1 << 20]);
    }
    // With no server running.
    serving.stop();
    Setup { f, then }
}

impl Setup {
    fn restore(&self, what: &str, to: &Path, more: &[&str]) -> Ran {
        let what = format!("{GROUP}/data{what}");
        self.f.receiver(&[&["restore", &what, "--to", to.to_str().expect("UTF-8")], more].concat())
    }
}

#[test]
fn every_point_to_a_new_file() {
    let s = setup();
    for (i, then) in s.then.iter().enumerate() {
        let to = s.f.path(&format!("new-{i}"));
        let restored = s.restore(&format!("@{}", i + 1), &to, &[]).ok();
        assert_eq!(restored["schema"], "backhaul.restore/1");
        assert_eq!(number(&restored, "point"), i as u64 + 1);
        assert!(image::same(&to, then));
        assert_eq!(restored["digest"], image::digest(then, 65536));
        assert_eq!(restored["verified"], "device");
        assert_eq!(number(&restored, "bytes_verified"), LEN);
        assert!(number(&restored, "bytes_fetched") < 15 * MIB);
        let meta = std::fs::metadata(&to).expect("it is there");
        assert!(meta.blocks() * 512 < 16 * MIB, "holes stay holes");
    }
    let latest = s.restore("", &s.f.path("latest"), &["--verify", "cached"]).ok();
    assert_eq!((number(&latest, "point"), latest["verified"].as_str()), (3, Some("cached")));
    assert!(image::same(&s.f.path("latest"), &s.then[2]));
}

#[test]
fn by_time() {
    let s = setup();
    let times: Vec<String> = s.f.points().iter().map(|p| p["time"].as_str().expect("a time").to_owned()).collect();
    for (i, then) in s.then.iter().enumerate() {
        // Times are shown to the millisecond, and a point is found by its own.
        let to = s.f.path("at");
        assert_eq!(number(&s.restore(&format!("@{}", times[i]), &to, &[]).ok(), "point"), i as u64 + 1);
        assert!(image::same(&to, then));
    }
    s.restore("@2001-01-01T00:00:00Z", &s.f.path("x"), &[]).fails(10, "E_NOTFOUND");
    assert!(!s.f.path("x").exists());
}

#[test]
fn in_place_fetches_only_what_differs() {
    let s = setup();
    let to = s.f.path("target");
    std::fs::copy(&s.then[0], &to).expect("there is room");
    let plan = s.restore("@3", &to, &["--dry-run"]).ok();
    assert_eq!(plan["schema"], "backhaul.restore-plan/1");
    assert!(image::same(&to, &s.then[0]), "a plan writes nothing");
    let restored = s.restore("@3", &to, &[]).ok();
    assert!(image::same(&to, &s.then[2]));
    assert!(number(&restored, "bytes_fetched") < 2 * MIB, "{restored}");
    assert_eq!(number(&restored, "bytes_fetched"), number(&plan["volumes"][0], "fetched"));
    let again = s.restore("@3", &to, &[]).ok();
    assert_eq!((number(&again, "bytes_fetched"), number(&again, "bytes_written")), (0, 0));
    assert_eq!(number(&again, "bytes_verified"), LEN);
}

#[test]
fn onto_a_larger_dirty_file_no_stale_byte_is_left() {
    let s = setup();
    let to = s.f.path("target");
    image::random(&to, LEN + 5 * MIB, &mut Random::new(9));
    s.restore("@2", &to, &[]).ok();
    assert!(image::same(&to, &s.then[1]) && image::same(&s.then[1], &to));
    // And onto a shorter one.
    image::random(&to, 100_000, &mut Random::new(9));
    s.restore("@1", &to, &[]).ok();
    assert!(image::same(&to, &s.then[0]) && image::same(&s.then[0], &to));
}

#[test]
fn a_dry_run_of_a_new_file_makes_none() {
    let s = setup();
    let to = s.f.path("none");
    let plan = s.restore("@1", &to, &["--dry-run"]).ok();
    assert_eq!(number(&plan["volumes"][0], "length"), LEN);
    assert!(!to.exists());
}

#[test]
fn a_plan_over_the_network_is_what_the_restore_does() {
    let s = setup();
    let serving = s.f.serve();
    let agent = s.f.agent("agent").through(&serving.address());
    let to = s.f.path("target");
    let to_text = to.to_str().expect("UTF-8");
    let plan = agent.run(&["restore", "data@3", "--to", to_text, "--dry-run"]).ok();
    assert_eq!((number(&plan["volumes"][0], "length"), to.exists()), (LEN, false));
    std::fs::copy(&s.then[0], &to).expect("there is room");
    let plan = agent.run(&["restore", "data@3", "--to", to_text, "--dry-run"]).ok();
    assert!(image::same(&to, &s.then[0]), "a plan writes nothing");
    let (written, zeroed) = (number(&plan["volumes"][0], "written"), number(&plan["volumes"][0], "zeroed"));
    assert!(written > 0 && zeroed > 0, "{plan}");
    assert_eq!(written + zeroed + number(&plan["volumes"][0], "equal"), LEN);
    let restored = agent.run(&["restore", "data@3", "--to", to_text]).ok();
    assert!(image::same(&to, &s.then[2]));
    assert_eq!(number(&restored, "bytes_written"), written + zeroed);
    agent.run(&["restore", "data@3", "--to", &format!("other={to_text}")]).fails(2, "E_USAGE");
}

#[test]
fn killed_and_run_again() {
    let s = setup();
    let to = s.f.path("target");
    let mut random = Random::printed("restore::killed_and_run_again");
    for _ in 0..6 {
        let what = format!("{GROUP}/data@3");
        let args = ["restore", what.as_str(), "--to", to.to_str().expect("UTF-8")];
        let mut child = backhaul_tests::Child::start(s.f.receiver_command(&args), &s.f.path("restore.err"));
        std::thread::sleep(Duration::from_millis(random.between(1, 250)));
        child.kill();
    }
    s.restore("@3", &to, &[]).ok();
    assert!(image::same(&to, &s.then[2]));
}

#[test]
fn a_whole_group_at_one_point() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    for (name, seed) in [("a", 1), ("b", 2)] {
        image::random(&f.path(name), 3 * MIB + seed, &mut Random::new(seed));
        agent.protect(name, &f.path(name));
    }
    agent.sync();
    let at = |name: &str| format!("{name}={}", f.path(&format!("to-{name}")).display());
    let restored = f.receiver(&["restore", GROUP, "--to", &at("a"), "--to", &at("b")]).ok();
    assert_eq!(restored["volumes"].as_array().map(Vec::len), Some(2));
    assert!(image::same(&f.path("a"), &f.path("to-a")) && image::same(&f.path("b"), &f.path("to-b")));
    f.receiver(&["restore", GROUP, "--to", &at("a")]).fails(2, "E_USAGE");
    f.receiver(&["restore", GROUP, "--to", &at("a"), "--to", &at("nosuch")]).fails(2, "E_USAGE");
    let twice = format!("b={}", f.path("to-a").display());
    f.receiver(&["restore", GROUP, "--to", &at("a"), "--to", &twice]).fails(2, "E_USAGE");
}

#[test]
fn what_is_not_there() {
    let s = setup();
    let to = s.f.path("none");
    s.restore("@99", &to, &[]).fails(10, "E_NOTFOUND");
    s.restore("@0", &to, &[]).fails(10, "E_NOTFOUND");
    for what in ["web/nosuch", "nosuch", "nosuch/data"] {
        s.f.receiver(&["restore", what, "--to", to.to_str().expect("UTF-8")]).fails(10, "E_NOTFOUND");
    }
    for what in ["web/data@yesterday", "web/data@-1", "../web", "web/data/x", "web/data@99999999999999999999"] {
        let ran = s.f.receiver(&["restore", what, "--to", to.to_str().expect("UTF-8")]);
        assert_eq!(ran.code, Some(2), "{ran:#?}");
    }
    assert!(!to.exists());
}

#[test]
fn only_fuzzy_points_need_to_be_named() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    let _writer = std::fs::OpenOptions::new().write(true).open(f.path("disk.img")).expect("it is there");
    assert_eq!(agent.sync()["consistency"], "fuzzy");
    let to = f.path("to");
    let to_text = to.to_str().expect("UTF-8");
    f.receiver(&["restore", "web/data", "--to", to_text]).fails(10, "E_NOTFOUND");
    let ran = f.receiver(&["restore", "web/data@1", "--to", to_text]);
    assert_eq!(ran.ok()["consistency"], "fuzzy");
    assert!(ran.err.contains("fuzzy"), "{}", ran.err);
}

/// Targets that are refused: exit 4 (or what is truer), and nothing is written.
#[test]
fn refused_targets() {
    let s = setup();
    let folder = s.f.path("a-folder");
    std::fs::create_dir(&folder).expect("it can be made");
    s.restore("", &folder, &[]).fails(4, "E_TARGET");
    s.restore("", Path::new("/dev/null"), &[]).fails(4, "E_TARGET");
    s.restore("", &s.f.path("no/such/folder/x"), &[]).fails(10, "E_TARGET");
    let fifo = s.f.path("fifo");
    tool("mkfifo", [fifo.to_str().expect("UTF-8")]);
    s.restore("", &fifo, &[]).fails(4, "E_TARGET");
}

#[test]
fn refused_devices() {
    if !needs_root("refused_devices") {
        return;
    }
    let s = setup();
    let small = Loop::new(&s.f.path("small"), 8 * MIB);
    s.restore("", small.path(), &[]).fails(4, "E_TARGET");

    let device = Loop::new(&s.f.path("device"), 64 * MIB);
    let text = device.path().to_str().expect("UTF-8").to_owned();
    tool("mkfs.ext4", ["-q", "-F", &text]);
    let before = image::digest(device.path(), 65536);
    let refused = s.restore("", device.path(), &[]).fails(4, "E_TARGET");
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("--confirm-target")), "{refused}");
    s.restore("", device.path(), &["--confirm-target", "/dev/sda"]).fails(4, "E_TARGET");
    {
        let mounted = Mount::new(device.path(), &s.f.path("mnt"));
        let refused = s.restore("", device.path(), &["--confirm-target", &text]).fails(4, "E_TARGET");
        assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("mounted")), "{refused}");
        // The file beneath is in use as well.
        s.restore("", &s.f.path("device"), &[]).fails(4, "E_TARGET");
        tool("umount", [mounted.path().to_str().expect("UTF-8")]);
    }
    let _ = before;
    let restored = s.restore("", device.path(), &["--confirm-target", &text]).ok();
    assert_eq!(restored["verified"], "device");
    let (mut found, mut expected) = (vec![0; LEN as usize], vec![0; LEN as usize]);
    let read = |path: &Path, into: &mut [u8]| {
        std::fs::File::open(path).and_then(|f| f.read_exact_at(into, 0)).expect("it can be read");
    };
    read(device.path(), &mut found);
    read(&s.then[2], &mut expected);
    assert!(found == expected);
    // Again it costs nothing.
    let again = s.restore("", device.path(), &["--confirm-target", &text]).ok();
    assert_eq!(number(&again, "bytes_written"), 0, "{again}");

    image::sparse(&s.f.path("read-only"), 64 * MIB);
    let read_only = Loop::read_only(&s.f.path("read-only"));
    s.restore("", read_only.path(), &[]).fails(4, "E_TARGET");
}

#[test]
fn a_file_system_survives_the_way_there_and_back() {
    if !needs_root("a_file_system_survives_the_way_there_and_back") {
        return;
    }
    for kind in ["ext4", "xfs"] {
        let f = Fixture::new();
        let serving = f.serve();
        let agent = f.joined("agent", &serving);
        let device = Loop::new(&f.path("disk"), 320 * MIB);
        let text = device.path().to_str().expect("UTF-8").to_owned();
        match kind {
            "ext4" => tool("mkfs.ext4", ["-q", "-F", &text]),
            _ => tool("mkfs.xfs", ["-q", "-f", &text]),
        };
        let content = Random::new(7).bytes(9_000_000);
        {
            let mounted = Mount::new(device.path(), &f.path("mnt"));
            std::fs::write(mounted.path().join("file"), &content).expect("there is room");
            tool("umount", [mounted.path().to_str().expect("UTF-8")]);
        }
        agent.protect("root", device.path());
        let synced = agent.sync();
        assert_eq!(synced["consistency"], "crash");
        let target = Loop::new(&f.path("target"), 330 * MIB);
        f.receiver(&["restore", "web/root", "--to", target.path().to_str().expect("UTF-8")]).ok();
        let mounted = Mount::new(target.path(), &f.path("mnt-2"));
        let found = std::fs::read(mounted.path().join("file")).expect("it is there");
        let differs = found.iter().zip(&content).position(|(a, b)| a != b);
        let digests = [device.path(), &f.path("disk")].map(|p| image::digest(p, 65536));
        assert!(
            found == content,
            "{kind}: {} bytes, the first that differs is {differs:?}; synced {}, now on device and file {digests:?}",
            found.len(),
            synced["volumes"][0]["digest"]
        );
        tool("umount", [mounted.path().to_str().expect("UTF-8")]);
    }
}

/// Damages the largest segment in its middle.
fn damage(f: &Fixture) -> PathBuf {
    let victim = f.objects_with("segments").into_iter().max_by_key(|p| std::fs::metadata(p).map_or(0, |m| m.len()));
    let victim = victim.expect("there are segments");
    let len = std::fs::metadata(&victim).expect("it is there").len();
    make_writable(&victim);
    image::write(&victim, len / 2, b"rotten");
    victim
}

fn make_writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
}

#[test]
fn damage_is_found_named_and_salvaged_around() {
    let s = setup();
    let clean = s.f.receiver(&["verify", GROUP]).ok();
    assert_eq!(
        (clean["schema"].as_str(), clean["damaged"].as_array().map(Vec::len)),
        (Some("backhaul.verify/1"), Some(0))
    );
    assert!(number(&clean, "bytes_verified") > 11 * MIB);
    let before = s.f.objects();

    let victim = damage(&s.f);
    let name = victim.file_name().expect("a name").to_string_lossy().into_owned();
    let ran = s.f.receiver(&["verify", "web/data@1"]);
    assert_eq!(ran.code, Some(6), "{ran:#?}");
    let damaged = ran.json()["damaged"].clone();
    let range = &damaged[0];
    assert!(range["object"].as_str().is_some_and(|o| o.contains(&name)), "{damaged}");
    assert_eq!(range["volume"], "data");
    let (start, end) = (number(range, "start"), number(range, "end"));
    assert!(end > start && end - start <= 65536, "just the block: {damaged}");
    assert_eq!(s.f.objects(), before, "verify writes nothing");

    let to = s.f.path("salvaged");
    let failed = s.restore("@1", &to, &[]);
    assert_eq!(failed.code, Some(6), "{failed:#?}");
    assert_eq!(failed.json()["schema"], "backhaul.error/1");

    let salvaged = s.restore("@1", &to, &["--salvage"]);
    assert_eq!(salvaged.code, Some(6), "{salvaged:#?}");
    assert_eq!(salvaged.json()["verified"], "incomplete", "what is lost can't be verified");
    let lost = salvaged.json()["lost"].clone();
    assert_eq!((number(&lost[0], "start"), number(&lost[0], "end")), (start, end), "{lost}");
    // Everything else is right.
    let (mut found, mut expected) =
        (std::fs::read(&to).expect("it is there"), std::fs::read(&s.then[0]).expect("it is there"));
    assert_eq!(found.len(), expected.len());
    for bytes in [&mut found, &mut expected] {
        bytes[start as usize..end as usize].fill(0);
    }
    assert!(found == expected);
    // A target that has the block already does not need it.
    std::fs::copy(&s.then[0], &to).expect("there is room");
    s.restore("@1", &to, &[]).ok();
}

#[test]
fn a_lost_segment_is_named_before_anything_is_written() {
    let s = setup();
    let victim = damage(&s.f);
    std::fs::remove_file(&victim).expect("it is there");
    let to = s.f.path("none");
    s.restore("@1", &to, &[]).fails(6, "E_DAMAGED");
    assert!(!to.exists(), "nothing was written");
    let salvaged = s.restore("@1", &to, &["--salvage"]);
    assert_eq!(salvaged.code, Some(6), "{salvaged:#?}");
    assert!(!salvaged.json()["lost"].as_array().expect("a list").is_empty());
    let ran = s.f.receiver(&["verify", "web/data@1"]);
    assert_eq!(ran.code, Some(6), "{ran:#?}");
}

#[test]
fn verify_reads_a_sample() {
    let s = setup();
    let all = number(&s.f.receiver(&["verify", GROUP]).ok(), "bytes_verified");
    let none = number(&s.f.receiver(&["verify", GROUP, "--read-data", "0%"]).ok(), "bytes_verified");
    let some = number(&s.f.receiver(&["verify", GROUP, "--read-data", "30%"]).ok(), "bytes_verified");
    assert!(none == 0 && some > all / 10 && some < all / 2, "{none} {some} {all}");
    for bad in ["101%", "-1%", "1e99", "all"] {
        let ran = s.f.receiver(&["verify", GROUP, &format!("--read-data={bad}")]);
        assert_eq!(ran.code, Some(2), "{ran:#?}");
    }
    s.f.receiver(&["verify"]).ok();
    s.f.receiver(&["verify", "nosuch"]).fails(10, "E_NOTFOUND");
    s.f.receiver(&["verify", "web/data@77"]).fails(10, "E_NOTFOUND");
}

#[test]
fn restores_run_beside_a_receiver_and_an_agent_at_work() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, 8 * MIB, &mut Random::new(1));
    agent.protect("data", &disk);
    agent.sync();
    let first = std::fs::read(&disk).expect("it is there");
    let _running = agent.start(&["run", "--every", "1s"]);
    let mut random = Random::new(2);
    for _ in 0..4 {
        image::write(&disk, random.between(0, 7 * MIB), &random.bytes(400_000));
        let to = f.path("to");
        f.receiver(&["restore", "web/data@1", "--to", to.to_str().expect("UTF-8")]).ok();
        assert!(std::fs::read(&to).expect("it is there") == first);
    }
    until("points", Duration::from_secs(30), || f.points().len() > 1);
}
