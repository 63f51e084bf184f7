//! What the kernel says of a block device beside the device itself: `/sys/dev/block`, and udev's database if there is one.
//!
//! Nothing here fails: what cannot be read is not known, and every user decides for himself what that means.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A block device by number. Another disk may get the number later: hold an open descriptor beside it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Dev {
    major: u32,
    minor: u32,
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "/dev/{name}"),
            None => write!(f, "device {}:{}", self.major, self.minor),
        }
    }
}

impl Dev {
    /// From `st_rdev`.
    pub fn from_rdev(rdev: u64) -> Self {
        Self { major: rustix::fs::major(rdev), minor: rustix::fs::minor(rdev) }
    }

    /// From "8:1".
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    /// As other structures of the kernel hold it: major and minor number.
    pub fn numbers(&self) -> (u32, u32) {
        (self.major, self.minor)
    }

    /// The block device that a path leads to.
    pub fn of_path(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        meta.file_type().is_block_device().then(|| Self::from_rdev(meta.rdev()))
    }

    fn folder(&self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{}:{}", self.major, self.minor))
    }

    /// An attribute's text without white space around it; `None` if it is not there or empty.
    pub fn attribute(&self, name: &str) -> Option<String> {
        let bytes = fs::read(self.folder().join(name)).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_matches(|c: char| c.is_whitespace() || c.is_control());
        (!text.is_empty()).then(|| text.to_owned())
    }

    fn uevent(&self, key: &str) -> Option<String> {
        field(&self.attribute("uevent")?, key)
    }

    /// A property of udev's database.
    pub fn udev(&self, key: &str) -> Option<String> {
        let text = fs::read_to_string(format!("/run/udev/data/b{}:{}", self.major, self.minor)).ok()?;
        field(&text, &format!("E:{key}"))
    }

    /// The kernel's name, "sda1".
    pub fn name(&self) -> Option<String> {
        self.uevent("DEVNAME")
    }

    /// Its node below /dev, if that is the device.
    pub fn node(&self) -> Option<PathBuf> {
        let path = Path::new("/dev").join(self.name()?);
        (Self::of_path(&path) == Some(*self)).then_some(path)
    }

    /// The partition's number; `None` for a whole disk.
    pub fn partition_number(&self) -> Option<u32> {
        self.attribute("partition")?.parse().ok()
    }

    /// The disk that this is a partition of, or itself.
    pub fn whole(&self) -> Self {
        if self.partition_number().is_none() {
            return *self;
        }
        let parent = fs::canonicalize(self.folder()).ok().and_then(|p| Some(p.parent()?.join("dev")));
        parent.and_then(|p| Self::parse(&fs::read_to_string(p).ok()?)).unwrap_or(*self)
    }

    /// The partitions of a whole disk; none for a partition.
    pub fn partitions(&self) -> Vec<Self> {
        let parts = entries(&self.folder()).into_iter().filter(|p| p.join("partition").exists());
        parts.filter_map(|p| Self::parse(&fs::read_to_string(p.join("dev")).ok()?)).collect()
    }

    fn linked(&self, folder: &str) -> Vec<Self> {
        let links = entries(&self.folder().join(folder));
        links.into_iter().filter_map(|p| Self::parse(&fs::read_to_string(p.join("dev")).ok()?)).collect()
    }

    /// Devices built directly on this one (LVM, RAID, dm-crypt).
    pub fn holders(&self) -> Vec<Self> {
        self.linked("holders")
    }

    /// Everything that lies on this device: its partitions, what holds them, and so on; itself first.
    pub fn above(&self) -> Vec<Self> {
        closure(*self, |d| [d.partitions(), d.holders()].concat())
    }

    /// Everything that this device lies on, partitions not counted as lying on their disk; itself first.
    pub fn below(&self) -> Vec<Self> {
        closure(*self, |d| {
            let backing = d.loop_backing().and_then(|p| Self::of_path(&p));
            d.linked("slaves").into_iter().chain(backing).collect()
        })
    }

    /// The file or device beneath a loop device.
    pub fn loop_backing(&self) -> Option<PathBuf> {
        self.whole().attribute("loop/backing_file").map(PathBuf::from)
    }

    /// Grows by one whenever another disk or backing file gets this number (kernel 5.15).
    pub fn sequence(&self) -> Option<u64> {
        self.whole().attribute("diskseq")?.parse().ok()
    }

    /// Whether the device's work is counted.
    pub fn is_counted(&self) -> bool {
        self.whole().attribute("queue/iostats").as_deref() == Some("1")
    }

    /// Sectors written and sectors discarded since the device appeared. Counted when a request completes.
    pub fn written(&self) -> Option<Written> {
        let stat = self.attribute("stat")?;
        let fields: Vec<u64> = stat.split_whitespace().map_while(|f| f.parse().ok()).collect();
        // Documentation/block/stat.rst: 7th field sectors written, 12th and 14th discards and sectors discarded
        // (kernel 4.18). Not the 5th, requests: a mere flush moves it.
        Some(Written { sectors: *fields.get(6)?, discarded: fields.get(13).copied().unwrap_or(0) })
    }

    /// Writes that are under way.
    pub fn writes_in_flight(&self) -> Option<u64> {
        self.attribute("inflight")?.split_whitespace().nth(1)?.parse().ok()
    }
}

/// Write counters of a device, in sectors of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Written {
    /// Written.
    pub sectors: u64,
    /// Discarded.
    pub discarded: u64,
}

/// All block devices that the kernel has, partitions too.
pub fn all_devices() -> Vec<Dev> {
    let names = entries(Path::new("/sys/dev/block"));
    names.iter().filter_map(|p| Dev::parse(p.file_name()?.to_str()?)).collect()
}

fn closure(from: Dev, next: impl Fn(&Dev) -> Vec<Dev>) -> Vec<Dev> {
    let (mut found, mut seen) = (vec![from], BTreeSet::from([from]));
    let mut i = 0;
    while i < found.len() {
        let more = next(&found[i]);
        found.extend(more.into_iter().filter(|d| seen.insert(*d)));
        i += 1;
    }
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let Ok(dir) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = dir.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    paths
}

fn field(text: &str, key: &str) -> Option<String> {
    let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='))?.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_keys() {
        let text = "E:ID_SERIAL=long_ABC\nE:ID_SERIAL_SHORT=ABC\nE:EMPTY=\n";
        assert_eq!(field(text, "E:ID_SERIAL_SHORT").as_deref(), Some("ABC"));
        assert_eq!(field(text, "E:ID_SERIAL").as_deref(), Some("long_ABC"));
        assert_eq!(field(text, "E:EMPTY"), None);
        assert_eq!(Dev::parse("8:1\n"), Some(Dev { major: 8, minor: 1 }));
        assert_eq!(Dev::parse("8"), None);
    }
}
