//! `backhaul-agent`: finds changed blocks of this server's volumes and sends them to a receiver.

use std::process::ExitCode;

use backhaul_agent::cmd::{self, Context};
use backhaul_agent::config::{Config, PlaceArgs};
use backhaul_cli::{CommonArgs, Exit, Output, Signals};
use clap::{Parser, Subcommand};

/// The hidden command of the process that freezes; see `deploy/backhaul-freezer.service`.
const FREEZE_HELPER: &str = "freeze-helper";

/// Sends changed blocks of this server's volumes to a receiver, and restores them.
#[derive(Parser)]
#[command(name = "backhaul-agent", version)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this server a member of a group, with a token from `backhaul-receiver token`
    Join(cmd::join::JoinArgs),
    /// Measure what protecting volumes would take; before or after they are protected
    Plan(cmd::plan::PlanArgs),
    /// Protect volumes, or point them to other devices
    Protect(cmd::protect::ProtectArgs),
    /// Stop protecting a volume; its points stay
    Unprotect(cmd::protect::UnprotectArgs),
    /// Make one recovery point now
    Sync,
    /// Make recovery points until SIGTERM
    Run(cmd::run::RunArgs),
    /// Have `run` make no points for a while
    Pause(cmd::pause::PauseArgs),
    /// Have `run` make points again
    Resume,
    /// Show how well this server is protected
    Status(cmd::status::StatusArgs),
    /// Restore volumes over the network, through the receiver
    Restore(cmd::restore::RestoreArgs),
    /// About settings
    #[command(subcommand)]
    Config(cmd::check::ConfigCommand),
}

fn main() -> ExitCode {
    // Before any thread is started: it has a process to itself, and its own arguments.
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|command| command == FREEZE_HELPER) {
        return backhaul_freeze::helper_main(args.collect());
    }
    let cli: Cli = match backhaul_cli::parse() {
        Ok(cli) => cli,
        Err(exit) => return exit,
    };
    let common = cli.common.clone();
    let signals = if matches!(cli.command, Command::Run(_)) { Signals::All } else { Signals::End };
    backhaul_cli::run(&common, cmd::meaning, signals, |out| dispatch(cli, out))
}

async fn dispatch(cli: Cli, out: Output) -> anyhow::Result<Exit> {
    let ctx = Context { config: Config::build(cli.common.config.as_deref(), &cli.place)? };
    match cli.command {
        Command::Join(args) => cmd::join::run(args, &ctx, out).await,
        Command::Plan(args) => cmd::plan::run(args, &ctx, out).await,
        Command::Protect(args) => cmd::protect::protect(&args, &ctx, &out),
        Command::Unprotect(args) => cmd::protect::unprotect(&args, &ctx, &out),
        Command::Sync => cmd::sync::run(&ctx, out).await,
        Command::Run(args) => cmd::run::run(args, &ctx, out).await,
        Command::Pause(args) => cmd::pause::pause(args, &ctx, &out).await,
        Command::Resume => cmd::pause::resume(&ctx, &out).await,
        Command::Status(args) => cmd::status::run(args, &ctx, out).await,
        Command::Restore(args) => cmd::restore::run(args, &ctx, out).await,
        Command::Config(cmd::check::ConfigCommand::Check) => cmd::check::run(&ctx, &out),
    }
}
