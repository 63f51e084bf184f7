//! Which devices a file system lies on: more than one with btrfs, an XFS with a log or real-time device of its own, an
//! ext4 with a journal elsewhere.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_volume::frozen::{btrfs_id, loop_file};
use backhaul_volume::sysfs::{Dev, all_devices};

use crate::mounts::{Mount, open_device};

/// All devices of the file system that these are mounts of.
pub(crate) fn devices(mounts: &[&Mount]) -> Vec<Dev> {
    let Some(mount) = mounts.first() else { return Vec::new() };
    let mut devices = match (mount.kind.as_str(), mount.dev.numbers().0) {
        ("btrfs", _) => of_btrfs(mounts),
        // No device of its own: what it names as its source may be one, or several (bcachefs).
        (_, 0) => sources(mount),
        _ => vec![mount.dev],
    };
    match mount.kind.as_str() {
        "xfs" => devices.extend(["logdev", "rtdev"].iter().filter_map(|o| Dev::of_path(Path::new(mount.option(o)?)))),
        "ext3" | "ext4" => devices.extend(ext_journal(mount.dev)),
        _ => {}
    }
    devices
}

fn sources(mount: &Mount) -> Vec<Dev> {
    let Some(text) = mount.source.to_str().filter(|s| s.starts_with('/')) else { return Vec::new() };
    text.split(':').filter_map(|p| Dev::of_path(Path::new(p))).collect()
}

fn of_btrfs(mounts: &[&Mount]) -> Vec<Dev> {
    let id = mounts.iter().find_map(|m| btrfs_id(m.open().ok()?).ok());
    let source = || Dev::of_path(&mounts.first()?.source);
    match id.map(|id| devices_of_btrfs(&id)) {
        Some(devices) if !devices.is_empty() => devices,
        // Hidden everywhere. Its source names one of its devices, if that path means the same here.
        _ => source().map(|d| btrfs_of(d).map_or(vec![d], |id| devices_of_btrfs(&id))).unwrap_or_default(),
    }
}

/// What the kernel says of each mounted btrfs: its UUID and devices.
pub(crate) fn devices_of_btrfs(id: &[u8; 16]) -> Vec<Dev> {
    let names = fs::read_dir(format!("/sys/fs/btrfs/{}/devices", uuid(id))).into_iter().flatten();
    names.filter_map(|e| Dev::parse(&fs::read_to_string(e.ok()?.path().join("dev")).ok()?)).collect()
}

/// The UUID of the mounted btrfs that has this device.
pub(crate) fn btrfs_of(dev: Dev) -> Option<[u8; 16]> {
    let names = fs::read_dir("/sys/fs/btrfs").ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok());
    names.filter_map(|n| parse_uuid(&n)).find(|id| devices_of_btrfs(id).contains(&dev))
}

fn uuid(id: &[u8; 16]) -> String {
    let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let hex: String = text.chars().filter(|c| *c != '-').collect();
    let number = u128::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == 32)?;
    let mut id = [0; 16];
    for (i, byte) in id.iter_mut().enumerate() {
        *byte = (number >> (120 - 8 * i)) as u8;
    }
    Some(id)
}

/// The device of an ext3's or ext4's journal, if that is not in the file system itself. No table names it.
fn ext_journal(dev: Dev) -> Option<Dev> {
    let mut superblock = [0; 1024];
    open_device(dev, false).ok()?.read_exact_at(&mut superblock, 1024).ok()?;
    let field =
        |at: usize| u32::from_le_bytes([superblock[at], superblock[at + 1], superblock[at + 2], superblock[at + 3]]);
    // fs/ext4/ext4.h: s_magic, s_feature_compat with COMPAT_HAS_JOURNAL, s_journal_inum, s_journal_dev.
    let has_journal = superblock[0x38..0x3a] == [0x53, 0xef] && field(0x5c) & 4 != 0;
    (has_journal && field(0xe0) == 0).then(|| unpack(field(0xe4).into()))
}

/// From the kernel's `new_encode_dev`.
fn unpack(packed: u64) -> Dev {
    let (major, minor) = ((packed & 0xfff00) >> 8, (packed & 0xff) | ((packed >> 12) & 0xfff00));
    Dev::from_rdev(rustix::fs::makedev(major as u32, minor as u32))
}

/// A loop device and where the file beneath it lies.
pub(crate) struct LoopFile {
    pub(crate) device: Dev,
    /// `st_dev` and inode number.
    pub(crate) file: (Dev, u64),
}

/// All loop devices that lie on a file.
pub(crate) fn loops() -> Vec<LoopFile> {
    let disks = all_devices().into_iter().filter(|d| d.partition_number().is_none() && d.loop_backing().is_some());
    disks
        .filter_map(|device| {
            let (dev, inode) = loop_file(open_device(device, false).ok()?).ok()?;
            Some(LoopFile { device, file: (unpack(dev), inode) })
        })
        .collect()
}

impl LoopFile {
    /// The btrfs that the file lies on. Its numbers are those of a subvolume, so that only the path tells.
    pub(crate) fn btrfs(&self) -> Option<[u8; 16]> {
        let fd = fs::File::open(self.device.loop_backing()?).ok()?;
        let at = rustix::fs::fstat(&fd).ok()?;
        ((Dev::from_rdev(at.st_dev), at.st_ino) == self.file).then(|| btrfs_id(fd.as_fd()).ok())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        assert_eq!(parse_uuid(text).map(|id| uuid(&id)).as_deref(), Some(text));
        assert_eq!(parse_uuid("features"), None);
        assert_eq!(unpack(0x0801).numbers(), (8, 1));
        assert_eq!(unpack(0x10_0812).numbers(), (8, 0x112));
    }
}
