//! What changed: the digests of what the receiver has, and where to look.

pub mod hash_index;
