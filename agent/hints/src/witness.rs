//! An independent witness: the sectors that the block layer itself counts as written, for /proc/diskstats.
//!
//! Read first: [`Witness::judge`].
//!
//! The kernel can fail to run a program without a word. Seen on a kernel that is not the mainline's (6.18, of a virtual
//! machine's maker): of the completions whose interrupt came while a certain process ran, ftrace was told and no BPF
//! program was, and no counter of misses moved. So programs count the sectors that they saw, and what the whole disk
//! counted must be as much.
//!
//! For requests the block layer counts right after it tells (`blk_update_request`), merged, split and discarded ones by
//! the same bytes, and before whoever waits is told. Bios without requests (device mapper, md, zram) are counted before
//! it is told (from 6.3; at submission before). Either way the write counts as under way until it is counted. So:
//!
//! - While requests are under way, what is seen can be ahead of what is counted, and hide as much that was lost; never
//!   the other way round: fewer seen than counted is proof of a loss at any time.
//! - While bios are under way, nothing follows from the counts.
//! - With no write under way, equal counts prove that nothing was lost, and unequal ones that something was or that
//!   somebody had switched the counting off (queue/iostats).
//!
//! Where both counts begin (the base) is the least lead that was found in many looks, or that of a moment without
//! writes. It can be too large, which is a doubt later, never too small, which would hide a loss.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use backhaul_volume::sysfs::Dev;

use crate::device::Kind;

/// A disk's own count. Keeps its files open and reads them into memory that is there: fit for a freeze.
#[derive(Debug)]
pub(crate) struct Witness {
    kind: Kind,
    stat: File,
    inflight: File,
}

/// One look at both counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Look {
    seen: u64,
    counted: u64,
    /// No write was under way and none ended.
    is_idle: bool,
}

impl Look {
    /// By how much what was seen is ahead, modulo 2^64.
    fn lead(&self) -> u64 {
        self.seen.wrapping_sub(self.counted)
    }

    /// By how much that is too little.
    fn missing(&self, base: u64) -> i64 {
        base.wrapping_sub(self.lead()) as i64
    }
}

/// What follows from the counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// Every write that has ended was seen.
    Complete,
    /// Writes were under way at every look.
    Busy,
    /// So many sectors were not seen.
    Unseen(u64),
    /// So many were seen and not counted.
    Uncounted(u64),
    /// The disk is no longer there.
    Gone,
}

/// Looks that agree before they are believed to be final, two milliseconds or so: whoever is between counting and telling
/// may be preempted there.
const STILL: u32 = 20;
/// Looks for a moment without writes. Arbitrary: four milliseconds or so where processors are free, of a freeze perhaps.
const LOOKS: u32 = 40;
const PAUSE: Duration = Duration::from_micros(20);

impl Witness {
    /// Of the whole disk, since that is whose sectors the block layer speaks of; `None` where nothing is counted.
    pub fn of(dev: Dev, kind: Kind) -> Option<Self> {
        let number = dev.whole().attribute("dev")?;
        let open = |name: &str| File::open(format!("/sys/dev/block/{number}/{name}")).ok();
        let witness = Self { kind, stat: open("stat")?, inflight: open("inflight")? };
        // The kernel takes what memory it needs at the first read.
        witness.look(&|| 0).map(|_| witness)
    }

    /// Sectors written and discarded.
    fn counted(&self) -> Option<u64> {
        // Documentation/block/stat.rst: the 7th and the 14th (kernel 4.18).
        let [written, discarded] = numbers(&self.stat, [6, 13])?;
        Some(written.wrapping_add(discarded))
    }

    fn look(&self, seen: &impl Fn() -> u64) -> Option<Look> {
        // In this order. What ends between is either still under way at the second or seen at the last.
        let before = seen();
        let [writing] = numbers(&self.inflight, [1])?;
        let counted = self.counted()?;
        let after = seen();
        Some(Look { seen: after, counted, is_idle: writing == 0 && before == after })
    }

    /// The base: how far what is seen is ahead when no write is under way. Writes of which this is not told meanwhile
    /// do not matter to who reads everything afterwards.
    pub fn base(&self, seen: impl Fn() -> u64) -> Option<u64> {
        let mut last = self.look(&seen)?;
        let (mut base, mut same) = (last.lead(), 0);
        // Arbitrary: 20 ms or so.
        for _ in 0..200 {
            let look = self.look(&seen)?;
            same = if look.is_idle && look == last { same + 1 } else { 0 };
            if same == STILL {
                return Some(look.lead());
            }
            // Bios are counted first, so that for them the largest is nearest.
            let is_less = (look.lead().wrapping_sub(base) as i64) < 0;
            if is_less == (self.kind == Kind::Requests) {
                base = look.lead();
            }
            last = look;
            std::thread::sleep(PAUSE);
        }
        Some(base)
    }

    /// Looks for a moment without writes, in which the counts are exact.
    pub fn judge(&self, base: u64, seen: impl Fn() -> u64) -> Verdict {
        let (mut last, mut same) = (None, 0);
        for _ in 0..LOOKS {
            let Some(look) = self.look(&seen) else { return Verdict::Gone };
            let missing = look.missing(base);
            if look.is_idle && missing == 0 {
                return Verdict::Complete;
            }
            same = if look.is_idle && last == Some(look) { same + 1 } else { 0 };
            if same == STILL {
                let sectors = missing.unsigned_abs();
                return if missing > 0 { Verdict::Unseen(sectors) } else { Verdict::Uncounted(sectors) };
            }
            last = Some(look);
            std::thread::sleep(PAUSE);
        }
        Verdict::Busy
    }

    /// What follows at once, whether writes are under way or not: [`Verdict::Busy`] where nothing does.
    pub fn glance(&self, base: u64, seen: impl Fn() -> u64) -> Verdict {
        let mut missing = 0;
        // Again, since machines that reorder memory accesses may show for a moment what is not so.
        for _ in 0..8 {
            let Some(look) = self.look(&seen) else { return Verdict::Gone };
            missing = look.missing(base);
            if missing <= 0 || (self.kind == Kind::Bios && !look.is_idle) {
                return Verdict::Busy;
            }
            std::thread::yield_now();
        }
        match self.kind {
            Kind::Requests => Verdict::Unseen(missing.unsigned_abs()),
            Kind::Bios => self.judge(base, seen),
        }
    }
}

/// Some of the numbers of a file in /sys, by their places in rising order.
fn numbers<const N: usize>(file: &File, places: [usize; N]) -> Option<[u64; N]> {
    // Seventeen numbers of at most twenty digits, and blanks.
    let mut buffer = [0; 512];
    let len = file.read_at(&mut buffer, 0).ok()?;
    let mut fields = std::str::from_utf8(&buffer[..len]).ok()?.split_ascii_whitespace();
    let (mut next, mut out) = (0, [0; N]);
    for (number, place) in out.iter_mut().zip(places) {
        *number = fields.nth(place - next)?.parse().ok()?;
        next = place + 1;
    }
    Some(out)
}
