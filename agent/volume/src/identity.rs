//! What a volume is known by, so that the disk of the next round is the disk of the last one.
//!
//! Read first: [`Identity`] and [`Identity::same_as`]. Kept as a line of text: `serial 1073741824 S3Z9NX0M`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::sysfs::Dev;

/// What a volume is known by, and its size in bytes.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    key: Key,
    value: String,
    bytes: u64,
}

/// From strong to weak.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Key {
    PartitionUuid,
    Wwn,
    Serial,
    /// A device that has nothing better.
    DevicePath,
    /// An image file. Another inode under the path is the same image.
    ImagePath,
}

const KEYS: [(Key, &str); 5] = [
    (Key::PartitionUuid, "partuuid"),
    (Key::Wwn, "wwn"),
    (Key::Serial, "serial"),
    (Key::DevicePath, "device"),
    (Key::ImagePath, "image"),
];

/// What became of a volume between two looks at it. Sizes in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IdentityMatch {
    /// The same one.
    Same,
    /// The same one, and longer: a new incarnation.
    Grown {
        /// It was this long.
        from: u64,
        /// It is this long.
        to: u64,
    },
    /// The same one, and shorter: refused until it is protected anew.
    Shrunk {
        /// It was this long.
        from: u64,
        /// It is this long.
        to: u64,
    },
    /// Another one: refused until it is protected anew.
    Replaced {
        /// What it was, for people.
        was: String,
        /// What it is, for people.
        is: String,
    },
}

/// A text that is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not the identity of a volume: want KIND BYTES VALUE")]
pub struct IdentityParseError(String);

impl Identity {
    /// An image file is known by its (resolved) path.
    pub fn of_image(path: &Path, bytes: u64) -> Self {
        Self { key: Key::ImagePath, value: path.to_string_lossy().into_owned(), bytes }
    }

    pub(crate) fn of_device(dev: Dev, path: &Path, bytes: u64) -> Self {
        let found = partition_uuid(dev).map(|v| (Key::PartitionUuid, v));
        let found = found.or_else(|| Some((Key::Wwn, suffixed(dev, wwn(dev.whole())?))));
        let found = found.or_else(|| Some((Key::Serial, suffixed(dev, serial(dev.whole())?))));
        let (key, value) = found.unwrap_or_else(|| (Key::DevicePath, path.to_string_lossy().into_owned()));
        Self { key, value, bytes }
    }

    /// Whether it is a device that is known only by its path: another disk could get that path unseen. Show a warning.
    pub fn weak(&self) -> bool {
        self.key == Key::DevicePath
    }

    /// Bytes of the volume when it was looked at.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Compares `self`, which was written down, with `now`.
    pub fn same_as(&self, now: &Self) -> IdentityMatch {
        let (from, to) = (self.bytes, now.bytes);
        if (self.key, &self.value) != (now.key, &now.value) {
            return IdentityMatch::Replaced { was: self.describe(), is: now.describe() };
        }
        match to.cmp(&from) {
            std::cmp::Ordering::Equal => IdentityMatch::Same,
            std::cmp::Ordering::Greater => IdentityMatch::Grown { from, to },
            std::cmp::Ordering::Less => IdentityMatch::Shrunk { from, to },
        }
    }

    /// For people: `serial S3Z9NX0M, 1073741824 bytes`.
    pub fn describe(&self) -> String {
        format!("{} {}, {} bytes", self.key.name(), self.value, self.bytes)
    }
}

impl Key {
    fn name(self) -> &'static str {
        KEYS.iter().find(|(k, _)| *k == self).map_or("", |(_, name)| name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.key.name(), self.bytes, self.value)
    }
}

impl FromStr for Identity {
    type Err = IdentityParseError;
    fn from_str(text: &str) -> Result<Self, IdentityParseError> {
        let parse = || {
            let (key, rest) = text.split_once(' ')?;
            let (bytes, value) = rest.split_once(' ')?;
            let key = KEYS.iter().find(|(_, name)| *name == key)?.0;
            (!value.is_empty()).then_some(Self { key, value: value.to_owned(), bytes: bytes.parse().ok()? })
        };
        parse().ok_or_else(|| IdentityParseError(text.chars().take(200).collect()))
    }
}

/// Names by which a person may call a device: serial, WWN, kernel name, node. The first is what to suggest.
pub(crate) fn names_of(dev: Dev) -> Vec<String> {
    let name = dev.name();
    // A partition is not its disk: the disk's serial alone must not confirm it.
    let strong = [serial(dev.whole()), wwn(dev.whole())].into_iter().flatten().map(|v| suffixed(dev, v));
    let node = name.as_ref().map(|n| format!("/dev/{n}"));
    strong.chain(partition_uuid(dev)).chain(name).chain(node).collect()
}

fn suffixed(dev: Dev, disk: String) -> String {
    match dev.partition_number() {
        Some(n) => format!("{disk}-part{n}"),
        None => disk,
    }
}

fn serial(disk: Dev) -> Option<String> {
    // NVMe, MMC; virtio; device mapper and RAID have uuids of their own; SCSI by its vital product data.
    let attributes = ["device/serial", "serial", "dm/uuid", "md/uuid"];
    let by_sysfs = attributes.iter().find_map(|a| usable(disk.attribute(a)?));
    // Page 0x80 is a 4-byte head and the serial number; the head's bytes are control characters or the page's length.
    let by_vpd = || usable(disk.attribute("device/vpd_pg80")?.chars().skip_while(|c| !c.is_ascii_graphic()).collect());
    by_sysfs.or_else(by_vpd).or_else(|| usable(disk.udev("ID_SERIAL_SHORT")?))
}

fn wwn(disk: Dev) -> Option<String> {
    let by_sysfs = ["wwid", "device/wwid"].iter().find_map(|a| usable(disk.attribute(a)?));
    by_sysfs.or_else(|| usable(disk.udev("ID_WWN")?))
}

fn partition_uuid(dev: Dev) -> Option<String> {
    dev.partition_number()?;
    let by_kernel = dev.attribute("uevent").and_then(|t| {
        let uuid = t.lines().find_map(|l| l.strip_prefix("PARTUUID="))?;
        usable(uuid.to_owned())
    });
    by_kernel.or_else(|| usable(dev.udev("ID_PART_ENTRY_UUID")?)).or_else(|| by_link(dev))
}

fn by_link(dev: Dev) -> Option<String> {
    let links = std::fs::read_dir("/dev/disk/by-partuuid").ok()?;
    let link = links.filter_map(|e| Some(e.ok()?.path())).find(|p: &PathBuf| Dev::of_path(p) == Some(dev))?;
    usable(link.file_name()?.to_str()?.to_owned())
}

/// Many devices answer with filler where they have no number; it would make strangers equal.
fn usable(text: String) -> Option<String> {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let filler = text.chars().all(|c| matches!(c, '0' | ' ' | '-' | '.' | '_'));
    let words = ["none", "unknown", "n/a", "not specified", "to be filled by o.e.m."];
    (!filler && !words.contains(&text.to_lowercase().as_str())).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        text.parse().expect("an identity")
    }

    #[test]
    fn text_round_trips() {
        for text in ["serial 10 A B", "wwn 1 naa.5", "partuuid 7 ab-01", "device 9 /dev/loop0", "image 3 /a b/c\td"] {
            assert_eq!(id(text).to_string(), text);
        }
        for bad in ["", "serial", "serial 1", "serial 1 ", "serial x y", "other 1 y", "serial -1 y"] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn grown_shrunk_replaced() {
        let was = id("serial 10 A");
        assert_eq!(was.same_as(&id("serial 10 A")), IdentityMatch::Same);
        assert_eq!(was.same_as(&id("serial 11 A")), IdentityMatch::Grown { from: 10, to: 11 });
        assert_eq!(was.same_as(&id("serial 9 A")), IdentityMatch::Shrunk { from: 10, to: 9 });
        for other in ["serial 10 B", "wwn 10 A", "device 10 A"] {
            assert!(matches!(was.same_as(&id(other)), IdentityMatch::Replaced { .. }), "{other}");
        }
        assert!(id("device 1 /dev/loop0").weak() && !id("image 1 /a").weak() && !was.weak());
    }

    #[test]
    fn filler_is_no_serial() {
        for filler in ["", "   ", "0000", "00-00", "None", "To Be Filled By O.E.M."] {
            assert_eq!(usable(filler.to_owned()), None, "{filler:?}");
        }
        assert_eq!(usable("  S3Z  9 ".to_owned()).as_deref(), Some("S3Z 9"));
    }
}
