//! A volume in memory, for tests.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use backhaul_protocol::digest::is_zero;
use backhaul_protocol::geometry::ByteOffset;

use crate::{Volume, VolumeError, checked_range};

/// Holes are told apart in this unit, as file systems do.
const PAGE: usize = 4096;

/// Bytes in memory that can be changed while others read them. Clones share the bytes.
#[derive(Clone, Default)]
pub struct MemVolume {
    inner: Arc<RwLock<Inner>>,
}

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    broken: Vec<Range<u64>>,
    reads: u64,
}

impl MemVolume {
    /// With these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { inner: Arc::new(RwLock::new(Inner { bytes, ..Inner::default() })) }
    }

    /// With `length` zero bytes.
    pub fn zeroed(length: usize) -> Self {
        Self::new(vec![0; length])
    }

    fn with<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        f(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes bytes from `at` on.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn set(&self, at: u64, bytes: &[u8]) {
        self.with(|i| i.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes));
    }

    /// Grows with zeroes or shrinks.
    pub fn resize(&self, length: usize) {
        self.with(|i| i.bytes.resize(length, 0));
    }

    /// Reads that touch these bytes fail with EIO from now on.
    pub fn break_range(&self, range: Range<u64>) {
        self.with(|i| i.broken.push(range));
    }

    /// All reads work again.
    pub fn mend(&self) {
        self.with(|i| i.broken.clear());
    }

    /// A copy of all bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.with(|i| i.bytes.clone())
    }

    /// Bytes read so far, by everybody.
    pub fn bytes_read(&self) -> u64 {
        self.with(|i| i.reads)
    }
}

impl fmt::Debug for MemVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemVolume({} bytes)", self.length())
    }
}

impl Volume for MemVolume {
    fn length(&self) -> u64 {
        self.with(|i| i.bytes.len() as u64)
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let path = || PathBuf::from("memory");
        self.with(|i| {
            let (length, len) = (i.bytes.len() as u64, buf.len() as u64);
            let range = checked_range(at, buf.len(), length).ok_or_else(|| VolumeError::OutOfBounds {
                path: path(),
                at: at.0,
                len,
                length,
            })?;
            if i.broken.iter().any(|b| b.start < range.end && range.start < b.end) {
                let source = std::io::Error::from_raw_os_error(libc::EIO);
                return Err(VolumeError::Read { path: path(), range, source });
            }
            buf.copy_from_slice(&i.bytes[range.start as usize..range.end as usize]);
            i.reads += len;
            Ok(())
        })
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        self.with(|i| {
            let pages = || i.bytes.chunks(PAGE).enumerate().skip(from.0 as usize / PAGE);
            let Some((first, _)) = pages().find(|(_, p)| !is_zero(p)) else { return Ok(None) };
            let after = pages().skip_while(|(n, _)| *n < first).find(|(_, p)| is_zero(p));
            let end = after.map_or(i.bytes.len(), |(n, _)| n * PAGE) as u64;
            let start = from.0.max((first * PAGE) as u64);
            Ok((start < end).then_some(start..end))
        })
    }

    fn describe(&self) -> String {
        format!("memory of {} bytes", self.length())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_bounds_and_faults() {
        let v = MemVolume::zeroed(5 * PAGE + 10);
        v.set(PAGE as u64 + 5, &[1]);
        v.set(5 * PAGE as u64, &[1]);
        let page = PAGE as u64;
        assert_eq!(v.next_data(ByteOffset(0)).expect("reads"), Some(page..2 * page));
        assert_eq!(v.next_data(ByteOffset(page + 7)).expect("reads"), Some(page + 7..2 * page));
        assert_eq!(v.next_data(ByteOffset(2 * page)).expect("reads"), Some(5 * page..5 * page + 10));
        assert_eq!(v.next_data(ByteOffset(6 * page)).expect("reads"), None);
        let mut buf = [0; 10];
        v.read_at(ByteOffset(5 * page), &mut buf).expect("the tail");
        assert!(matches!(v.read_at(ByteOffset(5 * page + 1), &mut buf), Err(VolumeError::OutOfBounds { .. })));
        v.break_range(3..4);
        assert!(v.read_at(ByteOffset(0), &mut buf).is_err_and(|e| e.is_retryable()));
        v.mend();
        assert!(v.clone().read_at(ByteOffset(0), &mut buf).is_ok());
    }
}
