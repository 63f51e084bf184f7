//! What was found and what follows, as one value: the JSON of `plan`.
//!
//! Read first: [`Report`]. [`super::told`] says it to people.

use std::time::Duration;

use backhaul_volume::Volume;
use serde::Serialize;

use super::forecast::{Forecast, Given, Link, forecast};
use super::network::Network;
use super::rate::{SIZES, Spread, recommended};
use super::sample::{Contents, Tally};
use super::told::advice;
use super::watch::{How, Watched, together};
use super::{Estimate, Subject};

/// The policy, and what it runs on.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Between two points.
    pub every: Duration,
    /// For how long it is watched.
    pub time: Duration,
    /// For how long points are kept.
    pub keep: Duration,
    /// As set.
    pub threads: usize,
    /// For a thousand puts.
    pub put_price: Option<f64>,
    /// For a GB and month.
    pub month_price: Option<f64>,
}

/// All that was found of a volume.
#[derive(Clone, Debug)]
pub struct Looked {
    /// Which.
    pub subject: Subject,
    /// What it holds.
    pub contents: Contents,
    /// What changes.
    pub watched: Watched,
    /// What changed blocks hold.
    pub changed: Tally,
}

/// The path to the receiver.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Path {
    /// As it was typed, bytes a second.
    Given(u64),
    /// As it was measured.
    Measured(Network),
}

/// Why there is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoPath {
    /// Nobody to measure with.
    #[error("this server has not joined a receiver")]
    NotJoined,
    /// As asked for.
    #[error("--no-network")]
    NotWanted,
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub(super) watched_seconds: f64,
    pub(super) intervals: usize,
    pub(super) every_seconds: f64,
    pub(super) keep_seconds: f64,
    pub(super) volumes: Vec<VolumeReport>,
    pub(super) network: Option<NetworkReport>,
    pub(super) network_left_out: Option<String>,
    pub(super) cpu: Cpu,
    pub(super) changed_per_interval: Spread,
    #[serde(flatten)]
    pub(super) forecast: Forecast,
    pub(super) advice: Vec<String>,
    /// What speaks against the figures.
    pub caveats: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct VolumeReport {
    pub(super) name: String,
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) block_size: u32,
    pub(super) sample_blocks: u64,
    pub(super) sample_bytes: u64,
    pub(super) population_blocks: u64,
    pub(super) data_bytes: Estimate,
    pub(super) stored_bytes: Estimate,
    pub(super) read_bytes_per_second: f64,
    pub(super) how: &'static str,
    pub(super) why: Option<String>,
    pub(super) compared_share: Option<f64>,
    pub(super) round_seconds: Option<f64>,
    pub(super) changed_bytes: Estimate,
    pub(super) changed_per_interval: Spread,
    pub(super) changed_bytes_per_second: f64,
    pub(super) changed_sample_blocks: u64,
    pub(super) changed_stored_share: Option<f64>,
    pub(super) written_bytes: Option<u64>,
    pub(super) block_sizes: Vec<SizeReport>,
    pub(super) recommended_block_size: Option<u32>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct SizeReport {
    pub(super) block_size: u32,
    pub(super) changed_per_interval: f64,
    pub(super) amplification: Option<f64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct NetworkReport {
    pub(super) measured: bool,
    pub(super) round_trip_seconds: Option<f64>,
    pub(super) round_trip_busy_seconds: Option<f64>,
    pub(super) bytes_per_second: f64,
    pub(super) bytes: Option<u64>,
    pub(super) seconds: Option<f64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Cpu {
    pub(super) threads: usize,
    pub(super) hash_bytes_per_second: f64,
    pub(super) compress_bytes_per_second: f64,
}

impl Report {
    /// What follows from what was found.
    pub fn new(looked: &[Looked], path: Result<Path, NoPath>, wanted: &Wanted) -> Self {
        let watched: Vec<Watched> = looked.iter().map(|l| l.watched.clone()).collect();
        let changes = together(&watched);
        let cpu = cpu(looked, wanted.threads);
        let given = Given {
            every: wanted.every.as_secs_f64(),
            keep: wanted.keep.as_secs_f64(),
            stored_share: stored_share(looked),
            length: looked.iter().map(|l| l.length()).sum(),
            data_blocks: looked
                .iter()
                .map(|l| l.contents.data.value / f64::from(l.subject.geometry.block_size()))
                .sum(),
            data: sum(looked, |l| l.contents.data),
            stored: sum(looked, |l| l.contents.stored),
            read: read_rate(looked, cpu.hash_bytes_per_second),
            hash: cpu.hash_bytes_per_second,
            compress: cpu.compress_bytes_per_second,
            scanned: looked.iter().filter(|l| l.watched.how != How::Hints).map(|l| l.length()).sum(),
            link: path.as_ref().ok().map(|p| p.link()),
            put_price: wanted.put_price,
            month_price: wanted.month_price,
            changes,
        };
        let forecast = forecast(&given);
        let volumes: Vec<VolumeReport> = looked.iter().map(VolumeReport::new).collect();
        let named = looked.iter().flat_map(|l| l.watched.caveats.iter().map(|c| format!("{}: {c}", l.subject.name)));
        Self {
            watched_seconds: given.changes.whole.seconds,
            intervals: given.changes.intervals.len(),
            every_seconds: given.every,
            keep_seconds: given.keep,
            network: path.as_ref().ok().map(Path::report),
            network_left_out: path.as_ref().err().map(ToString::to_string),
            cpu,
            changed_per_interval: Spread::of(given.changes.intervals.iter().map(|l| l.bytes)),
            advice: advice(&forecast, &given, &volumes),
            caveats: named.collect(),
            volumes,
            forecast,
        }
    }
}

impl Looked {
    /// Bytes outside holes.
    fn length(&self) -> f64 {
        let blocks = self.contents.population as f64 * f64::from(self.subject.geometry.block_size());
        blocks.min(self.subject.geometry.length() as f64)
    }

    /// Bytes of payload that a byte of a changed block comes to; of any block where none changed.
    fn share(&self) -> Option<f64> {
        payload_share(&self.changed).or_else(|| payload_share(&self.contents.tally))
    }
}

/// Without headers, which are counted by blocks.
fn payload_share(tally: &Tally) -> Option<f64> {
    (tally.bytes > 0).then(|| tally.stored.saturating_sub(tally.data * 64) as f64 / tally.bytes as f64)
}

impl Path {
    fn link(&self) -> Link {
        match self {
            Self::Given(rate) => Link { round_trip: 0.0, rate: *rate as f64 },
            Self::Measured(n) => Link { round_trip: n.round_trip.as_secs_f64(), rate: n.rate },
        }
    }

    fn report(&self) -> NetworkReport {
        let measured = match self {
            Self::Given(_) => None,
            Self::Measured(network) => Some(network),
        };
        NetworkReport {
            measured: measured.is_some(),
            round_trip_seconds: measured.map(|n| n.round_trip.as_secs_f64()),
            round_trip_busy_seconds: measured.map(|n| n.round_trip_busy.as_secs_f64()),
            bytes_per_second: self.link().rate,
            bytes: measured.map(|n| n.bytes),
            seconds: measured.map(|n| n.took.as_secs_f64()),
        }
    }
}

fn sum(looked: &[Looked], of: impl Fn(&Looked) -> Estimate) -> Estimate {
    looked.iter().map(of).fold(Estimate::default(), |a, b| a + b)
}

/// Weighed by what changed of each volume; by what they hold where nothing did.
fn stored_share(looked: &[Looked]) -> f64 {
    let weighed = |weight: &dyn Fn(&Looked) -> f64| {
        let known = || looked.iter().filter_map(|l| Some((weight(l), l.share()?)));
        let all: f64 = known().map(|(w, _)| w).sum();
        (all > 0.0).then(|| known().map(|(w, s)| w * s).sum::<f64>() / all)
    };
    weighed(&|l| l.watched.series.changed.value).or_else(|| weighed(&Looked::length)).unwrap_or(1.0)
}

/// All of them one after the other; of nothing but holes as fast as they are hashed.
fn read_rate(looked: &[Looked], hash: f64) -> f64 {
    if looked.iter().all(|l| l.contents.population == 0) {
        return hash;
    }
    let seconds: f64 = looked.iter().map(|l| l.length() / l.contents.read_rate.max(1.0)).sum();
    looked.iter().map(Looked::length).sum::<f64>() / seconds.max(1e-9)
}

/// Bytes a second that one thread hashes, where there was nothing to hash.
fn hashing() -> f64 {
    let (bytes, begun) = (vec![1; 4 << 20], std::time::Instant::now());
    std::hint::black_box(blake3::hash(&bytes));
    bytes.len() as f64 / begun.elapsed().as_secs_f64().max(1e-9)
}

/// Bytes a second of all threads. Of a volume without data nothing is known of compressing: as fast as hashing.
fn cpu(looked: &[Looked], threads: usize) -> Cpu {
    let total = |of: &dyn Fn(&Tally) -> f64| looked.iter().map(|l| of(&l.contents.tally) + of(&l.changed)).sum::<f64>();
    let bytes = total(&|t| t.bytes as f64);
    let hash = if bytes > 0.0 { bytes / total(&|t| t.hashed.as_secs_f64()).max(1e-9) } else { hashing() };
    let (data, worked) = (total(&|t| t.data_bytes as f64), total(&|t| t.worked.as_secs_f64()));
    let compress = if data > 0.0 { data / worked.max(1e-9) } else { hash };
    let threads_f = threads as f64;
    Cpu { threads, hash_bytes_per_second: hash * threads_f, compress_bytes_per_second: compress * threads_f }
}

impl VolumeReport {
    fn new(looked: &Looked) -> Self {
        let Looked { subject, contents, watched, changed } = looked;
        let series = &watched.series;
        let mean = |size: usize| Spread::of(series.intervals.iter().map(|i| series.bytes_in(i, size))).mean;
        let usual = mean(2);
        // The volume's own size comes first, then those that are compared.
        let block_sizes: Vec<SizeReport> = SIZES
            .iter()
            .enumerate()
            .map(|(i, size)| {
                let bytes = mean(i + 1);
                let amplification = (mean(1) > 0.0).then(|| bytes / mean(1));
                SizeReport { block_size: *size, changed_per_interval: bytes, amplification }
            })
            .collect();
        let (how, why, share, took) = match &watched.how {
            How::Hints => ("hints", None, None, None),
            How::Compared { why, share, took } => {
                ("compared", Some(why.clone()), Some(*share), Some(took.as_secs_f64()))
            }
        };
        Self {
            name: subject.name.clone(),
            path: subject.source.path().display().to_string(),
            bytes: subject.source.length(),
            block_size: subject.geometry.block_size(),
            sample_blocks: contents.tally.blocks,
            sample_bytes: contents.tally.bytes,
            population_blocks: contents.population,
            data_bytes: contents.data,
            stored_bytes: contents.stored,
            read_bytes_per_second: contents.read_rate,
            how,
            why,
            compared_share: share,
            round_seconds: took,
            changed_bytes: series.changed,
            changed_per_interval: Spread::of(series.intervals.iter().map(|i| series.bytes(i))),
            changed_bytes_per_second: series.changed.value / series.whole.seconds.max(1e-9),
            changed_sample_blocks: changed.blocks,
            changed_stored_share: payload_share(changed),
            written_bytes: watched.written,
            recommended_block_size: (usual > 0.0).then(|| recommended([mean(1), usual, mean(3)])),
            block_sizes,
        }
    }
}
