//! Sessions as state machines without IO: in by `handle_*`, out by `poll_output`, time as an argument.
//!
//! Read first: [`source`] (the agent that writes a point), [`sink`] (the receiver that takes it) and [`compare`] (which
//! blocks must be sent). Reading a point back needs no machine of its own: `Ranges`, `Page` and `Want` are questions
//! with answers.

pub mod compare;
pub mod sink;
pub mod source;
