//! Killed and cut at any moment of a first sync: it goes on, and little is sent twice (I2, I5, I11).

use std::time::Duration;

use backhaul_tests::fixture::{Serving, number};
use backhaul_tests::process::until;
use backhaul_tests::{Agent, Fixture, Network, Random, Weather, image};

const MIB: u64 = 1 << 20;
const LEN: u64 = 300 * MIB + 777;
/// What may be sent twice for each kill.
const TWICE: u64 = 64 * MIB;
const PROMPT: Duration = Duration::from_secs(60);

fn disk(f: &Fixture, random: &mut Random) -> std::path::PathBuf {
    let disk = f.path("disk.img");
    image::random(&disk, LEN, random);
    disk
}

/// The end: one point, right, and what was sent in all is within bounds.
#[track_caller]
fn ends_well(f: &Fixture, agent: &Agent, disk: &std::path::Path, kills: u64) {
    assert!(f.points().is_empty(), "no point before its commit");
    let last = agent.sync();
    assert_eq!(number(&last, "point"), 1);
    assert_eq!(last["volumes"][0]["digest"], image::digest(disk, 65536));
    // All data is random: what the store holds beyond it was sent twice.
    let stored = f.stored("segments");
    assert!(stored <= LEN + LEN / 100 + kills * TWICE, "{} MiB stored after {kills} kills", stored / MIB);
    println!("{kills} kills: {} of {} MiB sent by the last try", number(&last, "bytes_sent") / MIB, LEN / MIB);
    assert!(number(&last, "bytes_sent") <= LEN + LEN / 100);
    assert_eq!(number(&agent.sync(), "bytes_sent"), 0);
    assert_eq!(f.points().len(), 2);
}

/// Starts a sync and waits until so much has left the agent.
fn sync_until(agent: &Agent, network: &Network, bytes: u64) -> backhaul_tests::Child {
    let before = network.bytes_up();
    let mut child = agent.start(&["sync"]);
    until("the sync is under way, or done", PROMPT, || network.bytes_up() - before >= bytes || !child.is_running());
    child
}

#[test]
fn resume_after_the_agent_is_killed() {
    let mut random = Random::printed("resume_after_the_agent_is_killed");
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    let mut sent = 0;
    for _ in 0..4 {
        let before = network.bytes_up();
        sync_until(&agent, &network, random.between(1, 60 * MIB)).kill();
        sent += network.bytes_up() - before;
        assert!(f.points().is_empty(), "no point before its commit");
    }
    let before = network.bytes_up();
    ends_well(&f, &agent, &disk, 4);
    sent += network.bytes_up() - before;
    // On the wire too, with what QUIC adds.
    assert!(sent <= LEN + LEN / 10 + 4 * TWICE, "{} MiB", sent / MIB);
}

#[test]
fn resume_after_the_receiver_is_killed() {
    let mut random = Random::printed("resume_after_the_receiver_is_killed");
    let f = Fixture::new();
    let mut serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    for _ in 0..3 {
        let mut child = sync_until(&agent, &network, random.between(1, 90 * MIB));
        serving.child.kill();
        assert!(f.points().is_empty(), "no point before its commit");
        // The agent may wait for a receiver, or give up: nothing of that is kept.
        child.kill();
        serving = f.serve();
        network.point_to(serving.socket());
    }
    ends_well(&f, &agent, &disk, 3);
}

#[test]
fn resume_by_itself_when_the_receiver_comes_back() {
    let mut random = Random::printed("resume_by_itself_when_the_receiver_comes_back");
    let f = Fixture::new();
    let mut serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    let mut running = agent.start(&["run", "--every", "1s"]);
    until("the first sync is under way", PROMPT, || network.bytes_up() > 40 * MIB);
    serving.child.kill();
    serving = f.serve();
    network.point_to(serving.socket());
    until("a point although the receiver was killed", Duration::from_secs(120), || !f.points().is_empty());
    assert_eq!(f.points()[0]["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert!(f.stored("segments") <= LEN + LEN / 100 + TWICE);
    assert!(running.is_running());
    drop(running);
    serving.stop();
}

#[test]
fn resume_after_the_connection_is_cut() {
    let mut random = Random::printed("resume_after_the_connection_is_cut");
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    let mut child = sync_until(&agent, &network, random.between(1, 100 * MIB));
    network.set(Weather::Cut);
    assert!(f.points().is_empty(), "no point before its commit");
    // Both ends give up after their idle timeout; the draft is kept.
    std::thread::sleep(Duration::from_secs(22));
    network.set(Weather::Fine);
    let status = child.wait(Duration::from_secs(120));
    if status.code() == Some(0) {
        // It went on by itself.
        assert_eq!(f.points().len(), 1);
        assert_eq!(f.points()[0]["volumes"][0]["digest"], image::digest(&disk, 65536));
        assert!(f.stored("segments") <= LEN + LEN / 100 + TWICE);
    } else {
        assert_eq!(status.code(), Some(13), "{}", child.err());
        ends_well(&f, &agent, &disk, 1);
    }
}

#[test]
fn resume_through_a_short_break_and_a_lossy_network() {
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = f.path("disk.img");
    image::random(&disk, 30 * MIB, &mut Random::new(5));
    agent.protect("data", &disk);
    network.set(Weather::Losing(10));
    let mut child = sync_until(&agent, &network, 5 * MIB);
    network.set(Weather::Cut);
    std::thread::sleep(Duration::from_secs(3));
    network.set(Weather::Losing(10));
    assert_eq!(child.wait(Duration::from_secs(120)).code(), Some(0), "{}", child.err());
    assert_eq!(f.points()[0]["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert!(f.stored("segments") < 31 * MIB, "a short break costs nothing twice");
}

#[test]
fn resume_when_the_volume_changed_meanwhile() {
    let mut random = Random::printed("resume_when_the_volume_changed_meanwhile");
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    for _ in 0..3 {
        sync_until(&agent, &network, random.between(MIB, 80 * MIB)).kill();
        // What has arrived is not what is there any more, in places; some of it becomes zero.
        for _ in 0..20 {
            image::write(&disk, random.between(0, LEN - 70_000), &random.bytes(70_000));
        }
        image::write(&disk, random.between(0, LEN - (2 << 20)), &vec![0; 2 << 20]);
    }
    let last = agent.sync();
    assert_eq!(last["volumes"][0]["digest"], image::digest(&disk, 65536));
    assert_eq!(number(&last, "point"), 1);
}

#[test]
fn a_killed_incremental_keeps_the_old_point_and_the_next_is_right() {
    let mut random = Random::printed("a_killed_incremental_keeps_the_old_point_and_the_next_is_right");
    let f = Fixture::new();
    let serving = f.serve();
    let network = Network::to(serving.socket());
    let agent = f.joined("agent", &serving).through(&network.address());
    let disk = f.path("disk.img");
    image::random(&disk, 64 * MIB, &mut random);
    agent.protect("data", &disk);
    let first = agent.sync();
    for _ in 0..5 {
        image::write(&disk, random.between(0, 40 * MIB), &random.bytes(8 << 20));
        let before = network.bytes_up();
        let mut child = agent.start(&["sync"]);
        let kill_at = random.between(1, 9 * MIB);
        until("bytes", PROMPT, || network.bytes_up() - before > kill_at || !child.is_running());
        child.kill();
        let points = f.points();
        assert_eq!(points[0]["volumes"][0]["digest"], first["volumes"][0]["digest"]);
        let synced = agent.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536));
    }
}

/// At the same address, as its service manager starts it again.
fn serve_again_at(f: &Fixture, address: std::net::SocketAddr) -> Serving {
    let command = f.receiver_command(&["serve", "--listen", &address.to_string(), "-v"]);
    Serving::start(command, &f.path("serve.err"))
}

/// A receiver that was killed and started again says that it knows nothing of the connection: nobody waits for a
/// timeout.
#[test]
fn a_receiver_that_was_killed_is_found_again_within_seconds() {
    let f = Fixture::new();
    let mut serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = f.path("disk.img");
    image::random(&disk, 2 * MIB, &mut Random::new(8));
    agent.protect("data", &disk);
    let _running = agent.start(&["run", "--every", "1s"]);
    until("a point", PROMPT, || f.points().len() == 1);
    for (points, away) in [(2, 0), (3, 1), (4, 12)] {
        serving.child.kill();
        std::thread::sleep(Duration::from_secs(away));
        image::write(&disk, 1000 * points, b"while it was away");
        serving = serve_again_at(&f, serving.socket());
        let took = until("the next point", Duration::from_secs(60), || f.points().len() as u64 == points);
        assert!(took < Duration::from_secs(12), "{took:?} after {away} s");
        println!("{took:?} after {away} s");
    }
}

#[test]
fn a_sync_goes_on_within_seconds_when_its_receiver_was_killed() {
    let mut random = Random::printed("a_sync_goes_on_within_seconds_when_its_receiver_was_killed");
    let f = Fixture::new();
    let mut serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = disk(&f, &mut random);
    agent.protect("data", &disk);
    let mut child = agent.start(&["sync"]);
    until("segments", PROMPT, || f.stored("segments") > 20 * MIB || !child.is_running());
    serving.child.kill();
    let began = std::time::Instant::now();
    let _serving = serve_again_at(&f, serving.socket());
    assert_eq!(child.wait(Duration::from_secs(60)).code(), Some(0), "{}", child.err());
    assert!(began.elapsed() < Duration::from_secs(18), "{:?}", began.elapsed());
    println!("{:?}", began.elapsed());
    assert_eq!(f.points()[0]["volumes"][0]["digest"], image::digest(&disk, 65536));
}
