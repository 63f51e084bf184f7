//! Questions to the receiver and its answers.
//!
//! Read first: [`Asking`]. Whatever it waits for, it notices a refusal, and a silence that is too long.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use backhaul_protocol::digest::{BlockDigest, RangeDigest};
use backhaul_protocol::geometry::{BlockIndex, PageIndex};
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::wire::frame;
use backhaul_protocol::wire::message::{AgentMessage, OpenRead, PointSpec, ReadOpened, ReadVolume, ReceiverMessage};
use backhaul_transport::control::{ControlReceiver, ControlSender};
use backhaul_transport::error::TransportError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::RestoreError;
use super::incoming::Incoming;

/// How long the receiver may stay silent. One that waits for its store says so meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pages whose blocks are on their way; the receiver queues four more.
const PAGES: usize = 8;
/// Questions for pages that may be unanswered.
pub(super) const QUESTIONS: usize = 8;

/// The control stream: questions and answers.
pub(super) struct Asking {
    sender: ControlSender<AgentMessage>,
    inbox: mpsc::Receiver<Result<Option<ReceiverMessage>, TransportError>>,
    /// Ends with this.
    _reader: JoinSet<()>,
    /// Answers that came while something else was waited for.
    ready: VecDeque<ReceiverMessage>,
    pages: Arc<Semaphore>,
    /// Bytes of messages that came.
    pub(super) bytes: u64,
    /// The receiver said that it waits for its store, since this was last looked at.
    is_waiting: bool,
}

impl Asking {
    pub(super) fn new((sender, mut receiver): (ControlSender<AgentMessage>, ControlReceiver<ReceiverMessage>)) -> Self {
        let (forward, inbox) = mpsc::channel(64);
        // A task of its own: receiving must not be cut off in the middle of a message.
        let mut reader = JoinSet::new();
        reader.spawn(async move {
            loop {
                let message = receiver.receive().await;
                if let Ok(Some(ReceiverMessage::Waiting(waiting))) = &message {
                    tracing::warn!("{waiting}");
                }
                let last = !matches!(message, Ok(Some(_)));
                if forward.send(message).await.is_err() || last {
                    break;
                }
            }
        });
        let pages = Arc::new(Semaphore::new(PAGES));
        Self { sender, inbox, _reader: reader, ready: VecDeque::new(), pages, bytes: 0, is_waiting: false }
    }

    pub(super) async fn send(&mut self, message: &AgentMessage) -> Result<(), RestoreError> {
        Ok(self.sender.send(message).await?)
    }

    /// The next message, those first that were put aside.
    async fn next(&mut self, incoming: Option<&Incoming>) -> Result<ReceiverMessage, RestoreError> {
        match self.ready.pop_front() {
            Some(message) => Ok(message),
            None => self.receive(incoming).await,
        }
    }

    /// The next message from the receiver; `Sent` is checked against what is still wanted and passed over.
    async fn receive(&mut self, incoming: Option<&Incoming>) -> Result<ReceiverMessage, RestoreError> {
        loop {
            let message = self.inbox.recv().await;
            let message = match message {
                Some(Ok(Some(message))) => message,
                Some(Err(e)) => return Err(e.into()),
                Some(Ok(None)) | None => {
                    return Err(TransportError::Stream("the receiver ended the session".into()).into());
                }
            };
            self.bytes += frame::encode(&message).map_or(0, |f| f.len() as u64);
            match (message, incoming) {
                (ReceiverMessage::Refused(refusal), _) => return Err(refusal.into()),
                (ReceiverMessage::Waiting(_), _) => self.is_waiting = true,
                (ReceiverMessage::Sent { page, records, .. }, Some(incoming)) => {
                    if !incoming.sent(PageIndex(page), records) {
                        return Err(RestoreError::Protocol("another number of blocks than was asked for"));
                    }
                }
                (message, _) => return Ok(message),
            }
        }
    }

    pub(super) async fn patiently(&mut self, incoming: Option<&Incoming>) -> Result<ReceiverMessage, RestoreError> {
        loop {
            match tokio::time::timeout(PATIENCE, self.next(incoming)).await {
                Ok(result) => return result,
                Err(_) if std::mem::take(&mut self.is_waiting) => {}
                Err(_) => return Err(RestoreError::Silent(PATIENCE)),
            }
        }
    }

    pub(super) async fn open(&mut self, point: PointSpec) -> Result<ReadOpened, RestoreError> {
        self.send(&AgentMessage::OpenRead(OpenRead { point })).await?;
        match self.patiently(None).await? {
            ReceiverMessage::ReadOpened(opened) => Ok(opened),
            _ => Err(RestoreError::Protocol("no answer to `OpenRead`")),
        }
    }

    pub(super) async fn ranges(&mut self, volume: &ReadVolume) -> Result<Vec<RangeDigest>, RestoreError> {
        let pages = volume.geometry.pages();
        let mut ranges: Vec<RangeDigest> = Vec::new();
        while (ranges.len() as u64) < pages {
            let from = ranges.len() as u64;
            self.send(&AgentMessage::Ranges { volume: volume.slot, first: from }).await?;
            match self.patiently(None).await? {
                ReceiverMessage::Ranges { volume: slot, first, digests }
                    if slot == volume.slot
                        && first == from
                        && !digests.is_empty()
                        && digests.len() as u64 <= pages - from =>
                {
                    ranges.extend(digests);
                }
                _ => return Err(RestoreError::Protocol("no answer to `Ranges`")),
            }
        }
        Ok(ranges)
    }

    /// The answer to the oldest question.
    pub(super) async fn page(
        &mut self,
        slot: VolumeSlot,
        index: PageIndex,
        incoming: &Incoming,
    ) -> Result<Vec<BlockDigest>, RestoreError> {
        match self.patiently(Some(incoming)).await? {
            ReceiverMessage::Page { volume, page, digests, .. } if volume == slot && page == index.0 => Ok(digests),
            _ => Err(RestoreError::Protocol("no answer to `Page`")),
        }
    }

    /// Bytes of the blocks that are not zero.
    pub(super) async fn data_bytes(
        &mut self,
        volume: &ReadVolume,
        ranges: &[RangeDigest],
    ) -> Result<u64, RestoreError> {
        let (geometry, incoming) = (volume.geometry, Incoming::default());
        let mut pages = (0..geometry.pages()).map(PageIndex).filter(|p| ranges[p.0 as usize] != RangeDigest::ZERO);
        let mut asked = VecDeque::new();
        let mut bytes = 0;
        loop {
            while asked.len() < QUESTIONS
                && let Some(page) = pages.next()
            {
                self.send(&AgentMessage::Page { volume: volume.slot, page: page.0 }).await?;
                asked.push_back(page);
            }
            let Some(page) = asked.pop_front() else { return Ok(bytes) };
            let digests = self.page(volume.slot, page, &incoming).await?;
            let blocks = digests.iter().enumerate().take(geometry.page_blocks(page)).filter(|(_, d)| !d.is_zero());
            bytes += blocks
                .map(|(i, _)| geometry.block_len(BlockIndex(page.first_block().0 + i as u64)) as u64)
                .sum::<u64>();
        }
    }

    /// Waits until another page may be asked for.
    pub(super) async fn room(&mut self, incoming: &Incoming) -> Result<OwnedSemaphorePermit, RestoreError> {
        let pages = self.pages.clone();
        let permits = self.all_or_nothing(incoming, pages.acquire_many_owned(1)).await?;
        Ok(permits)
    }

    /// Waits until every wanted block is written.
    pub(super) async fn wait_for_blocks(&mut self, incoming: &Incoming) -> Result<(), RestoreError> {
        let pages = self.pages.clone();
        drop(self.all_or_nothing(incoming, pages.acquire_many_owned(PAGES as u32)).await?);
        Ok(())
    }

    /// Waits for permits, and gives up when neither a block nor a message comes for long.
    pub(super) async fn all_or_nothing(
        &mut self,
        incoming: &Incoming,
        permits: impl Future<Output = Result<OwnedSemaphorePermit, tokio::sync::AcquireError>>,
    ) -> Result<OwnedSemaphorePermit, RestoreError> {
        let mut permits = std::pin::pin!(permits);
        let mut seen = incoming.lock().bytes;
        loop {
            tokio::select! {
                biased;
                permit = &mut permits => return Ok(permit.expect("never closed")),
                message = self.receive(Some(incoming)) => {
                    self.ready.push_back(message?);
                    if self.ready.len() > QUESTIONS {
                        return Err(RestoreError::Protocol("more answers than questions"));
                    }
                }
                () = tokio::time::sleep(PATIENCE) => {
                    let now = incoming.lock().bytes;
                    let waiting = std::mem::take(&mut self.is_waiting);
                    if std::mem::replace(&mut seen, now) == now && !waiting {
                        return Err(RestoreError::Silent(PATIENCE));
                    }
                }
            }
        }
    }
}
