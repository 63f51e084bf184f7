//! Many histories: over seeds, on several threads; and one history made shorter.
//!
//! Read first: [`search`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use backhaul_seams::mutant::Mutant;

use crate::history::{Report, Trace, run};
use crate::plan::Plan;

/// What came of many histories.
#[derive(Debug, Default)]
pub struct Found {
    /// Seeds with violations, and those, ascending.
    pub failures: BTreeMap<u64, Vec<String>>,
    /// How many histories were run.
    pub histories: u64,
    /// Operations in them.
    pub operations: u64,
    /// How often each situation was reached.
    pub situations: BTreeMap<String, u64>,
    /// In how many histories each situation was reached.
    pub histories_with: BTreeMap<String, u64>,
}

/// How far to go.
#[derive(Clone, Copy, Debug)]
pub struct Until {
    /// No longer than this.
    pub time: Option<Duration>,
    /// No further than so many failures.
    pub failures: usize,
}

/// Runs the histories of these seeds.
pub fn search(seeds: Range<u64>, mutant: Option<Mutant>, threads: usize, until: Until) -> Found {
    let (next, stop, began) = (AtomicU64::new(seeds.start), AtomicBool::new(false), Instant::now());
    let found = Mutex::new(Found::default());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || until.time.is_some_and(|t| began.elapsed() >= t) {
                        return;
                    }
                    let plan = Plan::of(seed);
                    let report = run_caught(&plan, mutant, Trace::Digest);
                    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                    found.histories += 1;
                    found.operations += plan.ops.len() as u64;
                    for (situation, count) in report.situations {
                        *found.histories_with.entry(situation.clone()).or_default() += 1;
                        *found.situations.entry(situation).or_default() += count;
                    }
                    if !report.violations.is_empty() {
                        found.failures.insert(seed, report.violations);
                        if found.failures.len() >= until.failures {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one; a panic is a violation (I19).
pub fn run_caught(plan: &Plan, mutant: Option<Mutant>, trace: Trace) -> Report {
    std::panic::catch_unwind(|| run(plan, mutant, trace)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
        Report {
            violations: vec![format!("I19: panic: {}", text.unwrap_or_default())],
            situations: BTreeMap::new(),
            digest: String::new(),
            lines: Vec::new(),
        }
    })
}

/// Takes operations out for as long as the history still fails in the same way.
pub fn shrink(plan: &Plan, mutant: Option<Mutant>, limit: Duration) -> Plan {
    let kind = |report: &Report| report.violations.first().and_then(|v| v.split(':').next().map(str::to_owned));
    let wanted = kind(&run_caught(plan, mutant, Trace::Digest));
    let (mut best, began) = (plan.clone(), Instant::now());
    let mut size = best.ops.len() / 2;
    while size > 0 && began.elapsed() < limit {
        let mut at = 0;
        let mut removed = false;
        while at < best.ops.len() && began.elapsed() < limit {
            let mut shorter = best.clone();
            shorter.ops.drain(at..(at + size).min(best.ops.len()));
            if wanted.is_some() && kind(&run_caught(&shorter, mutant, Trace::Digest)) == wanted {
                best = shorter;
                removed = true;
            } else {
                at += size;
            }
        }
        if !removed || size > 1 {
            size /= 2;
        }
    }
    best
}
