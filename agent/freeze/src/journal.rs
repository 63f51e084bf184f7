//! What is about to be frozen, is frozen and was thawed, in a file that outlives every process of ours.
//!
//! ```text
//! 0     8  magic "BHFREEZE"
//! 8     4  version, 1
//! 12    4  length of the description, little-endian
//! 16  ...  one byte for each superblock: its State
//! 512 ...  description (JSON): boot id, owner, superblocks in the order in which they are frozen
//! ```
//!
//! A state is written before the step that it announces: `Freezing` before FIFREEZE. So whoever reads the file after a
//! kill knows all that may be frozen by us, and never thaws what we did not touch. The file lies on tmpfs, which is
//! never frozen; it is replaced as a whole and locked by whoever may still thaw (helper and guard share the lock).

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::found::Superblock;

const MAGIC: &[u8; 8] = b"BHFREEZE";
const VERSION: u32 = 1;
const STATES_AT: u64 = 16;
const TEXT_AT: u64 = 512;
/// A message carries 253 descriptors at most (SCM_MAX_FD), the journal's among them.
pub(crate) const MAX_SUPERBLOCKS: usize = 250;
/// Arbitrary, far above what 250 superblocks need.
const MAX_TEXT: u32 = 16 << 20;

/// How far the freeze of one superblock is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// Not touched.
    Idle = 0,
    /// FIFREEZE has begun. Whether it succeeded is not known.
    Freezing = 1,
    /// Frozen by us.
    Frozen = 2,
    /// FIFREEZE failed, or somebody else had frozen it: not ours.
    NotOurs = 3,
    /// Thawed by the helper, as it should be.
    Thawed = 4,
    /// Thawed by the guard, the agent or a later start, since the helper did not.
    Rescued = 5,
    /// Our thaw found it not frozen: somebody else had thawed it.
    Lost = 6,
}

impl State {
    fn from_byte(byte: u8) -> Self {
        let all = [Self::Idle, Self::Freezing, Self::Frozen, Self::NotOurs, Self::Thawed, Self::Rescued, Self::Lost];
        // What cannot be read may be frozen: to try a thaw is the lesser evil.
        all.into_iter().find(|s| *s as u8 == byte).unwrap_or(Self::Freezing)
    }

    /// Whether it may be frozen by us.
    pub(crate) fn may_be_frozen(self) -> bool {
        matches!(self, Self::Freezing | Self::Frozen)
    }
}

/// How to recognise a superblock later.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Entry {
    pub(crate) superblock: Superblock,
    /// From `statfs`: from the UUID for most types. The number may belong to another file system by then.
    pub(crate) fs_id: [u64; 2],
    /// The kernel's count of disks that had the device's number.
    pub(crate) sequence: Option<u64>,
}

#[derive(Serialize, Deserialize, Debug)]
struct Text {
    boot: String,
    /// The helper's process, for people.
    owner: u32,
    entries: Vec<Entry>,
}

/// A journal of somebody who may be dead.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) file: OwnedFd,
    pub(crate) boot: String,
    pub(crate) entries: Vec<Entry>,
}

/// Puts a new journal in place, everything `Idle`, and locks it. The lock is the open file's: it lasts as long as any
/// process has the descriptor.
pub(crate) fn create(path: &Path, entries: Vec<Entry>) -> io::Result<OwnedFd> {
    let text = Text { boot: boot_id()?, owner: std::process::id(), entries };
    let text = serde_json::to_vec(&text)?;
    let mut bytes = Vec::with_capacity(TEXT_AT as usize + text.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.resize(TEXT_AT as usize, State::Idle as u8);
    bytes.extend(text);
    let new = suffixed(path, ".new");
    let _ = fs::remove_file(&new);
    let options = File::options().read(true).write(true).create_new(true).clone();
    let mut file = {
        use std::os::unix::fs::OpenOptionsExt;
        options.clone().mode(0o600).open(&new)?
    };
    file.write_all(&bytes)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    fs::rename(&new, path)?;
    Ok(file.into())
}

/// The journal at `path`, locked; `None` if there is none. `WouldBlock` if its helper or guard lives.
pub(crate) fn open(path: &Path) -> io::Result<Option<Read>> {
    let file = match File::options().read(true).write(true).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let mut head = [0; STATES_AT as usize];
    let broken = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is not a freeze journal", path.display()));
    read_exact(&file, &mut head, 0).map_err(|_| broken())?;
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if head[..8] != *MAGIC || number(8) != VERSION || number(12) > MAX_TEXT {
        return Err(broken());
    }
    let mut text = vec![0; number(12) as usize];
    read_exact(&file, &mut text, TEXT_AT).map_err(|_| broken())?;
    let text: Text = serde_json::from_slice(&text).map_err(|_| broken())?;
    if text.entries.len() > MAX_SUPERBLOCKS {
        return Err(broken());
    }
    Ok(Some(Read { file: file.into(), boot: text.boot, entries: text.entries }))
}

fn read_exact(file: &File, buf: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, at)
}

/// No memory is allocated and nothing is opened: a page of tmpfs that is there.
pub(crate) fn state(journal: impl AsFd, index: usize) -> State {
    let mut byte = [State::Freezing as u8];
    let _ = rustix::io::pread(journal, &mut byte, STATES_AT + index as u64);
    State::from_byte(byte[0])
}

/// As [`state`]. An error must keep a freeze from beginning.
pub(crate) fn set_state(journal: impl AsFd, index: usize, state: State) -> io::Result<()> {
    match rustix::io::pwrite(journal, &[state as u8], STATES_AT + index as u64)? {
        1 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Fails unless the folder of `path` lies in memory, and nobody else can put anything there.
pub(crate) fn check_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = fs::symlink_metadata(folder)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!("{} is no folder of ours alone", folder.display())));
    }
    // <linux/magic.h>: TMPFS_MAGIC, RAMFS_MAGIC.
    match rustix::fs::statfs(folder)?.f_type {
        0x0102_1994 | 0x8584_58f6 => Ok(()),
        _ => Err(io::Error::other(format!("{} is not on tmpfs; a disk may be frozen itself", folder.display()))),
    }
}

/// Anew with every boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_outlive_the_writer_and_damage_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("journal");
        assert!(open(&path).expect("no journal is no error").is_none());
        let file = create(&path, Vec::new()).expect("a journal");
        assert_eq!(open(&path).expect_err("its owner lives").kind(), io::ErrorKind::WouldBlock);
        set_state(&file, 1, State::Frozen).expect("a byte");
        drop(file);
        let read = open(&path).expect("it is whole").expect("it is there");
        assert_eq!((state(&read.file, 0), state(&read.file, 1)), (State::Idle, State::Frozen));
        assert_eq!(read.boot, boot_id().expect("a boot id"));
        drop(read);
        for length in [0, 5, 300, 520] {
            File::options().write(true).open(&path).and_then(|f| f.set_len(length)).expect("cut");
            assert_eq!(open(&path).expect_err("half a journal").kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_state_nobody_knows_may_be_frozen() {
        assert!(State::from_byte(77).may_be_frozen());
        assert!(!State::from_byte(0).may_be_frozen());
    }
}
