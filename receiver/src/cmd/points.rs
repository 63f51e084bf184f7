//! `points`: lists recovery points.

use backhaul_cli::{Exit, Output, text};
use backhaul_protocol::ids::Name;
use backhaul_protocol::store::checkpoint::PointSummary;
use backhaul_protocol::store::key::ObjectKey;
use clap::Args;
use serde::Serialize;

use super::Context;
use crate::catalog::{Catalog, GroupLog};
use crate::history::History;
use crate::read_error::ReadError;
use crate::salvage::object_of;

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
    damaged: Vec<Unreadable>,
}

/// An object for which something may be missing from the list.
#[derive(Serialize)]
struct Unreadable {
    group: Option<String>,
    /// Number of the log record, which may have been a point.
    record: Option<u64>,
    object: String,
    cause: String,
}

impl Unreadable {
    fn of_store(error: &ReadError) -> Self {
        Self { group: None, record: None, object: object_of(error), cause: error.to_string() }
    }
}

/// Runs the command. What is damaged is listed too, and makes the exit code [`Exit::Differ`].
pub async fn run(args: PointsArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let (catalog, format) = ctx.catalog_to_read(&out).await?;
    let mut damaged: Vec<Unreadable> = format.iter().map(Unreadable::of_store).collect();
    let groups: Vec<(Name, GroupLog)> = match &args.group {
        Some(name) => vec![(name.clone(), catalog.expect_group(name).await?)],
        None => {
            let located = catalog.locate().await?;
            damaged.extend(located.damaged.iter().map(Unreadable::of_store));
            located.groups
        }
    };
    let mut points = Vec::new();
    let mut lines = Vec::new();
    let (mut stored, mut complete) = (0, true);
    for (name, log) in groups {
        let history = log.whole_history().await?;
        damaged.extend(unreadable(&name, &log, &history));
        for summary in history.points {
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
    if !damaged.is_empty() {
        lines.push("DAMAGED; `backhaul-receiver verify` tells more:".into());
        lines.extend(damaged.iter().map(|d| match (&d.group, d.record) {
            (Some(group), Some(record)) => format!("  {group}@{record}  can't be read: {} ({})", d.object, d.cause),
            _ => format!("  {} ({})", d.object, d.cause),
        }));
    }
    let least = if complete { "" } else { "more than " };
    lines.push(format!("{least}{} stored; nothing is pruned", text::bytes(stored)));
    let exit = if damaged.is_empty() { Exit::Done } else { Exit::Differ };
    let result = Points { points, pruned: false, stored_bytes: stored, stored_bytes_complete: complete, damaged };
    out.result("backhaul.points/1", &result, &lines.join("\n"));
    Ok(exit)
}

/// Checkpoints and hints are left to `verify`: no point is missing for their sake.
fn unreadable(name: &Name, log: &GroupLog, history: &History) -> Vec<Unreadable> {
    let of = |record: Option<u64>, e: &ReadError| Unreadable {
        group: Some(name.to_string()),
        record,
        object: log.object_of(e),
        cause: e.to_string(),
    };
    let records = history.unreadable.iter().map(|(seq, e)| of(Some(seq.0), e));
    records.chain(history.broken.iter().map(|e| of(None, e))).collect()
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
