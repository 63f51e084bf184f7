//! Restores one volume of a point onto a target: compares, fetches what differs, writes, reads everything back.
//!
//! Read first: [`Restoring::write`] and [`Restoring::verify`]. Window by window:
//! while one is fetched and written the next is compared. Whatever is interrupted is continued by doing it all again.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use backhaul_protocol::digest::{BlockDigest, VolumeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::entry::Page;
use backhaul_protocol::store::key::GroupKeys;
use backhaul_seams::threads;
use backhaul_volume::rebuild::{Comparer, Existing, Found, block_range, differing_ranges, verify_all};
use backhaul_volume::target::{Durability, Target, TargetError};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};

use crate::fetch::{Fetched, Fetcher, Purpose};
use crate::plan::restore::{Sums, plan_window, window_pages};
use crate::restore_error::RestoreError;
use crate::salvage::{Lost, OnDamage, join_neighbours, page_range};
use crate::store::ObjectStore;
use crate::survey::Survey;
use crate::view::{View, ViewVolume};

/// Windows that are compared ahead of the one that is written.
const AHEAD: usize = 2;
/// Pages that are looked at closely when the digests differ at the end: enough to say what happened.
const MAX_EXPLAINED: usize = 64;

/// One volume of a point, and where it goes.
#[derive(Clone)]
pub struct Restoring {
    /// Where the records are.
    pub store: Arc<dyn ObjectStore>,
    /// Of the group.
    pub keys: GroupKeys,
    /// The point.
    pub view: Arc<View>,
    /// The volume.
    pub volume: ViewVolume,
    /// What the user calls it.
    pub name: Name,
    /// Where it goes.
    pub target: Arc<Target>,
    /// What is waited for in the end.
    pub durability: Durability,
    /// What to do about damage.
    pub on_damage: OnDamage,
    /// Bytes of which nothing can be had, ascending and apart: they are left as they are.
    pub unknown: Arc<[Range<u64>]>,
    /// Threads that work at once, of all volumes.
    pub threads: Arc<Semaphore>,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Written {
    /// What the plans came to.
    pub sums: Sums,
    /// Bytes of the target that were read to compare.
    pub read: u64,
    /// Bytes of block records that were fetched.
    pub fetched: u64,
    /// Bytes that were written or zeroed.
    pub written: u64,
    /// What could not be restored.
    pub lost: Vec<Lost>,
}

/// A window that was compared and planned.
struct Planned {
    plan: crate::plan::restore::WindowPlan,
    read: u64,
    lost: Vec<Lost>,
    lost_bytes: u64,
}

impl Restoring {
    /// Compares and writes what differs. The target is not finished: its first MiB waits.
    pub async fn write(&self, progress: impl Fn(u64)) -> Result<Written, RestoreError> {
        let (planned, mut plans) = mpsc::channel(1);
        let mut planner = JoinSet::new();
        let this = self.clone();
        planner.spawn(async move {
            if let Err(e) = this.plan_windows(&planned).await {
                let _ = planned.send(Err(e)).await;
            }
        });
        let purpose = Purpose::Write(self.target.clone(), self.durability);
        let mut fetcher =
            Fetcher::new(self.store.clone(), self.keys, self.volume.geometry, purpose, self.threads.clone());
        let mut zeroing = JoinSet::new();
        let mut done = Written::default();
        while let Some(planned) = plans.recv().await {
            let Planned { plan, read, lost, lost_bytes } = planned?;
            done.sums += plan.sums;
            done.read += read;
            done.lost.extend(lost);
            progress(plan.sums.equal + lost_bytes);
            if !plan.zero.is_empty() {
                let target = self.target.clone();
                zeroing.spawn(threads::blocking(move || zero(&target, &plan.zero)));
            }
            for read in plan.reads {
                fetcher.start(read).await;
                while let Some(fetched) = fetcher.try_next() {
                    self.take(&mut done, fetched?, &progress)?;
                }
                while let Some(zeroed) = zeroing.try_join_next() {
                    done.written += took(zeroed, &progress)?;
                }
            }
        }
        while let Some(fetched) = fetcher.next().await {
            self.take(&mut done, fetched?, &progress)?;
        }
        while let Some(zeroed) = zeroing.join_next().await {
            done.written += took(zeroed, &progress)?;
        }
        join_neighbours(&mut done.lost);
        Ok(done)
    }

    fn take(&self, done: &mut Written, fetched: Fetched, progress: &impl Fn(u64)) -> Result<(), RestoreError> {
        done.fetched += fetched.fetched;
        done.written += fetched.good;
        progress(fetched.good);
        for block in fetched.lost {
            let range = block_range(self.volume.geometry, block.block);
            progress(range.end - range.start);
            done.lost.push(Lost::new(&self.name, range, block.object.to_string(), block.cause));
        }
        if self.on_damage == OnDamage::Fail && !done.lost.is_empty() {
            join_neighbours(&mut done.lost);
            return Err(RestoreError::Damaged(std::mem::take(&mut done.lost)));
        }
        Ok(())
    }

    async fn plan_windows(&self, out: &mpsc::Sender<Result<Planned, RestoreError>>) -> Result<(), RestoreError> {
        let geometry = self.volume.geometry;
        let comparers = Arc::new(Mutex::new(Vec::new()));
        let mut under_way: VecDeque<Window> = VecDeque::new();
        let step = window_pages(geometry);
        for first in (0..geometry.pages()).step_by(step as usize) {
            let window = self.begin_window(first..(first + step).min(geometry.pages()), &comparers).await?;
            under_way.push_back(window);
            if under_way.len() > AHEAD
                && let Some(window) = under_way.pop_front()
                && out.send(Ok(self.plan(window).await?)).await.is_err()
            {
                return Ok(());
            }
        }
        while let Some(window) = under_way.pop_front() {
            if out.send(Ok(self.plan(window).await?)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads the window's part of the index and begins to compare.
    async fn begin_window(
        &self,
        pages: Range<u64>,
        comparers: &Arc<Mutex<Vec<Comparer>>>,
    ) -> Result<Window, RestoreError> {
        let mut window = Window::default();
        for index in pages.map(PageIndex) {
            let page = match self.view.page(&self.volume, index).await {
                Ok(page) => page,
                Err(e) if self.on_damage == OnDamage::Salvage && e.is_damage() => {
                    window.lost.push(Lost::page(&self.name, self.volume.geometry, index, &e));
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            window.pages.push((index, page, self.look(index, comparers.clone())));
        }
        Ok(window)
    }

    fn look(&self, index: PageIndex, comparers: Arc<Mutex<Vec<Comparer>>>) -> Looked {
        let (target, threads, geometry) = (self.target.clone(), self.threads.clone(), self.volume.geometry);
        if target.is_fresh() {
            return Looked::Now;
        }
        Looked::Soon(tokio::spawn(async move {
            let _thread = threads.acquire_owned().await.expect("never closed");
            let work = move || {
                let own = comparers.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let mut own = own.unwrap_or_else(|| Comparer::new(&target, geometry));
                let found = own.look(&target, index);
                comparers.lock().unwrap_or_else(PoisonError::into_inner).push(own);
                found
            };
            threads::blocking(work).await
        }))
    }

    async fn plan(&self, window: Window) -> Result<Planned, RestoreError> {
        let mut read = 0;
        let mut pages = Vec::with_capacity(window.pages.len());
        for (index, page, looked) in window.pages {
            let found = match looked {
                Looked::Now => Found::Fresh,
                Looked::Soon(handle) => {
                    let (found, bytes) = handle.await.expect("comparing does not panic")?;
                    read += bytes;
                    found
                }
            };
            pages.push((index, page, as_unknown(self.volume.geometry, &self.unknown, index, found)));
        }
        let plan = plan_window(self.volume.geometry, self.volume.slot, &pages);
        let lost_bytes = window.lost.iter().map(|l| l.end - l.start).sum();
        Ok(Planned { plan, read, lost: window.lost, lost_bytes })
    }

    /// Completes the target.
    pub async fn finish(&self) -> Result<(), TargetError> {
        let (target, durability) = (self.target.clone(), self.durability);
        threads::blocking(move || target.finish(durability)).await
    }

    /// After [`Self::finish`]: reads all of it back and compares with the point; what was lost before may differ
    /// (`gone`: ascending and apart).
    pub async fn verify(
        &self,
        survey: &Survey,
        gone: &[Range<u64>],
        progress: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<Verified, RestoreError> {
        let (target, geometry, durability) = (self.target.clone(), self.volume.geometry, self.durability);
        let threads = self.threads.available_permits();
        let read = threads::blocking(move || verify_all(&target, geometry, durability, threads, &progress)).await?;
        let mut ranges = Vec::new();
        let is_gone = |page: &PageIndex| is_inside(gone, &page_range(geometry, *page));
        let mut explained = 0;
        for page in read.differing(&survey.ranges).into_iter().filter(|p| !is_gone(p)) {
            let (found, whole) = (self.differing_in(page, gone).await?, page_range(geometry, page));
            // A page that differed once and is equal when it is read again is no page to trust.
            if found.is_empty() && !gone.iter().any(|r| r.start < whole.end && whole.start < r.end) {
                ranges.push(whole);
            }
            ranges.extend(found);
            explained += usize::from(!ranges.is_empty());
            if explained == MAX_EXPLAINED {
                break;
            }
        }
        if !ranges.is_empty() {
            return Err(RestoreError::Differs { volume: self.name.clone(), ranges });
        }
        Ok(Verified { digest: read.digest, bytes: read.bytes, from_device: read.from_device })
    }

    async fn differing_in(&self, page: PageIndex, gone: &[Range<u64>]) -> Result<Vec<Range<u64>>, RestoreError> {
        let geometry = self.volume.geometry;
        let expected = self.view.page(&self.volume, page).await?.digests();
        let (target, durability) = (self.target.clone(), self.durability);
        let look = move || differing_ranges(&target, geometry, durability, page, &expected);
        let ranges = threads::blocking(look).await?;
        // Lost ranges are whole blocks: compare block by block.
        let step = u64::from(geometry.block_size());
        let blocks =
            ranges.iter().flat_map(|r| (r.start..r.end).step_by(step as usize).map(|s| s..(s + step).min(r.end)));
        let mut out: Vec<Range<u64>> = Vec::new();
        for block in blocks.filter(|b| !is_inside(gone, b)) {
            match out.last_mut() {
                Some(last) if last.end == block.start => last.end = block.end,
                _ => out.push(block),
            }
        }
        Ok(out)
    }
}

/// The index says nothing of unknown blocks, which means zero: nothing happens to them if they are said to be.
/// `unknown`: bytes, ascending and apart.
pub(crate) fn as_unknown(geometry: Geometry, unknown: &[Range<u64>], index: PageIndex, mut found: Found) -> Found {
    let whole = page_range(geometry, index);
    if let Found::Digests(digests) = &mut found {
        let from = unknown.partition_point(|r| r.end <= whole.start);
        for range in unknown[from..].iter().take_while(|r| r.start < whole.end) {
            for (i, digest) in digests.iter_mut().enumerate() {
                let block = block_range(geometry, BlockIndex(index.first_block().0 + i as u64));
                if range.start <= block.start && block.end <= range.end {
                    *digest = BlockDigest::ZERO;
                }
            }
        }
    }
    found
}

/// Whether one of the ranges, which are ascending and apart, holds all of `what`.
fn is_inside(ranges: &[Range<u64>], what: &Range<u64>) -> bool {
    let at = ranges.partition_point(|r| r.end < what.end);
    ranges.get(at).is_some_and(|r| r.start <= what.start)
}

/// What was read back.
#[derive(Clone, Debug)]
pub struct Verified {
    /// Of the target.
    pub digest: VolumeDigest,
    /// Bytes that were compared.
    pub bytes: u64,
    /// Past the cache, from a device.
    pub from_device: bool,
}

#[derive(Default)]
struct Window {
    pages: Vec<(PageIndex, Page, Looked)>,
    lost: Vec<Lost>,
}

enum Looked {
    /// There is nothing to look at.
    Now,
    /// A thread is looking.
    Soon(JoinHandle<Result<(Found, u64), TargetError>>),
}

fn zero(target: &Target, ranges: &[Range<u64>]) -> Result<u64, TargetError> {
    for range in ranges {
        target.write_zeroes(range.clone())?;
    }
    Ok(ranges.iter().map(|r| r.end - r.start).sum())
}

fn took(
    zeroed: Result<Result<u64, TargetError>, tokio::task::JoinError>,
    progress: &impl Fn(u64),
) -> Result<u64, TargetError> {
    let bytes = zeroed.expect("zeroing does not panic")?;
    progress(bytes);
    Ok(bytes)
}

#[cfg(test)]
#[path = "rehydrate_tests.rs"]
mod tests;
