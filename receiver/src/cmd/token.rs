//! `token`: prints a join token and nothing else.

use std::time::{Duration, SystemTime};

use backhaul_cli::{Exit, Failure, Output, settings, text};
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::fleet::AgentRole;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::access::{self, TokenRequest};

/// Longest life of a token: it is a secret that lies around.
const MAX_TTL: Duration = Duration::from_secs(7 * 86_400);

/// Options of `token`.
#[derive(Args, Clone, Debug)]
pub struct TokenArgs {
    /// Group that the server joins; made if there is none
    #[arg(long, value_name = "NAME")]
    pub group: Name,
    /// How long the token is good
    #[arg(long, default_value = "1h", value_parser = text::parse_duration, value_name = "TIME")]
    pub ttl: Duration,
    /// Where the server reaches this receiver; default: `advertise` in the settings
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Option<String>,
    /// The server may read points, and not write
    #[arg(long)]
    pub restore_only: bool,
}

#[derive(Serialize)]
struct Printed {
    token: String,
    group: String,
    expires: String,
}

/// Runs the command.
pub async fn run(args: TokenArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let address = args.address.or_else(|| ctx.config.advertise.clone()).ok_or_else(|| {
        Failure::new(Exit::Usage, "E_USAGE", "the token must say where the server reaches this receiver")
            .next("add --address HOST:PORT, or set `advertise` in the settings")
    })?;
    settings::check_address(&address).map_err(|e| Failure::new(Exit::Usage, "E_USAGE", e))?;
    if args.ttl.is_zero() || args.ttl > MAX_TTL {
        return Err(Failure::new(Exit::Usage, "E_USAGE", "--ttl wants from 1s to 7d").into());
    }
    let authority = ctx.authority()?;
    let catalog = ctx.catalog().await?;
    let role = if args.restore_only { AgentRole::RestoreOnly } else { AgentRole::Writer };
    let request = TokenRequest { group: args.group.clone(), role, ttl: args.ttl, address };
    let token = access::make_token(&catalog, authority.fingerprint(), request, SystemTime::now()).await?;
    let printed = Printed { token: token.reveal(), group: args.group.to_string(), expires: text::time(token.expires) };
    out.result("backhaul.token/1", &printed, &printed.token);
    Ok(Exit::Done)
}
