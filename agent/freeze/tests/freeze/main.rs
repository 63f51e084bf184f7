//! Freezing real file systems on loop devices.

mod figures;
mod hold;
mod kill;
mod look;
mod support;
