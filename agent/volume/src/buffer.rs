//! Memory that O_DIRECT accepts.

use std::fmt;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// The strictest alignment that a device asks of memory: a page.
pub const ALIGNMENT: usize = 4096;

/// Zeroed bytes that begin at a page: a mapping of their own. Fixed length.
pub struct AlignedBuffer {
    memory: MmapMut,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zero bytes.
    ///
    /// # Panics
    /// If there is no memory left, as any allocation does.
    pub fn new(len: usize) -> Self {
        // An empty mapping is none.
        let memory = MmapMut::map_anon(len.max(1)).expect("no memory left");
        Self { memory, len }
    }

    /// Keeps it in memory: it is not swapped out from now on. Needs room in RLIMIT_MEMLOCK, or CAP_IPC_LOCK.
    pub fn lock(&self) -> std::io::Result<()> {
        self.memory.lock()
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
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
