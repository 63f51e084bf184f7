//! `verify`.

use backhaul_cli::{Exit, Output};
use clap::Args;

use super::Context;

/// Options of `verify`.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {}

/// Runs the command.
pub async fn run(_args: VerifyArgs, _ctx: &Context, _out: Output) -> anyhow::Result<Exit> {
    anyhow::bail!("being built")
}
