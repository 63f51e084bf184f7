//! What the commands of agent and receiver have in common, so that they behave alike.
//!
//! Read first: [`run`], [`Failure`] and [`Output`].
//!
//! Standard output is for results: text, or with `--json` exactly one object with a `schema` field, also for an error.
//! Progress and logs go to standard error.

mod confirm;
mod failure;
pub mod metrics;
mod output;
mod plan;
mod progress;
pub mod settings;
pub mod text;

use std::process::ExitCode;

use clap::{Args, Parser};
use tokio::signal::unix::{SignalKind, signal};

pub use confirm::confirm;
pub use failure::{Classifier, Exit, Failure, Meaning, classify, of_reason};
pub use output::Output;
pub use plan::{RestorePlan, VolumePlan};
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

/// What was typed. Wrong usage is told as every other error, as JSON too if that was asked for; help and version are
/// printed. Both end the program with the exit code that is given.
pub fn parse<C: Parser>() -> Result<C, ExitCode> {
    C::try_parse().map_err(|error| {
        let is_wrong = error.use_stderr();
        if is_wrong && std::env::args_os().any(|a| a == "--json") {
            let message = usage_message(&error.to_string());
            output::print_error("E_USAGE", &message, Some("the same command with --help tells what it takes"));
        }
        // A terminal that went away is no error of ours.
        let _ = error.print();
        if is_wrong { Exit::Usage.into() } else { Exit::Done.into() }
    })
}

/// What is wrong, in one line, without the usage that follows.
fn usage_message(text: &str) -> String {
    let own = text.trim_start_matches("error: ").lines().map(str::trim);
    let own = own.take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more information"));
    own.filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Who acts on a signal that asks the program to end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signals {
    /// [`run`]: the command is dropped where it is, exit 130.
    End,
    /// The command itself: a service that ends in order, exit 0. SIGHUP is passed over.
    Own,
    /// The same, and SIGHUP too: it reads its settings again.
    All,
}

/// Runs a command to its exit code: sets up logs, prints the error if there is one. `command` is given the output.
pub fn run<F>(
    common: &CommonArgs,
    own_errors: Classifier,
    signals: Signals,
    command: impl FnOnce(Output) -> F,
) -> ExitCode
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
            failure = interrupted(signals) => Err(failure.into()),
        }
    });
    // Blocking reads and writes that are under way must not keep an interrupted command.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => output.failure(&error).into(),
    }
}

/// Waits for a signal that ends the command. SIGHUP is one: the terminal is gone, and with it who waits for the result.
/// A service does not end with the terminal that started it.
async fn interrupted(signals: Signals) -> Failure {
    if signals == Signals::All {
        return std::future::pending().await;
    }
    if signals == Signals::Own {
        let Ok(mut hup) = signal(SignalKind::hangup()) else { return std::future::pending().await };
        while hup.recv().await.is_some() {
            tracing::warn!("SIGHUP is ignored: settings are read when the service starts");
        }
        return std::future::pending().await;
    }
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [Ok(mut int), Ok(mut term), Ok(mut hup)] = kinds.map(signal) else { return std::future::pending().await };
    let name = tokio::select! {
        _ = int.recv() => "SIGINT",
        _ = term.recv() => "SIGTERM",
        _ = hup.recv() => "SIGHUP",
    };
    Failure::new(Exit::Interrupted, "E_INTERRUPTED", format!("interrupted by {name}"))
        .next("type the same command again: what is done already is not done twice")
}

fn init_logs(common: &CommonArgs) {
    let level = match (common.quiet, common.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "info",
        _ => "debug",
    };
    // Only our own crates: libraries log keys and addresses that nobody asked for.
    let ours = [
        "backhaul_cli",
        "backhaul_agent",
        "backhaul_receiver",
        "backhaul_transport",
        "backhaul_volume",
        "backhaul_protocol",
    ];
    let filter = ours.iter().map(|c| format!("{c}={level}")).collect::<Vec<_>>().join(",");
    let filter = std::env::var("BACKHAUL_LOG").unwrap_or(filter);
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(common.verbose > 1)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_usage_is_told_whole_in_one_line() {
        let command = clap::Command::new("x").arg(clap::Arg::new("to").long("to").required(true));
        let error = command.try_get_matches_from(["x"]).expect_err("it is required");
        let message = usage_message(&error.to_string());
        assert!(message.contains("--to") && !message.contains("Usage") && !message.contains('\n'), "{message}");
    }
}
