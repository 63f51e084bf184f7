//! Everything that a restore refuses, before anything is written (I10).
//!
//! Read first: [`check`]. What it looked at it keeps open, so that nothing can be put in its place afterwards.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use backhaul_protocol::digest::is_zero;
use backhaul_protocol::geometry::ByteOffset;
use rustix::fs::{FileType, Mode, OFlags};

use super::{HEAD_LEN, Refusal, TargetError};
use crate::buffer::AlignedBuffer;
use crate::direct::{DirectIo, read_full};
use crate::rebuild::Existing;
use crate::source::{kind_name, locate, next_data, reopen};
use crate::sysfs::Dev;
use crate::usage::{self, FileId};
use crate::{Volume, VolumeError, identity, sys};

/// What a restore asks of its target.
#[derive(Clone, Debug, Default)]
pub struct TargetNeeds {
    /// Bytes of the volume.
    pub length: u64,
    /// Bytes that will be written and not be holes, if that is known: a file's free space is checked against it.
    pub data_bytes: Option<u64>,
    /// Paths that are being replicated, which must not be overwritten: by any name, on either side of a loop device, as
    /// partition or whole disk.
    pub refuse: Vec<PathBuf>,
    /// What the user typed for `--confirm-target`: serial, WWN or name of the device.
    pub confirm: Option<String>,
}

/// A target that passed every check. Nothing was written. A device stays claimed until this is dropped.
#[derive(Debug)]
pub struct CheckedTarget {
    pub(super) path: PathBuf,
    pub(super) length: u64,
    pub(super) place: Place,
}

pub(super) enum Place {
    /// A file that is to be created in this folder.
    New { folder: OwnedFd, name: std::ffi::OsString },
    /// A regular file that is there, opened for reading and writing.
    File { file: File, length: u64 },
    /// A block device of `length` bytes, claimed exclusively, opened for reading and writing past the cache.
    Device { dev: Dev, direct: DirectIo, length: u64 },
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::New { name, .. } => write!(f, "New({})", name.display()),
            Self::File { length, .. } => write!(f, "File({length} bytes)"),
            Self::Device { dev, .. } => write!(f, "Device({dev})"),
        }
    }
}

impl CheckedTarget {
    /// Bytes that the target will have.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of a device behind the volume's end: a restore leaves them as they are.
    pub fn beyond(&self) -> u64 {
        match &self.place {
            Place::Device { length, .. } => length - self.length,
            Place::New { .. } | Place::File { .. } => 0,
        }
    }

    /// How many bytes lie there that the volume reaches.
    fn present(&self) -> u64 {
        match &self.place {
            Place::New { .. } => 0,
            Place::File { length, .. } | Place::Device { length, .. } => (*length).min(self.length),
        }
    }
}

impl Existing for CheckedTarget {
    fn is_fresh(&self) -> bool {
        matches!(self.place, Place::New { .. } | Place::File { length: 0, .. })
    }

    fn is_device(&self) -> bool {
        matches!(self.place, Place::Device { .. })
    }
}

/// What is there before the restore, brought to the volume's length.
impl Volume for CheckedTarget {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let range = at.0..at.0.saturating_add(buf.len() as u64);
        let has = self.present().saturating_sub(at.0).min(buf.len() as u64) as usize;
        buf[has..].fill(0);
        let got = match &self.place {
            Place::New { .. } => Ok(0),
            Place::File { file, .. } => read_full(file, at.0, &mut buf[..has]),
            Place::Device { direct, .. } => direct.read(at.0, &mut buf[..has]),
        };
        match got {
            Ok(got) if got == has => Ok(()),
            Ok(got) => Err(VolumeError::ShortRead { path: self.path.clone(), range, got: got as u64 }),
            Err(source) => Err(VolumeError::Read { path: self.path.clone(), range, source }),
        }
    }

    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        let present = self.present();
        match &self.place {
            Place::New { .. } => Ok(None),
            Place::File { file, .. } => next_data(&self.path, file, from, present),
            Place::Device { .. } => Ok((from.0 < present).then_some(from.0..present)),
        }
    }

    fn describe(&self) -> String {
        format!("target {}", self.path.display())
    }
}

pub(super) fn check(path: &Path, needs: &TargetNeeds) -> Result<CheckedTarget, TargetError> {
    let place = match locate(path) {
        Ok((found, stat)) => match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => check_file(path, needs, found, (stat.st_dev, stat.st_ino))?,
            FileType::BlockDevice => check_device(path, needs, &found, Dev::from_rdev(stat.st_rdev))?,
            other => return Err(TargetError::refused(path, Refusal::Kind(kind_name(other)))),
        },
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => check_new(path, needs)?,
        Err(e) => return Err(TargetError::io(path, "look at", e)),
    };
    Ok(CheckedTarget { path: path.to_owned(), length: needs.length, place })
}

fn check_new(path: &Path, needs: &TargetNeeds) -> Result<Place, TargetError> {
    let not_found = |what: String| TargetError::NotFound { path: path.to_owned(), what };
    if path.symlink_metadata().is_ok() {
        return Err(not_found("it is a symbolic link to something that is not there".to_owned()));
    }
    // `a/` and `a/..` are folders, and so is what they would name.
    let ends_in_slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let name = path.file_name().filter(|_| !ends_in_slash).ok_or_else(|| not_found("it is not there".to_owned()))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A node below /dev that is not there is a disk that is not there, and not a file to be made in memory.
    if parent.starts_with("/dev") && !parent.starts_with("/dev/shm") {
        return Err(not_found("there is no such device".to_owned()));
    }
    let folder = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let folder = folder.map_err(|e| match io::Error::from(e) {
        e if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            not_found(format!("there is no folder {}", parent.display()))
        }
        e => TargetError::io(path, "look at the folder of", e),
    })?;
    // O_PATH does not ask for leave: ask now, and not after the download.
    rustix::fs::accessat(&folder, ".", rustix::fs::Access::WRITE_OK, rustix::fs::AtFlags::EACCESS)
        .map_err(|e| TargetError::io(path, "create", e))?;
    let space = rustix::fs::fstatvfs(&folder).map_err(|e| TargetError::io(path, "get the free space for", e))?;
    check_space(path, needs, space.f_bavail.saturating_mul(space.f_frsize))?;
    Ok(Place::New { folder, name: name.to_owned() })
}

fn check_file(path: &Path, needs: &TargetNeeds, found: OwnedFd, id: FileId) -> Result<Place, TargetError> {
    let refused = |why| Err(TargetError::refused(path, why));
    for source in &needs.refuse {
        let beneath = || Dev::of_path(source).into_iter().flat_map(|d| d.below()).filter_map(|d| d.loop_backing());
        if usage::file_id(source) == Some(id) || beneath().any(|p| usage::file_id(&p) == Some(id)) {
            return refused(Refusal::Replicated(source.display().to_string()));
        }
    }
    if usage::is_swap_file(id) {
        return refused(Refusal::Swap(path.display().to_string()));
    }
    if let Some(dev) = usage::loop_over(id) {
        return refused(Refusal::Loop(dev.to_string()));
    }
    let file = reopen(&found, OFlags::RDWR).map_err(|e| match e.raw_os_error() {
        Some(libc::ETXTBSY) => TargetError::refused(path, Refusal::Busy),
        _ => TargetError::io(path, "open", e),
    })?;
    let meta = file.metadata().map_err(|e| TargetError::io(path, "look at", e))?;
    let space = rustix::fs::fstatvfs(&file).map_err(|e| TargetError::io(path, "get the free space for", e))?;
    use std::os::unix::fs::MetadataExt;
    let free = space.f_bavail.saturating_mul(space.f_frsize).saturating_add(meta.blocks().saturating_mul(512));
    check_space(path, needs, free)?;
    Ok(Place::File { length: meta.len(), file })
}

fn check_space(path: &Path, needs: &TargetNeeds, free: u64) -> Result<(), TargetError> {
    match needs.data_bytes {
        Some(data) if data > free => Err(TargetError::NoSpace {
            path: path.to_owned(),
            what: format!("{data} bytes are needed, {free} are free"),
        }),
        _ => Ok(()),
    }
}

fn check_device(path: &Path, needs: &TargetNeeds, found: &OwnedFd, dev: Dev) -> Result<Place, TargetError> {
    let refused = |why| Err(TargetError::refused(path, why));
    if let Some(source) = needs.refuse.iter().find(|source| is_same_medium(dev, source)) {
        return refused(Refusal::Replicated(source.display().to_string()));
    }
    if let Some(why) = in_use(dev) {
        return refused(why);
    }
    // Asked first, since opening a read-only device for writing fails with EACCES, like missing permissions.
    if dev.attribute("ro").as_deref() == Some("1") {
        return refused(Refusal::ReadOnly);
    }
    // From here to the end of the restore nobody else can claim it. Links and nodes may change: this is the device.
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::DIRECT;
    let file = reopen(found, flags).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => TargetError::refused(path, Refusal::Busy),
        Some(libc::EROFS) => TargetError::refused(path, Refusal::ReadOnly),
        Some(libc::ENXIO | libc::ENOMEDIUM) => {
            TargetError::NotFound { path: path.to_owned(), what: "the device has no medium".to_owned() }
        }
        _ => TargetError::io(path, "open", e),
    })?;
    let failed = |what| move |e: io::Error| TargetError::io(path, what, e);
    if sys::device_is_read_only(&file).map_err(failed("ask whether it is read-only"))? {
        return refused(Refusal::ReadOnly);
    }
    let sector = rustix::fs::ioctl_blksszget(&file).map_err(|e| failed("get the sector size of")(e.into()))?;
    let direct = DirectIo::new(file, sector);
    let has = sys::device_bytes(direct.file()).map_err(failed("get the size of"))?;
    // Behind the last whole sector nothing can be written directly.
    let has = has / direct.sector() * direct.sector();
    if has < needs.length {
        return refused(Refusal::TooSmall { has, needs: needs.length });
    }
    check_confirmation(path, needs, dev, &direct, has)?;
    Ok(Place::Device { dev, direct, length: has })
}

/// Whether writing to `dev` would write to `source`: the same device or loop file, a slave, or disk and partition.
fn is_same_medium(dev: Dev, source: &Path) -> bool {
    let target = dev.below();
    let source_file = usage::file_id(source);
    let source_devices = Dev::of_path(source).map(|d| d.below()).unwrap_or_default();
    let touching = |a: Dev, b: Dev| a == b || a.whole() == b || b.whole() == a;
    let files = |devices: &[Dev]| -> Vec<FileId> {
        devices.iter().filter_map(|d| usage::file_id(&d.loop_backing()?)).collect()
    };
    let (target_files, source_files) = (files(&target), files(&source_devices));
    // Two partitions of one loop device share its file and do not touch.
    let same_disk = source_devices.iter().any(|s| target.iter().any(|t| s.whole() == t.whole()));
    target.iter().any(|t| source_devices.iter().any(|s| touching(*t, *s)))
        || source_file.is_some_and(|f| target_files.contains(&f))
        || (!same_disk && target_files.iter().any(|f| source_files.contains(f)))
}

/// Mounts, swap, loop devices and holders of the device, its partitions and what lies on them; of a partition also of a file system
/// on the whole disk.
fn in_use(dev: Dev) -> Option<Refusal> {
    let mut devices = dev.above();
    devices.push(dev.whole());
    if let Some((device, at)) = usage::mounted(&devices) {
        return Some(Refusal::Mounted { device: device.to_string(), at });
    }
    if let Some(device) = usage::swap_device(&devices) {
        return Some(Refusal::Swap(device.to_string()));
    }
    if let Some(device) = usage::loop_over_device(&devices) {
        return Some(Refusal::Loop(device.to_string()));
    }
    devices.iter().find(|d| !d.holders().is_empty()).map(|held| {
        let holders: Vec<_> = held.holders().iter().map(Dev::to_string).collect();
        Refusal::Held { device: held.to_string(), holders: holders.join(", ") }
    })
}

fn check_confirmation(
    path: &Path,
    needs: &TargetNeeds,
    dev: Dev,
    direct: &DirectIo,
    has: u64,
) -> Result<(), TargetError> {
    let names = identity::names_of(dev);
    // The strongest that needs no quotes.
    let plain = names.iter().find(|n| !n.contains(char::is_whitespace));
    let type_this = plain.cloned().unwrap_or_else(|| path.display().to_string());
    match &needs.confirm {
        Some(given) if names.iter().any(|n| n == given.trim()) => Ok(()),
        Some(given) => Err(TargetError::refused(
            path,
            Refusal::WrongConfirmation { given: given.clone(), names: names.join(", "), type_this },
        )),
        None if has_content(path, direct, has)? => Err(TargetError::refused(path, Refusal::Unconfirmed { type_this })),
        None => Ok(()),
    }
}

/// Whether the first or the last MiB has a byte that is not zero. Partition tables, file systems, LVM and RAID all
/// keep something there.
fn has_content(path: &Path, direct: &DirectIo, has: u64) -> Result<bool, TargetError> {
    let len = HEAD_LEN.min(has);
    let mut buf = AlignedBuffer::new(len as usize);
    for at in [0, has - len] {
        let got = direct.read(at, &mut buf).map_err(|e| TargetError::io(path, "read the content of", e))?;
        if got as u64 != len {
            let e = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(TargetError::io(path, "read the content of", e));
        }
        if !is_zero(&buf) {
            return Ok(true);
        }
    }
    Ok(false)
}
