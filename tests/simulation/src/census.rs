//! Which situations histories must have reached, and how attempts ended.
//!
//! Read first: [`REQUIRED`].

use backhaul_agent::connection::SessionError;
use backhaul_agent::replicate::RoundError;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::wire::message::{CloseCode, Reason};
use backhaul_transport::error::TransportError;

use crate::agent::Outcome;
use crate::ledger::{Ledger, Standing};

/// Counts how an attempt ended, and judges it; `began` is how the agent stood when it began.
pub fn note(ledger: &Ledger, node: usize, began: Standing, outcome: &Outcome) {
    match outcome {
        Ok(report) => {
            ledger.trace(format_args!("node {node}: {:?} {}", report.committed.map(|c| c.seq), report.consistency));
            ledger.count(match (report.committed, report.consistency) {
                (None, _) => "nothing to commit",
                (Some(_), Consistency::Fuzzy) => "fuzzy point",
                (Some(_), _) => "point",
            });
        }
        Err(error) => {
            ledger.trace(format_args!("node {node}: {error}"));
            let kind = kind(error);
            ledger.count(kind);
            if let Some(invariant) = broken(kind, ledger, ledger.standing(node), began) {
                ledger.violation(invariant, format_args!("node {node}, {kind}: {error}"));
            }
        }
    }
}

/// Which invariant does not hold where an honest agent's attempt ends like this.
fn broken(kind: &str, ledger: &Ledger, now: Standing, began: Standing) -> Option<&'static str> {
    let may_diverge = began.is_suspect || now.is_suspect || now.times != began.times;
    match kind {
        "refused: diverged" if !may_diverge => Some("I14"),
        "refused: store" if !ledger.is_harmed() && !ledger.is_resent() => Some("I14"),
        "refused: damaged" if !ledger.is_harmed() => Some("I8"),
        "refused: digest" | "refused: volume" | "refused: protocol" | "refused: other" => Some("I14"),
        "receiver broke the protocol" | "failed on this machine" => Some("I14"),
        _ => None,
    }
}

fn kind(error: &RoundError) -> &'static str {
    let RoundError::Session(error) = error else { return "failed on this machine" };
    match error {
        SessionError::Source(SourceError::Refused(refusal)) => match refusal.reason {
            Reason::Diverged => "refused: diverged",
            Reason::Conflict => "refused: conflict",
            Reason::Superseded => "refused: superseded",
            Reason::Busy => "refused: busy",
            Reason::Unavailable => "refused: store unavailable",
            Reason::Damaged => "refused: damaged",
            Reason::Digest => "refused: digest",
            Reason::Volume => "refused: volume",
            Reason::Protocol => "refused: protocol",
            Reason::Store => "refused: store",
            Reason::NoSpace => "refused: no space",
            _ => "refused: other",
        },
        SessionError::Source(SourceError::Timeout(_)) => "answer too late",
        SessionError::Source(SourceError::Protocol(_)) => "receiver broke the protocol",
        SessionError::Transport(error) => match (error.close_code(), error) {
            (Some(CloseCode::Superseded), _) => "closed: superseded",
            (Some(CloseCode::ShuttingDown), _) => "closed: shutting down",
            (Some(_), _) => "closed: other",
            (None, TransportError::Connection(quinn::ConnectionError::Reset)) => "connection reset",
            (None, TransportError::Connection(quinn::ConnectionError::TimedOut)) => "connection timed out",
            _ => "connection lost",
        },
        SessionError::State(_) => "failed on this machine",
    }
}

/// Situations, and in how many of 5,000 histories each must be reached.
pub const REQUIRED: &[(&str, u64)] = &[
    ("AppendLost", 40),
    ("AppendedBefore", 100),
    ("BaseWritten", 1000),
    ("BelowFloor", 150),
    ("Checkpoint", 1000),
    ("DraftFolded", 30),
    ("DraftRecovered", 300),
    ("ForeignDraft", 50),
    ("IndexTrusted", 3000),
    ("InlinePoint", 1000),
    ("KnownHeadWasOld", 200),
    ("Mending", 300),
    ("OwnWriteFound", 200),
    ("PageAsked", 1000),
    ("PendingLanded", 200),
    ("PendingLost", 300),
    ("PointFolded", 1000),
    ("RangesCompared", 3000),
    ("StoreRetried", 1000),
    ("TakenOver", 300),
    ("adopted", 700),
    ("agent cloned", 500),
    ("agent killed at work", 700),
    ("bucket put back", 100),
    ("clock jumped back", 200),
    ("clock jumped forwards", 200),
    ("closed: shutting down", 150),
    ("closed: superseded", 50),
    ("connection lost", 100),
    ("connection reset", 100),
    ("connection timed out", 1000),
    ("cut", 700),
    ("fuzzy point", 1500),
    ("harm prevented a restore", 300),
    ("harm before prevented a restore", 150),
    ("harmless", 300),
    ("healthy point verified", 800),
    ("hostile agent", 300),
    ("hostile: only the volume's digest is wrong", 50),
    ("hostile: volumes of another group", 20),
    ("log pruned", 300),
    ("machine put back", 200),
    ("map harmed", 200),
    ("network restore", 1500),
    ("network restore failed", 20),
    ("no connection", 1000),
    ("nothing to commit", 1000),
    ("old index put back", 150),
    ("one instant of several volumes", 2500),
    ("point", 4500),
    ("point restored", 4500),
    ("record below the floor", 100),
    ("record revived", 100),
    ("refused: conflict", 20),
    ("refused: damaged", 20),
    ("refused: diverged", 500),
    ("refused: store unavailable", 50),
    ("stale list", 200),
    ("state put back", 200),
    ("volume added", 700),
    ("volume dropped", 300),
    ("volume grew", 700),
    ("volume replaced", 400),
    ("zombie woke up", 500),
];
