//! `plan`: what protecting volumes would take, before anything is protected or after. Writes to no volume and no state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_cli::{Exit, Failure, Output, Progress, text};
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::Name;
use backhaul_protocol::limits::MAX_VOLUMES;
use backhaul_protocol::record::Effort;
use backhaul_transport::error::TransportError;
use backhaul_volume::{Source, Volume};
use clap::Args;

use super::Context;
use crate::config::EVERY;
use crate::connection::connect;
use crate::pipeline::pace::Compression;
use crate::plan::network::{self, Network, NetworkError};
use crate::plan::report::{Looked, NoPath, Path as LinkPath, Report, Wanted};
use crate::plan::sample::{self, SampleError, Tally};
use crate::plan::watch::Watcher;
use crate::plan::{Subject, told};
use crate::protect::ProtectError;
use crate::state::Joined;

/// Watched for so long where nothing else is said, or for two intervals.
const USUAL: Duration = Duration::from_secs(60);
/// A connection that takes longer is not one to measure.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two tries while another agent measures.
const AGAIN: Duration = Duration::from_secs(1);
/// The changed blocks of a volume are looked into for so long.
const CHANGED_TIME: Duration = Duration::from_secs(5);

/// Options of `plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// Devices or images: root=/dev/sda, or just /dev/sda; without any those that are protected
    #[arg(value_name = "NAME=PATH")]
    pub volumes: Vec<String>,
    /// For how long to watch what changes; default: 60s, or two intervals
    #[arg(long = "for", value_parser = text::parse_duration, value_name = "TIME")]
    pub time: Option<Duration>,
    /// How often points would be made; default: as set
    #[arg(long, value_parser = text::parse_duration, value_name = "TIME")]
    pub every: Option<Duration>,
    /// For how long points would be kept
    #[arg(long, default_value = "30d", value_parser = text::parse_duration, value_name = "TIME")]
    pub keep: Duration,
    /// Leave the path to the receiver out
    #[arg(long)]
    pub no_network: bool,
    /// Take this for what the link carries in a second, instead of measuring it: 12MiB
    #[arg(long, value_parser = text::parse_bytes, value_name = "SIZE")]
    pub link: Option<u64>,
    /// What a thousand PUT requests cost
    #[arg(long, value_parser = price, value_name = "PRICE")]
    pub put_price: Option<f64>,
    /// What a GB (10^9 bytes) costs a month
    #[arg(long, value_parser = price, value_name = "PRICE")]
    pub gb_month_price: Option<f64>,
}

fn price(typed: &str) -> Result<f64, String> {
    let price = typed.parse().ok().filter(|p: &f64| p.is_finite() && *p >= 0.0);
    price.ok_or_else(|| format!("\"{typed}\" is not a price: want a number like 0.005"))
}

/// Runs the command.
pub async fn run(args: PlanArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let wanted = wanted(&args, ctx)?;
    let subjects = subjects(&args.volumes, ctx)?;
    let mut progress = out.progress(if args.no_network || args.link.is_some() { 2 } else { 3 });
    let effort = effort(ctx.config.compression);
    let mut contents = Vec::new();
    let phase = progress.phase("look into the volumes", subjects.iter().map(|s| s.geometry.length()).sum());
    for subject in &subjects {
        let (own, length) = (subject.clone(), subject.geometry.length());
        contents.push(blocking(subject, move || sample::look(&own, effort)).await?);
        phase.add(length);
    }
    phase.finish();
    let path = path(&args, ctx, &mut progress).await?;
    if let Err(NoPath::Failed(why)) = &path {
        out.warn(&format!("the path to the receiver is left out: {why}"));
    }
    let phase = progress.timed_phase("watch what changes", wanted.time);
    let watcher = Watcher::start(subjects.clone(), wanted.every).await?;
    let watched = watcher.run(wanted.time, |passed| phase.add(passed.as_millis() as u64)).await?;
    phase.finish();
    let mut looked = Vec::new();
    for ((subject, contents), watched) in subjects.into_iter().zip(contents).zip(watched) {
        let (own, named) = (subject.clone(), watched.named.clone());
        let changed: Tally = blocking(&subject, move || sample::tally(&own, effort, named, CHANGED_TIME)).await?;
        looked.push(Looked { subject, contents, watched, changed });
    }
    let report = Report::new(&looked, path, &wanted);
    report.caveats.iter().for_each(|c| out.warn(c));
    out.result("backhaul.plan/1", &report, &told::text(&report));
    Ok(Exit::Done)
}

fn wanted(args: &PlanArgs, ctx: &Context) -> Result<Wanted, Failure> {
    let every = args.every.unwrap_or(ctx.config.every);
    let time = args.time.unwrap_or(USUAL.max(every * 2));
    let wrong = |text: &str| Failure::new(Exit::Usage, "E_USAGE", text);
    if !EVERY.contains(&every) {
        return Err(wrong("--every wants from 1s to 7d"));
    }
    if time < every {
        return Err(wrong("--for must be at least as long as --every: what changes in an interval is watched"));
    }
    if args.keep.is_zero() {
        return Err(wrong("--keep wants more than nothing"));
    }
    if args.link == Some(0) {
        return Err(wrong("--link wants more than nothing"));
    }
    Ok(Wanted {
        every,
        time,
        keep: args.keep,
        threads: ctx.config.threads,
        put_price: args.put_price,
        month_price: args.gb_month_price,
    })
}

/// As hard as the agent compresses when the link is no reason for more.
fn effort(compression: Compression) -> Effort {
    match compression {
        Compression::Auto | Compression::Fast => Effort::Level(1),
        Compression::Fixed(effort) => effort,
    }
}

fn subjects(typed: &[String], ctx: &Context) -> anyhow::Result<Vec<Subject>> {
    let named: Vec<(Name, PathBuf, u32)> = if typed.is_empty() {
        let volumes = ctx.state().volumes()?;
        volumes.into_iter().map(|v| (v.name, v.path, v.geometry.block_size())).collect()
    } else {
        let block_size = ctx.config.block_size;
        typed
            .iter()
            .enumerate()
            .map(|(i, one)| named(one, i).map(|(n, p)| (n, p, block_size)))
            .collect::<Result<_, _>>()?
    };
    if named.is_empty() {
        let next = "name what would be: backhaul-agent plan NAME=PATH";
        return Err(Failure::new(Exit::Usage, "E_NOTHING", "nothing is protected yet").next(next).into());
    }
    if named.len() > MAX_VOLUMES {
        return Err(ProtectError::Refused(format!("a group has at most {MAX_VOLUMES} volumes")).into());
    }
    let mut subjects: Vec<Subject> = Vec::new();
    for (name, path, block_size) in named {
        let source = Source::open(&path).map_err(|source| ProtectError::Volume { name: name.clone(), source })?;
        if let Some(other) = subjects.iter().find(|s| s.name == name.as_str() || s.source.path() == source.path()) {
            let text = format!("{} is named twice, as {} and {name}", source.path().display(), other.name);
            return Err(ProtectError::Refused(text).into());
        }
        let geometry = Geometry::new(block_size, source.length())
            .map_err(|source| ProtectError::Geometry { name: name.clone(), source })?;
        subjects.push(Subject { name: name.to_string(), source: Arc::new(source), geometry });
    }
    Ok(subjects)
}

/// NAME=PATH, or a path whose last part makes the name.
fn named(typed: &str, place: usize) -> Result<(Name, PathBuf), Failure> {
    let wrong = |text: String| Failure::new(Exit::Usage, "E_USAGE", text);
    if let Some((name, path)) = typed.split_once('=')
        && !name.contains('/')
    {
        let name = name.parse::<Name>().map_err(|e| wrong(format!("{typed}: {e}")))?;
        return if path.is_empty() {
            Err(wrong(format!("\"{typed}\" names no path")))
        } else {
            Ok((name, path.into()))
        };
    }
    let last = Path::new(typed).file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let legal: String = last.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    let name = legal.trim_matches('-').parse::<Name>();
    let name = name.or_else(|_| format!("volume-{place}").parse()).map_err(|e| wrong(format!("{typed}: {e}")))?;
    Ok((name, typed.into()))
}

async fn blocking<T: Send + 'static>(
    subject: &Subject,
    work: impl FnOnce() -> Result<T, SampleError> + Send + 'static,
) -> anyhow::Result<T> {
    let done = tokio::task::spawn_blocking(work).await.expect("looking does not panic");
    done.map_err(|error| match error {
        SampleError::Volume(source) => {
            let name = subject.name.parse().expect("it was a name");
            anyhow::Error::from(ProtectError::Volume { name, source })
        }
        other => other.into(),
    })
}

/// What the link carries: as typed, as measured, or why that is not known.
async fn path(args: &PlanArgs, ctx: &Context, progress: &mut Progress) -> anyhow::Result<Result<LinkPath, NoPath>> {
    if let Some(rate) = args.link {
        return Ok(Ok(LinkPath::Given(rate)));
    }
    if args.no_network {
        return Ok(Err(NoPath::NotWanted));
    }
    let Some(joined) = ctx.state().joined()? else { return Ok(Err(NoPath::NotJoined)) };
    let phase = progress.timed_phase("measure the path", network::TIME);
    let begun = Instant::now();
    let measured = loop {
        match measure(ctx, &joined).await {
            // Another agent measures: it is done in some seconds.
            Err(error) if error.is_busy() && begun.elapsed() < PATIENCE => tokio::time::sleep(AGAIN).await,
            measured => break measured,
        }
    };
    phase.finish();
    Ok(measured.map(LinkPath::Measured).map_err(|error| NoPath::Failed(error.to_string())))
}

async fn measure(ctx: &Context, joined: &Joined) -> Result<Network, NetworkError> {
    let state = ctx.state();
    let connecting = connect(&state, joined, ctx.config.receiver.as_deref(), ctx.config.tuning);
    let connected = tokio::time::timeout(PATIENCE, connecting).await;
    let late = |_| NetworkError::from(TransportError::Timeout(PATIENCE));
    let connected = connected.map_err(late)??;
    tokio::time::timeout(network::TIME + PATIENCE, network::measure(connected)).await.map_err(late)?
}
