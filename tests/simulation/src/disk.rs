//! Simulated volumes: every block holds one of a few contents, so that old content comes back (A, B, A) all the time,
//! and writes happen between any two reads.
//!
//! Read first: [`Disk`], then [`Capture`].

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use backhaul_agent::capture::{Capture, Provider, Watching};
use backhaul_agent::state::ProtectedVolume;
use backhaul_protocol::geometry::{ByteOffset, Geometry};
use backhaul_protocol::ids::VolumeId;
use backhaul_volume::stability::Stability;
use backhaul_volume::{Volume, VolumeError};

use crate::history::BLOCK;

/// What a block holds; 0 is zeroes.
pub type Content = u32;

/// Contents that are used; what is above stands for the remainder.
const CONTENTS: u32 = 8;

/// The bytes of a block, or of the beginning of one, with this content.
pub fn bytes_of(content: Content, out: &mut [u8]) {
    static ALL: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let all = ALL.get_or_init(|| (0..CONTENTS).map(make).collect());
    out.copy_from_slice(&all[(content % CONTENTS) as usize][..out.len()]);
}

fn make(content: Content) -> Vec<u8> {
    let mut out = vec![0; BLOCK as usize];
    if content == 0 {
        return out;
    }
    let mut x = u64::from(content).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    // Even contents compress, odd ones do not.
    let mask = if content.is_multiple_of(2) { 0x0000_00ff_0000_00ff } else { u64::MAX };
    for chunk in out.chunks_mut(8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        chunk.copy_from_slice(&(x & mask).to_le_bytes()[..chunk.len()]);
    }
    // Never all zeroes, however short.
    out[0] |= 1;
    out
}

/// A write of one block.
pub type Write = (usize, Content);

#[derive(Debug)]
struct Inner {
    blocks: Vec<Content>,
    geometry: Geometry,
    /// All writes ever.
    log: Vec<Write>,
    /// Writes that happen after so many more reads.
    armed: Option<(u64, Vec<Write>)>,
}

/// A volume. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Disk(Arc<Mutex<Inner>>);

/// What a volume held when a look at it began, and what was written since.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Of every block when it began.
    pub blocks: Vec<Content>,
    /// Of every block: that, and whatever was written meanwhile.
    pub seen: Vec<BTreeSet<Content>>,
    /// Size.
    pub geometry: Geometry,
    /// From when to when it was watched; nothing was written meanwhile if the watch says so.
    pub watched: Watched,
}

/// The beginning and the end of a watch, in the order of everything that happens to volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watched {
    /// When it began.
    pub from: u64,
    /// When it ended; `None` while it goes on.
    pub until: Option<u64>,
}

fn tick() -> u64 {
    static TICKS: AtomicU64 = AtomicU64::new(0);
    TICKS.fetch_add(1, Ordering::Relaxed)
}

impl Disk {
    /// All zeroes.
    pub fn new(geometry: Geometry) -> Self {
        let blocks = vec![0; geometry.blocks() as usize];
        Self(Arc::new(Mutex::new(Inner { blocks, geometry, log: Vec::new(), armed: None })))
    }
    /// With its own future.
    #[must_use]
    pub fn fork(&self) -> Self {
        let inner = self.lock();
        let (blocks, geometry) = (inner.blocks.clone(), inner.geometry);
        Self(Arc::new(Mutex::new(Inner { blocks, geometry, log: Vec::new(), armed: None })))
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Size.
    pub fn geometry(&self) -> Geometry {
        self.lock().geometry
    }
    /// What every block holds.
    pub fn blocks(&self) -> Vec<Content> {
        self.lock().blocks.clone()
    }
    /// Writes; blocks beyond the end are left out.
    pub fn write(&self, writes: &[Write]) {
        self.lock().write(writes);
    }
    /// Writes after so many more reads.
    pub fn arm(&self, reads: u64, writes: Vec<Write>) {
        self.lock().armed = Some((reads, writes));
    }
    /// What was to be written after more reads is not.
    pub fn disarm(&self) {
        self.lock().armed = None;
    }
    /// Another size: what is new is zero, and the last block of before is written anew, since a short one has no
    /// content that could grow.
    pub fn resize(&self, geometry: Geometry, rewritten: Content) {
        let mut inner = self.lock();
        let last = inner.blocks.len().min(geometry.blocks() as usize) - 1;
        inner.blocks.resize(geometry.blocks() as usize, 0);
        inner.geometry = geometry;
        inner.write(&[(last, rewritten)]);
    }
    fn read(&self, at: u64, buf: &mut [u8]) {
        let mut inner = self.lock();
        if let Some((reads, writes)) = inner.armed.take() {
            match reads.checked_sub(1) {
                Some(left) => inner.armed = Some((left, writes)),
                None => inner.write(&writes),
            }
        }
        let (size, length) = (u64::from(inner.geometry.block_size()), inner.geometry.length());
        let mut done = 0;
        let mut block_bytes = vec![0; size as usize];
        while done < buf.len() {
            let (block, within) = ((at + done as u64) / size, ((at + done as u64) % size) as usize);
            let len = size.min(length - block * size) as usize;
            bytes_of(inner.blocks[block as usize], &mut block_bytes[..len]);
            let n = (len - within).min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&block_bytes[within..within + n]);
            done += n;
        }
    }
    fn next_data(&self, from: u64) -> Option<Range<u64>> {
        let inner = self.lock();
        let size = u64::from(inner.geometry.block_size());
        let first = (from / size) as usize;
        let start = first + inner.blocks.get(first..)?.iter().position(|c| *c != 0)?;
        let end = start + inner.blocks[start..].iter().position(|c| *c == 0).unwrap_or(inner.blocks.len() - start);
        Some((start as u64 * size).max(from)..(end as u64 * size).min(inner.geometry.length()))
    }
}

impl Inner {
    fn write(&mut self, writes: &[Write]) {
        for (block, content) in writes {
            if let Some(held) = self.blocks.get_mut(*block) {
                *held = *content;
                self.log.push((*block, *content));
            }
        }
    }
}

/// A look at a volume, from its beginning.
#[derive(Clone)]
pub struct Begun {
    disk: Disk,
    blocks: Vec<Content>,
    geometry: Geometry,
    position: usize,
    watched: Watched,
}

impl Begun {
    fn new(disk: &Disk) -> Self {
        let inner = disk.lock();
        let (blocks, geometry, position) = (inner.blocks.clone(), inner.geometry, inner.log.len());
        Self { disk: disk.clone(), blocks, geometry, position, watched: Watched { from: tick(), until: None } }
    }
    /// What was there to be seen until now.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.disk.lock();
        let mut seen: Vec<BTreeSet<Content>> = self.blocks.iter().map(|c| [*c].into()).collect();
        for (block, content) in &inner.log[self.position..] {
            if let Some(seen) = seen.get_mut(*block) {
                seen.insert(*content);
            }
        }
        Snapshot { blocks: self.blocks.clone(), seen, geometry: self.geometry, watched: self.watched }
    }
}

/// The volumes of an agent, and the looks at them that a round has begun.
#[derive(Clone, Default)]
pub struct Disks {
    disks: Arc<Mutex<Vec<(VolumeId, Disk)>>>,
    begun: Arc<Mutex<Vec<(VolumeId, Begun)>>>,
}

impl Disks {
    /// Puts a disk in.
    pub fn set(&self, id: VolumeId, disk: Disk) {
        let mut disks = lock(&self.disks);
        disks.retain(|(i, _)| *i != id);
        disks.push((id, disk));
    }
    /// The disk of a volume.
    pub fn get(&self, id: VolumeId) -> Option<Disk> {
        lock(&self.disks).iter().find(|(i, _)| *i == id).map(|(_, d)| d.clone())
    }
    /// Nothing is written any more.
    pub fn disarm(&self) {
        lock(&self.disks).iter().for_each(|(_, d)| d.disarm());
    }
    /// A new round begins.
    pub fn forget_looks(&self) {
        lock(&self.begun).clear();
    }
    /// What the round that is under way could see.
    pub fn snapshots(&self) -> Vec<(VolumeId, Snapshot)> {
        lock(&self.begun).iter().map(|(id, begun)| (*id, begun.snapshot())).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct OpenDisk {
    disk: Disk,
    id: VolumeId,
    length: u64,
    begun: Arc<Mutex<Vec<(VolumeId, Begun)>>>,
}

impl Provider for Disks {
    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError> {
        let disk = self.get(volume.id).expect("every protected volume has a disk");
        let length = disk.geometry().length();
        Ok(Arc::new(OpenDisk { disk, id: volume.id, length, begun: self.begun.clone() }))
    }
}

impl Volume for OpenDisk {
    fn length(&self) -> u64 {
        self.length
    }
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        self.disk.read(at.0, buf);
        Ok(())
    }
    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        Ok(self.disk.next_data(from.0))
    }
    fn describe(&self) -> String {
        format!("simulated volume {}", self.id)
    }
}

struct Watch {
    disk: Disk,
    position: usize,
    id: VolumeId,
    begun: Arc<Mutex<Vec<(VolumeId, Begun)>>>,
}

impl Capture for OpenDisk {
    fn watch(&self) -> Box<dyn Watching> {
        let begun = Begun::new(&self.disk);
        let position = begun.position;
        let mut all = lock(&self.begun);
        all.retain(|(id, _)| *id != self.id);
        all.push((self.id, begun));
        Box::new(Watch { disk: self.disk.clone(), position, id: self.id, begun: self.begun.clone() })
    }
    fn recheck(&self) -> Result<(), VolumeError> {
        Ok(())
    }
    fn read_len(&self) -> usize {
        64 << 10
    }
}

impl Watching for Watch {
    fn has_moved(&self) -> bool {
        self.disk.lock().log.len() != self.position
    }
    fn caveats(&self) -> &[String] {
        &[]
    }
    fn finish(self: Box<Self>) -> Stability {
        if let Some((_, begun)) = lock(&self.begun).iter_mut().find(|(id, _)| *id == self.id) {
            begun.watched.until = Some(tick());
        }
        if self.disk.lock().log.len() == self.position {
            Stability::Still
        } else {
            Stability::Moved("it was written to".into())
        }
    }
}
