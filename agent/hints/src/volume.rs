//! One volume: what is tracked of it, taking it, and when it is not to be believed.
//!
//! Read first: [`Tracker::track`], [`Tracked::take_into`] and [`Tracked::settle`].

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use backhaul_volume::sysfs::Dev;

use crate::blocks::Blocks;
use crate::doubt::{Doubt, TrackError};
use crate::layout::{self, ELEMENT, Elements, GROUP, head, slot};
use crate::sys::{self, Shared};
use crate::tracker::{Inner, Tracker, has_shape, volume_shape};
use crate::witness::Witness;

const SECTOR: u64 = 512;

/// The state of the caller's index that bits are counted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Baseline {
    /// The index. Another whenever it was made anew, copied or taken from a backup.
    pub epoch: [u8; 16],
    /// Grows with every point that is durable in the index.
    pub number: u64,
}

/// What to track.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// The caller's name for it.
    pub volume: [u8; 16],
    /// A whole disk or a partition.
    pub dev: Dev,
    /// Bytes: 16 KiB to 1 MiB, a power of two.
    pub block_size: u32,
    /// Bytes, as the caller found them: the device's own.
    pub length: u64,
    /// What the caller's index holds; `None` if it has to be filled by a full scan anyhow.
    pub baseline: Option<Baseline>,
}

/// What tracking begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Everything written since the baseline comes with the next take.
    Continued,
    /// Everything written from now on will be taken. What was written before is not known: scan in full.
    Fresh(Doubt),
}

/// What the kernel says of a device. All that must stay as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Device {
    disk: u32,
    /// 0 is not known (before kernel 5.15).
    sequence: u64,
    start: u64,
    sectors: u64,
}

impl Device {
    fn of(dev: Dev) -> Option<Self> {
        let whole = dev.whole();
        let number = |name: &str| dev.attribute(name)?.parse::<u64>().ok();
        let start = if dev == whole { 0 } else { number("start")? };
        // Sequence numbers begin at 1.
        let sequence = dev.sequence().unwrap_or(0);
        Some(Self { disk: layout::kernel_number(whole)?, sequence, start, sectors: number("size")? })
    }

    fn differs_from(&self, tracked: &Self) -> Option<Doubt> {
        if self.disk != tracked.disk || self.sequence != tracked.sequence {
            Some(Doubt::OtherDevice)
        } else if self.start != tracked.start {
            Some(Doubt::Moved)
        } else if self.sectors != tracked.sectors {
            Some(Doubt::Resized)
        } else {
            None
        }
    }
}

/// A tracked volume. Tracking goes on when this is dropped.
#[derive(Debug)]
pub struct Tracked {
    inner: Arc<Inner>,
    dev: Dev,
    device: Device,
    blocks: u64,
    slot: usize,
    map_id: u64,
    map: Map,
    witness: Option<Witness>,
    start: Start,
    /// Looks everywhere: a process before may have died between taking a bit of the summary and what it stands for.
    first_take: AtomicBool,
}

#[derive(Debug)]
struct Map {
    fd: OwnedFd,
    shared: Shared,
    elements: Elements,
}

impl Map {
    fn new(fd: OwnedFd, elements: Elements) -> io::Result<Self> {
        let shared = Shared::new(&fd, elements.all * ELEMENT * 8)?;
        Ok(Self { fd, shared, elements })
    }

    fn head(&self, word: usize) -> u64 {
        self.shared.word(word).load(SeqCst)
    }

    fn set_head(&self, word: usize, value: u64) {
        self.shared.word(word).store(value, SeqCst);
    }

    fn summary(&self, word: usize) -> &std::sync::atomic::AtomicU64 {
        self.shared.word(self.elements.summary * ELEMENT + word)
    }

    fn live(&self, word: usize) -> &std::sync::atomic::AtomicU64 {
        self.shared.word(self.elements.live * ELEMENT + word)
    }

    fn pending(&self, word: usize) -> &std::sync::atomic::AtomicU64 {
        self.shared.word(self.elements.pending * ELEMENT + word)
    }

    fn baseline(&self) -> Option<Baseline> {
        let at = *head::BASELINES.get((self.head(head::SELECTOR) as usize).wrapping_sub(1))?;
        let epoch = u128::from(self.head(at)) | u128::from(self.head(at + 1)) << 64;
        Some(Baseline { epoch: epoch.to_le_bytes(), number: self.head(at + 2) })
    }
}

impl Tracker {
    /// Tracks a volume from now on, and takes over what was tracked of it if nothing speaks against that.
    ///
    /// The pin of a volume is only as old as its last `Fresh`: call this again after any doubt, before the full scan.
    pub fn track(&self, subject: &Subject) -> Result<Tracked, TrackError> {
        let inner = &self.inner;
        let device_name = subject.dev.to_string();
        let device = Device::of(subject.dev)
            .ok_or_else(|| TrackError::Mismatch { device: device_name.clone(), why: "it is no longer there" })?;
        let kind = kind(subject.dev).map_err(|why| TrackError::Unsupported { device: device_name.clone(), why })?;
        if device.sectors.checked_mul(SECTOR) != Some(subject.length) || subject.length == 0 {
            return Err(TrackError::Mismatch { device: device_name, why: "its size is not what it was when opened" });
        }
        if !subject.block_size.is_power_of_two() || !(16 << 10..=1 << 20).contains(&subject.block_size) {
            return Err(TrackError::Mismatch { device: device_name, why: "blocks must be 16 KiB to 1 MiB" });
        }
        let _changing = inner.changing.lock().unwrap_or_else(|e| e.into_inner());
        let blocks = subject.length.div_ceil(u64::from(subject.block_size));
        let elements = Elements::of(blocks);
        // Devices without requests count before they tell, and some at other moments.
        let witness = if kind == Kind::Requests { Witness::of(subject.dev) } else { None };
        let (slot, map, start) = match inner.continued(subject, &device, elements, witness.as_ref()) {
            Ok(Ok((slot, map))) => (slot, map, Start::Continued),
            Ok(Err(doubt)) => {
                let (slot, map) = inner.fresh(subject, &device, elements, kind, witness.as_ref())?;
                (slot, map, Start::Fresh(doubt))
            }
            Err(error) => return Err(TrackError::Io { action: "open the pinned volume", error }),
        };
        let [_, id] = sys::info(&map.fd).map_err(TrackError::io("ask for a map's number"))?;
        let (inner, first_take) = (Arc::clone(inner), AtomicBool::new(true));
        Ok(Tracked {
            inner,
            dev: subject.dev,
            device,
            blocks,
            slot,
            map_id: id.into(),
            map,
            witness,
            start,
            first_take,
        })
    }
}

impl Inner {
    /// The pinned volume, or why it is not to be believed.
    fn continued(
        &self,
        subject: &Subject,
        device: &Device,
        elements: Elements,
        witness: Option<&Witness>,
    ) -> io::Result<Result<(usize, Map), Doubt>> {
        let pinned = match sys::pinned(&self.volume_path(subject.volume)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Err(self.lost.unwrap_or(Doubt::NoPin))),
            pinned => pinned?,
        };
        let [_, id, _, _, entries, _] = sys::info(&pinned)?;
        if !has_shape(&pinned, volume_shape(entries))? {
            return Ok(Err(Doubt::Damaged));
        }
        // For the head alone until it is known to fit.
        let map = Map::new(pinned, Elements { all: 1, ..elements })?;
        if let Some(doubt) = self.doubts_of_head(&map, subject, device, elements, entries)? {
            return Ok(Err(doubt));
        }
        let number = map.head(SLOT) as usize;
        if number >= layout::VOLUMES {
            return Ok(Err(Doubt::Damaged));
        }
        let linked = sys::map_get(&self.maps.volumes, number as u32).is_ok_and(|linked| linked == id);
        let listens = self.dev(number).load(SeqCst) == device.disk
            && self.slot(number, slot::MAP).load(SeqCst) == u64::from(id)
            && self.slots_of(subject.volume) == [number];
        if !linked || !listens {
            return Ok(Err(Doubt::Damaged));
        }
        let doubt = self.events_doubt(&map, number, witness).or_else(|| match (map.baseline(), subject.baseline) {
            (None, _) => Some(Doubt::Unfinished),
            // The index can be ahead: what was not settled for it is still in pending, and more than enough.
            (Some(pinned), Some(index)) if pinned.epoch == index.epoch && pinned.number <= index.number => None,
            _ => Some(Doubt::OtherBaseline),
        });
        match doubt {
            Some(doubt) => Ok(Err(doubt)),
            None => Ok(Ok((number, Map::new(map.fd, elements)?))),
        }
    }

    fn doubts_of_head(
        &self,
        map: &Map,
        subject: &Subject,
        device: &Device,
        elements: Elements,
        entries: u32,
    ) -> io::Result<Option<Doubt>> {
        let tracked = Device {
            disk: map.head(DISK) as u32,
            sequence: map.head(SEQUENCE),
            start: map.head(START),
            sectors: map.head(SECTORS),
        };
        let tracked_blocks = map.head(BLOCK_SIZE);
        Ok(if map.head(head::MAGIC) != layout::MAGIC || map.head(head::CHECKSUM) != fixed(map) {
            Some(Doubt::Damaged)
        } else if map.head(ABI) != layout::ABI {
            Some(Doubt::OtherVersion)
        } else if [map.head(VOLUME), map.head(VOLUME + 1)] != layout::halves(subject.volume) {
            Some(Doubt::Damaged)
        } else if map.head(head::STATE) != 1 {
            Some(Doubt::Unfinished)
        } else if [map.head(BOOT), map.head(BOOT + 1)] != self.boot {
            Some(Doubt::OtherBoot)
        } else if device.sequence == 0 {
            Some(Doubt::OtherDevice)
        } else if let Some(doubt) = device.differs_from(&tracked) {
            Some(doubt)
        } else if tracked_blocks != u64::from(subject.block_size) {
            Some(Doubt::BlockSize { tracked: tracked_blocks })
        } else if entries as usize != elements.all {
            Some(Doubt::Damaged)
        } else if map.head(GENERATION) != self.generation() {
            let replaced = self.table.word(layout::table::GAP).load(SeqCst) == 1;
            Some(if replaced { Doubt::ProgramReplaced } else { Doubt::ProgramGone })
        } else {
            None
        })
    }

    /// What the kernel counted. Opens no file, allocates nothing.
    fn events_doubt(&self, map: &Map, slot: usize, witness: Option<&Witness>) -> Option<Doubt> {
        // A program that cannot be asked is none.
        let Ok(missed) = self.missed() else { return Some(Doubt::ProgramGone) };
        // Less than before cannot be; it is not a reason to believe.
        let missed = missed.checked_sub(map.head(head::MISSED_SEEN)).unwrap_or(u64::MAX);
        let events = missed.saturating_add(map.head(head::LOST)).saturating_add(map.head(head::STRANGERS));
        let commands = map.head(head::COMMANDS);
        if events > 0 {
            Some(Doubt::Missed { events })
        } else if commands > 0 {
            Some(Doubt::Commands { commands })
        } else {
            self.unseen(map, slot, witness).map(|sectors| Doubt::Unseen { sectors })
        }
    }

    /// Sectors that the block layer counted and programs did not see.
    fn unseen(&self, map: &Map, slot: usize, witness: Option<&Witness>) -> Option<u64> {
        let mut unseen = None;
        // Read in this order, seen is never behind; on machines that reorder memory accesses it may be for a moment.
        for _ in 0..8 {
            let counted = witness?.counted()?.wrapping_sub(map.head(head::COUNTED_BEFORE));
            let seen = self.seen(slot).wrapping_sub(map.head(head::SEEN_BEFORE));
            unseen = counted.checked_sub(seen).filter(|more| *more > 0 && counted < 1 << 63);
            unseen?;
            std::thread::yield_now();
        }
        unseen
    }

    /// Where both counts begin: at a moment without writes, or the shortest that can be had, since what is written
    /// between the two readings could later hide as much that was lost.
    fn begin_count(&self, map: &Map, slot: usize, witness: &Witness) {
        let mut best = u64::MAX;
        // Arbitrary: 40 ms at most.
        for _ in 0..20 {
            let before = self.seen(slot);
            // For requests that were seen and are not yet counted.
            std::thread::sleep(Duration::from_millis(2));
            let Some(counted) = witness.counted() else { return };
            let between = self.seen(slot) - before;
            if between < best {
                best = between;
                map.set_head(head::SEEN_BEFORE, before);
                map.set_head(head::COUNTED_BEFORE, counted);
            }
            if best == 0 {
                return;
            }
        }
    }

    fn generation(&self) -> u64 {
        self.table.word(layout::table::GENERATION).load(SeqCst)
    }

    /// A new map in a slot of its own, pinned over the one before. Whatever dies between two steps, the next process
    /// finds either the old pin, which no longer has its slot, or a new one without a baseline: it begins anew.
    fn fresh(
        &self,
        subject: &Subject,
        device: &Device,
        elements: Elements,
        kind: Kind,
        witness: Option<&Witness>,
    ) -> Result<(usize, Map), TrackError> {
        let entries = u32::try_from(elements.all).map_err(|_| TrackError::Full)?;
        let fd = sys::map_create("backhaul_vol", volume_shape(entries), None)
            .map_err(TrackError::io("make a volume's map"))?;
        let [_, id] = sys::info(&fd).map_err(TrackError::io("ask for a map's number"))?;
        let map = Map::new(fd, elements).map_err(TrackError::io("map memory"))?;
        let old = self.slots_of(subject.volume);
        for &slot in &old {
            self.release(slot);
            self.slot(slot, slot::MAP).store(0, SeqCst);
        }
        crate::reach("hints.track.released");
        let slot = old.first().copied().or_else(|| self.free_slot()).ok_or(TrackError::Full)?;
        // Waits for programs that may still look at what the slot was.
        sys::map_put(&self.maps.volumes, slot as u32, &map.fd).map_err(TrackError::io("fill a slot"))?;
        crate::reach("hints.track.put");
        self.write_slot(slot, subject, device, elements, kind, id);
        write_head(&map, self, subject, device, slot);
        crate::reach("hints.track.head");
        let (path, new) = (self.volume_path(subject.volume), self.volume_path(subject.volume).with_extension_name());
        crate::tracker::gone(fs::remove_file(&new)).map_err(TrackError::io("remove a pin"))?;
        sys::pin(&map.fd, &new).map_err(TrackError::io("pin a volume's map"))?;
        crate::reach("hints.track.pinned");
        fs::rename(&new, &path).map_err(TrackError::io("pin a volume's map"))?;
        crate::reach("hints.track.renamed");
        self.activate(slot, device.disk);
        crate::reach("hints.track.active");
        // Once more, for its wait: from when this returns, every program that runs sees the slot.
        sys::map_put(&self.maps.volumes, slot as u32, &map.fd).map_err(TrackError::io("fill a slot"))?;
        if kind == Kind::Bios {
            wait_for_writes(subject.dev);
        }
        if let Some(witness) = witness {
            self.begin_count(&map, slot, witness);
        }
        let missed = self.missed().map_err(TrackError::io("count missed events"))?;
        map.set_head(head::MISSED_SEEN, missed);
        // What was under way before is not in any bit, nor has it to be.
        map.set_head(head::STRANGERS, 0);
        map.set_head(head::STATE, 1);
        crate::reach("hints.track.done");
        Ok((slot, map))
    }

    fn write_slot(&self, at: usize, subject: &Subject, device: &Device, elements: Elements, kind: Kind, id: u32) {
        let [low, high] = layout::halves(subject.volume);
        let shift = u64::from((u64::from(subject.block_size) / SECTOR).trailing_zeros());
        let words = [
            (slot::START, device.start),
            (slot::END, device.start + device.sectors),
            (slot::SHIFT_LIVE, shift | (elements.live as u64) << 32),
            (slot::KIND, u64::from(kind == Kind::Bios)),
            (slot::VOLUME, low),
            (slot::VOLUME + 1, high),
            (slot::MAP, id.into()),
        ];
        words.into_iter().for_each(|(word, value)| self.slot(at, word).store(value, SeqCst));
    }
}

// Words of the head that do not change.
const ABI: usize = 1;
const VOLUME: usize = 2;
const BLOCK_SIZE: usize = 4;
const DISK: usize = 5;
const SEQUENCE: usize = 6;
const START: usize = 7;
const SECTORS: usize = 8;
const BOOT: usize = 9;
const GENERATION: usize = 11;
const SLOT: usize = 12;

fn write_head(map: &Map, inner: &Inner, subject: &Subject, device: &Device, slot: usize) {
    let [low, high] = layout::halves(subject.volume);
    let words = [
        (head::MAGIC, layout::MAGIC),
        (ABI, layout::ABI),
        (VOLUME, low),
        (VOLUME + 1, high),
        (BLOCK_SIZE, subject.block_size.into()),
        (DISK, device.disk.into()),
        (SEQUENCE, device.sequence),
        (START, device.start),
        (SECTORS, device.sectors),
        (BOOT, inner.boot[0]),
        (BOOT + 1, inner.boot[1]),
        (GENERATION, inner.generation()),
        (SLOT, slot as u64),
    ];
    words.into_iter().for_each(|(word, value)| map.set_head(word, value));
    map.set_head(head::CHECKSUM, fixed(map));
}

fn fixed(map: &Map) -> u64 {
    layout::checksum(head::FIXED.map(|word| map.head(word)))
}

trait NewName {
    fn with_extension_name(self) -> Self;
}

impl NewName for std::path::PathBuf {
    fn with_extension_name(self) -> Self {
        let name = self.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        self.with_file_name(format!("new-{name}"))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Requests,
    Bios,
}

/// How a disk tells that a write is done; why it does not, or not surely.
fn kind(dev: Dev) -> Result<Kind, &'static str> {
    let whole = dev.whole();
    let has = |name: &str| whole.attribute(name).is_some();
    if whole.attribute("queue/zoned").is_some_and(|z| z != "none") {
        return Err("it is zoned");
    }
    if whole.attribute("queue/dax").as_deref() == Some("1") {
        return Err("programs can write to it without the kernel's block layer (DAX)");
    }
    if has("mq/0/cpu_list") {
        return Ok(Kind::Requests);
    }
    let is_zram = whole.name().is_some_and(|n| n.starts_with("zram"));
    // The other levels hand on what they are given, and are not told when it is done.
    let is_raid =
        whole.attribute("md/level").is_some_and(|l| ["raid1", "raid4", "raid5", "raid6", "raid10"].contains(&&*l));
    if is_zram || is_raid || has("dm/name") {
        return Ok(Kind::Bios);
    }
    Err("its driver is not known to tell of every write that is done (NVMe multipath, RAID 0 and others)")
}

/// Gives writes that were submitted before the device was tracked time to end: programs would take them for
/// strangers, which means another full scan.
fn wait_for_writes(dev: Dev) {
    // Arbitrary; longer than writes usually take.
    for _ in 0..100 {
        if dev.whole().writes_in_flight().is_none_or(|n| n == 0) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Tracked {
    /// Whether what was written before can be relied upon.
    pub fn start(&self) -> Start {
        self.start
    }

    /// Blocks of the volume: the last may be shorter than the others.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// [`Tracked::take_into`] with memory of its own.
    pub fn take(&self) -> Result<Blocks, Doubt> {
        let mut blocks = Blocks::none(self.blocks);
        self.take_into(&mut blocks)?;
        Ok(blocks)
    }

    /// Adds the blocks that were written since the last take and gives their number. They are now pending until they
    /// are [settled](Tracked::settle), in this process or a later one. The first take after [`Tracker::track`] begins
    /// with what earlier processes took and did not settle.
    ///
    /// A block that is read after this returns is read as it was, or newer and then taken again. Neither allocates nor
    /// touches a file nor faults, so that it can be used while file systems are frozen. For one thread at a time: what
    /// another one is taking is not seen.
    pub fn take_into(&self, out: &mut Blocks) -> Result<u64, Doubt> {
        assert!(out.capacity() == self.blocks, "a set of another volume's blocks");
        let first = self.first_take.load(SeqCst);
        let mut taken = 0;
        for word in 0..self.map.elements.groups.div_ceil(64) {
            let summary = self.map.summary(word);
            let mut groups = summary.load(SeqCst);
            // The summary's bit first: a program sets it after the blocks' own.
            if groups != 0 {
                groups = summary.swap(0, SeqCst);
                crate::reach("hints.take.summary");
            }
            if first {
                groups = u64::MAX;
            }
            while groups != 0 {
                let group = word * 64 + groups.trailing_zeros() as usize;
                groups &= groups - 1;
                if group < self.map.elements.groups {
                    taken += self.take_group(group, first, out);
                }
            }
        }
        self.first_take.store(false, SeqCst);
        self.doubt().map_or(Ok(taken), Err)
    }

    fn take_group(&self, group: usize, with_pending: bool, out: &mut Blocks) -> u64 {
        let mut taken = 0;
        let first = group * (GROUP / 64) as usize;
        for word in first..first + ELEMENT {
            let mut bits = self.map.live(word).load(SeqCst);
            if bits != 0 {
                // In this order: a process that dies between the two leaves them in both.
                self.map.pending(word).fetch_or(bits, SeqCst);
                crate::reach("hints.take.pending");
                self.map.live(word).fetch_and(!bits, SeqCst);
                crate::reach("hints.take.live");
            }
            if with_pending {
                bits |= self.map.pending(word).load(SeqCst);
            }
            taken += u64::from(bits.count_ones());
            if let Some(out) = out.words_mut().get_mut(word) {
                *out |= bits;
            }
        }
        taken
    }

    /// Whether a take would find nothing, as far as it was seen; ask for [doubts](Tracked::doubt) too. As cheap as looking
    /// can be, and fit for a freeze as a take is.
    pub fn is_clean(&self) -> bool {
        if self.first_take.load(SeqCst) {
            let mut words = 0..self.map.elements.groups * ELEMENT;
            return words.all(|word| self.map.live(word).load(SeqCst) | self.map.pending(word).load(SeqCst) == 0);
        }
        (0..self.map.elements.groups.div_ceil(64)).all(|word| self.map.summary(word).load(SeqCst) == 0)
    }

    /// All that was taken and not settled, by earlier processes too.
    pub fn unsettled(&self) -> Blocks {
        let mut blocks = Blocks::none(self.blocks);
        for (index, word) in blocks.words_mut().iter_mut().enumerate() {
            *word = self.map.pending(index).load(Relaxed);
        }
        blocks
    }

    /// To be called when the point that read these blocks is committed and the index that holds it durable.
    ///
    /// `read` must hold only blocks that were read after the last take that named them: one that was taken again after
    /// it was read stays unsettled. What is not in `read` stays as well. The baseline is recorded first: an index that
    /// is older than it begins anew rather than miss what is cleared here. After [`Start::Fresh`] the first settle says
    /// that the full scan is done.
    pub fn settle(&self, read: &Blocks, baseline: Baseline) {
        assert!(read.capacity() == self.blocks, "a set of another volume's blocks");
        let selector = if self.map.head(head::SELECTOR) == 1 { 2 } else { 1 };
        let at = head::BASELINES[selector as usize - 1];
        let [low, high] = layout::halves(baseline.epoch);
        [low, high, baseline.number].into_iter().enumerate().for_each(|(i, word)| self.map.set_head(at + i, word));
        crate::reach("hints.settle.written");
        self.map.set_head(head::SELECTOR, selector);
        crate::reach("hints.settle.recorded");
        for (index, word) in read.words().iter().enumerate().filter(|(_, word)| **word != 0) {
            self.map.pending(index).fetch_and(!word, SeqCst);
            crate::reach("hints.settle.cleared");
        }
    }

    /// What was settled last.
    pub fn baseline(&self) -> Option<Baseline> {
        self.map.baseline()
    }

    /// Whether writes were missed, or tracking ended. Four system calls and a look at memory: fit for a
    /// freeze, in which nothing that was lost can hide.
    pub fn doubt(&self) -> Option<Doubt> {
        let listens = self.inner.dev(self.slot).load(SeqCst) == self.device.disk
            && self.inner.slot(self.slot, slot::MAP).load(SeqCst) == self.map_id;
        let doubt = || self.inner.events_doubt(&self.map, self.slot, self.witness.as_ref());
        if listens { doubt() } else { Some(Doubt::NoPin) }
    }

    /// Whether it is still the device that it was. Reads files in /sys: not for a freeze.
    pub fn device_doubt(&self) -> Option<Doubt> {
        Device::of(self.dev).map_or(Some(Doubt::OtherDevice), |now| now.differs_from(&self.device))
    }
}
