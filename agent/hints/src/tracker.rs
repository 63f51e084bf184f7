//! Opening what is pinned, or beginning anew; the table of volumes.
//!
//! Read first: [`Tracker::open`].

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};

use crate::bases::move_bases;
use crate::doubt::{Doubt, TrackError, Unavailable};
use crate::layout::{self, ELEMENT, table};
use crate::programs::{self, Maps, OBJECT, Programs};
use crate::sys::{self, INNER, MAPPABLE, MapKind, MapShape, Shared};

const BPFFS: &str = "/sys/fs/bpf";
const BPFFS_MAGIC: u32 = 0xcafe_4a11;

const TABLE: MapShape =
    MapShape { kind: MapKind::Array, key: 4, value: layout::TABLE as u32, entries: 1, flags: MAPPABLE };
const VOLUMES: MapShape =
    MapShape { kind: MapKind::ArrayOfMaps, key: 4, value: 4, entries: layout::VOLUMES as u32, flags: 0 };
const FLIGHTS: MapShape = MapShape { kind: MapKind::Hash, key: 8, value: 16, entries: layout::FLIGHTS, flags: 0 };

/// A volume's map of this many elements.
pub(crate) const fn volume_shape(elements: u32) -> MapShape {
    MapShape { kind: MapKind::Array, key: 4, value: 8 * ELEMENT as u32, entries: elements, flags: MAPPABLE | INNER }
}

/// Where an agent keeps its pins.
#[derive(Clone, Debug)]
pub struct Options {
    /// A folder in a BPF file system; made if it is not there.
    pub pin: PathBuf,
    /// The agent's state, which has a folder of its own below: agents with other states never meet. The caller sees to
    /// it that only one process at a time has a state open.
    pub owner: [u8; 16],
}

impl Options {
    /// In the usual place.
    pub fn new(owner: [u8; 16]) -> Self {
        Self { pin: Path::new(BPFFS).join("backhaul"), owner }
    }
}

/// One agent's programs, loaded, running and pinned. They go on when this is dropped; see [`Tracker::remove`].
#[derive(Clone, Debug)]
pub struct Tracker {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub folder: PathBuf,
    pub table: Shared,
    pub maps: Maps,
    pub programs: Programs,
    pub missed_before: u64,
    /// Which record holds.
    pub bank: usize,
    pub boot: [u64; 2],
    /// Why nothing that was pinned could be used; `None` if it could, or nothing was.
    pub lost: Option<Doubt>,
    /// Held while slots change.
    pub changing: Mutex<()>,
}

impl Tracker {
    /// Takes over what an agent with this state pinned, or begins anew. Mounts a BPF file system at /sys/fs/bpf if
    /// there is none. If the program is another version's, the new one runs before the old one ends.
    pub fn open(options: &Options) -> Result<Self, Unavailable> {
        Self::open_with(options, OBJECT)
    }

    /// [`Tracker::open`] with another object, as if that were this version's.
    #[doc(hidden)]
    pub fn open_with(options: &Options, object: &[u8]) -> Result<Self, Unavailable> {
        // Before anything is made: whether we may.
        sys::map_create("backhaul_try", MapShape { flags: 0, entries: 1, value: 8, ..TABLE }, None)
            .map_err(Unavailable::io("make a BPF map"))?;
        let folder = options.pin.join(hex(options.owner));
        in_bpffs(&options.pin)?;
        make_folder(&folder).map_err(Unavailable::io("make a folder in bpffs"))?;
        let boot = boot_id().map_err(Unavailable::io("read the boot id"))?;
        let (found, lost) = match existing(&folder, boot).map_err(Unavailable::io("open the pinned maps"))? {
            Ok(found) => (Some(found), None),
            Err(doubt) => (None, doubt),
        };
        let (maps, shared) = match found {
            Some(found) => found,
            None => begin(&folder, boot)?,
        };
        let (programs, missed_before, bank) = run(&folder, &maps, &shared, object)?;
        let changing = Mutex::new(());
        let inner = Inner { folder, table: shared, maps, programs, missed_before, bank, boot, lost, changing };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The volumes that are pinned. Those that are no longer protected are to be [forgotten](Tracker::forget).
    pub fn volumes(&self) -> io::Result<Vec<[u8; 16]>> {
        let names = fs::read_dir(&self.inner.folder)?.map(|entry| Ok(entry?.file_name()));
        let names: Vec<_> = names.collect::<io::Result<_>>()?;
        Ok(names.iter().filter_map(|n| unhex(n.to_str()?.strip_prefix("volume-")?)).collect())
    }

    /// Ends the tracking of a volume and removes its pin. What is still open of it says [`Doubt::NoPin`].
    pub fn forget(&self, volume: [u8; 16]) -> Result<(), TrackError> {
        let _changing = self.inner.changing.lock().unwrap_or_else(|e| e.into_inner());
        for slot in self.inner.slots_of(volume) {
            self.inner.release(slot);
            match sys::map_remove(&self.inner.maps.volumes, slot as u32) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(TrackError::io("empty a slot")(e)),
                _ => crate::reach("hints.forget.slot"),
            }
            self.inner.slot(slot, layout::slot::MAP).store(0, SeqCst);
        }
        gone(fs::remove_file(self.inner.volume_path(volume))).map_err(TrackError::io("remove a pin"))
    }

    /// Ends all tracking and removes all pins of this agent.
    pub fn remove(self) -> io::Result<()> {
        wipe(&self.inner.folder)?;
        gone(fs::remove_dir(&self.inner.folder))
    }

    /// Events that the kernel did not hand over since the programs were first loaded.
    pub fn missed(&self) -> io::Result<u64> {
        self.inner.missed()
    }
}

impl Inner {
    pub fn missed(&self) -> io::Result<u64> {
        Ok(self.missed_before + self.programs.missed()?)
    }

    pub fn volume_path(&self, volume: [u8; 16]) -> PathBuf {
        self.folder.join(format!("volume-{}", hex(volume)))
    }

    pub fn slot(&self, slot: usize, word: usize) -> &std::sync::atomic::AtomicU64 {
        self.table.word(table::SLOTS + slot * layout::slot::WORDS + word)
    }

    /// By how many sectors what programs saw is ahead of what the block layer counts.
    pub fn base(&self, slot: usize) -> &std::sync::atomic::AtomicU64 {
        self.table.word(table::BASES[self.bank] + slot)
    }

    /// The number of the disk that a slot listens to; 0 is none.
    pub fn dev(&self, slot: usize) -> &std::sync::atomic::AtomicU32 {
        self.table.half(table::DEV + slot)
    }

    pub fn slots_of(&self, volume: [u8; 16]) -> Vec<usize> {
        let [low, high] = layout::halves(volume);
        let is = |s: &usize| {
            self.slot(*s, layout::slot::MAP).load(SeqCst) != 0
                && self.slot(*s, layout::slot::VOLUME).load(SeqCst) == low
                && self.slot(*s, layout::slot::VOLUME + 1).load(SeqCst) == high
        };
        (0..layout::VOLUMES).filter(is).collect()
    }

    /// One that programs neither look at nor, by now, have looked at before.
    pub fn free_slot(&self) -> Option<usize> {
        (0..layout::VOLUMES)
            .find(|s| self.dev(*s).load(SeqCst) == 0 && self.slot(*s, layout::slot::MAP).load(SeqCst) == 0)
    }

    /// Has programs no longer look at a slot.
    pub fn release(&self, slot: usize) {
        self.dev(slot).store(0, SeqCst);
        self.recount();
    }

    /// Has programs look at a slot, whose every other word is written.
    pub fn activate(&self, slot: usize, dev: u32) {
        self.dev(slot).store(dev, SeqCst);
        self.recount();
    }

    fn recount(&self) {
        let active = |s: &usize| self.dev(*s).load(SeqCst) != 0;
        let count = (0..layout::VOLUMES).rev().find(active).map_or(0, |last| last + 1);
        let bios = (0..count).filter(active).filter(|s| self.slot(*s, layout::slot::KIND).load(SeqCst) == 1).count();
        self.table.half(table::COUNT).store(count as u32, SeqCst);
        self.table.half(table::BIOS).store(bios as u32, SeqCst);
    }
}

/// The folder's maps; why they cannot be used, `None` if there are none.
fn existing(folder: &Path, boot: [u64; 2]) -> io::Result<Result<(Maps, Shared), Option<Doubt>>> {
    let open = |name: &str, shape: MapShape| match sys::pinned(&folder.join(name)) {
        Ok(map) => Ok(has_shape(&map, shape)?.then_some(map)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    };
    // Written and pinned last, removed first.
    let Some(map) = open("table", TABLE)? else {
        return Ok(Err(folder.join("table").exists().then_some(Doubt::OtherVersion)));
    };
    let shared = Shared::new(&map, layout::TABLE)?;
    let word = |at: usize| shared.word(at).load(SeqCst);
    if word(table::MAGIC) != layout::MAGIC {
        return Ok(Err(Some(Doubt::Damaged)));
    }
    if word(table::ABI) != layout::ABI {
        return Ok(Err(Some(Doubt::OtherVersion)));
    }
    if [word(table::BOOT), word(table::BOOT + 1)] != boot {
        return Ok(Err(Some(Doubt::OtherBoot)));
    }
    Ok(match (open("volumes", VOLUMES)?, open("flights", FLIGHTS)?) {
        (Some(volumes), Some(flights)) => Ok((Maps { table: map, volumes, flights }, shared)),
        _ => Err(Some(Doubt::Damaged)),
    })
}

/// Whether a map is as we make it.
pub(crate) fn has_shape(map: impl AsFd, shape: MapShape) -> io::Result<bool> {
    let [kind, _, key, value, entries, flags] = sys::info(map)?;
    Ok([kind, key, value, entries, flags] == [shape.kind as u32, shape.key, shape.value, shape.entries, shape.flags])
}

/// Makes and pins the maps.
fn begin(folder: &Path, boot: [u64; 2]) -> Result<(Maps, Shared), Unavailable> {
    let make = |name, shape, inner: Option<&OwnedFd>| {
        sys::map_create(name, shape, inner.map(AsFd::as_fd)).map_err(Unavailable::io("make a BPF map"))
    };
    let pin = |map: &OwnedFd, name: &str| {
        sys::pin(map, &folder.join(name)).map_err(Unavailable::io("pin a map"))?;
        crate::reach("hints.open.pinned");
        Ok::<_, Unavailable>(())
    };
    wipe(folder).map_err(Unavailable::io("remove old pins"))?;
    let volumes = make("backhaul_vols", VOLUMES, Some(&make("backhaul_vol", volume_shape(1), None)?))?;
    let flights = make("backhaul_io", FLIGHTS, None)?;
    let map = make("backhaul_table", TABLE, None)?;
    let shared = Shared::new(&map, layout::TABLE).map_err(Unavailable::io("map memory"))?;
    shared.word(table::ABI).store(layout::ABI, SeqCst);
    shared.word(table::BOOT).store(boot[0], SeqCst);
    shared.word(table::BOOT + 1).store(boot[1], SeqCst);
    shared.word(table::SELECTOR).store(u64::MAX, SeqCst);
    shared.word(table::MAGIC).store(layout::MAGIC, SeqCst);
    pin(&volumes, "volumes")?;
    pin(&flights, "flights")?;
    pin(&map, "table")?;
    Ok((Maps { table: map, volumes, flights }, shared))
}

/// Sees to it that this version's programs run; with them what was missed by those before.
fn run(folder: &Path, maps: &Maps, shared: &Shared, object: &[u8]) -> Result<(Programs, u64, usize), Unavailable> {
    let selector = shared.word(table::SELECTOR).load(SeqCst) as usize;
    let record = table::RECORDS.get(selector).copied();
    let word = |at: usize| record.map_or(0, |r| shared.word(r + at).load(SeqCst));
    let set = |n: u64| folder.join(format!("set-{n}"));
    let ids = [word(table::IDS), word(table::IDS + 1), word(table::IDS + 2), word(table::IDS + 3)];
    let old = match record {
        None => Err(Doubt::NoPin),
        Some(_) => recorded(&set(word(table::SET)), ids),
    };
    let build = programs::build(object);
    tidy(folder, record.map(|_| word(table::SET))).map_err(Unavailable::io("remove old programs"))?;
    let old = match old {
        Ok(old) if word(table::BUILD) == build => return Ok((old, word(table::MISSED_BEFORE), selector)),
        Ok(old) => Some(old),
        Err(gap) => {
            // First of all: from here on nobody believes what was tracked before.
            let generation = random().map_err(Unavailable::io("draw a random number"))?;
            shared.word(table::GAP).store(u64::from(gap == Doubt::ProgramReplaced), SeqCst);
            shared.word(table::GENERATION).store(generation, SeqCst);
            crate::reach("hints.open.generation");
            None
        }
    };
    let number = word(table::SET) + 1;
    let new = Programs::load(object, maps, &set(number))?;
    crate::reach("hints.open.loaded");
    // Now that the new ones run: whatever the old ones miss from here on, these see.
    let missed = old.as_ref().map_or(Ok(0), Programs::missed).map_err(Unavailable::io("count missed events"))?;
    let missed = word(table::MISSED_BEFORE) + missed;
    let next = usize::from(selector == 0);
    if let Some(old) = &old {
        move_bases(shared, (old, selector), (&new, next));
    }
    let ids = new.ids().map_err(Unavailable::io("ask for a program's number"))?;
    let words = [build, number, missed].into_iter().chain(ids);
    words.enumerate().for_each(|(i, w)| shared.word(table::RECORDS[next] + i).store(w, SeqCst));
    shared.word(table::SELECTOR).store(next as u64, SeqCst);
    crate::reach("hints.open.recorded");
    tidy(folder, Some(number)).map_err(Unavailable::io("remove old programs"))?;
    Ok((new, missed, next))
}

/// The programs of a folder, if they are those that were recorded: then they have run ever since, for a link cannot be
/// taken from its program or tracepoint, only removed.
fn recorded(folder: &Path, ids: [u64; layout::IDS]) -> Result<Programs, Doubt> {
    let programs = Programs::pinned(folder).map_err(|_| Doubt::ProgramGone)?;
    match programs.ids() {
        Ok(found) if found == ids => Ok(programs),
        _ => Err(Doubt::ProgramReplaced),
    }
}

/// Removes all sets of programs but one.
fn tidy(folder: &Path, keep: Option<u64>) -> io::Result<()> {
    let keep = keep.map(|n| format!("set-{n}"));
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("set-") && name.to_str() != keep.as_deref() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// Empties a folder, the table first: without it nothing else is believed.
fn wipe(folder: &Path) -> io::Result<()> {
    gone(fs::remove_file(folder.join("table")))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }?;
    }
    Ok(())
}

fn in_bpffs(pin: &Path) -> Result<(), Unavailable> {
    let is_bpffs = || {
        let there = pin.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        rustix::fs::statfs(there).is_ok_and(|s| s.f_type == BPFFS_MAGIC.into())
    };
    let no = |error: io::Error| Unavailable::NoBpfFs { path: pin.to_owned(), error };
    if is_bpffs() {
        return Ok(());
    }
    if !pin.starts_with(BPFFS) {
        return Err(no(io::Error::other("it is not in a BPF file system")));
    }
    let flags =
        rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("bpf", BPFFS, "bpf", flags, None).map_err(|e| no(e.into()))?;
    if is_bpffs() { Ok(()) } else { Err(no(io::Error::other("mounted, and it is still not there"))) }
}

fn make_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

fn boot_id() -> io::Result<[u64; 2]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().replace('-', "");
    unhex(&text).map(layout::halves).ok_or_else(|| io::Error::other("it is not a UUID"))
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

pub(crate) fn gone(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// Names in bpffs must not have dots.
fn hex(id: [u8; 16]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes))?
}
