//! Freezing real file systems on loop devices.

mod hold;
mod support;
