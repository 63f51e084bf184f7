//! How much `run` asks of the server and the network: rates that are held, windows that switch, ranks of threads.

use std::time::{Duration, Instant};

use backhaul_tests::fixture::Serving;
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Network, Random, image};

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

/// Bytes a second that go through the network, over ten seconds.
fn rate(network: &Network) -> f64 {
    let (begun, before) = (Instant::now(), network.bytes_up());
    std::thread::sleep(Duration::from_secs(10));
    (network.bytes_up() - before) as f64 / begun.elapsed().as_secs_f64()
}

/// I24. Measured by the network in between, with headers and acknowledgements, which are a few in a hundred.
#[test]
fn the_rate_of_sending_is_held() {
    let (_f, _serving, agent, network) = setup(64 * MIB);
    agent.settings("send_rate = \"4MB\"\ncompression = \"none\"");
    let _running = agent.start(&["run"]);
    until("under way", PROMPT, || network.bytes_up() > 4 * MIB);
    let rate = rate(&network) / 4e6;
    assert!((0.9..1.1).contains(&rate), "{rate} of what is allowed");
}

/// I24: what is read is counted by the agent itself.
#[test]
fn the_rate_of_reading_is_held() {
    let (_f, _serving, agent, network) = setup(96 * MIB);
    agent.settings("read_rate = \"5MB\"");
    let _running = agent.start(&["run"]);
    until("under way", PROMPT, || network.bytes_up() > 4 * MIB);
    let read = || agent.run(&["status"]).ok()["service_read_bytes"].as_f64().expect("a number");
    let (begun, before) = (Instant::now(), read());
    std::thread::sleep(Duration::from_secs(10));
    let rate = (read() - before) / begun.elapsed().as_secs_f64() / 5e6;
    // The status is brought up to date twice a second.
    assert!((0.85..1.15).contains(&rate), "{rate} of what is allowed");
}

/// A window of the rate 0 is a pause; the hour is that of this machine's zone, which the test moves.
#[test]
fn a_window_of_nothing_is_a_pause_that_ends_with_it() {
    let (f, _serving, agent, _network) = setup(4 * MIB);
    // Whatever the time is, one of the two zones is inside of the window and the other is not.
    let hour = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        now / 3600 % 24
    };
    if hour() % 12 == 11 {
        println!("close to the end of a window: the hour may change in between");
    }
    let (inside, outside) = if hour() < 12 { ("UTC0", "UTC12") } else { ("UTC-12", "UTC0") };
    agent.settings("[[send_window]]\nfrom = \"00:00\"\nto = \"12:00\"\nrate = \"0\"");
    let start = |zone: &str| {
        let mut command = agent.command(&["run", "--every", "1s"]);
        command.env("TZ", zone);
        backhaul_tests::Child::start(command, &f.path("run.err"))
    };
    let status = || agent.run(&["status"]).ok();
    {
        let running = start(inside);
        until("paused", PROMPT, || status()["state"] == "paused");
        let cause = status()["cause"].as_str().expect("a cause").to_owned();
        assert!(cause.contains("00:00 to 12:00") && cause.contains("until 20"), "{cause}");
        assert!(f.points().is_empty());
        // The window goes with the settings.
        agent.settings("");
        running.signal(rustix::process::Signal::HUP);
        until("in step", PROMPT, || status()["state"] == "continuous");
    }
    agent.settings("[[send_window]]\nfrom = \"00:00\"\nto = \"12:00\"\nrate = \"0\"");
    image::write(&f.path("disk.img"), 0, b"changed");
    let _running = start(outside);
    until("at other hours all goes", PROMPT, || f.points().len() == 2);
}

/// I24: threads that scan rank below, and nobody else: a freeze must not last longer for it.
#[test]
fn only_threads_that_scan_rank_below() {
    let (_f, _serving, agent, network) = setup(64 * MIB);
    agent.settings("nice = 15\nio = \"idle\"\nsend_rate = \"4MB\"");
    let running = agent.start(&["run"]);
    until("under way", PROMPT, || network.bytes_up() > 2 * MIB);
    let (mut scan, mut others) = (Vec::new(), Vec::new());
    for task in std::fs::read_dir(format!("/proc/{}/task", running.pid().as_raw_nonzero())).expect("it runs").flatten()
    {
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else { continue };
        let (name, rest) = stat.split_once('(').and_then(|(_, s)| s.rsplit_once(')')).expect("a name");
        // proc(5): field 19, and the third comes first here.
        let nice: i32 = rest.split_whitespace().nth(16).expect("nice").parse().expect("a number");
        if name.starts_with("scan-") { scan.push(nice) } else { others.push((name.to_owned(), nice)) }
    }
    assert!(!scan.is_empty() && scan.iter().all(|n| *n == 15), "{scan:?}");
    assert!(others.iter().any(|(name, _)| name == "quiesce"), "{others:?}");
    assert!(others.iter().all(|(_, n)| *n < 15), "{others:?}");
}

/// Wrong limits are refused before anything is done.
#[test]
fn limits_that_make_no_sense_are_refused() {
    let (_f, _serving, agent, _network) = setup(MIB);
    for (settings, said) in [
        ("send_rate = \"0\"", "at least 64kB"),
        ("send_rate = \"fast\"", "not a rate"),
        ("read_rate = \"1kB\"", "at least 64kB"),
        ("nice = -5", "from 0 to 19"),
        ("io = \"slow\"", "best-effort"),
        ("metrics = \"localhost\"", "metrics"),
        ("[[send_window]]\nfrom = \"8\"\nto = \"18:00\"\nrate = \"1MB\"", "not a time"),
        ("[[send_window]]\nfrom = \"08:00\"\nto = \"18:00\"\ndays = \"always\"\nrate = \"1MB\"", "mon-fri"),
        ("[[send_window]]\nfrom = \"08:00\"\nto = \"18:00\"\nrate = \"1kB\"", "at least 64kB"),
        ("[[send_window]]\nfrom = \"08:00\"\nrate = \"1MB\"", "to"),
    ] {
        agent.settings(settings);
        let error = agent.run(&["config", "check"]).fails(78, "E_CONFIG");
        assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains(said)), "{settings}: {error}");
    }
    agent.settings(
        "send_rate = \"100Mbit\"\n[[send_window]]\nfrom = \"22:00\"\nto = \"24:00\"\ndays = \"sat,sun\"\nrate = \"0\"",
    );
    let meant = agent.run(&["config", "check"]).ok();
    assert_eq!((&meant["send_rate"], &meant["io"]), (&12_500_000.into(), &"best-effort".into()));
    assert!(meant["send_windows"][0].as_str().is_some_and(|w| w.contains("22:00 to 00:00 on sat,sun")), "{meant}");
}
