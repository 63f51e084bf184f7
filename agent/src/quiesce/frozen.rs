//! What happens while file systems are frozen. Between the first freeze and the last thaw nothing is allocated, opened or
//! logged: the agent's own root may be frozen, and then whoever waits for it waits for ever.
//!
//! Read first: [`instant`], then [`Part`].

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockWriteGuard};
use std::time::{Duration, Instant as Clock};

use backhaul_freeze::{Prepared, Thawed};
use backhaul_hints::{Blocks, Doubt, Proof};
use backhaul_protocol::geometry::{BlockIndex, ByteOffset, Geometry};
use backhaul_volume::buffer::AlignedBuffer;
use backhaul_volume::{Volume, VolumeError};

use super::QuiesceError;
use crate::capture::Capture;
use crate::tracker::Candidates;

/// Reads under way at once: enough for a disk to be busy, arbitrary above that.
const READERS: usize = 4;
/// What is left of the limit when reading stops: the thaw takes time too.
const RESERVE: Duration = Duration::from_millis(20);

/// Memory for the last blocks of a freeze; used again from point to point.
#[derive(Debug)]
pub struct Memory(AlignedBuffer);

impl Memory {
    /// What is kept, or new where somebody still reads in it.
    pub(super) fn of(kept: &mut Option<Arc<Self>>, bytes: usize) -> std::io::Result<&mut Arc<Self>> {
        if kept.as_mut().is_none_or(|memory| Arc::get_mut(memory).is_none()) {
            let mut buffer = AlignedBuffer::new(bytes);
            // Present before the freeze, and not to be swapped out in it. Where locking is not allowed that is likely too.
            buffer.fill(1);
            if let Err(error) = buffer.lock() {
                tracing::warn!(%error, "memory for frozen blocks can't be locked (LimitMEMLOCK=)");
            }
            *kept = Some(Arc::new(Self(buffer)));
        }
        kept.as_mut().ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
    }
}

/// One volume of an instant.
pub struct Part {
    /// What is read.
    pub source: Arc<dyn Capture>,
    /// Its blocks.
    pub geometry: Geometry,
    /// Where it may have changed.
    pub candidates: Arc<dyn Candidates>,
    /// What was taken already and is still to be read; in the end all that was taken.
    pub taken: Blocks,
    /// What was written while it was frozen.
    pub late: Blocks,
    /// Whether all marks are there.
    pub proof: Result<Proof, Doubt>,
}

impl Part {
    /// `taken` is what is to be read beside what is still to be taken.
    pub fn new(source: Arc<dyn Capture>, geometry: Geometry, candidates: Arc<dyn Candidates>, taken: Blocks) -> Self {
        Self { source, geometry, candidates, taken, late: Blocks::none(geometry.blocks()), proof: Ok(Proof::Busy) }
    }
}

impl fmt::Debug for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({}, {} blocks)", self.source.describe(), self.taken.count())
    }
}

/// How it went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Everything that was taken was read, at one instant if nothing was written late and the proofs are complete.
    Read {
        /// How long programs had to wait.
        frozen_for: Duration,
    },
    /// More was marked than there is memory or time for: nothing of it counts as read.
    TooMuch {
        /// Bytes.
        marked: u64,
    },
    /// Somebody thawed, or it took too long: nothing of it counts as read.
    Broken(String),
}

/// What was read at one instant.
#[derive(Debug)]
pub struct Instant {
    /// How it went.
    pub verdict: Verdict,
    /// The volumes, in the order in which they were given.
    pub parts: Vec<Part>,
    memory: Arc<Memory>,
    places: Vec<Place>,
}

/// Where a block is in memory.
#[derive(Clone, Copy, Debug)]
struct Place {
    part: usize,
    block: u64,
}

impl Instant {
    /// What was read of one part, as a volume of which only that can be read.
    pub fn volume(&self, part: usize) -> Frozen {
        let slot = slot_len(&self.parts);
        let places = self.places.iter().enumerate().filter(|(_, p)| p.part == part).map(|(i, p)| (p.block, i * slot));
        let Part { source, geometry, .. } = &self.parts[part];
        Frozen { name: source.describe(), geometry: *geometry, memory: self.memory.clone(), places: places.collect() }
    }
}

fn slot_len(parts: &[Part]) -> usize {
    parts.iter().map(|p| p.geometry.block_size() as usize).max().unwrap_or(1)
}

/// Freezes, takes, reads, takes once more, thaws.
pub(super) fn instant(
    prepared: &mut Prepared<'_>,
    parts: Vec<Part>,
    limit: Duration,
    memory: &mut Arc<Memory>,
) -> Result<Instant, QuiesceError> {
    let slot = slot_len(&parts);
    let buffer = Arc::get_mut(memory).ok_or(QuiesceError::Gone)?;
    let slots: Vec<Mutex<&mut [u8]>> = buffer.0.chunks_exact_mut(slot).map(Mutex::new).collect();
    let plan = RwLock::new(Plan { places: Vec::with_capacity(slots.len()), parts, marked: 0 });
    let reading = Reading::default();
    let frozen = std::thread::scope(|scope| {
        for _ in 1..READERS {
            let (slots, reading, plan) = (&slots, &reading, &plan);
            let body = move || {
                if let Some(until) = reading.wait() {
                    reading.read(slots, plan, until);
                }
            };
            // Fewer readers are slower, and this thread is one in any case.
            let _ = std::thread::Builder::new().name("frozen".to_owned()).spawn_scoped(scope, body);
        }
        let result = prepared.freeze(limit).map(|frozen| {
            let until = Clock::now() + frozen.remaining().saturating_sub(RESERVE);
            if write(&plan).take(slots.len()) {
                reading.go(Phase::Reading { until });
                reading.read(&slots, &plan, until);
            }
            // Waits for those that are still reading.
            write(&plan).prove();
            frozen.thaw()
        });
        reading.go(Phase::Over);
        result
    });
    drop(slots);
    let Plan { parts, places, marked } = plan.into_inner().unwrap_or_else(PoisonError::into_inner);
    let thawed = frozen?;
    if let Some(error) = reading.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(QuiesceError::Read(error));
    }
    let verdict = match thawed {
        Thawed::Broken(why) => Verdict::Broken(why.to_string()),
        Thawed::Held { frozen_for } if reading.done.load(Ordering::SeqCst) == places.len() && !places.is_empty() => {
            Verdict::Read { frozen_for }
        }
        Thawed::Held { frozen_for } if marked == 0 => Verdict::Read { frozen_for },
        Thawed::Held { .. } => Verdict::TooMuch { marked },
    };
    Ok(Instant { verdict, parts, memory: memory.clone(), places })
}

fn write(plan: &RwLock<Plan>) -> RwLockWriteGuard<'_, Plan> {
    plan.write().unwrap_or_else(PoisonError::into_inner)
}

/// What is read, and where it goes.
struct Plan {
    parts: Vec<Part>,
    places: Vec<Place>,
    /// Bytes.
    marked: u64,
}

impl Plan {
    /// Takes what is marked; whether it is to be read: there is so much room, and no doubt.
    fn take(&mut self, room: usize) -> bool {
        let Self { parts, places, marked } = self;
        let mut count = 0;
        for part in &mut *parts {
            if let Err(doubt) = part.candidates.take_into(&mut part.taken) {
                part.proof = Err(doubt);
            }
            count += part.taken.count();
            *marked += part.taken.count() * u64::from(part.geometry.block_size());
        }
        if count > room as u64 || parts.iter().any(|p| p.proof.is_err()) {
            return false;
        }
        for (index, part) in parts.iter().enumerate() {
            // There is room for all: nothing is allocated.
            part.taken.ranges().flatten().for_each(|block| places.push(Place { part: index, block }));
        }
        true
    }

    /// Whether nothing was written since, and all that was is marked.
    fn prove(&mut self) {
        for part in self.parts.iter_mut().filter(|p| p.proof.is_ok()) {
            let late = part.candidates.take_into(&mut part.late);
            part.proof = late.and_then(|_| part.candidates.proof());
        }
    }
}

/// What the readers wait for.
#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    #[default]
    Waiting,
    Reading {
        until: Clock,
    },
    Over,
}

/// What the readers share.
#[derive(Default)]
struct Reading {
    phase: Mutex<Phase>,
    changed: Condvar,
    next: AtomicUsize,
    done: AtomicUsize,
    failed: Mutex<Option<VolumeError>>,
}

impl Reading {
    fn go(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        self.changed.notify_all();
    }

    /// Until when to read; `None` if there is nothing to read any more.
    fn wait(&self) -> Option<Clock> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *phase {
                Phase::Waiting => phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner),
                Phase::Reading { until } => return Some(until),
                Phase::Over => return None,
            }
        }
    }

    /// Reads block after block, as others do beside.
    fn read(&self, slots: &[Mutex<&mut [u8]>], plan: &RwLock<Plan>, until: Clock) {
        let plan = plan.read().unwrap_or_else(PoisonError::into_inner);
        while Clock::now() < until {
            let at = self.next.fetch_add(1, Ordering::SeqCst);
            let (Some(place), Some(slot)) = (plan.places.get(at), slots.get(at)) else { return };
            let part = &plan.parts[place.part];
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            let block = BlockIndex(place.block);
            let bytes = &mut slot[..part.geometry.block_len(block)];
            if let Err(error) = part.source.read_at(part.geometry.offset(block), bytes) {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
            self.done.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// What was read of a volume while it was frozen.
pub struct Frozen {
    name: String,
    geometry: Geometry,
    memory: Arc<Memory>,
    /// Where each block begins in memory.
    places: std::collections::BTreeMap<u64, usize>,
}

impl Volume for Frozen {
    fn length(&self) -> u64 {
        self.geometry.length()
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let size = u64::from(self.geometry.block_size());
        debug_assert_eq!(at.0 % size, 0, "whole blocks are read");
        for (block, piece) in (at.0 / size..).zip(buf.chunks_mut(size as usize)) {
            let place = self.places.get(&block).copied().ok_or_else(|| VolumeError::OutOfBounds {
                path: self.name.clone().into(),
                at: block * size,
                len: piece.len() as u64,
                length: self.geometry.length(),
            })?;
            piece.copy_from_slice(&self.memory.0[place..place + piece.len()]);
        }
        Ok(())
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        Ok((from.0 < self.length()).then_some(from.0..self.length()))
    }

    fn describe(&self) -> String {
        format!("{}, frozen", self.name)
    }
}
