//! From the volume to the wire: reader, hasher, encoder on threads; sender on streams.
//!
//! | file | owns | does not own |
//! |---|---|---|
//! | [`scanner`] | reading, hashing, comparing, compressing one page | which pages, what the receiver has |
//! | [`pace`] | how hard blocks are compressed | compressing |
//! | [`sender`] | block streams | what is in them |
//! | [`load`] | how fast, and how threads rank | what is read and sent |
//! | [`schedule`] | which rate at which time | waiting |

pub mod load;
pub mod pace;
pub mod scanner;
pub mod schedule;
pub mod sender;
