//! The log of a fault disk: every write and every flush in order, and every state of the disk that a power loss could
//! have left.
//!
//! Read first: [`WriteLog`] and [`Crash`].
//!
//! Everything before a flush is on the disk once the flush was acknowledged. Of what came after the last flush, any part
//! may be: each write wholly, in part (sectors stay whole) or not at all, in any order. A write that was
//! acknowledged before the flush was asked for counts as before it.

use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use crate::Random;

/// One thing that happened to a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Bytes were written.
    Write {
        /// Where.
        at: u64,
        /// Which.
        bytes: Vec<u8>,
    },
    /// A range became zero.
    Zero {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// All before is durable.
    Flush,
}

/// Writes one entry: kind, offset, length, bytes.
pub fn append(log: &mut impl Write, entry: &Entry) -> io::Result<()> {
    let (kind, at, len, bytes): (u8, u64, u64, &[u8]) = match entry {
        Entry::Flush => (0, 0, 0, &[]),
        Entry::Write { at, bytes } => (1, *at, bytes.len() as u64, bytes),
        Entry::Zero { at, len } => (2, *at, *len, &[]),
    };
    log.write_all(&[kind])?;
    log.write_all(&at.to_le_bytes())?;
    log.write_all(&len.to_le_bytes())?;
    log.write_all(bytes)
}

/// All that happened to a disk.
pub struct WriteLog {
    entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads one.
    pub fn read(path: &Path) -> Self {
        let mut file = BufReader::new(std::fs::File::open(path).expect("there is a log"));
        let mut entries = Vec::new();
        let mut head = [0; 17];
        while file.read_exact(&mut head).is_ok() {
            let number = |from: usize| u64::from_le_bytes(head[from..from + 8].try_into().expect("eight bytes"));
            let (at, len) = (number(1), number(9));
            entries.push(match head[0] {
                0 => Entry::Flush,
                1 => {
                    let mut bytes = vec![0; len as usize];
                    file.read_exact(&mut bytes).expect("the log is whole");
                    Entry::Write { at, bytes }
                }
                _ => Entry::Zero { at, len },
            });
        }
        Self { entries }
    }

    /// What happened, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The stretches between flushes from position `start` on: each begins right after a flush (or at `start`) and ends
    /// right before the next (or at the end).
    pub fn windows(&self, start: u64) -> Vec<std::ops::Range<u64>> {
        let mut windows = Vec::new();
        let mut from = start;
        for (i, entry) in self.entries.iter().enumerate().skip(start as usize) {
            if *entry == Entry::Flush {
                windows.push(from..i as u64);
                from = i as u64 + 1;
            }
        }
        windows.push(from..self.entries.len() as u64);
        windows
    }

    /// Power losses from position `start` on: for each stretch between two flushes nothing of it and all of it, and so
    /// many in between drawn from the seed. The disk writes so many bytes wholly or not at all.
    pub fn crashes(&self, start: u64, sector: u64, drawn: u64, seed: u64) -> Vec<Crash> {
        let mut crashes = Vec::new();
        let mut random = Random::new(seed);
        for window in self.windows(start) {
            let (durable, end) = (window.start, window.end);
            crashes.push(Crash { durable, at: end, kept: Kept::Nothing, sector });
            if durable == end {
                continue;
            }
            crashes.push(Crash { durable, at: end, kept: Kept::All, sector });
            for _ in 0..drawn {
                let at = random.between(durable, end) + 1;
                crashes.push(Crash { durable, at, kept: Kept::Some(random.number()), sector });
            }
        }
        crashes
    }
}

/// A power loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Crash {
    /// Everything before this position is on the disk.
    pub durable: u64,
    /// When it happens. Of what lies between, a part is on the disk.
    pub at: u64,
    /// Which part.
    pub kept: Kept,
    /// Bytes that the disk writes wholly or not at all.
    pub sector: u64,
}

/// Which writes survive that were not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// None.
    Nothing,
    /// Every one.
    All,
    /// Those that this seed says, some of them torn.
    Some(u64),
}

impl Crash {
    /// What of the entries between [`Self::durable`] and [`Self::at`] is on the disk: for each a list of pieces
    /// (offset, bytes).
    pub fn pieces(&self, log: &WriteLog) -> Vec<(u64, Vec<u8>)> {
        let entries = &log.entries[self.durable as usize..self.at as usize];
        let seed = match self.kept {
            Kept::Nothing => return Vec::new(),
            Kept::All => return entries.iter().filter_map(whole).collect(),
            Kept::Some(seed) => seed,
        };
        let mut random = Random::new(seed);
        // Few or many, so that both a single lost write and a single kept one are common.
        let percent = [5, 25, 50, 75, 95][random.between(0, 5) as usize];
        let mut pieces = Vec::new();
        for (at, bytes) in entries.iter().filter_map(whole) {
            if random.between(0, 100) >= percent {
                continue;
            }
            match random.between(0, 6) {
                0 => torn(at, &bytes, self.sector, &mut random, &mut pieces),
                _ => pieces.push((at, bytes)),
            }
        }
        pieces
    }
}

fn whole(entry: &Entry) -> Option<(u64, Vec<u8>)> {
    match entry {
        Entry::Write { at, bytes } => Some((*at, bytes.clone())),
        Entry::Zero { at, len } => Some((*at, vec![0; *len as usize])),
        Entry::Flush => None,
    }
}

/// The beginning, the end, or any sectors of a write.
fn torn(at: u64, bytes: &[u8], sector: u64, random: &mut Random, pieces: &mut Vec<(u64, Vec<u8>)>) {
    let end = at + bytes.len() as u64;
    let sectors = at / sector..end.div_ceil(sector);
    let cut = random.between(sectors.start, sectors.end + 1);
    let how = random.between(0, 3);
    for i in sectors {
        let kept = match how {
            0 => i < cut,
            1 => i >= cut,
            _ => random.number().is_multiple_of(2),
        };
        if kept {
            let (from, to) = ((i * sector).max(at), ((i + 1) * sector).min(end));
            pieces.push((from, bytes[(from - at) as usize..(to - at) as usize].to_vec()));
        }
    }
}
