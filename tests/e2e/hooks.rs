//! Commands of the user around a round: what they prepare is read, and `post` runs whatever happens.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use backhaul_tests::fixture::{Serving, number};
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Loop, Network, Random, Weather, image, needs_root};
use rustix::process::{Pid, Signal, test_kill_process};

const MIB: u64 = 1 << 20;
const PROMPT: Duration = Duration::from_secs(30);

struct Hooked {
    f: Fixture,
    serving: Serving,
    agent: Agent,
}

impl Hooked {
    /// An agent with one volume, `data`, of so many MiB.
    fn new(size: u64) -> Self {
        let f = Fixture::new();
        let serving = f.serve();
        let agent = f.joined("agent", &serving);
        image::random(&f.path("disk.img"), size * MIB, &mut Random::new(1));
        agent.protect("data", &f.path("disk.img"));
        Self { f, serving, agent }
    }

    fn disk(&self) -> PathBuf {
        self.f.path("disk.img")
    }

    /// Sets hooks that write down that they ran, and do this as well.
    fn hooks(&self, pre: &str, post: &str, more: &str) {
        let log = self.f.path("log").display().to_string();
        let copy = self.f.path("copy").display().to_string();
        let set = format!(
            "snapshot = \"hooks\"\n[hooks]\npre = '''\necho pre >> {log}\ncopy={copy}\n{pre}\n'''\n\
             post = '''\necho \"post $BACKHAUL_RESULT\" >> {log}\ncopy={copy}\n{post}\n'''\n{more}"
        );
        self.agent.settings(&set);
    }

    /// What ran, in order.
    fn log(&self) -> String {
        std::fs::read_to_string(self.f.path("log")).unwrap_or_default().replace('\n', ", ")
    }

    fn forget(&self) {
        let _ = std::fs::remove_file(self.f.path("log"));
    }

    /// The agent behind a network.
    fn through(&mut self) -> Network {
        let network = Network::to(self.serving.socket());
        self.agent = self.agent.clone().through(&network.address());
        network
    }

    fn owes(&self) -> bool {
        self.agent.state.join("hooks.json").exists()
    }
}

const COPY: &str = "cp \"$BACKHAUL_PATH_DATA\" $copy; echo data=$copy";

#[test]
fn what_pre_names_is_read_and_post_takes_it_away() {
    let h = Hooked::new(4);
    let before = image::digest(&h.disk(), 65536);
    // Written to after the copy was made: the point is of the copy.
    let pre =
        format!("{COPY}\nprintf changed | dd of=\"$BACKHAUL_PATH_DATA\" conv=notrunc 2>/dev/null\nenv > $copy.env");
    h.hooks(&pre, "rm $copy", "");
    let writer = std::fs::OpenOptions::new().write(true).open(h.disk()).expect("it is there");
    let ran = h.agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "crash", "the copy held still, whoever has the original open: {ran:#?}");
    assert_eq!(ran.ok()["volumes"][0]["digest"], before.as_str());
    assert_ne!(image::digest(&h.disk(), 65536), before);
    assert_eq!(h.log(), "pre, post read, ");
    assert!(!h.f.path("copy").exists() && !h.owes());
    let env = std::fs::read_to_string(h.f.path("copy.env")).expect("pre wrote it");
    let state = format!("BACKHAUL_STATE={}", h.agent.state.display());
    for line in ["BACKHAUL_GROUP=web", "BACKHAUL_VOLUMES=data", "BACKHAUL_HOOK=pre", &state] {
        assert!(env.lines().any(|l| l == line), "{line} is missing in {env}");
    }
    assert!(!env.contains("CARGO") && !env.contains("BACKHAUL_RESULT"), "nothing of ours: {env}");

    // Without hooks the volume itself is read, all that differs from the copy.
    drop(writer);
    h.agent.settings("");
    let synced = h.agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&h.disk(), 65536));
    assert!(number(&synced, "bytes_sent") > 0);
    assert_eq!(h.log(), "pre, post read, ");
}

/// What the kernel notes of a device (hints) says nothing of what is read in its place, nor of what differs from that.
#[test]
fn what_stands_in_is_never_taken_for_the_volume() {
    if !needs_root("what_stands_in_is_never_taken_for_the_volume") {
        return;
    }
    let h = Hooked::new(8);
    let device = Loop::attach(&h.disk());
    h.agent.protect("data", device.path());
    image::random(&h.f.path("copy"), 8 * MIB, &mut Random::new(9));
    h.hooks("if test -e $copy.flag; then echo data=$copy; fi", "true", "");
    let mut running = h.agent.start(&["run", "--every", "1s"]);
    let newest = |h: &Hooked| h.f.points().last().map(|p| p["volumes"][0]["digest"].clone());
    let (own, other) = (image::digest(device.path(), 65536), image::digest(&h.f.path("copy"), 65536));
    until("the device", PROMPT, || newest(&h).is_some_and(|d| d == own.as_str()));
    for round in 0..2 {
        std::fs::write(h.f.path("copy.flag"), "").expect("there is room");
        until("what stands in for it", PROMPT, || newest(&h).is_some_and(|d| d == other.as_str()));
        std::fs::remove_file(h.f.path("copy.flag")).expect("it is there");
        until(&format!("the device again, {round}"), PROMPT, || newest(&h).is_some_and(|d| d == own.as_str()));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0), "{}", running.err());
}

#[test]
fn without_another_path_the_volume_itself_must_hold_still() {
    let h = Hooked::new(4);
    h.hooks("true", "true", "");
    assert_eq!(h.agent.sync()["consistency"], "crash");
    h.hooks("true", "true", "claims = \"application\"");
    assert_eq!(h.agent.sync()["consistency"], "application", "by the user's word");
    let _writer = std::fs::OpenOptions::new().write(true).open(h.disk()).expect("it is there");
    assert_eq!(h.agent.sync()["consistency"], "fuzzy", "whatever the user says, if it is not so");
    assert_eq!(h.log(), "pre, post read, ".repeat(3));
}

#[test]
fn of_several_volumes_only_the_user_knows() {
    let h = Hooked::new(4);
    image::random(&h.f.path("more.img"), MIB, &mut Random::new(2));
    h.agent.protect("more-1", &h.f.path("more.img"));
    let pre = format!("test \"$BACKHAUL_PATH_MORE_1\" = {} || exit 1\n{COPY}", h.f.path("more.img").display());
    h.hooks(&pre, "rm $copy", "");
    let ran = h.agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "fuzzy", "I6: nobody says that they are of one instant: {ran:#?}");
    assert!(ran.err.contains("hooks.claims"), "{}", ran.err);
    h.hooks(&pre, "rm $copy", "claims = \"crash\"");
    assert_eq!(h.agent.sync()["consistency"], "crash");
    h.hooks(&format!("{COPY}\necho more-1=$copy"), "rm $copy", "");
    h.agent.run(&["sync"]).fails(1, "E_HOOK");
}

#[test]
fn a_pre_that_fails_makes_no_point() {
    let h = Hooked::new(1);
    let long = "x".repeat(200);
    for (pre, says) in [
        ("echo no space in the volume group >&2; exit 3".to_owned(), "exit code 3"),
        ("kill -KILL $$".to_owned(), "signal 9"),
        ("yes data=/tmp".to_owned(), "more than"),
        ("head -c 1000 \"$BACKHAUL_PATH_DATA\" > $copy; echo data=$copy".to_owned(), "1000 bytes"),
        ("echo data=$copy.none".to_owned(), "No such file"),
        ("echo data=/dev/null".to_owned(), "character device"),
        ("echo other=$copy".to_owned(), "no volume other"),
        ("echo data=disk.img".to_owned(), "must begin with /"),
        (format!("echo '  Logical volume snap created {long}'"), "not NAME=PATH"),
        ("head -c 100 /dev/urandom".to_owned(), "hook"),
    ] {
        h.forget();
        h.hooks(&pre, "true", "");
        let error = h.agent.run(&["sync"]).fails(1, "E_HOOK");
        let message = error["error"]["message"].as_str().expect("a message");
        assert!(message.contains(says) && message.len() < 500, "{pre}: {message}");
        assert_eq!(h.log(), "pre, post failed, ", "once, and no second try: {pre}");
    }
    h.hooks("echo no space in the volume group >&2; exit 3", "true", "");
    let error = h.agent.run(&["sync"]).fails(1, "E_HOOK");
    assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains("no space in the volume group")), "{error}");
    assert!(h.f.points().is_empty());
    // The service says it, and goes on trying.
    let mut running = h.agent.start(&["run", "--every", "1s"]);
    until("it is stalled", PROMPT, || h.agent.run(&["status"]).ok()["state"] == "stalled");
    assert!(
        h.agent.run(&["status"]).ok()["cause"].as_str().is_some_and(|c| c.contains("no space in the volume group"))
    );
    running.signal(Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0));
}

#[test]
fn a_pre_that_never_ends_is_ended() {
    let h = Hooked::new(1);
    h.hooks("echo $$ > $copy.pid\ntrap '' TERM\nwhile :; do sleep 0.2; done", "true", "timeout = \"1s\"");
    let begun = Instant::now();
    let error = h.agent.run(&["sync"]).fails(1, "E_HOOK");
    assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains("longer than 1 s")), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(h.log(), "pre, post failed, ");
    assert!(!is_running(&h), "it was killed");
}

fn is_running(h: &Hooked) -> bool {
    let text = std::fs::read_to_string(h.f.path("copy.pid")).expect("pre wrote its number");
    let pid = text.trim().parse().ok().and_then(Pid::from_raw).expect("a number");
    test_kill_process(pid).is_ok()
}

#[test]
fn a_post_that_fails_is_said_and_not_repeated() {
    let h = Hooked::new(1);
    h.hooks("true", "echo still in use >&2; exit 5", "");
    let ran = h.agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "crash");
    assert!(ran.err.contains("exit code 5") && ran.err.contains("still in use"), "{}", ran.err);
    h.hooks("true", "sleep 100", "timeout = \"1s\"");
    let ran = h.agent.run(&["sync"]);
    assert_eq!(number(&ran.ok(), "point"), 2);
    assert!(ran.err.contains("longer than 1 s"), "{}", ran.err);
    assert_eq!(h.log(), "pre, post read, pre, post read, ");
    assert!(!h.owes());
}

/// kill -9 while data is sent, and while `pre` runs: the next command pays first, also when hooks are no longer set.
#[test]
fn a_killed_agent_owes_post() {
    let mut h = Hooked::new(100);
    let network = h.through();
    h.hooks(COPY, "rm -f $copy", "");
    let kill = |h: &Hooked| {
        h.forget();
        let before = network.bytes_up();
        let mut child = h.agent.start(&["sync"]);
        until("under way", PROMPT, || network.bytes_up() > before + MIB);
        child.kill();
        assert_eq!(h.log(), "pre, ");
        assert!(h.owes() && h.f.path("copy").exists());
    };
    kill(&h);
    let synced = h.agent.sync();
    assert_eq!(synced["consistency"], "crash");
    assert_eq!(h.log(), "pre, post left-over, pre, post read, ");
    image::random(&h.disk(), 100 * MIB, &mut Random::new(3));
    kill(&h);
    h.agent.settings("");
    h.agent.sync();
    assert_eq!(h.log(), "pre, post left-over, ");
    assert!(!h.owes() && !h.f.path("copy").exists());

    // `pre` outlives its agent: it is ended before `post` undoes what it does.
    h.forget();
    h.hooks("echo $$ > $copy.pid; sleep 4; echo late >> $copy.late", "true", "");
    let mut child = h.agent.start(&["sync"]);
    until("pre runs", PROMPT, || h.f.path("copy.pid").exists() && h.log() == "pre, ");
    // The number is written down right after it was started.
    std::thread::sleep(Duration::from_millis(300));
    child.kill();
    assert!(is_running(&h));
    h.hooks("true", "true", "");
    h.agent.sync();
    assert_eq!(h.log(), "pre, post left-over, pre, post read, ");
    std::thread::sleep(Duration::from_secs(4));
    assert!(!h.f.path("copy.late").exists(), "a pre that is paid for does nothing any more");
}

#[test]
fn post_runs_when_the_round_is_given_up() {
    let mut h = Hooked::new(100);
    let network = h.through();
    h.hooks(COPY, "rm $copy", "");
    let done = |h: &Hooked, log: &str| {
        assert_eq!(h.log(), log);
        assert!(!h.owes() && !h.f.path("copy").exists(), "I23: nothing is left");
        h.forget();
    };
    // systemctl stop, Ctrl-C: while data is sent.
    for (args, code) in [(&["run", "--every", "1s"][..], 0), (&["sync"], 130)] {
        let before = network.bytes_up();
        let mut child = h.agent.start(args);
        until("under way", PROMPT, || network.bytes_up() > before + MIB);
        child.signal(Signal::TERM);
        assert_eq!(child.wait(PROMPT).code(), Some(code), "{}", child.err());
        done(&h, "pre, post failed, ");
    }
    // While `pre` runs.
    h.hooks("echo $$ > $copy.pid; sleep 100", "true", "");
    let mut child = h.agent.start(&["run", "--every", "1s"]);
    until("pre runs", PROMPT, || h.f.path("copy.pid").exists() && h.log() == "pre, ");
    let begun = Instant::now();
    child.signal(Signal::TERM);
    assert_eq!(child.wait(PROMPT).code(), Some(0), "{}", child.err());
    assert!(begun.elapsed() < Duration::from_secs(10) && !is_running(&h), "it was ended: {:?}", begun.elapsed());
    done(&h, "pre, post failed, ");
    // The connection breaks.
    h.hooks(COPY, "rm $copy", "");
    let before = network.bytes_up();
    let mut child = h.agent.start(&["run", "--every", "1s"]);
    until("under way", PROMPT, || network.bytes_up() > before + MIB);
    network.set(Weather::Cut);
    until("post runs", Duration::from_secs(60), || h.log() == "pre, post failed, ");
    network.set(Weather::Fine);
    let begun = Instant::now();
    while h.f.points().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(90), "I14: no point: {} {}", h.log(), child.err());
        std::thread::sleep(Duration::from_millis(200));
    }
    child.signal(Signal::TERM);
    assert_eq!(child.wait(PROMPT).code(), Some(0), "{}", child.err());
    assert!(!h.owes() && !h.f.path("copy").exists());
}
