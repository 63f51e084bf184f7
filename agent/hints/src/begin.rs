//! Where tracking of a volume begins: with what is pinned of it, if nothing speaks against that, or anew.
//!
//! Read first: [`Tracker::track`].

use std::fs;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

use crate::device::{Device, Kind, kind, wait_for_writes};
use crate::doubt::{Doubt, TrackError};
use crate::layout::{self, Elements, head, slot};
use crate::sys;
use crate::tracker::{Inner, Tracker, gone, has_shape, volume_shape};
use crate::volume::{Map, Start, Subject, Tracked};
use crate::witness::{Verdict, Witness};

const SECTOR: u64 = 512;

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
        let witness = Witness::of(subject.dev, kind).ok_or(TrackError::Unsupported {
            device: device_name,
            why: "the kernel does not count what is written to it",
        })?;
        let (slot, map, start) = match inner.continued(subject, &device, elements, &witness) {
            Ok(Ok((slot, map))) => (slot, map, Start::Continued),
            Ok(Err(doubt)) => {
                let (slot, map) = inner.fresh(subject, &device, elements, kind, &witness)?;
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
        witness: &Witness,
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
    pub fn events_doubt(&self, map: &Map, slot: usize, witness: &Witness) -> Option<Doubt> {
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
            doubted(witness.glance(self.base(slot).load(SeqCst), || self.programs.seen(slot)))
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
        witness: &Witness,
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
        let path = self.volume_path(subject.volume);
        let new = self.folder.join("new-volume");
        gone(fs::remove_file(&new)).map_err(TrackError::io("remove a pin"))?;
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
        let base = witness.base(|| self.programs.seen(slot));
        let base = base.ok_or_else(|| TrackError::io("read what a disk counts")(ErrorKind::NotFound.into()))?;
        self.base(slot).store(base, SeqCst);
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

/// What the counts say against believing.
pub(crate) fn doubted(verdict: Verdict) -> Option<Doubt> {
    match verdict {
        Verdict::Complete | Verdict::Busy => None,
        Verdict::Unseen(sectors) => Some(Doubt::Unseen { sectors }),
        Verdict::Uncounted(sectors) => Some(Doubt::Uncounted { sectors }),
        Verdict::Gone => Some(Doubt::OtherDevice),
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
