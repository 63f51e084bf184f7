//! Which blocks of a device were written, as the kernel tells it (eBPF). Linux only; x86-64 and other little-endian
//! machines; kernel 5.12 or later with BTF, 5.15 to continue over a restart of the agent. Root, or CAP_BPF with
//! CAP_PERFMON.
//!
//! Read first: [`Tracker`], [`Tracked`] and [`Doubt`]. Then `bpf/hints.bpf.c`, which is what runs in the kernel.
//!
//! ```text
//!   write completes ──▶ program ──▶ live ──take──▶ pending ──settle──▶ (nothing)
//!                       in the         with the caller's reads        point committed,
//!                       kernel         to follow                      index durable
//! ```
//!
//! # How it works
//!
//! Three programs hang on the block layer's tracepoints and set a bit for each block that a completed write touched.
//! Programs and bits are pinned in a BPF file system, so that they go on while the agent restarts, is killed or is
//! replaced by another version, which attaches its programs before it removes the old.
//!
//! Taking is two-phase. A take copies each word of `live` to `pending` and then removes exactly these bits from `live`,
//! atomically. A bit leaves `pending` only when the caller settles it. So whatever happens between, a block that may
//! differ from the caller's index is in `live` or in `pending`.
//!
//! A bit for each 4096 blocks (the summary) is set *after* the blocks' own and taken *before* them; both are full
//! barriers. A take of a terabyte in which nothing changed looks at 512 bytes.
//!
//! # What is doubted
//!
//! Anything that could mean an unmarked write is a [`Doubt`], and the answer to a doubt is [`Tracker::track`] again and
//! a full scan: events that the kernel did not hand over (it counts them), programs or links that are not those we
//! pinned, another boot, device, size or place, an index that is older than what was settled, commands that go past the
//! block layer.
//!
//! One more is for what the kernel itself does not notice: the programs count sectors, and the disk's own count of
//! sectors written must be the same. How much follows from that depends on the moment:
//!
//! | | devices with requests | without (device mapper, md) |
//! |---|---|---|
//! | nothing writes to the whole disk: all of it is frozen, or idle for a moment | exact | exact |
//! | something does, to another partition too | a loss can hide behind writes that are just ending | nothing is known |
//!
//! [`Tracked::proof`] waits some milliseconds for such a moment and says which it was. A take, and [`Tracked::doubt`], say
//! at once what is known. Both compare with the whole disk's count, also for a
//! partition.
//!
//! # What the caller does
//!
//! 1. [`Tracker::track`] before the scan, and again after every doubt. [`Start::Fresh`] asks for a full scan.
//! 2. While all is live: [`Tracked::take_into`] and read these blocks, as often as wished. A doubt: back to 1.
//! 3. File systems frozen, or whatever else makes the volume stand still: [`Tracked::take_into`] once more into the same
//!    set, then [`Tracked::proof`]. Nothing of that allocates, opens files or faults. Then read what the last take brought,
//!    from the frozen device or a snapshot.
//! 4. [`Proof::Complete`]: what was not taken did not change, as sure as the counts. [`Proof::Busy`]: others write to the
//!    same disk all the time. Ask again. If it stays so, nothing speaks for a loss, but it could hide until the next
//!    proof: a full scan, or a point that is not to be called whole before a later proof.
//! 5. [`Tracked::device_doubt`] after the thaw, then commit, then [`Tracked::settle`].
//!
//! # What is marked
//!
//! Everything that is not a read or a pure flush: writes, discards (also merged ones that do not touch), zeroing,
//! secure erase, flushes with data; on whole disks and partitions alike, since the block layer speaks of whole disks'
//! sectors. Devices with a queue of requests (SCSI, NVMe, virtio, loop) tell of completed requests. Those without
//! (device mapper, md, zram) tell of completed bios, but these may by then say less than at submission (device mapper
//! cuts off what it has split), so their submission is noted as well. Devices that would not surely tell are
//! refused: zoned and DAX ones, NVMe multipath's common device, RAID 0.
//!
//! Not seen, by nature: what is written beneath the device (a loop device's file, a disk by another machine).
//!
//! # Alternatives
//!
//! - libbpf: needs C libraries where this is built or run. aya: has neither recursion counts nor mapped memory of maps,
//!   and did not load our program's predecessor. What is needed of a loader is two files here.
//! - Classic tracepoint programs: skipped without a word where another BPF program runs on the CPU.
//! - A hash map from disk to volumes: its elements change while programs read them; a list of 256 numbers does not.

mod bases;
mod begin;
mod blocks;
mod btf;
mod device;
mod doubt;
#[allow(missing_docs, reason = "private, and the module tells it")]
mod layout;
mod object;
mod programs;
#[allow(missing_docs, reason = "private, and the names are the kernel's")]
mod sys;
mod tracker;
mod volume;
mod witness;

pub use blocks::Blocks;
pub use doubt::{Doubt, TrackError, Unavailable};
pub use tracker::{Options, Tracker};
pub use volume::{Baseline, Proof, Start, Subject, Tracked};

/// For tests: what lies beneath.
#[doc(hidden)]
pub mod testing {
    use std::path::Path;
    use std::sync::atomic::Ordering::SeqCst;

    pub use crate::layout::{ABI, head, table};
    pub use crate::programs::OBJECT;
    use crate::sys;

    /// Puts another word into a pinned map.
    pub fn poke(pin: &Path, word: usize, value: u64) -> std::io::Result<()> {
        let map = sys::pinned(pin)?;
        let [_, _, _, bytes, entries] = sys::info(&map)?;
        sys::Shared::new(&map, (bytes * entries) as usize)?.word(word).store(value, SeqCst);
        Ok(())
    }
}

/// A place where a test can end the process. The steps here cannot fail, so only that, and delays, have effect.
fn reach(name: &'static str) {
    let _ = backhaul_seams::failpoint::reach(|| name);
}
