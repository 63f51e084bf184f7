//! Reading and listing a folder store. Does not write anything.

use std::ops::Range;
use std::os::fd::OwnedFd;

use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, Dir, FileType, OFlags};
use rustix::io::Errno;

use super::direct::{self, DIRECT_FROM};
use super::{Root, failure};
use crate::store::{Kind, StoreError, Verb, range_len, too_long, too_short};

impl Root {
    pub(super) fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        let (file, size) = self.open_object(Verb::Get, key)?;
        if size > max as u64 {
            return Err(too_long(key, size, max));
        }
        read_exactly(Verb::Get, key, &file, 0, size as usize)
    }

    pub(super) fn get_range(&self, key: &ObjectKey, range: &Range<u64>) -> Result<Bytes, StoreError> {
        let len = range_len(key, range)?;
        let (file, size) = self.open_object(Verb::GetRange, key)?;
        if range.end > size {
            return Err(too_short(key, size, range));
        }
        read_exactly(Verb::GetRange, key, &file, range.start, len)
    }

    fn open_object(&self, verb: Verb, key: &ObjectKey) -> Result<(OwnedFd, u64), StoreError> {
        let fail = |errno| failure(verb, key, "open the file", errno);
        // NONBLOCK: a pipe that somebody put there must not hang the reader; it is refused below.
        let file = self.open_below(key.as_str(), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY);
        let file = file.map_err(|errno| match errno {
            // A file where a folder would have to be: nothing can be below it.
            Errno::NOTDIR => fail(Errno::NOENT),
            errno => fail(errno),
        })?;
        let stat = rustix::fs::fstat(&file).map_err(fail)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((file, stat.st_size as u64)),
            FileType::Directory => Err(fail(Errno::NOENT)),
            _ => Err(StoreError::new(Kind::Config, verb, key, "it is neither a file nor a folder")),
        }
    }

    /// Holds the names of one folder at a time in memory (and of those above it).
    pub(super) fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        let mut walk =
            Walk { root: self, prefix, after: after.map_or("", ObjectKey::as_str), limit, found: Vec::new() };
        walk.folder("").map_err(|errno| failure(Verb::List, prefix, "read a folder", errno))?;
        Ok(walk.found)
    }
}

/// Reads into memory that is allocated once.
fn read_exactly(verb: Verb, key: &ObjectKey, file: &OwnedFd, start: u64, len: usize) -> Result<Bytes, StoreError> {
    let fail = |errno| failure(verb, key, "read the file", errno);
    if len >= DIRECT_FROM
        && let Some(body) = direct::read(file, start, len).map_err(fail)?
    {
        return Ok(body);
    }
    let mut body: Vec<u8> = Vec::new();
    body.try_reserve_exact(len).map_err(|error| {
        StoreError::new(Kind::Unavailable, verb, key, format!("no memory for {len} bytes")).because(error)
    })?;
    while body.len() < len {
        let offset = start + body.len() as u64;
        match rustix::io::pread(file, spare_capacity(&mut body), offset) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(fail(errno)),
            // It had that size a moment ago, and objects do not shrink.
            Ok(0) => return Err(too_short(key, offset, &(start..start + len as u64))),
            Ok(_) => {}
        }
    }
    // The allocator may have given more room than was asked for, and the read may have filled it.
    body.truncate(len);
    Ok(body.into())
}

struct Walk<'a> {
    root: &'a Root,
    prefix: &'a str,
    after: &'a str,
    limit: usize,
    found: Vec<(ObjectKey, u64)>,
}

impl Walk<'_> {
    /// `path` is empty or ends with `/`.
    fn folder(&mut self, path: &str) -> rustix::io::Result<()> {
        let folder = match self.root.open_folder(path.trim_end_matches('/')) {
            // Removed or replaced by a link since it was seen: nothing of ours is in it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if !path.is_empty() => return Ok(()),
            other => other?,
        };
        let mut names = self.names(&folder, path)?;
        // A folder sorts as its keys do, with the slash: "a-b" < "a/b" < "a0".
        names.sort_unstable();
        for name in names {
            if self.found.len() >= self.limit {
                break;
            }
            if name.ends_with('/') {
                self.folder(&name)?;
            } else if let Ok(key) = ObjectKey::parse(&name) {
                let leaf = &name[path.len()..];
                match rustix::fs::statat(&folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => {}
                    Ok(stat) => self.found.push((key, stat.st_size as u64)),
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(())
    }

    /// Keys, and folders with a slash at the end, that are or may hold what is asked for.
    fn names(&self, folder: &OwnedFd, path: &str) -> rustix::io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(folder)? {
            let entry = entry?;
            let Ok(leaf) = entry.file_name().to_str() else { continue };
            // Leaves out "." and "..", temp files and whatever else was put here.
            if ObjectKey::parse(leaf).is_err() {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match rustix::fs::statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                    Err(Errno::NOENT) => continue,
                    other => FileType::from_raw_mode(other?.st_mode),
                },
                kind => kind,
            };
            let mut name = format!("{path}{leaf}");
            match kind {
                FileType::Directory => {
                    name.push('/');
                    let wanted = name.starts_with(self.prefix) || self.prefix.starts_with(&name);
                    if wanted && (name.as_str() > self.after || self.after.starts_with(&name)) {
                        names.push(name);
                    }
                }
                FileType::RegularFile if name.starts_with(self.prefix) && name.as_str() > self.after => {
                    names.push(name)
                }
                _ => {}
            }
        }
        Ok(names)
    }
}
