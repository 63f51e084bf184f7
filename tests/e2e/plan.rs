//! `plan`: figures that are near the truth, nothing written, nothing left behind.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use backhaul_tests::fixture::number;
use backhaul_tests::process::{run, until};
use backhaul_tests::{Fixture, Loop, Network, Random, Weather, image, needs_root};
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;
/// Where `plan` has its pins.
const PINS: &str = "/sys/fs/bpf/backhaul-plan";

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[track_caller]
fn figure(value: &Value, pointer: &str) -> f64 {
    value.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {pointer} in {value}"))
}

#[track_caller]
fn near(what: &str, found: f64, truth: f64, tolerance: f64) {
    assert!((found - truth).abs() <= truth * tolerance, "{what}: {found}, the truth is {truth}");
}

/// Writes 4 KiB into the next block of 64 KiB so many times a second, and into one hot block each time; while `work`
/// runs. Gives what that gave, and how many blocks a second were really touched.
fn while_written<T>(path: &Path, per_second: u64, flush: bool, work: impl FnOnce() -> T) -> (T, f64) {
    let stop = AtomicBool::new(false);
    let mut options = File::options();
    options.write(true);
    if flush {
        options.custom_flags(rustix::fs::OFlags::DSYNC.bits().cast_signed());
    }
    let file = options.open(path).expect("it is there");
    std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let (begun, mut written) = (Instant::now(), 0_u64);
            while !stop.load(Ordering::Relaxed) {
                let piece = Random::new(written).bytes(4096);
                file.write_all_at(&piece, (written + 1) * BLOCK).expect("there is room");
                file.write_all_at(&piece, 8192).expect("there is room");
                written += 1;
                let due = begun + Duration::from_secs_f64(written as f64 / per_second as f64);
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            written as f64 / begun.elapsed().as_secs_f64()
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        (done, writer.join().expect("it writes"))
    })
}

/// The pin folders of `plan`.
fn pins() -> BTreeSet<PathBuf> {
    std::fs::read_dir(PINS).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

#[test]
fn distinct_blocks_of_a_device_are_counted() {
    if !needs_root("distinct_blocks_of_a_device_are_counted") {
        return;
    }
    let f = Fixture::bare();
    let device = Loop::new(&f.path("disk"), 256 * MIB);
    let agent = f.agent("agent");
    let typed = format!("data={}", text(device.path()));
    let args = ["plan", &typed, "--for", "8s", "--every", "2s"];
    let (ran, rate) = while_written(device.path(), 100, true, || agent.run(&args));
    let plan = ran.ok();
    let volume = &plan["volumes"][0];
    assert_eq!(volume["how"], "hints", "{ran:#?}");
    near("distinct bytes a second", figure(volume, "/changed_bytes_per_second"), rate * BLOCK as f64, 0.2);
    near("an interval", figure(volume, "/changed_per_interval/median"), 2.0 * rate * BLOCK as f64, 0.2);
    // The hot block counts once for an interval; each written piece is in a block of 16 KiB too, and in one of 256 KiB
    // with three others.
    let by_size: Vec<f64> = (0..3).map(|i| figure(volume, &format!("/block_sizes/{i}/changed_per_interval"))).collect();
    near("16 KiB blocks are a quarter", by_size[0], by_size[1] / 4.0, 0.1);
    near("256 KiB blocks are hardly more", by_size[2], by_size[1], 0.1);
    assert_eq!(volume["recommended_block_size"], 16 << 10, "{volume}");
    assert!(number(volume, "written_bytes") as f64 > rate * 8.0 * 8192.0 * 0.8, "two writes each: {volume}");
    // A point a second sees as much, and the hot block each time.
    let policies = plan["policies"].as_array().expect("a list");
    let second = policies.iter().find(|p| figure(p, "/every") == 1.0).expect("in seconds too");
    near("a second", figure(second, "/changed/median"), rate * BLOCK as f64, 0.2);
    assert_eq!(figure(volume, "/changed_bytes/margin"), 0.0, "nothing is guessed");
}

#[test]
fn distinct_blocks_of_an_image_are_counted() {
    let f = Fixture::bare();
    let disk = f.path("disk.img");
    image::random(&disk, 256 * MIB, &mut Random::new(1));
    let agent = f.agent("agent");
    let args = ["plan", text(&disk), "--for", "8s", "--every", "2s"];
    let (ran, rate) = while_written(&disk, 40, false, || agent.run(&args));
    let plan = ran.ok();
    let volume = &plan["volumes"][0];
    assert_eq!((&volume["how"], &volume["name"]), (&"compared".into(), &"disk-img".into()), "{volume}");
    assert!(volume["why"].as_str().expect("why").contains("image file"), "{volume}");
    near("distinct bytes a second", figure(volume, "/changed_bytes_per_second"), rate * BLOCK as f64, 0.2);
    assert!(figure(volume, "/round_seconds") > 0.0, "how long a reading takes is said: {volume}");
    // Where only a part was read the margin says what it may be off.
    let (share, margin) = (figure(volume, "/compared_share"), figure(volume, "/changed_bytes/margin"));
    assert!((share == 1.0) == (margin == 0.0), "{volume}");
}

#[test]
fn what_was_planned_is_what_a_sync_takes() {
    let f = Fixture::new();
    let disk = f.path("disk.img");
    // Noise, then text that compresses, then zeroes, then a hole.
    image::random(&disk, 32 * MIB, &mut Random::new(2));
    let line = b"all work and no play makes a dull disk. ";
    let lines: Vec<u8> = line.iter().copied().cycle().take(32 << 20).collect();
    let file = File::options().write(true).open(&disk).expect("it is there");
    file.write_all_at(&lines, 32 * MIB).expect("room");
    file.write_all_at(&vec![0; 16 << 20], 64 * MIB).expect("room");
    file.set_len(1024 * MIB).expect("it is sparse");
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    agent.protect("data", &disk);
    let plan = agent.run(&["plan", "--for", "1s", "--every", "1s", "--put-price", "0.005"]).ok();
    let volume = &plan["volumes"][0];
    let synced = agent.sync();
    let (stored, margin) = (figure(volume, "/stored_bytes/value"), figure(volume, "/stored_bytes/margin"));
    let sent = number(&synced, "bytes_sent") as f64;
    assert!((stored - sent).abs() <= 2.0 * margin + 0.02 * sent, "{stored} with a margin of {margin}: {synced}");
    near("data", figure(volume, "/data_bytes/value"), 64.0 * MIB as f64, 0.1);
    near("the store", figure(&plan, "/storage/first/value"), f.stored("groups/") as f64, 0.1);
    let objects = f.objects();
    let puts = objects.keys().filter(|k| k.contains("/segments/") || k.contains("/log/") || k.contains("/maps/"));
    let difference = figure(&plan, "/requests/first_sync_puts") - puts.count() as f64;
    assert!(difference.abs() <= 2.0, "{difference} PUTs: {objects:?}");
    assert!(plan["network"]["measured"].as_bool().expect("measured"), "{plan}");
    assert!(figure(&plan, "/cost/puts") > 0.0 && plan["cost"]["storage"].is_null(), "{plan}");
    assert_eq!(figure(&plan, "/changed_per_interval/peak"), 0.0, "nobody writes");
    // In words, too.
    let mut command = std::process::Command::new(backhaul_tests::process::program("backhaul-agent"));
    command.args(["plan", "--for", "1s", "--every", "1s", "--no-network", "--state"]).arg(&agent.state);
    let ran = run(command, None);
    assert_eq!(ran.code, Some(0), "{ran:#?}");
    for word in ["first sync", "restore", "requests", "storage", "advice", "blocks looked at", "left out: --no-network"]
    {
        assert!(ran.out.contains(word), "{word}: {}", ran.out);
    }
}

#[test]
fn the_rate_of_a_narrow_link_is_found() {
    let f = Fixture::new();
    let disk = f.path("disk.img");
    image::random(&disk, 4 * MIB, &mut Random::new(3));
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    for rate in [4_000_000_u64, 16_000_000] {
        network.set(Weather::Narrow(rate));
        let plan = agent.run(&["plan", text(&disk), "--for", "1s", "--every", "1s"]).ok();
        let found = figure(&plan, "/network/bytes_per_second");
        near("bytes a second", found, rate as f64, 0.3);
        assert!(figure(&plan, "/network/seconds") < 7.0, "bounded: {plan}");
        let idle = figure(&plan, "/network/round_trip_seconds");
        assert!(idle > 0.0 && idle < 0.2, "on one machine: {plan}");
        // 4 MiB over it.
        near("first sync", figure(&plan, "/first_sync/value"), 4.0 * MIB as f64 / found + 0.2, 0.2);
        assert_eq!(plan["first_sync_limit"], "link");
    }
    // A link that is known need not be measured.
    network.set(Weather::Cut);
    let plan = agent.run(&["plan", text(&disk), "--for", "1s", "--every", "1s", "--link", "2MiB"]).ok();
    assert_eq!(plan["network"]["measured"], false);
    near("first sync", figure(&plan, "/first_sync/value"), 2.2, 0.1);
    // And one that is cut is no reason to tell nothing.
    let ran = agent.run(&["plan", text(&disk), "--for", "1s", "--every", "1s"]);
    assert!(ran.ok()["network"].is_null() && ran.err.contains("left out"), "{ran:#?}");
    assert!(figure(&ran.ok(), "/first_sync/value") < 2.0, "what the machine itself takes: {ran:#?}");
}

#[test]
fn measuring_disturbs_no_writer() {
    let f = Fixture::new();
    let disk = f.path("disk.img");
    image::random(&disk, 8 * MIB, &mut Random::new(4));
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    agent.protect("data", &disk);
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("the first point", Duration::from_secs(20), || f.points().len() == 1);
    let (ran, _) = while_written(&disk, 10, false, || agent.run(&["plan", "--for", "2s", "--every", "1s"]));
    assert!(ran.ok()["network"]["measured"].as_bool().expect("measured"), "{ran:#?}");
    let points = f.points().len();
    assert!(points >= 4, "points went on while the path was measured: {points}");
    let said = running.err();
    assert!(!said.contains("took over") && !said.contains("trying again"), "{said}");
    assert!(running.is_running());
    until("another point", Duration::from_secs(20), || {
        image::write(&disk, MIB, &f.points().len().to_le_bytes());
        f.points().len() > points
    });
}

#[test]
fn two_that_measure_take_turns() {
    let f = Fixture::new();
    let disk = f.path("disk.img");
    image::random(&disk, MIB, &mut Random::new(8));
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let args = ["plan", text(&disk), "--for", "1s", "--every", "1s"];
    let begun = Instant::now();
    let plans = std::thread::scope(|s| [(); 2].map(|()| s.spawn(|| agent.run(&args).ok())).map(|t| t.join()));
    for plan in plans.into_iter().map(|plan| plan.expect("it ran")) {
        assert!(figure(&plan, "/network/bytes_per_second") > 1e6, "{plan}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "nobody waits for long: {:?}", begun.elapsed());
}

#[test]
fn before_joining_there_is_no_link_and_no_state() {
    let f = Fixture::bare();
    let disk = f.path("disk.img");
    image::random(&disk, 4 * MIB, &mut Random::new(5));
    let agent = f.agent("agent");
    let plan = agent.run(&["plan", text(&disk), "--for", "1s", "--every", "1s"]).ok();
    assert!(plan["network"].is_null(), "{plan}");
    assert!(plan["network_left_out"].as_str().expect("why").contains("not joined"), "{plan}");
    assert!(plan["policies"][0]["rpo"].is_null() && plan["sustainable"].is_null(), "{plan}");
    assert!(plan["advice"][0].as_str().expect("advice").contains("--link"), "{plan}");
    assert!(!agent.state.exists(), "nothing is written, not even an empty folder");
    agent.run(&["plan"]).fails(2, "E_NOTHING");
    agent.run(&["plan", text(&f.path("none"))]).fails(10, "E_SOURCE");
    agent.run(&["plan", text(&disk), "--for", "1s", "--every", "2s"]).fails(2, "E_USAGE");
    agent.run(&["plan", text(&disk), text(&disk)]).fails(2, "E_VOLUME");
    agent.run(&["plan", text(&disk), "--link", "0"]).fails(2, "E_USAGE");
    agent.run(&["plan", text(&disk), "--put-price", "-1"]).fails(2, "E_USAGE");
}

#[test]
fn without_privilege_a_device_is_compared() {
    if !needs_root("without_privilege_a_device_is_compared") {
        return;
    }
    let f = Fixture::bare();
    image::random(&f.path("disk"), 64 * MIB, &mut Random::new(6));
    let device = Loop::attach(&f.path("disk"));
    // Nobody may read it, and the folder with the agent's settings.
    for (path, mode) in [(device.path().to_owned(), 0o644), (f.path("."), 0o755)] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("it is ours");
    }
    let agent = f.agent("agent");
    let program = f.path("backhaul-agent");
    std::fs::copy(backhaul_tests::process::program("backhaul-agent"), &program).expect("it can be copied");
    let args = ["plan", text(device.path()), "--for", "6s", "--every", "2s"];
    let of_root = agent.command(&args);
    let mut command = std::process::Command::new(program);
    command.args(of_root.get_args()).uid(65534).gid(65534);
    let (ran, rate) = while_written(device.path(), 20, true, || run(command, None));
    std::fs::set_permissions(device.path(), PermissionsExt::from_mode(0o660)).expect("it is ours");
    let plan = ran.ok();
    let volume = &plan["volumes"][0];
    assert_eq!(volume["how"], "compared", "{ran:#?}");
    assert!(volume["why"].as_str().expect("why").contains("CAP_BPF"), "what would help is said: {volume}");
    near("distinct bytes a second", figure(volume, "/changed_bytes_per_second"), rate * BLOCK as f64, 0.25);
}

#[test]
fn nothing_is_written_and_nothing_is_left() {
    if !needs_root("nothing_is_written_and_nothing_is_left") {
        return;
    }
    let f = Fixture::bare();
    image::random(&f.path("disk"), 64 * MIB, &mut Random::new(7));
    let before = image::digest(&f.path("disk"), 65536);
    let device = Loop::read_only(&f.path("disk"));
    let agent = f.agent("agent");
    let args = ["plan", text(device.path()), "--for", "2s", "--every", "1s"];
    let plan = agent.run(&args).ok();
    assert_eq!(plan["volumes"][0]["how"], "hints", "{plan}");
    assert_eq!(number(&plan["volumes"][0], "written_bytes"), 0, "I23");
    assert_eq!(image::digest(&f.path("disk"), 65536), before, "I23");
    assert_eq!(pins(), BTreeSet::new(), "what was pinned is gone with it");

    // Interrupted while it looks it tidies up at once; killed, or while it begins, the next one does; never what another one
    // is using.
    let long = ["plan", text(device.path()), "--for", "60s", "--every", "1s"];
    let started = |known: &BTreeSet<PathBuf>| {
        let child = agent.start(&long);
        until("it is pinned", Duration::from_secs(20), || pins().difference(known).next().is_some());
        let new = pins().difference(known).next().cloned().expect("it is there");
        until("the tracker is there", Duration::from_secs(20), || new.join("table").exists());
        std::thread::sleep(Duration::from_secs(1));
        (child, new)
    };
    let (mut interrupted, _) = started(&BTreeSet::new());
    interrupted.signal(Signal::INT);
    assert_eq!(interrupted.wait(Duration::from_secs(10)).code(), Some(130));
    assert_eq!(pins(), BTreeSet::new());
    let (mut killed, left) = started(&BTreeSet::new());
    killed.kill();
    assert_eq!(pins(), BTreeSet::from([left.clone()]), "who is killed leaves it");
    let (other, used) = started(&BTreeSet::from([left.clone()]));
    assert!(!left.exists(), "removed by the next one");
    agent.run(&args).ok();
    assert_eq!(pins(), BTreeSet::from([used]), "and what is in use is not");
    drop(other);
    agent.run(&args).ok();
    assert_eq!(pins(), BTreeSet::new());
}
