//! A program writes records to one volume and then to another, each durable before the next. A point that has a record
//! of the second and not of the first is not of one instant; one that has a hole lost something.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use backhaul_tests::device::{Loop, Mount};
use backhaul_tests::process::{tool, until};
use backhaul_tests::{Random, needs_root};
use rustix::fs::OFlags;

use crate::server::{Kind, PROMPT, Server, assert_not_frozen};

const RECORD: usize = 4096;
/// Records are written over after so many.
const RING: u64 = 1500;

fn record(number: u64) -> Vec<u8> {
    let mut one = number.to_le_bytes().to_vec();
    one.extend_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..8]);
    one.repeat(RECORD / 16)
}

/// Writes until it is told to stop; gives the last number.
fn write_in_order(folders: Vec<PathBuf>, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<u64> {
    let sync = OFlags::DSYNC.bits() as i32;
    let open = |folder: &PathBuf| {
        let path = folder.join("order");
        File::options().create(true).truncate(false).write(true).custom_flags(sync).open(path).expect("it can be made")
    };
    let files: Vec<File> = folders.iter().map(open).collect();
    std::thread::spawn(move || {
        let mut number = 0;
        while !stop.load(Ordering::SeqCst) {
            number += 1;
            for file in &files {
                file.write_all_at(&record(number), number % RING * RECORD as u64).expect("it is written");
            }
        }
        number
    })
}

/// Files come, go, grow and shrink, by all that a program may do with them.
fn make_noise(folder: PathBuf, seed: u64, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut random = Random::new(seed);
        while !stop.load(Ordering::SeqCst) {
            let mut name = || folder.join(format!("n{}", random.between(0, 30)));
            let (one, other) = (name(), name());
            let _ = match random.between(0, 5) {
                0 => std::fs::write(one, random.bytes(100_000)),
                1 => File::options().write(true).open(one).and_then(|f| f.set_len(random.between(0, 300_000))),
                2 => std::fs::rename(one, other),
                3 => std::fs::remove_file(one),
                _ => File::create(one).and_then(|f| f.write_all_at(&random.bytes(5000), random.between(0, 400_000))),
            };
            std::thread::sleep(Duration::from_millis(random.between(1, 8)));
        }
    })
}

/// The newest record of a restored volume, of which none is torn and none before it is missing.
fn newest(kind: Kind, restored: &Path, at: &Path) -> u64 {
    let device = Loop::attach(restored);
    let bytes = {
        let mount = Mount::new(device.path(), at);
        let bytes = std::fs::read(mount.path().join("order")).unwrap_or_default();
        tool("umount", [mount.path()]);
        bytes
    };
    kind.check(device.path());
    let mut numbers = BTreeSet::new();
    for (place, found) in bytes.chunks(RECORD).enumerate().filter(|(_, found)| found.iter().any(|b| *b != 0)) {
        let number = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
        assert_eq!(number % RING, place as u64, "a record in the place of another");
        assert!(found == record(number), "record {number} is torn");
        numbers.insert(number);
    }
    let newest = numbers.last().copied().unwrap_or(0);
    let all: BTreeSet<u64> = (newest.saturating_sub(RING - 1).max(1)..=newest).collect();
    assert_eq!(numbers, all, "records are missing");
    newest
}

/// How the agent is treated meanwhile.
#[derive(PartialEq, Eq)]
enum Treatment {
    Left,
    Killed,
}

fn proven(test: &str, kind: Kind, treatment: Treatment) {
    if !needs_root(test) {
        return;
    }
    let mut random = Random::printed(test);
    let mut server = Server::new(kind, 2);
    let stop = Arc::new(AtomicBool::new(false));
    let folders = vec![server.mounted(0), server.mounted(1)];
    let noise: Vec<_> = folders.iter().map(|f| make_noise(f.clone(), random.number(), stop.clone())).collect();
    let order = write_in_order(folders.clone(), stop.clone());
    let (mut running, begun) = (server.run(), Instant::now());
    while begun.elapsed() < Duration::from_secs(12) {
        std::thread::sleep(Duration::from_millis(random.between(0, 1000)));
        if treatment == Treatment::Killed {
            // Who is killed in every round makes no point, and proves nothing.
            let points = server.fixture.points().len();
            until("one point more", PROMPT, || server.fixture.points().len() > points);
            std::thread::sleep(Duration::from_millis(random.between(0, 1000)));
            running.kill();
            folders.iter().for_each(|folder| assert_not_frozen(folder));
            running = server.run();
        }
    }
    stop.store(true, Ordering::SeqCst);
    let last = order.join().expect("the writer does not panic");
    noise.into_iter().for_each(|n| n.join().expect("nor does this one"));
    server.wait_for_point();
    running.signal(rustix::process::Signal::TERM);
    assert_eq!(running.wait(PROMPT).code(), Some(0), "{}", running.err());
    server.unmount();
    let points = server.fixture.points();
    let crash: Vec<u64> =
        points.iter().filter(|p| p["consistency"] == "crash").map(|p| p["point"].as_u64().expect("a number")).collect();
    assert!(crash.len() >= 6, "only {} of {} points are `crash`: {}", crash.len(), points.len(), running.err());
    let mut before = 0;
    for point in &crash {
        let [a, b] = ["a", "b"].map(|volume| {
            let at = server.fixture.path("restored-mount");
            newest(kind, &server.restored(volume, *point), &at)
        });
        assert!(a == b || a == b + 1, "point {point}: the first volume has {a} and the second {b}");
        assert!(b >= before, "point {point} has {b}, and the one before had {before}");
        before = b;
    }
    assert_eq!(before, last, "the last point has everything");
    println!("{} points proven, {last} records", crash.len());
}

#[test]
fn on_ext4() {
    proven("order::on_ext4", Kind::Ext4, Treatment::Left);
}

#[test]
fn on_xfs() {
    proven("order::on_xfs", Kind::Xfs, Treatment::Left);
}

#[test]
fn on_btrfs() {
    proven("order::on_btrfs", Kind::Btrfs, Treatment::Left);
}

#[test]
fn on_ext4_with_kills() {
    proven("order::on_ext4_with_kills", Kind::Ext4, Treatment::Killed);
}

#[test]
fn on_xfs_with_kills() {
    proven("order::on_xfs_with_kills", Kind::Xfs, Treatment::Killed);
}
