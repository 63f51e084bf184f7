//! `verify`: whether points can be restored, as far as the store is concerned. Writes nothing.

use std::sync::Arc;

use backhaul_cli::{Exit, Output, text};
use backhaul_protocol::wire::message::PointSpec;
use clap::Args;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::Context;
use super::restore::{MAX_LINES, What, failure, lost_line, parse_what};
use crate::counting::Counting;
use crate::membership;
use crate::read_error::ReadError;
use crate::restore::parallelism;
use crate::restore_error::RestoreError;
use crate::salvage::object_of;
use crate::scrub::{Damage, PointReport, Scrub, Share, verify_group};

/// Options of `verify`.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// Only this; default: the latest point of every group
    #[arg(value_name = "GROUP[/VOLUME][@POINT]", value_parser = parse_what)]
    pub what: Option<What>,
    /// How much of the data is read and hashed; the rest is checked by its index only
    #[arg(long, default_value = "100%", value_parser = Share::parse, value_name = "PERCENT")]
    pub read_data: Share,
}

#[derive(Serialize)]
struct Verified {
    points: Vec<PointReport>,
    bytes_verified: u64,
    bytes_read: u64,
    damaged: Vec<Damage>,
    #[serde(skip)]
    is_sample: bool,
}

/// Runs the command.
pub async fn run(args: VerifyArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let (catalog, format) = ctx.catalog_to_read(&out).await?;
    let (counting, catalog) = Counting::catalog(catalog);
    let mut result = Verified {
        points: Vec::new(),
        bytes_verified: 0,
        bytes_read: 0,
        damaged: Vec::new(),
        is_sample: !args.read_data.is_whole(),
    };
    let of_store = |e: &ReadError| Damage::of_object(None, object_of(e), e);
    result.damaged.extend(format.iter().map(of_store));
    let named = args.what.is_some();
    let (volume, point, groups) = match args.what {
        Some(what) => {
            let name = catalog.group(&what.group).await.err().filter(ReadError::is_damage);
            result.damaged.extend(name.iter().map(of_store));
            let log = catalog.expect_group(&what.group).await?;
            (what.volume, what.point, vec![(what.group, log)])
        }
        None => {
            let located = catalog.locate().await?;
            result.damaged.extend(located.damaged.iter().map(of_store));
            let groups: Vec<_> = located.groups.iter().map(|(_, log)| log.group()).collect();
            result.damaged.extend(membership::damaged(&catalog, &groups).await?.iter().map(of_store));
            (None, PointSpec::Latest, located.groups)
        }
    };
    let mut progress = out.progress(groups.len());
    let threads = Arc::new(Semaphore::new(parallelism()));
    for (group, log) in groups {
        let (share, volume, threads) = (args.read_data, volume.clone(), threads.clone());
        let scrub = Scrub { group: group.clone(), log, volume, share, threads };
        let begin = |seq, total| progress.phase(&format!("{group}@{seq}"), total);
        let mut report = verify_group(&scrub, point, begin).await.map_err(|e| failure(RestoreError::Fetch(e)))?;
        result.damaged.append(&mut report.damaged);
        match report.point {
            Some(point) => {
                result.bytes_verified += point.bytes_verified;
                result.points.push(point);
            }
            None if named && result.damaged.is_empty() => {
                return Err(ReadError::NotFound(format!("group {group} has no points yet")).into());
            }
            None => out.warn(&match point {
                PointSpec::Latest => format!("group {group} has no point that can be read"),
                _ => format!("the point that is meant of group {group} can't be read; `points` lists those that can"),
            }),
        }
    }
    result.bytes_read = counting.bytes_read();
    out.result("backhaul.verify/1", &result, &describe(&result));
    Ok(if result.damaged.is_empty() { Exit::Done } else { Exit::Differ })
}

fn describe(v: &Verified) -> String {
    let mut lines = Vec::new();
    for p in &v.points {
        lines.push(format!("{}@{} ({}, {})", p.group, p.point, p.time, p.consistency));
        for own in &p.volumes {
            let index = if own.digest_matches { "index right" } else { "INDEX DIFFERS from the point's digest" };
            lines.push(format!(
                "  {} {}: {index}; {} of {} blocks read, {} right",
                own.name,
                text::bytes(own.length),
                own.blocks_read,
                own.blocks,
                text::bytes(own.bytes_verified)
            ));
        }
    }
    if v.points.is_empty() {
        lines.push("no point was looked at".into());
    }
    if v.damaged.is_empty() {
        let what = if v.is_sample { "nothing that was looked at is damaged" } else { "nothing is damaged" };
        lines.push(what.into());
    } else {
        lines.push(format!("DAMAGED in {} places:", v.damaged.len()));
        lines.extend(v.damaged.iter().take(MAX_LINES).map(damage_line));
        if v.damaged.len() > MAX_LINES {
            lines.push(format!("  and {} more: --json lists all", v.damaged.len() - MAX_LINES));
        }
    }
    lines.join("\n")
}

fn damage_line(d: &Damage) -> String {
    let whose = match (&d.group, d.point) {
        (Some(group), Some(point)) => format!("{group}@{point}"),
        (Some(group), None) => format!("log of {group}"),
        (None, _) => "store".into(),
    };
    format!("  {whose}{}", lost_line(&d.lost))
}
