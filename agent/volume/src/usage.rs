//! Who uses a device or a file: mounts of every mount namespace, swap, loop devices.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::sysfs::{Dev, all_devices};

/// A file's device and inode number: the same file by any name.
pub(crate) type FileId = (u64, u64);

/// The regular file's number; `None` if it is not there.
pub(crate) fn file_id(path: &Path) -> Option<FileId> {
    let meta = fs::metadata(path).ok()?;
    meta.is_file().then(|| (meta.dev(), meta.ino()))
}

/// The first of `devices` that is mounted in any mount namespace that can be read, and where.
pub(crate) fn mounted(devices: &[Dev]) -> Option<(Dev, PathBuf)> {
    let mut seen = BTreeSet::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let numbered = processes.filter(|p| p.file_name().is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit()));
    for process in std::iter::once(PathBuf::from("/proc/self")).chain(numbered) {
        // One look at each namespace. Those that cannot be read are left to the exclusive open, which sees all mounts.
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let Ok(table) = fs::read(process.join("mountinfo")) else { continue };
        if let Some(found) = table.split(|b| *b == b'\n').find_map(|line| mount_of(line, devices)) {
            return Some(found);
        }
    }
    None
}

/// `36 35 98:0 /root /mount/point options optional... - type source options`
fn mount_of(line: &[u8], devices: &[Dev]) -> Option<(Dev, PathBuf)> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let point = unescape(fields.get(4)?);
    let by_number = Dev::parse(std::str::from_utf8(fields[2]).ok()?).filter(|d| devices.contains(d));
    // btrfs and others show a number of no device; what they name as their source is one.
    let by_source = || {
        let dash = fields.iter().position(|f| *f == b"-")?;
        let source = unescape(fields.get(dash + 2)?);
        Dev::of_path(&source).filter(|d| source.is_absolute() && devices.contains(d))
    };
    by_number.or_else(by_source).map(|dev| (dev, point))
}

/// The first of `devices` that is swapped to.
pub(crate) fn swap_device(devices: &[Dev]) -> Option<Dev> {
    swaps().iter().find_map(|path| Dev::of_path(path).filter(|d| devices.contains(d)))
}

/// Whether the file is swapped to.
pub(crate) fn is_swap_file(file: FileId) -> bool {
    swaps().iter().any(|path| file_id(path) == Some(file))
}

fn swaps() -> Vec<PathBuf> {
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let lines = table.split(|b| *b == b'\n').skip(1).filter(|l| !l.is_empty());
    lines.filter_map(|l| l.split(|b| *b == b' ' || *b == b'\t').next()).map(unescape).collect()
}

/// The loop device that lies on this file.
pub(crate) fn loop_over(file: FileId) -> Option<Dev> {
    let disks = all_devices().into_iter().filter(|d| d.partition_number().is_none());
    disks.into_iter().find(|d| d.loop_backing().and_then(|p| file_id(&p)) == Some(file))
}

/// The loop device that lies on one of `devices`. Loop devices do not claim what they lie on.
pub(crate) fn loop_over_device(devices: &[Dev]) -> Option<Dev> {
    let lies_on = |d: &Dev| d.below().iter().skip(1).any(|b| devices.contains(b));
    all_devices().into_iter().find(|d| d.partition_number().is_none() && !devices.contains(d) && lies_on(d))
}

/// The kernel writes space, tab, newline and backslash as `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                out.push(d.iter().fold(0u8, |n, b| n.wrapping_mul(8).wrapping_add(b - b'0')));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines_are_understood() {
        let dev = Dev::parse("98:0").expect("a number");
        let line = br"36 35 98:0 / /mnt/a\040b\134 rw master:1 - ext3 /dev/root rw";
        assert_eq!(mount_of(line, &[dev]), Some((dev, PathBuf::from(r"/mnt/a b\"))));
        assert_eq!(mount_of(line, &[Dev::parse("98:1").expect("a number")]), None);
        assert_eq!(mount_of(b"", &[dev]), None);
        assert_eq!(mount_of(b"1 2 3", &[dev]), None);
    }
}
