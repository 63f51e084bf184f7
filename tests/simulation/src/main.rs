//! Runs simulated histories, replays one, shortens one.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use backhaul_seams::mutant::Mutant;
use backhaul_simulation::history::Trace;
use backhaul_simulation::plan::Plan;
use backhaul_simulation::search::{Until, run_caught, search, shrink};
use clap::Parser;

/// Simulated histories of agents, receivers and what goes wrong
#[derive(Parser)]
struct Args {
    /// How many seeds, from --from on
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Stop after so many hours, whatever --seeds says
    #[arg(long)]
    hours: Option<f64>,
    /// Histories at once
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(2, usize::from))]
    threads: usize,
    /// Plant this mistake
    #[arg(long)]
    mutant: Option<Mutant>,
    /// Run one seed and print everything that happens
    #[arg(long)]
    replay: Option<u64>,
    /// Run a stored list of operations and print everything that happens
    #[arg(long)]
    file: Option<PathBuf>,
    /// Make the replayed history as short as it can be, and store its operations here
    #[arg(long)]
    shrink: Option<PathBuf>,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if std::env::var_os("RUST_LOG").is_some() {
        tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    }
    let plan = match (&args.file, args.replay) {
        (Some(file), _) => {
            let text = std::fs::read(file).with_context(|| file.display().to_string())?;
            Some(serde_json::from_slice(&text)?)
        }
        (None, Some(seed)) => Some(Plan::of(seed)),
        (None, None) => None,
    };
    match plan {
        Some(plan) => replay(&args, plan),
        None => many(&args),
    }
}

fn replay(args: &Args, mut plan: Plan) -> anyhow::Result<()> {
    if let Some(file) = &args.shrink {
        plan = shrink(&plan, args.mutant, Duration::from_secs(300));
        std::fs::write(file, serde_json::to_vec_pretty(&plan)?)?;
        println!("{} operations are left, in {}", plan.ops.len(), file.display());
    }
    let report = run_caught(&plan, args.mutant, Trace::Keep);
    report.lines.iter().for_each(|line| println!("{line}"));
    println!("digest {}", report.digest);
    finish(&report.violations)
}

fn many(args: &Args) -> anyhow::Result<()> {
    let until = Until {
        time: args.hours.map(|h| Duration::from_secs_f64(h * 3600.0)),
        failures: if args.keep_going { usize::MAX } else { 1 },
    };
    let end = if args.hours.is_some() { u64::MAX } else { args.from + args.seeds };
    let began = std::time::Instant::now();
    let found = search(args.from..end, args.mutant, args.threads, until);
    for (situation, count) in &found.situations {
        println!("{situation:<32} {count:>9} times in {:>7} histories", found.histories_with[situation]);
    }
    println!(
        "{} histories of {} operations in {:.1} s",
        found.histories,
        found.operations,
        began.elapsed().as_secs_f64()
    );
    for (seed, violations) in &found.failures {
        violations.iter().for_each(|v| println!("seed {seed}: {v}"));
    }
    finish(&found.failures.into_values().flatten().collect::<Vec<_>>())
}

fn finish(violations: &[String]) -> anyhow::Result<()> {
    match violations {
        [] => Ok(()),
        [first, ..] => Err(anyhow::anyhow!("{} violations, the first: {first}", violations.len())),
    }
}
