//! A long link between two programs on one machine: delay, loss, a bottleneck and its queue. There is no netem
//! everywhere, and where there is it does not count what it does to each flow.
//!
//! `far-link udp` is a UDP proxy: no rights needed, any number of clients. `far-link tun` carries all of IP between two
//! TUN devices, which it has as standard input and output: TCP and QUIC meet the same link, and each other.
//! `far_link.py` starts both. Read first: [`path::Path::offer`], then [`udp::run`] and [`tun::run`].

mod path;
mod stats;
mod tun;
mod udp;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

use path::{Path, Shape};
use stats::Stats;

#[derive(Parser)]
#[command(about = "Carries packets over a link that is long, narrow and lossy")]
struct Args {
    #[command(subcommand)]
    medium: Medium,
    /// Milliseconds each way
    #[arg(long, global = true, default_value_t = 25.0)]
    delay: f64,
    /// Part of packets that is lost at random, percent, each way
    #[arg(long, global = true, default_value_t = 0.0)]
    loss: f64,
    /// Megabits a second each way, headers included; 0: not limited
    #[arg(long, global = true, default_value_t = 1000.0)]
    rate: f64,
    /// KiB that wait before the bottleneck; default: what is under way in a round trip
    #[arg(long, global = true)]
    queue: Option<u64>,
    /// Largest IP packet
    #[arg(long, global = true, default_value_t = 1500)]
    mtu: usize,
    /// Of the random losses
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
    /// What became of packets, a line of JSON each half a second
    #[arg(long, global = true)]
    stats: Option<PathBuf>,
    /// Ends after so many seconds, whatever happens
    #[arg(long, global = true, default_value_t = 600)]
    life: u64,
}

#[derive(Subcommand)]
enum Medium {
    /// A UDP proxy
    Udp {
        /// Where clients send to
        #[arg(long)]
        listen: SocketAddr,
        /// The server
        #[arg(long)]
        to: SocketAddr,
    },
    /// Between the TUN devices that are standard input and output
    Tun,
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    let rate = (args.rate > 0.0).then_some(args.rate * 1e6 / 8.0);
    let round_trip = 2.0 * args.delay / 1e3;
    let queue = args.queue.map_or(rate.map_or(0, |r| (r * round_trip) as u64).max(64 << 10), |kib| kib << 10);
    let delay = Duration::from_secs_f64(args.delay / 1e3);
    let shape = Shape { rate, delay, loss: args.loss / 100.0, queue, largest: args.mtu };
    let now = Instant::now();
    let paths = [0, 1].map(|direction| Path::new(shape, args.seed * 2 + direction, now));
    let end = now + Duration::from_secs(args.life);
    let stats = Stats::new(args.stats)?;
    match args.medium {
        Medium::Udp { listen, to } => udp::run(listen, to, paths, stats, end),
        Medium::Tun => tun::run(paths, stats, end),
    }
}
