//! Plans: pure functions from what is wanted to what is done. The executors beside them are dull.

pub mod reads;
pub mod restore;
