//! Thaws what the journal of a dead helper says.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use backhaul_volume::frozen::btrfs_id;
use backhaul_volume::sysfs::Dev;

use crate::find;
use crate::found::Superblock;
use crate::holding::{Holding, Unfinished, Who};
use crate::journal::{self, Entry, State};
use crate::mounts::{self, Mount};

/// A file system that a dead helper may have left frozen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ThawedLeftOver {
    /// Which.
    pub what: Superblock,
    /// What became of it.
    pub outcome: LeftOver,
}

/// What became of a file system that may have been left frozen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LeftOver {
    /// It was frozen and is not any more.
    Thawed,
    /// It was not frozen.
    WasNotFrozen,
    /// It does not exist any more: unmounted, or its device belongs to another file system now, which was left alone.
    Gone,
    /// It may be frozen still; the next call tries again. Mount its device once more and type
    /// `fsfreeze --unfreeze MOUNT-POINT`.
    Failed(String),
}

/// Thaws what the journal of a dead helper names, and nothing else; what became of each. To be called when an agent
/// or a helper starts; anybody may call it at any time.
///
/// `WouldBlock` if the journal's helper or its guard lives: they thaw by themselves. No journal is no error.
pub fn thaw_left_over(journal: &Path) -> io::Result<Vec<ThawedLeftOver>> {
    let mut all = Vec::new();
    for path in [unresolved(journal), journal.to_owned()] {
        let read = match journal::open(&path) {
            Ok(None) => continue,
            // Replaced as a whole, so never half written; nothing can be done about one that is not ours to read.
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                fs::rename(&path, suffixed(&path, ".damaged"))?;
                return Err(e);
            }
            other => other?,
        };
        let Some(read) = read else { continue };
        // With the machine's memory every freeze is gone.
        let outcomes = if read.boot == journal::boot_id()? { resolve(read.file, &read.entries)? } else { Vec::new() };
        if outcomes.iter().any(|o| matches!(o.outcome, LeftOver::Failed(_))) {
            fs::rename(&path, unresolved(journal))?;
        } else {
            fs::remove_file(&path)?;
        }
        all.extend(outcomes);
    }
    Ok(all)
}

fn resolve(journal: OwnedFd, entries: &[Entry]) -> io::Result<Vec<ThawedLeftOver>> {
    let tables = mounts::tables()?;
    let mut by_dev: BTreeMap<Dev, Vec<&Mount>> = BTreeMap::new();
    for mount in &tables.mounts {
        by_dev.entry(mount.dev).or_default().push(mount);
    }
    let mut outcomes = Vec::new();
    for (index, entry) in entries.iter().enumerate().rev() {
        if !journal::state(&journal, index).may_be_frozen() {
            continue;
        }
        let mounts = by_dev.get(&entry.superblock.dev).map(Vec::as_slice).unwrap_or_default();
        let outcome = thaw(&journal, index, entry, mounts);
        outcomes.push(ThawedLeftOver { what: entry.superblock.clone(), outcome });
    }
    Ok(outcomes)
}

fn thaw(journal: &OwnedFd, index: usize, entry: &Entry, mounts: &[&Mount]) -> LeftOver {
    let superblock = &entry.superblock;
    let Some(fd) = find::reopen(superblock, mounts) else {
        let claimed = superblock.devices.first().map(|d| mounts::open_device(*d, true));
        return match claimed {
            Some(Err(e)) if e.kind() == io::ErrorKind::ResourceBusy => {
                LeftOver::Failed(format!("{superblock} is in use, and no way leads there"))
            }
            _ => LeftOver::Gone,
        };
    };
    if identity(superblock, &fd).ok() != Some((entry.fs_id, entry.sequence)) {
        return LeftOver::Gone;
    }
    // One at a time, under its own number.
    let before = journal::state(journal, index);
    let holding = match journal.try_clone().and_then(|journal| Holding::at(journal, fd, index)) {
        Ok(holding) => holding,
        Err(e) => return LeftOver::Failed(e.to_string()),
    };
    // One whose disk hangs must not keep the others frozen.
    let done = (0..5).any(|_| holding.thaw_all(Who::Rescuer, Unfinished::Settle) == 0);
    match (done, journal::state(journal, index)) {
        (true, State::Rescued) => LeftOver::Thawed,
        (true, _) => LeftOver::WasNotFrozen,
        (false, _) => LeftOver::Failed(format!("{superblock} cannot be thawed ({before:?})")),
    }
}

/// What tells a superblock from others that get its number.
pub(crate) fn identity(superblock: &Superblock, fd: impl AsFd) -> io::Result<([u64; 2], Option<u64>)> {
    let sequence = superblock.devices.first().and_then(Dev::sequence);
    // A btrfs answers `statfs` differently for each subvolume.
    if let Ok(id) = btrfs_id(&fd) {
        let (high, low) = id.split_at(8);
        let half = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        return Ok(([half(high), half(low)], sequence));
    }
    let stat = rustix::fs::fstatvfs(&fd)?;
    Ok(([stat.f_fsid, stat.f_blocks], sequence))
}

fn unresolved(journal: &Path) -> PathBuf {
    suffixed(journal, ".unresolved")
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
