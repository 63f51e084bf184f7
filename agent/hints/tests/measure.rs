//! What tracking costs: `cargo nextest run -p backhaul-hints --test measure --run-ignored all --no-capture`, as root.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use backhaul_hints::{Blocks, Proof, Tracked};
use support::*;

#[test]
#[ignore = "measures"]
fn takes_of_a_tebibyte() {
    let (pins, disk) = (Pins::new(), Loop::new(1 << 40));
    let opened = Instant::now();
    let tracker = pins.open();
    println!("open: {:?}", opened.elapsed());
    let opened = Instant::now();
    drop(pins.open());
    println!("open again: {:?}", opened.elapsed());
    let tracked = track(&tracker, &disk.path, 1, None);
    let mut blocks = Blocks::none(tracked.blocks());
    let time = |what: &str, blocks: &mut Blocks| {
        let begun = Instant::now();
        let taken = tracked.take_into(blocks).unwrap();
        println!("{what}: {taken} in {:?}", begun.elapsed());
    };
    time("the first take", &mut blocks);
    let clean = Instant::now();
    assert!(tracked.is_clean() && tracked.doubt().is_none());
    println!("clean and without doubt: {:?}", clean.elapsed());
    time("nothing", &mut blocks);
    for n in 0..1000 {
        write_at(&disk.path, n << 30, 4096);
    }
    time("scattered", &mut blocks);
    let begun = Instant::now();
    tracked.settle(&blocks, baseline(1));
    println!("settle: {:?}", begun.elapsed());
    tool("blkdiscard", ["-f", disk.path.to_str().unwrap()]);
    time("all", &mut blocks);
    let bytes = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let sizes = bytes
        .split("bpf-map")
        .skip(1)
        .filter_map(|m| m.split("Size:").nth(1)?.split_whitespace().next()?.parse::<u64>().ok());
    println!("largest map: {} KiB", sizes.max().unwrap());
}

/// Whether doubts under a steady 5 MB/s of small writes are false: no block is written twice, so that what was lost is
/// known. `BACKHAUL_HINTS_SECONDS`.
#[test]
#[ignore = "measures"]
fn doubts_of_a_minute() {
    const SMALL: u64 = 16 << 10;
    let seconds = std::env::var("BACKHAUL_HINTS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let (pins, disk) = (Pins::new(), Loop::new(4 << 30));
    let tracker = pins.open();
    let mut subject = subject(&disk.path, 1, None);
    subject.block_size = SMALL as u32;
    let begin = || tracker.track(&subject).unwrap();
    let (written, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let blocks = begin().blocks();
    let place = |n: u64| n * 7919 % blocks;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (file, payload) = (direct(&disk.path), Payload::new(4096));
            while !done.load(SeqCst) {
                file.write_all_at(payload.bytes(), place(written.load(SeqCst)) * SMALL).unwrap();
                written.fetch_add(1, SeqCst);
                std::thread::sleep(Duration::from_micros(700));
            }
        });
        let (mut tracked, mut first, mut all) = (begin(), written.load(SeqCst), Blocks::none(blocks));
        let (mut doubts, mut real, mut proofs, mut busy, mut unproved) = (0, 0, 0, 0, 0);
        for _ in 0..seconds {
            std::thread::sleep(Duration::from_secs(1));
            let until = written.load(SeqCst);
            let doubt = tracked.take_into(&mut all).err();
            let proof = tracked.proof();
            let lost = (first + 1..until).filter(|n| !all.contains(place(*n))).count();
            match (doubt, proof) {
                (None, Ok(Proof::Complete)) => proofs += 1,
                (None, Ok(Proof::Busy)) => busy += 1,
                (doubt, proof) => {
                    println!("{doubt:?}, then {proof:?}: {lost} blocks lost");
                    (doubts, real) = (doubts + 1, real + u32::from(lost > 0));
                    (tracked, first, all) = (begin(), written.load(SeqCst), Blocks::none(blocks));
                    continue;
                }
            }
            unproved += u32::from(lost > 0 && proof == Ok(Proof::Busy));
            assert!(lost == 0 || proof == Ok(Proof::Busy), "F11: {lost} blocks lost and a proof of the contrary");
        }
        done.store(true, SeqCst);
        let written = written.load(SeqCst);
        println!("{written} writes, {seconds} takes: {doubts} doubts, {real} of them of real losses; {proofs} proofs");
        println!("{busy} times busy, {unproved} of them with losses");
    });
}

#[test]
#[ignore = "measures"]
fn nanoseconds_an_event() {
    let (pins, disk) = (Pins::new(), Loop::new(1 << 30));
    let write = |_: &Option<Tracked>| {
        let (file, payload) = (direct(&disk.path), Payload::new(4096));
        let begun = Instant::now();
        for n in 0..20_000u64 {
            file.write_all_at(payload.bytes(), (n * 7919 % 16384) * u64::from(BLOCK)).unwrap();
        }
        begun.elapsed() / 20_000
    };
    let best = |tracked: &Option<Tracked>| -> Duration { (0..5).map(|_| write(tracked)).min().unwrap() };
    println!("a write without: {:?}", best(&None));
    let tracker = pins.open();
    let tracked = Some(track(&tracker, &disk.path, 1, None));
    println!("a write, tracked: {:?}", best(&tracked));
    let old = std::fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap();
    std::fs::write("/proc/sys/kernel/bpf_stats_enabled", "1").unwrap();
    write(&tracked);
    std::fs::write("/proc/sys/kernel/bpf_stats_enabled", old.trim()).unwrap();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok());
        if let (Some(time @ 1..), Some(count @ 1..)) = (field("run_time_ns:"), field("run_cnt:")) {
            println!("program: {count} events, {} ns each, with the kernel's own measuring", time / count);
        }
    }
}
