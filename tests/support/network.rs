//! A network in between: passes datagrams on, loses some, holds all, or is cut. Read [`Network`].

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the network does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weather {
    /// Everything arrives.
    Fine,
    /// Of a thousand datagrams so many are lost, in both directions.
    Losing(u32),
    /// Nothing arrives.
    Cut,
    /// Everything arrives; from agents only so many bytes of UDP payload a second, with a queue of what a socket holds.
    Narrow(u64),
}

#[derive(Debug)]
struct Shared {
    /// Of a thousand datagrams so many are lost.
    lost: AtomicU32,
    /// Bytes a second upwards; 0 is any number.
    rate: AtomicU64,
    bytes_up: AtomicU64,
    stop: AtomicBool,
    drawn: AtomicU64,
}

/// A UDP forwarder on a port of its own.
#[derive(Debug)]
pub struct Network {
    address: SocketAddr,
    to: Arc<Mutex<SocketAddr>>,
    shared: Arc<Shared>,
}

impl Network {
    /// Forwards to a receiver.
    pub fn to(receiver: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let address = front.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            lost: AtomicU32::new(0),
            rate: AtomicU64::new(0),
            bytes_up: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            drawn: AtomicU64::new(0),
        });
        let to = Arc::new(Mutex::new(receiver));
        let (own, own_to) = (shared.clone(), to.clone());
        std::thread::spawn(move || up(&front, &own_to, &own));
        Self { address, to, shared }
    }

    /// Where agents find it.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// A receiver that was started again has another port; new flows go there.
    pub fn point_to(&self, receiver: SocketAddr) {
        *self.to.lock().expect("nobody panics with it") = receiver;
    }

    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        let lost = match weather {
            Weather::Fine | Weather::Narrow(_) => 0,
            Weather::Losing(n) => n,
            Weather::Cut => 1000,
        };
        let rate = if let Weather::Narrow(rate) = weather { rate } else { 0 };
        self.shared.rate.store(rate, Ordering::Relaxed);
        self.shared.lost.store(lost, Ordering::Relaxed);
    }

    /// Bytes of UDP payload from agents so far, without what was lost.
    pub fn bytes_up(&self) -> u64 {
        self.shared.bytes_up.load(Ordering::Relaxed)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn is_lost(&self) -> bool {
        let lost = self.lost.load(Ordering::Relaxed);
        // Spread evenly enough: a multiplicative sequence over a thousand.
        lost > 0 && self.drawn.fetch_add(1, Ordering::Relaxed).wrapping_mul(619) % 1000 < u64::from(lost)
    }
}

const LOOK_UP: Duration = Duration::from_millis(50);

fn up(front: &UdpSocket, to: &Mutex<SocketAddr>, shared: &Arc<Shared>) {
    front.set_read_timeout(Some(LOOK_UP)).expect("a legal timeout");
    let mut flows: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut buffer = vec![0; 1 << 16];
    let mut free_at = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        let Ok((len, from)) = front.recv_from(&mut buffer) else { continue };
        let rate = shared.rate.load(Ordering::Relaxed);
        if rate > 0 {
            free_at = free_at.max(Instant::now()) + Duration::from_secs_f64(len as f64 / rate as f64);
            // Sleeps are never shorter than some tenths of a millisecond.
            let ahead = free_at.saturating_duration_since(Instant::now());
            if ahead > Duration::from_millis(2) {
                std::thread::sleep(ahead);
            }
        }
        if shared.is_lost() {
            continue;
        }
        let flow = flows.entry(from).or_insert_with(|| {
            let back = UdpSocket::bind("127.0.0.1:0").expect("a free port");
            back.connect(*to.lock().expect("nobody panics with it")).expect("an address");
            let (own, front) = (back.try_clone().expect("a socket"), front.try_clone().expect("a socket"));
            let shared = shared.clone();
            std::thread::spawn(move || down(&own, &front, from, &shared));
            back
        });
        shared.bytes_up.fetch_add(len as u64, Ordering::Relaxed);
        // A receiver that was killed answers with an ICMP error: like a lost datagram.
        let _ = flow.send(&buffer[..len]);
    }
}

fn down(back: &UdpSocket, front: &UdpSocket, agent: SocketAddr, shared: &Shared) {
    back.set_read_timeout(Some(LOOK_UP)).expect("a legal timeout");
    let mut buffer = vec![0; 1 << 16];
    while !shared.stop.load(Ordering::Relaxed) {
        match back.recv(&mut buffer) {
            Ok(len) if !shared.is_lost() => drop(front.send_to(&buffer[..len], agent)),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            // A receiver that is gone: not to be busy about it.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
