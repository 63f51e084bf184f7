//! What Prometheus is told of a running service. `docs/metrics.md` lists it all; a test compares.
//!
//! Read first: [`render`].

use std::net::SocketAddr;

use backhaul_cli::metrics::{Exposition, Kind, Metric, serve};
use tokio::net::TcpListener;

use crate::condition::{Report, RunState};
use crate::connection::unix_millis;
use crate::state::Joined;

const fn gauge(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, help }
}

const fn counter(name: &'static str, help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, help }
}

const INFO: Metric = gauge("backhaul_agent_info", "Always 1; version and group are in the labels.");
const STATE: Metric = gauge("backhaul_agent_state", "1 for the state that the service is in.");
const LAG: Metric = gauge("backhaul_agent_lag_seconds", "Age of what the newest point protects: the RPO.");
const CHECKED_LAG: Metric =
    gauge("backhaul_agent_data_checked_lag_seconds", "Time since all of every volume had last been read and compared.");
const BEHIND: Metric = gauge("backhaul_agent_behind_bytes", "Blocks that are to be looked at and are in no point yet.");
const CHANGES: Metric =
    gauge("backhaul_agent_change_bytes_per_second", "Blocks that are written to, smoothed over five minutes.");
const POINT: Metric = gauge("backhaul_agent_newest_point_number", "Number of the newest point.");
const CONSISTENCY: Metric = gauge("backhaul_agent_newest_point_consistency", "1 for what the newest point claims.");
const POINTS: Metric = counter("backhaul_agent_points_total", "Points that were made since the service began.");
const ROUNDS: Metric = counter("backhaul_agent_rounds_total", "Rounds by how they ended.");
const ROUND: Metric = gauge("backhaul_agent_last_round_seconds", "How long the last round took.");
const SENT: Metric = counter("backhaul_agent_sent_bytes_total", "Block records that were sent.");
const READ: Metric = counter("backhaul_agent_read_bytes_total", "Bytes of volumes that were read.");
const FROZEN: Metric =
    gauge("backhaul_agent_frozen_seconds", "How long file systems were frozen for the newest point.");
const FROZEN_MAX: Metric = gauge("backhaul_agent_frozen_hour_max_seconds", "The longest freeze of the last hour.");
const FROZEN_P99: Metric =
    gauge("backhaul_agent_frozen_hour_p99_seconds", "99 of 100 freezes of the last hour were no longer.");
const MISSED: Metric =
    counter("backhaul_agent_missed_blocks_total", "Blocks that had changed and were not marked by the kernel.");
const MARKED: Metric =
    gauge("backhaul_agent_hints_active", "1 where the kernel marks what is written to a volume, 0 where all is read.");
const BYTES: Metric = gauge("backhaul_agent_volume_bytes", "Length of a volume.");
const RESIDENT: Metric = gauge("backhaul_agent_resident_memory_bytes", "Memory that the process takes.");

const CONSISTENCIES: [&str; 3] = ["fuzzy", "crash", "application"];

/// Listens for as long as the process lives. That it can't is said, and no reason to protect nothing.
pub async fn start(at: SocketAddr, joined: &Joined, report: impl Fn() -> Report + Send + Sync + 'static) {
    let group = joined.group_name.to_string();
    match TcpListener::bind(at).await {
        Ok(listener) => {
            let local = listener.local_addr().map_or_else(|_| at.to_string(), |at| at.to_string());
            tracing::info!("metrics are at http://{local}/metrics");
            tokio::spawn(serve(listener, move || render(&report(), &group, unix_millis().0)));
        }
        Err(error) => tracing::error!(%error, "no metrics: can't listen on {at}"),
    }
}

/// All of them. `now` is in ms since 1970.
pub fn render(r: &Report, group: &str, now: i64) -> String {
    let since = |at: Option<i64>| at.map(|at| now.saturating_sub(at).max(0) as f64 / 1e3);
    let seconds = |ms: Option<f64>| ms.map(|ms| ms / 1e3);
    let mut out = Exposition::default();
    out.family(&INFO);
    out.sample(&INFO, "", &[("version", env!("CARGO_PKG_VERSION")), ("group", group)], 1.0);
    out.one_of(&STATE, "state", RunState::ALL.map(RunState::as_str), Some(r.state.as_str()));
    out.one(&LAG, since(r.protected_until));
    out.one(&CHECKED_LAG, since(r.full_scan_ms));
    out.one(&BEHIND, Some(r.behind_bytes as f64));
    out.one(&CHANGES, r.change_bytes_per_second);
    out.one(&POINT, r.point.map(|n| n as f64));
    out.one_of(&CONSISTENCY, "consistency", CONSISTENCIES, r.consistency.as_deref());
    out.one(&POINTS, Some(r.points as f64));
    out.family(&ROUNDS);
    for (result, n) in [("point", r.points), ("unchanged", r.unchanged_rounds), ("failed", r.failed_rounds)] {
        out.sample(&ROUNDS, "", &[("result", result)], n as f64);
    }
    out.one(&ROUND, Some(r.last_seconds));
    out.one(&SENT, Some(r.service_sent_bytes as f64));
    out.one(&READ, Some(r.service_read_bytes as f64));
    out.one(&FROZEN, seconds(r.frozen_ms));
    out.one(&FROZEN_MAX, seconds(r.frozen_max_ms));
    out.one(&FROZEN_P99, seconds(r.frozen_p99_ms));
    out.one(&MISSED, Some(r.missed_blocks as f64));
    out.family(&MARKED);
    for v in &r.volumes {
        out.sample(&MARKED, "", &[("volume", &v.name)], f64::from(u8::from(v.unmarked.is_none())));
    }
    out.family(&BYTES);
    r.volumes.iter().for_each(|v| out.sample(&BYTES, "", &[("volume", &v.name)], v.bytes as f64));
    out.one(&RESIDENT, backhaul_cli::metrics::resident_bytes().map(|n| n as f64));
    out.into_text()
}
