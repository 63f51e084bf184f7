//! What lies where in the maps: the agreement of agents that come after each other, and of them with `bpf/hints.bpf.c`.
//!
//! The table, one for all volumes:
//!
//! | bytes | what |
//! |---|---|
//! | 0..256 | words of [`table`]: whose it is, and the programs that run |
//! | 256..260 | slots that programs look at |
//! | 260..264 | how many of these are devices without requests |
//! | 512..1536 | for each slot the number of its whole disk; 0 is nobody. Written last when a slot is taken |
//! | 1536..17920 | slots of 64 bytes, words of [`slot`] |
//! | 17920..22016 | for each of the two records of programs, for each slot: by how many sectors these programs' count is ahead of the block layer's (modulo 2^64) |
//!
//! Each set of programs has a map of its own, "seen": for each slot the sectors that writes and discards of its disk had.
//!
//! A volume's map has elements of 512 bytes: its head (words of [`head`]), the summary (a bit for each group of 4096
//! blocks), `live` (a bit for each block, set by the programs), `pending` (the same, the agent's own). One map holds all
//! of it, so that there is never half a volume.

use backhaul_volume::sysfs::Dev;

/// Grows when anything here changes its place or meaning. An agent that finds another begins anew.
pub const ABI: u64 = 1;
/// "BKHLHINT".
pub const MAGIC: u64 = u64::from_le_bytes(*b"BKHLHINT");

/// Volumes that one agent can track.
pub const VOLUMES: usize = 256;
/// Blocks of a group.
pub const GROUP: u64 = 4096;
/// Words of an element.
pub const ELEMENT: usize = 64;
/// Bytes of the table.
pub const TABLE: usize = 22016;
/// Bytes of a set's counts.
pub const SEEN: usize = 8 * VOLUMES;
/// Writes that can be under way to devices without requests; one more is a missed event. Arbitrary: 1.3 MB.
pub const FLIGHTS: u32 = 16384;

/// Numbers by which a set of programs is known: three programs with their links, and their map.
pub const IDS: usize = 4;

/// Words of the table's head.
pub mod table {
    pub const MAGIC: usize = 0;
    pub const ABI: usize = 1;
    /// Changes whenever there may have been a time without programs.
    pub const GENERATION: usize = 2;
    pub const BOOT: usize = 3;
    /// Which of two records holds.
    pub const SELECTOR: usize = 5;
    /// Why the generation is not the one before.
    pub const GAP: usize = 6;
    pub const RECORDS: [usize; 2] = [8, 16];
    /// In a record: which object was loaded, its folder's number, events missed by programs before, then each program's
    /// id (high) with its link's, then the id of the map "seen".
    pub const BUILD: usize = 0;
    pub const SET: usize = 1;
    pub const MISSED_BEFORE: usize = 2;
    pub const IDS: usize = 3;
    /// Counted in words of four bytes.
    pub const COUNT: usize = 64;
    pub const BIOS: usize = 65;
    pub const DEV: usize = 128;
    pub const SLOTS: usize = 192;
    pub const BASES: [usize; 2] = [2240, 2496];
}

/// Words of a slot.
pub mod slot {
    pub const WORDS: usize = 8;
    pub const START: usize = 0;
    pub const END: usize = 1;
    /// Sectors of a block as a power of two, and (high) the first element of `live`.
    pub const SHIFT_LIVE: usize = 2;
    /// 1 for a device without requests.
    pub const KIND: usize = 3;
    pub const VOLUME: usize = 4;
    pub const MAP: usize = 6;
}

/// Words of a volume's head.
pub mod head {
    pub const MAGIC: usize = 0;
    /// Words that do not change: see `begin.rs`.
    pub const FIXED: std::ops::Range<usize> = 0..15;
    pub const CHECKSUM: usize = 15;
    /// 1 once everything is in place.
    pub const STATE: usize = 16;
    /// Which of two baselines holds; 0 is none.
    pub const SELECTOR: usize = 17;
    pub const BASELINES: [usize; 2] = [18, 21];
    /// Events that all volumes' programs had missed when this one began.
    pub const MISSED_SEEN: usize = 24;
    /// Counted by the programs.
    pub const LOST: usize = 48;
    pub const COMMANDS: usize = 49;
    pub const STRANGERS: usize = 50;
}

/// Elements of a volume's map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Elements {
    pub summary: usize,
    pub live: usize,
    pub pending: usize,
    pub groups: usize,
    pub all: usize,
}

impl Elements {
    pub fn of(blocks: u64) -> Self {
        let groups = blocks.div_ceil(GROUP) as usize;
        let live = 1 + groups.div_ceil(GROUP as usize);
        Self { summary: 1, live, pending: live + groups, groups, all: live + 2 * groups }
    }
}

/// A device's number as programs see it.
pub fn kernel_number(dev: Dev) -> Option<u32> {
    let text = dev.attribute("dev")?;
    let (major, minor) = text.split_once(':')?;
    Some(major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?)
}

/// The device that has this number.
pub fn dev(number: u32) -> Option<Dev> {
    Dev::parse(&format!("{}:{}", number >> 20, number & 0xf_ffff))
}

/// FNV-1a: finds what was overwritten by accident, no more.
pub fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    let bytes = words.into_iter().flat_map(u64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The two words that sixteen bytes are.
pub fn halves(bytes: [u8; 16]) -> [u64; 2] {
    let n = u128::from_le_bytes(bytes);
    [n as u64, (n >> 64) as u64]
}
