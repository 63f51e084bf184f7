//! Tells an agent that its receiver waits for the store, or is still at work: silence would look like a hang.
//!
//! Read first: [`tell`]. What it says is the same for all agents: which object does not come is nobody's business but
//! that of the receiver's own log.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backhaul_protocol::wire::message::{ReceiverMessage, Waiting};
use backhaul_seams::mutant::{Mutant, planted};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::store::Waits;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);
/// How often an agent is told while it goes on: well within the time that it waits for an answer.
const AGAIN: Duration = Duration::from_secs(15);

/// Work on one message that takes longer is told about. A commit that folds a large draft may take minutes, all of them
/// short calls of the store.
const LONG: Duration = Duration::from_secs(10);

/// Since when a session works on a message.
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<Mutex<Option<Instant>>>);

/// It works until this is dropped.
#[derive(Debug)]
pub struct AtWork(Busy);

impl Busy {
    /// It begins to work on a message.
    pub fn begin(self) -> AtWork {
        *self.lock() = Some(Instant::now());
        AtWork(self)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// Sends a notice while the store does not answer or `busy` takes long, and again from time to time, until the returned
/// value is dropped.
pub fn tell(waits: Option<Waits>, busy: Busy, out: mpsc::Sender<ReceiverMessage>) -> JoinSet<()> {
    let mut task = JoinSet::new();
    task.spawn(run(waits, busy, out));
    task
}

async fn run(waits: Option<Waits>, busy: Busy, out: mpsc::Sender<ReceiverMessage>) {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Option<Instant> = None;
    loop {
        look.tick().await;
        let Some(notice) = notice(waits.as_ref(), &busy) else {
            told = None;
            continue;
        };
        if told.is_some_and(|at| at.elapsed() < AGAIN) {
            continue;
        }
        if out.send(ReceiverMessage::Waiting(notice)).await.is_err() {
            return;
        }
        told = Some(Instant::now());
    }
}

fn notice(waits: Option<&Waits>, busy: &Busy) -> Option<Waiting> {
    if planted(Mutant::WaitingNotSaid) {
        return None;
    }
    let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
    if let Some(waiting) = waits.and_then(Waits::longest) {
        let (since, limit) = (seconds(waiting.since.elapsed()), seconds(waiting.total));
        return Some(Waiting { text: "the store does not answer".into(), seconds: since, limit });
    }
    let since = (*busy.lock())?.elapsed();
    let text = || "what was asked for is much work".into();
    (since >= LONG).then(|| Waiting { text: text(), seconds: seconds(since), limit: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agent_hears_of_long_work_and_not_of_short() {
        let busy = Busy::default();
        let work = busy.clone().begin();
        assert!(notice(None, &busy).is_none(), "it has just begun");
        *busy.lock() = Instant::now().checked_sub(LONG + Duration::from_secs(1));
        let said = notice(None, &busy).expect("it takes long");
        assert_eq!((said.seconds, said.limit), (11, 0));
        assert!(said.to_string().contains("at work"), "{said}");
        drop(work);
        assert!(notice(None, &busy).is_none(), "it is done");
    }

    #[tokio::test]
    async fn what_does_not_come_is_told_to_nobody() {
        let waits = Waits::default();
        let reason = "cannot get groups/x/segments/y".to_owned();
        let _wait = waits.begin(crate::store::Waiting { since: Instant::now(), total: LONG, reason });
        let said = notice(Some(&waits), &Busy::default()).expect("the store does not answer");
        assert!(!said.text.contains("groups/"), "{said}");
    }
}
