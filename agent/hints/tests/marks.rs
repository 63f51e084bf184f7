//! I7: every kind of write is marked, and what was not written is not. What changed is found by reading all blocks before
//! and after.

#![allow(clippy::single_range_in_vec_init, reason = "one range is what is expected")]
#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use backhaul_hints::{Blocks, Doubt, Options, Proof, Tracked, Tracker};
use support::*;

const MIB: u64 = 1 << 20;

#[test]
fn a_write_marks_its_blocks_and_no_others() {
    root_test("a_write_marks_its_blocks_and_no_others", || {
        let (pins, disk) = (Pins::new(), Loop::new(64 * MIB));
        let tracked = settled(&pins.open(), &disk.path, 1);
        assert!(tracked.is_clean());
        write_at(&disk.path, 3 * u64::from(BLOCK) - 4096, 8192);
        assert!(!tracked.is_clean());
        let taken = tracked.take().unwrap();
        assert_eq!(taken.ranges().collect::<Vec<_>>(), [2..4]);
        assert!(tracked.is_clean() && tracked.take().unwrap().is_empty());
        assert_eq!(tracked.unsettled(), taken);
        // Reading and flushing marks nothing.
        contents(&disk.path);
        direct(&disk.path).sync_all().unwrap();
        assert!(tracked.is_clean(), "nothing was written");
    });
}

/// Random writes of all kinds that a device knows; the marks are exactly what each one touched.
fn exact(device: &Path, tracked: &Tracked, block: u64, rounds: usize) {
    let mut random = fastrand::Rng::with_seed(seed());
    let size = size_of(device);
    for round in 0..rounds {
        let mut expected = Blocks::none(tracked.blocks());
        for _ in 0..random.usize(1..8) {
            // Of all magnitudes, now and then at borders of blocks.
            let len = (1 << random.u64(12..24)).min(size / 2) + 4096 * random.u64(0..4);
            let mut at = random.u64(0..(size - len) / 4096) * 4096;
            if random.bool() {
                at = at / block * block;
            }
            let (at_text, len_text, path) = (at.to_string(), len.to_string(), device.to_str().unwrap());
            let what = random.usize(0..5);
            match what {
                0 => write_at(device, at, len as usize),
                1 => {
                    let file = OpenOptions::new().write(true).open(device).unwrap();
                    file.write_all_at(Payload::random(len as usize).bytes(), at).unwrap();
                    file.sync_all().unwrap();
                }
                2 => drop(tool("blkdiscard", ["-f", "-z", "-o", &at_text, "-l", &len_text, path])),
                3 => drop(tool("blkdiscard", ["-f", "-o", &at_text, "-l", &len_text, path])),
                _ => {
                    let file = direct(device);
                    // Data with a flush before and behind it.
                    file.write_all_at(Payload::random(len as usize).bytes(), at).unwrap();
                    file.sync_data().unwrap();
                }
            }
            (at / block..=(at + len - 1) / block).for_each(|b| expected.insert(b));
            assert!(
                !tracked.is_clean() || matches!(tracked.doubt(), Some(Doubt::Unseen { .. })),
                "I7: write {what} is marked when it returns"
            );
        }
        let taken = tracked.take().unwrap();
        assert_eq!(taken.ranges().collect::<Vec<_>>(), expected.ranges().collect::<Vec<_>>(), "I7: round {round}");
    }
}

#[test]
fn random_writes_of_every_kind_are_marked_exactly() {
    root_test("random_writes_of_every_kind_are_marked_exactly", || {
        let pins = Pins::new();
        let tracker = pins.open();
        for (block, size) in [(16 << 10, 300 * MIB), (1 << 20, 300 * MIB), (64 << 10, 129 * MIB + 4096)] {
            let disk = Loop::new(size);
            let mut subject = subject(&disk.path, 1, None);
            subject.block_size = block;
            let tracked = tracker.track(&subject).unwrap();
            assert_eq!(tracked.blocks(), size.div_ceil(block.into()));
            exact(&disk.path, &tracked, block.into(), 12);
            assert_eq!(tracked.proof(), Ok(Proof::Complete), "F11: all kinds of writes are counted as they are seen");
        }
    });
}

#[test]
fn devices_without_requests_are_marked_exactly() {
    root_test("devices_without_requests_are_marked_exactly", || {
        let Some(zram) = Zram::new(256 * MIB) else {
            skipped("devices_without_requests_are_marked_exactly", "needs zram");
            return;
        };
        let pins = Pins::new();
        let tracked = track(&pins.open(), &zram.path, 1, None);
        exact(&zram.path, &tracked, BLOCK.into(), 12);
        assert_eq!(tracked.doubt(), None);
    });
}

#[test]
fn huge_discards_are_marked_whole() {
    root_test("huge_discards_are_marked_whole", || {
        let (pins, disk) = (Pins::new(), Loop::new(20 << 30));
        let mut subject = subject(&disk.path, 1, None);
        subject.block_size = 16 << 10;
        let tracked = pins.open().track(&subject).unwrap();
        for (at, len) in [(0, 20u64 << 30), (4096, 9 << 30), ((20 << 30) - 4096, 4096)] {
            tool("blkdiscard", ["-f", "-o", &at.to_string(), "-l", &len.to_string(), disk.path.to_str().unwrap()]);
            let taken = tracked.take().unwrap();
            assert_eq!(taken.ranges().collect::<Vec<_>>(), [at / 16384..(at + len).div_ceil(16384)], "I7");
        }
    });
}

#[test]
fn all_that_file_systems_write_is_marked() {
    root_test("all_that_file_systems_write_is_marked", || {
        let pins = Pins::new();
        let tracker = pins.open();
        for (make, options) in
            [("mkfs.ext4", "discard"), ("mkfs.ext4", "nodiscard,data=journal"), ("mkfs.xfs", "nodiscard")]
        {
            let disk = Loop::new(320 * MIB);
            tool(make, ["-q", disk.path.to_str().unwrap()]);
            let tracked = settled(&tracker, &disk.path, 1);
            let mounted = Mounted::new(&disk.path, options);
            let folder = mounted.0.path();
            let mut changed = 0;
            for (what, act) in acts() {
                tool("sync", ["-f", folder.to_str().unwrap()]);
                tracked.take().unwrap();
                let before = contents(&disk.path);
                tracked.take().unwrap();
                act(folder);
                tool("sync", ["-f", folder.to_str().unwrap()]);
                tool("fsfreeze", ["-f", folder.to_str().unwrap()]);
                let after = contents(&disk.path);
                let taken = tracked.take();
                let proof = tracked.proof();
                tool("fsfreeze", ["-u", folder.to_str().unwrap()]);
                assert_eq!(proof, Ok(Proof::Complete), "F11: in a freeze it is known");
                changed += assert_all_marked(&before, &after, &taken.unwrap(), &format!("{make} {options} {what}"));
            }
            assert!(changed > 100, "the file systems did write");
            let marked = tracked.unsettled().count();
            assert!(marked < tracked.blocks(), "not everything is marked");
        }
    });
}

type Act = fn(&Path);

fn acts() -> [(&'static str, Act); 9] {
    fn random(len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| fastrand::u8(..)).take(len).collect()
    }
    [
        ("buffered", |f| fs::write(f.join("a"), random(5 << 20)).unwrap()),
        ("small and fsync", |f| {
            for n in 0..20 {
                let file = File::create(f.join(format!("small{n}"))).unwrap();
                file.write_all_at(&random(3000), 0).unwrap();
                file.sync_all().unwrap();
            }
        }),
        ("O_DIRECT", |f| {
            drop(File::create(f.join("direct")).unwrap());
            write_at(&f.join("direct"), 8192, 3 << 20);
        }),
        ("mmap", |f| {
            let code = "import mmap,sys,os\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\n\
                        [m.__setitem__(i, os.urandom(1)[0]) for i in range(0,len(m),70001)]\nm.flush()";
            tool("python3", ["-c", code, f.join("a").to_str().unwrap()]);
        }),
        ("punch", |f| drop(tool("fallocate", ["-p", "-o", "100000", "-l", "2000000", f.join("a").to_str().unwrap()]))),
        ("zero", |f| drop(tool("fallocate", ["-z", "-o", "3000000", "-l", "1500000", f.join("a").to_str().unwrap()]))),
        ("rename over", |f| {
            fs::write(f.join("b"), random(100_000)).unwrap();
            fs::rename(f.join("b"), f.join("small1")).unwrap();
        }),
        ("remove", |f| fs::remove_file(f.join("a")).unwrap()),
        ("fstrim", |f| drop(tool("fstrim", [f.to_str().unwrap()]))),
    ]
}

#[test]
fn partitions_and_their_disk_are_marked_each_on_its_own() {
    root_test("partitions_and_their_disk_are_marked_each_on_its_own", || {
        let (pins, disk) = (Pins::new(), Loop::new(256 * MIB));
        // Not aligned to blocks, so that a block of the disk and of a partition are not the same bytes.
        let parts = disk.partition(&[(2048, 100_000), (102_056, 200_001), (302_064, 65_536)]);
        let tracker = pins.open();
        let whole = track(&tracker, &disk.path, 1, None);
        let [a, b] = [track(&tracker, &parts[0], 2, None), track(&tracker, &parts[1], 3, None)];
        let (block, b_start) = (u64::from(BLOCK), 102_056 * 512);
        let marks = |t: &Tracked| t.take().unwrap().ranges().collect::<Vec<_>>();
        write_at(&parts[1], 10 * block, 4096);
        assert_eq!(marks(&b), [10..11], "I7: through the partition");
        assert_eq!(marks(&whole), [(b_start + 10 * block) / block..(b_start + 10 * block + 4095) / block + 1]);
        assert!(a.is_clean(), "another partition");
        // Through the disk, over the border of both.
        write_at(&disk.path, b_start / 4096 * 4096 - block, 2 * block as usize);
        let (last, first) = (marks(&a), marks(&b));
        assert_eq!(last, [780..a.blocks()], "I7: to the end of the first");
        assert_eq!(first, [0..1], "I7: from the beginning of the second");
        whole.take().unwrap();
        // To what nobody tracks but the disk.
        write_at(&parts[2], 0, 4096);
        assert!(a.is_clean() && b.is_clean() && !whole.is_clean());
        for each in [&a, &b, &whole] {
            assert_eq!(each.proof(), Ok(Proof::Complete), "F11: counted by the whole disk, whoever wrote");
        }
        // The last sector of the second, whose end is no multiple of anything.
        let end = size_of(&parts[1]);
        let file = OpenOptions::new().write(true).open(&parts[1]).unwrap();
        file.write_all_at(&[1; 512], end - 512).unwrap();
        file.sync_all().unwrap();
        assert!(marks(&b).contains(&(b.blocks() - 1..b.blocks())), "I7: the last block");
        // One goes, the others stay.
        tracker.forget([2; 16]).unwrap();
        assert_eq!(a.doubt(), Some(Doubt::NoPin));
        assert_eq!((b.doubt(), whole.doubt()), (None, None));
        let mut left = tracker.volumes().unwrap();
        left.sort_unstable();
        assert_eq!(left, [[1; 16], [3; 16]]);
        whole.take().unwrap();
        write_at(&parts[0], 0, 4096);
        write_at(&parts[1], 0, 4096);
        assert_eq!((marks(&b).len(), marks(&whole).len(), a.is_clean()), (1, 2, true));
    });
}

/// Every block is written once, by many at a time, while it is taken from: one lost mark would be seen.
fn hammer(device: &Path, tracker: &Tracker, threads: u64, leap: u64) {
    let mut subject = subject(device, 1, None);
    subject.block_size = 16 << 10;
    let tracked = tracker.track(&subject).unwrap();
    let (done, blocks) = (AtomicBool::new(false), tracked.blocks());
    let mut all = Blocks::none(blocks);
    let (mut taken, mut takes) = (0, 0);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let (file, payload) = (direct(device), Payload::new(4096));
                    // Each its own share. Without leaps all are at work on the word that is being taken.
                    for i in (thread..blocks).step_by(threads as usize) {
                        let block = i * leap % blocks;
                        file.write_all_at(payload.bytes(), block * 16384 + (i & 3) * 4096).unwrap();
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            writers.into_iter().for_each(|w| w.join().unwrap());
            done.store(true, Ordering::SeqCst);
        });
        loop {
            let last = done.load(Ordering::SeqCst);
            // Blocks are taken all the same.
            match tracked.take_into(&mut all) {
                Ok(new) => taken += new,
                Err(Doubt::Unseen { .. }) => (),
                Err(doubt) => panic!("{doubt:?}"),
            }
            takes += 1;
            if last {
                break;
            }
        }
    });
    println!("{blocks} writes, {takes} takes");
    let mut lost = Blocks::all(blocks);
    lost.remove_all(&all);
    let lost = lost.ranges().collect::<Vec<_>>();
    match tracked.proof() {
        Ok(proof) => {
            assert_eq!(proof, Proof::Complete, "nothing writes any more");
            assert!(lost.is_empty(), "I7, F11: marks of {lost:?} lost in {takes} takes, and nothing is doubted");
            assert_eq!(taken, blocks, "each was taken once");
        }
        // A kernel that loses events: eight sectors a write, none of which may go unnoticed.
        Err(Doubt::Unseen { sectors }) => {
            println!("the kernel lost {sectors} sectors in {} places, and it was noticed", lost.len());
            assert_eq!(sectors, 8 * lost.iter().map(|r| r.end - r.start).sum::<u64>(), "F11: in {lost:?}");
        }
        Err(doubt) => panic!("{doubt:?}"),
    }
    assert_eq!(tracked.unsettled(), all);
}

#[test]
fn no_mark_is_lost_under_load() {
    root_test("no_mark_is_lost_under_load", || {
        let pins = Pins::new();
        let tracker = pins.open();
        // Somebody else's programs on the same tracepoints and CPUs.
        let others: Vec<Pins> = (0..2).map(|_| Pins::new()).collect();
        let others: Vec<_> = others.iter().map(|p| (p.open(), p)).collect();
        let disk = Loop::new(16384 * 100_003);
        let _tracked = others.iter().map(|(t, _)| track(t, &disk.path, 1, None)).collect::<Vec<_>>();
        hammer(&disk.path, &tracker, 8, 7_919);
        match Zram::new(16384 * 200_003) {
            None => drop(skipped("no_mark_is_lost_under_load", "needs zram")),
            Some(zram) => {
                let _tracked = others.iter().map(|(t, _)| track(t, &zram.path, 2, None)).collect::<Vec<_>>();
                hammer(&zram.path, &tracker, 4, 1);
            }
        }
    });
}

#[test]
fn a_take_neither_faults_nor_allocates_pages() {
    root_test("a_take_neither_faults_nor_allocates_pages", || {
        let (pins, disk) = (Pins::new(), Loop::new(1 << 40));
        let tracked = track(&pins.open(), &disk.path, 1, None);
        let mut blocks = Blocks::none(tracked.blocks());
        for n in 0..1000 {
            write_at(&disk.path, n * (1 << 30), 4096);
        }
        let faults = || {
            let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
            let fields: Vec<u64> = stat
                .rsplit(')')
                .next()
                .unwrap()
                .split_whitespace()
                .skip(7)
                .take(3)
                .map(|f| f.parse().unwrap())
                .collect();
            (fields[0], fields[2])
        };
        assert_eq!(tracked.proof(), Ok(Proof::Complete));
        faults();
        let before = faults();
        let taken = tracked.take_into(&mut blocks);
        let (clean, proof) = (tracked.is_clean(), tracked.proof());
        let after = faults();
        assert_eq!((taken, clean, proof), (Ok(1000), true, Ok(Proof::Complete)));
        // Reading the file itself costs some: as much as without a take.
        let bare = {
            let first = faults();
            let second = faults();
            second.0 - first.0
        };
        assert!(after.0 - before.0 <= bare && after.1 == before.1, "{before:?} {after:?} {bare}");
    });
}

#[test]
fn states_do_not_meet() {
    root_test("states_do_not_meet", || {
        let (pins, disk) = (Pins::new(), Loop::new(16 * MIB));
        let mine = settled(&pins.open(), &disk.path, 1);
        let options = Options { pin: pins.0.pin.clone(), owner: [1; 16] };
        let other = Tracker::open(&options).unwrap();
        let its = settled(&other, &disk.path, 1);
        write_at(&disk.path, 0, 4096);
        assert_eq!((mine.take().unwrap().count(), its.take().unwrap().count()), (1, 1));
        other.remove().unwrap();
        write_at(&disk.path, 0, 4096);
        assert_eq!((mine.take().unwrap().count(), mine.doubt()), (1, None));
    });
}
