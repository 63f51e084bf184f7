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
use crate::ledger::Ledger;

/// Counts how an attempt ended.
pub fn note(ledger: &Ledger, node: usize, outcome: &Outcome) {
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
            ledger.count(kind(error));
        }
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
