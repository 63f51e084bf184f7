//! The disk itself, without the kernel: bytes, a log of what happened to them, and what goes wrong.
//!
//! The model is a disk with a volatile cache. A write is visible at once and survives a power loss from the next honest
//! flush on; what was not flushed may be there in any subset, torn at sectors ([`super::log`] makes those images).

use std::io::Write;
use std::ops::Range;

use super::log::{self, Entry};
use super::order::{Effect, Op, Order, Rule, Told};

/// A disk.
pub struct Disk {
    bytes: Vec<u8>,
    log: Option<Box<dyn Write + Send>>,
    /// What was there before each write since the last honest flush.
    undo: Vec<(usize, Vec<u8>)>,
    rules: Vec<Rule>,
    told: Told,
}

/// What the kernel is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fails {
    /// EIO.
    Eio,
    /// ENOSPC.
    Enospc,
}

impl Disk {
    /// Zeroes; what happens is written down in `log`.
    pub fn new(size: usize, log: Option<Box<dyn Write + Send>>) -> Self {
        Self { bytes: vec![0; size], log, undo: Vec::new(), rules: Vec::new(), told: Told::default() }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Does as it is told.
    pub fn obey(&mut self, order: Order) -> Told {
        match order {
            Order::Tell => {}
            Order::Fault(rule) => self.rules.push(rule),
            Order::Heal => self.rules.clear(),
            Order::Rot { at, mask } => self.bytes[at as usize] ^= mask,
            Order::PowerLoss => self.lose(),
        }
        if let Some(log) = &mut self.log {
            log.flush().expect("there is room for the log");
        }
        self.told
    }

    /// Reads; short at the end.
    pub fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>, Fails> {
        self.told.reads += 1;
        let range = self.clip(at, len as u64);
        let effect = self.effect(Op::Read, &range, &[]);
        let mut bytes = self.bytes[range.start as usize..range.end as usize].to_vec();
        match effect {
            Some(Effect::Eio) => return Err(Fails::Eio),
            Some(Effect::Enospc) => return Err(Fails::Enospc),
            Some(Effect::Flip) => flip(&mut bytes),
            _ => {}
        }
        Ok(bytes)
    }

    /// Writes.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Fails> {
        self.told.writes += 1;
        let range = self.clip(at, bytes.len() as u64);
        let mut bytes = bytes[..(range.end - range.start) as usize].to_vec();
        let mut start = range.start;
        match self.effect(Op::Write, &range, &bytes) {
            Some(Effect::Eio) => return Err(Fails::Eio),
            Some(Effect::Enospc) => return Err(Fails::Enospc),
            Some(Effect::Drop) => return Ok(()),
            Some(Effect::Flip) => flip(&mut bytes),
            Some(Effect::Shift(by)) => {
                // The other way at the ends of the disk: elsewhere is elsewhere.
                let last = self.size() - bytes.len() as u64;
                let there = |by: i64| start.checked_add_signed(by).filter(|there| *there <= last);
                start = there(by).or(there(-by)).unwrap_or(start);
            }
            Some(Effect::Lie) | None => {}
        }
        self.apply(start as usize, &bytes);
        self.note(&Entry::Write { at: start, bytes });
        Ok(())
    }

    /// Makes a range zero.
    pub fn zero(&mut self, at: u64, len: u64) -> Result<(), Fails> {
        self.told.writes += 1;
        let range = self.clip(at, len);
        match self.effect(Op::Write, &range, &[]) {
            Some(Effect::Eio) => return Err(Fails::Eio),
            Some(Effect::Enospc) => return Err(Fails::Enospc),
            Some(Effect::Drop) => return Ok(()),
            _ => {}
        }
        self.apply(range.start as usize, &vec![0; (range.end - range.start) as usize]);
        self.note(&Entry::Zero { at: range.start, len: range.end - range.start });
        Ok(())
    }

    /// Flushes the cache.
    pub fn flush(&mut self) -> Result<(), Fails> {
        self.told.flushes += 1;
        match self.effect(Op::Flush, &(0..0), &[]) {
            Some(Effect::Eio) => return Err(Fails::Eio),
            Some(Effect::Enospc) => return Err(Fails::Enospc),
            Some(Effect::Lie) => return Ok(()),
            Some(Effect::Drop) => {
                self.lose();
                return Ok(());
            }
            _ => {}
        }
        self.undo.clear();
        self.note(&Entry::Flush);
        Ok(())
    }

    fn lose(&mut self) {
        for (at, bytes) in std::mem::take(&mut self.undo).into_iter().rev() {
            self.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    fn apply(&mut self, at: usize, bytes: &[u8]) {
        let place = &mut self.bytes[at..at + bytes.len()];
        self.undo.push((at, place.to_vec()));
        place.copy_from_slice(bytes);
    }

    fn note(&mut self, entry: &Entry) {
        self.told.position += 1;
        if let Some(log) = &mut self.log {
            log::append(log, entry).expect("there is room for the log");
        }
    }

    fn effect(&mut self, op: Op, range: &Range<u64>, bytes: &[u8]) -> Option<Effect> {
        let effect = self.rules.iter_mut().find_map(|r| r.acts(op, range, bytes));
        self.told.hits += u64::from(effect.is_some());
        effect
    }

    fn clip(&self, at: u64, len: u64) -> Range<u64> {
        let start = at.min(self.size());
        start..at.saturating_add(len).min(self.size())
    }
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
}
