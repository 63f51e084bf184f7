//! A service that is stopped, paused or held back while it freezes: file systems are thawed, and freezes last no longer.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use backhaul_tests::process::until;
use backhaul_tests::{Random, needs_root};
use rustix::process::Signal;

use crate::server::{Kind, PROMPT, Server, assert_not_frozen};

/// Writes until it is told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    fn new(folder: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            for n in 0_u64.. {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                let file = folder.join(format!("written-{}", n % 20));
                std::fs::write(&file, n.to_le_bytes().repeat(512)).expect("there is room");
                std::fs::File::open(&file).and_then(|f| f.sync_all()).expect("it is flushed");
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(std::thread::JoinHandle::join));
    }
}

/// I1, I24: at whatever moment it is told to, it ends within two seconds, and nothing stays frozen.
#[test]
fn told_to_end_at_any_moment() {
    let test = "stops::told_to_end_at_any_moment";
    if !needs_root(test) {
        return;
    }
    let mut random = Random::printed(test);
    let server = Server::new(Kind::Ext4, 1);
    let writer = Writer::new(server.mounted(0));
    for turn in 0..8 {
        let mut running = server.run();
        until("a point of one instant", PROMPT, || server.status()["frozen_ms"].as_f64().is_some());
        std::thread::sleep(Duration::from_millis(random.between(0, 1200)));
        let asked = Instant::now();
        running.signal(Signal::TERM);
        assert_eq!(running.wait(PROMPT).code(), Some(0), "turn {turn}: {}", running.err());
        assert!(asked.elapsed() < Duration::from_secs(2), "turn {turn}: {:?}", asked.elapsed());
        assert_not_frozen(&server.mounted(0));
    }
    drop(writer);
    server.fixture.receiver(&["verify"]).ok();
}

/// I24: what holds back the reading of a server at work does not make its freezes longer.
#[test]
fn limits_make_no_freeze_longer() {
    let test = "stops::limits_make_no_freeze_longer";
    if !needs_root(test) {
        return;
    }
    let server = Server::new(Kind::Ext4, 1);
    let mut running = server.run();
    server.wait_for_point();
    // 64 KiB a file at least: many times what may be read in the time of a freeze.
    server.agent.settings("read_rate = \"2MB\"\nsend_rate = \"2MB\"\nnice = 19\nio = \"idle\"");
    running.signal(Signal::HUP);
    until("slow from now on", PROMPT, || running.err().contains("the settings were read again"));
    let before = server.status()["points"].as_u64().expect("a number");
    let writer = Writer::new(server.mounted(0));
    until("points as before", PROMPT, || server.status()["points"].as_u64() >= Some(before + 5));
    drop(writer);
    let status = server.status();
    assert_eq!(status["consistency"], "crash", "{status}");
    assert!(status["frozen_max_ms"].as_f64().is_some_and(|ms| ms < 500.0), "{status}");
    running.signal(Signal::TERM);
    running.wait(PROMPT);
}

/// A pause lets go of what is held: it can be unmounted.
#[test]
fn a_pause_lets_go() {
    let test = "stops::a_pause_lets_go";
    if !needs_root(test) {
        return;
    }
    let mut server = Server::new(Kind::Ext4, 1);
    let mut running = server.run();
    server.wait_for_point();
    let writer = Writer::new(server.mounted(0));
    for _ in 0..3 {
        server.agent.run(&["pause"]).ok();
        assert_not_frozen(&server.mounted(0));
        assert_eq!(server.status()["state"], "paused");
        server.agent.run(&["resume"]).ok();
        until("in step", PROMPT, || server.status()["state"] == "continuous");
    }
    server.agent.run(&["pause"]).ok();
    drop(writer);
    // What the last freeze held is let go of within moments.
    std::thread::sleep(Duration::from_secs(1));
    server.unmount();
    running.signal(Signal::TERM);
    running.wait(PROMPT);
}
