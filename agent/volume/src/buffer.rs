//! Memory that O_DIRECT accepts.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// The strictest alignment that a device asks of memory: a page.
pub const ALIGNMENT: usize = 4096;

/// Zeroed bytes on the heap that begin at a page. Fixed length.
pub struct AlignedBuffer {
    // Over-allocated by a page instead of an allocation of our own with a layout: that would be `unsafe` for 4 KiB.
    // A `Box` and not a `Vec`: it never moves its bytes.
    memory: Box<[u8]>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zero bytes.
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGNMENT].into_boxed_slice();
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        assert!(start < ALIGNMENT, "a page boundary is within a page of any address");
        Self { memory, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_at_a_page_whatever_its_length() {
        for len in [0, 1, 511, 4096, 65536, (1 << 20) + 1] {
            let mut b = AlignedBuffer::new(len);
            assert_eq!(b.len(), len);
            assert_eq!(b.as_ptr() as usize % ALIGNMENT, 0);
            b.fill(7);
            let moved = b;
            assert!(moved.iter().all(|x| *x == 7));
            assert_eq!(moved.as_ptr() as usize % ALIGNMENT, 0);
        }
    }
}
