//! The link as a UDP proxy. Receives many datagrams at a time and sends equal ones together, as QUIC stacks do: at
//! 1 Gbit/s it must leave the CPU to the two ends.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};

use crate::path::Path;
use crate::stats::Stats;

/// Headers of IPv4 and UDP, which take room on the link too.
const HEADERS: usize = 28;
/// The kernel gives twice of what is asked for, up to net.core.rmem_max.
const BUFFER: usize = 16 << 20;
/// Datagrams are received and sent this often at most: fewer and larger sends, and little beside the delay.
const TICK: Duration = Duration::from_micros(300);
/// While nothing is under way.
const IDLE: Duration = Duration::from_millis(2);

struct Socket {
    socket: UdpSocket,
    state: UdpSocketState,
}

/// A datagram under way.
struct Packet {
    due: Instant,
    /// Towards the server by this client's socket, or to this client.
    client: usize,
    bytes: Vec<u8>,
}

struct Proxy {
    front: Socket,
    /// One for each client.
    backs: Vec<(SocketAddr, Socket)>,
    clients: HashMap<SocketAddr, usize>,
    to: SocketAddr,
    paths: [Path; 2],
    ways: [VecDeque<Packet>; 2],
    stats: Stats,
    joined: Vec<u8>,
}

impl Socket {
    fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        let state = UdpSocketState::new((&socket).into())?;
        state.set_recv_buffer_size((&socket).into(), BUFFER)?;
        state.set_send_buffer_size((&socket).into(), BUFFER)?;
        Ok(Self { socket, state })
    }
}

/// Until the end.
pub fn run(listen: SocketAddr, to: SocketAddr, paths: [Path; 2], stats: Stats, end: Instant) -> io::Result<()> {
    let front = Socket::bind(listen)?;
    let mut proxy = Proxy {
        front,
        backs: Vec::new(),
        clients: HashMap::new(),
        to,
        paths,
        ways: Default::default(),
        stats,
        joined: Vec::new(),
    };
    println!("listening on {}", proxy.front.socket.local_addr()?);
    let mut buffer = vec![0; BATCH_SIZE << 16];
    loop {
        let now = Instant::now();
        if now >= end {
            return Ok(());
        }
        let mut is_busy = false;
        for i in 0..=proxy.backs.len() {
            is_busy |= proxy.receive(i.checked_sub(1), &mut buffer)?;
        }
        for way in 0..2 {
            proxy.send_due(way, now);
        }
        if proxy.stats.is_due(now) {
            proxy.stats.write(now, &proxy.paths)?;
        }
        if !is_busy {
            std::thread::sleep(if proxy.ways.iter().all(VecDeque::is_empty) { IDLE } else { TICK });
        }
    }
}

impl Proxy {
    /// From clients, or from the server for one client; whether there was anything.
    fn receive(&mut self, back: Option<usize>, buffer: &mut [u8]) -> io::Result<bool> {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let socket = back.map_or(&self.front, |i| &self.backs[i].1);
        let received = {
            let mut slices: Vec<IoSliceMut> = buffer.chunks_mut(1 << 16).map(IoSliceMut::new).collect();
            socket.state.recv((&socket.socket).into(), &mut slices, &mut metas)
        };
        let count = match received {
            Ok(count) => count,
            // A server that is gone answers with an ICMP error: like a lost datagram.
            Err(_) => return Ok(false),
        };
        let (way, now) = (usize::from(back.is_some()), Instant::now());
        for (meta, data) in metas[..count].iter().zip(buffer.chunks(1 << 16)) {
            let client = match back {
                Some(client) => client,
                None => self.client(meta.addr)?,
            };
            for datagram in data[..meta.len].chunks(meta.stride.max(1)) {
                if let Some(due) = self.paths[way].offer(now, datagram.len() + HEADERS) {
                    self.ways[way].push_back(Packet { due, client, bytes: datagram.to_vec() });
                }
            }
        }
        Ok(true)
    }

    fn client(&mut self, address: SocketAddr) -> io::Result<usize> {
        if let Some(client) = self.clients.get(&address) {
            return Ok(*client);
        }
        let back = Socket::bind((Ipv4Addr::LOCALHOST, 0).into())?;
        self.backs.push((address, back));
        self.clients.insert(address, self.backs.len() - 1);
        Ok(self.backs.len() - 1)
    }

    /// Sends what is due; neighbours of one size and one flow together.
    fn send_due(&mut self, way: usize, until: Instant) {
        while let Some(first) = self.ways[way].pop_front_if(|p| p.due <= until) {
            let (client, size) = (first.client, first.bytes.len());
            let (address, back) = &self.backs[client];
            let (socket, destination) = if way == 0 { (back, self.to) } else { (&self.front, *address) };
            self.joined.clear();
            self.joined.extend_from_slice(&first.bytes);
            let (mut count, most) = (1, socket.state.max_gso_segments().min(65_000 / size.max(1)));
            // Only the last may be shorter.
            while count < most
                && self.joined.len() == count * size
                && let Some(next) =
                    self.ways[way].pop_front_if(|p| p.due <= until && p.client == client && p.bytes.len() <= size)
            {
                self.joined.extend_from_slice(&next.bytes);
                count += 1;
            }
            *self.stats.flows.entry(format!("{}{}", ["up-", "down-"][way], client)).or_default() +=
                self.joined.len() as u64;
            let segment_size = (count > 1).then_some(size);
            let contents = &self.joined;
            let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
            // A send buffer that is full: the datagram is lost, as in a router.
            let _ = socket.state.send((&socket.socket).into(), &transmit);
        }
    }
}
