//! `config check`: whether the settings are right, and what they mean.

use backhaul_cli::{Exit, Output, text};
use clap::Subcommand;
use serde::Serialize;

use super::Context;

/// What to do with settings.
#[derive(Subcommand, Clone, Debug)]
pub enum ConfigCommand {
    /// Check the settings and print what they mean
    Check,
}

#[derive(Serialize)]
struct Meant {
    store: Option<String>,
    state: String,
    listen: String,
    advertise: Option<String>,
    memory: u64,
    segment_size: u64,
    max_sessions: usize,
    metrics: Option<String>,
    congestion: &'static str,
    segmentation_offload: bool,
}

/// Runs the command: the settings were read already.
pub fn run(ctx: &Context, out: &Output) -> Exit {
    let c = &ctx.config;
    let meant = Meant {
        store: c.store.as_ref().map(ToString::to_string),
        state: c.state.display().to_string(),
        listen: c.server.listen.to_string(),
        advertise: c.advertise.clone(),
        memory: c.server.memory as u64,
        segment_size: c.server.segment_size as u64,
        max_sessions: c.server.max_sessions,
        metrics: c.server.metrics.map(|at| at.to_string()),
        congestion: c.server.tuning.congestion.as_str(),
        segmentation_offload: c.server.tuning.segmentation.is_offload(),
    };
    let text = format!(
        "settings are right\nstore {}\nstate {}\nlisten {}\nadvertise {}\nmemory {}\nsegment_size {}\nmax_sessions {}\nmetrics {}\ncongestion {}\nsegmentation_offload {}",
        meant.store.as_deref().unwrap_or("(none)"),
        meant.state,
        meant.listen,
        meant.advertise.as_deref().unwrap_or("(none)"),
        text::bytes(meant.memory),
        text::bytes(meant.segment_size),
        meant.max_sessions,
        meant.metrics.as_deref().unwrap_or("(off)"),
        meant.congestion,
        meant.segmentation_offload
    );
    out.result("backhaul.config/1", &meant, &text);
    Exit::Done
}
