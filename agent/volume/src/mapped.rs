//! Memory maps of files that only this program writes: the hash index, finished local segments.
//!
//! Never a volume: who truncates a mapped file kills its readers with SIGBUS, and who writes it changes bytes that
//! Rust holds for constant.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

/// A whole file, mapped for reading.
#[derive(Debug)]
pub struct MappedFile {
    /// `None` for an empty file, which cannot be mapped.
    map: Option<Mmap>,
}

/// A file could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {}", path.display())]
pub struct MapError {
    /// Which file.
    pub path: PathBuf,
    /// The system's reason.
    pub source: io::Error,
}

impl MapError {
    /// Whether it may go better later: the machine was short of memory or descriptors.
    pub fn is_retryable(&self) -> bool {
        crate::error::is_transient(&self.source)
    }
}

impl MappedFile {
    /// Maps `path` as long as it is now.
    ///
    /// The contract, which the caller keeps: the file is in a folder that only this program writes; it is complete, and
    /// replaced by rename ([`crate::durable::replace`]), never written or truncated in place while it may be mapped.
    pub fn open(path: &Path) -> Result<Self, MapError> {
        let map = || {
            let file = File::open(path)?;
            if file.metadata()?.len() == 0 {
                return Ok(None);
            }
            // SAFETY: by the contract above nobody writes or truncates the file while it is mapped, so its bytes are
            // constant for as long as the map lives. The map keeps the inode; renaming over the path does not touch it.
            unsafe { Mmap::map(&file) }.map(Some)
        };
        map().map(|map| Self { map }).map_err(|source| MapError { path: path.to_owned(), source })
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_and_survives_replacement() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("index");
        crate::durable::replace(&path, b"", 0o600).expect("written");
        assert!(MappedFile::open(&path).expect("an empty map").is_empty());
        crate::durable::replace(&path, b"one", 0o600).expect("written");
        let one = MappedFile::open(&path).expect("mapped");
        crate::durable::replace(&path, b"two!", 0o600).expect("written");
        assert_eq!((&*one, &*MappedFile::open(&path).expect("mapped")), (&b"one"[..], &b"two!"[..]));
        let missing = MappedFile::open(&dir.path().join("none")).expect_err("not there");
        assert!(!missing.is_retryable() && missing.to_string().contains("none"));
    }
}
