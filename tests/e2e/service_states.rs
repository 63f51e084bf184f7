//! What state `run` says that it is in, and why: through outages, pauses, restarts, signals.

use std::time::{Duration, Instant};

use backhaul_tests::fixture::{Serving, number};
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Network, Random, image};
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PROMPT: Duration = Duration::from_secs(30);

fn setup(size: u64) -> (Fixture, Serving, Agent, Network) {
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    image::random(&f.path("disk.img"), size, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    (f, serving, agent, network)
}

fn status(agent: &Agent) -> Value {
    agent.run(&["status"]).ok()
}

fn state(agent: &Agent) -> String {
    let status = status(agent);
    let state = status["state"].as_str().unwrap_or("not running").to_owned();
    let has_cause = status["cause"].as_str().is_some_and(|c| !c.is_empty());
    assert!(has_cause || ["continuous", "not running"].contains(&&*state), "a state says why (I22): {status}");
    state
}

fn cause(agent: &Agent) -> String {
    status(agent)["cause"].as_str().unwrap_or_default().to_owned()
}

/// I14, I22: what was written during an outage is said to be behind until it is in a young point, and then no longer.
#[test]
fn an_outage_is_disconnected_then_a_backlog_then_over() {
    let (f, mut serving, agent, network) = setup(40 * MIB);
    // Slow enough for the backlog to be seen.
    agent.settings("send_rate = \"6MB\"");
    let running = agent.start(&["run", "--every", "1s"]);
    until("there is no point yet", PROMPT, || state(&agent) == "initial_sync");
    until("all is sent", Duration::from_secs(60), || state(&agent) == "continuous");
    serving.child.kill();
    until("it is noticed", Duration::from_secs(60), || state(&agent) == "disconnected");
    image::random(&f.path("disk.img"), 40 * MIB, &mut Random::new(2));
    let serving = f.serve();
    network.point_to(serving.socket());
    until("what is behind is said", Duration::from_secs(60), || state(&agent) == "backlog");
    let (mut causes, mut last) = (Vec::new(), String::new());
    until("and is sent (I14)", Duration::from_secs(90), || {
        let now = state(&agent);
        if now == "backlog" {
            causes.push(cause(&agent));
        }
        last = now;
        last == "continuous"
    });
    assert!(causes.iter().any(|c| c.contains("after it was disconnected for")), "{causes:?}");
    assert!(causes.iter().any(|c| c.contains("behind") && c.contains("left")), "with an estimate: {causes:?}");
    assert_eq!(number(&status(&agent), "behind_bytes"), 0);
    // Points before, one or two for the outage: what was missed is not made up for.
    assert!(f.points().len() <= 4, "no burst of points: {}", f.points().len());
    let err = running.err();
    for word in ["disconnected: ", "backlog: ", "continuous"] {
        let times = err.lines().filter(|l| l.contains("WARN") && l.contains(word)).count();
        assert!((1..=4).contains(&times), "said when it changes, and not all the time: {word} {times} times in\n{err}");
    }
}

/// I22: a pause outlives the service, says until when, by whom and why, and ends by itself or when it is told to.
#[test]
fn a_pause_outlives_a_restart() {
    let (f, _serving, agent, _network) = setup(4 * MIB);
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("in step", PROMPT, || state(&agent) == "continuous");
    let mut pause = agent.command(&["pause", "--for", "2h", "--reason", "the night of\n the migration"]);
    pause.env("SUDO_USER", "anna");
    let said = backhaul_tests::process::run(pause, None).ok();
    assert_eq!(
        (&said["paused"], &said["heard"], &said["by"]),
        (&Value::Bool(true), &Value::Bool(true), &"anna".into())
    );
    assert_eq!(state(&agent), "paused");
    let points = f.points().len();
    image::write(&f.path("disk.img"), 0, b"changed");
    running.signal(Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0), "{}", running.err());
    let stopped = agent.run(&["status", "--check", "--max-lag", "1ms"]).fails(7, "E_LAG");
    assert!(stopped["error"]["message"].as_str().is_some_and(|m| m.contains("paused until")), "{stopped}");

    let _running = agent.start(&["run", "--every", "1s"]);
    until("still paused", PROMPT, || state(&agent) == "paused");
    let why = cause(&agent);
    assert!(why.contains("until 20") && why.contains("by anna") && why.contains("the night of the migration"), "{why}");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(f.points().len(), points, "no points while it is paused");
    let check = agent.run(&["status", "--check", "--max-lag", "1ms"]).fails(7, "E_LAG");
    assert!(check["error"]["message"].as_str().is_some_and(|m| m.contains("paused: until")), "{check}");
    assert_eq!(agent.run(&["resume"]).ok()["heard"], true);
    until("in step again", PROMPT, || state(&agent) == "continuous");
    assert!(f.points().len() > points, "with what had changed");

    agent.run(&["pause", "--for", "2s"]).ok();
    assert_eq!(state(&agent), "paused");
    until("it ends by itself", PROMPT, || state(&agent) == "continuous");
}

/// A pause in the middle of a round gives it up; what had arrived is not sent again (I11).
#[test]
fn a_pause_ends_the_round_that_is_under_way() {
    let (f, _serving, agent, network) = setup(64 * MIB);
    agent.settings("send_rate = \"8MB\"");
    let _running = agent.start(&["run", "--every", "1s"]);
    until("under way", PROMPT, || network.bytes_up() > 20 * MIB);
    agent.run(&["pause"]).ok();
    assert_eq!(state(&agent), "paused");
    std::thread::sleep(Duration::from_secs(2));
    let paused_at = network.bytes_up();
    std::thread::sleep(Duration::from_secs(2));
    assert!(network.bytes_up() - paused_at < 100_000, "nothing is sent while it is paused");
    assert!(f.points().is_empty(), "and no point is half made (I1)");
    agent.run(&["resume"]).ok();
    until("a point", Duration::from_secs(60), || f.points().len() == 1);
    assert!(network.bytes_up() < 64 * MIB + 24 * MIB, "sent twice: {} MiB in all (I11)", network.bytes_up() / MIB);
    assert_eq!(f.points()[0]["volumes"][0]["digest"], image::digest(&f.path("disk.img"), 65536));
}

/// I22: settings are read again on SIGHUP; wrong ones change nothing and are said.
#[test]
fn sighup_reads_the_settings_again() {
    let (f, _serving, agent, _network) = setup(4 * MIB);
    agent.settings("every = \"1s\"");
    let mut running = agent.start(&["run"]);
    until("in step", PROMPT, || state(&agent) == "continuous");
    agent.settings("every = \"1h\"\nsend_rat = \"1MB\"");
    running.signal(Signal::HUP);
    until("what is wrong is said", PROMPT, || running.err().contains("the settings stay as they were"));
    assert!(running.err().contains("send_rat"), "{}", running.err());
    // Whoever asks needs settings that are right.
    let asks = agent.clone().with_config(&f.path("right.toml").display().to_string());
    asks.settings("");
    let beat = || number(&status(&asks), "protected_until_ms");
    let before = beat();
    until("every second as before", PROMPT, || beat() > before + 2000);

    agent.settings("every = \"1h\"\nstate = \"/elsewhere\"\nmetrics = \"127.0.0.1:1\"");
    running.signal(Signal::HUP);
    until("it is said that it was read", PROMPT, || running.err().contains("the settings were read again"));
    assert!(running.err().contains("metrics counts when the service is started again"), "{}", running.err());
    std::thread::sleep(Duration::from_secs(2));
    let before = beat();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(beat(), before, "every hour from now on");

    agent.settings("every = \"1s\"");
    running.signal(Signal::HUP);
    image::write(&f.path("disk.img"), 5, b"changed");
    until("every second again", PROMPT, || f.points().len() == 2);
    running.signal(Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0));
}

/// I1, I14: a service that is stopped in the middle of a round is gone within two seconds, and the next one goes on.
#[test]
fn sigterm_in_the_middle_of_a_round_ends_it_soon() {
    let (f, _serving, agent, network) = setup(64 * MIB);
    agent.settings("send_rate = \"10MB\"");
    let mut running = agent.start(&["run"]);
    until("under way", PROMPT, || network.bytes_up() > 20 * MIB);
    let asked = Instant::now();
    running.signal(Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0), "{}", running.err());
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(f.points().is_empty());
    agent.settings("");
    let synced = agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&f.path("disk.img"), 65536));
    assert!(number(&synced, "bytes_sent") < 60 * MIB, "what had arrived is not sent again (I11): {synced}");
}

/// I22: how old the last look at all data may be.
#[test]
fn a_full_scan_that_is_too_long_ago_turns_the_check_red() {
    let (_f, _serving, agent, _network) = setup(4 * MIB);
    let never = agent.run(&["status", "--check", "--max-full-scan-age", "1h"]).fails(7, "E_LAG");
    assert!(never["error"]["message"].as_str().is_some_and(|m| m.contains("no point")), "{never}");
    let _running = agent.start(&["run", "--every", "1s"]);
    until("in step", PROMPT, || state(&agent) == "continuous");
    let status = agent.run(&["status", "--check", "--max-full-scan-age", "1h"]).ok();
    assert!(status["data_checked_lag_seconds"].as_f64().is_some_and(|l| (0.0..30.0).contains(&l)), "{status}");
    assert!(status["volumes"][0]["hints"].as_str().is_some_and(|h| !h.is_empty()), "on, or why not: {status}");
    assert!(number(&status, "points") >= 1, "{status}");
    let red = agent.run(&["status", "--check", "--max-full-scan-age", "1ms"]).fails(7, "E_LAG");
    assert!(red["error"]["message"].as_str().is_some_and(|m| m.contains("last read")), "{red}");
}
