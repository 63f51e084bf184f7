//! F11: what the kernel did not tell is doubted before anything is believed, and nothing is doubted for long without
//! reason. Losses are made by telling programs that no volume is there: as good as programs that do not run.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use backhaul_hints::testing::{OBJECT, poke, table};
use backhaul_hints::{Doubt, Proof, Start, TrackError, Tracked, Tracker};
use backhaul_volume::sysfs::Dev;
use support::*;

const MIB: u64 = 1 << 20;

/// Programs look at this many volumes.
fn look_at(pins: &Pins, slots: u64) {
    // The count of those without requests lies beside it.
    poke(&pins.folder().join("table"), table::COUNT / 2, slots).unwrap();
}

/// Writes all the time to the first part while this goes on; with its pauses.
fn while_written<T>(device: &Path, to: u64, pause: Duration, act: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (file, payload) = (direct(device), Payload::new(4096));
            while !done.load(Ordering::SeqCst) {
                file.write_all_at(payload.bytes(), fastrand::u64(0..to / 4096) * 4096).unwrap();
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        done.store(true, Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Looks until it is known; a disk that is written to has moments without writes.
fn known(tracked: &Tracked) -> Result<Proof, Doubt> {
    let begun = Instant::now();
    loop {
        match tracked.proof() {
            Ok(Proof::Busy) if begun.elapsed() < Duration::from_secs(5) => continue,
            result => return result,
        }
    }
}

#[test]
fn one_lost_write_is_doubted_whatever_was_written_when_tracking_began() {
    root_test("one_lost_write_is_doubted_whatever_was_written_when_tracking_began", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracker = pins.open();
        for round in 0..10 {
            let tracked = while_written(&disk.path, 64 * MIB, Duration::ZERO, || {
                let tracked = track(&tracker, &disk.path, 1, None);
                tracked.take().unwrap();
                tracked
            });
            assert_eq!(tracked.proof(), Ok(Proof::Complete), "round {round}: no reason to doubt");
            look_at(&pins, 0);
            write_at(&disk.path, 0, 512 * 8);
            look_at(&pins, 1);
            assert_eq!(tracked.proof(), Err(Doubt::Unseen { sectors: 8 }), "F11: round {round}");
            assert_eq!(tracked.doubt(), Some(Doubt::Unseen { sectors: 8 }), "F11: round {round}");
        }
    });
}

#[test]
fn a_loss_is_known_when_writes_pause_and_on_a_busy_neighbour() {
    root_test("a_loss_is_known_when_writes_pause_and_on_a_busy_neighbour", || {
        let (pins, disk) = (Pins::new(), Loop::new(256 * MIB));
        let parts = disk.partition(&[(2048, 65_536), (102_400, 200_000)]);
        let tracked = settled(&pins.open(), &parts[0], 1);
        while_written(&parts[1], 64 * MIB, Duration::from_micros(500), || {
            assert_eq!(known(&tracked), Ok(Proof::Complete), "a partition beside another that is written to");
            look_at(&pins, 0);
            write_at(&parts[0], 0, 4096);
            look_at(&pins, 1);
            assert!(matches!(known(&tracked), Err(Doubt::Unseen { sectors: 8.. })), "F11");
        });
        assert!(matches!(tracked.proof(), Err(Doubt::Unseen { sectors: 8.. })), "F11");
    });
}

#[test]
fn devices_without_requests_are_witnessed_when_idle() {
    root_test("devices_without_requests_are_witnessed_when_idle", || {
        let Some(zram) = Zram::new(64 * MIB) else {
            skipped("devices_without_requests_are_witnessed_when_idle", "needs zram");
            return;
        };
        let pins = Pins::new();
        let tracked = while_written(&zram.path, 64 * MIB, Duration::from_micros(200), || {
            let tracked = track(&pins.open(), &zram.path, 1, None);
            tracked.take().unwrap();
            tracked
        });
        assert_eq!(tracked.proof(), Ok(Proof::Complete), "begun while it was written to");
        while_written(&zram.path, 64 * MIB, Duration::from_micros(200), || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(500) {
                assert_eq!(tracked.take().map(drop), Ok(()), "no reason to doubt");
            }
        });
        assert_eq!(tracked.proof(), Ok(Proof::Complete));
        look_at(&pins, 0);
        write_at(&zram.path, 0, 8192);
        look_at(&pins, 1 | 1 << 32);
        assert_eq!(tracked.proof(), Err(Doubt::Unseen { sectors: 16 }), "F11");
    });
}

#[test]
fn what_is_lost_in_an_update_is_not_forgotten() {
    root_test("what_is_lost_in_an_update_is_not_forgotten", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let mut object = OBJECT.to_vec();
        let mut update = || {
            object.push(1);
            Tracker::open_with(&pins.0, &object).unwrap()
        };
        drop(settled(&pins.open(), &disk.path, 1));
        // Both versions' programs run for a while, and each write must count once.
        let tracked = while_written(&disk.path, 64 * MIB, Duration::ZERO, || {
            for _ in 0..5 {
                update();
            }
            track(&update(), &disk.path, 1, Some(1))
        });
        assert_eq!((tracked.start(), tracked.proof()), (Start::Continued, Ok(Proof::Complete)));
        look_at(&pins, 0);
        write_at(&disk.path, 0, 4096);
        look_at(&pins, 1);
        let doubt = Doubt::Unseen { sectors: 8 };
        assert_eq!(track(&update(), &disk.path, 1, Some(1)).start(), Start::Fresh(doubt), "F11: lost before it");
    });
}

#[test]
fn what_is_not_counted_is_doubted() {
    root_test("what_is_not_counted_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracker = pins.open();
        let tracked = settled(&tracker, &disk.path, 1);
        let counting = |on: &str| {
            let name = disk.path.file_name().unwrap().to_str().unwrap();
            std::fs::write(format!("/sys/block/{name}/queue/iostats"), on).unwrap();
        };
        counting("0");
        write_at(&disk.path, 0, 4096);
        let refused = tracker.track(&subject(&disk.path, 2, None));
        counting("1");
        assert!(matches!(refused, Err(TrackError::Unsupported { .. })), "F11: {refused:?}");
        assert_eq!(tracked.proof(), Err(Doubt::Uncounted { sectors: 8 }), "F11");
        assert_eq!(Dev::of_path(&disk.path).unwrap().attribute("queue/iostats").as_deref(), Some("1"));
    });
}

/// `BACKHAUL_HINTS_SECONDS`: how long to take from a disk that is written to, once a second.
#[test]
fn constant_writes_are_no_reason_to_doubt() {
    root_test("constant_writes_are_no_reason_to_doubt", || {
        let seconds = std::env::var("BACKHAUL_HINTS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(4);
        let (pins, disk) = (Pins::new(), Loop::new(256 * MIB));
        let tracked = settled(&pins.open(), &disk.path, 1);
        let run = |what: &str| {
            let (mut complete, mut busy, mut longest) = (0, 0, Duration::ZERO);
            for _ in 0..seconds * 4 {
                std::thread::sleep(Duration::from_millis(250));
                tracked.take().unwrap_or_else(|doubt| panic!("{what}: {doubt:?}"));
                let begun = Instant::now();
                match tracked.proof() {
                    Ok(Proof::Complete) => complete += 1,
                    Ok(Proof::Busy) => busy += 1,
                    Err(doubt) => panic!("{what}: {doubt:?}"),
                }
                longest = longest.max(begun.elapsed());
            }
            println!("{what}: no doubts, {complete} proofs and {busy} times busy, {longest:?} at most");
        };
        run("idle");
        // 5 MB/s.
        while_written(&disk.path, 256 * MIB, Duration::from_micros(700), || run("5 MB/s"));
        while_written(&disk.path, 256 * MIB, Duration::ZERO, || run("as fast as it can"));
    });
}
