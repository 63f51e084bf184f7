//! What the path to the receiver carries: bytes without meaning are sent over it as a first sync's would be, on the same
//! streams, with the same congestion control; the receiver counts them and throws them away.
//!
//! Read first: [`measure`], then [`rate`].

use std::time::Duration;

use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::wire::message::{AgentMessage, CloseCode, Probed, Reason, ReceiverMessage};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::SendHalf;
use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::connection::{Connected, SessionError, in_time};

/// It is measured for so long: congestion control has found the rate of a long path within two or three.
pub const TIME: Duration = Duration::from_secs(5);
/// Questions before anything is sent, for the round trip of an idle path.
const PINGS: usize = 5;
/// Between two questions while bytes are on their way.
const LOOK: Duration = Duration::from_millis(100);
/// What is under way when the time is over takes no longer.
const DRAIN: Duration = Duration::from_secs(2);
/// As a sync has.
const STREAMS: usize = 8;
/// As a sync's pieces.
const PIECE: usize = 256 << 10;
/// What arrived in this part of the time does not count: the rate is still being looked for.
const WARM_UP: f64 = 0.4;

/// What was measured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Network {
    /// The shortest, of an idle path.
    pub round_trip: Duration,
    /// The longest that QUIC estimated while the path was full.
    pub round_trip_busy: Duration,
    /// Bytes of block streams that arrive in a second.
    pub rate: f64,
    /// That arrived in all.
    pub bytes: u64,
    /// In so much time.
    pub took: Duration,
}

/// How it fails.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The connection, or what the receiver says.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It closed the connection when it was asked.
    #[error("this receiver is of a version that can't measure; update it")]
    Unknown,
    /// Hardly anything arrived.
    #[error("too little arrived within {} s to tell a rate", TIME.as_secs())]
    TooLittle,
}

impl NetworkError {
    /// Whether another agent measures just now.
    pub fn is_busy(&self) -> bool {
        let Self::Session(SessionError::Source(SourceError::Refused(refusal))) = self else { return false };
        refusal.reason == Reason::Busy
    }
}

impl From<TransportError> for NetworkError {
    fn from(error: TransportError) -> Self {
        Self::Session(error.into())
    }
}

/// Measures the path of a connection, and ends it.
pub async fn measure(mut connected: Connected) -> Result<Network, NetworkError> {
    let measured = measure_over(&mut connected).await;
    let reason = connected.link.close_reason();
    connected.sender.finish();
    connected.link.goodbye().await;
    match (measured, reason) {
        (Err(NetworkError::Session(_)), Some(e)) if e.close_code() == Some(CloseCode::Protocol) => {
            Err(NetworkError::Unknown)
        }
        (measured, _) => measured,
    }
}

async fn measure_over(connected: &mut Connected) -> Result<Network, NetworkError> {
    let mut round_trip = Duration::MAX;
    for _ in 0..PINGS {
        let asked = Instant::now();
        ask(connected).await?;
        round_trip = round_trip.min(asked.elapsed());
    }
    if let Some(traffic) = connected.link.traffic() {
        round_trip = round_trip.min(traffic.round_trip);
    }
    let mut streams = send(connected);
    let (begun, mut looks, mut busy) = (Instant::now(), vec![ask(connected).await?], round_trip);
    while begun.elapsed() < TIME {
        tokio::time::sleep(LOOK).await;
        let probed = ask(connected).await?;
        busy = busy.max(connected.link.traffic().map_or(busy, |t| t.round_trip));
        // Once the receiver takes no more it is not known when the last of it came.
        if probed.left == 0 {
            break;
        }
        looks.push(probed);
    }
    streams.shutdown().await;
    // What is on its way has arrived with this: a goodbye would be lost in a full queue.
    let _ = tokio::time::timeout(DRAIN, ask(connected)).await;
    let rate = rate(&looks).ok_or(NetworkError::TooLittle)?;
    let bytes = looks.last().map_or(0, |look| look.bytes);
    Ok(Network { round_trip, round_trip_busy: busy, rate, bytes, took: begun.elapsed() })
}

/// Bytes a second, from what had arrived when, without the beginning.
fn rate(looks: &[Probed]) -> Option<f64> {
    let (first, last) = (looks.first()?, looks.last()?);
    let warm = first.micros + ((last.micros - first.micros) as f64 * WARM_UP) as u64;
    let from = looks.iter().find(|look| look.micros >= warm)?;
    let (bytes, micros) = (last.bytes.checked_sub(from.bytes)?, last.micros.checked_sub(from.micros)?);
    (bytes > 0 && micros > 0).then(|| bytes as f64 / (micros as f64 / 1e6))
}

/// Sends bytes that nothing on the way can make smaller, until this is ended.
fn send(connected: &Connected) -> JoinSet<()> {
    let mut noise = vec![0; PIECE];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let noise = Bytes::from(noise);
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (link, noise) = (connected.link.clone(), noise.clone());
        streams.spawn(async move {
            let Ok(stream) = link.open_blocks().await else { return };
            let mut stream = Junk(stream);
            // An error is the receiver's word that it was enough, or a connection that is gone, which the next
            // question notices.
            while stream.0.write(noise.clone()).await.is_ok() {}
        });
    }
    streams
}

/// A stream whose bytes nobody misses.
struct Junk(Box<dyn SendHalf>);

impl Drop for Junk {
    fn drop(&mut self) {
        self.0.reset();
    }
}

async fn ask(connected: &mut Connected) -> Result<Probed, NetworkError> {
    connected.sender.send(&AgentMessage::Probe).await?;
    loop {
        match in_time(connected.receiver.receive()).await? {
            Some(ReceiverMessage::Probed(probed)) => return Ok(probed),
            Some(ReceiverMessage::Waiting(_)) => {}
            Some(ReceiverMessage::Refused(refusal)) => {
                return Err(SessionError::Source(SourceError::Refused(refusal)).into());
            }
            _ => return Err(SessionError::Source(SourceError::Protocol("no answer to `Probe`")).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_a_path_which_is_full() {
        // Nothing in the first second, then 100 MB/s.
        let looks = |seconds: u64| -> Vec<Probed> {
            let at = |i: u64| Probed { bytes: i.saturating_sub(10) * 10_000_000, micros: i * 100_000, left: 1 };
            (0..=seconds * 10).map(at).collect()
        };
        let found = rate(&looks(5)).expect("there is one");
        assert!((found - 100e6).abs() < 1.0, "{found}");
        assert_eq!(rate(&looks(0)), None);
        assert_eq!(rate(&[]), None);
        assert_eq!(rate(&looks(1)), None, "nothing arrived");
    }
}
