//! The simulation's world: one for each thread that runs one.
//!
//! Read first: [`enter`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use crate::mutant::Mutant;
use crate::situation::Situation;

struct World {
    random: fastrand::Rng,
    /// What the wall clock says when tokio's says `since`.
    clock: (SystemTime, tokio::time::Instant),
    mutant: Option<Mutant>,
    reached: BTreeMap<Situation, u64>,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// The thread is in a simulated world until this is dropped.
#[must_use = "the world ends with it"]
pub struct Entered(());

/// Puts the thread into a simulated world. Call it inside a tokio runtime of one thread whose clock is paused.
///
/// # Panics
/// If it is in one already.
pub fn enter(seed: u64, start: SystemTime, mutant: Option<Mutant>) -> Entered {
    let clock = (start, tokio::time::Instant::now());
    let world = World { random: fastrand::Rng::with_seed(seed), clock, mutant, reached: BTreeMap::new() };
    let before = WORLD.with(|w| w.borrow_mut().replace(world));
    assert!(before.is_none(), "one world at a time");
    // Libraries that take their jitter from there.
    fastrand::seed(seed);
    Entered(())
}

impl Drop for Entered {
    fn drop(&mut self) {
        WORLD.with(|w| w.borrow_mut().take());
    }
}

fn with<T>(look: impl FnOnce(&mut World) -> T) -> Option<T> {
    WORLD.with(|w| w.borrow_mut().as_mut().map(look))
}

/// Whether this thread is in one.
pub fn is_simulated() -> bool {
    WORLD.with(|w| w.borrow().is_some())
}

/// Moves the wall clock. Timers are not touched.
pub fn jump(forwards: bool, by: Duration) {
    with(|w| {
        let (time, _) = &mut w.clock;
        *time = if forwards { *time + by } else { time.checked_sub(by).unwrap_or(SystemTime::UNIX_EPOCH) };
    });
}

/// How often each situation was reached so far.
pub fn reached() -> BTreeMap<Situation, u64> {
    with(|w| w.reached.clone()).unwrap_or_default()
}

pub(crate) fn now() -> Option<SystemTime> {
    with(|w| w.clock.0 + w.clock.1.elapsed())
}

pub(crate) fn random_bytes<const N: usize>() -> Option<[u8; N]> {
    with(|w| {
        let mut out = [0; N];
        w.random.fill(&mut out);
        out
    })
}

pub(crate) fn has(mutant: Mutant) -> bool {
    with(|w| w.mutant == Some(mutant)).unwrap_or(false)
}

pub(crate) fn count(situation: Situation) {
    with(|w| *w.reached.entry(situation).or_default() += 1);
}
