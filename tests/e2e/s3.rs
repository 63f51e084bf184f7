//! The real programs on a bucket: everything that works in a folder, and what an S3 server does to its clients.

use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_tests::faults::{HttpFault, Rule};
use backhaul_tests::fixture::{GROUP, Serving, number};
use backhaul_tests::process::{Ran, run, until};
use backhaul_tests::s3::TestS3;
use backhaul_tests::{Agent, Fixture, Random, image};

const MIB: u64 = 1 << 20;
/// A user must know within five seconds; the rest is for a busy machine.
const SOON: Duration = Duration::from_secs(8);

struct Setup {
    server: TestS3,
    f: Fixture,
    serving: Serving,
    agent: Agent,
    disk: PathBuf,
}

fn setup(prefix: &str, len: u64) -> Setup {
    let server = TestS3::start();
    let f = Fixture::in_bucket(&server.url(prefix), &server.envs());
    f.receiver(&["init"]).ok();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, len, &mut Random::new(3));
    agent.protect("data", &disk);
    Setup { server, f, serving, agent, disk }
}

impl Setup {
    fn restore(&self, what: &str, to: &Path, more: &[&str]) -> Ran {
        self.f.receiver(&[&["restore", what, "--to", to.to_str().expect("UTF-8")], more].concat())
    }

    fn change(&self, seed: u64, len: usize) {
        image::write(&self.disk, seed * 100_000 % MIB, &Random::new(seed).bytes(len));
    }

    /// A sync that must make exactly one point, whose digest is right, although this happens.
    fn one_point_more(&self, what: &str, fault: Option<(Rule, HttpFault)>) {
        let before = self.f.points().len();
        if let Some((rule, fault)) = fault {
            self.server.fault(rule, fault);
        }
        let synced = self.agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&self.disk, 65536), "{what}");
        self.server.heal();
        assert_eq!(self.f.points().len(), before + 1, "{what}");
    }
}

#[test]
fn a_bucket_does_what_a_folder_does() {
    let s = setup("some/prefix-1.x_y=z+A", 20 * MIB);
    assert_eq!(s.f.receiver(&["init"]).ok()["created"], false);
    s.agent.sync();
    let first = s.f.path("first.img");
    std::fs::copy(&s.disk, &first).expect("there is room");
    s.change(5, 3_000_000);
    s.agent.sync();
    let names: Vec<String> = s.server.objects().into_keys().collect();
    assert!(names.iter().all(|n| n.starts_with("some/prefix-1.x_y=z+A/")), "{names:?}");
    assert_eq!(s.f.points().len(), 2);
    assert_eq!(number(&s.f.receiver(&["verify"]).ok(), "bytes_verified"), 20 * MIB);
    s.f.receiver(&["agents"]).ok();

    let to = s.f.path("to.img");
    for (what, want) in [("web/data@1", &first), ("web/data@2", &s.disk), ("web", &s.disk)] {
        let _ = std::fs::remove_file(&to);
        s.restore(what, &to, &[]).ok();
        assert!(image::same(&to, want), "{what}");
    }
    let _ = std::fs::remove_file(&to);
    s.agent.run(&["restore", "data@1", "--to", to.to_str().expect("UTF-8")]).ok();
    assert!(image::same(&to, &first));

    let segment = names.iter().find(|n| n.contains("/segments/")).expect("a segment");
    s.server.tamper(segment, None);
    let _ = std::fs::remove_file(&to);
    let failed = s.restore("web/data@1", &to, &[]).fails(6, "E_DAMAGED");
    let tail = segment.rsplit_once('/').expect("a path").1;
    assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(tail)), "{failed}");
    assert!(failed["error"]["next"].as_str().is_some_and(|n| n.contains("--salvage")), "{failed}");
    let salvaged = s.restore("web/data@1", &to, &["--salvage"]);
    assert_eq!(salvaged.code, Some(6), "{salvaged:#?}");
    assert!(!salvaged.json()["lost"].as_array().expect("a list").is_empty());
    let verified = s.f.receiver(&["verify", "web@1"]);
    assert_eq!(verified.code, Some(6), "{verified:#?}");
    s.serving.stop();
}

#[test]
fn what_is_wrong_with_a_bucket_is_said() {
    let server = TestS3::start();
    let with = |url: &str, name: &str, value: &str| {
        let f = Fixture::in_bucket(url, &server.envs());
        let mut command = f.receiver_command(&["points"]);
        command.env(name, value);
        run(command, None)
    };
    let url = server.url("p");
    let said = |failed: serde_json::Value, words: &str| {
        assert!(failed["error"]["message"].as_str().is_some_and(|m| m.contains(words)), "{failed}");
    };
    said(with(&url.replace("backhaul-test", "another-one"), "X", "").fails(78, "E_STORE"), "no bucket another-one");
    said(with(&url, "AWS_SECRET_ACCESS_KEY", "wrong").fails(12, "E_STORE"), "AWS_SECRET_ACCESS_KEY");
    said(with(&url, "AWS_ACCESS_KEY_ID", "AKIANOBODY").fails(12, "E_STORE"), "AWS_ACCESS_KEY_ID");
    for bad in ["AKIA\nTEST", "AKIATEST\n", "AKIA TEST", "AKIA\u{e4}", "\t"] {
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"] {
            // The SDK trims this one itself.
            if name == "AWS_SESSION_TOKEN" && bad.trim() != "AKIA\nTEST" {
                continue;
            }
            let failed = with(&url, name, bad).fails(12, "E_STORE");
            let message = failed["error"]["message"].as_str().expect("a text").to_owned();
            assert!(message.contains(name) && !message.contains("AKIA"), "{message}");
        }
    }
    said(with(&url, "X", "").fails(10, "E_NOTFOUND"), "init");
    drop(server);
    let gone = Fixture::in_bucket("s3://bucket/p?endpoint=http://127.0.0.1:1", &TestS3::start().envs());
    for command in [&["init"][..], &["points"], &["verify"]] {
        said(gone.receiver(command).fails(13, "E_STORE"), "nothing listens");
    }
}

#[test]
fn a_sync_survives_what_a_server_does() {
    let s = setup("", 4 * MIB);
    s.one_point_more("without faults", None);
    let put = || Rule::method("PUT");
    let faults = [
        ("a burst of SlowDown", Rule::default().times(12), HttpFault::Refuse(503, "SlowDown")),
        ("a burst of errors", put().times(5), HttpFault::Refuse(500, "InternalError")),
        ("lost requests", Rule::default().times(4), HttpFault::LostRequest),
        ("the reply to a segment is lost", put().path("/segments/").times(2), HttpFault::LostReply),
        ("the reply to the commit is lost", put().path("/log/").times(1), HttpFault::LostReply),
        ("the commit is done and never answered", put().path("/log/").times(1), HttpFault::Silent),
        ("replies that break off", Rule::method("GET").times(3), HttpFault::Cut(20)),
    ];
    for (i, (what, rule, fault)) in faults.into_iter().enumerate() {
        s.change(i as u64 + 10, 900_000);
        s.one_point_more(what, Some((rule, fault)));
    }
    s.f.receiver(&["verify"]).ok();
    let to = s.f.path("to.img");
    s.server.fault(Rule::method("GET").path("/segments/").times(2), HttpFault::Stall(1000));
    s.server.fault(Rule::method("GET").path("/segments/").times(2), HttpFault::Cut(1000));
    s.restore("web/data", &to, &[]).ok();
    assert!(image::same(&to, &s.disk));
    s.serving.stop();
}

#[test]
fn a_receiver_that_is_killed_in_the_middle_goes_on_where_it_was() {
    let mut s = setup("p", 96 * MIB);
    s.server.fault(Rule::method("PUT").path("/segments/"), HttpFault::Delay(Duration::from_millis(300)));
    let mut child = s.agent.start(&["sync"]);
    let has_segment = || s.server.objects().keys().any(|n| n.contains("/segments/"));
    until("a segment is there", Duration::from_secs(60), has_segment);
    s.serving.child.kill();
    child.kill();
    s.serving = s.f.serve();
    s.agent = s.agent.clone().through(&s.serving.address());
    assert!(s.f.points().is_empty(), "no point before its commit");
    s.server.heal();
    let synced = s.agent.sync();
    assert_eq!(synced["volumes"][0]["digest"], image::digest(&s.disk, 65536));
    let stored: usize = s.server.objects().values().map(bytes::Bytes::len).sum();
    // What was durable is not sent again; what was in memory is.
    assert!((stored as u64) < 160 * MIB, "{} MiB", stored as u64 / MIB);
    assert!(number(&synced, "bytes_sent") < 84 * MIB, "{synced}");
    s.f.receiver(&["verify"]).ok();
    s.serving.stop();
}

#[test]
fn a_store_that_does_not_answer_is_said_within_seconds() {
    let s = setup("p", 4 * MIB);
    s.agent.sync();
    let to = s.f.path("to.img");
    let to = to.to_str().expect("UTF-8");
    for fault in [HttpFault::Refuse(503, "SlowDown"), HttpFault::Silent, HttpFault::LostRequest] {
        s.change(77, 500_000);
        for args in [&["sync"][..], &["restore", "data@1", "--to", to]] {
            s.server.fault(Rule::default(), fault.clone());
            let before = s.agent_err().len();
            let mut child = s.agent.start(args);
            until("the agent says so", SOON, || s.agent_err()[before..].contains("waits for its store"));
            let said = s.agent_err()[before..].to_owned();
            assert!(said.contains("up to 180 s"), "{said}");
            s.server.heal();
            let status = child.wait(Duration::from_secs(60));
            assert_eq!(status.code(), Some(0), "{fault:?} {args:?}: {}", s.agent_err());
        }
    }
    assert!(s.serving.child.err().contains("the store does not answer"), "{}", s.serving.child.err());
}

#[test]
fn a_restore_from_a_store_that_goes_away_says_so_within_seconds() {
    let s = setup("p", 40 * MIB);
    s.agent.sync();
    let to = s.f.path("to.img");
    let err = s.f.path("restore.err");
    // Only blocks: everything before them is well.
    s.server.fault(Rule::method("GET").path("/segments/"), HttpFault::Delay(Duration::from_millis(200)));
    let command = s.f.receiver_command(&["restore", "web/data", "--to", to.to_str().expect("UTF-8")]);
    let mut child = backhaul_tests::process::Child::start(command, &err);
    until("it has begun", Duration::from_secs(30), || to.exists());
    s.server.heal();
    s.server.fault(Rule::default(), HttpFault::Refuse(503, "SlowDown"));
    until("the restore says so", SOON, || child.err().contains("the store does not answer"));
    s.server.heal();
    assert_eq!(child.wait(Duration::from_secs(60)).code(), Some(0), "{}", child.err());
    assert!(image::same(&to, &s.disk));
    assert_eq!(s.f.receiver(&["verify", GROUP]).code, Some(0));
}

impl Setup {
    fn agent_err(&self) -> String {
        std::fs::read_to_string(self.f.path("agent.err")).unwrap_or_default()
    }
}

/// What AWS charges for: a PUT costs twelve times a GET, a LIST the same, and a server far away answers each in its time.
#[test]
fn requests_are_few_and_nothing_is_listed() {
    let s = setup("few", 100 * MIB);
    let mut seen = s.server.requests().len();
    let mut counted = |what: &str, most: u64| {
        let requests = s.server.requests();
        let new: Vec<_> = requests[seen..].iter().collect();
        seen = requests.len();
        let lists: Vec<_> = new.iter().filter(|r| r.path.contains("list-type=2")).map(|r| &r.path).collect();
        assert!(lists.is_empty(), "{what}: {lists:?}");
        let puts: Vec<_> = new.iter().filter(|r| r.method == "PUT").map(|r| &r.path).collect();
        assert!(puts.len() as u64 <= most, "{what}: {} of at most {most}: {puts:?}", puts.len());
    };
    let sync = |s: &Setup| number(&s.agent.sync(), "bytes_sent").div_ceil(16 * MIB) + 2;
    let most = sync(&s);
    counted("first sync", most);
    let most = sync(&s);
    counted("no change", most);
    s.change(5, 100_000);
    let most = sync(&s);
    counted("a small change", most);
    s.change(6, 50_000_000);
    let most = sync(&s);
    counted("a large change", most);
    let to = s.f.path("to.img");
    for what in ["web/data", "web/data@2"] {
        s.restore(what, &to, &[]).ok();
        counted("restore", 0);
    }
    s.agent.run(&["restore", "data", "--to", to.to_str().expect("UTF-8")]).ok();
    counted("restore over the network", 1);
    assert!(image::same(&to, &s.disk));
}
