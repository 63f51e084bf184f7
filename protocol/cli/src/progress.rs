//! Progress on standard error: a bar on a terminal, a plain line every ten seconds elsewhere.
//!
//! Phases are numbered. A phase reaches 100 % when its work is done and not before.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::text;

const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of a command.
#[derive(Clone, Debug)]
pub struct Progress {
    phases: usize,
    begun: usize,
    quiet: bool,
}

/// One phase; cheap to clone and to share with threads.
#[derive(Clone, Debug)]
pub struct Phase(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    total: u64,
    done: AtomicU64,
    started: Instant,
    /// Milliseconds since `started` when the last plain line was printed.
    printed: AtomicU64,
    bar: ProgressBar,
    plain: bool,
    unit: Unit,
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unit {
    Bytes,
    /// Milliseconds, shown as seconds.
    Time,
}

impl Unit {
    fn template(self) -> &'static str {
        match self {
            Self::Bytes => "{prefix} {bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} eta {eta}",
            Self::Time => "{prefix} {bar:30} {percent:>3}% eta {eta}",
        }
    }

    fn show(self, n: u64) -> String {
        match self {
            Self::Bytes => text::bytes(n),
            Self::Time => text::duration(Duration::from_millis(n)),
        }
    }
}

impl Progress {
    pub(crate) fn new(phases: usize, quiet: bool) -> Self {
        Self { phases, begun: 0, quiet }
    }

    /// Begins the next phase, of so many bytes.
    pub fn phase(&mut self, name: &str, total: u64) -> Phase {
        self.begin(name, total, Unit::Bytes)
    }

    /// Begins the next phase, which takes so long; [`Phase::add`] is told milliseconds.
    pub fn timed_phase(&mut self, name: &str, time: Duration) -> Phase {
        self.begin(name, time.as_millis() as u64, Unit::Time)
    }

    fn begin(&mut self, name: &str, total: u64, unit: Unit) -> Phase {
        self.begun += 1;
        let name = format!("[{}/{}] {name}", self.begun, self.phases.max(self.begun));
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal && !self.quiet {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(unit.template());
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(name.clone());
            bar
        } else {
            ProgressBar::hidden()
        };
        Phase(Arc::new(Inner {
            name,
            total,
            done: AtomicU64::new(0),
            started: Instant::now(),
            printed: AtomicU64::new(0),
            bar,
            plain: !terminal && !self.quiet,
            unit,
        }))
    }
}

impl Phase {
    /// So many bytes, or milliseconds, more are done.
    pub fn add(&self, bytes: u64) {
        let inner = &self.0;
        let done = inner.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        inner.bar.inc(bytes);
        if inner.plain {
            let now = inner.started.elapsed().as_millis() as u64;
            let last = inner.printed.load(Ordering::Relaxed);
            let due = now - last.min(now) >= PLAIN_INTERVAL.as_millis() as u64;
            if due && inner.printed.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                inner.print(done, false);
            }
        }
    }

    /// All of the phase's work is done.
    pub fn finish(&self) {
        let inner = &self.0;
        inner.bar.finish();
        if inner.plain && inner.started.elapsed() >= PLAIN_INTERVAL {
            inner.print(inner.total, true);
        }
    }
}

impl Inner {
    fn print(&self, done: u64, finished: bool) {
        // 100 % only when it is finished: rounding never says so earlier.
        let percent = if finished { 100 } else { (done.min(self.total) * 100 / self.total.max(1)).min(99) };
        let line = format!("{} {percent}% {} of {}", self.name, self.unit.show(done), self.unit.show(self.total));
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }
}
