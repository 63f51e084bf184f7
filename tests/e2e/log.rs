//! A log with a gap, receivers that sleep or come twice, and objects of a version that is not known yet (I3, I4, I21).

use std::collections::BTreeSet;
use std::time::Duration;

use backhaul_protocol::ids::RepositoryId;
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_tests::fixture::{GROUP, Serving, copy_folder, number};
use backhaul_tests::process::{run, until};
use backhaul_tests::{Agent, Fixture, Network, Random, image};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn setup(points: u64) -> (Fixture, Serving, Agent) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    image::random(&f.path("disk.img"), MIB, &mut Random::new(1));
    agent.protect("data", &f.path("disk.img"));
    for _ in 0..points {
        agent.sync();
    }
    (f, serving, agent)
}

fn numbers(f: &Fixture) -> BTreeSet<u64> {
    let last = |p: &std::path::PathBuf| p.file_name()?.to_str()?.parse().ok();
    f.objects_with("/log/").iter().filter_map(last).collect()
}

/// Records that were lost: nobody writes into the gap, and nobody takes what lies before it for all there is.
#[test]
fn nobody_writes_into_a_gap_of_the_log() {
    let (f, serving, agent) = setup(9);
    let id = agent.id();
    serving.stop();
    let (whole, state) = (f.path("whole"), f.path("state"));
    copy_folder(&f.store_path(), &whole);
    copy_folder(&agent.state, &state);
    for lost in [&[1][..], &[2], &[8], &[7], &[2, 3, 4, 5, 6, 7, 8], &[3, 4, 5, 6], &[1, 2, 3], &[5, 6, 7, 8]] {
        let _ = std::fs::remove_dir_all(f.store_path());
        copy_folder(&whole, &f.store_path());
        copy_folder(&state, &agent.state);
        for number in lost {
            std::fs::remove_file(f.objects_with(&format!("/log/{number:020}")).remove(0)).expect("it is there");
        }
        let listed = f.receiver(&["points"]);
        assert_eq!(listed.code, Some(6), "{lost:?}: {listed:#?}");
        let adopted = f.receiver(&["adopt", GROUP, &id]);
        let serving = f.serve();
        let synced = agent.clone().through(&serving.address()).run(&["sync"]);
        for ran in [&adopted, &synced] {
            // One that did not need what is lost may go on after the end, and nowhere else.
            assert!(matches!(ran.code, Some(0 | 4 | 6)), "{lost:?}: {ran:#?}");
            assert!(!ran.err.contains("panicked"), "{ran:#?}");
        }
        let after = numbers(&f);
        let filled: Vec<_> = lost.iter().filter(|n| after.contains(n)).collect();
        assert!(filled.is_empty(), "{lost:?}: written into the gap: {filled:?}");
        serving.stop();
    }
}

/// A store that takes one receiver.
fn single() -> Fixture {
    let f = Fixture::new();
    let format = StoreFormat { repository: RepositoryId([1; 16]), sharing: Sharing::OneReceiver };
    let path = f.store_path().join("format");
    std::fs::remove_file(&path).expect("init made it");
    std::fs::write(&path, format.to_bytes()).expect("there is room");
    f
}

#[test]
fn a_store_that_takes_one_receiver_gets_one() {
    let f = single();
    let first = f.serve();
    let refused = run(f.second_command(&[]), None).fails(11, "E_BUSY");
    assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("another receiver")), "{refused}");
    first.stop();
    let mut second = Serving::start(f.second_command(&[]), &f.path("serve-2.err"));
    // One that was killed did not say goodbye.
    second.child.kill();
    run(f.serve_command(&[]), None).fails(11, "E_BUSY");
}

/// Receivers that are stopped in the middle of anything and wake up when another one has taken over: of each number
/// of the log there is one record, and nothing that was acknowledged is lost.
#[test]
fn a_receiver_that_sleeps_and_wakes_up_loses_nothing() {
    let mut random = Random::printed("a_receiver_that_sleeps_and_wakes_up_loses_nothing");
    let (f, sleeper, agent) = setup(1);
    let other = f.serve_second();
    let network = Network::to(sleeper.socket());
    let (through, there) = (agent.clone().through(&network.address()), agent.clone().through(&other.address()));
    let disk = f.path("disk.img");
    let mut acknowledged = vec![f.points()[0]["volumes"][0]["digest"].clone()];
    for _ in 0..4 {
        image::write(&disk, random.between(0, MIB / 2), &random.bytes(400_000));
        let before = network.bytes_up();
        let asleep_at = random.between(0, 420_000);
        let mut child = through.start(&["sync"]);
        until("under way", Duration::from_secs(30), || network.bytes_up() - before > asleep_at || !child.is_running());
        sleeper.child.signal(Signal::STOP);
        child.kill();
        // The other one, as often as it takes to be past whatever the sleeper had begun.
        for _ in 0..2 {
            image::write(&disk, random.between(0, MIB / 2), &random.bytes(1000));
            let synced = there.sync();
            assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536));
            acknowledged.push(synced["volumes"][0]["digest"].clone());
        }
        sleeper.child.signal(Signal::CONT);
        let synced = through.sync();
        assert_eq!(synced["volumes"][0]["digest"], image::digest(&disk, 65536));
        acknowledged.push(synced["volumes"][0]["digest"].clone());
    }
    let points = f.points();
    let found: Vec<u64> = points.iter().map(|p| number(p, "point")).collect();
    assert_eq!(found, (1..=points.len() as u64).collect::<Vec<_>>());
    let mut digests = points.iter().map(|p| &p["volumes"][0]["digest"]);
    for expected in &acknowledged {
        assert!(digests.any(|d| d == expected), "an acknowledged point is gone: {points:?}");
    }
    f.receiver(&["verify"]).ok();
}
