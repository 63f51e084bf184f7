//! Compares one target with a volume of a point, and does what is to be done about what differs.
//!
//! Read first: [`Comparing::run`]. Pages are read ahead by several threads, and several questions are under way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use backhaul_cli::Phase;
use backhaul_protocol::digest::{BlockDigest, RangeDigest};
use backhaul_protocol::geometry::{BlockIndex, PageIndex};
use backhaul_protocol::wire::message::{AgentMessage, ReadVolume};
use backhaul_seams::threads;
use backhaul_volume::rebuild::{Comparer, Difference, Existing, Found};
use backhaul_volume::target::{CheckedTarget, Target, TargetError};
use tokio::task::JoinHandle;

use super::asking::{Asking, QUESTIONS};
use super::incoming::Incoming;
use super::{RestoreError, blocking, lock};

/// What is done about what differs.
pub(super) enum Aim {
    /// It is counted.
    Plan(Arc<CheckedTarget>),
    /// It is fetched and written.
    Write(Arc<Target>),
}

/// Bytes of one volume.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    /// Read from the target, to compare.
    pub(super) read: u64,
    /// Fetched and written, or to be.
    pub(super) fetched: u64,
    /// Zeroed, or to be.
    pub(super) zeroed: u64,
}

impl Sums {
    /// Bytes that are not as they were.
    pub(super) fn changed(&self) -> u64 {
        self.fetched + self.zeroed
    }
}

/// One volume that is compared.
pub(super) struct Comparing<'a> {
    asking: &'a mut Asking,
    incoming: &'a Arc<Incoming>,
    volume: &'a ReadVolume,
    ranges: &'a [RangeDigest],
    aim: Aim,
    phase: &'a Phase,
    comparers: Arc<Mutex<Vec<Comparer>>>,
    /// Questions for the digests of pages, and what the target holds of them.
    asked: VecDeque<(PageIndex, Found)>,
    sums: Sums,
}

type Looking = JoinHandle<Result<(Found, u64), TargetError>>;

impl<'a> Comparing<'a> {
    pub(super) fn new(
        asking: &'a mut Asking,
        incoming: &'a Arc<Incoming>,
        volume: &'a ReadVolume,
        ranges: &'a [RangeDigest],
        aim: Aim,
        phase: &'a Phase,
    ) -> Self {
        let (comparers, asked, sums) = (Arc::default(), VecDeque::new(), Sums::default());
        Self { asking, incoming, volume, ranges, aim, phase, comparers, asked, sums }
    }

    /// Compares all pages; when it returns, every block that was fetched is written.
    pub(super) async fn run(mut self) -> Result<Sums, RestoreError> {
        let geometry = self.volume.geometry;
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let mut looking: VecDeque<(PageIndex, Looking)> = VecDeque::new();
        let mut next = 0;
        loop {
            while looking.len() < 2 * threads && next < geometry.pages() {
                let page = PageIndex(next);
                let looked = match &self.aim {
                    Aim::Plan(target) => self.look(target.clone(), page),
                    Aim::Write(target) => self.look(target.clone(), page),
                };
                looking.push_back((page, looked));
                next += 1;
            }
            let Some((page, looked)) = looking.pop_front() else { break };
            let (found, read) = looked.await.expect("comparing does not panic")?;
            self.sums.read += read;
            self.settle(page, found).await?;
            while self.asked.len() >= QUESTIONS {
                self.answer().await?;
            }
        }
        while !self.asked.is_empty() {
            self.answer().await?;
        }
        self.asking.wait_for_blocks(self.incoming).await?;
        Ok(self.sums)
    }

    fn look(&self, target: impl Existing + 'static, page: PageIndex) -> Looking {
        let (geometry, comparers) = (self.volume.geometry, self.comparers.clone());
        tokio::spawn(threads::blocking(move || {
            let own = lock(&comparers).pop();
            let mut own = own.unwrap_or_else(|| Comparer::new(&target, geometry));
            let found = own.look(&target, page);
            lock(&comparers).push(own);
            found
        }))
    }

    /// What a look at a page leads to: nothing, zeroes, or a question.
    async fn settle(&mut self, page: PageIndex, found: Found) -> Result<(), RestoreError> {
        let (geometry, expected) = (self.volume.geometry, self.ranges[page.0 as usize]);
        let have = match &found {
            Found::Fresh => RangeDigest::ZERO,
            Found::Digests(digests) => RangeDigest::of(digests),
        };
        if have == expected {
            self.phase.add(geometry.page_len(page));
        } else if expected == RangeDigest::ZERO {
            let zeroes = vec![BlockDigest::ZERO; geometry.page_blocks(page)];
            self.change(page, &zeroes, &found).await?;
        } else {
            self.asking.send(&AgentMessage::Page { volume: self.volume.slot, page: page.0 }).await?;
            self.asked.push_back((page, found));
        }
        Ok(())
    }

    /// Takes the answer to the oldest question.
    async fn answer(&mut self) -> Result<(), RestoreError> {
        let Some((page, found)) = self.asked.pop_front() else { return Ok(()) };
        let digests = self.asking.page(self.volume.slot, page, self.incoming).await?;
        let right = digests.len() == self.volume.geometry.page_blocks(page)
            && RangeDigest::of(&digests) == self.ranges[page.0 as usize];
        if !right {
            return Err(RestoreError::Protocol("block digests that do not add up to their range digest"));
        }
        self.change(page, &digests, &found).await
    }

    /// Zeroes what must be zero, and asks for what must come.
    async fn change(&mut self, page: PageIndex, expected: &[BlockDigest], found: &Found) -> Result<(), RestoreError> {
        let (slot, geometry) = (self.volume.slot, self.volume.geometry);
        let difference = Difference::of(geometry, page, expected, found);
        let first = page.first_block().0;
        let fetch: u64 = difference.fetch.iter().map(|i| geometry.block_len(BlockIndex(first + i as u64)) as u64).sum();
        self.sums.fetched += fetch;
        self.sums.zeroed += difference.zero.iter().map(|r| r.end - r.start).sum::<u64>();
        let Aim::Write(target) = &self.aim else {
            self.phase.add(geometry.page_len(page));
            return Ok(());
        };
        if !difference.zero.is_empty() {
            let (target, ranges) = (target.clone(), difference.zero);
            blocking(move || ranges.into_iter().try_for_each(|range| target.write_zeroes(range))).await?;
        }
        self.phase.add(geometry.page_len(page) - fetch);
        if difference.fetch.is_empty() {
            return Ok(());
        }
        let permit = self.asking.room(self.incoming).await?;
        self.incoming.want(page, expected.to_vec(), difference.fetch, permit);
        self.asking.send(&AgentMessage::Want { volume: slot, page: page.0, blocks: difference.fetch.to_bytes() }).await
    }
}
