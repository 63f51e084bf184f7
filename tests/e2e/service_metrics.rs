//! What both programs tell Prometheus: as the format has it, true, and documented to the last name.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use backhaul_tests::metrics::{Families, scrape, value};
use backhaul_tests::process::until;
use backhaul_tests::{Fixture, Random, image};

const MIB: u64 = 1 << 20;
const PROMPT: Duration = Duration::from_secs(30);

/// One that was free a moment ago.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port")
}

/// Name, kind and help of what `docs/metrics.md` lists, by the program's prefix.
fn documented(prefix: &str) -> BTreeMap<String, String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let text = std::fs::read_to_string(file).expect("it is there");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    let named = cells.map(|cells| (cells[0].trim_end_matches('`').to_owned(), cells[1].to_owned()));
    named.filter(|(name, _)| name.starts_with(prefix)).collect()
}

#[track_caller]
fn compare(families: &Families, prefix: &str) {
    let told: BTreeMap<String, String> = families.iter().map(|(name, f)| (name.clone(), f.kind.clone())).collect();
    assert_eq!(told, documented(prefix), "docs/metrics.md and what is told are the same");
    for (name, kind) in told {
        let units = ["_seconds", "_bytes", "_total", "_number", "_per_second", "_ratio"];
        let has_unit = units.iter().any(|unit| name.ends_with(unit));
        let counts = ["_info", "_state", "_active", "_consistency", "_sessions", "_limit", "_agents", "_handshakes"];
        assert!(has_unit || counts.iter().any(|c| name.ends_with(c)), "{name} has no unit");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
    }
}

#[test]
fn both_programs_tell_what_is_documented_and_what_is_true() {
    let f = Fixture::new();
    let (at_agent, at_receiver) = (free_port(), free_port());
    std::fs::write(f.path("receiver.toml"), format!("metrics = \"{at_receiver}\"")).expect("it can be written");
    let config = f.path("receiver.toml").display().to_string();
    let serving = f.serve_with(&["--config", &config]);
    let agent = f.joined("agent", &serving);
    agent.settings(&format!("metrics = \"{at_agent}\""));
    image::random(&f.path("disk.img"), 4 * MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    assert_eq!(scrape(at_agent).map(|_| ()), None, "nobody runs");
    let mut running = agent.start(&["run", "--every", "1s"]);
    let scrape_agent = || scrape(at_agent).expect("it runs");
    until("in step", PROMPT, || {
        scrape(at_agent).is_some_and(|m| value(&m, "backhaul_agent_state", "{state=\"continuous\"}") == 1.0)
    });
    let (a, r) = (scrape_agent(), scrape(at_receiver).expect("it runs"));
    compare(&a, "backhaul_agent_");
    compare(&r, "backhaul_receiver_");

    let states = &a["backhaul_agent_state"].samples;
    assert_eq!((states.len(), states.values().sum::<f64>()), (8, 1.0), "one state of eight: {states:?}");
    assert_eq!(value(&a, "backhaul_agent_points_total", ""), 1.0);
    assert_eq!(value(&a, "backhaul_agent_volume_bytes", "{volume=\"data\"}"), (4 * MIB) as f64);
    assert!((0.0..10.0).contains(&value(&a, "backhaul_agent_lag_seconds", "")));
    assert!((0.0..10.0).contains(&value(&a, "backhaul_agent_data_checked_lag_seconds", "")));
    let sent = value(&a, "backhaul_agent_sent_bytes_total", "");
    assert!((4 * MIB..5 * MIB).contains(&(sent as u64)), "{sent}");
    assert!(value(&a, "backhaul_agent_read_bytes_total", "") >= (4 * MIB) as f64);

    assert_eq!(value(&r, "backhaul_receiver_points_total", ""), 1.0);
    assert_eq!(value(&r, "backhaul_receiver_ingested_bytes_total", ""), sent, "what one sends the other takes");
    assert!(value(&r, "backhaul_receiver_stored_bytes_total", "") >= sent);
    assert_eq!(value(&r, "backhaul_receiver_sessions", ""), 1.0);
    assert_eq!(r["backhaul_receiver_agents"].samples.values().sum::<f64>(), 1.0);
    assert!((0.0..20.0).contains(&value(&r, "backhaul_receiver_newest_point_age_seconds", "{group=\"web\"}")));
    let puts = value(&r, "backhaul_receiver_store_requests_total", "{verb=\"put_new\",result=\"ok\"}");
    assert!(puts >= 1.0);
    assert_eq!(value(&r, "backhaul_receiver_store_request_seconds", "_count{verb=\"put_new\"}"), puts);
    assert_eq!(value(&r, "backhaul_receiver_store_request_seconds", "_bucket{verb=\"put_new\",le=\"+Inf\"}"), puts);

    // A heartbeat makes the lag younger, and the point older.
    until("the lag stays small while the point ages", PROMPT, || {
        let r = scrape(at_receiver).expect("it runs");
        let point = value(&r, "backhaul_receiver_newest_point_age_seconds", "{group=\"web\"}");
        point > 4.0 && value(&r, "backhaul_receiver_lag_seconds", "{group=\"web\"}") < 3.0
    });
    agent.run(&["pause"]).ok();
    assert_eq!(value(&scrape_agent(), "backhaul_agent_state", "{state=\"paused\"}"), 1.0);
    until("a session that ends is not counted", PROMPT, || {
        value(&scrape(at_receiver).expect("it runs"), "backhaul_receiver_sessions", "") == 0.0
    });
    running.signal(rustix::process::Signal::TERM);
    running.wait(PROMPT);
    assert!(scrape(at_agent).is_none());
}

/// A port that is taken is no reason to protect nothing.
#[test]
fn metrics_that_cannot_be_told_do_not_stop_the_service() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    agent.settings(&format!("metrics = \"{}\"", taken.local_addr().expect("bound")));
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    let running = agent.start(&["run", "--every", "1s"]);
    until("a point", PROMPT, || f.points().len() == 1);
    assert!(running.err().contains("no metrics"), "{}", running.err());
}
