//! Where the programs touch the world, so that tests can put another one there: the clock, randomness, threads for
//! blocking work. And where tests reach into the programs: failpoints, planted mistakes, counted situations, limits.
//!
//! Read first: [`clock`], [`random`] and [`threads`], which is what product code calls; then [`failpoint`] and
//! [`mutant`]. Everything that is for tests needs the feature `testing`; without it, as in any release, the functions
//! are what their names say and nothing else, and failpoints and mutants are compiled to nothing.

pub mod clock;
pub mod failpoint;
pub mod limits;
pub mod mutant;
pub mod random;
pub mod situation;
pub mod threads;

#[cfg(feature = "testing")]
pub mod world;
