//! Finds every superblock on a set of devices. Read first: [`superblocks`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use backhaul_volume::frozen::btrfs_id;
use backhaul_volume::sysfs::{Dev, all_devices};

use crate::found::{Found, NotFreezable, Superblock, Swap, WhyNot};
use crate::mounts::{self, Mount, Tables, open_device};
use crate::spread;

/// Types with a `freeze_fs` in Linux 6.18 or an earlier one that is still in use.
const FREEZABLE: &[&str] =
    &["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gfs2", "jfs", "nilfs2", "reiserfs", "xfs"];
/// An image in an image in an image: arbitrary, against a circle.
const LEVELS: u32 = 8;

/// What lies on these devices, on their partitions, on what is built on those (LVM, RAID, dm-crypt, loop devices), and
/// in images on file systems found so.
///
/// A picture of the moment: what is mounted later is not in it. Needs root, and CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH
/// for mount namespaces of others; `caveats` says what could not be seen.
pub fn superblocks(devices: &[Dev]) -> io::Result<Found> {
    Ok(find(devices)?.0)
}

/// The devices of a protected volume: the block device itself, or the loop devices that an image file is attached to.
pub fn devices_of(path: &Path) -> io::Result<Vec<Dev>> {
    if let Some(dev) = Dev::of_path(path) {
        return Ok(vec![dev]);
    }
    let meta = std::fs::metadata(path)?;
    let file = (Dev::from_rdev(meta.dev()), meta.ino());
    Ok(spread::loops().into_iter().filter(|l| l.file == file).map(|l| l.device).collect())
}

/// With a file or folder of each superblock, open for reading.
pub(crate) fn find(devices: &[Dev]) -> io::Result<(Found, Vec<OwnedFd>)> {
    let tables = mounts::tables()?;
    let mut search = Search::new(&tables);
    search.climb(devices);
    search.report(devices)
}

struct Search<'a> {
    tables: &'a Tables,
    /// Mounts of one superblock, by its number, and the devices that it lies on.
    groups: BTreeMap<Dev, (Vec<&'a Mount>, Vec<Dev>)>,
    loops: Vec<spread::LoopFile>,
    /// Everything that is built on what was asked for, and how many file systems lie between.
    levels: BTreeMap<Dev, u32>,
    caveats: BTreeSet<String>,
}

impl<'a> Search<'a> {
    fn new(tables: &'a Tables) -> Self {
        let mut by_dev: BTreeMap<Dev, Vec<&Mount>> = BTreeMap::new();
        for mount in &tables.mounts {
            by_dev.entry(mount.dev).or_default().push(mount);
        }
        let with_devices = |mounts: Vec<&'a Mount>| (spread::devices(&mounts), mounts);
        let groups = by_dev.into_iter().map(|(dev, mounts)| (dev, with_devices(mounts)));
        let groups = groups.filter(|(_, (devices, _))| !devices.is_empty());
        let groups = groups.map(|(dev, (devices, mounts))| (dev, (mounts, devices))).collect();
        Self { tables, groups, loops: spread::loops(), levels: BTreeMap::new(), caveats: BTreeSet::new() }
    }

    /// Fills `levels`, from below.
    fn climb(&mut self, devices: &[Dev]) {
        let mut next = devices.to_vec();
        for level in 0..=LEVELS {
            let above: Vec<Dev> = next.iter().flat_map(Dev::above).collect();
            for dev in above {
                self.levels.insert(dev, level);
            }
            next = self.on_loops(level);
            if next.is_empty() {
                return;
            }
        }
        self.caveats
            .insert(format!("Images lie in images more than {LEVELS} deep; what is further in was not looked at."));
    }

    /// Loop devices on devices or file systems of this level.
    fn on_loops(&mut self, level: u32) -> Vec<Dev> {
        let here = |d: &Dev| self.levels.get(d) == Some(&level);
        let groups: Vec<_> = self.groups.iter().filter(|(_, (_, devices))| devices.iter().any(here)).collect();
        let btrfs = groups.iter().filter(|(_, (mounts, _))| mounts[0].kind == "btrfs");
        let btrfs: Vec<_> = btrfs.filter_map(|(_, (_, devices))| spread::btrfs_of(*devices.first()?)).collect();
        let (mut found, mut caveats) = (Vec::new(), Vec::new());
        for on in &self.loops {
            let by_number = groups.iter().any(|(dev, _)| **dev == on.file.0);
            // A file on a btrfs has a subvolume's number, which no mount table has.
            let by_path = !by_number && !btrfs.is_empty() && on.file.0.numbers().0 == 0 && {
                let of = on.btrfs();
                if of.is_none() && !self.tables.mounts.iter().any(|m| m.dev == on.file.0) {
                    caveats.push(format!(
                        "It cannot be told whether the file of {} lies on a protected btrfs.",
                        on.device
                    ));
                }
                of.is_some_and(|id| btrfs.contains(&id))
            };
            if by_number || by_path {
                found.push(on.device);
            }
        }
        // Loop devices do not claim the device that they lie on.
        let disks = all_devices().into_iter().filter(|d| d.partition_number().is_none() && d.loop_backing().is_some());
        found.extend(disks.filter(|d| d.below().iter().skip(1).any(here)));
        self.caveats.extend(caveats);
        found
    }

    fn report(mut self, asked: &[Dev]) -> io::Result<(Found, Vec<OwnedFd>)> {
        let mut found = Found::default();
        let mut opened = Vec::new();
        let mut used = BTreeSet::new();
        for (mounts, devices) in self.groups.values() {
            let Some(level) = devices.iter().filter_map(|d| self.levels.get(d)).max() else { continue };
            used.extend(devices.iter().copied());
            let superblock = self.describe(asked, mounts, devices, *level);
            let why = if FREEZABLE.contains(&superblock.kind.as_str()) {
                match open_any(mounts, devices) {
                    Some(fd) => {
                        opened.push((superblock, fd));
                        continue;
                    }
                    None => WhyNot::Unreachable,
                }
            } else {
                WhyNot::Kind
            };
            let Superblock { kind, devices, mounts, .. } = superblock;
            found.not_freezable.push(NotFreezable { kind, devices, mounts, why });
        }
        self.swap(&mut found, &mut used);
        self.unseen(&used, &mut found, &mut opened);
        // Inner file systems first. Sorted for the rest, so that two looks at the same machine are equal.
        opened.sort_by(|(a, _), (b, _)| b.level.cmp(&a.level).then(a.dev.cmp(&b.dev)));
        let fds = opened.into_iter().map(|(superblock, fd)| {
            found.superblocks.push(superblock);
            fd
        });
        let fds = fds.collect();
        self.caveat(&found, asked);
        found.caveats = self.caveats.into_iter().collect();
        Ok((found, fds))
    }

    fn describe(&self, asked: &[Dev], mounts: &[&Mount], devices: &[Dev], level: u32) -> Superblock {
        let points: BTreeSet<PathBuf> = mounts.iter().map(|m| for_people(&m.point)).collect();
        // Arbitrary: containers can make it thousands, and it is for people.
        let points = points.into_iter().take(16);
        Superblock {
            kind: mounts[0].kind.clone(),
            dev: mounts[0].dev,
            devices: devices.to_vec(),
            outside: self.outside(asked, devices),
            mounts: points.collect(),
            read_only: mounts[0].is_read_only(),
            level,
        }
    }

    /// Of these devices and those beneath them (a volume group over two disks) the ones that were not asked for.
    fn outside(&self, asked: &[Dev], devices: &[Dev]) -> Vec<Dev> {
        let foreign = |d: &Dev| !self.levels.contains_key(d);
        // What an asked device lies on need not be asked for.
        let beneath_asked: BTreeSet<Dev> = asked.iter().flat_map(Dev::below).collect();
        let beneath = devices.iter().filter(|d| !foreign(d)).flat_map(|d| d.below().split_off(1));
        let beneath = beneath.filter(|d| d.below().len() == 1 && !beneath_asked.contains(d));
        let all: BTreeSet<Dev> = devices.iter().copied().chain(beneath).filter(foreign).collect();
        all.into_iter().collect()
    }

    fn swap(&mut self, found: &mut Found, used: &mut BTreeSet<Dev>) {
        for path in mounts::swaps() {
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            match Dev::of_path(&path) {
                Some(dev) if self.levels.contains_key(&dev) => {
                    used.insert(dev);
                    found.swap.push(Swap::Device(dev));
                }
                Some(_) => {}
                None => {
                    let on = Dev::from_rdev(meta.dev());
                    let id = std::fs::File::open(&path).ok().and_then(|f| btrfs_id(f).ok());
                    let holds = |d: &Dev| *d == on || (id.is_some() && spread::btrfs_of(*d) == id);
                    if self.levels.keys().any(holds) {
                        found.swap.push(Swap::File(for_people(&path)));
                    }
                }
            }
        }
    }

    /// Devices of which no mount is known: free, or claimed by something that shows itself in another way.
    fn unseen(&mut self, used: &BTreeSet<Dev>, found: &mut Found, opened: &mut Vec<(Superblock, OwnedFd)>) {
        let under_loop =
            |d: &Dev| self.levels.keys().any(|l| l != d && l.loop_backing().is_some() && l.below().contains(d));
        let leaves = self.levels.iter().filter(|(d, _)| !used.contains(d) && d.partitions().is_empty());
        let leaves = leaves.filter(|(d, _)| d.holders().is_empty() && !under_loop(d));
        let mut done: BTreeSet<Dev> = BTreeSet::new();
        for (dev, level) in leaves {
            match open_device(*dev, true) {
                _ if done.contains(dev) => {}
                Ok(_) => found.unmounted.push(*dev),
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => match detached(*dev) {
                    Some((kind, devices, fd)) => {
                        done.extend(devices.iter().copied());
                        let outside = devices.iter().filter(|d| !self.levels.contains_key(d)).copied().collect();
                        let (mounts, kind) = (Vec::new(), kind.to_owned());
                        let number = Dev::from_rdev(rustix::fs::fstat(&fd).map_or(0, |s| s.st_dev));
                        let superblock =
                            Superblock { kind, dev: number, devices, outside, mounts, read_only: false, level: *level };
                        opened.push((superblock, fd));
                    }
                    None => found.not_freezable.push(NotFreezable {
                        kind: String::new(),
                        devices: vec![*dev],
                        mounts: Vec::new(),
                        why: WhyNot::Claimed,
                    }),
                },
                // A loop device without a file, an extended partition: nothing can be on it.
                Err(e) if matches!(e.raw_os_error(), Some(6 | 123)) => {}
                Err(e) => {
                    self.caveats.insert(format!("It cannot be told whether {dev} is in use: {e}."));
                }
            }
        }
    }

    fn caveat(&mut self, found: &Found, asked: &[Dev]) {
        if self.tables.unread > 0 {
            let n = self.tables.unread;
            self.caveats
                .insert(format!("The mounts of {n} processes cannot be read; run as root, with CAP_SYS_PTRACE."));
        }
        for superblock in found.superblocks.iter().filter(|s| !s.outside.is_empty()) {
            let outside: Vec<String> = superblock.outside.iter().map(Dev::to_string).collect();
            let text =
                format!("{superblock} lies in part on {}: protect that too, or it is not whole.", outside.join(", "));
            self.caveats.insert(text);
        }
        if let Some(Swap::File(path)) = found.swap.iter().find(|s| matches!(s, Swap::File(_))) {
            let text =
                format!("{} is swapped to, and the kernel goes on with that on a frozen file system.", path.display());
            self.caveats.insert(text);
        }
        for dev in asked.iter().filter(|d| d.attribute("size").is_none()) {
            self.caveats.insert(format!("{dev} is not a device that this machine has."));
        }
    }
}

/// Nothing is opened by these, and what is no UTF-8 could not be sent.
fn for_people(path: &Path) -> PathBuf {
    PathBuf::from(path.to_string_lossy().into_owned())
}

/// A way onto a mounted file system: through one of its mounts that nothing hides, or else through what a process has
/// open there.
fn open_any(mounts: &[&Mount], devices: &[Dev]) -> Option<OwnedFd> {
    let by_mount = mounts.iter().find_map(|m| m.open().ok());
    by_mount.or_else(|| match mounts[0].kind.as_str() {
        "btrfs" => open_btrfs(spread::btrfs_of(*devices.first()?)?),
        _ => open_by_number(mounts[0].dev),
    })
}

fn open_by_number(dev: Dev) -> Option<OwnedFd> {
    mounts::open_files(|number| Dev::from_rdev(number) == dev).into_iter().next()
}

fn open_btrfs(id: [u8; 16]) -> Option<OwnedFd> {
    // Each subvolume has a number of its own, from those that belong to no device. One file of each number will do.
    let mut seen = BTreeSet::new();
    let files = mounts::open_files(|number| rustix::fs::major(number) == 0 && seen.insert(number));
    files.into_iter().find(|fd| btrfs_id(fd).is_ok_and(|found| found == id))
}

/// A file system that was unmounted lazily and lives on because something is open there.
fn detached(dev: Dev) -> Option<(&'static str, Vec<Dev>, OwnedFd)> {
    if let Some(id) = spread::btrfs_of(dev) {
        return open_btrfs(id).map(|fd| ("btrfs", spread::devices_of_btrfs(&id), fd));
    }
    let fd = open_by_number(dev)?;
    // <linux/magic.h>. Of other types it is not known whether they can be frozen.
    let kind = match rustix::fs::fstatfs(&fd).ok()?.f_type {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0xf2f5_2010 => "f2fs",
        _ => return None,
    };
    Some((kind, vec![dev], fd))
}

/// The way onto a superblock that was found before, whether mounted or not.
pub(crate) fn reopen(superblock: &Superblock, mounts: &[&Mount]) -> Option<OwnedFd> {
    if mounts.is_empty() {
        return detached(*superblock.devices.first()?).map(|(_, _, fd)| fd);
    }
    // Another file system has the number by now.
    if mounts[0].kind != superblock.kind && !superblock.mounts.is_empty() {
        return None;
    }
    open_any(mounts, &superblock.devices)
}
