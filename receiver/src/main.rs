//! `backhaul-receiver`: keeps recovery points in a store and restores them.

use std::process::ExitCode;

use backhaul_cli::{CommonArgs, Exit, Output, Signals};
use backhaul_receiver::cmd::{self, Context};
use backhaul_receiver::config::{Config, PlaceArgs};
use clap::{Parser, Subcommand};

/// Keeps recovery points in a store and restores them.
#[derive(Parser)]
#[command(name = "backhaul-receiver", version)]
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
    /// Make a store and the receiver's certificate authority
    Init,
    /// Receive points from agents, until SIGTERM
    Serve(cmd::serve::ServeArgs),
    /// Print a token with which a server joins a group
    Token(cmd::token::TokenArgs),
    /// List the agents that joined
    Agents,
    /// Shut an agent out
    Revoke(cmd::agents::RevokeArgs),
    /// Make an agent the writer of its group, although it diverged
    Adopt(cmd::agents::AdoptArgs),
    /// List recovery points
    Points(cmd::points::PointsArgs),
    /// Restore volumes straight from the store
    Restore(cmd::restore::RestoreArgs),
    /// Read and check what points need; writes nothing
    Verify(cmd::verify::VerifyArgs),
    /// About settings
    #[command(subcommand)]
    Config(cmd::check::ConfigCommand),
}

fn main() -> ExitCode {
    let cli: Cli = match backhaul_cli::parse() {
        Ok(cli) => cli,
        Err(exit) => return exit,
    };
    let common = cli.common.clone();
    let signals = if matches!(cli.command, Command::Serve(_)) { Signals::Own } else { Signals::End };
    backhaul_volume::give_back_large_blocks();
    backhaul_cli::run(&common, cmd::meaning, signals, |out| dispatch(cli, out))
}

async fn dispatch(cli: Cli, out: Output) -> anyhow::Result<Exit> {
    let ctx = Context { config: Config::build(cli.common.config.as_deref(), &cli.place)? };
    match cli.command {
        Command::Init => cmd::init::run(&ctx, out).await,
        Command::Serve(args) => cmd::serve::run(args, &ctx, out).await,
        Command::Token(args) => cmd::token::run(args, &ctx, out).await,
        Command::Agents => cmd::agents::list(&ctx, out).await,
        Command::Revoke(args) => cmd::agents::revoke(args, &ctx, out).await,
        Command::Adopt(args) => cmd::agents::adopt(args, &ctx, out).await,
        Command::Points(args) => cmd::points::run(args, &ctx, out).await,
        Command::Restore(args) => cmd::restore::run(args, &ctx, out).await,
        Command::Verify(args) => cmd::verify::run(args, &ctx, out).await,
        Command::Config(cmd::check::ConfigCommand::Check) => Ok(cmd::check::run(&ctx, &out)),
    }
}
