//! One connection: who is it, what may it do, and the messages until it ends.
//!
//! Read first: [`run`], then [`Session::handle`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::session::sink::{Peer, Sink};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::wire::message::{AgentMessage, CloseCode, Reason, ReceiverMessage, Refusal};
use backhaul_transport::control::{self, ControlReceiver, ControlSender};
use backhaul_transport::endpoint::{self, Windows};
use backhaul_transport::error::TransportError;
use backhaul_transport::tls::{AgentIdentity, agent_identity};
use tokio::sync::{Notify, OwnedMutexGuard, mpsc, watch};
use tokio::task::JoinSet;

use crate::access::{self, unix_millis};
use crate::read_session::Reading;
use crate::round::{GroupState, Round, after_commit};
use crate::server::{GroupSlot, Shared};
use crate::view::View;

/// A stranger has this long to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// Range digests in one answer: 32 KiB of a frame of 64.
const RANGES_PER_FRAME: u64 = 1024;
/// How often what was stored is taken into the draft.
const ABSORB_INTERVAL: Duration = Duration::from_millis(250);

fn refusal(reason: Reason, text: impl Into<String>) -> Refusal {
    Refusal { reason, text: text.into() }
}

/// Counts a session for as long as it lives, however it ends.
struct Counted<'a>(&'a Shared);

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.sessions.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one connection to its end.
pub async fn run(shared: Arc<Shared>, incoming: quinn::Incoming, shutdown: watch::Receiver<bool>) {
    let from = incoming.remote_address();
    let number = shared.session_numbers.fetch_add(1, Ordering::Relaxed);
    let connection = match incoming.accept() {
        Ok(connecting) => match tokio::time::timeout(PATIENCE, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return tracing::info!(%from, %error, "handshake failed"),
            Err(_) => return tracing::info!(%from, "handshake timed out"),
        },
        Err(error) => return tracing::info!(%from, %error, "handshake failed"),
    };
    let _counted = Counted::new(&shared);
    let code = match serve(&shared, &connection, shutdown).await {
        Ok(code) => code,
        Err(error) => {
            tracing::info!(%from, number, %error, "session ended");
            CloseCode::Protocol
        }
    };
    let text = match code {
        CloseCode::Done => "",
        CloseCode::Superseded => "a newer session of the same group took over",
        CloseCode::Revoked => "this agent was revoked",
        CloseCode::ShuttingDown => "the receiver is shutting down",
        CloseCode::Protocol => "the protocol was broken",
        CloseCode::Refused => "refused",
    };
    endpoint::close(&connection, code, text);
}

async fn serve(
    shared: &Arc<Shared>,
    connection: &quinn::Connection,
    shutdown: watch::Receiver<bool>,
) -> Result<CloseCode, TransportError> {
    let welcome = tokio::time::timeout(PATIENCE, control::welcome(connection));
    let (sender, mut receiver) = welcome.await.map_err(|_| TransportError::Timeout(PATIENCE))??;
    let identity = connection.peer_identity().and_then(|any| {
        let chain = any.downcast::<Vec<rustls_pki_types::CertificateDer<'static>>>().ok()?;
        chain.first().cloned()
    });
    let Some(certificate) = identity else {
        return serve_stranger(shared, sender, &mut receiver).await;
    };
    let identity = agent_identity(&certificate)?;
    serve_agent(shared, connection, identity, sender, receiver, shutdown).await
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
            let joined = access::join(&shared.catalog, &shared.authority.0, &join, SystemTime::now()).await;
            joined.map_err(|e| e.refusal())
        }
        _ => Err(refusal(Reason::Authentication, "this agent shows no certificate: join first")),
    };
    let code = if answer.is_ok() { CloseCode::Done } else { CloseCode::Refused };
    if let Err(refused) = &answer {
        tracing::warn!(reason = %refused, "refused to let a server join");
    }
    sender.send(&answer.map_or_else(ReceiverMessage::Refused, ReceiverMessage::Joined)).await?;
    farewell(sender, receiver).await;
    Ok(code)
}

/// The last message must arrive before the connection goes: the agent closes its side when it has it.
async fn farewell(mut sender: ControlSender<ReceiverMessage>, receiver: &mut ControlReceiver<AgentMessage>) {
    sender.finish();
    let _ = tokio::time::timeout(Duration::from_secs(2), async { while let Ok(Some(_)) = receiver.receive().await {} })
        .await;
}

/// What the session is doing.
enum Mode {
    Idle,
    Writing { round: Box<Round>, state: OwnedMutexGuard<GroupState> },
    Reading(Reading),
}

/// One agent's session.
pub struct Session {
    shared: Arc<Shared>,
    identity: AgentIdentity,
    slot: Arc<GroupSlot>,
    sink: Sink,
    mode: Mode,
    superseded: Arc<Notify>,
    out: mpsc::Sender<ReceiverMessage>,
    connection: quinn::Connection,
    streams: JoinSet<()>,
}

async fn serve_agent(
    shared: &Arc<Shared>,
    connection: &quinn::Connection,
    identity: AgentIdentity,
    sender: ControlSender<ReceiverMessage>,
    mut receiver: ControlReceiver<AgentMessage>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<CloseCode, TransportError> {
    let (out, mut outgoing) = mpsc::channel::<ReceiverMessage>(64);
    let writer = tokio::spawn(async move {
        let mut sender = sender;
        while let Some(message) = outgoing.recv().await {
            if sender.send(&message).await.is_err() {
                break;
            }
        }
        sender.finish();
    });
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
    let known = match admit(shared, &identity).await {
        Ok(peer) => peer,
        Err(refused) => {
            tracing::warn!(agent = %identity.agent, reason = %refused, "refused a session");
            let _ = out.send(ReceiverMessage::Refused(refused)).await;
            return Ok(end(out, writer, reader, &mut messages, CloseCode::Refused).await);
        }
    };
    connection.set_receive_window(quinn::VarInt::from_u32(Windows::BLOCKS.receive));
    let mut session = Session {
        shared: shared.clone(),
        slot: shared.slot(identity.group),
        identity,
        sink: Sink::new(known),
        mode: Mode::Idle,
        superseded: Arc::new(Notify::new()),
        out: out.clone(),
        connection: connection.clone(),
        streams: JoinSet::new(),
    };
    let mut revocation = tokio::time::interval(shared.settings.revocation_check);
    revocation.reset();
    let mut absorb = tokio::time::interval(ABSORB_INTERVAL);
    absorb.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let superseded = session.superseded.clone();
    let result = loop {
        tokio::select! {
            biased;
            () = stopped(&mut shutdown) => break Ok(CloseCode::ShuttingDown),
            () = superseded.notified() => break Ok(CloseCode::Superseded),
            _ = revocation.tick() => match access::is_revoked(&shared.catalog, session.identity.agent).await {
                Ok(true) => break Ok(CloseCode::Revoked),
                Ok(false) => session.note_seen().await,
                Err(error) => tracing::warn!(%error, "could not look up revocations"),
            },
            message = messages.recv() => match message {
                Some(Ok(Some(message))) => if let Err(refused) = session.handle(message).await {
                    tracing::warn!(agent = %session.identity.agent, reason = ?refused.reason, text = %refused, "refused");
                    let _ = session.out.send(ReceiverMessage::Refused(refused)).await;
                    break Ok(CloseCode::Refused);
                },
                Some(Ok(None)) | None => break Ok(CloseCode::Done),
                Some(Err(error)) => break Err(error),
            },
            stream = connection.accept_uni() => match stream {
                Ok(stream) => session.take_stream(stream),
                Err(error) => break Err(error.into()),
            },
            Some(_) = session.streams.join_next() => {}
            _ = absorb.tick() => if let Err(refused) = session.absorb().await {
                let _ = session.out.send(ReceiverMessage::Refused(refused)).await;
                break Ok(CloseCode::Refused);
            },
        }
    };
    session.leave().await;
    // It holds a sender of its own: with it the writer would wait for messages that never come.
    drop(session);
    let code = end(out, writer, reader, &mut messages, *result.as_ref().unwrap_or(&CloseCode::Done)).await;
    result.map(|_| code)
}

/// Waits until the server shuts down.
pub(crate) async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    // A sender that is gone means that the server is: the same.
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Sends what is still to be sent and waits shortly until the agent has it.
async fn end(
    out: mpsc::Sender<ReceiverMessage>,
    writer: tokio::task::JoinHandle<()>,
    reader: tokio::task::JoinHandle<()>,
    messages: &mut mpsc::Receiver<Result<Option<AgentMessage>, TransportError>>,
    code: CloseCode,
) -> CloseCode {
    drop(out);
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
async fn admit(shared: &Shared, identity: &AgentIdentity) -> Result<Peer, Refusal> {
    if access::is_revoked(&shared.catalog, identity.agent).await.map_err(|e| e.refusal())? {
        return Err(refusal(Reason::Authentication, "this agent was revoked"));
    }
    let joined = access::joined_agent(&shared.catalog, identity).await.map_err(|e| e.refusal())?;
    Ok(Peer { agent: identity.agent, joined_machine: joined.machine })
}

impl Session {
    async fn reply(&self, message: ReceiverMessage) {
        // A writer that is gone means a connection that is gone: the loop notices.
        let _ = self.out.send(message).await;
    }

    fn expired(&self) -> bool {
        unix_millis(SystemTime::now()) >= self.identity.not_after
    }

    async fn handle(&mut self, message: AgentMessage) -> Result<(), Refusal> {
        if self.expired() && !matches!(message, AgentMessage::Renew { .. }) {
            return Err(refusal(Reason::Authentication, "the agent's certificate has expired: renew it first"));
        }
        match message {
            AgentMessage::Join(_) => Err(refusal(Reason::Protocol, "this agent has joined already")),
            AgentMessage::Renew { request } => {
                let (catalog, authority) = (&self.shared.catalog, &self.shared.authority.0);
                let renewed = access::renew(catalog, authority, &self.identity, &request, SystemTime::now()).await;
                let certificates = renewed.map_err(|e| e.refusal())?;
                self.reply(ReceiverMessage::Renewed { certificates }).await;
                Ok(())
            }
            AgentMessage::Open(open) => self.open(open).await,
            AgentMessage::OpenRead(open) => {
                self.leave().await;
                let log = self.shared.catalog.log(self.identity.group);
                let (reading, opened) = Reading::open(log, open.point, self.connection.clone(), self.out.clone())
                    .await
                    .map_err(|e| e.refusal())?;
                self.mode = Mode::Reading(reading);
                self.reply(ReceiverMessage::ReadOpened(opened)).await;
                Ok(())
            }
            AgentMessage::Ranges { volume, first } => self.ranges(volume, first).await,
            AgentMessage::Page { volume, page } => self.page(volume, PageIndex(page)).await,
            AgentMessage::Commit(commit) => self.commit(*commit).await,
            AgentMessage::StillEqual { .. } => {
                self.note_seen().await;
                Ok(())
            }
            AgentMessage::Want { volume, page, blocks } => match &mut self.mode {
                Mode::Reading(reading) => reading.want(volume, PageIndex(page), &blocks).await,
                _ => Err(refusal(Reason::Protocol, "`Want` without `OpenRead`")),
            },
        }
    }

    async fn note_seen(&self) {
        if let Err(error) = access::write_seen(&*self.shared.catalog.store, &self.identity, SystemTime::now()).await {
            tracing::warn!(%error, "could not note when the agent was seen");
        }
    }

    async fn open(&mut self, open: backhaul_protocol::wire::message::Open) -> Result<(), Refusal> {
        if self.identity.role != AgentRole::Writer {
            return Err(refusal(Reason::Denied, "this agent joined with a restore-only token: it can't write"));
        }
        self.leave().await;
        let mut state = self.group_state(&open).await?;
        let (round, opened) = Round::open(&mut state, &mut self.sink, &open, &self.shared.resources).await?;
        self.slot.take_over(self.superseded.clone());
        self.mode = Mode::Writing { round: Box::new(round), state };
        self.reply(ReceiverMessage::Opened(Box::new(opened))).await;
        self.note_seen().await;
        Ok(())
    }

    /// The group's state, taken over from an older session if there is one. An agent that may not write takes over
    /// nothing: a booted copy must not disturb the server that it was made from.
    async fn group_state(
        &self,
        open: &backhaul_protocol::wire::message::Open,
    ) -> Result<OwnedMutexGuard<GroupState>, Refusal> {
        if let Ok(state) = self.slot.state.clone().try_lock_owned() {
            return Ok(state);
        }
        let (head, _) = self.shared.catalog.log(self.identity.group).head().await.map_err(|e| e.refusal())?;
        Sink::new(self.sink.peer()).open(&head, open)?;
        self.slot.take_over(self.superseded.clone());
        let wait = tokio::time::timeout(Duration::from_secs(20), self.slot.state.clone().lock_owned());
        let busy = |_| refusal(Reason::Busy, "an older session of this group is still finishing a commit: come again");
        wait.await.map_err(busy)
    }

    fn view(&self) -> Result<&View, Refusal> {
        match &self.mode {
            Mode::Writing { round, .. } => Ok(round.view()),
            Mode::Reading(reading) => Ok(reading.view()),
            Mode::Idle => Err(refusal(Reason::Protocol, "a question without `Open` or `OpenRead`")),
        }
    }

    async fn ranges(&self, slot: VolumeSlot, first: u64) -> Result<(), Refusal> {
        let view = self.view()?;
        let volume =
            view.volume(slot).ok_or_else(|| refusal(Reason::Protocol, "a volume that is not in this session"))?;
        let pages = volume.geometry.pages();
        if first >= pages {
            return Err(refusal(Reason::Protocol, "a page beyond the volume's end"));
        }
        let mut digests = Vec::new();
        for page in first..pages.min(first + RANGES_PER_FRAME) {
            digests.push(view.range_digest(volume, PageIndex(page)).await.map_err(|e| e.refusal())?);
        }
        self.reply(ReceiverMessage::Ranges { volume: slot, first, digests }).await;
        Ok(())
    }

    async fn page(&self, slot: VolumeSlot, page: PageIndex) -> Result<(), Refusal> {
        let volume = self.view()?.volume(slot);
        if volume.is_none_or(|v| page.0 >= v.geometry.pages()) {
            return Err(refusal(Reason::Protocol, "a page that is not in this session"));
        }
        let found = match &self.mode {
            Mode::Writing { round, state } => round.page(state, slot, page).await,
            Mode::Reading(reading) => reading.page(slot, page).await,
            Mode::Idle => return Err(refusal(Reason::Protocol, "a question without `Open` or `OpenRead`")),
        };
        let (draft, digests) = found.map_err(|e| e.refusal())?;
        self.reply(ReceiverMessage::Page { volume: slot, page: page.0, draft, digests }).await;
        Ok(())
    }

    fn take_stream(&mut self, mut stream: quinn::RecvStream) {
        match &self.mode {
            Mode::Writing { round, .. } => {
                self.streams.spawn(round.ingest.clone().run_stream(stream));
            }
            // A stream of a round that is over, or of none: its records belong nowhere.
            _ => {
                let _ = stream.stop(quinn::VarInt::from_u32(CloseCode::Protocol as u32));
            }
        }
    }

    async fn absorb(&mut self) -> Result<(), Refusal> {
        if let Mode::Writing { round, state } = &mut self.mode {
            let failed = round.ingest.progress().borrow().failed.clone();
            if let Some(text) = failed {
                return Err(refusal(Reason::Protocol, text));
            }
            round.absorb(state).await.map_err(|e| e.refusal())?;
        }
        Ok(())
    }

    async fn commit(&mut self, commit: backhaul_protocol::wire::message::Commit) -> Result<(), Refusal> {
        let Mode::Writing { mut round, mut state } = std::mem::replace(&mut self.mode, Mode::Idle) else {
            return Err(refusal(Reason::Protocol, "`Commit` without `Open`"));
        };
        // The last streams may not have been accepted yet: they are, while the commit waits for their records.
        let (connection, ingest) = (self.connection.clone(), round.ingest.clone());
        let accept = async {
            let mut streams = JoinSet::new();
            while let Ok(stream) = connection.accept_uni().await {
                streams.spawn(ingest.clone().run_stream(stream));
            }
            std::future::pending::<()>().await;
        };
        let now = || unix_millis(SystemTime::now());
        let committed = tokio::select! {
            biased;
            committed = round.commit(&mut state, &mut self.sink, self.identity.agent, commit, now) => committed,
            () = accept => unreachable!("accepting never ends"),
        };
        if committed.is_err() {
            // Whatever was thought to be known may be why: the next round reads it from the store again.
            state.forget();
        }
        let committed = committed?;
        let (log, hint) = (state.log().clone(), self.slot.hint_is_due());
        drop(state);
        self.reply(ReceiverMessage::Committed(committed)).await;
        tracing::info!(group = %log.group(), point = committed.seq.0, "committed");
        tokio::spawn(async move { after_commit(&log, committed.seq, hint).await });
        Ok(())
    }

    /// Ends what the session is doing; what has arrived stays as a draft.
    async fn leave(&mut self) {
        self.streams.shutdown().await;
        if let Mode::Writing { round, mut state } = std::mem::replace(&mut self.mode, Mode::Idle) {
            round.abandon(&mut state).await;
        }
    }
}
