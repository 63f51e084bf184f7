//! Thousands of histories in which nothing may be violated, situations that they must have reached, and mistakes that
//! they must find. `docs/testing.md` tells how to replay a failure and how to run more.

use std::time::Duration;

use backhaul_seams::mutant::Mutant;
use backhaul_simulation::census::REQUIRED;
use backhaul_simulation::history::Trace;
use backhaul_simulation::plan::Plan;
use backhaul_simulation::search::{Until, run_caught, search, shrink};

/// Histories of one run. `BACKHAUL_SIMULATION_SEEDS` is another number.
const HISTORIES: u64 = 5000;
/// A mistake must be found within so many.
const PATIENCE: u64 = 2000;
/// Histories that are run twice.
const TWICE: u64 = 20;

fn histories() -> u64 {
    std::env::var("BACKHAUL_SIMULATION_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(HISTORIES)
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// A failing history's operations, as short as they could be made, where CI keeps them.
fn store(seed: u64, mutant: Option<Mutant>) -> String {
    let plan = shrink(&Plan::of(seed), mutant, Duration::from_secs(20));
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join(format!("history-{seed}.json"));
    let text = serde_json::to_vec_pretty(&plan).expect("a plan can be written");
    std::fs::write(&file, text).expect("there is room");
    format!(
        "seed {seed}: cargo run -p backhaul-simulation -- --replay {seed}, or shorter ({} operations) --file {}",
        plan.ops.len(),
        file.display()
    )
}

#[test]
fn nothing_is_violated_and_every_situation_is_reached() {
    let seeds = histories();
    let found = search(0..seeds, None, threads(), Until { time: None, failures: 3 });
    println!("{} histories, {} operations", found.histories, found.operations);
    for (situation, count) in &found.situations {
        println!("{situation:<32} {count:>9} times in {:>6} histories", found.histories_with[situation]);
    }
    for (seed, violations) in &found.failures {
        println!("{}", store(*seed, None));
        violations.iter().for_each(|v| println!("  {v}"));
    }
    assert!(found.failures.is_empty(), "violations: see above");
    let reached = |s: &str| found.histories_with.get(s).copied().unwrap_or(0);
    let rare: Vec<_> = REQUIRED
        .iter()
        // So many of 5,000 histories; of fewer in proportion.
        .map(|(situation, at_least)| (situation, reached(situation), (at_least * seeds / HISTORIES).max(1)))
        .filter(|(_, found, at_least)| found < at_least)
        .collect();
    assert!(rare.is_empty(), "reached too seldom to prove anything (situation, histories, wanted): {rare:?}");
}

/// Histories that found mistakes which are mended: each failed before.
#[test]
fn stored_histories_stay_mended() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("histories");
    let files: Vec<_> = std::fs::read_dir(folder).expect("it is there").map(|f| f.expect("readable").path()).collect();
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        let plan: Plan = serde_json::from_slice(&std::fs::read(&file).expect("readable")).expect("a plan");
        let report = run_caught(&plan, None, Trace::Digest);
        assert!(report.violations.is_empty(), "{}: {:?}", file.display(), report.violations);
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in 0..TWICE {
        let plan = Plan::of(seed);
        let [one, two] = [(), ()].map(|()| run_caught(&plan, None, Trace::Keep));
        let first = one.lines.iter().zip(&two.lines).find(|(a, b)| a != b);
        assert!(one.digest == two.digest && !one.digest.is_empty(), "seed {seed} happened in two ways: {first:?}");
    }
}

#[test]
fn planted_mistakes_are_found() {
    let mut missed = Vec::new();
    for mutant in Mutant::IN_HISTORIES {
        let found = search(0..PATIENCE, Some(*mutant), threads(), Until { time: None, failures: 1 });
        match found.failures.first_key_value() {
            Some((seed, violations)) => {
                let first: String = violations[0].chars().take(110).collect();
                println!("{mutant:?}: found in {} histories, seed {seed}: {first}", found.histories);
            }
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not found within {PATIENCE} histories: {missed:?}");
}
