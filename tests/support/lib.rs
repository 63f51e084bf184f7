//! Placeholder
pub mod faults;
pub mod s3;
