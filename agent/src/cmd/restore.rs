//! `restore`.

use backhaul_cli::{Exit, Output};
use clap::Args;

use super::Context;

/// Options of `restore`.
#[derive(Args, Clone, Debug)]
pub struct RestoreArgs {}

/// Runs the command.
pub async fn run(_args: RestoreArgs, _ctx: &Context, _out: Output) -> anyhow::Result<Exit> {
    anyhow::bail!("being built")
}
