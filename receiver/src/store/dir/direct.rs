//! Large objects go around the page cache: copying through it costs more CPU time than all else that a receiver does with a
//! segment, and what is read again is read by a restore months later.
//!
//! Everything falls back to ordinary reads and writes where the file system refuses.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use backhaul_volume::buffer::{ALIGNMENT, AlignedBuffer};
use bytes::Bytes;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// From this length on. Arbitrary: a direct write waits for the disk, which a small one need not.
pub(super) const DIRECT_FROM: usize = 256 << 10;
/// Bytes of one write. Larger ones are not faster.
const CHUNK: usize = 1 << 20;

/// Writes all of an empty file.
pub(super) fn write_all(file: &File, body: &[u8]) -> std::io::Result<()> {
    let done = if body.len() >= DIRECT_FROM { write_most(file, body)? } else { 0 };
    file.write_all_at(&body[done..], done as u64)
}

/// Writes whole units directly, and says how many bytes that were: none where that is refused.
fn write_most(file: &File, body: &[u8]) -> std::io::Result<usize> {
    let Some(_direct) = Direct::of(file) else { return Ok(0) };
    let mut buffer = AlignedBuffer::new(CHUNK);
    let mut done = 0;
    while body.len() - done >= ALIGNMENT {
        let len = CHUNK.min(body.len() - done) / ALIGNMENT * ALIGNMENT;
        buffer[..len].copy_from_slice(&body[done..done + len]);
        match file.write_at(&buffer[..len], done as u64) {
            Ok(written) if written == len => done += len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // A rest that is in no whole unit, or a device with larger ones: the page cache takes all.
            Ok(_) => break,
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads exactly this, or `None` where that can't be done directly.
pub(super) fn read(file: &OwnedFd, start: u64, len: usize) -> rustix::io::Result<Option<Bytes>> {
    let skip = (start % ALIGNMENT as u64) as usize;
    let Some(_direct) = Direct::of(file) else { return Ok(None) };
    let whole = (skip + len).next_multiple_of(ALIGNMENT);
    let mut memory = Vec::new();
    memory.try_reserve_exact(whole + ALIGNMENT).map_err(|_| Errno::NOMEM)?;
    memory.resize(whole + ALIGNMENT, 0);
    let at = memory.as_ptr().align_offset(ALIGNMENT);
    let mut done = 0;
    while done < skip + len {
        let offset = start - skip as u64 + done as u64;
        match rustix::io::pread(file, &mut memory[at + done..at + whole], offset) {
            Err(Errno::INTR) => {}
            // Not for this device, or after the last whole unit of a file that ends here.
            Err(Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno),
            // The caller finds out what is missing.
            Ok(0) => return Ok(None),
            Ok(n) => done += n,
        }
    }
    Ok(Some(Bytes::from(memory).slice(at + skip..at + skip + len)))
}

/// An open file is direct as long as this lives.
struct Direct<F: AsFd> {
    file: F,
    before: OFlags,
}

impl<F: AsFd> Direct<F> {
    /// `None` where the file system knows no such thing.
    fn of(file: F) -> Option<Self> {
        let before = fcntl_getfl(&file).ok()?;
        fcntl_setfl(&file, before | OFlags::DIRECT).ok()?;
        Some(Self { file, before })
    }
}

impl<F: AsFd> Drop for Direct<F> {
    fn drop(&mut self) {
        // It took the flag, so it lets go of it.
        let _ = fcntl_setfl(&self.file, self.before);
    }
}
