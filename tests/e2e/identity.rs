//! Who may write: tokens, copies, other machines, revocation, adoption (F21, F24).

use std::time::{Duration, Instant};

use backhaul_tests::fixture::{GROUP, Serving, copy_folder, number};
use backhaul_tests::process::{run, until};
use backhaul_tests::{Agent, Fixture, Random, image};

const MIB: u64 = 1 << 20;

/// An agent with one point.
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
fn a_token_is_good_once() {
    let f = Fixture::new();
    let serving = f.serve();
    let token = f.token(&serving.address(), &[]);
    let (one, two) = (f.agent("one"), f.agent("two"));
    let joined = one.join(&token).ok();
    assert_eq!((joined["schema"].as_str(), joined["group"].as_str()), (Some("backhaul.join/1"), Some(GROUP)));
    let refused = two.join(&token).fails(12, "E_AUTH");
    let message = refused["error"]["message"].as_str().expect("a message");
    assert!(message.contains("used already") && message.contains("backhaul-receiver token"), "{message}");
    one.join(&token).fails(4, "E_JOINED");
    // The same key may fetch its certificate again: the answer may have been lost.
    std::fs::remove_file(one.state.join("identity.json")).expect("it is there");
    let again = one.join(&token).ok();
    assert_eq!(again["agent"], joined["agent"]);
    assert_eq!(f.receiver(&["agents"]).ok()["agents"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_token_that_is_no_good() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.agent("agent");
    let short = f.token(&serving.address(), &["--ttl", "1s"]);
    let good = f.token(&serving.address(), &[]);
    for garbage in ["", "garbage", "bh1.", &good[..good.len() / 2], &good.replace("bh1", "bh9")] {
        agent.join(garbage).fails(12, "E_AUTH");
    }
    // One digit of the secret, then of the authority's fingerprint: an unknown token, and not our receiver.
    let mut parts: Vec<String> = good.splitn(5, '.').map(str::to_owned).collect();
    for part in [2, 1] {
        let was = parts[part].clone();
        let digit = if was.starts_with('0') { "1" } else { "0" };
        parts[part].replace_range(0..1, digit);
        agent.join(&parts.join(".")).fails(12, "E_AUTH");
        parts[part] = was;
    }
    std::thread::sleep(Duration::from_millis(1100));
    let refused = agent.join(&short).fails(12, "E_AUTH");
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("expired")), "{refused}");
    // On the command line everybody could read it.
    let ran = agent.run(&["join", &good]);
    ran.fails(2, "E_USAGE");
    agent.run(&["join", &good, "--token-on-command-line"]).ok();
    for bad in
        [&["--ttl", "0s"][..], &["--ttl", "999d"], &["--ttl", "-5m"], &["--ttl", "1e99"], &["--address", "nowhere"]]
    {
        let ran = f.receiver(&[&["token", "--group", GROUP][..], bad].concat());
        assert_eq!(ran.code, Some(2), "{ran:#?}");
    }
    let ran = f.receiver(&["token", "--group", "../etc", "--address", "h:1"]);
    assert_eq!(ran.code, Some(2), "{ran:#?}");
}

#[test]
fn a_token_from_a_file() {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.agent("agent");
    let file = f.path("token");
    std::fs::write(&file, f.token(&serving.address(), &[])).expect("there is room");
    agent.run(&["join", "--token-file", f.path("missing").to_str().expect("UTF-8")]).fails(2, "E_USAGE");
    agent.run(&["join", "--token-file", file.to_str().expect("UTF-8")]).ok();
    use std::os::unix::fs::PermissionsExt;
    let mode =
        |name: &str| std::fs::metadata(agent.state.join(name)).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("agent.key")), (0o700, 0o600), "keys are for this user only");
}

#[test]
fn commands_before_joining_say_what_to_do() {
    let f = Fixture::new();
    let agent = f.agent("agent");
    for args in [&["sync"][..], &["status"], &["run"], &["protect", "a=/dev/null"], &["unprotect", "a"]] {
        let failed = agent.run(args).fails(78, "E_NOT_JOINED");
        assert!(failed["error"]["next"].as_str().is_some_and(|n| n.contains("join")), "{failed}");
    }
}

#[test]
fn an_old_copy_of_the_state_diverges_and_adopt_mends_it() {
    let (f, _serving, agent) = setup();
    copy_folder(&agent.state, &f.path("old"));
    agent.sync();
    agent.sync();
    let old = agent.clone().with_state(&f.path("old"));
    let refused = old.run(&["sync"]).fails(4, "E_DIVERGED");
    let message = refused["error"]["message"].as_str().expect("a message");
    assert!(
        message.contains("adopt") || refused["error"]["next"].as_str().is_some_and(|n| n.contains("adopt")),
        "{refused}"
    );
    assert_eq!(f.points().len(), 3, "nothing was committed");
    assert_eq!(number(&agent.sync(), "point"), 4, "the right one goes on");

    let adopted = f.receiver(&["adopt", GROUP, &agent.id()]).ok();
    assert_eq!((adopted["schema"].as_str(), number(&adopted, "record")), (Some("backhaul.adopt/1"), 5));
    image::write(&f.path("disk.img"), 5, b"x");
    let mended = old.sync();
    assert_eq!(number(&mended, "point"), 6);
    assert_eq!(mended["volumes"][0]["digest"], image::digest(&f.path("disk.img"), 65536));
    assert!(number(&mended, "bytes_sent") < 140_000, "only what differs: {mended}");
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
    assert_eq!(number(&old.sync(), "point"), 7);
}

#[test]
fn a_clone_on_another_machine_diverges() {
    let (f, _serving, agent) = setup();
    agent.runs_on("another machine");
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
    assert_eq!(f.points().len(), 1);
    agent.runs_on("the first machine");
    agent.sync();
    agent.runs_on("another machine");
    f.receiver(&["adopt", GROUP, &agent.id()]).ok();
    let first = agent.sync();
    assert_eq!(number(&first, "bytes_sent"), 0);
    agent.sync();
    agent.runs_on("the first machine");
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
}

#[test]
fn two_agents_with_one_identity() {
    let (f, _serving, agent) = setup();
    copy_folder(&agent.state, &f.path("clone"));
    let clone = agent.clone().with_state(&f.path("clone"));
    let first = clone.sync();
    assert_eq!(number(&first, "point"), 2, "it can't be told apart yet");
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
    clone.sync();
    assert_eq!(f.points().len(), 3);
}

#[test]
fn a_second_agent_of_the_group_is_not_its_writer() {
    let (f, serving, agent) = setup();
    let second = f.joined("second", &serving);
    second.protect("data", &f.path("disk.img"));
    second.run(&["sync"]).fails(4, "E_DIVERGED");
    agent.sync();
    f.receiver(&["adopt", "nosuch", &second.id()]).fails(4, "E_DENIED");
    f.receiver(&["adopt", GROUP, &second.id()]).ok();
    second.sync();
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
}

#[test]
fn lost_writer_state_diverges() {
    let (f, _serving, agent) = setup();
    std::fs::remove_file(agent.state.join("writer.json")).expect("it is there");
    agent.run(&["sync"]).fails(4, "E_DIVERGED");
    f.receiver(&["adopt", GROUP, &agent.id()]).ok();
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0);
}

#[test]
fn restore_only_can_not_write() {
    let (f, serving, _agent) = setup();
    let reader = f.agent("reader");
    let joined = reader.join(&f.token(&serving.address(), &["--restore-only"])).ok();
    assert_eq!(joined["role"], "restore-only");
    let named = format!("data={}", f.path("disk.img").display());
    for args in [&["protect", &*named][..], &["sync"], &["run"]] {
        let failed = reader.run(args).fails(12, "E_DENIED");
        assert!(failed["error"]["next"].as_str().is_some_and(|n| n.contains("join")), "{failed}");
    }
    reader.run(&["restore", "data", "--to", f.path("to.img").to_str().expect("UTF-8")]).ok();
    let agents = f.receiver(&["agents"]).ok();
    let row = agents["agents"].as_array().and_then(|all| all.iter().find(|a| a["agent"] == *reader.id()));
    assert!(row.is_some_and(|r| r["last_seen"].is_string()), "{agents}");
    // One that does not know its place is told by the receiver.
    let identity = reader.state.join("identity.json");
    let text = std::fs::read_to_string(&identity).expect("it joined");
    assert!(text.contains("\"restore_only\""));
    std::fs::write(&identity, text.replace("\"restore_only\": true", "\"restore_only\": false")).expect("writable");
    reader.protect("data", &f.path("disk.img"));
    let refused = reader.run(&["sync"]).fails(12, "E_DENIED");
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("can't write")), "{refused}");
    f.receiver(&["adopt", GROUP, &reader.id()]).fails(4, "E_DENIED");
    assert_eq!(f.points().len(), 1);
}

#[test]
fn revoked_on_a_live_session_within_30_seconds() {
    let (f, _serving, agent) = setup();
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("it runs", Duration::from_secs(20), || agent.run(&["status"]).json()["state"] == "continuous");
    let id = agent.id();
    let revoked = Instant::now();
    f.receiver(&["revoke", &id]).ok();
    until("thrown out", Duration::from_secs(30), || agent.run(&["status"]).json()["state"] != "continuous");
    assert!(revoked.elapsed() < Duration::from_secs(30));
    let head = f.points().len();
    image::write(&f.path("disk.img"), 1, b"after");
    assert!(running.is_running(), "a service does not give up");
    running.kill();
    let refused = agent.run(&["sync"]).fails(12, "E_AUTH");
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("revoked")), "{refused}");
    assert_eq!(f.points().len(), head);
    let agents = f.receiver(&["agents"]).ok();
    assert!(agents["agents"][0]["revoked"].is_string(), "{agents}");
    f.receiver(&["adopt", GROUP, &id]).fails(4, "E_DENIED");
    f.receiver(&["revoke", &id]).ok();
    f.receiver(&["revoke", "00000000-0000-0000-0000-000000000000"]).fails(10, "E_NOTFOUND");
}

#[test]
fn agents_lists_who_joined() {
    let (f, serving, agent) = setup();
    f.joined("second", &serving);
    let agents = f.receiver(&["agents"]).ok();
    assert_eq!(agents["schema"], "backhaul.agents/1");
    let rows = agents["agents"].as_array().expect("a list");
    assert_eq!(rows.len(), 2);
    let own = rows.iter().find(|r| r["agent"] == agent.id().as_str()).expect("it joined");
    assert_eq!((own["group"].as_str(), own["role"].as_str()), (Some(GROUP), Some("writer")));
    assert!(own["last_seen"].is_string() && own["certificate_until"].is_string(), "{own}");
}

#[test]
fn another_store_with_another_authority_is_not_trusted() {
    let (f, serving, agent) = setup();
    let other = Fixture::new();
    let imposter = other.serve();
    let fooled = agent.clone().through(&imposter.address());
    fooled.run(&["sync"]).fails(12, "E_AUTH");
    assert!(other.points().is_empty());
    let token = f.token(&imposter.address(), &[]);
    f.agent("late").join(&token).fails(12, "E_AUTH");
    drop(serving);
    agent.run(&["sync"]).fails(13, "E_NETWORK");
}

/// Secrets are never in logs, errors or arguments: everything that was said and can be seen is looked through.
#[test]
fn secrets_stay_secret() {
    let f = Fixture::new();
    let mut loud = f.serve_command(&["-v"]);
    loud.env("BACKHAUL_LOG", "trace");
    let serving = Serving::start(loud, &f.path("serve.err"));
    let agent = f.agent("agent");
    let token = f.token(&serving.address(), &[]);
    let secret = token.split('.').nth(2).expect("a secret").to_owned();
    let trace = |args: &[&str], input: Option<&str>| {
        let mut command = agent.command(args);
        command.arg("-vv").env("BACKHAUL_LOG", "trace");
        run(command, input)
    };
    let mut said = String::new();
    let mut heard = |ran: &backhaul_tests::Ran| said.push_str(&format!("{ran:?}"));
    heard(&trace(&["join", "-"], Some(&token)));
    heard(&trace(&["join", "-"], Some(&token)));
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    heard(&trace(&["protect", &format!("data={}", f.path("disk.img").display())], None));
    heard(&trace(&["sync"], None));
    heard(&trace(&["status"], None));
    heard(&f.receiver(&["agents", "-vv"]));
    let running = agent.start(&["run"]);
    for pid in [running.pid(), serving.child.pid()] {
        let args = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).expect("it runs");
        said.push_str(&String::from_utf8_lossy(&args));
    }
    drop(running);
    said.push_str(&serving.child.err());
    assert!(said.contains("listening") || said.contains("commit"), "something was said");
    let key = std::fs::read_to_string(agent.state.join("agent.key")).expect("a key");
    let key_line = key.lines().nth(1).expect("PEM");
    for (what, marker) in [("the token's secret", secret.as_str()), ("the agent's key", key_line)] {
        assert!(!said.contains(marker), "{what} was said");
    }
    // And in the store lies only the secret's hash, and nobody's key.
    for path in f.objects_with("") {
        let bytes = std::fs::read(&path).expect("it is there");
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(&secret) && !text.contains("PRIVATE KEY"), "{}", path.display());
    }
}
