//! `run` and `serve` as services, and several receivers at once.

use std::time::Duration;

use backhaul_tests::fixture::{Serving, number};
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Network, Random, Weather, image};
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PROMPT: Duration = Duration::from_secs(30);

fn setup() -> (Fixture, Serving, Agent) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), 4 * MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    (f, serving, agent)
}

fn state(agent: &Agent) -> Value {
    agent.run(&["status"]).ok()["state"].clone()
}

#[test]
fn run_commits_when_something_changed_and_only_then() {
    let (f, _serving, agent) = setup();
    let before = agent.run(&["status"]).ok();
    assert_eq!(before["running"], false);
    agent.run(&["status", "--check"]).fails(7, "E_LAG");
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("the first point", PROMPT, || f.points().len() == 1);
    until("in step", PROMPT, || state(&agent) == "continuous");
    let until_when = || agent.run(&["status"]).ok()["protected_until_ms"].as_i64().expect("a time");
    let first = until_when();
    until("heartbeats", PROMPT, || until_when() > first + 3000);
    assert_eq!(f.points().len(), 1, "nothing changed: no point");

    image::write(&f.path("disk.img"), 100_000, b"changed");
    until("a second point", PROMPT, || f.points().len() == 2);
    assert_eq!(f.points()[1]["volumes"][0]["digest"], image::digest(&f.path("disk.img"), 65536));

    let status = agent.run(&["status", "--check", "--max-lag", "20s"]).ok();
    assert_eq!(status["schema"], "backhaul.status/1");
    assert_eq!((status["running"].as_bool(), status["pruned"].as_bool()), (Some(true), Some(false)));
    assert_eq!((number(&status, "point"), number(&status, "highest_point_seen")), (2, 2));
    assert!(status["lag_seconds"].as_f64().is_some_and(|l| (0.0..20.0).contains(&l)), "{status}");
    assert_eq!(status["volumes"][0]["name"], "data");
    agent.run(&["status", "--check", "--max-lag", "1ms"]).fails(7, "E_LAG");
    agent.run(&["sync"]).fails(11, "E_BUSY");

    // A service does not end with the terminal that started it.
    running.signal(Signal::HUP);
    running.signal(Signal::TERM);
    assert_eq!(running.wait(Duration::from_secs(10)).code(), Some(0), "{}", running.err());
    std::thread::sleep(Duration::from_millis(20));
    let lag = agent.run(&["status", "--check", "--max-lag", "10ms"]).fails(7, "E_LAG");
    assert!(lag["error"]["message"].as_str().is_some_and(|m| m.contains("not running")), "{lag}");
    let status = agent.run(&["status", "--check", "--max-lag", "5m"]).ok();
    assert_eq!((&status["running"], number(&status, "highest_point_seen")), (&Value::Bool(false), 2));
    assert!(status["protected_until"].as_str().is_some() && number(&status, "sent_bytes") > 4 * MIB, "{status}");
    agent.sync();
}

#[test]
fn volumes_are_named_while_run_works() {
    let (f, _serving, agent) = setup();
    let _running = agent.start(&["run", "--every", "1s"]);
    until("the first point", PROMPT, || f.points().len() == 1);
    image::random(&f.path("more.img"), MIB, &mut Random::new(5));
    agent.run(&["protect", "x=/dev/null"]).fails(4, "E_SOURCE");
    agent.protect("more", &f.path("more.img"));
    let names = || f.points().last().map(|p| p["volumes"].as_array().map_or(0, Vec::len));
    until("it takes a second volume up", PROMPT, || names() == Some(2));
    agent.run(&["unprotect", "data"]).ok();
    until("and lets one go", PROMPT, || names() == Some(1));
}

#[test]
fn an_idle_round_writes_nothing_to_the_state_folder() {
    let (f, _serving, agent) = setup();
    let _running = agent.start(&["run", "--every", "1s"]);
    until("in step", PROMPT, || f.points().len() == 1 && state(&agent) == "continuous");
    let times = || {
        let mut all = Vec::new();
        for folder in [agent.state.clone(), agent.state.join("index")] {
            for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
                let meta = entry.metadata().expect("a file");
                all.push((entry.path(), meta.len(), meta.modified().ok()));
            }
        }
        all.sort();
        all
    };
    let before = times();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(times(), before, "state on a protected root must not dirty itself");
}

#[test]
fn status_turns_red_when_the_receiver_is_gone_and_green_again() {
    let (f, mut serving, agent) = setup();
    let network = Network::to(serving.socket());
    let agent = agent.through(&network.address());
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("in step", PROMPT, || state(&agent) == "continuous");
    serving.child.kill();
    until("it is noticed", Duration::from_secs(60), || state(&agent) == "disconnected");
    let check = agent.run(&["status", "--check", "--max-lag", "1s"]).fails(7, "E_LAG");
    assert!(check["error"]["message"].as_str().is_some_and(|m| m.contains("lag")), "{check}");
    image::write(&f.path("disk.img"), 0, b"while it was gone");
    let serving = f.serve();
    network.point_to(serving.socket());
    until("within a minute everything is well (I14)", Duration::from_secs(60), || state(&agent) == "continuous");
    until("the change", PROMPT, || f.points().len() >= 2);
    running.signal(Signal::TERM);
    running.wait(Duration::from_secs(10));
}

#[test]
fn interrupted_by_a_signal() {
    let (f, serving, agent) = setup();
    image::random(&f.path("disk.img"), 200 * MIB, &mut Random::new(2));
    let network = Network::to(serving.socket());
    let agent = agent.through(&network.address());
    agent.protect("data", &f.path("disk.img"));
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let before = network.bytes_up();
        let mut child = agent.start(&["sync"]);
        until("under way", PROMPT, || network.bytes_up() > before + MIB);
        child.signal(signal);
        assert_eq!(child.wait(Duration::from_secs(10)).code(), Some(130), "{}", child.err());
        assert!(child.err().contains("interrupted by"), "{}", child.err());
        assert!(f.points().is_empty());
    }
    agent.sync();
}

#[test]
fn sync_waits_for_a_receiver_and_then_gives_up() {
    let (f, serving, agent) = setup();
    let network = Network::to(serving.socket());
    let agent = agent.through(&network.address());
    network.set(Weather::Cut);
    let began = std::time::Instant::now();
    let ran = agent.run(&["sync"]);
    ran.fails(13, "E_NETWORK");
    let took = began.elapsed();
    assert!((Duration::from_secs(28)..Duration::from_secs(60)).contains(&took), "{took:?}");
    // One that comes within the time is good.
    serving.stop();
    let mut child = agent.start(&["sync"]);
    std::thread::sleep(Duration::from_secs(2));
    let serving = f.serve();
    network.point_to(serving.socket());
    network.set(Weather::Fine);
    assert_eq!(child.wait(Duration::from_secs(60)).code(), Some(0), "{}", child.err());
    assert_eq!(f.points().len(), 1);
}

#[test]
fn sigterm_drains_the_receiver_and_the_next_goes_on() {
    let (f, serving, agent) = setup();
    let disk = f.path("disk.img");
    image::random(&disk, 200 * MIB, &mut Random::new(3));
    let network = Network::to(serving.socket());
    let agent = agent.through(&network.address());
    agent.protect("data", &disk);
    let mut child = agent.start(&["sync"]);
    until("under way", PROMPT, || network.bytes_up() > 60 * MIB);
    serving.stop();
    child.kill();
    let kept = f.stored("segments");
    assert!(kept > 30 * MIB, "what had arrived is kept: {} MiB", kept / MIB);
    let serving = f.serve();
    let agent = agent.through(&serving.address());
    let synced = agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert!(number(&synced, "bytes_sent") + kept < 201 * MIB + MIB, "nothing that was kept is sent again: {synced}");
}

#[test]
fn one_receiver_for_one_state_folder() {
    let (f, serving, _agent) = setup();
    let second = backhaul_tests::process::run(f.serve_command(&[]), None);
    second.fails(11, "E_BUSY");
    // What only needs the store works beside it.
    f.receiver(&["points"]).ok();
    f.receiver(&["agents"]).ok();
    serving.stop();
}

#[test]
fn two_receivers_on_one_store() {
    let (f, serving, agent) = setup();
    let second = f.serve_second();
    let there = agent.clone().through(&second.address());
    let disk = f.path("disk.img");
    let mut random = Random::new(4);
    for round in 1..=6 {
        image::write(&disk, random.between(0, 4 * MIB - 100), &random.bytes(100));
        let synced = if round % 2 == 0 { agent.sync() } else { there.sync() };
        assert_eq!(number(&synced, "point"), round, "each knows what the other wrote");
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536));
    }
    serving.stop();
    second.stop();
}

/// Two copies of one agent at two receivers, again and again: numbers stay contiguous, each point has one writer.
#[test]
fn two_receivers_that_commit_at_once() {
    let (f, _serving, agent) = setup();
    let second = f.serve_second();
    agent.sync();
    let (mut won, mut lost) = (0, 0);
    for _ in 0..8 {
        backhaul_tests::fixture::copy_folder(&agent.state, &f.path("clone"));
        let clone = agent.clone().with_state(&f.path("clone")).through(&second.address());
        image::write(&f.path("disk.img"), 77, &Random::new(won).bytes(50_000));
        let (a, b) = std::thread::scope(|s| {
            let (a, b) = (s.spawn(|| agent.run(&["sync"])), s.spawn(|| clone.run(&["sync"])));
            (a.join().expect("it ends"), b.join().expect("it ends"))
        });
        for ran in [&a, &b] {
            match ran.code {
                Some(0) => won += 1,
                // The other committed first; tried again, this nonce is stale.
                Some(4) => lost += 1,
                _ => panic!("{ran:#?}"),
            }
        }
        // Whoever won goes on.
        if a.code != Some(0) {
            backhaul_tests::fixture::copy_folder(&f.path("clone"), &agent.state);
        }
        let synced = agent.run(&["sync"]);
        if synced.code != Some(0) {
            // Both won, one after the other: then the later one is the writer.
            backhaul_tests::fixture::copy_folder(&f.path("clone"), &agent.state);
            agent.sync();
        }
    }
    println!("{won} won, {lost} lost");
    let points = f.points();
    let numbers: Vec<u64> = points.iter().map(|p| number(p, "point")).collect();
    assert_eq!(numbers, (1..=points.len() as u64).collect::<Vec<_>>());
    assert_eq!(points.last().expect("points")["volumes"][0]["digest"], image::digest(&f.path("disk.img"), 65536));
}

/// A point that had to be fuzzy is not the last word: when the writer is gone, an unchanged volume earns a better one.
#[test]
fn an_unchanged_volume_gets_a_better_label_when_it_can_be_earned() {
    let (f, _serving, agent) = setup();
    let writer = std::fs::OpenOptions::new().write(true).open(f.path("disk.img")).expect("it is there");
    let _running = agent.start(&["run", "--every", "1s"]);
    until("a point", PROMPT, || f.points().len() == 1);
    assert_eq!(f.points()[0]["consistency"], "fuzzy");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(f.points().len(), 1, "no better label, no point");
    drop(writer);
    until("a better one", PROMPT, || f.points().len() == 2);
    assert_eq!(f.points()[1]["consistency"], "crash");
    assert_eq!(f.points()[1]["volumes"][0]["digest"], f.points()[0]["volumes"][0]["digest"]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(f.points().len(), 2, "there is no better one than that");
}
