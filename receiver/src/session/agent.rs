//! What an agent may say, and what is done about it.
//!
//! Read first: [`Session::handle`].

use std::sync::Arc;
use std::time::Duration;

use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{LogSeq, VolumeSlot};
use backhaul_protocol::session::sink::{Peer, Sink};
use backhaul_protocol::store::fleet::AgentRole;
use backhaul_protocol::store::log::{Body, UnixMillis};
use backhaul_protocol::wire::message::{AgentMessage, CloseCode, Commit, Open, Reason, ReceiverMessage, Refusal};
use backhaul_seams::clock;
use backhaul_seams::mutant::{Mutant, planted};
use backhaul_seams::situation::{Situation, reached};
use backhaul_transport::error::TransportError;
use backhaul_transport::link::{Link, ReceiveHalf};
use backhaul_transport::tls::AgentIdentity;
use tokio::sync::{Notify, OwnedMutexGuard, mpsc, watch};
use tokio::task::JoinSet;

use super::refusal;
use crate::access::{self, unix_millis};
use crate::measuring::Measuring;
use crate::metrics::{Counted, Doing};
use crate::notices::Busy;
use crate::read_session::Reading;
use crate::round::{ABSORB_INTERVAL, GroupState, Round, after_commit};
use crate::server::{HintWhen, Shared, SlotInUse};
use crate::view::View;

/// Range digests in one answer: 32 KiB of a frame of 64.
const RANGES_PER_FRAME: u64 = 1024;

/// The group's state while a session has it. Dropped half-way through anything, what is known may not be true any
/// more: the next session reads it from the store.
struct Held {
    state: OwnedMutexGuard<GroupState>,
    is_true: bool,
}

impl Drop for Held {
    fn drop(&mut self) {
        if !self.is_true {
            self.state.forget();
        }
    }
}

/// What the session is doing.
enum Mode {
    Idle,
    Writing { round: Box<Round>, held: Held },
    Reading(Reading),
    Measuring(Measuring),
}

/// One agent's session.
pub(super) struct Session {
    shared: Arc<Shared>,
    identity: AgentIdentity,
    sink: Sink,
    mode: Mode,
    superseded: Arc<Notify>,
    out: mpsc::Sender<ReceiverMessage>,
    busy: Busy,
    link: Arc<dyn Link>,
    streams: JoinSet<()>,
    counted: Counted,
    // The last: nobody may get another state of the group while this session still has one.
    slot: SlotInUse,
}

async fn told_to_end(stop: &mut watch::Receiver<Option<CloseCode>>) -> CloseCode {
    // Who would tell is gone: then there is nobody to work for.
    stop.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(CloseCode::Done)
}

/// One message, or how the stream ended.
pub(super) type Heard = Result<Option<AgentMessage>, TransportError>;

impl Session {
    /// Nothing opened yet.
    pub(super) fn new(
        shared: Arc<Shared>,
        identity: AgentIdentity,
        peer: Peer,
        link: Arc<dyn Link>,
        out: mpsc::Sender<ReceiverMessage>,
        busy: Busy,
    ) -> Self {
        Self {
            slot: Shared::slot(&shared, identity.group),
            counted: shared.counts.session(),
            shared,
            identity,
            sink: Sink::new(peer),
            mode: Mode::Idle,
            superseded: Arc::new(Notify::new()),
            out,
            busy,
            link,
            streams: JoinSet::new(),
        }
    }

    /// Is told when a newer session takes over.
    pub(super) fn superseded(&self) -> Arc<Notify> {
        self.superseded.clone()
    }

    /// Does what the agent says, until it has no more to say, something is refused, or `stop` holds a reason to end.
    /// What is under way then is finished first; the caller drops this where that takes too long.
    pub(super) async fn work(
        &mut self,
        messages: &mut mpsc::Receiver<Heard>,
        mut stop: watch::Receiver<Option<CloseCode>>,
    ) -> Result<CloseCode, TransportError> {
        let mut absorb = tokio::time::interval(ABSORB_INTERVAL);
        absorb.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let link = self.link.clone();
        loop {
            let done = tokio::select! {
                biased;
                code = told_to_end(&mut stop) => return Ok(code),
                message = messages.recv() => match message {
                    Some(Ok(Some(message))) => {
                        let _busy = self.busy.clone().begin();
                        self.handle(message).await
                    }
                    Some(Ok(None)) | None => return Ok(CloseCode::Done),
                    Some(Err(error)) => return Err(error),
                },
                stream = link.accept_blocks() => {
                    self.take_stream(stream?);
                    Ok(())
                }
                Some(_) = self.streams.join_next() => Ok(()),
                _ = absorb.tick() => {
                    let _busy = self.busy.clone().begin();
                    self.absorb().await
                }
            };
            if let Err(refused) = done {
                tracing::warn!(agent = %self.identity.agent, reason = ?refused.reason, text = %refused, "refused");
                self.shared.counts.refused();
                if !planted(Mutant::RefusalNotSaid) {
                    self.reply(ReceiverMessage::Refused(refused)).await;
                }
                return Ok(CloseCode::Refused);
            }
        }
    }

    async fn reply(&self, message: ReceiverMessage) {
        // A writer that is gone means a connection that is gone: the loop notices.
        let _ = self.out.send(message).await;
    }

    fn expired(&self) -> bool {
        unix_millis(clock::now()) >= self.identity.not_after
    }

    async fn handle(&mut self, message: AgentMessage) -> Result<(), Refusal> {
        if self.expired() && !matches!(message, AgentMessage::Renew { .. }) {
            return Err(refusal(Reason::Authentication, "the agent's certificate has expired: renew it first"));
        }
        match message {
            AgentMessage::Join(_) => Err(refusal(Reason::Protocol, "this agent has joined already")),
            AgentMessage::Renew { request } => {
                let (catalog, authority) = (&self.shared.catalog, &self.shared.authority.0);
                let renewed = access::renew(catalog, authority, &self.identity, &request, clock::now()).await;
                let certificates = renewed.map_err(|e| e.refusal())?;
                self.reply(ReceiverMessage::Renewed { certificates }).await;
                Ok(())
            }
            AgentMessage::Open(open) => self.open(open).await,
            AgentMessage::OpenRead(open) => {
                self.leave().await;
                let log = self.shared.catalog.log(self.identity.group);
                let (reading, opened) = Reading::open(log, open.point, self.link.clone(), self.out.clone())
                    .await
                    .map_err(|e| e.refusal())?;
                self.mode = Mode::Reading(reading);
                self.counted.does(Doing::Reading);
                self.reply(ReceiverMessage::ReadOpened(opened)).await;
                self.note_seen().await;
                Ok(())
            }
            AgentMessage::Ranges { volume, first } => self.ranges(volume, first).await,
            AgentMessage::Page { volume, page } => self.page(volume, PageIndex(page)).await,
            AgentMessage::Commit(commit) => self.commit(*commit).await,
            AgentMessage::StillEqual { at } => {
                self.shared.counts.still_equal(self.identity.group, at);
                self.note_seen().await;
                Ok(())
            }
            AgentMessage::Want { volume, page, blocks } => match &mut self.mode {
                Mode::Reading(reading) => reading.want(volume, PageIndex(page), &blocks).await,
                _ => Err(refusal(Reason::Protocol, "`Want` without `OpenRead`")),
            },
            AgentMessage::Probe => self.probe().await,
        }
    }

    /// Counts what comes on block streams, and says how much it was. Nothing of the group is touched.
    async fn probe(&mut self) -> Result<(), Refusal> {
        if matches!(self.mode, Mode::Idle) {
            self.mode = Mode::Measuring(Measuring::begin(&self.shared.measured)?);
        }
        let Mode::Measuring(measuring) = &self.mode else {
            return Err(refusal(Reason::Protocol, "`Probe` in a round"));
        };
        self.reply(ReceiverMessage::Probed(measuring.probed())).await;
        Ok(())
    }

    async fn note_seen(&self) {
        if let Err(error) = self.shared.seen.note(&*self.shared.catalog.store, &self.identity).await {
            tracing::warn!(%error, "could not note when the agent was seen");
        }
    }

    async fn open(&mut self, open: Open) -> Result<(), Refusal> {
        if self.identity.role != AgentRole::Writer {
            let reason = if planted(Mutant::RefusalOfAnotherKind) { Reason::Conflict } else { Reason::Denied };
            return Err(refusal(reason, "this agent joined with a restore-only token: it can't write"));
        }
        self.leave().await;
        let (state, writers) = self.group_state(&open).await?;
        self.slot.hold(self.superseded.clone());
        let mut held = Held { state, is_true: false };
        let (round, opened) = Round::open(&mut held.state, &mut self.sink, &open, &self.shared.resources).await?;
        if !self.slot.take_over_at(writers, self.superseded.clone()) {
            return Err(refusal(Reason::Superseded, "a newer session of the same group took over"));
        }
        self.note_group(held.state.newest_point()).await;
        self.mode = Mode::Writing { round: Box::new(round), held };
        self.counted.does(Doing::Writing);
        self.reply(ReceiverMessage::Opened(Box::new(opened))).await;
        self.note_seen().await;
        Ok(())
    }

    /// Has metrics tell of the group, by its name. Nobody else reads the record that has it.
    async fn note_group(&self, point: Option<UnixMillis>) {
        let (group, counts) = (self.identity.group, &self.shared.counts);
        if self.shared.settings.metrics.is_none() || counts.knows(group) {
            return;
        }
        let create = self.shared.catalog.log(group).read(LogSeq(0)).await;
        let name = match create.ok().flatten().map(|(record, _)| record.body) {
            Some(Body::Create(create)) => create.name.to_string(),
            _ => group.to_string(),
        };
        counts.opened(group, &name, point);
    }

    /// The group's state, taken over from an older session if there is one, and how many writers the group had then. An
    /// agent that may not write takes over nothing: a booted copy must not disturb the server that it was made from.
    async fn group_state(&self, open: &Open) -> Result<(OwnedMutexGuard<GroupState>, u64), Refusal> {
        let writers = self.slot.writers();
        if let Ok(state) = self.slot.state.clone().try_lock_owned() {
            return Ok((state, writers));
        }
        let (head, _) = self.shared.catalog.log(self.identity.group).head().await.map_err(|e| e.refusal())?;
        Sink::new(self.sink.peer()).open(&head, open)?;
        reached(Situation::TakenOver);
        let writers = self.slot.take_over(self.superseded.clone());
        let wait = tokio::time::timeout(Duration::from_secs(20), self.slot.state.clone().lock_owned());
        let busy = |_| refusal(Reason::Busy, "an older session of this group is still finishing a commit: come again");
        Ok((wait.await.map_err(busy)?, writers))
    }

    fn view(&self) -> Result<&View, Refusal> {
        match &self.mode {
            Mode::Writing { round, .. } => Ok(round.view()),
            Mode::Reading(reading) => Ok(reading.view()),
            Mode::Idle | Mode::Measuring(_) => {
                Err(refusal(Reason::Protocol, "a question without `Open` or `OpenRead`"))
            }
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
            Mode::Writing { round, held } => round.page(&held.state, slot, page).await,
            Mode::Reading(reading) => reading.page(slot, page).await,
            Mode::Idle | Mode::Measuring(_) => {
                return Err(refusal(Reason::Protocol, "a question without `Open` or `OpenRead`"));
            }
        };
        let (draft, digests) = found.map_err(|e| e.refusal())?;
        self.reply(ReceiverMessage::Page { volume: slot, page: page.0, draft, digests }).await;
        Ok(())
    }

    fn take_stream(&mut self, mut stream: Box<dyn ReceiveHalf>) {
        match &self.mode {
            Mode::Writing { round, .. } => {
                self.streams.spawn(round.ingest.clone().run_stream(stream));
            }
            Mode::Measuring(measuring) => {
                self.streams.spawn(measuring.count(stream));
            }
            // A stream of a round that is over, or of none: its records belong nowhere.
            _ => stream.stop(),
        }
    }

    async fn absorb(&mut self) -> Result<(), Refusal> {
        self.tell_head(HintWhen::Due);
        if let Mode::Measuring(measuring) = &mut self.mode {
            measuring.end_in_time();
        }
        if let Mode::Writing { round, held } = &mut self.mode {
            let failed = round.ingest.progress().borrow().failed.clone();
            if let Some(text) = failed {
                return Err(refusal(Reason::Protocol, text));
            }
            round.absorb(&mut held.state).await.map_err(|e| e.refusal())?;
        }
        Ok(())
    }

    async fn commit(&mut self, commit: Commit) -> Result<(), Refusal> {
        let Mode::Writing { mut round, mut held } = std::mem::replace(&mut self.mode, Mode::Idle) else {
            return Err(refusal(Reason::Protocol, "`Commit` without `Open`"));
        };
        // The last streams may not have been accepted yet: they are, while the commit waits for their records.
        let (link, ingest) = (self.link.clone(), round.ingest.clone());
        let accept = async {
            let mut streams = JoinSet::new();
            while let Ok(stream) = link.accept_blocks().await {
                streams.spawn(ingest.clone().run_stream(stream));
            }
            std::future::pending::<()>().await;
        };
        let now = || unix_millis(clock::now());
        let began = commit.capture_start;
        let committed = tokio::select! {
            biased;
            committed = round.commit(&mut held.state, &mut self.sink, self.identity.agent, commit, now) => committed,
            () = accept => unreachable!("accepting never ends"),
        };
        self.counted.does(Doing::Idle);
        // What still comes on the streams of the round belongs nowhere, and would be kept for nobody.
        self.streams.shutdown().await;
        // Where it failed, whatever was thought to be known may be why: the next round reads it from the store again.
        let committed = committed?;
        held.is_true = true;
        self.shared.counts.committed(self.identity.group, began);
        let log = held.state.log().clone();
        self.slot.hint.appended(committed.seq);
        drop(held);
        self.reply(ReceiverMessage::Committed(committed)).await;
        tracing::info!(group = %log.group(), point = committed.seq.0, "committed");
        let limits = self.shared.settings.limits;
        tokio::spawn(async move { after_commit(&log, committed.seq, limits).await });
        self.tell_head(HintWhen::Due);
        Ok(())
    }

    /// Writes the head hint where it is due. Nobody waits for it.
    fn tell_head(&self, when: HintWhen) {
        let hint = self.slot.hint.clone();
        if hint.is_due(when) {
            let log = self.shared.catalog.log(self.identity.group);
            tokio::spawn(async move {
                if let Err(error) = hint.write(&log).await {
                    tracing::warn!(%error, "could not write the head hint; readers probe a little longer");
                }
            });
        }
    }

    /// The session is over.
    pub(super) async fn finish(&mut self) {
        self.tell_head(HintWhen::Now);
        self.leave().await;
    }

    /// Ends what the session is doing; what has arrived stays as a draft.
    async fn leave(&mut self) {
        if planted(Mutant::TaskLeftBehind) {
            let link = self.link.clone();
            tokio::spawn(async move {
                let _link = link;
                std::future::pending::<()>().await
            });
        }
        self.streams.shutdown().await;
        self.counted.does(Doing::Idle);
        if let Mode::Writing { round, mut held } = std::mem::replace(&mut self.mode, Mode::Idle) {
            round.abandon(&mut held.state).await;
            held.is_true = true;
        }
    }
}
