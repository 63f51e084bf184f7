//! What was found and what follows, for people.
//!
//! Read first: [`text`].

use std::fmt::Write as _;
use std::time::Duration;

use backhaul_cli::text as human;

use super::Estimate;
use super::forecast::{Forecast, Given, Limit, Policy};
use super::report::{NetworkReport, Report, VolumeReport};

fn rate(bytes: f64) -> String {
    format!("{}/s", human::bytes(bytes as u64))
}

fn seconds(s: f64) -> String {
    human::duration(Duration::from_secs_f64(s.clamp(0.0, 3e9)))
}

/// An interval as it is typed.
fn typed(s: f64) -> String {
    if s.fract() == 0.0 { format!("{s:.0}s") } else { format!("{s:.1}s") }
}

/// What to do with it, a line each.
pub(super) fn advice(forecast: &Forecast, given: &Given, volumes: &[VolumeReport]) -> Vec<String> {
    let mut lines = Vec::new();
    let asked = forecast.policies.iter().find(|p| p.every == given.every);
    let shorter = forecast.policies.iter().find(|p| p.every < given.every);
    let longer = forecast.policies.iter().find(|p| p.every > given.every && p.keeps_up == Some(true));
    let of_link = given.link.map_or(String::new(), |link| format!(", the link has {}", rate(link.rate)));
    match asked.map(|p| (p, p.keeps_up)) {
        Some((p, Some(true))) => {
            lines.push(format!("--every {} is fine: it needs {}{of_link}", typed(p.every), rate(p.needed)));
        }
        Some((p, Some(false))) => {
            let round = p.round.map_or(String::new(), |[median, _]| format!("a point takes {}", seconds(median)));
            let mut line = format!(
                "--every {} can't be kept up: {round}, it would need {}{of_link}; points come as fast as they can",
                typed(p.every),
                rate(p.needed)
            );
            if let Some(longer) = longer {
                let _ = write!(line, "; --every {} needs {} and is", typed(longer.every.round()), rate(longer.needed));
            }
            lines.push(line);
        }
        _ => lines.push("whether the link keeps up is not known: join, or name what it carries with --link".into()),
    }
    if let Some(p) = shorter {
        let verdict = match p.keeps_up {
            Some(true) => "; that fits too",
            Some(false) => "; that does not fit",
            None => "",
        };
        lines.push(format!("--every {} would need {}{of_link}{verdict}", typed(p.every), rate(p.needed)));
    }
    for v in volumes {
        if let Some(size) = v.recommended_block_size.filter(|size| *size != v.block_size) {
            let mean = |size: u32| v.block_sizes.iter().find(|s| s.block_size == size).map(|s| s.changed_per_interval);
            let now = v.changed_per_interval.mean;
            if let Some(then) = mean(size).filter(|then| *then < now * 0.5 || *then <= now * 1.25) {
                lines.push(format!(
                    "{}: block_size = \"{}KiB\" would change {} an interval instead of {}",
                    v.name,
                    size >> 10,
                    human::bytes(then as u64),
                    human::bytes(now as u64)
                ));
            }
        }
    }
    lines
}

/// For people.
pub fn text(report: &Report) -> String {
    let mut out = format!(
        "watched for {} in {} intervals of {}\n",
        seconds(report.watched_seconds),
        report.intervals,
        typed(report.every_seconds)
    );
    report.volumes.iter().for_each(|v| volume_text(v, &mut out));
    match (&report.network, &report.network_left_out) {
        (Some(n), _) => network_text(n, &mut out),
        (None, Some(why)) => line(&mut out, "link", &format!("left out: {why}")),
        _ => {}
    }
    let cpu = &report.cpu;
    let speeds = [cpu.hash_bytes_per_second, cpu.compress_bytes_per_second].map(rate);
    line(&mut out, "processor", &format!("hashes {}, compresses {}, {} threads", speeds[0], speeds[1], cpu.threads));
    report.forecast.policies.iter().for_each(|p| policy_text(p, &mut out));
    forecast_text(report, &mut out);
    report.advice.iter().for_each(|a| line(&mut out, "advice", a));
    out.trim_end().to_owned()
}

fn line(out: &mut String, label: &str, value: &str) {
    let _ = writeln!(out, "{label:<20}{value}");
}

fn estimate(e: Estimate) -> String {
    let (value, margin) = (human::bytes(e.value as u64), human::bytes(e.margin as u64));
    if e.margin < 1.0 { value } else { format!("{value} ± {margin}") }
}

fn volume_text(v: &VolumeReport, out: &mut String) {
    line(
        out,
        "volume",
        &format!("{}  {}  {}, blocks of {}", v.name, v.path, human::bytes(v.bytes), human::bytes(v.block_size.into())),
    );
    let sample = format!("{} of {} blocks looked at", v.sample_blocks, v.population_blocks);
    line(out, "  data", &format!("{}, stored as {} ({sample})", estimate(v.data_bytes), estimate(v.stored_bytes)));
    let how = match (&v.why, v.compared_share, v.round_seconds) {
        (Some(why), Some(share), Some(round)) => {
            format!("compared by reading {:.0} % of it in {}: {why}", share * 100.0, seconds(round))
        }
        _ => "as the kernel marks what is written".to_owned(),
    };
    let spread = [v.changed_per_interval.median, v.changed_per_interval.peak].map(|b| human::bytes(b as u64));
    let changed = format!("{} in all, {} an interval, {} at most", estimate(v.changed_bytes), spread[0], spread[1]);
    line(out, "  changed", &format!("{changed}; {how}"));
    if let Some(written) = v.written_bytes {
        line(out, "  written", &human::bytes(written));
    }
    if let Some(share) = v.changed_stored_share {
        let blocks = v.changed_sample_blocks;
        line(out, "  compressed", &format!("changed blocks to {:.0} % ({blocks} looked at)", share * 100.0));
    }
    let sizes: Vec<String> = v
        .block_sizes
        .iter()
        .filter(|s| s.changed_per_interval > 0.0)
        .map(|s| format!("{} KiB: {}", s.block_size >> 10, human::bytes(s.changed_per_interval as u64)))
        .collect();
    if !sizes.is_empty() {
        line(out, "  by block size", &format!("{} an interval", sizes.join(", ")));
    }
}

fn network_text(n: &NetworkReport, out: &mut String) {
    let text = match (n.round_trip_seconds, n.round_trip_busy_seconds, n.bytes, n.seconds) {
        (Some(idle), Some(busy), Some(bytes), Some(took)) => format!(
            "{} up (measured with {} in {}), round trip {:.1} ms, {:.1} ms while busy",
            rate(n.bytes_per_second),
            human::bytes(bytes),
            seconds(took),
            idle * 1e3,
            busy * 1e3
        ),
        _ => format!("{} (as given)", rate(n.bytes_per_second)),
    };
    line(out, "link", &text);
}

fn policy_text(p: &Policy, out: &mut String) {
    let changed = [p.changed.median, p.changed.peak].map(|b| human::bytes(b as u64));
    let mut text = format!("changes {}, {} at most; needs {}", changed[0], changed[1], rate(p.needed));
    if let Some([median, peak]) = p.rpo {
        let _ = write!(text, "; RPO {}, {} at the peak", seconds(median), seconds(peak));
    }
    if p.keeps_up == Some(false) {
        text.push_str("; can't be kept up");
    }
    line(out, &format!("every {}", typed(p.every)), &text);
}

fn forecast_text(report: &Report, out: &mut String) {
    let f = &report.forecast;
    let limit = |limit: Limit| match limit {
        Limit::Link => "the link",
        Limit::Cpu => "the processor",
        Limit::Disk => "the disk",
    };
    if let (Some(rate_), Some(by)) = (f.sustainable, f.limit) {
        line(out, "sustainable", &format!("{} of changed blocks, limited by {}", rate(rate_), limit(by)));
    }
    let without = if report.network.is_none() { ", without the link" } else { "" };
    line(out, "first sync", &format!("{}, limited by {}{without}", times(f.first_sync), limit(f.first_sync_limit)));
    let down = if report.network.is_none() { without } else { ", if the link is as fast down as up" };
    line(out, "restore", &format!("{}{down}", times(f.restore)));
    let r = &f.requests;
    let puts = format!("{:.0} PUTs a month for {:.0} points", r.puts_per_month, r.points_per_month);
    line(
        out,
        "requests",
        &format!("{puts}; first sync {:.0} PUTs, restore {:.0} GETs", r.first_sync_puts, r.restore_gets),
    );
    let s = &f.storage;
    let kept = format!("{} after {}", human::bytes(s.after_keep as u64), seconds(report.keep_seconds));
    let grows = format!("{} more a day", human::bytes(s.per_day as u64));
    line(out, "storage", &format!("{} at first, {grows}, {kept}; nothing is pruned yet", estimate(s.first)));
    if let Some(cost) = f.cost {
        let parts = [
            cost.puts.map(|c| format!("{c:.2} for PUTs")),
            cost.storage.map(|c| format!("{c:.2} for storage after --keep")),
        ];
        line(out, "cost a month", &parts.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
}

fn times(e: Estimate) -> String {
    if e.margin < 0.1 { seconds(e.value) } else { format!("{} ± {}", seconds(e.value), seconds(e.margin)) }
}
