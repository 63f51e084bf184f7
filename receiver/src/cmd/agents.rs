//! `agents`, `revoke`, `adopt`: who may write and read.

use std::time::SystemTime;

use backhaul_cli::{Exit, Output, text};
use backhaul_protocol::ids::{AgentId, Name};
use backhaul_protocol::store::fleet::AgentRole;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::access;

#[derive(Serialize)]
struct Row {
    agent: String,
    group: String,
    host: String,
    role: &'static str,
    joined: String,
    last_seen: Option<String>,
    certificate_until: Option<String>,
    revoked: Option<String>,
}

#[derive(Serialize)]
struct Rows {
    agents: Vec<Row>,
    damaged: Vec<String>,
}

/// Runs `agents`.
pub async fn list(ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let (rows, damaged) = access::agents(&ctx.catalog().await?).await?;
    let agents: Vec<Row> = rows
        .into_iter()
        .map(|r| Row {
            agent: r.joined.agent.to_string(),
            group: r.group.to_string(),
            host: r.joined.host.to_string(),
            role: match r.joined.role {
                AgentRole::Writer => "writer",
                AgentRole::RestoreOnly => "restore-only",
            },
            joined: text::time(r.joined.joined),
            last_seen: r.last_seen.map(text::time),
            certificate_until: r.certificate_until.map(text::time),
            revoked: r.revoked.map(text::time),
        })
        .collect();
    let damaged: Vec<String> = damaged.iter().map(ToString::to_string).collect();
    let mut lines: Vec<String> = agents
        .iter()
        .map(|a| {
            let seen = a.last_seen.as_ref().map_or("never seen".into(), |t| format!("last seen {t}"));
            let until = a.certificate_until.as_ref().map_or(String::new(), |t| format!(", certificate until {t}"));
            let revoked = a.revoked.as_ref().map_or(String::new(), |t| format!(", REVOKED {t}"));
            format!("{}  {}  {}  {}  {seen}{until}{revoked}", a.agent, a.group, a.host, a.role)
        })
        .collect();
    if lines.is_empty() {
        lines.push("no agent has joined".into());
    }
    lines.extend(damaged.iter().map(|d| format!("DAMAGED: {d}")));
    let exit = if damaged.is_empty() { Exit::Done } else { Exit::Differ };
    out.result("backhaul.agents/1", &Rows { agents, damaged }, &lines.join("\n"));
    Ok(exit)
}

/// Options of `revoke`.
#[derive(Args, Clone, Debug)]
pub struct RevokeArgs {
    /// Id of the agent, as `agents` prints it
    pub agent: AgentId,
}

#[derive(Serialize)]
struct Revoked {
    agent: String,
}

/// Runs `revoke`.
pub async fn revoke(args: RevokeArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    access::revoke(&ctx.catalog().await?, args.agent, SystemTime::now()).await?;
    let revoked = Revoked { agent: args.agent.to_string() };
    let text = format!("agent {} is revoked; a live session ends within 30 s", args.agent);
    out.result("backhaul.revoke/1", &revoked, &text);
    Ok(Exit::Done)
}

/// Options of `adopt`.
#[derive(Args, Clone, Debug)]
pub struct AdoptArgs {
    /// Group that the agent is to write
    pub group: Name,
    /// Id of the agent, as `agents` prints it
    pub agent: AgentId,
}

#[derive(Serialize)]
struct Adopted {
    group: String,
    agent: String,
    generation: u16,
    record: u64,
}

/// Runs `adopt`.
pub async fn adopt(args: AdoptArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let (seq, generation) = access::adopt(&ctx.catalog().await?, &args.group, args.agent, SystemTime::now()).await?;
    let adopted = Adopted {
        group: args.group.to_string(),
        agent: args.agent.to_string(),
        generation: generation.0,
        record: seq.0,
    };
    let text = format!(
        "agent {} is the writer of group {} from now on (generation {generation}); every other agent is fenced",
        args.agent, args.group
    );
    out.result("backhaul.adopt/1", &adopted, &text);
    Ok(Exit::Done)
}
