//! `restore`: volumes of a point onto files and devices, straight from the store.

use std::path::{Path, PathBuf};

use backhaul_cli::{Exit, Failure, Output, confirm, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::Name;
use backhaul_protocol::wire::message::PointSpec;
use backhaul_volume::target::Durability;
use clap::{Args, ValueEnum};

use super::Context;
use crate::dry_run::dry_run;
use crate::fetch::FetchError;
use crate::read_error::ReadError;
use crate::restore::{Outcome, Prepared, Request, VolumeOutcome};
use crate::restore_error::RestoreError;
use crate::salvage::{Loss, Lost, OnDamage};
use crate::store::StoreUrl;

/// Lost ranges that the text lists.
pub(super) const MAX_LINES: usize = 100;

/// How the target is read back at the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Verify {
    /// Flushed, and read back from the device, past the cache
    Device,
    /// Read back through the cache: faster, and a power cut may still lose it
    Cached,
}

/// Options of `restore`.
#[derive(Args, Clone, Debug)]
pub struct RestoreArgs {
    /// GROUP, GROUP/VOLUME, either with @POINT: `latest` (default), a number, or a time
    #[arg(value_name = "GROUP[/VOLUME][@POINT]", value_parser = parse_what)]
    pub what: What,
    /// Device or file to restore to; of a group with several volumes NAME=TARGET for each
    #[arg(long = "to", value_name = "TARGET", required = true, num_args = 1..)]
    pub to: Vec<String>,
    /// How to read back what was written
    #[arg(long, value_enum, default_value = "device")]
    pub verify: Verify,
    /// Serial or name of a device that has content and may be overwritten
    #[arg(long = "confirm-target", value_name = "NAME_OR_SERIAL")]
    pub confirm_target: Vec<String>,
    /// Check everything and print what would be done; write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Restore what can be restored although something in the store is damaged, and list what is lost
    #[arg(long)]
    pub salvage: bool,
}

/// `GROUP[/VOLUME][@POINT]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct What {
    /// Which group.
    pub group: Name,
    /// Which volume of it.
    pub volume: Option<Name>,
    /// Which point.
    pub point: PointSpec,
}

/// Takes `GROUP[/VOLUME][@POINT]` apart.
pub fn parse_what(text: &str) -> Result<What, String> {
    let (path, point) = text::split_point(text)?;
    let (group, volume) = match path.split_once('/') {
        Some((group, volume)) => (group, Some(volume)),
        None => (path, None),
    };
    let name = |text: &str| text.parse::<Name>().map_err(|e| e.to_string());
    Ok(What { group: name(group)?, volume: volume.map(name).transpose()?, point })
}

/// Runs the command.
pub async fn run(args: RestoreArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    refuse_own_store(ctx.store_url()?, &args.to)?;
    let older = OlderPoint::of(&args, ctx.store_url()?);
    let mut request = Request {
        group: args.what.group,
        volume: args.what.volume,
        point: args.what.point,
        targets: args.to,
        confirm: args.confirm_target,
        refuse: protected_here(),
        durability: match args.verify {
            Verify::Device => Durability::Device,
            Verify::Cached => Durability::Cached,
        },
        on_damage: if args.salvage { OnDamage::Salvage } else { OnDamage::Fail },
    };
    let (catalog, _) = ctx.catalog_to_read(&out).await?;
    let (prepared, mut progress) = loop {
        let mut progress = out.progress(if args.dry_run { 2 } else { 4 });
        match Prepared::new(catalog.clone(), request.clone(), &mut progress).await {
            Ok(prepared) => break (prepared, progress),
            Err(RestoreError::Target(refused)) => match confirm(&out, &refused).await {
                Some(typed) => request.confirm.push(typed),
                None => return Err(refused.into()),
            },
            Err(e) => return Err(older.failure(e)),
        }
    };
    if prepared.consistency == Consistency::Fuzzy {
        out.warn(&format!(
            "point {} is fuzzy: it was read while it may have changed, and a file system in it may need repair",
            prepared.point
        ));
    }
    if args.dry_run {
        let plan = dry_run(prepared, &mut progress).await.map_err(failure)?;
        out.result("backhaul.restore-plan/1", &plan, &plan.to_string());
        return Ok(if plan.lost.is_empty() { Exit::Done } else { Exit::Differ });
    }
    let wants_device = args.verify == Verify::Device;
    let outcome = prepared.run(&mut progress).await.map_err(failure)?;
    if wants_device && outcome.verified == "cached" {
        out.warn("the target's file system has no device beneath it: what was read back came from memory");
    }
    out.result("backhaul.restore/1", &outcome, &describe(&outcome));
    Ok(if outcome.lost.is_empty() { Exit::Done } else { Exit::Differ })
}

/// What an agent on this machine protects, if there is one: never a target, whoever restores.
fn protected_here() -> Vec<PathBuf> {
    let state =
        std::env::var_os("BACKHAUL_AGENT_STATE").map_or_else(|| "/var/lib/backhaul/agent".into(), PathBuf::from);
    let Ok(text) = std::fs::read(state.join("volumes.json")) else { return Vec::new() };
    let volumes: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let paths = volumes.as_array().into_iter().flatten().filter_map(|v| v["path"].as_str());
    paths.map(PathBuf::from).collect()
}

/// A restore into the store that it reads would destroy it.
fn refuse_own_store(store: &StoreUrl, targets: &[String]) -> Result<(), Failure> {
    let StoreUrl::Dir(root) = store else { return Ok(()) };
    let Ok(root) = root.canonicalize() else { return Ok(()) };
    for target in targets {
        // NAME=TARGET, or a path that may hold a `=` itself.
        let paths = [Some(target.as_str()), target.split_once('=').map(|(_, path)| path)];
        for path in paths.into_iter().flatten().map(Path::new) {
            let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let inside =
                [path.canonicalize(), folder.canonicalize()].into_iter().flatten().any(|p| p.starts_with(&root));
            if inside {
                let text = format!("{} is inside the store {}", path.display(), root.display());
                return Err(Failure::new(Exit::Refused, "E_TARGET", text).next("restore to another place"));
            }
        }
    }
    Ok(())
}

/// What to type to restore an older point, up to its number.
struct OlderPoint {
    before: String,
    after: String,
}

impl OlderPoint {
    fn of(args: &RestoreArgs, store: &StoreUrl) -> Self {
        let volume = args.what.volume.as_ref().map_or(String::new(), |v| format!("/{v}"));
        let before = format!("backhaul-receiver restore --store '{store}' {}{volume}", args.what.group);
        Self { before, after: format!(" --to {}", args.to.join(" ")) }
    }

    fn failure(&self, error: RestoreError) -> anyhow::Error {
        match &error {
            RestoreError::Read(ReadError::Point { older, .. }) => {
                let next = match older {
                    Some(seq) => format!("{}@{seq}{}", self.before, self.after),
                    None => "backhaul-receiver verify tells everything that is damaged".into(),
                };
                Failure::new(Exit::Differ, "E_DAMAGED", error.to_string()).next(next).into()
            }
            _ => failure(error),
        }
    }
}

const SALVAGE: &str = "add --salvage to restore everything else, or restore an earlier point: `points` lists them; \
                       `verify` tells which bytes of which volume are damaged";

/// The error with the exit code that is true of it.
pub(super) fn failure(error: RestoreError) -> anyhow::Error {
    let text = error.to_string();
    match error {
        RestoreError::Read(e) | RestoreError::Fetch(FetchError::Read(e)) if e.is_damage() => {
            Failure::new(Exit::Differ, "E_DAMAGED", text).next(SALVAGE).into()
        }
        // Unwrapped, so that what they mean is found by their type.
        RestoreError::Read(e) | RestoreError::Fetch(FetchError::Read(e)) => e.into(),
        RestoreError::Target(e) | RestoreError::Fetch(FetchError::Target(e)) => e.into(),
        RestoreError::Fetch(e) => e.into(),
        RestoreError::Request(_) => Failure::new(Exit::Usage, "E_USAGE", text).into(),
        RestoreError::Damaged(_) => Failure::new(Exit::Differ, "E_DAMAGED", text).next(SALVAGE).into(),
        RestoreError::Differs { .. } => Failure::new(Exit::Differ, "E_DIFFER", text)
            .next("run the restore again; if it differs again, do not trust the target's disk")
            .into(),
        RestoreError::Index { .. } => {
            Failure::new(Exit::Differ, "E_DAMAGED", text).next("restore another point: `points` lists them").into()
        }
    }
}

fn describe(o: &Outcome) -> String {
    let b = text::bytes;
    let mut lines = vec![format!("restored {}@{} ({}, {})", o.group, o.point, o.time, o.consistency)];
    for v in &o.volumes {
        lines.push(format!("  {} to {}: {}, digest {}", v.name, v.target, b(v.length), v.digest));
        lines.extend(text::beyond(v.beyond));
    }
    lines.push(format!(
        "  {} read to compare, {} fetched, {} written, {} read back{} (verified: {}), in {}",
        b(o.bytes_read),
        b(o.bytes_fetched),
        b(o.bytes_written),
        b(o.bytes_verified),
        if o.lost.is_empty() { " and equal" } else { "" },
        o.verified,
        text::duration(std::time::Duration::from_secs_f64(o.seconds))
    ));
    if !o.lost.is_empty() {
        lines.push(format!(
            "LOST {} ranges, gone or maybe older than the point; everything else was restored, and is equal:",
            o.lost.len()
        ));
        lines.extend(o.lost.iter().take(MAX_LINES).map(lost_line));
        if o.lost.len() > MAX_LINES {
            lines.push(format!("  and {} more: --json lists all", o.lost.len() - MAX_LINES));
        }
        let gone = |v: &&VolumeOutcome| o.lost.iter().any(|l| l.loss == Loss::Gone && l.volume == v.name);
        for v in o.volumes.iter().filter(gone) {
            lines.push(format!("  what is gone of {} is now on {}: {}", v.name, v.target, v.lost_blocks));
        }
    }
    if !o.damaged.is_empty() {
        lines.push("damaged in the store, without loss to this restore (`verify` tells more):".into());
        lines.extend(o.damaged.iter().take(MAX_LINES).map(lost_line));
    }
    lines.join("\n")
}

pub(super) fn lost_line(l: &Lost) -> String {
    if l.start == l.end {
        return format!("  {} ({})", l.object, l.cause);
    }
    let loss = match l.loss {
        Loss::Gone => "gone",
        Loss::Uncertain => "maybe older than the point",
    };
    format!("  {} bytes {} to {}: {loss}: {} ({})", l.volume, l.start, l.end, l.object, l.cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backhaul_protocol::ids::LogSeq;

    #[test]
    fn what_is_taken_apart() {
        let what = parse_what("web/root@7").expect("right");
        assert_eq!((what.group.as_str(), what.point), ("web", PointSpec::Number(LogSeq(7))));
        assert_eq!(what.volume.map(|v| v.to_string()), Some("root".into()));
        assert_eq!(parse_what("web").expect("right").point, PointSpec::Latest);
        for bad in ["", "/", "web/", "/root", "web/a/b", "web@", "Web", "web@x@7"] {
            assert!(parse_what(bad).is_err(), "{bad}");
        }
    }
}
