//! `join`: makes this server a member of a group.

use std::io::Read;
use std::path::PathBuf;

use backhaul_cli::{Exit, Failure, Output, settings};
use backhaul_protocol::ids::{Name, StateId};
use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::wire::message::{AgentMessage, Join, ReceiverMessage};
use backhaul_seams::random;
use backhaul_transport::endpoint::{Endpoint, Windows};
use backhaul_transport::link::QuicLink;
use backhaul_transport::tls::{ReceiverTrust, client_config};
use backhaul_transport::token::JoinToken;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::connection::{Connected, greet, in_time, resolve};
use crate::machine::machine_id;
use crate::state::Joined;

/// Longest token that is read.
const MAX_TOKEN: u64 = 4096;

/// Options of `join`.
#[derive(Args, Clone, Debug)]
pub struct JoinArgs {
    /// `-` to read the token from standard input
    #[arg(value_name = "TOKEN", required_unless_present = "token_file")]
    pub token: Option<String>,
    /// File that holds the token
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// Take the token from the command line, where every user of this server can read it
    #[arg(long)]
    pub token_on_command_line: bool,
}

#[derive(Serialize)]
struct JoinResult {
    agent: String,
    group: String,
    role: &'static str,
    receiver: String,
}

/// Runs the command.
pub async fn run(args: JoinArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    if let Some(joined) = state.joined()? {
        let text = format!("this agent has joined group {} already, as {}", joined.group_name, joined.agent);
        return Err(Failure::new(Exit::Refused, "E_JOINED", text)
            .next("use another --state folder to join another group from the same server")
            .into());
    }
    let token = read_token(&args)?;
    state.create()?;
    let key = state.ensure_key()?;
    let address = resolve(ctx.config.receiver.as_deref().unwrap_or(&token.address)).await?;
    let endpoint = Endpoint::client(address, ctx.config.tuning)?;
    let tls = client_config(ReceiverTrust::Fingerprint(token.fingerprint), None)?;
    let connection = endpoint.connect(address, tls, Windows::BLOCKS).await?;
    let Connected { link, mut sender, mut receiver } = greet(QuicLink::connected(endpoint, connection)).await?;
    let join = Join {
        secret: token.secret,
        request: key.request()?,
        machine: machine_id(&ctx.config.machine_id_file)?,
        host: host_name(),
    };
    sender.send(&AgentMessage::Join(join)).await?;
    let answer = in_time(receiver.receive()).await?;
    sender.finish();
    link.goodbye().await;
    let joined = match answer {
        Some(ReceiverMessage::Joined(joined)) => joined,
        Some(ReceiverMessage::Refused(refusal)) => return Err(refusal.into()),
        _ => return Err(SourceError::Protocol("no answer to `Join`").into()),
    };
    let role = joined.role;
    let mine = Joined {
        agent: joined.agent,
        group: joined.group,
        group_name: joined.group_name,
        role,
        receiver: ctx.config.receiver.clone().unwrap_or(token.address),
        state: StateId(random::id()),
    };
    state.write_joined(&mine, &joined.certificates)?;
    let role = match role {
        AgentRole::Writer => "writer",
        AgentRole::RestoreOnly => "restore-only",
    };
    let result = JoinResult {
        agent: mine.agent.to_string(),
        group: mine.group_name.to_string(),
        role,
        receiver: mine.receiver.clone(),
    };
    let next = match mine.role {
        AgentRole::Writer => "next: backhaul-agent protect NAME=PATH, then backhaul-agent sync or run",
        AgentRole::RestoreOnly => "next: backhaul-agent restore VOLUME --to TARGET",
    };
    let text = format!("joined group {} as agent {} ({role})\n{next}", result.group, result.agent);
    out.result("backhaul.join/1", &result, &text);
    Ok(Exit::Done)
}

fn read_token(args: &JoinArgs) -> anyhow::Result<JoinToken> {
    let usage = |text: &str| Failure::new(Exit::Usage, "E_USAGE", text);
    let mut text = String::new();
    match (&args.token_file, args.token.as_deref()) {
        (Some(path), _) => {
            let file = std::fs::File::open(path);
            let read = file.and_then(|f| f.take(MAX_TOKEN).read_to_string(&mut text));
            read.map_err(|e| usage(&format!("can't read {}: {e}", path.display())))?;
        }
        (None, Some("-")) => {
            std::io::stdin().take(MAX_TOKEN).read_to_string(&mut text).map_err(|e| usage(&e.to_string()))?;
        }
        (None, Some(token)) if args.token_on_command_line => text = token.to_owned(),
        (None, _) => {
            return Err(usage("a token on the command line can be read by every user of this server")
                .next("backhaul-agent join - and the token on standard input, or --token-file FILE")
                .into());
        }
    }
    let wrong = |text: String| {
        let next =
            "on the receiver: backhaul-receiver token --group NAME --address HOST:PORT; then all of the line here";
        Failure::new(Exit::Authentication, "E_AUTH", text).next(next)
    };
    let token = text.parse::<JoinToken>().map_err(|e| wrong(e.to_string()))?;
    // Not repeated: in two tokens on one line it would be a secret.
    settings::check_address(&token.address).map_err(|_| wrong("the token ends in no HOST:PORT".into()))?;
    Ok(token)
}

/// What the machine calls itself, made a legal name.
fn host_name() -> Name {
    let raw = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    let legal: String = raw.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    legal.trim_matches('-').parse().unwrap_or_else(|_| "server".parse().expect("a legal name"))
}
