//! Settings of the agent: what was typed becomes what is meant, once.
//!
//! Read first: [`Settings`] (the file), then [`Config`]. [`snapshot`] has those of hooks.

pub mod snapshot;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_cli::settings::{self, Bytes, Rate, Span};
use backhaul_cli::{Exit, Failure};
use backhaul_protocol::limits::{DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use backhaul_transport::tuning::Tuning;
use backhaul_volume::priority::IoClass;
use clap::Args;
use serde::Deserialize;

use crate::pipeline::load::{self, Priority};
use crate::pipeline::pace::Compression;
use crate::pipeline::schedule::{Days, Schedule, Window};
use crate::quiesce::Limits;
use crate::tracker::DEFAULT_FULL_SCAN;
use snapshot::{HookTable, Snapshot};

/// Where settings are looked for where none are named.
pub const DEFAULT_FILE: &str = "/etc/backhaul/agent.toml";
/// Where keys, protected volumes and indexes are kept where no other place is named.
pub const DEFAULT_STATE: &str = "/var/lib/backhaul/agent";
/// `run` makes a point this often where nothing else is said.
pub const DEFAULT_EVERY: Duration = Duration::from_secs(15);
/// What `every` may be: below, a round would not end before the next; above, nobody would notice that it stopped.
pub const EVERY: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(7 * 86_400);

/// What `freeze_limit` may be: a freeze and thaw alone takes some 50 ms; above, databases give up.
const FREEZE_LIMIT: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(60);
/// What `sync_limit` may be.
const SYNC_LIMIT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);
/// What `freeze_memory` may be, bytes: some blocks of the largest size, and what a disk brings in a few seconds.
const FREEZE_MEMORY: RangeInclusive<u64> = 4 << 20..=1 << 30;
/// What `full_scan_every` may be.
const FULL_SCAN_EVERY: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(366 * 86_400);

/// What rates may be, bytes per second: below, one piece of records would take longer than a receiver waits for the last.
const RATE: RangeInclusive<u64> = 64_000..=1 << 50;
/// What `nice` may be: better than usual is not for a program that waits on others' disks.
const NICE: RangeInclusive<i32> = 0..=19;
/// Where nothing else is said.
const DEFAULT_NICE: i32 = 10;
/// More windows than that are a slip.
const MAX_WINDOWS: usize = 100;

/// The settings file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The state folder.
    pub state: Option<PathBuf>,
    /// Where the receiver is, HOST:PORT; default: what the join token said.
    pub receiver: Option<String>,
    /// How often `run` makes a point.
    pub every: Option<Span>,
    /// What gives way where a point can't be had without making the server wait.
    pub prefer: Option<Prefer>,
    /// How long file systems may be frozen for a point.
    pub freeze_limit: Option<Span>,
    /// How long writing back what is dirty may take before that.
    pub sync_limit: Option<Span>,
    /// Memory for what is read while they are frozen.
    pub freeze_memory: Option<Bytes>,
    /// Everything is read again within this time, whatever was written.
    pub full_scan_every: Option<Span>,
    /// Threads that read, hash and compress.
    pub threads: Option<usize>,
    /// Bytes of block records that are sent per second.
    pub send_rate: Option<Rate>,
    /// The same at some hours.
    #[serde(default)]
    pub send_window: Vec<WindowSettings>,
    /// Bytes of volumes that are read per second.
    pub read_rate: Option<Rate>,
    /// How threads that scan rank for processors.
    pub nice: Option<i32>,
    /// How threads that scan rank for disks.
    pub io: Option<Io>,
    /// Where `run` answers Prometheus.
    pub metrics: Option<SocketAddr>,
    /// How hard blocks are compressed.
    pub compression: Option<WordOrLevel>,
    /// Block size of volumes that are protected from now on.
    pub block_size: Option<Bytes>,
    /// What tells this machine from its clones.
    pub machine_id_file: Option<PathBuf>,
    /// Congestion control of what is sent.
    pub congestion: Option<String>,
    /// Whether the kernel cuts what is sent into packets.
    pub segmentation_offload: Option<bool>,
    /// How a point becomes one of a single instant.
    pub snapshot: Option<String>,
    /// Commands for `snapshot = "hooks"`.
    pub hooks: Option<HookTable>,
}

/// Hours with a rate of their own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSettings {
    /// HH:MM, local time.
    pub from: String,
    /// The same; not later than `from`: on the next day.
    pub to: String,
    /// `mon-fri`, `sat,sun`; default: every day.
    pub days: Option<String>,
    /// Bytes per second; 0: nothing is sent.
    pub rate: Rate,
}

/// How threads that scan rank for disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Io {
    /// As the process.
    Normal,
    /// Best effort, after all others.
    #[default]
    BestEffort,
    /// Only when nobody else wants the disk.
    Idle,
}

impl Io {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::BestEffort => "best-effort",
            Self::Idle => "idle",
        }
    }

    fn class(self) -> IoClass {
        match self {
            Self::Normal => IoClass::Unchanged,
            Self::BestEffort => IoClass::BestEffort,
            Self::Idle => IoClass::Idle,
        }
    }
}

/// What gives way where a point can't be had without making the server wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prefer {
    /// The point: it is made later.
    #[default]
    Availability,
    /// The server: programs wait longer for their writes.
    Consistency,
}

impl Prefer {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Availability => "availability",
            Self::Consistency => "consistency",
        }
    }

    /// How long file systems may be frozen where nothing else is said.
    fn freeze_limit(self) -> Duration {
        match self {
            Self::Availability => Limits::default().freeze,
            // Long for people, and far from what makes the kernel or databases give up. Arbitrary.
            Self::Consistency => Duration::from_secs(10),
        }
    }
}

/// `compression` as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "want \"auto\", \"fast\", \"none\" or a zstd level from -7 to 19")]
pub enum WordOrLevel {
    /// A zstd level.
    Level(i32),
    /// A word.
    Word(String),
}

/// What differs between machines.
#[derive(Args, Clone, Debug, Default)]
pub struct PlaceArgs {
    /// Folder of the agent's keys, protected volumes and indexes
    #[arg(long, global = true, env = "BACKHAUL_AGENT_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Where the receiver is, instead of what the join token said
    #[arg(long, global = true, env = "BACKHAUL_RECEIVER", value_name = "HOST:PORT")]
    pub receiver: Option<String>,
}

/// What is meant.
#[derive(Clone, Debug)]
pub struct Config {
    /// The state folder.
    pub state: PathBuf,
    /// Where the receiver is, if not where the token said.
    pub receiver: Option<String>,
    /// How often `run` makes a point.
    pub every: Duration,
    /// What gives way.
    pub prefer: Prefer,
    /// What a freeze may cost.
    pub limits: Limits,
    /// Everything is read again within this time.
    pub full_scan_every: Duration,
    /// Threads that read, hash and compress.
    pub threads: usize,
    /// How much is asked of the server.
    pub load: load::Limits,
    /// How threads that scan rank for disks.
    pub io: Io,
    /// Where `run` answers Prometheus.
    pub metrics: Option<SocketAddr>,
    /// How hard blocks are compressed.
    pub compression: Compression,
    /// Block size of volumes that are protected from now on, bytes.
    pub block_size: u32,
    /// What tells this machine from its clones.
    pub machine_id_file: PathBuf,
    /// How connections treat their path.
    pub tuning: Tuning,
    /// How a point becomes one of a single instant.
    pub snapshot: Snapshot,
    /// What it was built from.
    from: (Option<PathBuf>, PlaceArgs),
}

impl Config {
    /// From the same flags, and the file as it is now.
    pub fn again(&self) -> Result<Self, Failure> {
        Self::build(self.from.0.as_deref(), &self.from.1)
    }

    /// From flags and environment, then the file, then defaults.
    pub fn build(file: Option<&Path>, place: &PlaceArgs) -> Result<Self, Failure> {
        let settings: Settings = settings::load(file, Path::new(DEFAULT_FILE))?;
        let wrong = |text: String| Failure::new(Exit::Config, "E_CONFIG", text);
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let threads = settings.threads.unwrap_or(cores.min(8));
        if !(1..=256).contains(&threads) {
            return Err(wrong(format!("threads = {threads}: want from 1 to 256")));
        }
        let compression = match &settings.compression {
            None => Compression::default(),
            Some(WordOrLevel::Word(word)) => word.parse().map_err(wrong)?,
            Some(WordOrLevel::Level(level)) => Compression::level(*level).map_err(wrong)?,
        };
        let block_size = settings.block_size.map_or(u64::from(DEFAULT_BLOCK_SIZE), |b| b.0);
        let legal = u64::from(MIN_BLOCK_SIZE)..=u64::from(MAX_BLOCK_SIZE);
        if !block_size.is_power_of_two() || !legal.contains(&block_size) {
            return Err(wrong(format!("block_size = {block_size}: want a power of two from 16KiB to 1MiB")));
        }
        let every = settings.every.map_or(DEFAULT_EVERY, |s| s.0);
        if !EVERY.contains(&every) {
            return Err(wrong(format!("every = {every:?}: want from 1s to 7d")));
        }
        let prefer = settings.prefer.unwrap_or_default();
        let limits = limits(prefer, &settings).map_err(wrong)?;
        let full_scan_every = settings.full_scan_every.map_or(DEFAULT_FULL_SCAN, |s| s.0);
        if !FULL_SCAN_EVERY.contains(&full_scan_every) {
            return Err(wrong(format!("full_scan_every = {full_scan_every:?}: want from 1m to 366d")));
        }
        let load = load_limits(&settings).map_err(wrong)?;
        let tuning = settings::tuning(settings.congestion.as_deref(), settings.segmentation_offload).map_err(wrong)?;
        let snapshot = Snapshot::build(settings.snapshot.as_deref(), settings.hooks).map_err(wrong)?;
        let receiver = place.receiver.clone().or(settings.receiver);
        if let Some(text) = &receiver {
            settings::check_address(text).map_err(|e| wrong(format!("receiver: {e}")))?;
        }
        Ok(Self {
            state: place.state.clone().or(settings.state).unwrap_or_else(|| DEFAULT_STATE.into()),
            receiver,
            every,
            prefer,
            limits,
            full_scan_every,
            threads,
            load,
            io: settings.io.unwrap_or_default(),
            metrics: settings.metrics,
            compression,
            block_size: block_size as u32,
            machine_id_file: settings.machine_id_file.unwrap_or_else(|| crate::machine::USUAL_FILE.into()),
            tuning,
            snapshot,
            from: (file.map(Path::to_owned), place.clone()),
        })
    }
}

fn load_limits(settings: &Settings) -> Result<load::Limits, String> {
    let rate = |name: &str, rate: Option<Rate>| match rate {
        Some(Rate(n)) if !RATE.contains(&n) => Err(format!("{name} = {n}: want at least 64kB a second")),
        rate => Ok(rate.map(|r| r.0)),
    };
    if settings.send_window.len() > MAX_WINDOWS {
        return Err(format!("{} send_window: want at most {MAX_WINDOWS}", settings.send_window.len()));
    }
    let nice = settings.nice.unwrap_or(DEFAULT_NICE);
    if !NICE.contains(&nice) {
        return Err(format!("nice = {nice}: want from 0 to 19"));
    }
    let windows = settings.send_window.iter().map(window).collect::<Result<_, _>>()?;
    let priority = Priority { nice, io: settings.io.unwrap_or_default().class() };
    let send = Schedule { usual: rate("send_rate", settings.send_rate)?, windows };
    Ok(load::Limits { send, read: rate("read_rate", settings.read_rate)?, priority })
}

fn window(settings: &WindowSettings) -> Result<Window, String> {
    let time = |text: &str| {
        // As railways write the end of a day.
        let text = if text == "24:00" { "00:00" } else { text };
        jiff::civil::Time::strptime("%H:%M", text)
            .map_err(|_| format!("send_window: \"{text}\" is not a time as 18:30"))
    };
    let Rate(rate) = settings.rate;
    if rate != 0 && !RATE.contains(&rate) {
        return Err(format!("send_window: rate = {rate}: want 0 or at least 64kB a second"));
    }
    let days =
        settings.days.as_deref().map_or(Ok(Days::ALL), str::parse).map_err(|e: String| format!("send_window: {e}"))?;
    Ok(Window { from: time(&settings.from)?, to: time(&settings.to)?, days, rate })
}

fn limits(prefer: Prefer, settings: &Settings) -> Result<Limits, String> {
    let usual = Limits::default();
    let freeze = settings.freeze_limit.map_or(prefer.freeze_limit(), |s| s.0);
    if !FREEZE_LIMIT.contains(&freeze) {
        return Err(format!("freeze_limit = {freeze:?}: want from 50ms to 60s"));
    }
    let sync = settings.sync_limit.map_or(usual.sync, |s| s.0);
    if !SYNC_LIMIT.contains(&sync) {
        return Err(format!("sync_limit = {sync:?}: want from 100ms to 1h"));
    }
    let memory = settings.freeze_memory.map_or(usual.memory as u64, |b| b.0);
    if !FREEZE_MEMORY.contains(&memory) {
        return Err(format!("freeze_memory = {memory}: want from 4MiB to 1GiB"));
    }
    Ok(Limits { freeze, sync, memory: memory as usize })
}
