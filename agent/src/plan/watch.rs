//! Watching volumes: what changes in them, in intervals and in seconds.
//!
//! Read first: [`Watcher::start`], then [`Watcher::run`]. All volumes have the same intervals, so that they can be added.

use std::time::Duration;

use backhaul_hints::{Blocks, Doubt, Subject as Tracking, Tracked};
use backhaul_seams::random;
use backhaul_volume::VolumeError;
use tokio::time::Instant;

use super::compare::Comparer;
use super::pins::Pins;
use super::rate::{Interval, Series, UNIT, count_blocks};
use super::{Estimate, Subject};

/// Between two looks at what the kernel marked: what a policy of one point a second would see.
const TICK: Duration = Duration::from_secs(1);
/// The first reading of all volumes that are compared takes no more of an interval than this part, and no more than
/// [`LONGEST`]; each later one is about as long.
const PART: u32 = 2;
const LONGEST: Duration = Duration::from_secs(10);
/// Volumes longer than this are tracked in blocks of their own size: 32 MiB for the bits of 4 TiB.
const FINE: u64 = 4 << 40;
/// Changed blocks that are named, for looking at what is in them.
const NAMED: usize = 256;

/// How a volume's changes are found out.
#[derive(Clone, PartialEq, Debug)]
pub enum How {
    /// The kernel marks what is written.
    Hints,
    /// It is read again and again; `why` the kernel is not asked, the part of it that is read, and how long that takes.
    Compared {
        /// For people.
        why: String,
        /// From 0 to 1.
        share: f64,
        /// One reading.
        took: Duration,
    },
}

/// What was found out of one volume.
#[derive(Clone, Debug)]
pub struct Watched {
    /// In what way.
    pub how: How,
    /// What changed.
    pub series: Series,
    /// Some of the blocks that changed.
    pub named: Vec<u64>,
    /// Bytes written, as the device counts them.
    pub written: Option<u64>,
    /// What speaks against the figures.
    pub caveats: Vec<String>,
}

enum Eye {
    Hints { tracked: Tracked, unit: u32, tick: Blocks },
    Reading { comparer: Option<Comparer>, why: String, took: Duration },
}

struct One {
    subject: Subject,
    eye: Eye,
    /// Of the interval and of the whole time. Words of the tracker, or one for each piece that is compared.
    interval: Vec<u64>,
    whole: Vec<u64>,
    series: Series,
    written: Option<u64>,
    doubt: Option<Doubt>,
}

/// Watches volumes. Dropped, nothing of it is left in the kernel.
pub struct Watcher {
    // Before the pins, which it uses.
    volumes: Vec<One>,
    _pins: Option<Pins>,
    every: Duration,
}

impl Watcher {
    /// Begins. Image files, and devices whose writes can't be tracked, are read once.
    pub async fn start(subjects: Vec<Subject>, every: Duration) -> Result<Self, VolumeError> {
        let pins = if subjects.iter().any(|s| s.source.is_device()) { Some(Pins::open()) } else { None };
        let mut volumes: Vec<One> = subjects.into_iter().map(|s| One::new(s, pins.as_ref())).collect();
        let compared = volumes.iter().filter(|v| matches!(v.eye, Eye::Reading { .. })).count() as u32;
        for volume in &mut volumes {
            volume.begin((every / PART).min(LONGEST) / compared.max(1)).await?;
        }
        Ok(Self { volumes, _pins: pins.and_then(Result::ok), every })
    }

    /// Watches for so long, in whole intervals. `tell` is called each second.
    pub async fn run(mut self, time: Duration, mut tell: impl FnMut(Duration)) -> Result<Vec<Watched>, VolumeError> {
        let begun = Instant::now();
        // What was written while the others were read the first time belongs to no interval.
        self.tick(None);
        self.volumes.iter_mut().for_each(One::forget);
        let (mut last, mut next, mut ticked) = (Instant::now(), Instant::now() + self.every, Instant::now());
        let (mut told, mut intervals) = (Instant::now(), 0);
        while intervals == 0 || begun.elapsed() < time {
            tokio::time::sleep_until((ticked + TICK).min(next)).await;
            let now = Instant::now();
            tell(now - told);
            told = now;
            if now - ticked >= TICK {
                self.tick(Some(now - ticked));
                ticked = now;
            }
            if now < next {
                continue;
            }
            for i in 0..self.volumes.len() {
                self.volumes[i].read_again().await?;
            }
            // After the reading, so that all volumes have the same interval.
            self.tick(None);
            let now = Instant::now();
            self.volumes.iter_mut().for_each(|v| v.close(now - last));
            (last, next, intervals) = (now, (next + self.every).max(now), intervals + 1);
            // A second that was partly in the interval before would be counted short.
            ticked = now;
            if next - begun > time + self.every / 2 {
                break;
            }
        }
        Ok(self.volumes.into_iter().map(One::result).collect())
    }

    fn tick(&mut self, took: Option<Duration>) {
        self.volumes.iter_mut().for_each(|v| v.tick(took));
    }
}

impl One {
    fn new(subject: Subject, pins: Option<&Result<Pins, String>>) -> Self {
        let own = subject.geometry.block_size();
        let reading = |why: String| Eye::Reading { comparer: None, why, took: Duration::ZERO };
        let eye = match (subject.source.device(), pins) {
            (Some(dev), Some(Ok(pins))) => {
                let unit = if subject.geometry.length() > FINE { own } else { UNIT };
                let length = subject.geometry.length();
                let tracking = Tracking { volume: random::id(), dev, block_size: unit, length, baseline: None };
                match pins.tracker().track(&tracking) {
                    Ok(tracked) => {
                        let tick = Blocks::none(tracked.blocks());
                        Eye::Hints { tracked, unit, tick }
                    }
                    Err(error) => reading(error.to_string()),
                }
            }
            (Some(_), Some(Err(why))) => reading(why.clone()),
            _ => reading("the kernel does not mark what is written to an image file".into()),
        };
        let written = subject.source.device().and_then(|d| d.written()).map(|w| w.sectors);
        let (interval, whole) = match &eye {
            Eye::Hints { tick, .. } => (vec![0; tick.words().len()], vec![0; tick.words().len()]),
            Eye::Reading { .. } => (Vec::new(), Vec::new()),
        };
        Self { subject, eye, interval, whole, series: Series::new(own), written, doubt: None }
    }

    /// Reads what is to be compared for the first time.
    async fn begin(&mut self, time: Duration) -> Result<(), VolumeError> {
        let Eye::Reading { comparer, took, .. } = &mut self.eye else { return Ok(()) };
        let (subject, begun) = (self.subject.clone(), Instant::now());
        let begin = tokio::task::spawn_blocking(move || Comparer::begin(&subject, time));
        let first = begin.await.expect("reading does not panic")?;
        *took = begun.elapsed();
        *comparer = Some(first);
        Ok(())
    }

    /// Takes over what was marked since the last time; of a whole second where `took` is given.
    fn tick(&mut self, took: Option<Duration>) {
        let Eye::Hints { tracked, unit, tick } = &mut self.eye else { return };
        tick.clear();
        // The bits are taken whether or not some are in doubt.
        self.doubt = tracked.take_into(tick).err().or(self.doubt);
        self.interval.iter_mut().zip(tick.words()).for_each(|(mine, new)| *mine |= new);
        if let Some(took) = took {
            let second = self.series.count(tick.words(), *unit, took.as_secs_f64(), 1.0);
            self.series.seconds.push(second);
        }
    }

    async fn read_again(&mut self) -> Result<(), VolumeError> {
        let Eye::Reading { comparer, took, .. } = &mut self.eye else { return Ok(()) };
        let (mut reading, begun) = (comparer.take().expect("begun"), Instant::now());
        let again = tokio::task::spawn_blocking(move || {
            let words = reading.differences();
            (reading, words)
        });
        let (reading, words) = again.await.expect("reading does not panic");
        *comparer = Some(reading);
        *took = begun.elapsed();
        self.interval = words?;
        Ok(())
    }

    /// Nothing was seen yet.
    fn forget(&mut self) {
        self.interval.fill(0);
        self.written = self.subject.source.device().and_then(|d| d.written()).map(|w| w.sectors);
    }

    /// Ends an interval.
    fn close(&mut self, took: Duration) {
        let (unit, scale) = self.counted_in();
        let interval = self.series.count(&self.interval, unit, took.as_secs_f64(), scale);
        self.series.intervals.push(interval);
        self.whole.resize(self.interval.len(), 0);
        self.whole.iter_mut().zip(&self.interval).for_each(|(whole, new)| *whole |= new);
        self.interval.fill(0);
        self.series.whole.seconds += took.as_secs_f64();
    }

    fn counted_in(&self) -> (u32, f64) {
        match &self.eye {
            Eye::Hints { unit, .. } => (*unit, 1.0),
            Eye::Reading { comparer, .. } => (UNIT, comparer.as_ref().map_or(1.0, Comparer::scale)),
        }
    }

    fn result(mut self) -> Watched {
        let (unit, scale) = self.counted_in();
        let own = self.subject.geometry.block_size();
        self.series.whole = self.series.count(&self.whole, unit, self.series.whole.seconds, scale);
        let factor = (own / unit).max(1);
        let bytes = |words: &[u64]| count_blocks(words, factor) as f64 * f64::from(own);
        let now = self.subject.source.device().and_then(|d| d.written()).map(|w| w.sectors);
        let written = now.zip(self.written).map(|(now, before)| now.saturating_sub(before) * 512);
        let mut caveats = Vec::new();
        let (how, changed) = match &self.eye {
            Eye::Hints { .. } => (How::Hints, Estimate { value: bytes(&self.whole), margin: 0.0 }),
            Eye::Reading { comparer, why, took } => {
                let comparer = comparer.as_ref().expect("begun");
                let each = self.whole.iter().map(|word| bytes(std::slice::from_ref(word)));
                let how = How::Compared { why: why.clone(), share: comparer.share(), took: *took };
                (how, comparer.changed(each, f64::from(own)))
            }
        };
        self.series.changed = changed;
        if let Some(doubt) = self.doubt {
            caveats.push(format!("{doubt}: more may have changed than was counted"));
        }
        let named = self.named(factor);
        Watched { how, series: self.series, named, written, caveats }
    }

    /// Blocks of the volume's own size that changed, some of them: each as likely as any other, in an order of chance.
    fn named(&self, factor: u32) -> Vec<u64> {
        let (mut named, mut seen, mut last) = (Vec::new(), 0_u64, None);
        for (index, word) in self.whole.iter().enumerate().filter(|(_, word)| **word != 0) {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                let unit = match &self.eye {
                    Eye::Hints { .. } => index as u64 * 64 + u64::from(bit),
                    Eye::Reading { comparer, .. } => comparer.as_ref().expect("begun").unit(index, bit),
                };
                let block = unit / u64::from(factor);
                if last.replace(block) == Some(block) {
                    continue;
                }
                seen += 1;
                if named.len() < NAMED {
                    named.push(block);
                } else if let Some(other) = named.get_mut((u64::from(random::number()) % seen) as usize) {
                    *other = block;
                }
            }
        }
        super::sample::shuffle(&mut named);
        named
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Watcher({} volumes, every {:?})", self.volumes.len(), self.every)
    }
}

/// All volumes as one: a point is of all of them. Seconds only where all have them.
pub fn together(watched: &[Watched]) -> Together {
    let count = watched.iter().map(|w| w.series.intervals.len()).min().unwrap_or(0);
    let has_seconds = watched.iter().all(|w| w.how == How::Hints);
    let seconds = if has_seconds { watched.iter().map(|w| w.series.seconds.len()).min().unwrap_or(0) } else { 0 };
    let sum = |of: &dyn Fn(&Series) -> &Interval| -> Load {
        let mut load = Load::default();
        for w in watched {
            let interval = of(&w.series);
            load.seconds = load.seconds.max(interval.seconds);
            load.blocks += interval.blocks.first().copied().unwrap_or(0.0);
            load.bytes += w.series.bytes(interval);
        }
        load
    };
    Together {
        intervals: (0..count).map(|i| sum(&|s| &s.intervals[i])).collect(),
        seconds: (0..seconds).map(|i| sum(&|s| &s.seconds[i])).collect(),
        whole: sum(&|s| &s.whole),
    }
}

/// What changed in all volumes between two looks, in blocks of their own sizes.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// How long it was.
    pub seconds: f64,
    /// Distinct blocks.
    pub blocks: f64,
    /// Bytes of them.
    pub bytes: f64,
}

/// What changed in all volumes.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Together {
    /// In intervals of the policy.
    pub intervals: Vec<Load>,
    /// In seconds.
    pub seconds: Vec<Load>,
    /// In the whole time.
    pub whole: Load,
}
