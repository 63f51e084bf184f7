//! I7, F11, F12: whatever could mean an unmarked write is doubted, with its reason, and begins anew.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::fs::{self, File};
use std::path::Path;

use backhaul_hints::testing::{self, OBJECT, head, poke, table};
use backhaul_hints::{Baseline, Blocks, Doubt, Options, Start, TrackError, Tracked, Tracker, Unavailable};
use backhaul_volume::sysfs::Dev;
use support::*;

const MIB: u64 = 1 << 20;

/// What a next process begins with.
#[track_caller]
fn next(pins: &Pins, device: &Path, number: Option<u64>) -> Start {
    let tracked = track(&pins.open(), device, 1, number);
    if tracked.start() != Start::Continued {
        // What was marked before is not mixed with what is tracked anew.
        assert!(tracked.unsettled().is_empty() && tracked.is_clean());
        works(&tracked, device);
    }
    tracked.start()
}

/// I7: whatever there was, what is tracked now is marked.
#[track_caller]
fn works(tracked: &Tracked, device: &Path) {
    write_at(device, 5 * u64::from(BLOCK), 4096);
    assert!(tracked.take().unwrap().contains(5), "what is tracked anew is marked");
}

fn fresh(doubt: Doubt) -> Start {
    Start::Fresh(doubt)
}

#[test]
fn tracking_continues_where_nothing_is_wrong() {
    root_test("tracking_continues_where_nothing_is_wrong", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracked = settled(&pins.open(), &disk.path, 1);
        write_at(&disk.path, 0, 4096);
        tracked.take().unwrap();
        drop(tracked);
        write_at(&disk.path, u64::from(BLOCK), 4096);
        let tracked = track(&pins.open(), &disk.path, 1, Some(1));
        assert_eq!((tracked.start(), tracked.baseline()), (Start::Continued, Some(baseline(1))));
        assert!(!tracked.is_clean());
        let taken = tracked.take().unwrap();
        assert_eq!(taken.ranges().collect::<Vec<_>>(), vec![0..2], "I7: taken before and written since");
        tracked.settle(&taken, baseline(2));
        // An index that is ahead has seen more than what was settled.
        assert_eq!(next(&pins, &disk.path, Some(3)), Start::Continued);
    });
}

#[test]
fn another_state_of_the_index_is_doubted() {
    root_test("another_state_of_the_index_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::NoPin));
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::Unfinished));
        let tracked = settled(&pins.open(), &disk.path, 1);
        tracked.settle(&Blocks::none(tracked.blocks()), baseline(7));
        for index in [Some(baseline(6)), None, Some(Baseline { epoch: [8; 16], number: 7 })] {
            let tracked = settled(&pins.open(), &disk.path, 1);
            tracked.settle(&Blocks::none(tracked.blocks()), baseline(7));
            let mut subject = subject(&disk.path, 1, None);
            subject.baseline = index;
            let again = pins.open().track(&subject).unwrap();
            assert_eq!(again.start(), fresh(Doubt::OtherBaseline), "{index:?}");
            assert_eq!(tracked.doubt(), Some(Doubt::NoPin), "what was open of it before");
        }
    });
}

#[test]
fn another_or_a_changed_device_is_doubted() {
    root_test("another_or_a_changed_device_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracker = pins.open();
        let tracked = settled(&tracker, &disk.path, 1);
        let other = disk.file.with_extension("other");
        File::create(&other).unwrap().set_len(64 * MIB).unwrap();
        assert_eq!(tracked.device_doubt(), None);
        disk.swap(&other);
        assert_eq!(tracked.device_doubt(), Some(Doubt::OtherDevice), "F12");
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::OtherDevice), "F12");

        let tracked = settled(&tracker, &disk.path, 1);
        fs::OpenOptions::new().write(true).open(&other).unwrap().set_len(80 * MIB).unwrap();
        tool("losetup", ["-c", disk.path.to_str().unwrap()]);
        assert_eq!(tracked.device_doubt(), Some(Doubt::Resized), "F12");
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::Resized), "F12");

        settled(&tracker, &disk.path, 1);
        let mut subject = subject(&disk.path, 1, Some(1));
        subject.block_size *= 2;
        let again = tracker.track(&subject).unwrap();
        assert_eq!(again.start(), fresh(Doubt::BlockSize { tracked: BLOCK.into() }));
        subject.length += 512;
        assert!(matches!(tracker.track(&subject), Err(TrackError::Mismatch { .. })));
    });
}

#[test]
fn a_moved_partition_is_doubted() {
    root_test("a_moved_partition_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let part = disk.partition(&[(2048, 32768)]).remove(0);
        let tracked = settled(&pins.open(), &part, 1);
        let path = disk.path.to_str().unwrap();
        tool("delpart", [path, "1"]);
        assert_eq!(tracked.device_doubt(), Some(Doubt::OtherDevice), "F12: it is not there");
        tool("addpart", [path, "1", "4096", "32768"]);
        // Under the same name, and often under another number.
        assert_eq!(next(&pins, &part, Some(1)), fresh(Doubt::Moved), "F12");
    });
}

#[test]
fn programs_that_are_gone_or_not_ours_are_doubted() {
    root_test("programs_that_are_gone_or_not_ours_are_doubted", || {
        let (pins, others, disk) = (Pins::new(), Pins::new(), Loop::new(64 * MIB));
        settled(&pins.open(), &disk.path, 1);
        fs::remove_file(pins.set().join("link-block_rq_complete")).unwrap();
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::ProgramGone), "F11");

        settled(&pins.open(), &disk.path, 1);
        let _other = others.open();
        let (mine, theirs) = (pins.set(), others.set());
        for name in ["link-block_rq_complete", "program-block_rq_complete"] {
            fs::remove_file(mine.join(name)).unwrap();
            fs::rename(theirs.join(name), mine.join(name)).unwrap();
        }
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::ProgramReplaced), "F11");

        settled(&pins.open(), &disk.path, 1);
        fs::remove_file(pins.volume(1)).unwrap();
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::NoPin));
        settled(&pins.open(), &disk.path, 1);
        fs::remove_dir_all(pins.folder()).unwrap();
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::NoPin));
    });
}

#[test]
fn what_is_counted_as_lost_is_doubted() {
    root_test("what_is_counted_as_lost_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        for (word, doubt) in [
            (head::LOST, Doubt::Missed { events: 3 }),
            (head::STRANGERS, Doubt::Missed { events: 3 }),
            (head::COMMANDS, Doubt::Commands { commands: 3 }),
        ] {
            let tracked = settled(&pins.open(), &disk.path, 1);
            assert_eq!(tracked.doubt(), None);
            poke(&pins.volume(1), word, 3).unwrap();
            assert_eq!((tracked.doubt(), tracked.take()), (Some(doubt), Err(doubt)), "F11");
            assert_eq!(next(&pins, &disk.path, Some(1)), fresh(doubt), "F11");
        }
    });
}

#[test]
fn what_the_kernel_kept_to_itself_is_doubted() {
    root_test("what_the_kernel_kept_to_itself_is_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        // Programs that look at no slot are as good as programs that do not run.
        let count = |slots| poke(&pins.folder().join("table"), table::COUNT / 2, slots).unwrap();
        let lose = || {
            count(0);
            write_at(&disk.path, 0, 4096);
            tool("blkdiscard", ["-f", "-l", "8192", disk.path.to_str().unwrap()]);
            count(1);
        };
        let tracked = settled(&pins.open(), &disk.path, 1);
        assert_eq!(tracked.doubt(), None);
        lose();
        let doubt = Doubt::Unseen { sectors: 24 };
        assert!(tracked.is_clean(), "nothing else shows it");
        assert_eq!((tracked.doubt(), tracked.take()), (Some(doubt), Err(doubt)), "F11");
        // Also if it was while no agent ran.
        drop(settled(&pins.open(), &disk.path, 1));
        lose();
        assert_eq!(next(&pins, &disk.path, Some(1)), fresh(doubt), "F11");
        assert_eq!(track(&pins.open(), &disk.path, 1, None).doubt(), None, "begun anew it is not doubted");
    });
}

#[test]
fn pins_of_other_boots_and_versions_are_doubted() {
    root_test("pins_of_other_boots_and_versions_are_doubted", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        for (word, doubt) in [
            (table::BOOT, Doubt::OtherBoot),
            (table::ABI, Doubt::OtherVersion),
            (table::MAGIC, Doubt::Damaged),
            (table::GENERATION, Doubt::ProgramGone),
        ] {
            settled(&pins.open(), &disk.path, 1);
            poke(&pins.folder().join("table"), word, 12345).unwrap();
            assert_eq!(next(&pins, &disk.path, Some(1)), fresh(doubt), "table {word}");
        }
        for word in head::FIXED {
            settled(&pins.open(), &disk.path, 1);
            poke(&pins.volume(1), word, 54321).unwrap();
            assert_eq!(next(&pins, &disk.path, Some(1)), fresh(Doubt::Damaged), "head {word}");
        }
    });
}

#[test]
fn another_version_takes_over_without_a_gap() {
    root_test("another_version_takes_over_without_a_gap", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        settled(&pins.open(), &disk.path, 1);
        let before = pins.set();
        let done = std::sync::atomic::AtomicBool::new(false);
        let block = u64::from(BLOCK);
        let written = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut written = 0;
                while !done.load(std::sync::atomic::Ordering::SeqCst) && written < 1024 {
                    write_at(&disk.path, written * block, 4096);
                    written += 1;
                }
                written
            });
            let tracker = Tracker::open_with(&pins.0, &[OBJECT, b"another"].concat()).unwrap();
            let tracked = track(&tracker, &disk.path, 1, Some(1));
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            assert_eq!((tracked.start(), tracked.doubt()), (Start::Continued, None));
            writer.join().unwrap()
        });
        let taken =
            track(&Tracker::open_with(&pins.0, &[OBJECT, b"another"].concat()).unwrap(), &disk.path, 1, Some(1));
        assert_eq!(taken.take().unwrap().ranges().collect::<Vec<_>>(), vec![0..written], "I7");
        assert_ne!(before, pins.set());
        assert!(!before.exists(), "the old programs are gone");
    });
}

#[test]
fn who_cannot_track_is_told_what_is_missing() {
    root_test("who_cannot_track_is_told_what_is_missing", || {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = Options { pin: dir.path().join("pins"), owner: [1; 16] };
        let error = Tracker::open(&elsewhere).unwrap_err();
        assert!(matches!(error, Unavailable::NoBpfFs { .. }) && error.to_string().contains("mount -t bpf"), "{error}");
        // A program that the verifier refuses: without its licence it may not read the kernel.
        let mut object = OBJECT.to_vec();
        let at = object.windows(12).position(|w| w == b"Dual BSD/GPL").unwrap();
        object[at..at + 4].copy_from_slice(b"None");
        let pins = Pins::new();
        let error = Tracker::open_with(&pins.0, &object).unwrap_err();
        assert!(matches!(error, Unavailable::Verifier { .. }), "{error:?}");
        // Nothing of that is in the way of the next.
        pins.open();
        // Without privilege.
        let exe = std::env::current_exe().unwrap();
        let out = std::process::Command::new("setpriv")
            .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", exe.to_str().unwrap()])
            .args(["--exact", "child_without_privilege", "--ignored", "--nocapture"])
            .env("BACKHAUL_HINTS_CHILD", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(said.contains("tracking writes needs root, or CAP_BPF and CAP_PERFMON"), "{said}");
    });
}

#[test]
#[ignore = "run by who_cannot_track_is_told_what_is_missing"]
fn child_without_privilege() {
    if std::env::var_os("BACKHAUL_HINTS_CHILD").is_none() {
        return;
    }
    let error = Tracker::open(&Options::new([3; 16])).unwrap_err();
    assert!(matches!(error, Unavailable::Privilege(_)), "{error:?}");
    println!("{error}");
}

#[test]
fn devices_that_would_not_tell_are_refused() {
    root_test("devices_that_would_not_tell_are_refused", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracker = pins.open();
        let mut subject = subject(&disk.path, 1, None);
        subject.block_size = 8192;
        assert!(matches!(tracker.track(&subject), Err(TrackError::Mismatch { .. })));
        subject.block_size = 64 << 10;
        subject.dev = Dev::parse("240:77").unwrap();
        assert!(matches!(tracker.track(&subject), Err(TrackError::Mismatch { .. })));
        assert!(testing::ABI >= 1 && tracker.volumes().unwrap().is_empty(), "nothing is left of what was refused");
    });
}
