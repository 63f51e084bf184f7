//! From the volume to the wire: reader, hasher, encoder on threads; sender on streams.
//!
//! | file | owns | does not own |
//! |---|---|---|
//! | [`scanner`] | reading, hashing, comparing, compressing one page | which pages, what the receiver has |
//! | [`pace`] | how hard blocks are compressed | compressing |
//! | [`sender`] | block streams | what is in them |

pub mod pace;
pub mod scanner;
pub mod sender;
