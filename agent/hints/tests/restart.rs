//! I7: an agent that is killed at any step, with writes all the time, continues or begins anew, and never misses a
//! write. The agent is this test's own: a child that keeps an index of what each block held when it was read.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use backhaul_hints::testing::OBJECT;
use backhaul_hints::{Blocks, Options, Start, Tracker};
use support::*;

const SIZE: u64 = 24 << 20;

/// What an agent knows of a volume; durable when it is renamed.
struct Index {
    path: PathBuf,
    number: u64,
    sums: Vec<u64>,
}

impl Index {
    fn load(path: &Path) -> Self {
        let words: Vec<u64> = fs::read(path)
            .unwrap_or_default()
            .chunks_exact(8)
            .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
            .collect();
        let sums = words.get(1..).map_or_else(|| vec![0; (SIZE / u64::from(BLOCK)) as usize], <[u64]>::to_vec);
        Self { path: path.to_owned(), number: words.first().copied().unwrap_or(0), sums }
    }

    fn save(&mut self) {
        self.number += 1;
        let words = [self.number].into_iter().chain(self.sums.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let new = self.path.with_extension("new");
        fs::write(&new, bytes).unwrap();
        fs::rename(&new, &self.path).unwrap();
    }
}

/// Rounds of an agent: `BACKHAUL_HINTS_CHILD` is "PINS DEVICE INDEX ROUNDS OBJECT FORGET".
#[test]
#[ignore = "run by the others"]
fn child() {
    let Ok(text) = std::env::var("BACKHAUL_HINTS_CHILD") else { return };
    let args: Vec<&str> = text.split(' ').collect();
    let (pin, device, mut index) = (PathBuf::from(args[0]), Path::new(args[1]), Index::load(Path::new(args[2])));
    let object = [OBJECT, args[4].as_bytes()].concat();
    let tracker = Tracker::open_with(&Options { pin, owner: [9; 16] }, &object).unwrap();
    if args[5] == "forget" {
        tracker.forget([1; 16]).unwrap();
    }
    let tracked = track(&tracker, device, 1, (index.number > 0).then_some(index.number));
    println!("START {:?}", tracked.start());
    let mut unread = Blocks::none(tracked.blocks());
    if tracked.start() != Start::Continued {
        unread = Blocks::all(tracked.blocks());
    }
    let mut read = 0;
    for _ in 0..args[3].parse().unwrap() {
        tracked.take_into(&mut unread).unwrap();
        read += unread.count();
        for (block, sum) in contents_of(device, &unread) {
            index.sums[block as usize] = sum;
        }
        index.save();
        tracked.settle(&unread, baseline(index.number));
        unread.clear();
    }
    println!("READ {read}");
}

struct Story {
    pins: Pins,
    disk: Loop,
    dir: tempfile::TempDir,
}

struct Outcome {
    killed: bool,
    start: String,
    read: u64,
}

impl Story {
    fn new() -> Self {
        Self { pins: Pins::new(), disk: Loop::new(SIZE), dir: tempfile::tempdir().unwrap() }
    }

    fn command(&self, rounds: u32, object: &str, act: &str) -> Command {
        let (pin, disk) = (self.pins.0.pin.display(), self.disk.path.display());
        let mut command = Command::new(std::env::current_exe().unwrap());
        let index = self.dir.path().join("index");
        command
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env("BACKHAUL_HINTS_CHILD", format!("{pin} {disk} {} {rounds} {object} {act}", index.display()))
            .stdin(Stdio::null());
        command
    }

    fn finish(out: &std::process::Output) -> Outcome {
        let text = String::from_utf8_lossy(&out.stdout);
        let said =
            |key: &str| text.lines().find_map(|l| l.split_once(key)).map_or(String::new(), |(_, v)| v.to_owned());
        let killed = out.status.signal() == Some(9);
        assert!(killed || out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        Outcome { killed, start: said("START "), read: said("READ ").parse().unwrap_or(0) }
    }

    /// An agent that runs to its end.
    fn run(&self, rounds: u32) -> Outcome {
        Self::finish(&self.command(rounds, "-", "-").output().unwrap())
    }

    /// An agent that dies at this place; says so if it did not come there.
    fn dies(&self, place: &str, object: &str, act: &str) {
        let once = tempfile::tempdir_in(self.dir.path()).unwrap();
        let mut command = self.command(4, object, act);
        command.env("BACKHAUL_FAILPOINT", format!("{place}=abort")).env("BACKHAUL_FAILPOINT_ONCE", once.path());
        assert!(Self::finish(&command.output().unwrap()).killed, "{place} was not reached");
    }

    /// Writes all the time to two thirds of the blocks while this goes on.
    fn while_written<T>(&self, act: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let block = fastrand::u64(0..SIZE / u64::from(BLOCK) * 2 / 3);
                    write_at(&self.disk.path, block * u64::from(BLOCK) + 4096 * fastrand::u64(0..16), 4096);
                    std::thread::sleep(Duration::from_micros(fastrand::u64(0..400)));
                }
            });
            // Also given up when the act panics, or the scope would never end.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            done.store(true, Ordering::SeqCst);
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// I7: after one more round without writes the index is what the device holds.
    #[track_caller]
    fn nothing_is_missed(&self, what: &str) -> Outcome {
        let outcome = self.run(1);
        let (index, device) = (Index::load(&self.dir.path().join("index")), contents(&self.disk.path));
        let missed: Vec<_> = (0..device.len()).filter(|b| device[*b] != index.sums[*b]).collect();
        assert!(missed.is_empty(), "I7: {what}, {}: blocks {missed:?} were missed", outcome.start);
        assert_eq!(
            outcome.start == "Continued",
            outcome.read < index.sums.len() as u64,
            "a full scan if and only if anew"
        );
        outcome
    }
}

fn killed_at(places: &[&str], object: &str, act: &str, spoil: impl Fn(&Story), expected: &str) {
    for place in places {
        let story = Story::new();
        story.run(1);
        spoil(&story);
        story.while_written(|| story.dies(place, object, act));
        let outcome = story.while_written(|| story.nothing_is_missed_later(place));
        assert_eq!(outcome.start, expected, "{place}");
        story.nothing_is_missed(place);
    }
}

impl Story {
    /// The next agent, which writers do not wait for.
    fn nothing_is_missed_later(&self, _place: &str) -> Outcome {
        self.run(3)
    }
}

#[test]
fn killed_while_taking_or_settling_it_continues() {
    root_test("killed_while_taking_or_settling_it_continues", || {
        let places =
            ["take.summary", "take.pending", "take.live", "settle.written", "settle.recorded", "settle.cleared"];
        killed_at(&places.map(|p| format!("hints.{p}")).each_ref().map(String::as_str), "-", "-", |_| (), "Continued");
    });
}

#[test]
fn killed_while_beginning_it_begins_anew() {
    root_test("killed_while_beginning_it_begins_anew", || {
        // Another index: the next agent must begin anew, and be as safe to kill as it is.
        let spoil = |story: &Story| fs::remove_file(story.dir.path().join("index")).unwrap();
        killed_at(
            &["hints.track.released", "hints.track.put", "hints.track.head", "hints.track.pinned"],
            "-",
            "-",
            spoil,
            "Fresh(Damaged)",
        );
        killed_at(
            &["hints.track.renamed", "hints.track.active", "hints.track.done"],
            "-",
            "-",
            spoil,
            "Fresh(Unfinished)",
        );
        killed_at(&["hints.forget.slot"], "-", "forget", |_| (), "Fresh(Damaged)");
    });
}

#[test]
fn killed_while_taking_over_from_another_version_it_continues() {
    root_test("killed_while_taking_over_from_another_version_it_continues", || {
        killed_at(
            &["hints.programs.pinned", "hints.open.loaded", "hints.open.recorded"],
            "new",
            "-",
            |_| (),
            "Continued",
        );
    });
}

#[test]
fn killed_while_replacing_lost_programs_it_begins_anew() {
    root_test("killed_while_replacing_lost_programs_it_begins_anew", || {
        let spoil = |story: &Story| fs::remove_file(story.pins.set().join("link-block_rq_complete")).unwrap();
        let places = ["hints.open.generation", "hints.programs.pinned", "hints.open.loaded", "hints.open.recorded"];
        killed_at(&places, "-", "-", spoil, "Fresh(ProgramGone)");
        let spoil = |story: &Story| fs::remove_dir_all(story.pins.folder()).unwrap();
        killed_at(&["hints.open.pinned"], "-", "-", spoil, "Fresh(NoPin)");
    });
}

#[test]
fn killed_at_any_time_it_misses_nothing() {
    root_test("killed_at_any_time_it_misses_nothing", || {
        let mut random = fastrand::Rng::with_seed(seed());
        let story = Story::new();
        story.run(1);
        let mut continued = 0;
        for _ in 0..12 {
            let delay = Duration::from_micros(random.u64(0..60_000));
            story.while_written(|| {
                let mut child = story.command(1_000_000, "-", "-").stdout(Stdio::null()).spawn().unwrap();
                std::thread::sleep(delay);
                child.kill().unwrap();
                child.wait().unwrap();
            });
            continued += u32::from(story.nothing_is_missed(&format!("killed after {delay:?}")).start == "Continued");
        }
        assert_eq!(continued, 12, "no reason to begin anew");
    });
}
