//! `status`: how well this server is protected. Works beside `run`; `--check` is for monitoring.

use std::time::Duration;

use backhaul_cli::{Exit, Failure, Output, text};
use backhaul_protocol::store::log::UnixMillis;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::connection::unix_millis;
use crate::status::{Report, ask};

/// Options of `status`.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// Exit 7 unless `run` is at work and the lag is within --max-lag
    #[arg(long)]
    pub check: bool,
    /// The longest lag that is right
    #[arg(long, default_value = "5m", value_parser = text::parse_duration, value_name = "TIME")]
    pub max_lag: Duration,
}

#[derive(Serialize)]
struct Volume {
    name: String,
    path: String,
    bytes: u64,
    identity: String,
}

#[derive(Serialize)]
struct Status {
    group: String,
    agent: String,
    receiver: String,
    running: bool,
    #[serde(flatten)]
    report: Option<Report>,
    lag_seconds: Option<f64>,
    highest_point_seen: u64,
    pruned: bool,
    volumes: Vec<Volume>,
}

/// Runs the command.
pub async fn run(args: StatusArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    let joined = state.expect_joined()?;
    let volumes = state.volumes()?;
    let writer = state.writer()?;
    let report = ask(&state).await;
    let lag = report.as_ref().and_then(|r| r.protected_until).map(|at| {
        // A clock that went backwards is no protection: the lag is never less than nothing.
        Duration::from_millis(u64::try_from(unix_millis().0 - at).unwrap_or(0))
    });
    let mut lines = vec![format!("group {}, agent {}, receiver {}", joined.group_name, joined.agent, joined.receiver)];
    match &report {
        None => lines.push("not running: points are made by `backhaul-agent sync` or `run`".into()),
        Some(r) => lines.push(describe(r, lag)),
    }
    lines.push(format!("highest point seen {}; nothing is pruned", writer.high_water));
    lines.extend(
        volumes.iter().map(|v| format!("  {}  {}  {}", v.name, v.path.display(), text::bytes(v.geometry.length()))),
    );
    let status = Status {
        group: joined.group_name.to_string(),
        agent: joined.agent.to_string(),
        receiver: joined.receiver.clone(),
        running: report.is_some(),
        lag_seconds: lag.map(|l| l.as_secs_f64()),
        report,
        highest_point_seen: writer.high_water.0,
        pruned: false,
        volumes: volumes
            .iter()
            .map(|v| Volume {
                name: v.name.to_string(),
                path: v.path.display().to_string(),
                bytes: v.geometry.length(),
                identity: v.identity.describe(),
            })
            .collect(),
    };
    if args.check && lag.is_none_or(|l| l > args.max_lag) {
        let why = match (&status.report, lag) {
            (None, _) => "`backhaul-agent run` is not running".to_owned(),
            (Some(_), None) => "no round has ended yet".to_owned(),
            (Some(_), Some(l)) => {
                format!("the lag is {}, allowed are {}", text::duration(l), text::duration(args.max_lag))
            }
        };
        let cause = status.report.as_ref().and_then(|r| r.cause.clone()).map_or(String::new(), |c| format!(": {c}"));
        return Err(Failure::new(Exit::Lag, "E_LAG", format!("{why}{cause}")).into());
    }
    out.result("backhaul.status/1", &status, &lines.join("\n"));
    Ok(Exit::Done)
}

fn describe(r: &Report, lag: Option<Duration>) -> String {
    let state = serde_json::to_value(r.state).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    let point = r.point.map_or("no point yet".into(), |p| format!("newest point {p}"));
    let lag = match (r.protected_until, lag) {
        (Some(at), Some(lag)) => {
            format!(", protected until {} (lag {})", text::time(UnixMillis(at)), text::duration(lag))
        }
        _ => String::new(),
    };
    let consistency = r.consistency.as_ref().map_or(String::new(), |c| format!(", {c}"));
    let cause = r.cause.as_ref().map_or(String::new(), |c| format!("\n{c}"));
    format!("{state}: {point}{consistency}{lag}{cause}")
}
