//! `points`: lists recovery points.

use backhaul_cli::{Exit, Output, text};
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::checkpoint::PointSummary;
use backhaul_protocol::store::key::ObjectKey;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::catalog::{Catalog, GroupLog};

/// Objects that are counted for the store's size; more would make a list of points slow.
const MAX_COUNTED: usize = 20_000;

/// Options of `points`.
#[derive(Args, Clone, Debug)]
pub struct PointsArgs {
    /// Only this group
    pub group: Option<Name>,
}

#[derive(Serialize)]
struct Volume {
    name: String,
    bytes: u64,
    digest: String,
}

#[derive(Serialize)]
struct Point {
    group: String,
    point: u64,
    time: String,
    consistency: String,
    verified: String,
    volumes: Vec<Volume>,
}

#[derive(Serialize)]
struct Points {
    points: Vec<Point>,
    pruned: bool,
    stored_bytes: u64,
    stored_bytes_complete: bool,
}

/// Runs the command.
pub async fn run(args: PointsArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let catalog = ctx.catalog().await?;
    let groups: Vec<(Name, GroupLog)> = match &args.group {
        Some(name) => vec![(name.clone(), catalog.expect_group(name).await?)],
        None => catalog.groups().await?.into_iter().map(|(n, g)| (n, catalog.log(g))).collect(),
    };
    let mut points = Vec::new();
    let mut lines = Vec::new();
    let (mut stored, mut complete) = (0, true);
    for (name, log) in groups {
        for summary in log.points().await? {
            lines.push(line(&name, &summary));
            points.push(point(&name, summary));
        }
        let (bytes, all) = stored_bytes(&catalog, &log).await?;
        stored += bytes;
        complete &= all;
    }
    if lines.is_empty() {
        lines.push("no points yet".into());
    }
    let least = if complete { "" } else { "more than " };
    lines.push(format!("{least}{} stored; nothing is pruned", text::bytes(stored)));
    let result = Points { points, pruned: false, stored_bytes: stored, stored_bytes_complete: complete };
    out.result("backhaul.points/1", &result, &lines.join("\n"));
    Ok(Exit::Done)
}

fn line(group: &Name, p: &PointSummary) -> String {
    let volumes: Vec<String> = p.volumes.iter().map(|v| format!("{} {}", v.name, text::bytes(v.bytes))).collect();
    format!("{group}@{}  {}  {}  {}  {}", p.seq, text::time(p.time), p.consistency, p.checked, volumes.join(", "))
}

fn point(group: &Name, p: PointSummary) -> Point {
    let volume = |v: backhaul_protocol::store::checkpoint::VolumeSummary| Volume {
        name: v.name.to_string(),
        bytes: v.bytes,
        digest: v.digest.to_string(),
    };
    Point {
        group: group.to_string(),
        point: p.seq.0,
        time: text::time(p.time),
        consistency: p.consistency.to_string(),
        verified: p.checked.to_string(),
        volumes: p.volumes.into_iter().map(volume).collect(),
    }
}

/// Bytes of the group's objects, and whether all were counted.
async fn stored_bytes(catalog: &Catalog, log: &GroupLog) -> anyhow::Result<(u64, bool)> {
    let prefix = format!("groups/{}/", log.group());
    let (mut bytes, mut counted) = (0, 0);
    let mut after: Option<ObjectKey> = None;
    loop {
        let page = catalog.store.list(&prefix, after.as_ref(), 1000).await?;
        bytes += page.iter().map(|(_, size)| size).sum::<u64>();
        counted += page.len();
        if page.len() < 1000 {
            return Ok((bytes, true));
        }
        if counted >= MAX_COUNTED {
            return Ok((bytes, false));
        }
        after = page.last().map(|(key, _)| key.clone());
    }
}
