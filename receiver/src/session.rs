//! One connection: who is it, what may it do, and the messages until it ends.
//!
//! Read first: [`run`], then [`agent::Session`] (what is said) and [`reason_to_end`] (what ends it from outside).

mod agent;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use backhaul_protocol::ids::AgentId;
use backhaul_protocol::session::sink::Peer;
use backhaul_protocol::wire::message::{AgentMessage, CloseCode, Joined, Reason, ReceiverMessage, Refusal};
use backhaul_seams::clock;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_transport::control::{self, ControlReceiver, ControlSender};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::{Link, QuicLink};
use backhaul_transport::tls::{AgentIdentity, agent_identity};
use backhaul_transport::tuning::follow;
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::access;
use crate::notices::Busy;
use crate::quota::{Full, Ticket};
use crate::server::{self, Shared};
use agent::{Heard, Session};

/// A stranger has this long to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is under way when a session is to end has this long to finish: a commit, usually; then what has arrived is
/// given up. Together with the look-ups of revocations well under 30 s.
const GRACE: Duration = Duration::from_secs(5);
/// A receiver that shuts down is in less of a hurry, and its service manager waits 90 s.
const GRACE_AT_SHUTDOWN: Duration = Duration::from_secs(15);
/// What is under way when its agent has gone has this long to finish: a commit, usually. Nobody waits for anything else.
const GONE: Duration = Duration::from_secs(60);
/// One message takes this long at most to be let out by an agent that reads.
const SLOWEST_READER: Duration = Duration::from_secs(60);
/// A look-up of a revocation that takes longer is begun anew; a store that hangs must not delay the next one.
const LOOK_UP: Duration = Duration::from_secs(5);

fn refusal(reason: Reason, text: impl Into<String>) -> Refusal {
    Refusal { reason, text: text.into() }
}

/// Serves one connection to its end.
pub async fn run(
    shared: Arc<Shared>,
    incoming: quinn::Incoming,
    handshake: Ticket<IpAddr>,
    shutdown: CancellationToken,
) {
    let from = incoming.remote_address();
    let number = shared.session_numbers.fetch_add(1, Ordering::Relaxed);
    let connecting = match incoming.accept() {
        Ok(connecting) => tokio::time::timeout(PATIENCE, connecting),
        Err(error) => return tracing::info!(%from, %error, "handshake failed"),
    };
    let connected = tokio::select! {
        biased;
        // Whoever is not in yet is not waited for.
        () = shutdown.cancelled() => return,
        connected = connecting => connected,
    };
    let connection = match connected {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::info!(%from, %error, "handshake failed"),
        Err(_) => return tracing::info!(%from, "handshake timed out"),
    };
    let identity = connection.peer_identity().and_then(|any| {
        let chain = any.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok()?;
        chain.first().cloned()
    });
    let link = QuicLink::accepted(connection);
    let served = serve(&shared, &link, identity, from, handshake, shutdown).await;
    if let Err(error) = &served {
        tracing::info!(%from, number, %error, "session ended");
    }
    close(&*link, served);
}

/// Serves an agent that has shown who it is to its end.
pub async fn run_agent(shared: Arc<Shared>, link: Arc<dyn Link>, identity: AgentIdentity, shutdown: CancellationToken) {
    let served = match welcome(&*link).await {
        Ok((sender, receiver)) => serve_agent(&shared, &link, identity, sender, receiver, shutdown).await,
        Err(error) => Err(error),
    };
    close(&*link, served);
}

/// Closes with what the other side may make of it: whether coming again helps.
fn close(link: &dyn Link, served: Result<CloseCode, TransportError>) {
    let code = served.unwrap_or_else(|e| if e.is_retryable() { CloseCode::Done } else { CloseCode::Protocol });
    let text = match code {
        CloseCode::Done => "",
        CloseCode::Superseded => "a newer session of the same group took over",
        CloseCode::Revoked => "this agent was revoked",
        CloseCode::ShuttingDown => "the receiver is shutting down",
        CloseCode::Protocol => "the protocol was broken",
        CloseCode::Refused => "refused",
    };
    link.close(code, text);
}

async fn welcome(
    link: &dyn Link,
) -> Result<(ControlSender<ReceiverMessage>, ControlReceiver<AgentMessage>), TransportError> {
    if planted(Mutant::HelloWaitedFor) {
        return control::welcome(link).await;
    }
    let welcome = tokio::time::timeout(PATIENCE, control::welcome(link));
    welcome.await.map_err(|_| TransportError::Timeout(PATIENCE))?
}

async fn serve(
    shared: &Arc<Shared>,
    link: &Arc<dyn Link>,
    identity: Option<CertificateDer<'static>>,
    from: SocketAddr,
    handshake: Ticket<IpAddr>,
    shutdown: CancellationToken,
) -> Result<CloseCode, TransportError> {
    let ticket = match identity {
        Some(_) => None,
        None => match shared.strangers.enter(server::origin(from)) {
            Ok(ticket) => Some(ticket),
            Err(_) => {
                tracing::info!("as many connections without a certificate as there may be: closed one");
                return Ok(CloseCode::ShuttingDown);
            }
        },
    };
    let handshake = ticket.is_none().then_some(handshake);
    let (sender, mut receiver) = tokio::select! {
        biased;
        () = shutdown.cancelled() => return Ok(CloseCode::ShuttingDown),
        welcome = welcome(&**link) => welcome?,
    };
    // Until here who has a certificate is one of those who have not said what they want.
    drop(handshake);
    let Some(certificate) = identity else {
        let served = serve_stranger(shared, sender, &mut receiver).await;
        drop(ticket);
        return served;
    };
    let identity = agent_identity(&certificate)?;
    serve_agent(shared, link, identity, sender, receiver, shutdown).await
}

/// Without a certificate one message is heard: `Join`.
async fn serve_stranger(
    shared: &Shared,
    mut sender: ControlSender<ReceiverMessage>,
    receiver: &mut ControlReceiver<AgentMessage>,
) -> Result<CloseCode, TransportError> {
    let message = tokio::time::timeout(PATIENCE, receiver.receive()).await;
    let answer = match message.map_err(|_| TransportError::Timeout(PATIENCE))?? {
        Some(AgentMessage::Join(join)) => {
            let joined = access::join(&shared.catalog, &shared.authority.0, &join, clock::now()).await;
            joined.map_err(|e| e.refusal())
        }
        _ => Err(refusal(Reason::Authentication, "this agent shows no certificate: join first")),
    };
    let code = if answer.is_ok() { CloseCode::Done } else { CloseCode::Refused };
    if let Err(refused) = &answer {
        tracing::warn!(reason = %refused, "refused to let a server join");
    }
    let joined = answer.as_ref().ok().cloned();
    sender.send(&answer.map_or_else(ReceiverMessage::Refused, ReceiverMessage::Joined)).await?;
    if let Some(joined) = joined
        && tokio::time::timeout(LOOK_UP, has_joined(shared, &joined)).await.is_err()
    {
        tracing::warn!("could not note in time that an agent joined");
    }
    farewell(sender, receiver).await;
    Ok(code)
}

async fn has_joined(shared: &Shared, joined: &Joined) {
    if let Err(error) = shared.joined(joined.group).await {
        tracing::warn!(%error, "could not look whether the group is new; its first session looks");
    }
    if let Some(Ok(identity)) = joined.certificates.first().map(|certificate| agent_identity(certificate))
        && let Err(error) = shared.seen.note(&*shared.catalog.store, &identity).await
    {
        tracing::warn!(%error, "could not note when the agent was seen");
    }
}

/// The last message must arrive before the connection goes: the agent closes its side when it has it.
async fn farewell(mut sender: ControlSender<ReceiverMessage>, receiver: &mut ControlReceiver<AgentMessage>) {
    sender.finish();
    let _ = tokio::time::timeout(Duration::from_secs(2), async { while let Ok(Some(_)) = receiver.receive().await {} })
        .await;
}

async fn serve_agent(
    shared: &Arc<Shared>,
    link: &Arc<dyn Link>,
    identity: AgentIdentity,
    sender: ControlSender<ReceiverMessage>,
    mut receiver: ControlReceiver<AgentMessage>,
    shutdown: CancellationToken,
) -> Result<CloseCode, TransportError> {
    let (out, mut outgoing) = mpsc::channel::<ReceiverMessage>(64);
    let deaf = link.clone();
    let writer = tokio::spawn(async move {
        let mut sender = sender;
        while let Some(message) = outgoing.recv().await {
            // An agent that takes nothing more holds what others could have.
            if !matches!(tokio::time::timeout(SLOWEST_READER, sender.send(&message)).await, Ok(Ok(()))) {
                deaf.close(CloseCode::Done, "nothing that was sent is read");
                break;
            }
        }
        sender.finish();
        // A connection that is closed takes with it what has not arrived, be it the answer to a commit.
        sender.delivered().await;
    });
    let busy = Busy::default();
    let notices = crate::notices::tell(shared.catalog.store.waits(), busy.clone(), out.clone());
    let (inbox, mut messages) = mpsc::channel(16);
    let reader = tokio::spawn(async move {
        loop {
            let message = receiver.receive().await;
            let last = !matches!(message, Ok(Some(_)));
            if inbox.send(message).await.is_err() || last {
                break;
            }
        }
    });
    let (known, ticket) = match admit(shared, &identity).await {
        Ok(admitted) => admitted,
        Err(refused) => {
            tracing::warn!(agent = %identity.agent, reason = %refused, "refused a session");
            let _ = out.send(ReceiverMessage::Refused(refused)).await;
            drop(notices);
            return Ok(end(out, writer, reader, &mut messages, CloseCode::Refused).await);
        }
    };
    let mut window = shared.credit.grant();
    link.allow(window.bytes());
    let mut session = Session::new(shared.clone(), identity, known, link.clone(), out.clone(), busy);
    let (stop, stopping) = watch::channel(None);
    let reason = reason_to_end(shared, &identity, link, session.superseded(), &shutdown);
    let result = {
        let mut work = std::pin::pin!(session.work(&mut messages, stopping));
        let following = async {
            follow(Arc::downgrade(link), &mut window).await;
            std::future::pending().await
        };
        tokio::select! {
            biased;
            code = reason => {
                let _ = stop.send(Some(code));
                let grace = if code == CloseCode::ShuttingDown { GRACE_AT_SHUTDOWN } else { GRACE };
                match tokio::time::timeout(grace, work).await {
                    Ok(Ok(_)) => Ok(code),
                    Ok(Err(error)) => Err(error),
                    Err(_) => {
                        tracing::warn!(agent = %identity.agent, "cut off in the middle of its work");
                        Ok(code)
                    }
                }
            }
            result = &mut work => result,
            never = following => never,
        }
    };
    // A store that hangs must not keep the group from the next session: what had arrived is sent again, then.
    if tokio::time::timeout(GRACE, session.finish()).await.is_err() {
        tracing::warn!(agent = %identity.agent, "could not keep what had arrived in time; it is sent again");
    }
    // They hold senders of their own: with them the writer would wait for messages that never come.
    drop((session, notices));
    let code = end(out, writer, reader, &mut messages, *result.as_ref().unwrap_or(&CloseCode::Done)).await;
    match &result {
        Err(_) if planted(Mutant::PlaceKept) => std::mem::forget(ticket),
        Err(_) if planted(Mutant::CreditKept) => std::mem::forget(window),
        _ => {}
    }
    result.map(|_| code)
}

/// Waits until the session must end whatever it is doing: it was taken over, its agent was revoked or has gone, the
/// server stops.
async fn reason_to_end(
    shared: &Shared,
    identity: &AgentIdentity,
    link: &Arc<dyn Link>,
    superseded: Arc<Notify>,
    shutdown: &CancellationToken,
) -> CloseCode {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => CloseCode::ShuttingDown,
        () = superseded.notified() => CloseCode::Superseded,
        () = revoked(shared, identity) => CloseCode::Revoked,
        () = gone(&**link) => CloseCode::Done,
    }
}

/// Waits until the agent has been gone for a while: a commit that it asked for may still succeed.
async fn gone(link: &dyn Link) {
    if planted(Mutant::GoneNotNoticed) {
        return std::future::pending().await;
    }
    link.closed().await;
    tokio::time::sleep(GONE).await;
}

/// Waits until the agent is revoked, and notes now and then that it is here.
async fn revoked(shared: &Shared, identity: &AgentIdentity) {
    let mut every = tokio::time::interval(shared.settings.revocation_check);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    every.reset();
    if planted(Mutant::RevokedStays) {
        return std::future::pending().await;
    }
    loop {
        every.tick().await;
        match tokio::time::timeout(LOOK_UP, access::is_revoked(&shared.catalog, identity.agent)).await {
            Ok(Ok(true)) => return,
            Ok(Ok(false)) => {
                let seen = shared.seen.note(&*shared.catalog.store, identity);
                if !matches!(tokio::time::timeout(LOOK_UP, seen).await, Ok(Ok(()))) {
                    tracing::warn!(agent = %identity.agent, "could not note when the agent was seen");
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "could not look up revocations"),
            Err(_) => tracing::warn!("looking up revocations takes long; trying again"),
        }
    }
}

/// Sends what is still to be sent and waits shortly until the agent has it.
async fn end(
    out: mpsc::Sender<ReceiverMessage>,
    writer: tokio::task::JoinHandle<()>,
    reader: tokio::task::JoinHandle<()>,
    messages: &mut mpsc::Receiver<Heard>,
    code: CloseCode,
) -> CloseCode {
    drop(out);
    if planted(Mutant::RefusalCutOff) {
        reader.abort();
        return code;
    }
    let _ = tokio::time::timeout(Duration::from_secs(2), writer).await;
    if code == CloseCode::Refused {
        // Messages that were sent before the refusal was read are passed over; the agent hangs up when it has it.
        let drain = async { while let Some(Ok(Some(_))) = messages.recv().await {} };
        let _ = tokio::time::timeout(Duration::from_secs(2), drain).await;
    }
    reader.abort();
    code
}

/// Whether the agent may come in at all.
async fn admit(shared: &Shared, identity: &AgentIdentity) -> Result<(Peer, Ticket<AgentId>), Refusal> {
    let ticket = shared.sessions.enter(identity.agent).map_err(|full| match full {
        Full::All => refusal(Reason::Busy, "this receiver has as many sessions as it may have: come again"),
        Full::Own => refusal(Reason::Busy, "this agent has as many sessions as it may have: come again"),
    })?;
    if access::is_revoked(&shared.catalog, identity.agent).await.map_err(|e| e.refusal())? {
        return Err(refusal(Reason::Authentication, "this agent was revoked"));
    }
    let joined = access::joined_agent(&shared.catalog, identity).await.map_err(|e| e.refusal())?;
    Ok((Peer { agent: identity.agent, joined_machine: joined.machine }, ticket))
}

#[cfg(test)]
mod tests;
