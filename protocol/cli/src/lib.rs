//! What the commands of agent and receiver have in common, so that they behave alike.
//!
//! Read first: [`run`], [`Failure`] and [`Output`].
//!
//! Standard output is for results: text, or with `--json` exactly one object with a `schema` field, also for an error.
//! Progress and logs go to standard error.

mod failure;
mod output;
mod progress;
pub mod settings;
pub mod text;

use std::process::ExitCode;

use clap::Args;

pub use failure::{Classifier, Exit, Failure, Meaning, classify, of_reason};
pub use output::Output;
pub use progress::{Phase, Progress};

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Settings file (TOML)
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<std::path::PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say only errors on standard error
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

/// Runs a command to its exit code: sets up logs, prints the error if there is one. `command` is given the output and
/// runs on a runtime that ends with an interrupt (SIGINT: exit 130), unless it handles that itself.
pub fn run<F>(common: &CommonArgs, own_errors: Classifier, command: impl FnOnce(Output) -> F) -> ExitCode
where
    F: Future<Output = anyhow::Result<Exit>>,
{
    init_logs(common);
    let output = Output::new(common.json, common.quiet, own_errors);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return output.failure(&anyhow::Error::from(e).context("can't start")).into(),
    };
    let result = runtime.block_on(async {
        tokio::select! {
            biased;
            result = command(output.clone()) => result,
            _ = interrupted() => Err(Failure::new(Exit::Interrupted, "E_INTERRUPTED", "interrupted").into()),
        }
    });
    // Blocking reads and writes that are under way must not keep an interrupted command.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => output.failure(&error).into(),
    }
}

/// Waits for SIGINT.
async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn init_logs(common: &CommonArgs) {
    let level = match (common.quiet, common.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    // Only our own crates: libraries log keys and addresses that nobody asked for.
    let ours = ["backhaul_agent", "backhaul_receiver", "backhaul_transport", "backhaul_volume", "backhaul_protocol"];
    let filter = ours.iter().map(|c| format!("{c}={level}")).collect::<Vec<_>>().join(",");
    let filter = std::env::var("BACKHAUL_LOG").unwrap_or(filter);
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(common.verbose > 1)
        .try_init();
}
