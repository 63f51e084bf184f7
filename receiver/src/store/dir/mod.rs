//! A store in a folder: one file per object, written to `+tmp` and published under its name when it is on the disk.
//! Read [`DirStore`], then [`write`](self::write), which owns the order of writes and flushes.
//!
//! What a power loss leaves: objects that `put_new` returned for; perhaps whole objects that it did not return for;
//! temp files in `+tmp`, which no key can name and which the next writer removes. Never a part of an object.
//!
//! Nothing below the root is reached through a symbolic link (`openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`),
//! and files and folders are made with modes 0600 and 0700. The root itself may be reached through links: the
//! administrator named it.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use async_trait::async_trait;
use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{Kind, MissingRoot, ObjectStore, StoreError, Verb, check_key, check_prefix, range_len};

mod direct;
mod read;
#[cfg(test)]
mod tests;
mod write;

/// Folder of files that are not objects yet. No [`ObjectKey`] has a `+`.
const TMP: &str = "+tmp";
const FILE_MODE: Mode = Mode::from_bits_retain(0o600);
const DIR_MODE: Mode = Mode::from_bits_retain(0o700);

/// Objects as files below one folder. Cheap calls are still moved off the async threads: any of them may wait for a
/// disk. Reads of the same or different objects run side by side, on tokio's blocking threads.
#[derive(Debug)]
pub struct DirStore {
    root: Arc<Root>,
}

/// What the blocking calls share.
struct Root {
    path: PathBuf,
    fd: OwnedFd,
    tmp: OnceLock<OwnedFd>,
    /// Folders whose own entry in their parent is known to be on the disk.
    durable: Mutex<HashSet<String>>,
    /// A flush failed. The kernel reports that once and then calls the lost pages clean, so that nothing that this
    /// process says about durability can be believed any more (F6).
    broken: AtomicBool,
    flush: Flush,
}

/// `fsync`, or in tests one that fails.
type Flush = Box<dyn Fn(BorrowedFd<'_>) -> rustix::io::Result<()> + Send + Sync>;

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.fmt(f)
    }
}

impl DirStore {
    /// Opens the folder; with [`MissingRoot::Create`] makes it, and what is above it, where it is missing.
    pub async fn open(path: &Path, missing: MissingRoot) -> Result<Self, StoreError> {
        let path = path.to_owned();
        let root = blocking(Verb::Open, path.display().to_string(), move || Root::open(path, missing)).await?;
        Ok(Self { root: Arc::new(root) })
    }

    async fn run<T: Send + 'static>(
        &self,
        verb: Verb,
        key: &ObjectKey,
        work: impl FnOnce(&Root, &ObjectKey) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        check_key(verb, key)?;
        let (root, key) = (Arc::clone(&self.root), key.clone());
        blocking(verb, key.to_string(), move || work(&root, &key)).await
    }
}

async fn blocking<T: Send + 'static>(
    verb: Verb,
    object: String,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::new(Kind::Other, verb, object, "its thread was stopped").because(error)),
    }
}

impl Root {
    fn open(path: PathBuf, missing: MissingRoot) -> Result<Self, StoreError> {
        let fail = |errno| failure(Verb::Open, path.display(), "open the folder", errno);
        if missing == MissingRoot::Create {
            make_root(&path).map_err(fail)?;
        }
        // O_RDONLY and not O_PATH: the folder itself must be flushed.
        let fd = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                let what = "there is no such folder; `backhaul-receiver init` makes it, or a disk is not mounted";
                return Err(StoreError::new(Kind::Config, Verb::Open, path.display(), what));
            }
            Err(errno) => return Err(fail(errno)),
        };
        Ok(Self {
            path,
            fd,
            tmp: OnceLock::new(),
            durable: Mutex::default(),
            broken: AtomicBool::new(false),
            flush: Box::new(|fd| rustix::fs::fsync(fd)),
        })
    }

    /// Opens what is at `path` below the root, never following a symbolic link.
    fn open_below(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Opens a folder below the root; the empty path is the root.
    fn open_folder(&self, path: &str) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        self.open_below(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        let (folder, leaf) = split(key);
        let fail = |errno| failure(Verb::Delete, key, "remove it", errno);
        let folder = match self.open_folder(folder) {
            Err(Errno::NOENT) => return Ok(()),
            other => other.map_err(fail)?,
        };
        match rustix::fs::unlinkat(&folder, leaf, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(fail(errno)),
            Ok(()) => self.flush(Verb::Delete, key, &folder),
        }
    }
}

/// `mkdir -p`, each new folder flushed into its parent.
fn make_root(path: &Path) -> rustix::io::Result<()> {
    match rustix::fs::mkdir(path, DIR_MODE) {
        Err(Errno::EXIST) => return Ok(()),
        Err(Errno::NOENT) => {
            make_root(path.parent().ok_or(Errno::NOENT)?)?;
            rustix::fs::mkdir(path, DIR_MODE)
                .or_else(|errno| if errno == Errno::EXIST { Ok(()) } else { Err(errno) })?;
        }
        other => other?,
    }
    let parent = path.parent().ok_or(Errno::NOENT)?;
    let parent = rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::fsync(parent)
}

/// Folder and file name of a key.
fn split(key: &ObjectKey) -> (&str, &str) {
    key.as_str().rsplit_once('/').unwrap_or(("", key.as_str()))
}

/// What an errno means for a store, and what to do about it.
fn failure(verb: Verb, object: impl fmt::Display, doing: &str, errno: Errno) -> StoreError {
    let (kind, advice) = match errno {
        Errno::NOENT => (Kind::NotFound, "no such object"),
        Errno::NOSPC | Errno::DQUOT => {
            (Kind::NoSpace, "no space left in the store's file system; free some or grow it")
        }
        // Not `Permission`: nobody's identity is in doubt, and somebody has to change the folder or its mount.
        Errno::ACCESS | Errno::PERM => {
            (Kind::Config, "not permitted; run as the user that the store's folder belongs to, or give it to this one")
        }
        Errno::ROFS => (
            Kind::Config,
            "the store's file system is mounted read-only, perhaps after an error: see the kernel's log, and mount it \
             writable",
        ),
        Errno::LOOP | Errno::XDEV => {
            (Kind::Config, "a symbolic link is in the way; the store follows none, use a bind mount instead")
        }
        Errno::NOTDIR | Errno::ISDIR => {
            (Kind::Config, "a file is where a folder must be, or a folder where a file must be")
        }
        Errno::NAMETOOLONG => (Kind::Config, "the name is too long for this file system"),
        Errno::NOSYS => (Kind::Config, "the kernel lacks openat2; Linux 5.6 or newer is needed"),
        Errno::AGAIN | Errno::INTR | Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::STALE | Errno::TIMEDOUT => {
            (Kind::Unavailable, "the system is short of something")
        }
        Errno::IO | Errno::UCLEAN | Errno::BADMSG if matches!(verb, Verb::Get | Verb::GetRange) => {
            (Kind::Unreadable, "the disk or the file system can't read it; see the kernel's log")
        }
        _ => (Kind::Other, "the file system failed; see the kernel's log"),
    };
    StoreError::new(kind, verb, object, format!("{advice} (tried to {doing})")).because(std::io::Error::from(errno))
}

#[async_trait]
impl ObjectStore for DirStore {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.run(Verb::PutNew, key, move |root, key| root.put_new(key, &body)).await
    }

    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        self.run(Verb::PutHint, key, move |root, key| root.put_hint(key, &body)).await
    }

    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        self.run(Verb::Get, key, move |root, key| root.get(key, max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range_len(key, &range)? == 0 {
            return Ok(Bytes::new());
        }
        self.run(Verb::GetRange, key, move |root, key| root.get_range(key, &range)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        check_prefix(prefix)?;
        let (root, prefix, after) = (Arc::clone(&self.root), prefix.to_owned(), after.cloned());
        blocking(Verb::List, prefix.clone(), move || root.list(&prefix, after.as_ref(), limit)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.run(Verb::Delete, key, |root, key| root.delete(key)).await
    }

    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        let (root, prefix) = (Arc::clone(&self.root), prefix.to_owned());
        blocking(Verb::List, prefix.clone(), move || root.settle(&prefix)).await
    }

    fn describe(&self) -> String {
        format!("folder {}", self.root.path.display())
    }
}
