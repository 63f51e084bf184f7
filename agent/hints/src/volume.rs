//! One volume: what is tracked of it, taking it, and when it is not to be believed.
//!
//! Read first: [`crate::Tracker::track`], [`Tracked::take_into`] and [`Tracked::settle`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use backhaul_volume::sysfs::Dev;

use crate::begin::doubted;
use crate::blocks::Blocks;
use crate::device::Device;
use crate::doubt::Doubt;
use crate::layout::{self, ELEMENT, Elements, GROUP, head, slot};
use crate::sys::Shared;
use crate::tracker::Inner;
use crate::witness::{Verdict, Witness};

/// The state of the caller's index that bits are counted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Baseline {
    /// The index. Another whenever it was made anew, copied or taken from a backup.
    pub epoch: [u8; 16],
    /// Grows with every point that is durable in the index.
    pub number: u64,
}

/// What to track.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// The caller's name for it.
    pub volume: [u8; 16],
    /// A whole disk or a partition.
    pub dev: Dev,
    /// Bytes: 16 KiB to 1 MiB, a power of two.
    pub block_size: u32,
    /// Bytes, as the caller found them: the device's own.
    pub length: u64,
    /// What the caller's index holds; `None` if it has to be filled by a full scan anyhow.
    pub baseline: Option<Baseline>,
}

/// What tracking begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// Everything written since the baseline comes with the next take.
    Continued,
    /// Everything written from now on will be taken. What was written before is not known: scan in full.
    Fresh(Doubt),
}

/// How sure it is that all marks are there: see [`Tracked::proof`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    /// Every write to the whole disk that has ended since tracking began was marked.
    Complete,
    /// No doubt, and no proof either: something writes to the disk all the time.
    Busy,
}

/// A tracked volume. Tracking goes on when this is dropped.
#[derive(Debug)]
pub struct Tracked {
    pub(crate) inner: Arc<Inner>,
    pub(crate) dev: Dev,
    pub(crate) device: Device,
    pub(crate) blocks: u64,
    pub(crate) slot: usize,
    pub(crate) map_id: u64,
    pub(crate) map: Map,
    pub(crate) witness: Witness,
    pub(crate) start: Start,
    /// Looks everywhere: a process before may have died between taking a bit of the summary and what it stands for.
    pub(crate) first_take: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct Map {
    pub fd: OwnedFd,
    shared: Shared,
    elements: Elements,
}

impl Map {
    pub fn new(fd: OwnedFd, elements: Elements) -> io::Result<Self> {
        let shared = Shared::new(&fd, elements.all * ELEMENT * 8)?;
        Ok(Self { fd, shared, elements })
    }

    pub fn head(&self, word: usize) -> u64 {
        self.shared.word(word).load(SeqCst)
    }

    pub fn set_head(&self, word: usize, value: u64) {
        self.shared.word(word).store(value, SeqCst);
    }

    pub fn summary(&self, word: usize) -> &AtomicU64 {
        self.shared.word(self.elements.summary * ELEMENT + word)
    }

    pub fn live(&self, word: usize) -> &AtomicU64 {
        self.shared.word(self.elements.live * ELEMENT + word)
    }

    pub fn pending(&self, word: usize) -> &AtomicU64 {
        self.shared.word(self.elements.pending * ELEMENT + word)
    }

    pub fn baseline(&self) -> Option<Baseline> {
        let at = *head::BASELINES.get((self.head(head::SELECTOR) as usize).wrapping_sub(1))?;
        let epoch = u128::from(self.head(at)) | u128::from(self.head(at + 1)) << 64;
        Some(Baseline { epoch: epoch.to_le_bytes(), number: self.head(at + 2) })
    }
}

impl Tracked {
    /// Whether what was written before can be relied upon.
    pub fn start(&self) -> Start {
        self.start
    }

    /// Blocks of the volume: the last may be shorter than the others.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// [`Tracked::take_into`] with memory of its own.
    pub fn take(&self) -> Result<Blocks, Doubt> {
        let mut blocks = Blocks::none(self.blocks);
        self.take_into(&mut blocks)?;
        Ok(blocks)
    }

    /// Adds the blocks that were written since the last take and gives their number. They are now pending until they
    /// are [settled](Tracked::settle), in this process or a later one. The first take after [`crate::Tracker::track`] begins
    /// with what earlier processes took and did not settle.
    ///
    /// A block that is read after this returns is read as it was, or newer and then taken again. Neither allocates nor
    /// touches a file nor faults, so that it can be used while file systems are frozen. For one thread at a time: what
    /// another one is taking is not seen.
    pub fn take_into(&self, out: &mut Blocks) -> Result<u64, Doubt> {
        assert!(out.capacity() == self.blocks, "a set of another volume's blocks");
        let first = self.first_take.load(SeqCst);
        let mut taken = 0;
        for word in 0..self.map.elements.groups.div_ceil(64) {
            let summary = self.map.summary(word);
            let mut groups = summary.load(SeqCst);
            // The summary's bit first: a program sets it after the blocks' own.
            if groups != 0 {
                groups = summary.swap(0, SeqCst);
                crate::reach("hints.take.summary");
            }
            if first {
                groups = u64::MAX;
            }
            while groups != 0 {
                let group = word * 64 + groups.trailing_zeros() as usize;
                groups &= groups - 1;
                if group < self.map.elements.groups {
                    taken += self.take_group(group, first, out);
                }
            }
        }
        self.first_take.store(false, SeqCst);
        self.doubt().map_or(Ok(taken), Err)
    }

    fn take_group(&self, group: usize, with_pending: bool, out: &mut Blocks) -> u64 {
        let mut taken = 0;
        let first = group * (GROUP / 64) as usize;
        for word in first..first + ELEMENT {
            let mut bits = self.map.live(word).load(SeqCst);
            if bits != 0 {
                // In this order: a process that dies between the two leaves them in both.
                self.map.pending(word).fetch_or(bits, SeqCst);
                crate::reach("hints.take.pending");
                self.map.live(word).fetch_and(!bits, SeqCst);
                crate::reach("hints.take.live");
            }
            if with_pending {
                bits |= self.map.pending(word).load(SeqCst);
            }
            taken += u64::from(bits.count_ones());
            if let Some(out) = out.words_mut().get_mut(word) {
                *out |= bits;
            }
        }
        taken
    }

    /// Whether a take would find nothing, as far as it was seen; ask for [doubts](Tracked::doubt) too. As cheap as looking
    /// can be, and fit for a freeze as a take is.
    pub fn is_clean(&self) -> bool {
        if self.first_take.load(SeqCst) {
            let mut words = 0..self.map.elements.groups * ELEMENT;
            return words.all(|word| self.map.live(word).load(SeqCst) | self.map.pending(word).load(SeqCst) == 0);
        }
        (0..self.map.elements.groups.div_ceil(64)).all(|word| self.map.summary(word).load(SeqCst) == 0)
    }

    /// All that was taken and not settled, by earlier processes too.
    pub fn unsettled(&self) -> Blocks {
        let mut blocks = Blocks::none(self.blocks);
        for (index, word) in blocks.words_mut().iter_mut().enumerate() {
            *word = self.map.pending(index).load(Relaxed);
        }
        blocks
    }

    /// To be called when the point that read these blocks is committed and the index that holds it durable.
    ///
    /// `read` must hold only blocks that were read after the last take that named them: one that was taken again after
    /// it was read stays unsettled. What is not in `read` stays as well. The baseline is recorded first: an index that
    /// is older than it begins anew rather than miss what is cleared here. After [`Start::Fresh`] the first settle says
    /// that the full scan is done.
    pub fn settle(&self, read: &Blocks, baseline: Baseline) {
        assert!(read.capacity() == self.blocks, "a set of another volume's blocks");
        let selector = if self.map.head(head::SELECTOR) == 1 { 2 } else { 1 };
        let at = head::BASELINES[selector as usize - 1];
        let [low, high] = layout::halves(baseline.epoch);
        [low, high, baseline.number].into_iter().enumerate().for_each(|(i, word)| self.map.set_head(at + i, word));
        crate::reach("hints.settle.written");
        self.map.set_head(head::SELECTOR, selector);
        crate::reach("hints.settle.recorded");
        for (index, word) in read.words().iter().enumerate().filter(|(_, word)| **word != 0) {
            self.map.pending(index).fetch_and(!word, SeqCst);
            crate::reach("hints.settle.cleared");
        }
    }

    /// What was settled last.
    pub fn baseline(&self) -> Option<Baseline> {
        self.map.baseline()
    }

    /// Whether all marks are there, as far as that can be known now. To be asked after the last take that a point is
    /// made of, while its file systems are frozen or nothing writes to the disk: only then the kernel's own count of
    /// sectors is exact (see the crate's documentation). Looks for some milliseconds where writes are under way; neither allocates nor opens
    /// files, fit for a freeze.
    pub fn proof(&self) -> Result<Proof, Doubt> {
        if let Some(doubt) = self.doubt() {
            return Err(doubt);
        }
        let base = self.inner.base(self.slot).load(SeqCst);
        match self.witness.judge(base, || self.inner.programs.seen(self.slot)) {
            Verdict::Complete => Ok(Proof::Complete),
            verdict => doubted(verdict).map_or(Ok(Proof::Busy), Err),
        }
    }

    /// Whether it is known that writes were missed, or that tracking ended. Cheap, and fit for a freeze, as a take is:
    /// a few system calls and a look at memory. While writes are under way others that were lost can hide behind them
    /// from this; not from a [proof](Tracked::proof).
    pub fn doubt(&self) -> Option<Doubt> {
        let listens = self.inner.dev(self.slot).load(SeqCst) == self.device.disk
            && self.inner.slot(self.slot, slot::MAP).load(SeqCst) == self.map_id;
        let doubt = || self.inner.events_doubt(&self.map, self.slot, &self.witness);
        if listens { doubt() } else { Some(Doubt::NoPin) }
    }

    /// Whether it is still the device that it was. Reads files in /sys: not for a freeze.
    pub fn device_doubt(&self) -> Option<Doubt> {
        Device::of(self.dev).map_or(Some(Doubt::OtherDevice), |now| now.differs_from(&self.device))
    }
}
