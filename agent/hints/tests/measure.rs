//! What tracking costs: `cargo nextest run -p backhaul-hints --test measure --run-ignored all --no-capture`, as root.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use backhaul_hints::{Blocks, Tracked};
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
