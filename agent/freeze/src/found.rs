//! What lies on a set of devices, as [`crate::superblocks`] finds it.

use std::fmt;
use std::path::PathBuf;

use backhaul_volume::sysfs::Dev;
use serde::{Deserialize, Serialize};

/// Everything that lies on the devices that were asked for.
///
/// Never in it: programs that write to a device itself, beside any file system, as some databases do. The kernel does
/// not say who they are; only writes that are counted between freeze and thaw show them.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// To be frozen, in this order: a file system in an image comes before the one that the image lies on.
    pub superblocks: Vec<Superblock>,
    /// Cannot be frozen. Only if nothing was written to their devices all the time do they hold still.
    pub not_freezable: Vec<NotFreezable>,
    /// Swapped to. The kernel writes there whether or not a file system is frozen.
    pub swap: Vec<Swap>,
    /// Devices that nothing has claimed: who wants their cached writes on disk flushes them.
    #[serde(with = "texts")]
    pub unmounted: Vec<Dev>,
    /// What a person should know, in whole sentences.
    pub caveats: Vec<String>,
}

/// A file system that is mounted, however often and wherever.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Superblock {
    /// "ext4".
    pub kind: String,
    /// The kernel's number for it: of its device, or of none (btrfs).
    #[serde(with = "text")]
    pub dev: Dev,
    /// All devices that it lies on, a journal's too.
    #[serde(with = "texts")]
    pub devices: Vec<Dev>,
    /// Those of them that were not asked for. If there are any, the devices that were asked for are not a whole file
    /// system, frozen or not.
    #[serde(with = "texts")]
    pub outside: Vec<Dev>,
    /// Where it is mounted, as the processes there see it; none if it was unmounted while in use.
    pub mounts: Vec<PathBuf>,
    /// Frozen like others: nobody can then make it writable.
    pub read_only: bool,
    /// 0 on the devices that were asked for, 1 in images on file systems of level 0, and so on.
    pub level: u32,
}

impl fmt::Display for Superblock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.devices.first().unwrap_or(&self.dev);
        match self.mounts.first() {
            Some(point) => write!(f, "{} ({} on {device})", point.display(), self.kind),
            None => write!(f, "{} on {device}, which no path leads to", self.kind),
        }
    }
}

/// In use, and cannot be frozen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NotFreezable {
    /// "vfat"; empty if not known.
    pub kind: String,
    /// What it lies on.
    #[serde(with = "texts")]
    pub devices: Vec<Dev>,
    /// Where it is mounted.
    pub mounts: Vec<PathBuf>,
    /// Why not.
    pub why: WhyNot,
}

/// Why something cannot be frozen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum WhyNot {
    /// File systems of this type cannot be frozen, as far as is known.
    Kind,
    /// Mounted, but other mounts hide it and nothing is open there that would be a way in.
    Unreachable,
    /// Something has claimed the device, and it is no mount that can be seen: a file system that was unmounted while in
    /// use, a mount namespace without a process, or something that is no file system (ZFS, a cluster).
    Claimed,
}

impl fmt::Display for NotFreezable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices: Vec<String> = self.devices.iter().map(Dev::to_string).collect();
        let devices = devices.join(", ");
        match self.why {
            WhyNot::Kind => write!(f, "{} on {devices} is of a type that cannot be frozen", self.kind),
            WhyNot::Unreachable => write!(f, "{} on {devices} is hidden by another mount", self.kind),
            WhyNot::Claimed => write!(f, "{devices} is in use, and not by a mount that can be seen"),
        }
    }
}

/// Where the kernel swaps to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Swap {
    /// All of a device.
    Device(#[serde(with = "text")] Dev),
    /// A file on one of the file systems.
    File(PathBuf),
}

/// A device as "8:1".
pub(crate) mod text {
    use super::*;
    pub(crate) fn serialize<S: serde::Serializer>(dev: &Dev, s: S) -> Result<S::Ok, S::Error> {
        let (major, minor) = dev.numbers();
        s.collect_str(&format_args!("{major}:{minor}"))
    }
    pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Dev, D::Error> {
        let text = String::deserialize(d)?;
        Dev::parse(&text).ok_or_else(|| serde::de::Error::custom("not a device number"))
    }
}

/// Devices as `["8:1"]`.
pub(crate) mod texts {
    use super::*;
    #[derive(Serialize, Deserialize)]
    struct One(#[serde(with = "text")] Dev);
    pub(crate) fn serialize<S: serde::Serializer>(devices: &[Dev], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(devices.iter().map(|d| One(*d)))
    }
    pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<Dev>, D::Error> {
        Ok(Vec::<One>::deserialize(d)?.into_iter().map(|one| one.0).collect())
    }
}
