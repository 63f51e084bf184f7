//! `status`: how well this server is protected. Works beside `run`; `--check` is for monitoring.

use std::time::Duration;

use backhaul_cli::{Exit, Failure, Output, text};
use backhaul_protocol::store::log::UnixMillis;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::condition::Report;
use crate::connection::unix_millis;
use crate::state::LastPoint;
use crate::status::ask;

/// Options of `status`.
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// Exit 7 if the lag is over --max-lag, there is no point, or it is dated in the future
    #[arg(long)]
    pub check: bool,
    /// The longest lag that is right
    #[arg(long, default_value = "5m", value_parser = text::parse_duration, value_name = "TIME")]
    pub max_lag: Duration,
    /// Exit 7 also if all of every volume was not read and compared within this time
    #[arg(long, value_parser = text::parse_duration, value_name = "TIME")]
    pub max_full_scan_age: Option<Duration>,
}

#[derive(Serialize)]
struct Volume {
    name: String,
    path: String,
    bytes: u64,
    identity: String,
    /// `on` where the kernel marks what is written, or why it does not; `None` while nobody runs.
    hints: Option<String>,
}

#[derive(Serialize)]
struct Status {
    group: String,
    agent: String,
    receiver: String,
    running: bool,
    #[serde(flatten)]
    report: Option<Report>,
    /// RFC 3339: what is written before is in the newest point.
    protected_until: Option<String>,
    lag_seconds: Option<f64>,
    /// RFC 3339: all of every volume was read and compared by then.
    full_scan: Option<String>,
    data_checked_lag_seconds: Option<f64>,
    /// Until when, by whom and why no points are made.
    paused: Option<String>,
    highest_point_seen: u64,
    /// Bytes of block records of all points that this agent made.
    sent_bytes: u64,
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
    // Before its first round has ended, `run` knows no more than what was written down.
    let until = report.as_ref().and_then(|r| r.protected_until).or(writer.last.as_ref().map(|l| l.protected_until));
    let lag = until.and_then(|at| lag(at, unix_millis().0));
    let full_scan = report.as_ref().and_then(|r| r.full_scan_ms);
    let checked_lag = full_scan.and_then(|at| self::lag(at, unix_millis().0));
    let paused = state.paused(unix_millis())?.map(|p| p.to_string());
    let mut lines = vec![format!("group {}, agent {}, receiver {}", joined.group_name, joined.agent, joined.receiver)];
    lines.push(match &report {
        None => match &paused {
            None => "not running: points are made by `backhaul-agent sync` or `run`".into(),
            Some(paused) => format!("not running, and paused {paused}"),
        },
        Some(r) => describe(r),
    });
    lines.push(newest(report.as_ref(), writer.last.as_ref(), until, lag));
    lines.extend(report.as_ref().map(|r| figures(r, checked_lag)));
    let sent = text::bytes(writer.sent);
    lines.push(format!("highest point seen {}; {sent} sent for points so far; nothing is pruned", writer.high_water));
    lines.extend(volumes.iter().map(|v| {
        let hints = hints(report.as_ref(), v.name.as_str()).map_or(String::new(), |h| format!("  changes marked: {h}"));
        format!("  {}  {}  {}{hints}", v.name, v.path.display(), text::bytes(v.geometry.length()))
    }));
    let status = Status {
        group: joined.group_name.to_string(),
        agent: joined.agent.to_string(),
        receiver: joined.receiver.clone(),
        running: report.is_some(),
        protected_until: until.map(|at| text::time(UnixMillis(at))),
        lag_seconds: lag.map(|l| l.as_secs_f64()),
        full_scan: full_scan.map(|at| text::time(UnixMillis(at))),
        data_checked_lag_seconds: checked_lag.map(|l| l.as_secs_f64()),
        paused,
        highest_point_seen: writer.high_water.0,
        sent_bytes: writer.sent,
        pruned: false,
        volumes: volumes
            .iter()
            .map(|v| Volume {
                name: v.name.to_string(),
                path: v.path.display().to_string(),
                bytes: v.geometry.length(),
                identity: v.identity.describe(),
                hints: hints(report.as_ref(), v.name.as_str()),
            })
            .collect(),
        // What is told of volumes is told with them.
        report: report.map(|r| Report { volumes: Vec::new(), ..r }),
    };
    if args.check && lag.is_none_or(|l| l > args.max_lag) {
        let why = match lag {
            None => until.map_or_else(|| "there is no point yet".to_owned(), still_to_come),
            Some(l) => format!("the lag is {}, allowed are {}", text::duration(l), text::duration(args.max_lag)),
        };
        let cause = match (&status.report, &status.paused) {
            (None, None) => ": `backhaul-agent run` is not running".to_owned(),
            (None, Some(paused)) => format!(": `backhaul-agent run` is not running, and paused {paused}"),
            (Some(r), _) => r.cause.as_ref().map_or(String::new(), |_| format!(": {}", describe(r))),
        };
        return Err(Failure::new(Exit::Lag, "E_LAG", format!("{why}{cause}")).into());
    }
    if let Some(most) = args.max_full_scan_age.filter(|_| args.check)
        && checked_lag.is_none_or(|l| l > most)
    {
        let why = match checked_lag {
            None => "it is not known that all of every volume was ever read".to_owned(),
            Some(l) => format!(
                "all of every volume was last read {} ago, allowed are {}",
                text::duration(l),
                text::duration(most)
            ),
        };
        return Err(Failure::new(Exit::Lag, "E_LAG", why).into());
    }
    out.result("backhaul.status/1", &status, &lines.join("\n"));
    Ok(Exit::Done)
}

/// Small steps back of a clock that is being set right are none.
const STEP: i64 = 60_000;

/// How long ago `until` was, ms since 1970 both; `None` if it is still to come: then nobody knows.
fn lag(until: i64, now: i64) -> Option<Duration> {
    let lag = now.saturating_sub(until);
    (lag >= -STEP).then(|| Duration::from_millis(u64::try_from(lag).unwrap_or(0)))
}

fn still_to_come(until: i64) -> String {
    format!("it is dated {}, which is still to come: the clock was wrong then or is now", text::time(UnixMillis(until)))
}

fn describe(r: &Report) -> String {
    let state = r.state.as_str();
    match &r.cause {
        None => state.to_owned(),
        Some(cause) => format!("{state}: {cause}"),
    }
}

/// Whether the kernel marks what is written to a volume: `on`, or why not. `None` where nobody knows.
fn hints(report: Option<&Report>, volume: &str) -> Option<String> {
    let volume = report?.volumes.iter().find(|v| v.name == volume)?;
    Some(volume.unmarked.clone().unwrap_or_else(|| "on".to_owned()))
}

/// What else there is to know, in one line.
fn figures(r: &Report, checked_lag: Option<Duration>) -> String {
    let mut parts = vec![format!("{} behind", text::bytes(r.behind_bytes))];
    parts.extend(r.change_bytes_per_second.map(|n| format!("{} written a second", text::bytes(n as u64))));
    parts.push(checked_lag.map_or("never all read".into(), |l| format!("all read {} ago", text::duration(l))));
    if let (Some(last), Some(max), Some(p99)) = (r.frozen_ms, r.frozen_max_ms, r.frozen_p99_ms) {
        parts.push(format!("frozen for {last:.0} ms, within the hour {max:.0} at most, {p99:.0} of 99 in 100"));
    }
    if r.missed_blocks > 0 {
        parts.push(format!("{} changed blocks were not marked", r.missed_blocks));
    }
    parts.join("; ")
}

/// The newest point and what it is worth now. `run` has seen it or one of this agent's own; another agent's is neither.
fn newest(report: Option<&Report>, own: Option<&LastPoint>, until: Option<i64>, lag: Option<Duration>) -> String {
    let point = report.and_then(|r| r.point).or(own.map(|l| l.point));
    let (Some(point), Some(until)) = (point, until) else {
        return "no point yet".into();
    };
    let consistency = own.filter(|l| l.point == point).map_or(String::new(), |l| format!(" ({})", l.consistency));
    let Some(lag) = lag else {
        return format!("newest point {point}{consistency}: {}", still_to_come(until));
    };
    format!(
        "newest point {point}{consistency}, protected until {} (lag {})",
        text::time(UnixMillis(until)),
        text::duration(lag)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_of_the_future_is_no_protection() {
        assert_eq!(lag(1000, 3500), Some(Duration::from_millis(2500)));
        assert_eq!(lag(1000 + STEP, 1000), Some(Duration::ZERO));
        assert_eq!(lag(1001 + STEP, 1000), None);
    }
}
