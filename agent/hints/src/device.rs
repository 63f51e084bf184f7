//! Devices as the kernel sees them: what must not change while they are tracked, and whether they tell of every write.
//!
//! Read first: [`Device`] and [`kind`].

use std::time::Duration;

use backhaul_volume::sysfs::Dev;

use crate::doubt::Doubt;
use crate::layout;

/// What the kernel says of a device. All that must stay as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Device {
    pub disk: u32,
    /// 0 is not known (before kernel 5.15).
    pub sequence: u64,
    pub start: u64,
    pub sectors: u64,
}

impl Device {
    pub fn of(dev: Dev) -> Option<Self> {
        let whole = dev.whole();
        let number = |name: &str| dev.attribute(name)?.parse::<u64>().ok();
        let start = if dev == whole { 0 } else { number("start")? };
        // Sequence numbers begin at 1.
        let sequence = dev.sequence().unwrap_or(0);
        Some(Self { disk: layout::kernel_number(whole)?, sequence, start, sectors: number("size")? })
    }

    pub fn differs_from(&self, tracked: &Self) -> Option<Doubt> {
        if self.disk != tracked.disk || self.sequence != tracked.sequence {
            Some(Doubt::OtherDevice)
        } else if self.start != tracked.start {
            Some(Doubt::Moved)
        } else if self.sectors != tracked.sectors {
            Some(Doubt::Resized)
        } else {
            None
        }
    }
}

/// How a disk tells that a write is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Requests,
    Bios,
}

/// How a disk tells that a write is done; why it does not, or not surely.
pub(crate) fn kind(dev: Dev) -> Result<Kind, &'static str> {
    let whole = dev.whole();
    let has = |name: &str| whole.attribute(name).is_some();
    if whole.attribute("queue/zoned").is_some_and(|z| z != "none") {
        return Err("it is zoned");
    }
    if whole.attribute("queue/dax").as_deref() == Some("1") {
        return Err("programs can write to it without the kernel's block layer (DAX)");
    }
    // Counts whatever this says.
    let is_zram = whole.name().is_some_and(|n| n.starts_with("zram"));
    if !whole.is_counted() && !is_zram {
        return Err(
            "what is written to it is not counted, so that losses would not show (put 1 into its queue/iostats)",
        );
    }
    if has("mq/0/cpu_list") {
        return Ok(Kind::Requests);
    }
    // The other levels hand on what they are given, and are not told when it is done.
    let is_raid =
        whole.attribute("md/level").is_some_and(|l| ["raid1", "raid4", "raid5", "raid6", "raid10"].contains(&&*l));
    if is_zram || is_raid || has("dm/name") {
        return Ok(Kind::Bios);
    }
    Err("its driver is not known to tell of every write that is done (NVMe multipath, RAID 0 and others)")
}

/// Gives writes that were submitted before the device was tracked time to end: programs would take them for
/// strangers, which means another full scan.
pub(crate) fn wait_for_writes(dev: Dev) {
    // Arbitrary; longer than writes usually take.
    for _ in 0..100 {
        if dev.whole().writes_in_flight().is_none_or(|n| n == 0) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
