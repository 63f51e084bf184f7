//! Names of objects, built and parsed in one place.

use std::fmt;

/// The name of an object below the store's prefix. Only `[a-z0-9._-]` and `/` between parts, so that it is a safe
/// path in a folder and a safe key in S3; parts are never empty, `.` or `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectKey(String);

/// A text that is no object key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not the name of an object")]
pub struct KeyError(String);

impl ObjectKey {
    /// Checks the characters and parts.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let legal = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if text.len() <= 512 && text.split('/').all(legal) {
            Ok(Self(text.to_owned()))
        } else {
            Err(KeyError(text.to_owned()))
        }
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
