//! `config check`: whether the settings are right, and what they mean.

use backhaul_cli::{Exit, Output, text};
use clap::Subcommand;
use serde::Serialize;

use super::Context;
use crate::config::snapshot::{Hooks, Snapshot};

/// What to do with settings.
#[derive(Subcommand, Clone, Debug)]
pub enum ConfigCommand {
    /// Check the settings and print what they mean
    Check,
}

#[derive(Serialize)]
struct Meant {
    state: String,
    receiver: Option<String>,
    every_seconds: f64,
    prefer: &'static str,
    freeze_limit_seconds: f64,
    sync_limit_seconds: f64,
    freeze_memory: usize,
    full_scan_every_seconds: f64,
    threads: usize,
    send_rate: Option<u64>,
    send_windows: Vec<String>,
    read_rate: Option<u64>,
    nice: i32,
    io: &'static str,
    metrics: Option<String>,
    compression: String,
    block_size: u32,
    machine_id_file: String,
    congestion: &'static str,
    segmentation_offload: bool,
    snapshot: &'static str,
    hooks: Option<MeantHooks>,
}

#[derive(Serialize)]
struct MeantHooks {
    pre: String,
    post: String,
    timeout_seconds: f64,
    claims: Option<String>,
}

impl MeantHooks {
    fn of(hooks: &Hooks) -> Self {
        Self {
            pre: hooks.pre.clone(),
            post: hooks.post.clone(),
            timeout_seconds: hooks.timeout.as_secs_f64(),
            claims: hooks.claims.map(|c| c.to_string()),
        }
    }
}

/// Runs the command: the settings were read already.
pub fn run(ctx: &Context, out: &Output) -> anyhow::Result<Exit> {
    let c = &ctx.config;
    crate::machine::machine_id(&c.machine_id_file)?;
    let meant = Meant {
        state: c.state.display().to_string(),
        receiver: c.receiver.clone(),
        every_seconds: c.every.as_secs_f64(),
        prefer: c.prefer.as_str(),
        freeze_limit_seconds: c.limits.freeze.as_secs_f64(),
        sync_limit_seconds: c.limits.sync.as_secs_f64(),
        freeze_memory: c.limits.memory,
        full_scan_every_seconds: c.full_scan_every.as_secs_f64(),
        threads: c.threads,
        send_rate: c.load.send.usual,
        send_windows: c.load.send.windows.iter().map(|w| format!("{w}: {}", rate(Some(w.rate)))).collect(),
        read_rate: c.load.read,
        nice: c.load.priority.nice,
        io: c.io.as_str(),
        metrics: c.metrics.map(|at| at.to_string()),
        compression: c.compression.to_string(),
        block_size: c.block_size,
        machine_id_file: c.machine_id_file.display().to_string(),
        congestion: c.tuning.congestion.as_str(),
        segmentation_offload: c.tuning.segmentation.is_offload(),
        snapshot: c.snapshot.as_str(),
        hooks: c.snapshot.hooks().map(MeantHooks::of),
    };
    let text = format!(
        "settings are right\nstate {}\nreceiver {}\nevery {}\nprefer {}\nfreeze_limit {}\nsync_limit {}\nfreeze_memory {}\nfull_scan_every {}\nthreads {}\nsend_rate {}\nsend_windows {}\nread_rate {}\nnice {}\nio {}\nmetrics {}\ncompression {}\nblock_size {}\nmachine_id_file {}\ncongestion {}\nsegmentation_offload {}\nsnapshot {}",
        meant.state,
        meant.receiver.as_deref().unwrap_or("(as the join token said)"),
        text::duration(c.every),
        meant.prefer,
        text::duration(c.limits.freeze),
        text::duration(c.limits.sync),
        text::bytes(c.limits.memory as u64),
        text::duration(c.full_scan_every),
        meant.threads,
        rate(meant.send_rate),
        if meant.send_windows.is_empty() { "(none)".to_owned() } else { meant.send_windows.join("; ") },
        rate(meant.read_rate),
        meant.nice,
        meant.io,
        meant.metrics.as_deref().unwrap_or("(off)"),
        meant.compression,
        text::bytes(u64::from(meant.block_size)),
        meant.machine_id_file,
        meant.congestion,
        meant.segmentation_offload,
        told(&c.snapshot)
    );
    out.result("backhaul.config/1", &meant, &text);
    Ok(Exit::Done)
}

/// What a setting does, for people.
fn told(snapshot: &Snapshot) -> String {
    let word = snapshot.as_str();
    match snapshot {
        Snapshot::Auto => {
            format!(
                "{word} (mounted devices frozen for an instant; a clone of an image that is open for writing, on xfs and btrfs)"
            )
        }
        Snapshot::Freeze => format!("{word} (mounted devices frozen for an instant; images as they are)"),
        Snapshot::Reflink => format!("{word} (a clone of every image, on xfs and btrfs; the rest as it is)"),
        Snapshot::None => format!("{word} (volumes as they are: fuzzy while they are written to)"),
        Snapshot::Hooks(h) => {
            let claims = h.claims.map_or("crash, of one volume".to_owned(), |c| format!("{c}, by your word"));
            let timeout = text::duration(h.timeout);
            format!(
                "{word}\nhooks.pre {}\nhooks.post {}\nhooks.timeout {timeout}\nhooks.claims {claims}",
                h.pre, h.post
            )
        }
    }
}

fn rate(rate: Option<u64>) -> String {
    match rate {
        None => "(no limit)".into(),
        Some(0) => "nothing is sent".into(),
        Some(n) => format!("{} a second", text::bytes(n)),
    }
}
