//! An independent witness: the sectors that the block layer itself counts as written, for /proc/diskstats.
//!
//! The kernel can fail to run a program without a word. Seen on a kernel that is not the mainline's (6.18, of a virtual
//! machine's maker): of the completions whose interrupt came while a certain process ran, ftrace was told and no BPF
//! program was, and no counter of misses moved. The block layer counts a request's bytes right after it tells of it, in
//! the same function: what is counted was seen, or is lost.

use std::fs::File;
use std::os::unix::fs::FileExt;

use backhaul_volume::sysfs::Dev;

/// A disk's own count. Keeps its file open and reads it into memory that is there: fit for a freeze.
#[derive(Debug)]
pub(crate) struct Witness {
    stat: File,
}

impl Witness {
    /// Of the whole disk; `None` where nothing is counted.
    pub fn of(dev: Dev) -> Option<Self> {
        let number = dev.whole().attribute("dev")?;
        let witness = Self { stat: File::open(format!("/sys/dev/block/{number}/stat")).ok()? };
        // The kernel takes what memory it needs at the first read.
        witness.counted().map(|_| witness)
    }

    /// Sectors written and discarded. Stands still while somebody has switched the counting off (queue/iostats), and
    /// then says nothing.
    pub fn counted(&self) -> Option<u64> {
        // Seventeen numbers of at most twenty digits, and blanks.
        let mut buffer = [0; 512];
        let len = self.stat.read_at(&mut buffer, 0).ok()?;
        let mut fields = std::str::from_utf8(&buffer[..len]).ok()?.split_ascii_whitespace();
        // Documentation/block/stat.rst: the 7th and the 14th (kernel 4.18).
        let written: u64 = fields.nth(6)?.parse().ok()?;
        let discarded: u64 = fields.nth(6)?.parse().ok()?;
        Some(written + discarded)
    }
}
