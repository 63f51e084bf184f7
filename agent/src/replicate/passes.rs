//! Passes over the volumes of a round, one after the other, through the same threads and streams.
//!
//! Read first: [`Passes::run`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use backhaul_cli::Phase;
use backhaul_protocol::ids::CaptureNumber;
use backhaul_seams::threads;
use tokio::sync::mpsc;

use super::feeding::{Feeder, Known, Look, PlannedVolume};
use super::tally::{ScanSum, Tally};
use super::{Round, RoundError};
use crate::connection::{Session, SessionError};
use crate::pipeline::pace::Pace;
use crate::pipeline::scanner::{Job, ScanError, ScanShared, Scanned, Scanner};
use crate::pipeline::sender::Sender;

/// All that scans and sends in a round.
pub(super) struct Passes {
    sender: Sender,
    scanner: Scanner,
    shared: Arc<ScanShared>,
    sent: Arc<AtomicU64>,
    threads: usize,
    tally: Tally,
}

impl Passes {
    /// Starts threads and streams.
    pub(super) fn start(
        round: &Round<'_>,
        session: &Session,
        first_capture: CaptureNumber,
    ) -> Result<Self, RoundError> {
        let sender = Sender::start(&session.link, &round.load);
        let shared = Arc::new(ScanShared {
            capture: AtomicU64::new(first_capture.0),
            stop: AtomicBool::new(false),
            pace: Pace::new(round.compression, Some(session.link.clone())),
            load: round.load.clone(),
        });
        let scanner =
            Scanner::start(round.threads, shared.clone(), sender.pieces.clone()).map_err(RoundError::Threads)?;
        let sent = sender.bytes();
        Ok(Self { sender, scanner, shared, sent, threads: round.threads, tally: Tally::default() })
    }

    /// Scans what `looks` names, one for each volume, and sends what differs from what the receiver has. Tells `found`
    /// of every page.
    pub(super) async fn run(
        &mut self,
        session: &mut Session,
        planned: &mut [PlannedVolume],
        looks: &[Look],
        progress: Option<Phase>,
        mut found: impl FnMut(&Scanned),
    ) -> Result<(), RoundError> {
        let mut feeder = Feeder::new(planned, looks, self.threads, progress);
        loop {
            feeder.ask(session);
            if feeder.is_done() {
                break;
            }
            // Sent here and not inside the select: a message that is cut off would break the stream.
            session.send_pending().await?;
            let ready = feeder.is_ready();
            tokio::select! {
                biased;
                error = self.sender.failed() => return Err(SessionError::from(error).into()),
                scanned = self.scanner.scanned.recv() => {
                    let scanned = scanned.ok_or(ScanError::Stopped)??;
                    feeder.done(&scanned);
                    for page in &scanned {
                        self.tally.add(page);
                        found(page);
                    }
                }
                permit = reserve(&self.scanner.jobs), if ready => {
                    let (Some(permit), Some(job)) = (permit, feeder.take()) else { return Err(ScanError::Stopped.into()) };
                    permit.send(job);
                }
                output = session.next() => feeder.answer(output?)?,
            }
        }
        planned.iter_mut().for_each(|p| p.known = Known::Sent);
        Ok(())
    }

    /// Ends threads and streams, and adds up.
    pub(super) async fn finish(self, planned: &[PlannedVolume]) -> Result<ScanSum, RoundError> {
        let Self { sender, scanner, shared, sent, tally, .. } = self;
        drop(scanner);
        sender.finish().await.map_err(SessionError::from)?;
        let volumes: Vec<_> = planned.iter().map(|p| (p.opened.slot, p.scan.geometry, p.scan.index.clone())).collect();
        let add_up = move || {
            let digests = tally.digests(volumes.iter().map(|(slot, geometry, index)| (*slot, *geometry, &**index)));
            digests.map(|digests| (digests, tally))
        };
        let (digests, tally) = threads::blocking(add_up).await.map_err(ScanError::from)?;
        let next_capture = shared.capture.load(Ordering::Relaxed);
        Ok(ScanSum {
            digests,
            records: tally.records,
            bytes_scanned: tally.bytes_scanned,
            bytes_sent: sent.load(Ordering::Relaxed),
            max_capture: CaptureNumber(next_capture.saturating_sub(1)),
        })
    }
}

async fn reserve(jobs: &mpsc::Sender<Job>) -> Option<mpsc::Permit<'_, Job>> {
    jobs.reserve().await.ok()
}
