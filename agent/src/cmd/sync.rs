//! `sync`: one recovery point now, then exit.

use std::time::{Duration, Instant};

use backhaul_cli::{Exit, Output, text};
use serde::Serialize;

use super::Context;
use crate::capture;
use crate::connection::{Session, SessionError, connect};
use crate::machine::machine_id;
use crate::pipeline::load::Load;
use crate::protect;
use crate::replicate::{CommitWhen, Round, RoundError, RoundReport};
use crate::state::{Joined, StateDir};
use crate::tracker::Tracking;

/// How long a receiver is waited for.
const WAIT_FOR_RECEIVER: Duration = Duration::from_secs(30);
/// Rounds that are tried when another writer, or a digest that differs, made the first one void.
const TRIES: usize = 4;

#[derive(Serialize)]
struct Volume {
    name: String,
    digest: String,
}

#[derive(Serialize)]
struct Synced {
    point: u64,
    consistency: String,
    bytes_scanned: u64,
    bytes_sent: u64,
    metadata_bytes: u64,
    seconds: f64,
    volumes: Vec<Volume>,
    caveats: Vec<String>,
}

/// Runs the command.
pub async fn run(ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    let joined = ctx.joined_writer()?;
    let _lock = state.lock()?;
    ctx.pay_hooks().await?;
    let begun = Instant::now();
    let load = Load::new(ctx.config.load.clone());
    let mut tried = 0;
    let report = loop {
        let (volumes, said) = protect::refresh(&state)?;
        if tried == 0 {
            said.iter().for_each(|s| out.warn(s));
        }
        if volumes.is_empty() {
            return Err(protect::nothing().into());
        }
        let mut session = wait_for_receiver(ctx, &state, &joined, begun).await?;
        let total = volumes.iter().map(|v| v.geometry.length()).sum();
        let provider = capture::provider(&ctx.config.snapshot, &state, &joined, &volumes);
        let round = Round {
            state: &state,
            joined: &joined,
            machine: machine_id(&ctx.config.machine_id_file)?,
            volumes: &volumes,
            provider: &*provider,
            threads: ctx.config.threads,
            load: load.clone(),
            compression: ctx.config.compression,
            when: CommitWhen::Always,
            progress: out.progress(1).phase("scan and send", total),
            observe: &|_| {},
        };
        tried += 1;
        match round.run(&mut session, &mut Tracking::default()).await {
            Ok(report) => {
                session.close().await;
                break report;
            }
            Err(error) if error.is_busy() && begun.elapsed() < WAIT_FOR_RECEIVER => {
                if tried == 1 {
                    out.warn(&format!("{error}; trying again for {} s", WAIT_FOR_RECEIVER.as_secs()));
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) if error.is_retryable() && !error.is_unavailable() && !error.is_hook() && tried < TRIES => {
                out.warn(&format!("{error}; trying again"));
                tokio::time::sleep(Duration::from_millis(300 * tried as u64)).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    print(&report, begun.elapsed(), &out);
    Ok(Exit::Done)
}

fn print(report: &RoundReport, took: Duration, out: &Output) {
    for caveat in &report.caveats {
        out.warn(caveat);
    }
    let synced = Synced {
        point: report.head.0,
        consistency: report.consistency.to_string(),
        bytes_scanned: report.bytes_scanned,
        bytes_sent: report.bytes_sent,
        metadata_bytes: report.metadata_bytes,
        seconds: took.as_secs_f64(),
        volumes: report
            .volumes
            .iter()
            .map(|v| Volume { name: v.name.to_string(), digest: v.digest.to_string() })
            .collect(),
        caveats: report.caveats.clone(),
    };
    let mut lines = vec![format!(
        "point {} ({}): {} read, {} sent in {}",
        synced.point,
        synced.consistency,
        text::bytes(synced.bytes_scanned),
        text::bytes(synced.bytes_sent),
        text::duration(took)
    )];
    lines.extend(synced.volumes.iter().map(|v| format!("  {}  {}", v.name, v.digest)));
    out.result("backhaul.sync/1", &synced, &lines.join("\n"));
}

async fn wait_for_receiver(
    ctx: &Context,
    state: &StateDir,
    joined: &Joined,
    since: Instant,
) -> Result<Session, RoundError> {
    loop {
        // An attempt that nobody answers ends by itself after a while; the last one must not outlive the wait by much.
        let left = WAIT_FOR_RECEIVER.saturating_sub(since.elapsed()).max(Duration::from_secs(1));
        let attempt =
            tokio::time::timeout(left, connect(state, joined, ctx.config.receiver.as_deref(), ctx.config.tuning)).await;
        let error = match attempt {
            Ok(Ok(connected)) => return Ok(Session::new(connected)),
            Ok(Err(error)) => error,
            Err(_) => SessionError::from(backhaul_transport::error::TransportError::Timeout(WAIT_FOR_RECEIVER)),
        };
        if !error.is_retryable() || since.elapsed() >= WAIT_FOR_RECEIVER {
            return Err(error.into());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
