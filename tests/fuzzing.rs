//! The fuzz targets on a stable compiler: every kept input again, and some seconds of seeded mutation of them (I19).
//!
//! `BACKHAUL_FUZZ_SECONDS` is how long each target is mutated. A failure prints its input and what replays it:
//! `BACKHAUL_FUZZ_INPUT=FILE cargo nextest run -p backhaul-tests --test fuzzing TARGET`. The long run, guided by coverage,
//! is in `tests/fuzz`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backhaul_fuzz_targets::{TARGETS, Target, target};
use backhaul_tests::Random;

/// What each target is mutated for where nothing else is said.
const SECONDS: u64 = 4;
/// Longest input, as libFuzzer's default.
const LONGEST: usize = 4096;

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        const TESTED: &[&str] = &[$(stringify!($name)),*];
        $(#[test]
        fn $name() {
            fuzz(target(stringify!($name)));
        })*
    };
}

targets!(
    message, hello, records, log_record, checkpoint, map, segment, fleet, envelope, names, token, source, sink,
    arguments, settings, store_url,
);

#[test]
fn no_target_is_forgotten() {
    let all: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    assert_eq!(all, TESTED);
    for name in all {
        assert!(!corpus(name).is_empty(), "{name} has no corpus");
        let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/src/{name}.rs"));
        assert!(bin.exists(), "{} is missing", bin.display());
    }
}

/// The kept inputs.
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    files.iter().map(|f| std::fs::read(f).expect("it is there")).collect()
}

fn fuzz(target: Target) {
    if let Some(file) = std::env::var_os("BACKHAUL_FUZZ_INPUT") {
        return (target.run)(&std::fs::read(file).expect("the file that was named"));
    }
    let kept = corpus(target.name);
    for input in &kept {
        one(target, input);
    }
    let seconds = std::env::var("BACKHAUL_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SECONDS);
    let mut random = Random::printed(target.name);
    let (start, mut runs) = (Instant::now(), 0_u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..100 {
            one(target, &mutated(&kept, &mut random));
            runs += 1;
        }
    }
    println!("{}: {} kept inputs, {runs} mutations", target.name, kept.len());
}

/// Runs it; a panic is told with the input that made it.
fn one(target: Target, input: &[u8]) {
    let begun = Instant::now();
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", target.name));
        std::fs::write(&file, input).expect("there is room");
        println!("{}: panics on {} bytes, kept in {}", target.name, input.len(), file.display());
        std::panic::resume_unwind(panic);
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "I19: {} takes {:?}: {input:?}", target.name, begun.elapsed());
}

/// One of the kept inputs with some changes, or two of them joined.
fn mutated(kept: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| kept[random.between(0, kept.len() as u64) as usize].clone();
    let mut input = pick(random);
    for _ in 0..random.between(1, 9) {
        let at = |random: &mut Random, input: &[u8]| random.between(0, input.len() as u64 + 1) as usize;
        let start = at(random, &input);
        match random.between(0, 9) {
            0 => flip(&mut input, start, 1 << random.between(0, 8)),
            1 => flip(&mut input, start, random.number() as u8),
            2 => number(&mut input, start, random),
            3 => input.truncate(start),
            4 => {
                let bytes = random.between(1, 20) as usize;
                let more = random.bytes(bytes);
                drop(input.splice(start..start, more));
            }
            5 => {
                let end = (start + random.between(1, 40) as usize).min(input.len());
                drop(input.drain(start..end));
            }
            6 => {
                let end = (start + random.between(1, 80) as usize).min(input.len());
                let again = input[start..end].to_vec();
                drop(input.splice(start..start, again));
            }
            7 => {
                let other = pick(random);
                let from = at(random, &other);
                input.truncate(start);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let other = pick(random);
                let from = at(random, &other);
                for (own, theirs) in input[start..].iter_mut().zip(&other[from..]).take(16) {
                    *own = *theirs;
                }
            }
        }
    }
    input.truncate(LONGEST);
    input
}

fn flip(input: &mut [u8], at: usize, mask: u8) {
    if let Some(byte) = input.get_mut(at) {
        *byte ^= mask;
    }
}

/// A number at the edge of what a field can hold.
fn number(input: &mut [u8], at: usize, random: &mut Random) {
    const EDGES: [u64; 9] =
        [0, 1, 1023, 1024, u16::MAX as u64, i32::MAX as u64, u32::MAX as u64, i64::MAX as u64, u64::MAX];
    let value = EDGES[random.between(0, 9) as usize].wrapping_add(random.between(0, 3)).to_le_bytes();
    let width = [1, 2, 4, 8][random.between(0, 4) as usize];
    for (own, byte) in input.iter_mut().skip(at).zip(&value[..width]) {
        *own = *byte;
    }
}

/// Inputs that begin a corpus: what the golden files and the programs' own writers say. Run once, where there is none.
#[test]
fn corpora_are_there() {
    if std::env::var("BACKHAUL_WRITE_CORPUS").as_deref() != Ok("1") {
        return;
    }
    for (name, n, bytes) in seeds::all() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        std::fs::create_dir_all(&folder).expect("it can be made");
        std::fs::write(folder.join(format!("seed-{n:02}")), bytes).expect("there is room");
    }
}

#[path = "fuzzing_seeds.rs"]
mod seeds;
