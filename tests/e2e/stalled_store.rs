//! Fifty agents and a bucket at 0 B/s: memory stays, who only reads is served, and all go on when the store does
//! (I12, I14, I24). A bucket that ignores conditions is found out by `init` and takes one receiver (I4).

use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backhaul_tests::faults::{HttpFault, Rule};
use backhaul_tests::fixture::Serving;
use backhaul_tests::memory::Sampler;
use backhaul_tests::process::{Child, program, run, until};
use backhaul_tests::s3::{Conditional, TestS3};
use backhaul_tests::{Agent, Fixture, Random, image};

const MIB: u64 = 1 << 20;
const AGENTS: usize = 50;
/// What the documentation promises, with the settings that everybody has.
const BUDGET: u64 = 256 * MIB;
/// More than an agent may have on its way: all of them together would be far over the budget.
const VOLUME: u64 = 24 * MIB;
const STALLED: Duration = Duration::from_secs(25);
/// I14, counted from when the store is well again.
const RECOVERED: Duration = Duration::from_secs(60);

/// Agents of a group each, all with the same image, joined and not running.
fn many_agents(f: &Fixture, serving: &Serving) -> Vec<Agent> {
    let disk = f.path("large.img");
    image::random(&disk, VOLUME, &mut Random::new(2));
    let made = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let address = serving.address();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let n @ 0..AGENTS = next.fetch_add(1, Ordering::Relaxed) {
                    let group = format!("group-{n:02}");
                    let token = f.receiver(&["token", "--group", &group, "--address", &address]).ok();
                    let agent = f.agent(&format!("agent-{n:02}"));
                    agent.join(token["token"].as_str().expect("a token")).ok();
                    agent.protect("data", &disk);
                    made.lock().expect("nobody panics with it").push(agent);
                }
            });
        }
    });
    made.into_inner().expect("nobody panics with it")
}

/// One that the receiver's authority made, and that its store does not know.
fn token_of_another_store(f: &Fixture, address: &str) -> String {
    let store = format!("file://{}", f.path("another-store").display());
    let elsewhere = |args: &[&str]| {
        let mut command = Command::new(program("backhaul-receiver"));
        command.args(args).args(["--json", "--store", &store, "--state"]).arg(f.receiver_state());
        run(command, None).ok()
    };
    elsewhere(&["init"]);
    elsewhere(&["token", "--group", "web", "--address", address])["token"].as_str().expect("a token").to_owned()
}

#[test]
fn fifty_agents_and_a_bucket_at_0_bytes_a_second_stay_in_bounded_memory() {
    let server = TestS3::start();
    let f = Fixture::in_bucket(&server.url("p"), &server.envs());
    f.receiver(&["init"]).ok();
    let serving = f.serve();
    let reader = f.joined("reader", &serving);
    image::random(&f.path("disk.img"), 4 * MIB, &mut Random::new(1));
    reader.protect("data", &f.path("disk.img"));
    reader.sync();
    let agents = many_agents(&f, &serving);
    let digest = image::digest(&f.path("large.img"), 65536);
    let unknown = token_of_another_store(&f, &serving.address());

    // Segments are taken and never read; everything else is well, so that every agent gets as far as it can.
    server.fault(Rule::method("PUT").path("/segments/"), HttpFault::StalledUpload);
    let sampler = Sampler::start(serving.child.pid());
    let mut running: Vec<Child> = agents.iter().map(|a| a.start(&["run", "--every", "1s"])).collect();
    let stalled = Instant::now();
    let uploads = || server.requests().iter().filter(|r| r.method == "PUT" && r.path.contains("/segments/")).count();
    let until_full = until("memory is full and uploads wait", Duration::from_secs(30), || uploads() >= 3);
    println!("uploads wait after {until_full:.1?}");

    // Who reads is served, and who may not come in is told so.
    let to = f.path("to.img");
    let begun = Instant::now();
    reader.run(&["restore", "data", "--to", to.to_str().expect("UTF-8"), "--verify", "cached"]).ok();
    println!("a restore beside it took {:.1?}", begun.elapsed());
    assert!(image::same(&to, &f.path("disk.img")));
    f.agent("stranger").join(&unknown).fails(12, "E_AUTH");
    f.receiver(&["points", "web"]).ok();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());

    std::thread::sleep(STALLED.saturating_sub(stalled.elapsed()));
    let told = running.iter().filter(|child| child.err().contains("waits for its store")).count();
    println!("{told} of {AGENTS} agents say that the receiver waits for its store");
    // Memory is full before every agent has got to its first upload: those wait for room, and not for the store.
    assert!(told > 0, "I22: nobody was told that the store does not answer");
    server.heal();
    let right = || {
        let points = f.receiver(&["points"]).ok()["points"].as_array().expect("a list").clone();
        std::thread::sleep(Duration::from_millis(500));
        points.iter().filter(|p| p["volumes"][0]["digest"] == digest).count()
    };
    let took = until("I14: every agent has its point", RECOVERED, || right() >= AGENTS);
    println!("all points {took:.1?} after the store was well again");
    running.iter_mut().for_each(Child::kill);
    judge(&sampler.seen(), until_full);
    assert!(!serving.child.err().contains("panicked"), "{}", serving.child.err());
    serving.stop();
}

/// Never over the budget, and flat while nothing moves.
fn judge(samples: &[(Duration, u64)], until_full: Duration) {
    let most = samples.iter().map(|(_, bytes)| *bytes).max().expect("many samples");
    let still = |(at, _): &&(Duration, u64)| *at > until_full + Duration::from_secs(8) && *at < STALLED;
    let still: Vec<u64> = samples.iter().filter(still).map(|(_, bytes)| *bytes).collect();
    let (low, high) = (still.iter().min().expect("samples"), still.iter().max().expect("samples"));
    for (at, bytes) in samples.iter().step_by(10) {
        println!("{:5.1} s {:4} MiB", at.as_secs_f64(), bytes / MIB);
    }
    println!("at most {} MiB; at 0 B/s from {} to {} MiB", most / MIB, low / MIB, high / MIB);
    assert!(most <= BUDGET, "I12: {} MiB", most / MIB);
    assert!(high - low <= 8 * MIB, "I12: grows at 0 B/s, from {} to {} MiB", low / MIB, high / MIB);
}

/// F18: what does not keep `If-None-Match` is found out, said, and never shared by two receivers.
#[test]
fn a_bucket_that_ignores_conditions_takes_one_receiver() {
    for conditional in [Conditional::Ignored, Conditional::Racy(Duration::from_millis(20))] {
        let server = TestS3::with(conditional);
        let f = Fixture::in_bucket(&server.url("p"), &server.envs());
        let init = f.receiver(&["init"]);
        assert_eq!(init.ok()["several_receivers"], false, "{conditional:?}: {init:#?}");
        assert!(init.err.contains("use one receiver only"), "{conditional:?}: {init:#?}");
        let serving = f.serve();
        assert!(serving.child.err().contains("never run a second receiver"), "{}", serving.child.err());
        let mut second = f.second_command(&[]);
        second.envs(server.envs());
        let second = run(second, None).fails(11, "E_BUSY");
        assert!(second["error"]["message"].as_str().is_some_and(|m| m.contains("only one")), "{second}");
        // One is enough to work with, and its points are as good as any.
        let agent = f.joined("agent", &serving);
        image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
        agent.protect("data", &f.path("disk.img"));
        agent.sync();
        agent.sync();
        f.receiver(&["verify"]).ok();
        serving.stop();
    }
}
