//! KILL: the real programs die, fail or wait at every durable step, and at random moments (I1, I2, I3, I5, I14).
//!
//! Read first: [`steps::all`], the list of all steps; a run that logs what it reaches must log exactly these. Then
//! [`story`]: the life of a server from `init` to `revoke`, told by commands that are typed again when they fail, with a
//! receiver that is started again when it dies. Whatever happened on the way, the story must end well.

mod beside;
mod steps;
mod story;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use backhaul_tests::Random;

use crate::steps::Step;
use crate::story::{Plan, Program, Story};

/// Stories told at once. They mostly wait for a disk or each other.
const AT_ONCE: usize = 4;
/// Random kills in CI; `BACKHAUL_KILLS` for more.
const KILLS: usize = 60;
/// Kills in one story.
const PER_STORY: usize = 3;
/// How long a delayed step takes, in milliseconds: some commands.
const DELAY: u64 = 150;

/// Tells a story of each case, some side by side; panics with all that went wrong. How many programs were killed.
fn all<C: Sync>(cases: &[C], name: impl Fn(&C) -> String + Sync, plan: impl Fn(&C) -> Plan + Sync) -> usize {
    let (next, killed, wrong) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let run = |case| killed.fetch_add(Story::new(plan(case)).tell().killed, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(case))) {
                        let text = panic.downcast_ref::<String>().cloned();
                        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
                        let text = format!("{}: {}", name(case), text.unwrap_or_default());
                        wrong.lock().expect("no panic while it is held").push(text);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().expect("no panic while it is held");
    assert!(wrong.is_empty(), "{} of {} stories end badly:\n{}", wrong.len(), cases.len(), wrong.join("\n\n"));
    killed.into_inner()
}

#[test]
fn the_list_of_durable_steps_is_complete() {
    let story = Story::new(Plan::Log);
    story.tell();
    let reached = [Program::Receiver, Program::Agent].into_iter().flat_map(|program| story.logged(program));
    let (reached, listed): (BTreeSet<Step>, BTreeSet<Step>) = (reached.collect(), steps::all().into_iter().collect());
    let differing: Vec<_> = reached.symmetric_difference(&listed).collect();
    assert!(differing.is_empty(), "reached or listed, and not both: {differing:#?}");
    assert!(listed.len() >= 60, "{} steps", listed.len());
}

#[test]
fn a_program_that_dies_at_any_durable_step_is_started_again_and_nothing_is_lost() {
    all(&steps::all(), |s| format!("{s}=abort"), |step| Plan::Step(step.clone(), "abort".into()));
}

#[test]
fn a_durable_step_that_fails_is_said_and_nothing_is_lost() {
    all(&steps::all(), |s| format!("{s}=error"), |step| Plan::Step(step.clone(), "error".into()));
}

/// While a step takes its time, others look on, and see nothing wrong. Several steps of each story are slow.
#[test]
fn a_durable_step_that_takes_long_disturbs_nobody() {
    let steps = steps::all();
    let some: Vec<&[Step]> = steps.chunks(steps.len().div_ceil(8)).collect();
    all(&some, |s| format!("from {} on", s[0]), |steps| Plan::Slow(steps.to_vec(), DELAY));
}

#[test]
fn random_kills() {
    let mut random = Random::printed("random_kills");
    let kills = std::env::var("BACKHAUL_KILLS").map_or(KILLS, |n| n.parse().expect("a number"));
    let seeds: Vec<u64> = (0..kills.div_ceil(PER_STORY)).map(|_| random.number()).collect();
    let usual = Story::new(Plan::Log).tell().commands;
    let killed = all(&seeds, |seed| format!("story {seed}"), |seed| Plan::Kills(*seed, PER_STORY, usual.clone()));
    println!("{killed} of {kills} kills hit a program at work");
}
