//! `run`: the service. A round at every interval, a point when something changed and at least every hour.
//!
//! Read first: [`run`], then `Service::round`. Intervals count from beginning to beginning; a round that took longer is
//! followed by the next one at once, and what was missed while nothing went is not made up for.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_cli::{Exit, Failure, Output, text};
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::StateId;
use backhaul_seams::random;
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use super::Context;
use crate::capture;
use crate::condition::{Condition, RunState};
use crate::config::{Config, EVERY};
use crate::connection::{Session, SessionError, connect, renewal_is_due, unix_millis};
use crate::machine::machine_id;
use crate::pipeline::load::Load;
use crate::pipeline::schedule::local_now;
use crate::quiesce::{self, Quiescer};
use crate::replicate::{CommitWhen, Round, RoundError, RoundReport};
use crate::state::{Joined, StateDir};
use crate::status::StatusServer;
use crate::tracker::Tracking;
use crate::tracker::checks::Checks;
use crate::tracker::hints::KernelHints;
use crate::{metrics, protect};

/// A point is committed at least this often, though nothing changed.
const AT_LEAST: Duration = Duration::from_secs(3600);
/// A renewal that failed is tried again this often: ten days are left for it.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(3600);
/// The longest wait between two attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// The same where an attempt costs a few packets or nothing: the receiver can't be reached, a volume is not there. Every
/// second of waiting is one that the last point gets older after what is missing is back.
const MAX_SHORT_BACKOFF: Duration = Duration::from_secs(5);
/// How often it is looked whether somebody wants a pause, and what the status says is brought up to date.
const LOOK: Duration = Duration::from_millis(500);
/// A receiver that is gone is not waited for when the service ends.
const GOODBYE: Duration = Duration::from_secs(1);

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// How often to make a point
    #[arg(long, value_parser = text::parse_duration, value_name = "TIME")]
    pub every: Option<Duration>,
}

/// Runs the command until SIGTERM or SIGINT.
pub async fn run(args: RunArgs, ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let config = ctx.config.clone();
    let every = args.every.unwrap_or(config.every);
    if !EVERY.contains(&every) {
        return Err(Failure::new(Exit::Usage, "E_USAGE", "--every wants from 1s to 7d").into());
    }
    let state = ctx.state();
    let joined = ctx.joined_writer()?;
    let _lock = state.lock()?;
    // Handlers before anybody can see that it runs.
    let mut signals = Signals::new()?;
    let load = Load::new(config.load.clone());
    let last = state.writer()?.last.map(|l| l.protected_until);
    let status = StatusServer::start(&state, Condition::new(Instant::now(), every, last), load.clone())?;
    if let Some(at) = config.metrics {
        metrics::start(at, &joined, status.reports()).await;
    }
    ctx.pay_hooks().await?;
    let tracking = tracking(&config, joined.state)?;
    let mut service = Service {
        every_typed: args.every,
        every,
        config,
        load,
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
    service.serve(&mut signals).await?;
    if let Some(session) = service.session.take() {
        let _ = tokio::time::timeout(GOODBYE, session.close()).await;
    }
    Ok(Exit::Done)
}

/// Marks by the kernel, freezes by the helper.
fn tracking(config: &Config, state: StateId) -> std::io::Result<Tracking> {
    let quiescer = quiescer(config, state)?;
    Ok(Tracking::new(Box::new(KernelHints::new(state)), quiescer, Checks::new(config.full_scan_every)))
}

fn quiescer(config: &Config, state: StateId) -> std::io::Result<Option<Quiescer>> {
    let start = || Quiescer::start(quiesce::helper(&state.0), config.limits);
    config.snapshot.freezes().then(start).transpose()
}

/// What the outside wants.
struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

/// What is to be done about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wish {
    Stop,
    Reload,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let [term, int, hup] = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
        Ok(Self { term: term?, int: int?, hup: hup? })
    }

    /// Cancel safe.
    async fn next(&mut self) -> Wish {
        tokio::select! {
            biased;
            _ = self.term.recv() => Wish::Stop,
            _ = self.int.recv() => Wish::Stop,
            _ = self.hup.recv() => Wish::Reload,
        }
    }
}

/// How a round ended.
enum Ended {
    /// By itself: the next one begins so long after this one began.
    Next(Duration),
    /// It was given up, since it is to be paused.
    GivenUp,
    /// The same, since the service ends.
    Stopped,
}

struct Service<'a> {
    /// What counts more than the settings.
    every_typed: Option<Duration>,
    every: Duration,
    config: Config,
    load: Arc<Load>,
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
    /// Round after round, until it is to end. Only what a person must mend is an error.
    async fn serve(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        loop {
            if !self.paused(signals).await {
                return Ok(());
            }
            let begun = Instant::now();
            let mut reload = false;
            let next = match self.watched(signals, &mut reload).await {
                Ended::Next(next) => next,
                Ended::GivenUp => Duration::ZERO,
                Ended::Stopped => return Ok(()),
            };
            if reload {
                self.reload()?;
            }
            if !self.wait(signals, begun, next).await? {
                return Ok(());
            }
        }
    }

    /// Waits while it is to be paused; whether to go on.
    async fn paused(&mut self, signals: &mut Signals) -> bool {
        while let Some(cause) = why_paused(self.state, &self.config) {
            if let Some(session) = self.session.take() {
                let _ = tokio::time::timeout(GOODBYE, session.close()).await;
            }
            self.status.paused(cause);
            self.status.tick();
            tokio::select! {
                biased;
                wish = signals.next() => match wish {
                    Wish::Stop => return false,
                    Wish::Reload => if let Err(error) = self.reload() { tracing::warn!("SIGHUP: {error}") },
                },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        true
    }

    /// A round, which is given up when the service is to end or to be paused. What had arrived by then is kept by the
    /// receiver and not sent again; what was marked and taken comes back; what is frozen is thawed by its own thread.
    async fn watched(&mut self, signals: &mut Signals, reload: &mut bool) -> Ended {
        let (state, status, config) = (self.state, self.status, self.config.clone());
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ended = {
            let mut round = pin!(self.round());
            loop {
                tokio::select! {
                    biased;
                    wish = signals.next() => match wish {
                        Wish::Stop => break Ended::Stopped,
                        // A round keeps the settings that it began with.
                        Wish::Reload => *reload = true,
                    },
                    next = &mut round => break Ended::Next(next),
                    _ = looks.tick() => {
                        status.tick();
                        if why_paused(state, &config).is_some() {
                            break Ended::GivenUp;
                        }
                    }
                }
            }
        };
        if !matches!(ended, Ended::Next(_)) {
            self.session = None;
            self.tracking.forget();
            self.tracking.quiescer.iter().for_each(Quiescer::release);
        }
        ended
    }

    /// Waits until `next` after `begun`; whether to go on.
    async fn wait(&mut self, signals: &mut Signals, begun: Instant, mut next: Duration) -> anyhow::Result<bool> {
        while let Some(left) = next.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
            tokio::select! {
                biased;
                wish = signals.next() => match wish {
                    Wish::Stop => return Ok(false),
                    Wish::Reload => {
                        self.reload()?;
                        next = next.min(self.every);
                    }
                },
                () = tokio::time::sleep(left.min(LOOK)) => {
                    self.status.tick();
                    if why_paused(self.state, &self.config).is_some() {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Reads the settings again. What is wrong with them is said, and nothing changes.
    fn reload(&mut self) -> anyhow::Result<()> {
        let mut new = match self.config.again() {
            Ok(new) => new,
            Err(failure) => {
                tracing::error!("SIGHUP: the settings stay as they were: {}", failure.message);
                return Ok(());
            }
        };
        let old = &self.config;
        let fixed = [
            ("state", new.state != old.state),
            ("receiver", new.receiver != old.receiver),
            ("metrics", new.metrics != old.metrics),
        ];
        let fixed: Vec<&str> = fixed.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect();
        if !fixed.is_empty() {
            tracing::warn!("SIGHUP: what is new for {} counts when the service is started again", fixed.join(", "));
        }
        new.state.clone_from(&old.state);
        new.receiver.clone_from(&old.receiver);
        new.metrics = old.metrics;
        if new.limits != old.limits || new.snapshot.freezes() != old.snapshot.freezes() {
            self.tracking.quiescer = quiescer(&new, self.joined.state)?;
        }
        self.tracking.checks.set_period(new.full_scan_every);
        self.load.set(new.load.clone());
        self.every = self.every_typed.unwrap_or(new.every);
        self.status.set_every(self.every);
        self.config = new;
        tracing::warn!("SIGHUP: the settings were read again");
        Ok(())
    }

    /// One round; gives how long after its beginning the next one begins.
    async fn round(&mut self) -> Duration {
        let begun = Instant::now();
        self.status.begun();
        match self.try_round().await {
            Ok(report) => {
                self.failures = 0;
                if report.committed.is_some() {
                    self.last_commit = Some(Instant::now());
                    self.last_label = Some(report.consistency);
                }
                self.note(&report);
                self.every
            }
            Err(error) => {
                self.session = None;
                self.failures += 1;
                let (state, most) = self.what_now(&error);
                let doubled = Duration::from_millis(500) * 2u32.saturating_pow(self.failures.min(8));
                let waits = error.downcast_ref::<RoundError>().is_none_or(RoundError::is_retryable);
                let backoff = if waits { jitter(doubled.min(most)) } else { most };
                let text = match error.downcast_ref::<RoundError>() {
                    Some(RoundError::Moving(why)) => why.clone(),
                    _ => self.out.explain(&error),
                };
                tracing::debug!(%error, ?backoff, "a round failed");
                self.status.failed(state, text);
                // An attempt to reach somebody is a wait by itself; other rounds cost the server something.
                if state == RunState::Disconnected { backoff } else { begun.elapsed() + backoff }
            }
        }
    }

    /// What a failure says of the state, and how long to wait at most.
    fn what_now(&self, error: &anyhow::Error) -> (RunState, Duration) {
        match error.downcast_ref::<RoundError>() {
            Some(RoundError::Session(SessionError::Transport(e))) if e.is_retryable() => {
                (RunState::Disconnected, MAX_SHORT_BACKOFF)
            }
            Some(e) if e.is_divergence() => (RunState::Diverged, MAX_BACKOFF),
            Some(RoundError::Session(e)) if e.is_retryable() => (RunState::Disconnected, MAX_BACKOFF),
            Some(RoundError::Moving(_)) => (RunState::Stalled, self.every.max(MAX_SHORT_BACKOFF).min(MAX_BACKOFF)),
            Some(RoundError::Volume { .. }) => (RunState::Stalled, MAX_SHORT_BACKOFF),
            Some(_) => (RunState::Stalled, MAX_BACKOFF),
            // Found out on this machine, before anybody was asked.
            None => (RunState::Stalled, MAX_SHORT_BACKOFF),
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
                let config = &self.config;
                let connecting = connect(self.state, self.joined, config.receiver.as_deref(), config.tuning);
                Session::new(connecting.await.map_err(RoundError::from)?)
            }
        };
        let due = self.last_commit.is_none_or(|t| t.elapsed() >= AT_LEAST);
        let total = volumes.iter().map(|v| v.geometry.length()).sum();
        let provider = capture::provider(&self.config.snapshot, self.state, self.joined, &volumes);
        let round = Round {
            state: self.state,
            joined: self.joined,
            machine: machine_id(&self.config.machine_id_file)?,
            volumes: &volumes,
            provider: &*provider,
            threads: self.config.threads,
            load: self.load.clone(),
            compression: self.config.compression,
            when: match self.last_label {
                _ if due => CommitWhen::Always,
                Some(label) => CommitWhen::ChangedOrBetterThan(label),
                None => CommitWhen::Changed,
            },
            progress: Output::progress(&self.quiet(), 1).phase("scan and send", total),
            observe: &|stage| self.status.looks(stage),
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
        self.status.succeeded(report);
    }
}

/// Why no points are to be made now, until when, and who wants it so.
fn why_paused(state: &StateDir, config: &Config) -> Option<String> {
    match state.paused(unix_millis()) {
        Ok(Some(paused)) => return Some(paused.to_string()),
        Ok(None) => {}
        // Somebody meant something: it is not for a program to guess that it was nothing.
        Err(error) => return Some(format!("{error}; `backhaul-agent resume` removes it")),
    }
    if config.load.send.windows.is_empty() {
        return None;
    }
    let now = local_now();
    let window = config.load.send.window(&now).filter(|w| w.rate == 0)?;
    let until = config.load.send.next_change(&now).map_or(String::new(), |at| format!("until {at}, "));
    Some(format!("{until}by the settings: send_window {window} has the rate 0"))
}

/// Between half and all of it, so that many agents do not come back at the same moment.
fn jitter(d: Duration) -> Duration {
    let random = random::number();
    d / 2 + d.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0)
}
