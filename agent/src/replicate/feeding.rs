//! Which pages are scanned next, and what the receiver has of each: known without asking, or asked for a little ahead.
//!
//! Read first: [`Feeder`]. It owns the order of pages; it reads nothing and sends nothing itself.

use std::collections::VecDeque;
use std::sync::Arc;

use backhaul_cli::Phase;
use backhaul_hints::Blocks;
use backhaul_protocol::digest::RangeDigest;
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::session::compare::BlockSet;
use backhaul_protocol::session::source::{SourceError, SourceOutput};
use backhaul_protocol::wire::message::OpenedVolume;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};

use super::RoundError;
use crate::connection::Session;
use crate::pipeline::scanner::{HeldPage, Job, PageWork, Reading, ScanVolume, Scanned};

/// Questions for pages that are under way at once: 32 KiB each on the way back.
const QUESTIONS: usize = 16;

/// What the receiver has of a volume's pages.
pub(super) enum Known {
    /// All as indexed, but for the draft's.
    Indexed,
    /// Range digests of what it has.
    Ranges(Vec<RangeDigest>),
    /// All as indexed, with the draft: what differed was sent in an earlier pass of this round.
    Sent,
}

/// Where one pass looks in one volume.
#[derive(Clone, Debug)]
pub(super) enum Look {
    /// Everywhere.
    Everywhere,
    /// At these blocks, and where the receiver has something else than the index.
    At(Blocks),
}

impl Look {
    fn reading(&self, page: PageIndex) -> Reading {
        match self {
            Self::Everywhere => Reading::Everything,
            Self::At(blocks) => {
                let first = (page.first_block().0 / 64) as usize;
                let words = blocks.words().get(first..).unwrap_or_default();
                Reading::Only(BlockSet::from_words(words))
            }
        }
    }
}

pub(super) struct PlannedVolume {
    pub(super) scan: Arc<ScanVolume>,
    pub(super) known: Known,
    pub(super) opened: OpenedVolume,
}

/// Gives the pages of one pass in order, asking for those that must be compared block by block a little ahead.
pub(super) struct Feeder<'a> {
    planned: &'a [PlannedVolume],
    looks: &'a [Look],
    /// Pages of one job.
    batch: usize,
    /// Next page to look at.
    next: (usize, u64),
    /// Pages in order; those without an answer yet are `None`.
    window: VecDeque<(usize, PageIndex, Option<HeldPage>)>,
    /// Pages that were given, and not done yet.
    pub(super) out: usize,
    progress: Option<Phase>,
}

impl<'a> Feeder<'a> {
    /// `looks` has one for each volume.
    pub(super) fn new(
        planned: &'a [PlannedVolume],
        looks: &'a [Look],
        threads: usize,
        progress: Option<Phase>,
    ) -> Self {
        debug_assert_eq!(planned.len(), looks.len());
        let pages: u64 = planned.iter().map(|p| p.scan.geometry.pages()).sum();
        // Small volumes page by page, so that all threads have work to the end.
        let batch = (pages / (threads as u64 * 32)).clamp(1, QUESTIONS as u64) as usize;
        Self { planned, looks, batch, next: (0, 0), window: VecDeque::new(), out: 0, progress }
    }

    pub(super) fn ask(&mut self, session: &mut Session) {
        while self.window.len() < QUESTIONS {
            let Some(volume) = self.planned.get(self.next.0) else { return };
            if self.next.1 >= volume.scan.geometry.pages() {
                self.next = (self.next.0 + 1, 0);
                continue;
            }
            let page = PageIndex(self.next.1);
            self.next.1 += 1;
            let held = volume.held(page);
            if held.as_ref().is_some_and(|held| self.is_settled(held, page)) {
                self.looked_at(volume.scan.geometry.page_len(page));
                continue;
            }
            if held.is_none() {
                let (machine, now) = session.machine();
                machine.ask_page(now, volume.opened.slot, page);
                reached(Situation::PageAsked);
            }
            self.window.push_back((self.next.0, page, held));
        }
    }

    pub(super) fn answer(&mut self, output: SourceOutput) -> Result<(), RoundError> {
        let SourceOutput::Page { volume, page, held } = output else {
            return Err(SourceError::Protocol("an answer to another question").into());
        };
        let waiting = self
            .window
            .iter_mut()
            .find(|(v, p, held)| held.is_none() && *p == page && self.planned[*v].opened.slot == volume);
        let slot = waiting.ok_or(SourceError::Protocol("an answer to no question"))?;
        slot.2 = Some(HeldPage::Digests { digests: held.digests, draft: held.draft });
        Ok(())
    }

    /// Whether nothing of the page is to be read.
    fn is_settled(&self, held: &HeldPage, page: PageIndex) -> bool {
        let Reading::Only(blocks) = self.looks[self.next.0].reading(page) else { return false };
        let as_indexed = match held {
            HeldPage::AsIndexed => true,
            HeldPage::Zero => self.planned[self.next.0].scan.index.range(page) == RangeDigest::ZERO,
            HeldPage::Digests { .. } => false,
        };
        blocks.is_empty() && as_indexed
    }

    /// Whether there is a page to give.
    pub(super) fn is_ready(&self) -> bool {
        self.window.front().is_some_and(|(_, _, held)| held.is_some())
    }

    /// The next pages that are known, of one volume.
    pub(super) fn take(&mut self) -> Option<Job> {
        let volume = self.window.front()?.0;
        let mut pages = Vec::with_capacity(self.batch);
        while pages.len() < self.batch && self.window.front().is_some_and(|(v, _, held)| *v == volume && held.is_some())
        {
            let (_, page, held) = self.window.pop_front()?;
            pages.push(PageWork { page, held: held?, reading: self.looks[volume].reading(page) });
        }
        self.out += pages.len();
        Some(Job { volume: self.planned[volume].scan.clone(), pages })
    }

    fn looked_at(&self, bytes: u64) {
        self.progress.iter().for_each(|p| p.add(bytes));
    }

    /// Some of the pages that were given are done.
    pub(super) fn done(&mut self, scanned: &[Scanned]) {
        self.out -= scanned.len();
        for s in scanned {
            let volume = self.planned.iter().find(|p| p.opened.slot == s.slot);
            volume.into_iter().for_each(|v| self.looked_at(v.scan.geometry.page_len(s.page)));
        }
    }

    /// Whether every page was looked at.
    pub(super) fn is_done(&self) -> bool {
        let (volume, page) = self.next;
        let last = self.planned.len().checked_sub(1);
        let exhausted =
            last.is_none_or(|l| volume > l || (volume == l && page >= self.planned[l].scan.geometry.pages()));
        self.window.is_empty() && exhausted && self.out == 0
    }
}

impl PlannedVolume {
    /// What the receiver has of the page; `None` if it must be asked.
    fn held(&self, page: PageIndex) -> Option<HeldPage> {
        if matches!(self.known, Known::Sent) {
            return Some(HeldPage::AsIndexed);
        }
        if self.opened.draft.contains(page.0) && !planted(Mutant::DraftPagesNotAsked) {
            return None;
        }
        match &self.known {
            Known::Indexed | Known::Sent => Some(HeldPage::AsIndexed),
            Known::Ranges(ranges) => {
                let range = ranges[page.0 as usize];
                if range == RangeDigest::ZERO {
                    Some(HeldPage::Zero)
                } else if self.scan.index.range(page) == range {
                    Some(HeldPage::AsIndexed)
                } else {
                    None
                }
            }
        }
    }
}
