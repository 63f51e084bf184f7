//! Writing to a folder store. Owns the order of things, which is all that durability is:
//!
//! 1. the bytes into a temp file of the same file system, flushed;
//! 2. the folders of the key, each new one flushed into its parent;
//! 3. the name, by a rename that never replaces;
//! 4. the folder, flushed. Only now does `put_new` return.
//!
//! A flush that failed is never tried again: the kernel would say yes to pages that it has dropped.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use backhaul_protocol::store::key::ObjectKey;
use backhaul_seams::failpoint;
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{DIR_MODE, FILE_MODE, Root, TMP, direct, failure, split};
use crate::store::{Kind, StoreError, Verb};

/// An unlocked temp file is left alone when it is younger than this: its writer may not have locked it yet. Arbitrary;
/// the two calls are microseconds apart.
const UNLOCKED_GRACE: Duration = Duration::from_secs(60);
/// Where the file system has no locks, a temp file of this age has no writer any more. Arbitrary, and far longer than
/// writing one object can take.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// A file under [`TMP`], removed when dropped. It is locked while its writer lives, which is how another writer knows
/// that it may not be swept away.
pub(super) struct Temp<'a> {
    folder: &'a OwnedFd,
    name: String,
    file: File,
    /// It was renamed, and the name is not ours any more.
    gone: bool,
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if !self.gone
            && let Err(error) = rustix::fs::unlinkat(self.folder, &self.name, AtFlags::empty())
        {
            tracing::warn!(name = self.name, %error, "a temp file stays in the store until the next start");
        }
    }
}

impl Root {
    pub(super) fn put_new(&self, key: &ObjectKey, body: &[u8]) -> Result<(), StoreError> {
        self.check_trusted(Verb::PutNew, key)?;
        // Not needed for safety, the rename decides; it saves writing 16 MiB for nothing.
        if self.exists_flushed(key)? {
            return Err(exists(key));
        }
        let mut temp = self.write_temp(Verb::PutNew, key, body)?;
        let folder = self.make_folder(Verb::PutNew, key)?;
        let (_, leaf) = split(key);
        match rename_new(&mut temp, &folder, leaf) {
            Ok(()) => {
                step(Verb::PutNew, key, "placed")?;
                self.flush(Verb::PutNew, key, &folder)?;
                step(Verb::PutNew, key, "done")
            }
            Err(Errno::EXIST) => match self.exists_flushed(key)? {
                true => Err(exists(key)),
                false => Err(failure(Verb::PutNew, key, "publish it under its name", Errno::AGAIN)),
            },
            Err(errno) => Err(failure(Verb::PutNew, key, "publish it under its name", missing_is_odd(errno))),
        }
    }

    /// The content is flushed and the folder is not: after a power loss an older hint is harmless, half of one is not.
    pub(super) fn put_hint(&self, key: &ObjectKey, body: &[u8]) -> Result<(), StoreError> {
        self.check_trusted(Verb::PutHint, key)?;
        let mut temp = self.write_temp(Verb::PutHint, key, body)?;
        let folder = self.make_folder(Verb::PutHint, key)?;
        let (_, leaf) = split(key);
        rustix::fs::renameat(temp.folder, &temp.name, &folder, leaf)
            .map_err(|errno| failure(Verb::PutHint, key, "publish it under its name", missing_is_odd(errno)))?;
        temp.gone = true;
        step(Verb::PutHint, key, "placed")
    }

    /// The same for all that can be seen in a folder. Content was flushed before it got its name, and so were the
    /// folders above before anything was put into this one.
    pub(super) fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
        if self.broken.load(Ordering::SeqCst) {
            return Err(self.broken(Verb::List, prefix));
        }
        match self.open_folder(folder) {
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failure(Verb::List, prefix, "open the folder", errno)),
            Ok(fd) => self.flush(Verb::List, prefix, &fd),
        }
    }

    /// Whether the object is there **and** will be after a power loss: who is told `Exists` may build on it, and its
    /// writer may not have come to its own flush yet.
    fn exists_flushed(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        let fail = |errno| failure(Verb::PutNew, key, "look whether it exists", errno);
        let (folder, leaf) = split(key);
        let folder = match self.open_folder(folder) {
            Err(Errno::NOENT) => return Ok(false),
            other => other.map_err(fail)?,
        };
        let stat = match rustix::fs::statat(&folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            other => other.map_err(fail)?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.flush(Verb::PutNew, key, &folder).map(|()| true),
            FileType::Symlink => Err(fail(Errno::LOOP)),
            _ => Err(fail(Errno::ISDIR)),
        }
    }

    pub(super) fn write_temp(&self, verb: Verb, key: &ObjectKey, body: &[u8]) -> Result<Temp<'_>, StoreError> {
        let fail = |errno| failure(verb, key, "write a temp file", missing_is_odd(errno));
        let folder = self.tmp_folder().map_err(fail)?;
        let name = uuid::Uuid::now_v7().simple().to_string();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(folder, &name, flags, FILE_MODE).map_err(fail)?;
        let temp = Temp { folder, name, file: File::from(file), gone: false };
        // Without locks in this file system its age protects it.
        let _ = rustix::fs::flock(&temp.file, FlockOperation::NonBlockingLockExclusive);
        direct::write_all(&temp.file, body).map_err(|error| fail(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        step(verb, key, "written")?;
        self.flush(verb, key, &temp.file)?;
        step(verb, key, "flushed")?;
        Ok(temp)
    }

    /// Opens the key's folder; what of it is missing is made, and is on the disk before this returns.
    fn make_folder(&self, verb: Verb, key: &ObjectKey) -> Result<OwnedFd, StoreError> {
        let fail = |errno| failure(verb, key, "make its folder", missing_is_odd(errno));
        let (path, _) = split(key);
        if self.durable().contains(path) {
            match self.open_folder(path) {
                // Somebody removed it. Nothing that is remembered about folders holds any more.
                Err(Errno::NOENT) => self.durable().clear(),
                other => return other.map_err(fail),
            }
        }
        let mut folder = self.open_folder("").map_err(fail)?;
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        for end in ends.filter(|end| *end > 0) {
            let so_far = &path[..end];
            let name = so_far.rsplit('/').next().unwrap_or(so_far);
            if !self.durable().contains(so_far) {
                match rustix::fs::mkdirat(&folder, name, DIR_MODE) {
                    // Its maker may be another process that has not flushed it yet.
                    Ok(()) | Err(Errno::EXIST) => self.flush(verb, key, &folder)?,
                    Err(errno) => return Err(fail(errno)),
                }
            }
            folder = self.open_folder(so_far).map_err(fail)?;
            self.durable().insert(so_far.to_owned());
        }
        Ok(folder)
    }

    /// Flushes a file or folder, and remembers for good if that failed.
    pub(super) fn flush(&self, verb: Verb, key: impl fmt::Display, fd: impl AsFd) -> Result<(), StoreError> {
        match (self.flush)(fd.as_fd()) {
            Ok(()) => Ok(()),
            // Delayed allocation finds out late. The temp file goes away, and a later call writes its own.
            Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => Err(failure(verb, key, "flush it to the disk", errno)),
            Err(Errno::INVAL) => {
                let what = "this file system cannot flush a file or a folder, so nothing in it would be safe";
                Err(StoreError::new(Kind::Config, verb, key, what))
            }
            Err(errno) => {
                self.broken.store(true, Ordering::SeqCst);
                Err(self.broken(verb, key).because(std::io::Error::from(errno)))
            }
        }
    }

    fn check_trusted(&self, verb: Verb, key: &ObjectKey) -> Result<(), StoreError> {
        match self.broken.load(Ordering::SeqCst) {
            true => Err(self.broken(verb, key)),
            false => Ok(()),
        }
    }

    fn broken(&self, verb: Verb, key: impl fmt::Display) -> StoreError {
        let what = format!(
            "the disk failed to flush, and what was written may be lost; nothing more is written to {} until the disk \
             was checked and the receiver restarted",
            self.path.display()
        );
        StoreError::new(Kind::Other, verb, key, what)
    }

    fn durable(&self) -> std::sync::MutexGuard<'_, std::collections::HashSet<String>> {
        // A set of names is valid between any two statements.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of temp files, made and swept by the first writer, so that readers change nothing.
    fn tmp_folder(&self) -> rustix::io::Result<&OwnedFd> {
        if let Some(folder) = self.tmp.get() {
            return Ok(folder);
        }
        match rustix::fs::mkdirat(&self.fd, TMP, DIR_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        let folder = self.open_folder(TMP)?;
        if let Err(error) = sweep(&folder) {
            tracing::warn!(path = %self.path.display(), %error, "old temp files stay in the store");
        }
        Ok(self.tmp.get_or_init(|| folder))
    }
}

/// Where a test may stop: `KIND.STEP`, by the folder that objects of the kind are in.
fn step(verb: Verb, key: &ObjectKey, step: &str) -> Result<(), StoreError> {
    let name = || {
        let parts: Vec<&str> = key.as_str().split('/').collect();
        let kind = if let ["groups", _, kind, ..] = parts[..] { kind } else { parts[0] };
        format!("{kind}.{step}")
    };
    failpoint::reach(name).map_err(|e| StoreError::new(Kind::Other, verb, key, "a test wants it").because(e))
}

fn exists(key: &ObjectKey) -> StoreError {
    StoreError::new(Kind::Exists, Verb::PutNew, key, "it exists already")
}

/// While writing, a missing folder or temp file is somebody else's doing, and not an object that does not exist.
fn missing_is_odd(errno: Errno) -> Errno {
    if errno == Errno::NOENT { Errno::STALE } else { errno }
}

/// Gives the file its name if nothing has it. NFS and some FUSE file systems know no `RENAME_NOREPLACE`; a hard link
/// is as good, and leaves the temp name to be removed.
fn rename_new(temp: &mut Temp<'_>, folder: &OwnedFd, leaf: &str) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(temp.folder, &temp.name, folder, leaf, RenameFlags::NOREPLACE) {
        Ok(()) => {
            temp.gone = true;
            Ok(())
        }
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_new(temp, folder, leaf),
        Err(errno) => Err(errno),
    }
}

pub(super) fn link_new(temp: &Temp<'_>, folder: &OwnedFd, leaf: &str) -> rustix::io::Result<()> {
    rustix::fs::linkat(temp.folder, &temp.name, folder, leaf, AtFlags::empty())
}

/// Removes the temp files of writers that are gone: a receiver that crashes and restarts in a loop must not fill the
/// disk with them.
fn sweep(folder: &OwnedFd) -> rustix::io::Result<()> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes().starts_with(b".") {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP) => continue,
            other => other?,
        };
        let stat = rustix::fs::fstat(&file)?;
        let written = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
        // A clock that went backwards makes everything young, which is the safe side.
        let age = SystemTime::now().duration_since(written).unwrap_or_default();
        let abandoned = match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => age > UNLOCKED_GRACE,
            Err(Errno::WOULDBLOCK) => false,
            Err(_) => age > ABANDONED,
        };
        if abandoned && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
        }
    }
    Ok(())
}
