//! The link between two TUN devices: standard input is the near one, standard output the far one. Every IP packet passes,
//! so that TCP is lost and delayed packet by packet as QUIC is.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::path::Path;
use crate::stats::Stats;

/// Packets of one device before the other has its turn.
const TURN: usize = 64;
/// Packets are read and sent this often at most: fewer wake-ups, and little beside the delay.
const TICK: Duration = Duration::from_micros(300);
/// While nothing is under way.
const IDLE: Duration = Duration::from_millis(2);

/// Until the end, or until a device is gone.
pub fn run(mut paths: [Path; 2], mut stats: Stats, end: Instant) -> io::Result<()> {
    let (near, far) = (io::stdin(), io::stdout());
    let devices: [BorrowedFd<'_>; 2] = [near.as_fd(), far.as_fd()];
    for device in devices {
        rustix::io::ioctl_fionbio(device, true)?;
    }
    let mut ways: [VecDeque<(Instant, Vec<u8>)>; 2] = Default::default();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let now = Instant::now();
        if now >= end {
            return Ok(());
        }
        let mut is_busy = false;
        for way in 0..2 {
            for _ in 0..TURN {
                let Ok(len) = rustix::io::read(devices[way], &mut buffer) else { break };
                is_busy = true;
                if let Some(due) = paths[way].offer(now, len) {
                    ways[way].push_back((due, buffer[..len].to_vec()));
                }
            }
            while let Some((_, packet)) = ways[way].pop_front_if(|(due, _)| *due <= now) {
                if let Some(flow) = flow(&packet) {
                    *stats.flows.entry(flow).or_default() += packet.len() as u64;
                }
                let _ = rustix::io::write(devices[1 - way], &packet);
            }
        }
        if stats.is_due(now) {
            stats.write(now, &paths)?;
        }
        if !is_busy {
            std::thread::sleep(if ways.iter().all(VecDeque::is_empty) { IDLE } else { TICK });
        }
    }
}

/// Protocol and ports of an IPv4 packet.
fn flow(packet: &[u8]) -> Option<String> {
    let header = usize::from(packet.first()? & 15) * 4;
    let port = |at: usize| Some(u16::from_be_bytes([*packet.get(header + at)?, *packet.get(header + at + 1)?]));
    let protocol = match packet.get(9)? {
        6 => "tcp",
        17 => "udp",
        _ => "other",
    };
    Some(format!("{protocol}-{}-{}", port(0)?, port(2)?))
}
