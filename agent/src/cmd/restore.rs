//! `restore`: volumes of a point onto this server's files and devices, over the network.

use backhaul_cli::{Exit, Failure, Output, confirm, text};
use backhaul_protocol::ids::Name;
use backhaul_protocol::wire::message::{PointSpec, Reason};
use backhaul_volume::target::Durability;
use clap::{Args, ValueEnum};

use super::Context;
use crate::connection::{Connected, connect};
use crate::network_restore::{RestoreError, RestoreReport, RestoreRequest, plan, restore};
use crate::state::{Joined, StateDir};

/// How the target is read back at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Verify {
    /// Flushed, and read back from the device, past the cache
    Device,
    /// Read back through the cache: faster, and a power cut may still lose it
    Cached,
}

/// Options of `restore`.
#[derive(Args, Clone, Debug)]
pub struct RestoreArgs {
    /// VOLUME, @POINT or VOLUME@POINT: `latest` (default), a number, or a time; without a volume all of them
    #[arg(value_name = "[VOLUME][@POINT]", value_parser = parse_what)]
    pub what: Option<What>,
    /// Device or file to restore to; of several volumes NAME=TARGET for each
    #[arg(long = "to", value_name = "TARGET", required = true, num_args = 1..)]
    pub to: Vec<String>,
    /// How to read back what was written
    #[arg(long, value_enum, default_value = "device")]
    pub verify: Verify,
    /// Serial or name of a device that has content and may be overwritten
    #[arg(long = "confirm-target", value_name = "NAME_OR_SERIAL")]
    pub confirm_target: Vec<String>,
    /// Say what would be done and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `[VOLUME][@POINT]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct What {
    /// Which volume; `None` means all.
    pub volume: Option<Name>,
    /// Which point.
    pub point: PointSpec,
}

fn parse_what(typed: &str) -> Result<What, String> {
    let (volume, point) = text::split_point(typed)?;
    let volume = if volume.is_empty() { None } else { Some(volume.parse::<Name>().map_err(|e| e.to_string())?) };
    Ok(What { volume, point })
}

/// Runs the command.
pub async fn run(args: RestoreArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    let joined = state.expect_joined()?;
    let what = args.what.unwrap_or(What { volume: None, point: PointSpec::Latest });
    let mut request = RestoreRequest {
        volume: what.volume,
        point: what.point,
        targets: args.to,
        confirm: args.confirm_target,
        // Whatever this server replicates is never a target, mounted or not.
        refuse: state.volumes()?.into_iter().map(|v| v.path).collect(),
        durability: match args.verify {
            Verify::Device => Durability::Device,
            Verify::Cached => Durability::Cached,
        },
    };
    loop {
        match attempt(&request, args.dry_run, &state, &joined, ctx, &out).await {
            Ok(()) => return Ok(Exit::Done),
            Err(Attempt::Failed(e)) => return Err(e),
            Err(Attempt::Restore(RestoreError::Target(refused))) => match confirm(&out, &refused).await {
                Some(typed) => request.confirm.push(typed),
                None => return Err(refused.into()),
            },
            Err(Attempt::Restore(e)) => return Err(failure(e)),
        }
    }
}

/// How an attempt fails: before or after there was a connection.
enum Attempt {
    Failed(anyhow::Error),
    Restore(RestoreError),
}

async fn attempt(
    request: &RestoreRequest,
    dry_run: bool,
    state: &StateDir,
    joined: &Joined,
    ctx: &Context,
    out: &Output,
) -> Result<(), Attempt> {
    let connected = connect(state, joined, ctx.config.receiver.as_deref(), ctx.config.tuning).await;
    let Connected { link, sender, receiver } = connected.map_err(|e| Attempt::Failed(e.into()))?;
    let (control, warn) = ((sender, receiver), |text: &str| out.warn(text));
    if dry_run {
        let planned = plan(control, request, &mut out.progress(2), warn).await;
        link.goodbye().await;
        let planned = planned.map_err(Attempt::Restore)?;
        out.result("backhaul.restore-plan/1", &planned, &planned.to_string());
        return Ok(());
    }
    let report = restore(&*link, control, request, &mut out.progress(4), warn).await;
    link.goodbye().await;
    let report = report.map_err(Attempt::Restore)?;
    if request.durability == Durability::Device && report.verified != "device" {
        out.warn("the target's file system has no device beneath it: what was read back came from memory");
    }
    out.result("backhaul.restore/1", &report, &describe(&report));
    Ok(())
}

const ON_THE_RECEIVER: &str =
    "on the receiver: backhaul-receiver verify tells what is damaged, restore --salvage saves the rest";

/// The error with the exit code that is true of it.
fn failure(error: RestoreError) -> anyhow::Error {
    let text = error.to_string();
    match error {
        // Unwrapped, so that what they mean is found by their type.
        RestoreError::Transport(e) => e.into(),
        RestoreError::Refused(e) if e.reason == Reason::Damaged => {
            Failure::new(Exit::Differ, "E_DAMAGED", text).next(ON_THE_RECEIVER).into()
        }
        RestoreError::Refused(e) => e.into(),
        RestoreError::Target(e) => e.into(),
        RestoreError::Protocol(_) | RestoreError::Stream(_) => Failure::new(Exit::Failure, "E_PROTO", text).into(),
        RestoreError::Silent(_) => Failure::new(Exit::Network, "E_NETWORK", text).into(),
        RestoreError::Request(_) => Failure::new(Exit::Usage, "E_USAGE", text).into(),
        RestoreError::NotFound(_) => Failure::new(Exit::NotFound, "E_NOTFOUND", text).into(),
        RestoreError::Setup(_) => Failure::new(Exit::Failure, "E_FAILURE", text).into(),
        RestoreError::Record { .. } | RestoreError::Index { .. } => {
            Failure::new(Exit::Differ, "E_DAMAGED", text).next(ON_THE_RECEIVER).into()
        }
        RestoreError::Differs { .. } => Failure::new(Exit::Differ, "E_DIFFER", text)
            .next("run the restore again; if it differs again, do not trust the target's disk")
            .into(),
    }
}

fn describe(r: &RestoreReport) -> String {
    let b = text::bytes;
    let mut lines = vec![format!("restored point {} ({}, {})", r.point, r.time, r.consistency)];
    for v in &r.volumes {
        lines.push(format!("  {} to {}: digest {}", v.name, v.target, v.digest));
        lines.extend(text::beyond(v.beyond));
    }
    lines.push(format!(
        "  {} read to compare, {} fetched, {} written, {} read back and equal (verified: {}), in {}",
        b(r.bytes_read),
        b(r.bytes_fetched),
        b(r.bytes_written),
        b(r.bytes_verified),
        r.verified,
        text::duration(std::time::Duration::from_secs_f64(r.seconds))
    ));
    lines.join("\n")
}
