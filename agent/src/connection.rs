//! A connection to the receiver: found, authenticated, its certificate renewed in time.
//!
//! Read first: [`connect`] and [`Session`].

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use backhaul_protocol::session::source::{Source, SourceError, SourceOutput};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::message::{AgentMessage, ReceiverMessage};
use backhaul_seams::clock;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_transport::authority::AGENT_LIFE;
use backhaul_transport::control::{self, ControlReceiver, ControlSender};
use backhaul_transport::endpoint::{Endpoint, Windows};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::{Link, QuicLink};
use backhaul_transport::tls::{ReceiverTrust, TlsError, agent_identity, client_config};
use backhaul_transport::tuning::{Tuning, Unshared, follow};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::state::{Joined, StateDir, StateError};

/// How long an answer of the receiver may take. One that waits for its store says so meanwhile, which counts as one.
const PATIENCE: Duration = Duration::from_secs(120);

/// A certificate is renewed when two thirds of its life are over, milliseconds.
const RENEWED_BELOW: i64 = AGENT_LIFE.as_millis() as i64 / 3;
/// A connection attempt that is not answered for so long gets company: longer than a round trip on a bad path.
const NEXT_ATTEMPT: Duration = Duration::from_secs(3);

/// How a session fails.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection.
    #[error("{0}")]
    Transport(#[from] TransportError),
    /// The receiver said no, or something wrong, or nothing.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<TlsError> for SessionError {
    fn from(error: TlsError) -> Self {
        Self::Transport(error.into())
    }
}

impl SessionError {
    /// Whether connecting again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Transport(e) => e.is_retryable(),
            Self::Source(e) => e.is_retryable(),
            Self::State(e) => e.is_retryable(),
        }
    }
}

/// The first IP address of HOST:PORT.
pub async fn resolve(address: &str) -> Result<SocketAddr, TransportError> {
    let failed = |cause| TransportError::Resolve { address: address.to_owned(), cause };
    let mut found = tokio::net::lookup_host(address).await.map_err(failed)?;
    found.next().ok_or_else(|| failed(std::io::Error::other("it has no address")))
}

/// The clock, as messages have it.
pub fn unix_millis() -> UnixMillis {
    UnixMillis(clock::unix_millis())
}

/// An authenticated connection, its control stream greeted.
pub struct Connected {
    /// Block streams go here.
    pub link: Arc<dyn Link>,
    /// Messages go out here.
    pub sender: ControlSender<AgentMessage>,
    /// Messages come in here.
    pub receiver: ControlReceiver<ReceiverMessage>,
}

/// Connects as the agent that joined. Renews the certificate where two thirds of its life are over.
pub async fn connect(
    state: &StateDir,
    joined: &Joined,
    address: Option<&str>,
    tuning: Tuning,
) -> Result<Connected, SessionError> {
    let mut connected = connect_once(state, address.unwrap_or(&joined.receiver), tuning).await?;
    let left = certificate_life(state)?;
    if left < RENEWED_BELOW {
        match renew(state, &mut connected).await {
            // The session must be that of the new certificate: it may last longer than the old one.
            Ok(()) => {
                connected.link.goodbye().await;
                connected = connect_once(state, address.unwrap_or(&joined.receiver), tuning).await?;
            }
            Err(error) if left <= 0 => return Err(error),
            Err(error) => tracing::warn!(%error, "could not renew the certificate; tried again at the next connection"),
        }
    }
    Ok(connected)
}

/// Milliseconds that are left of the agent's certificate, negative when it has ended.
fn certificate_life(state: &StateDir) -> Result<i64, SessionError> {
    let identity = agent_identity(&state.chain()?[0])?;
    Ok(identity.not_after.0.saturating_sub(unix_millis().0))
}

/// Whether the certificate should be renewed, which happens at the next [`connect`].
pub fn renewal_is_due(state: &StateDir) -> Result<bool, SessionError> {
    Ok(certificate_life(state)? < RENEWED_BELOW)
}

async fn connect_once(state: &StateDir, address: &str, tuning: Tuning) -> Result<Connected, SessionError> {
    let address = resolve(address).await?;
    connect_from(Endpoint::client(address, tuning)?, state, address).await
}

/// Connects from an endpoint that is given, as the agent that joined.
pub async fn connect_from(
    endpoint: Endpoint,
    state: &StateDir,
    address: SocketAddr,
) -> Result<Connected, SessionError> {
    let chain = state.chain()?;
    let key = state.ensure_key()?;
    let authority = chain.last().cloned().ok_or(TlsError::NotAnAgent)?;
    // Only the own certificate is sent: the receiver has the authority's.
    let tls = client_config(ReceiverTrust::Authority(authority), Some((chain[..1].to_vec(), &key)))?;
    let connection = first_answer(|| endpoint.connect(address, tls.clone(), Windows::BLOCKS)).await?;
    let connected = greet(QuicLink::connected(endpoint, connection)).await?;
    let link = Arc::downgrade(&connected.link);
    tokio::spawn(async move { follow(link, &mut Unshared::default()).await });
    Ok(connected)
}

/// Connects, and begins anew every few seconds while nothing answers. QUIC doubles the time between its tries: a
/// receiver that is back would wait for the next one for as long as it was away. On a slow path the first attempt is
/// the one that is answered.
async fn first_answer<T, F>(begin: impl Fn() -> F) -> Result<T, TransportError>
where
    F: Future<Output = Result<T, TransportError>>,
{
    let mut attempts = Vec::new();
    if planted(Mutant::OneAttemptToConnect) {
        return begin().await;
    }
    loop {
        attempts.push(Box::pin(begin()));
        let answer = std::future::poll_fn(|cx| {
            let mut at = 0;
            while at < attempts.len() {
                match attempts[at].as_mut().poll(cx) {
                    Poll::Pending => at += 1,
                    // The receiver gave up on this one while it could not be heard, and not on the others.
                    Poll::Ready(Err(error)) if error.is_given_up() && attempts.len() > 1 => drop(attempts.remove(at)),
                    ready => return ready,
                }
            }
            Poll::Pending
        });
        // The first one that is not answered within its idle timeout ends it.
        if let Ok(answered) = tokio::time::timeout(NEXT_ATTEMPT, answer).await {
            return answered;
        }
    }
}

/// What the receiver should answer at once. A connection alone does not tell that it will: it is kept alive by a thread
/// of its own.
pub async fn in_time<T>(answer: impl Future<Output = Result<T, TransportError>>) -> Result<T, TransportError> {
    if planted(Mutant::GreetingWaitedFor) {
        return answer.await;
    }
    tokio::time::timeout(PATIENCE, answer).await.map_err(|_| TransportError::Timeout(PATIENCE))?
}

/// Greets; where the connection was closed meanwhile, the reason of that is the error.
pub async fn greet(link: Arc<dyn Link>) -> Result<Connected, TransportError> {
    match in_time(control::greet(&*link)).await {
        Ok((sender, receiver)) => Ok(Connected { link, sender, receiver }),
        Err(error) => Err(link.close_reason().unwrap_or(error)),
    }
}

async fn renew(state: &StateDir, connected: &mut Connected) -> Result<(), SessionError> {
    let request = state.ensure_key()?.request()?;
    connected.sender.send(&AgentMessage::Renew { request }).await?;
    loop {
        match in_time(connected.receiver.receive()).await? {
            Some(ReceiverMessage::Waiting(waiting)) => tracing::warn!("{waiting}"),
            Some(ReceiverMessage::Renewed { certificates }) => return Ok(state.write_chain(&certificates)?),
            Some(ReceiverMessage::Refused(refusal)) => return Err(SourceError::Refused(refusal).into()),
            _ => return Err(SourceError::Protocol("no answer to `Renew`").into()),
        }
    }
}

/// The writing session: the state machine, its messages, its clock.
pub struct Session {
    /// Block streams go here.
    pub link: Arc<dyn Link>,
    sender: ControlSender<AgentMessage>,
    inbox: mpsc::Receiver<Result<Option<ReceiverMessage>, TransportError>>,
    machine: Source,
    ready: VecDeque<SourceOutput>,
    started: Instant,
    message_bytes: [Arc<AtomicU64>; 2],
}

impl Session {
    /// From a connection.
    pub fn new(connected: Connected) -> Self {
        let Connected { link, sender, mut receiver } = connected;
        let (forward, inbox) = mpsc::channel(64);
        let message_bytes = [sender.bytes(), receiver.bytes()];
        // A task of its own: receiving must not be cut off in the middle of a message.
        tokio::spawn(async move {
            loop {
                let mut message = receiver.receive().await;
                // Said here, whatever the session is busy with.
                if let Ok(Some(ReceiverMessage::Waiting(waiting))) = &message {
                    tracing::warn!("{waiting}");
                    if planted(Mutant::WaitingNotHeard) {
                        continue;
                    }
                    if planted(Mutant::WaitingIsABreak) {
                        message = Ok(None);
                    }
                }
                let last = !matches!(message, Ok(Some(_)));
                if forward.send(message).await.is_err() || last {
                    break;
                }
            }
        });
        Self {
            link,
            sender,
            inbox,
            machine: Source::new(if planted(Mutant::AnswerWaitedFor) { PATIENCE * 1000 } else { PATIENCE }),
            ready: VecDeque::new(),
            started: Instant::now(),
            message_bytes,
        }
    }

    /// The machine, and what time it is for it.
    pub fn machine(&mut self) -> (&mut Source, Duration) {
        (&mut self.machine, self.started.elapsed())
    }

    /// Bytes of all messages in both directions so far.
    pub fn message_bytes(&self) -> u64 {
        self.message_bytes.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    /// A message that is no question.
    pub async fn tell(&mut self, message: &AgentMessage) -> Result<(), SessionError> {
        Ok(self.sender.send(message).await?)
    }

    /// Sends what the machine wants sent. Not cancel safe.
    pub async fn send_pending(&mut self) -> Result<(), SessionError> {
        while let Some(output) = self.machine.poll_output() {
            match output {
                SourceOutput::Send(message) => self.sender.send(&message).await?,
                other => self.ready.push_back(other),
            }
        }
        Ok(())
    }

    /// Waits for the next thing to know. Cancel safe after [`Self::send_pending`].
    pub async fn next(&mut self) -> Result<SourceOutput, SessionError> {
        loop {
            self.send_pending().await?;
            match self.ready.pop_front() {
                Some(SourceOutput::Failed(error)) => return Err(error.into()),
                Some(output) => return Ok(output),
                None => {}
            }
            let deadline = self.machine.poll_timeout().map(|d| self.started + d);
            let timeout = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                message = self.inbox.recv() => match message {
                    Some(Ok(Some(message))) => self.machine.handle_message(self.started.elapsed(), message),
                    Some(Err(error)) => return Err(error.into()),
                    Some(Ok(None)) | None => return Err(self.lost().into()),
                },
                () = timeout => self.machine.handle_timeout(self.started.elapsed()),
            }
        }
    }

    /// Why the connection is gone.
    pub fn lost(&self) -> TransportError {
        self.link.close_reason().unwrap_or_else(|| TransportError::Stream("the receiver ended the session".into()))
    }

    /// Says goodbye.
    pub async fn close(mut self) {
        self.sender.finish();
        self.link.goodbye().await;
    }
}
