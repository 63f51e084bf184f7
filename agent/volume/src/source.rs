//! What is protected: an image file or a block device, opened for reading and never for anything else (I23).
//!
//! Read first: [`Source::open`]; [`Source::watch`] before reading and [`Source::recheck`] before committing.
//!
//! A device is read with O_DIRECT: a mounted file system does not go through the device's page cache, so that the
//! buffered view of the device may be older than the disk. An image file is read through the page cache, which is
//! where its writers write.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use backhaul_protocol::geometry::ByteOffset;
use rustix::fs::{Advice, FileType, Mode, OFlags};

use crate::direct::{DirectIo, read_full};
use crate::sysfs::Dev;
use crate::{Identity, Volume, VolumeError, checked_range, stability, sys};

/// An image file or block device that is read.
pub struct Source {
    path: PathBuf,
    length: u64,
    identity: Identity,
    kind: Kind,
}

enum Kind {
    Image(File),
    Device(Device),
}

struct Device {
    dev: Dev,
    /// Which disk has the number `dev`; see [`Dev::sequence`].
    sequence: Option<u64>,
    direct: DirectIo,
}

impl Source {
    /// Opens `path` for reading. Symbolic links are followed and the path that they lead to is kept.
    ///
    /// Refuses what is neither a regular file nor a block device, and what has no bytes.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, VolumeError> {
        let typed = path.as_ref();
        let open_error = |source: io::Error| VolumeError::Open { path: typed.to_owned(), source };
        let path = std::fs::canonicalize(typed).map_err(open_error)?;
        let (found, stat) = locate(&path).map_err(open_error)?;
        let not_a_volume = |what| VolumeError::NotAVolume { path: path.clone(), what };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let file = reopen(&found, OFlags::RDONLY).map_err(open_error)?;
                let length = stat.st_size as u64;
                if length == 0 {
                    return Err(not_a_volume("an empty file"));
                }
                // Only a hint to read ahead further: nothing depends on it.
                let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
                let identity = Identity::of_image(&path, length);
                Ok(Self { path, length, identity, kind: Kind::Image(file) })
            }
            FileType::BlockDevice => {
                let file = reopen(&found, OFlags::RDONLY | OFlags::DIRECT).map_err(open_error)?;
                let dev = Dev::from_rdev(stat.st_rdev);
                let sector = sector_size(&path, &file)?;
                let length = device_bytes(&path, &file, sector)?;
                if length == 0 {
                    return Err(not_a_volume("a device without a medium"));
                }
                let identity = Identity::of_device(dev, &path, length);
                let direct = DirectIo::new(file, sector);
                Ok(Self {
                    path,
                    length,
                    identity,
                    kind: Kind::Device(Device { dev, sequence: dev.sequence(), direct }),
                })
            }
            other => Err(not_a_volume(kind_name(other))),
        }
    }

    /// The path that it was opened by, links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is known by. Compare with the one that was written down: [`Identity::same_as`].
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device(_))
    }

    /// Which block device it is; `None` of an image.
    pub fn device(&self) -> Option<Dev> {
        match &self.kind {
            Kind::Image(_) => None,
            Kind::Device(device) => Some(device.dev),
        }
    }

    /// The image file, if it is one.
    pub(crate) fn image(&self) -> Option<&File> {
        match &self.kind {
            Kind::Image(file) => Some(file),
            Kind::Device(_) => None,
        }
    }

    /// The same image, read from another file.
    pub(crate) fn with_image(&self, file: File) -> Self {
        let (path, identity) = (self.path.clone(), self.identity.clone());
        Self { path, length: self.length, identity, kind: Kind::Image(file) }
    }

    /// Bytes that a read should be a multiple of: the device's logical sector, or 1 for an image.
    pub fn sector_size(&self) -> u32 {
        match &self.kind {
            Kind::Image(_) => 1,
            Kind::Device(device) => device.direct.sector() as u32,
        }
    }

    /// Starts watching whether the source changes. What is read between this and [`stability::Watch::finish`] is of one
    /// instant if that says `Still`. Waits for dirty pages of a device to be written.
    pub fn watch(&self) -> stability::Watch {
        match &self.kind {
            Kind::Image(file) => stability::Watch::image(&self.path, file),
            Kind::Device(device) => stability::Watch::device(&self.path, device.dev, device.direct.file()),
        }
    }

    /// To be called before a commit: whether what was read is still what it was opened as.
    ///
    /// [`VolumeError::Changed`] if it has another size, or if the device's path now leads to another device. An image
    /// that was replaced by another file (a rename over it) is no change: what was read is the old one, whole.
    pub fn recheck(&self) -> Result<(), VolumeError> {
        let changed = |what: String| Err(VolumeError::Changed { path: self.path.clone(), what });
        let now = match &self.kind {
            Kind::Image(file) => {
                file.metadata().map_err(|e| VolumeError::inspect(&self.path, "get its size", e))?.len()
            }
            Kind::Device(device) => {
                let meta = std::fs::metadata(&self.path)
                    .map_err(|e| VolumeError::inspect(&self.path, "look at the device node", e))?;
                if Dev::from_rdev(meta.rdev()) != device.dev {
                    return changed("its path leads to another device now".to_owned());
                }
                if device.dev.sequence() != device.sequence {
                    return changed("another disk or backing file has its number now".to_owned());
                }
                device_bytes(&self.path, device.direct.file(), self.sector_size())?
            }
        };
        if now != self.length {
            return changed(format!("it had {} bytes and has {now}", self.length));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({}, {})", self.describe(), self.identity)
    }
}

impl Volume for Source {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let (path, length) = (|| self.path.clone(), self.length);
        let len = buf.len() as u64;
        let range = checked_range(at, buf.len(), length).ok_or_else(|| VolumeError::OutOfBounds {
            path: path(),
            at: at.0,
            len,
            length,
        })?;
        let got = match &self.kind {
            Kind::Image(file) => read_full(file, at.0, buf),
            Kind::Device(device) => device.direct.read(at.0, buf),
        };
        match got {
            Ok(got) if got as u64 == len => Ok(()),
            Ok(got) => Err(VolumeError::ShortRead { path: path(), range, got: got as u64 }),
            Err(source) => Err(VolumeError::Read { path: path(), range, source }),
        }
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        match &self.kind {
            Kind::Image(file) => next_data(&self.path, file, from, self.length),
            Kind::Device(_) => Ok((from.0 < self.length).then_some(from.0..self.length)),
        }
    }

    fn describe(&self) -> String {
        let kind = if self.is_device() { "device" } else { "image" };
        format!("{kind} {}", self.path.display())
    }
}

/// The next data of a regular file, by SEEK_DATA and SEEK_HOLE; everything is data where they are not known.
pub(crate) fn next_data(
    path: &Path,
    file: &File,
    from: ByteOffset,
    length: u64,
) -> Result<Option<Range<u64>>, VolumeError> {
    use rustix::fs::SeekFrom;
    use rustix::io::Errno;
    if from.0 >= length {
        return Ok(None);
    }
    let failed = |e: Errno| VolumeError::inspect(path, "look for its holes", e);
    // Several threads may seek at once: the answer is the return value, and nobody uses the file's position.
    let start = match rustix::fs::seek(file, SeekFrom::Data(from.0)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return unless_shrunk(path, file, length),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(Some(from.0..length)),
        Err(e) => return Err(failed(e)),
    };
    if start >= length {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(start)).map_err(failed)?;
    Ok(Some(start..end.min(length)))
}

/// "No more data" is only believed of a file that is as long as it was: behind the end of a truncated one there would
/// be no data either, and its bytes would pass for zeroes.
fn unless_shrunk(path: &Path, file: &File, length: u64) -> Result<Option<Range<u64>>, VolumeError> {
    let now = file.metadata().map_err(|e| VolumeError::inspect(path, "get its size", e))?.len();
    if now < length {
        let what = format!("it had {length} bytes and has {now}");
        return Err(VolumeError::Changed { path: path.to_owned(), what });
    }
    Ok(None)
}

/// Finds out what is at `path` without opening it: a fifo would wait for a writer, a tape would rewind.
pub(crate) fn locate(path: &Path) -> io::Result<(OwnedFd, rustix::fs::Stat)> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let stat = rustix::fs::fstat(&found)?;
    Ok((found, stat))
}

/// Opens what a descriptor stands for once more: the very same inode, whatever its path leads to by now.
pub(crate) fn reopen(found: impl AsFd, flags: OFlags) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", found.as_fd().as_raw_fd());
    let opened = rustix::fs::open(link, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
    Ok(File::from(opened))
}

/// Bytes in whole sectors: behind the last one (a loop device with 4 KiB sectors over a file of another length) the
/// kernel lets nobody read or write.
fn device_bytes(path: &Path, file: &File, sector: u32) -> Result<u64, VolumeError> {
    let bytes = sys::device_bytes(file).map_err(|e| VolumeError::inspect(path, "get the device's size", e))?;
    Ok(bytes - bytes % u64::from(sector.max(1)))
}

fn sector_size(path: &Path, file: &File) -> Result<u32, VolumeError> {
    rustix::fs::ioctl_blksszget(file).map_err(|e| VolumeError::inspect(path, "get the device's sector size", e))
}

/// For people.
pub(crate) fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::BlockDevice => "a block device",
        FileType::Directory => "a directory",
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "neither a file nor a block device",
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
