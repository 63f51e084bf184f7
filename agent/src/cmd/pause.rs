//! `pause` and `resume`: `run` makes no points for a while, and says so. Works beside `run`, and while it does not run.

use std::time::{Duration, Instant};

use backhaul_cli::{Exit, Output, text};
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::condition::RunState;
use crate::connection::unix_millis;
use crate::state::{Paused, StateDir};
use crate::status::ask;

/// Options of `pause`.
#[derive(Args, Clone, Debug)]
pub struct PauseArgs {
    /// How long; default: until `resume`
    #[arg(long = "for", value_parser = text::parse_duration, value_name = "TIME")]
    pub length: Option<Duration>,
    /// Why, for whoever looks at the status
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// The service looks twice a second.
const HEARD: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Said {
    paused: bool,
    /// RFC 3339.
    until: Option<String>,
    by: Option<String>,
    reason: Option<String>,
    /// Whether a service is running that has heard of it.
    heard: bool,
}

/// Runs `pause`.
pub async fn pause(args: PauseArgs, ctx: &Context, out: &Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    state.expect_joined()?;
    let now = unix_millis().0;
    let length = |d: Duration| now.saturating_add(i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
    let one_line = |reason: String| reason.split_whitespace().collect::<Vec<_>>().join(" ");
    let paused = Paused {
        since_ms: now,
        until_ms: args.length.map(length),
        by: who(),
        reason: args.reason.map(one_line).filter(|r| !r.is_empty()),
    };
    state.pause(&paused)?;
    let heard = heard(&state, |s| s == RunState::Paused).await;
    let text = format!("paused {paused}{}", if heard { "" } else { "; `run` is not running" });
    let until = paused.until_ms.map(|ms| text::time(backhaul_protocol::store::log::UnixMillis(ms)));
    let said = Said { paused: true, until, by: Some(paused.by), reason: paused.reason, heard };
    out.result("backhaul.pause/1", &said, &text);
    Ok(Exit::Done)
}

/// Runs `resume`.
pub async fn resume(ctx: &Context, out: &Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    state.expect_joined()?;
    let was = state.paused(unix_millis())?;
    state.resume()?;
    let heard = heard(&state, |s| s != RunState::Paused).await;
    let text = match (&was, heard) {
        (None, _) => "it was not paused",
        (Some(_), true) => "points are made again",
        (Some(_), false) => "not paused any more; `run` is not running, or sends nothing at this hour",
    };
    out.result("backhaul.pause/1", &Said { paused: false, until: None, by: None, reason: None, heard }, text);
    Ok(Exit::Done)
}

/// Waits until the service has heard of it. Whether there is one.
async fn heard(state: &StateDir, is_so: impl Fn(RunState) -> bool) -> bool {
    let begun = Instant::now();
    loop {
        match ask(state).await {
            None => return false,
            Some(report) if is_so(report.state) => return true,
            Some(_) if begun.elapsed() > HEARD => return false,
            Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Whoever typed it, as far as the environment tells.
fn who() -> String {
    let name = |variable: &str| std::env::var(variable).ok().filter(|name| !name.is_empty());
    let uid = rustix::process::getuid().as_raw();
    name("SUDO_USER").or_else(|| name("USER")).unwrap_or_else(|| format!("user {uid}"))
}
