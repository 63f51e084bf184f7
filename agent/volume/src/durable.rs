//! Files that are there whole or not at all, also after a power cut; and a lock for one holder.
//!
//! Read first: [`create_new`] (put-if-absent) and [`replace`]. Both write a temporary file beside the target, flush it,
//! rename it and flush the folder; a crash leaves at most a file `.NAME.PID.N.tmp`. A flush that failed is never
//! repeated: Linux has forgotten the pages by then, and a second one would succeed without having written anything.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use backhaul_seams::failpoint;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

/// A file could not be made durable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DurableError {
    /// There is a file of that name; it was not touched.
    #[error("{} exists already", path.display())]
    AlreadyExists {
        /// Which file.
        path: PathBuf,
    },
    /// No space, no inode or no quota left. Nothing is visible under the name.
    #[error("no space left to write {}", path.display())]
    NoSpace {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something else. If a flush failed, it is not known what of the file survives a power cut.
    #[error("{}: cannot {what}", path.display())]
    Io {
        /// Which file or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl DurableError {
    /// Whether the same call may go better later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::AlreadyExists { .. } => false,
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } => crate::error::is_transient(source),
        }
    }

    fn io(path: &Path, what: &'static str, source: impl Into<io::Error>) -> Self {
        let (path, source) = (path.to_owned(), source.into());
        use io::ErrorKind as K;
        match source.kind() {
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Self::NoSpace { path, source },
            _ => Self::Io { path, what, source },
        }
    }
}

/// Creates `path` with these bytes and permission bits; [`DurableError::AlreadyExists`] if it is there, never both.
///
/// When it returns, the file survives a power cut; and so does the one that was there first. Several processes may
/// race: one wins.
pub fn create_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DurableError> {
    let temp = Temp::write(path, bytes, mode)?;
    let placed = place_new(&temp.path, path);
    if matches!(placed, Ok(()) | Err(Errno::EXIST)) {
        // Also before saying that it exists: the other one may not have flushed the folder yet.
        drop(temp);
        step(path, "placed")?;
        sync_folder_of(path)?;
        step(path, "done")?;
    }
    match placed {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(DurableError::AlreadyExists { path: path.to_owned() }),
        Err(e) => Err(DurableError::io(path, "put it in place", e)),
    }
}

/// Creates `path` or puts these bytes in its place; after a crash one or the other is there, whole.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), DurableError> {
    let temp = Temp::write(path, bytes, mode)?;
    std::fs::rename(&temp.path, path).map_err(|e| DurableError::io(path, "put it in place", e))?;
    step(path, "placed")?;
    sync_folder_of(path)?;
    step(path, "done")
}

/// Where a test may stop: `FILE.STEP`.
fn step(path: &Path, step: &'static str) -> Result<(), DurableError> {
    let name = || format!("{}.{step}", path.file_name().unwrap_or_default().display());
    failpoint::reach(name).map_err(|e| DurableError::io(path, step, e))
}

/// Flushes the folder that `path` is in, so that its name survives a power cut.
pub fn sync_folder_of(path: &Path) -> Result<(), DurableError> {
    let folder = folder_of(path);
    let synced = File::open(&folder).and_then(|f| f.sync_all());
    synced.map_err(|e| DurableError::io(&folder, "flush the folder", e))
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Renames without overwriting; by a hard link where the file system cannot.
fn place_new(temp: &Path, path: &Path) -> Result<(), Errno> {
    match rustix::fs::renameat_with(CWD, temp, CWD, path, RenameFlags::NOREPLACE) {
        // A link fails if the name is taken, too. The temporary name is removed with the `Temp`.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rustix::fs::link(temp, path),
        result => result,
    }
}

/// A written and flushed file under a temporary name, which is removed if it is still there.
struct Temp {
    path: PathBuf,
}

impl Temp {
    fn write(target: &Path, bytes: &[u8], mode: u32) -> Result<Self, DurableError> {
        let (temp, mut file) = Self::create(target, mode)?;
        let written = file.set_permissions(Permissions::from_mode(mode)).and_then(|()| file.write_all(bytes));
        written.map_err(|e| DurableError::io(target, "write it", e))?;
        step(target, "written")?;
        file.sync_all().map_err(|e| DurableError::io(target, "flush it", e))?;
        step(target, "flushed")?;
        Ok(temp)
    }

    fn create(target: &Path, mode: u32) -> Result<(Self, File), DurableError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = target.file_name() else {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(DurableError::io(target, "write to a path without a name", source));
        };
        loop {
            let mut temp_name = OsString::from(".");
            temp_name.push(name);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            temp_name.push(format!(".{}.{n}.tmp", std::process::id()));
            let path = folder_of(target).join(temp_name);
            match OpenOptions::new().write(true).create_new(true).mode(mode).open(&path) {
                Ok(file) => return Ok((Self { path }, file)),
                // Left by a killed process that had our number.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(DurableError::io(target, "create it", e)),
            }
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        // After a rename it is gone; otherwise a leftover is only litter.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A lock could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process has it.
    #[error("{} is locked by {}", path.display(), holder.map_or("another process".to_owned(), |p| format!("process {p}")))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Its process id, if it wrote one down.
        holder: Option<u32>,
    },
    /// The lock file could not be made or locked.
    #[error("cannot lock {}", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl LockError {
    /// Whether waiting may help.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Held { .. } => true,
            Self::Io { source, .. } => crate::error::is_transient(source),
        }
    }
}

/// Held until it is dropped or its process ends, however that ends.
#[derive(Debug)]
#[must_use = "dropping it unlocks"]
pub struct Lock {
    // Closing the descriptor unlocks. The file stays: removing it would let two processes lock two files of one name.
    _file: File,
}

/// Takes the lock `path` (made if it is not there, 0600) or says who has it. Does not wait.
pub fn lock(path: &Path) -> Result<Lock, LockError> {
    let failed = |source: io::Error| LockError::Io { path: path.to_owned(), source };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let mut text = String::new();
            // Only said to people: an unreadable holder is an unknown one.
            let _ = (&file).take(32).read_to_string(&mut text);
            return Err(LockError::Held { path: path.to_owned(), holder: text.trim().parse().ok() });
        }
        Err(e) => return Err(failed(e.into())),
    }
    let mine = format!("{}\n", std::process::id());
    file.set_len(0).and_then(|()| file.write_all_at(mine.as_bytes(), 0)).map_err(failed)?;
    Ok(Lock { _file: file })
}

#[cfg(test)]
#[path = "durable_tests.rs"]
mod tests;
