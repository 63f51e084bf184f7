//! O_DIRECT reads and writes for buffers, offsets and lengths of any alignment.
//!
//! Aligned work goes straight through; the rest is copied through a page-aligned buffer, and a write that covers part
//! of a sector reads that sector first. Owns the sector arithmetic; does not own paths, bounds or error texts.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use crate::buffer::AlignedBuffer;

/// Copies go through a buffer of this many bytes. One block of the largest size; arbitrary beyond that.
const BOUNCE: u64 = 1 << 20;

pub(crate) struct DirectIo {
    file: File,
    sector: u64,
    /// Held while sectors are read, changed and written, so that two writers of one sector do not undo each other.
    partial: Mutex<()>,
}

impl DirectIo {
    /// `file` opened with O_DIRECT; `sector` is its unit, a power of two.
    pub(crate) fn new(file: File, sector: u32) -> Self {
        Self { file, sector: u64::from(sector.max(512)), partial: Mutex::new(()) }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn sector(&self) -> u64 {
        self.sector
    }

    /// Reads until `buf` is full or the file ends, and says how many bytes came.
    pub(crate) fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        if self.is_aligned(at, buf) {
            return read_full(&self.file, at, buf);
        }
        let (mut done, len) = (0, buf.len() as u64);
        let mut bounce = AlignedBuffer::new((self.up(at + len) - self.down(at)).min(BOUNCE) as usize);
        while (done as u64) < len {
            let pos = at + done as u64;
            let window = self.down(pos);
            let want = (self.up(at + len) - window).min(bounce.len() as u64) as usize;
            let skip = (pos - window) as usize;
            let got = read_full(&self.file, window, &mut bounce[..want])?;
            let fresh = got.saturating_sub(skip).min(buf.len() - done);
            buf[done..done + fresh].copy_from_slice(&bounce[skip..skip + fresh]);
            done += fresh;
            if got < want {
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `bytes`.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if self.is_aligned(at, bytes) {
            return self.file.write_all_at(bytes, at);
        }
        let end = at + bytes.len() as u64;
        let mut pos = at;
        let mut bounce = AlignedBuffer::new((self.up(end) - self.down(at)).min(BOUNCE) as usize);
        while pos < end {
            let window = self.down(pos);
            let stop = end.min(window + bounce.len() as u64);
            let piece = &bytes[(pos - at) as usize..(stop - at) as usize];
            let whole = &mut bounce[..(self.up(stop) - window) as usize];
            let skip = (pos - window) as usize;
            if skip == 0 && piece.len() == whole.len() {
                whole.copy_from_slice(piece);
                self.file.write_all_at(whole, window)?;
            } else {
                let _one_at_a_time = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
                self.read_edges(window, whole, skip, piece.len())?;
                whole[skip..skip + piece.len()].copy_from_slice(piece);
                self.file.write_all_at(whole, window)?;
            }
            pos = stop;
        }
        Ok(())
    }

    /// Reads the sectors at the ends of `whole` that are only partly replaced.
    fn read_edges(&self, window: u64, whole: &mut [u8], skip: usize, len: usize) -> io::Result<()> {
        let (sector, last) = (self.sector as usize, whole.len() - self.sector as usize);
        let mut edges = Vec::with_capacity(2);
        if skip != 0 {
            edges.push(0);
        }
        if skip + len != whole.len() && edges.last() != Some(&last) {
            edges.push(last);
        }
        for edge in edges {
            let got = read_full(&self.file, window + edge as u64, &mut whole[edge..edge + sector])?;
            if got != sector {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the last sector is not whole"));
            }
        }
        Ok(())
    }

    fn is_aligned(&self, at: u64, bytes: &[u8]) -> bool {
        (at | bytes.len() as u64 | bytes.as_ptr() as u64).is_multiple_of(self.sector)
    }

    fn down(&self, at: u64) -> u64 {
        at / self.sector * self.sector
    }

    fn up(&self, at: u64) -> u64 {
        at.div_ceil(self.sector) * self.sector
    }
}

/// Reads until `buf` is full or the file ends; interrupted calls are repeated.
pub(crate) fn read_full(file: &File, at: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // O_DIRECT after an end that is not at a sector. Callers count what came, so nothing is hidden.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
