//! Tells an agent that its receiver waits for the store: silence would look like a hang.
//!
//! Read first: [`tell`].

use std::time::Duration;

use backhaul_protocol::wire::message::{ReceiverMessage, Waiting};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::store::Waits;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);
/// How often an agent is told while it goes on: well within the time that it waits for an answer.
const AGAIN: Duration = Duration::from_secs(15);

/// Sends a notice while the store does not answer, and again from time to time, until the returned value is dropped.
pub fn tell(waits: Option<Waits>, out: mpsc::Sender<ReceiverMessage>) -> JoinSet<()> {
    let mut task = JoinSet::new();
    if let Some(waits) = waits {
        task.spawn(run(waits, out));
    }
    task
}

async fn run(waits: Waits, out: mpsc::Sender<ReceiverMessage>) {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told: Option<Instant> = None;
    loop {
        look.tick().await;
        let Some(waiting) = waits.longest() else {
            told = None;
            continue;
        };
        if told.is_some_and(|at| at.elapsed() < AGAIN) {
            continue;
        }
        let seconds = |d: Duration| u32::try_from(d.as_secs()).unwrap_or(u32::MAX);
        let notice = Waiting {
            text: waiting.reason.clone(),
            seconds: seconds(waiting.since.elapsed()),
            limit: seconds(waiting.total),
        };
        if out.send(ReceiverMessage::Waiting(notice)).await.is_err() {
            return;
        }
        told = Some(Instant::now());
    }
}
