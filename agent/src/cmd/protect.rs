//! `protect` and `unprotect`: what is replicated.

use std::path::PathBuf;

use backhaul_cli::{Exit, Failure, Output, text};
use backhaul_protocol::ids::Name;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::protect::{self, Named};
use crate::tracker::hints::KernelHints;

/// Options of `protect`.
#[derive(Args, Clone, Debug)]
pub struct ProtectArgs {
    /// Volumes: root=/dev/sda data=/srv/data.img
    #[arg(required = true, value_name = "NAME=PATH", value_parser = parse_volume)]
    pub volumes: Vec<(Name, PathBuf)>,
}

fn parse_volume(text: &str) -> Result<(Name, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or_else(|| format!("\"{text}\" is not NAME=PATH"))?;
    if path.is_empty() {
        return Err(format!("\"{text}\" names no path"));
    }
    Ok((name.parse::<Name>().map_err(|e| e.to_string())?, path.into()))
}

#[derive(Serialize)]
struct Row {
    name: String,
    path: String,
    bytes: u64,
    identity: String,
    incarnation: u32,
    what: &'static str,
}

#[derive(Serialize)]
struct Rows {
    volumes: Vec<Row>,
}

/// Runs `protect`.
pub fn protect(args: &ProtectArgs, ctx: &Context, out: &Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    ctx.joined_writer()?;
    let done = protect::protect(&state, &args.volumes, ctx.config.block_size)?;
    let mut rows = Vec::new();
    let mut lines = Vec::new();
    for (v, named) in done {
        if v.identity.weak() {
            out.warn(&format!(
                "{} has no serial number, WWN or partition UUID; it is known by its path and size only",
                v.path.display()
            ));
        }
        let what = match named {
            Named::New => "protected",
            Named::Repointed => "re-pointed: everything is compared at the next point",
            Named::Same => "protected already",
        };
        lines.push(format!("{}  {}  {}  {what}", v.name, v.path.display(), text::bytes(v.geometry.length())));
        rows.push(Row {
            name: v.name.to_string(),
            path: v.path.display().to_string(),
            bytes: v.geometry.length(),
            identity: v.identity.describe(),
            incarnation: v.incarnation.0,
            what,
        });
    }
    out.result("backhaul.protect/1", &Rows { volumes: rows }, &lines.join("\n"));
    Ok(Exit::Done)
}

/// Options of `unprotect`.
#[derive(Args, Clone, Debug)]
pub struct UnprotectArgs {
    /// Name of the volume
    pub name: Name,
}

#[derive(Serialize)]
struct Removed {
    name: String,
    path: String,
}

/// Runs `unprotect`.
pub fn unprotect(args: &UnprotectArgs, ctx: &Context, out: &Output) -> anyhow::Result<Exit> {
    let state = ctx.state();
    let joined = state.expect_joined()?;
    let Some(removed) = protect::unprotect(&state, &args.name)? else {
        let text = format!("no volume {} is protected; `backhaul-agent status` lists them", args.name);
        return Err(Failure::new(Exit::NotFound, "E_NOTFOUND", text).into());
    };
    let left: Vec<_> = state.volumes()?.iter().map(|v| v.id).collect();
    // Beside a running service nobody else may touch what is pinned; what is left there costs little, until a reboot.
    if let Ok(_lock) = state.lock()
        && let Err(cause) = KernelHints::new(joined.state).keep(&left)
    {
        out.warn(&format!("the kernel goes on to track its writes until the next reboot: {cause}"));
    }
    let result = Removed { name: removed.name.to_string(), path: removed.path.display().to_string() };
    let text = format!("{} is not protected any more; its points stay", removed.name);
    out.result("backhaul.unprotect/1", &result, &text);
    Ok(Exit::Done)
}
