//! `run`: the service. A round at every interval, a point when something changed and at least every hour.

use std::time::{Duration, Instant};

use backhaul_cli::{Exit, Failure, Output, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{LogSeq, StateId};
use backhaul_protocol::store::log::UnixMillis;
use backhaul_seams::random;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::capture;
use crate::config::{Config, EVERY};
use crate::connection::{Session, SessionError, connect, renewal_is_due};
use crate::machine::machine_id;
use crate::protect;
use crate::quiesce::{self, Quiescer};
use crate::replicate::{CommitWhen, Round, RoundError, RoundReport};
use crate::state::{Joined, StateDir};
use crate::status::{RunState, StatusServer};
use crate::tracker::Tracking;
use crate::tracker::checks::Checks;
use crate::tracker::hints::KernelHints;

/// A point is committed at least this often, though nothing changed.
const AT_LEAST: Duration = Duration::from_secs(3600);
/// A renewal that failed is tried again this often: ten days are left for it.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(3600);
/// The longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// The same where an attempt costs a few packets or nothing: the receiver can't be reached, a volume is not there. Every
/// second of waiting is one that the last point gets older after what is missing is back.
const MAX_SHORT_BACKOFF: Duration = Duration::from_secs(5);

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// How often to make a point
    #[arg(long, value_parser = text::parse_duration, value_name = "TIME")]
    pub every: Option<Duration>,
}

/// Runs the command until SIGTERM or SIGINT.
pub async fn run(args: RunArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let every = args.every.unwrap_or(ctx.config.every);
    if !EVERY.contains(&every) {
        return Err(Failure::new(Exit::Usage, "E_USAGE", "--every wants from 1s to 7d").into());
    }
    let state = ctx.state();
    let joined = ctx.joined_writer()?;
    let _lock = state.lock()?;
    let status = StatusServer::start(&state)?;
    ctx.pay_hooks().await?;
    let tracking = tracking(&ctx.config, joined.state)?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut service = Service {
        ctx,
        state: &state,
        joined: &joined,
        out: &out,
        session: None,
        last_commit: None,
        last_label: None,
        failures: 0,
        renewal_tried: None,
        status: &status,
        tracking,
        said: Vec::new(),
    };
    loop {
        let begun = Instant::now();
        let wait = tokio::select! {
            biased;
            _ = term.recv() => break,
            _ = int.recv() => break,
            wait = service.round(every) => wait?,
        };
        tokio::select! {
            biased;
            _ = term.recv() => break,
            _ = int.recv() => break,
            () = tokio::time::sleep(wait.saturating_sub(begun.elapsed())) => {}
        }
    }
    if let Some(session) = service.session.take() {
        session.close().await;
    }
    Ok(Exit::Done)
}

/// Marks by the kernel, freezes by the helper.
fn tracking(config: &Config, state: StateId) -> std::io::Result<Tracking> {
    let start = || Quiescer::start(quiesce::helper(&state.0), config.limits);
    let quiescer = config.snapshot.freezes().then(start).transpose()?;
    Ok(Tracking::new(Box::new(KernelHints::new(state)), quiescer, Checks::new(config.full_scan_every)))
}

struct Service<'a> {
    ctx: &'a Context,
    state: &'a StateDir,
    joined: &'a Joined,
    out: &'a Output,
    session: Option<Session>,
    last_commit: Option<Instant>,
    last_label: Option<Consistency>,
    failures: u32,
    renewal_tried: Option<Instant>,
    status: &'a StatusServer,
    tracking: Tracking,
    /// The caveats that were logged last.
    said: Vec<String>,
}

impl Service<'_> {
    /// One round; gives how long after its beginning the next one begins. Only what a person must mend is an error.
    async fn round(&mut self, every: Duration) -> anyhow::Result<Duration> {
        match self.try_round().await {
            Ok(report) => {
                self.failures = 0;
                if report.committed.is_some() {
                    self.last_commit = Some(Instant::now());
                    self.last_label = Some(report.consistency);
                }
                self.note(&report);
                Ok(every)
            }
            Err(error) => {
                self.session = None;
                self.failures += 1;
                let round = error.downcast_ref::<RoundError>();
                let doubled = Duration::from_millis(500) * 2u32.saturating_pow(self.failures.min(8));
                let (state, most) = match round {
                    Some(RoundError::Session(SessionError::Transport(e))) if e.is_retryable() => {
                        (RunState::Disconnected, MAX_SHORT_BACKOFF)
                    }
                    Some(e) if e.is_divergence() => (RunState::Diverged, MAX_BACKOFF),
                    Some(RoundError::Session(e)) if e.is_retryable() => (RunState::Disconnected, MAX_BACKOFF),
                    Some(RoundError::Volume { .. }) => (RunState::Stalled, MAX_SHORT_BACKOFF),
                    Some(_) => (RunState::Stalled, MAX_BACKOFF),
                    // Found out on this machine, before anybody was asked.
                    None => (RunState::Stalled, MAX_SHORT_BACKOFF),
                };
                let waits = round.is_none_or(RoundError::is_retryable);
                let backoff = if waits { jitter(doubled.min(most)) } else { most };
                let text = self.out.explain(&error);
                self.out.warn(&format!("{text}; trying again in {}", text::duration(backoff)));
                self.status.failed(state, text);
                Ok(backoff)
            }
        }
    }

    async fn try_round(&mut self) -> anyhow::Result<RoundReport> {
        let (volumes, said) = protect::refresh(self.state)?;
        if self.last_commit.is_none() {
            said.iter().for_each(|s| self.out.warn(s));
        }
        if volumes.is_empty() {
            return Err(protect::nothing().into());
        }
        // A session that lives for weeks must not outlive the certificate that it began with.
        let renewal_is_due = self.renewal_tried.is_none_or(|t| t.elapsed() >= RENEWAL_INTERVAL)
            && renewal_is_due(self.state).map_err(RoundError::from)?;
        let mut session = match self.session.take().filter(|_| !renewal_is_due) {
            Some(session) => session,
            None => {
                self.renewal_tried = Some(Instant::now());
                let config = &self.ctx.config;
                let connecting = connect(self.state, self.joined, config.receiver.as_deref(), config.tuning);
                Session::new(connecting.await.map_err(RoundError::from)?)
            }
        };
        let due = self.last_commit.is_none_or(|t| t.elapsed() >= AT_LEAST);
        let total = volumes.iter().map(|v| v.geometry.length()).sum();
        let provider = capture::provider(&self.ctx.config.snapshot, self.state, self.joined, &volumes);
        let round = Round {
            state: self.state,
            joined: self.joined,
            machine: machine_id(&self.ctx.config.machine_id_file)?,
            volumes: &volumes,
            provider: &*provider,
            threads: self.ctx.config.threads,
            compression: self.ctx.config.compression,
            when: match self.last_label {
                _ if due => CommitWhen::Always,
                Some(label) => CommitWhen::ChangedOrBetterThan(label),
                None => CommitWhen::Changed,
            },
            progress: Output::progress(&self.quiet(), 1).phase("scan and send", total),
            observe: &|stage| self.status.begun(stage),
        };
        let report = round.run(&mut session, &mut self.tracking).await?;
        self.session = Some(session);
        Ok(report)
    }

    /// A service draws no bars.
    fn quiet(&self) -> Output {
        self.out.clone().quieted()
    }

    fn note(&mut self, report: &RoundReport) {
        if let Some(committed) = report.committed {
            tracing::info!(
                point = committed.seq.0,
                consistency = %report.consistency,
                sent = report.bytes_sent,
                frozen_ms = report.frozen_for.map(|d| d.as_secs_f64() * 1e3),
                seconds = report.took.as_secs_f64(),
                "point"
            );
            // Said when it changes, and not with every point.
            if report.caveats != self.said {
                report.caveats.iter().for_each(|caveat| tracing::warn!(point = committed.seq.0, "{caveat}"));
                self.said.clone_from(&report.caveats);
            }
        }
        let point: Option<(LogSeq, UnixMillis)> = Some((report.head, report.capture_start));
        self.status.succeeded(point, report);
    }
}

/// Between half and all of it, so that many agents do not come back at the same moment.
fn jitter(d: Duration) -> Duration {
    let random = random::number();
    d / 2 + d.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}
