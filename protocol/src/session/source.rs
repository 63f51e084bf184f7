//! The writing session as the agent sees it.
//!
//! ```text
//! Idle --open--> Opening --Opened--> Ready --commit--> Committing --Committed--> Idle
//!                   |                  |  ^ Ranges, Page: questions, answered in order
//!                   +--Refused---------+--Refused / time out--> Closed
//! ```
//!
//! A connection that ends while `Committing` leaves it open whether the point exists. The agent keeps the commit id
//! and both nonces, and the next `Opened` tells: its head is that commit, or it is not.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use crate::digest::{BlockDigest, RangeDigest};
use crate::geometry::{Geometry, PageIndex};
use crate::ids::{CommitId, VolumeSlot};
use crate::limits::BLOCKS_PER_PAGE;
use crate::session::compare::{BlockSet, Held};
use crate::wire::message::{AgentMessage, Commit, Committed, Open, Opened, Reason, ReceiverMessage, Refusal};

/// How the session fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The receiver said no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The receiver said what it may not say now.
    #[error("the receiver broke the protocol: {0}")]
    Protocol(&'static str),
    /// No answer in time.
    #[error("the receiver did not answer within {0:?}")]
    Timeout(Duration),
}

impl SourceError {
    /// Whether the receiver's store did not answer, for as long as the receiver tries: it was waited for already.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.reason == Reason::Unavailable)
    }

    /// Whether connecting again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(refusal) => refusal.reason.is_retryable(),
            Self::Protocol(_) => false,
            Self::Timeout(_) => true,
        }
    }
}

/// What the shell is to do or to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOutput {
    /// Send this.
    Send(AgentMessage),
    /// The session is open.
    Opened(Box<Opened>),
    /// An answer to [`Source::ask_ranges`].
    Ranges {
        /// Which volume.
        volume: VolumeSlot,
        /// First page.
        first: PageIndex,
        /// From there on.
        digests: Vec<RangeDigest>,
    },
    /// An answer to [`Source::ask_page`].
    Page {
        /// Which volume.
        volume: VolumeSlot,
        /// Which page.
        page: PageIndex,
        /// What the receiver has.
        held: Held,
    },
    /// The point exists; the session is idle again.
    Committed(Committed),
    /// The session is over.
    Failed(SourceError),
}

enum State {
    Idle,
    Opening { offered: Vec<Geometry> },
    Ready { volumes: Vec<(VolumeSlot, Geometry)> },
    Committing { commit: CommitId },
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Question {
    Ranges(VolumeSlot, PageIndex),
    Page(VolumeSlot, PageIndex),
}

/// The machine. All times are durations since any fixed start.
pub struct Source {
    state: State,
    asked: VecDeque<Question>,
    output: VecDeque<SourceOutput>,
    patience: Duration,
    deadline: Option<Duration>,
}

impl Source {
    /// An idle session that gives up when an answer takes longer than `patience`.
    pub fn new(patience: Duration) -> Self {
        Self { state: State::Idle, asked: VecDeque::new(), output: VecDeque::new(), patience, deadline: None }
    }

    /// Begins a round.
    ///
    /// # Panics
    /// If a round is under way.
    pub fn open(&mut self, now: Duration, open: Open) {
        assert!(matches!(self.state, State::Idle), "one round at a time");
        self.state = State::Opening { offered: open.volumes.iter().map(|v| v.geometry).collect() };
        self.deadline = Some(now + self.patience);
        self.output.push_back(SourceOutput::Send(AgentMessage::Open(open)));
    }

    /// Asks for range digests, from a page on.
    pub fn ask_ranges(&mut self, now: Duration, volume: VolumeSlot, first: PageIndex) {
        self.ask(now, Question::Ranges(volume, first), AgentMessage::Ranges { volume, first: first.0 });
    }

    /// Asks for the block digests of a page.
    pub fn ask_page(&mut self, now: Duration, volume: VolumeSlot, page: PageIndex) {
        self.ask(now, Question::Page(volume, page), AgentMessage::Page { volume, page: page.0 });
    }

    fn ask(&mut self, now: Duration, question: Question, message: AgentMessage) {
        if !matches!(self.state, State::Ready { .. }) {
            return; // Closed meanwhile: the shell has been told.
        }
        self.asked.push_back(question);
        self.deadline = Some(now + self.patience);
        self.output.push_back(SourceOutput::Send(message));
    }

    /// Makes what was sent a point.
    pub fn commit(&mut self, now: Duration, commit: Commit) {
        if !matches!(self.state, State::Ready { .. }) {
            return;
        }
        self.state = State::Committing { commit: commit.commit };
        self.deadline = Some(now + self.patience);
        self.output.push_back(SourceOutput::Send(AgentMessage::Commit(Box::new(commit))));
    }

    /// Ends a round without a commit: nothing to say.
    pub fn abandon(&mut self) {
        if matches!(self.state, State::Ready { .. }) && self.asked.is_empty() {
            self.state = State::Idle;
            self.deadline = None;
        }
    }

    /// A message came in.
    pub fn handle_message(&mut self, now: Duration, message: ReceiverMessage) {
        if let Err(error) = self.try_message(now, message) {
            self.fail(error);
        }
    }

    fn try_message(&mut self, now: Duration, message: ReceiverMessage) -> Result<(), SourceError> {
        const UNASKED: SourceError = SourceError::Protocol("an answer to no question");
        match (message, &self.state) {
            (_, State::Closed) => {}
            (ReceiverMessage::Refused(refusal), _) => return Err(refusal.into()),
            (ReceiverMessage::Waiting(_), _) => {
                self.deadline = self.deadline.map(|_| now + self.patience);
            }
            (ReceiverMessage::Opened(opened), State::Opening { offered }) => {
                if opened.volumes.len() != offered.len() {
                    return Err(SourceError::Protocol("another number of volumes than offered"));
                }
                let slots: BTreeSet<_> = opened.volumes.iter().map(|v| v.slot).collect();
                if slots.len() != offered.len() {
                    return Err(SourceError::Protocol("two volumes in one slot"));
                }
                let volumes = opened.volumes.iter().map(|v| v.slot).zip(offered.iter().copied()).collect();
                self.state = State::Ready { volumes };
                self.deadline = None;
                self.output.push_back(SourceOutput::Opened(opened));
            }
            (ReceiverMessage::Ranges { volume, first, digests }, State::Ready { volumes }) => {
                let first = PageIndex(first);
                if self.asked.front() != Some(&Question::Ranges(volume, first)) {
                    return Err(UNASKED);
                }
                let left = geometry(volumes, volume)?.pages().saturating_sub(first.0);
                if digests.is_empty() || digests.len() as u64 > left {
                    return Err(SourceError::Protocol("a wrong number of range digests"));
                }
                self.answered(now);
                self.output.push_back(SourceOutput::Ranges { volume, first, digests });
            }
            (ReceiverMessage::Page { volume, page, draft, digests }, State::Ready { volumes }) => {
                let page = PageIndex(page);
                if self.asked.front() != Some(&Question::Page(volume, page)) {
                    return Err(UNASKED);
                }
                let held = read_held(geometry(volumes, volume)?, page, &draft, digests)?;
                self.answered(now);
                self.output.push_back(SourceOutput::Page { volume, page, held });
            }
            (ReceiverMessage::Committed(committed), State::Committing { commit }) => {
                if committed.commit != *commit {
                    return Err(SourceError::Protocol("another commit than asked for"));
                }
                self.state = State::Idle;
                self.deadline = None;
                self.output.push_back(SourceOutput::Committed(committed));
            }
            _ => return Err(SourceError::Protocol("a message that does not belong here")),
        }
        Ok(())
    }

    fn answered(&mut self, now: Duration) {
        self.asked.pop_front();
        self.deadline = if self.asked.is_empty() { None } else { Some(now + self.patience) };
    }

    /// When [`Self::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.deadline
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Duration) {
        if self.deadline.is_some_and(|d| d <= now) {
            self.fail(SourceError::Timeout(self.patience));
        }
    }

    fn fail(&mut self, error: SourceError) {
        self.state = State::Closed;
        self.deadline = None;
        self.asked.clear();
        self.output.push_back(SourceOutput::Failed(error));
    }

    /// The next thing to do or to know.
    pub fn poll_output(&mut self) -> Option<SourceOutput> {
        self.output.pop_front()
    }
}

fn geometry(volumes: &[(VolumeSlot, Geometry)], slot: VolumeSlot) -> Result<Geometry, SourceError> {
    let found = volumes.iter().find(|(s, _)| *s == slot);
    found.map(|(_, g)| *g).ok_or(SourceError::Protocol("a volume that is not in this session"))
}

/// Checks the answer to a question for a page.
pub fn read_held(
    geometry: Geometry,
    page: PageIndex,
    draft: &[u8],
    digests: Vec<BlockDigest>,
) -> Result<Held, SourceError> {
    let blocks = geometry.page_blocks(page);
    let draft = BlockSet::from_bytes(draft).ok_or(SourceError::Protocol("a block set of the wrong size"))?;
    let beyond = (blocks..BLOCKS_PER_PAGE as usize).any(|i| draft.contains(i));
    if digests.len() != blocks || beyond {
        return Err(SourceError::Protocol("a wrong number of block digests"));
    }
    Ok(Held { digests, draft })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{LogSeq, StateId};
    use crate::store::log::MachineId;
    use crate::wire::message::Waiting;

    #[test]
    fn a_receiver_that_waits_for_its_store_is_waited_for() {
        let second = Duration::from_secs;
        let mut source = Source::new(second(10));
        let waiting = || ReceiverMessage::Waiting(Waiting { text: "x".into(), seconds: 3, limit: 180 });
        // While nothing is asked it starts no clock.
        source.handle_message(second(0), waiting());
        assert_eq!(source.poll_timeout(), None);
        let open = Open {
            state: StateId([1; 16]),
            nonces: Vec::new(),
            machine: MachineId([2; 32]),
            high_water: LogSeq(0),
            volumes: Vec::new(),
        };
        source.open(second(1), open);
        assert!(matches!(source.poll_output(), Some(SourceOutput::Send(_))));
        source.handle_message(second(9), waiting());
        source.handle_timeout(second(11));
        assert_eq!((source.poll_output(), source.poll_timeout()), (None, Some(second(19))));
        source.handle_timeout(second(19));
        assert!(matches!(source.poll_output(), Some(SourceOutput::Failed(SourceError::Timeout(_)))));
    }
}
