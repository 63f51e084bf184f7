//! Errors as the user sees them: what went wrong, why, what to type next, and an exit code that is true.

use std::process::ExitCode;

use backhaul_protocol::session::source::SourceError;
use backhaul_protocol::wire::message::{Reason, Refusal};
use backhaul_transport::error::TransportError;
use backhaul_volume::VolumeError;
use backhaul_volume::target::{TargetError, TargetErrorKind};

/// Exit codes; scripts rely on them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Any other failure.
    Failure = 1,
    /// Wrong usage.
    Usage = 2,
    /// Refused by a safety check, and nothing was written.
    Refused = 4,
    /// Data differ or are damaged.
    Differ = 6,
    /// The lag is over the limit.
    Lag = 7,
    /// What was asked for is not there.
    NotFound = 10,
    /// Somebody else is at it.
    Busy = 11,
    /// Certificates, tokens, rights.
    Authentication = 12,
    /// The other side can't be reached.
    Network = 13,
    /// No space left.
    NoSpace = 14,
    /// Settings are wrong.
    Config = 78,
    /// Interrupted by a signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with its exit code, its id for programs, and what to type next.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// For programs.
    pub code: &'static str,
    /// What went wrong, and why.
    pub message: String,
    /// What to type or do next.
    pub next: Option<String>,
}

impl Failure {
    /// Without advice.
    pub fn new(exit: Exit, code: &'static str, message: impl Into<String>) -> Self {
        Self { exit, code, message: message.into(), next: None }
    }
    /// With advice.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// What an error means: exit code, id, what to type next.
pub type Meaning = (Exit, &'static str, Option<String>);

/// Knows the errors of one program: what a cause means, if it is one of them.
pub type Classifier = fn(&(dyn std::error::Error + 'static)) -> Option<Meaning>;

/// The meaning of any error, found in its chain of causes.
pub fn classify(error: &anyhow::Error, own: Classifier) -> Meaning {
    let (exit, code, next) = found(error, own);
    (exit, code, next.or_else(|| usual_next(code).map(str::to_owned)))
}

fn found(error: &anyhow::Error, own: Classifier) -> Meaning {
    for cause in error.chain() {
        if let Some(meaning) = own(cause) {
            return meaning;
        }
        if let Some(f) = cause.downcast_ref::<Failure>() {
            return (f.exit, f.code, f.next.clone());
        }
        let found = (cause.downcast_ref::<Refusal>().map(|r| of_reason(r.reason)))
            .or_else(|| cause.downcast_ref::<SourceError>().map(of_source))
            .or_else(|| cause.downcast_ref::<TransportError>().map(of_transport))
            .or_else(|| cause.downcast_ref::<TargetError>().map(of_target))
            .or_else(|| cause.downcast_ref::<VolumeError>().map(|_| (Exit::Failure, "E_SOURCE")))
            .or_else(|| cause.downcast_ref::<std::io::Error>().and_then(of_io));
        if let Some((exit, code)) = found {
            return (exit, code, None);
        }
    }
    (Exit::Failure, "E_FAILURE", None)
}

/// What helps most often; what an error itself knows better is in its text.
fn usual_next(code: &str) -> Option<&'static str> {
    match code {
        "E_NETWORK" => Some(
            "check that the receiver runs, that its address is right and that UDP gets through, then the same command again",
        ),
        "E_AUTH" => Some(
            "check both clocks (date -u); an agent that was revoked or whose certificate has ended joins again with a new token",
        ),
        "E_BUSY" | "E_SUPERSEDED" | "E_CONFLICT" => {
            Some("let the other one finish or end it, then the same command again")
        }
        "E_USAGE" => Some("the same command with --help tells what it takes"),
        "E_CONFIG" => {
            Some("mend the setting, in its file, flag or variable; `config check` tells whether all are right")
        }
        "E_SOURCE" => Some("name a block device or an image file: backhaul-agent protect NAME=PATH"),
        "E_VOLUME" => Some("backhaul-agent status lists what is protected"),
        "E_TARGET" => Some("restore to a new file, or to a device that nothing uses: --to TARGET"),
        "E_NOTFOUND" => Some(
            "backhaul-receiver points lists what can be restored, agents who joined; on a server: backhaul-agent status",
        ),
        "E_STORE" => Some("check the store's URL, its keys and that it can be reached, then the same command again"),
        "E_STATE_DIR" => Some("check the state folder: it must be there, whole, writable and this user's"),
        "E_BIND" => Some("choose another address with --listen ADDR, or end what listens there"),
        "E_NOSPACE" => Some("make room, then the same command again"),
        "E_PROTO" => Some("bring both programs to the same version, then the same command again"),
        _ => None,
    }
}

/// What a refusal means.
pub fn of_reason(reason: Reason) -> (Exit, &'static str) {
    match reason {
        Reason::Protocol => (Exit::Failure, "E_PROTO"),
        Reason::Denied => (Exit::Authentication, "E_DENIED"),
        Reason::Authentication => (Exit::Authentication, "E_AUTH"),
        Reason::Diverged => (Exit::Refused, "E_DIVERGED"),
        Reason::Superseded => (Exit::Busy, "E_SUPERSEDED"),
        Reason::Busy => (Exit::Busy, "E_BUSY"),
        Reason::Conflict => (Exit::Busy, "E_CONFLICT"),
        Reason::Digest => (Exit::Differ, "E_DIGEST"),
        Reason::NotFound => (Exit::NotFound, "E_NOTFOUND"),
        Reason::NoSpace => (Exit::NoSpace, "E_NOSPACE"),
        Reason::Store => (Exit::Failure, "E_STORE"),
        Reason::Volume => (Exit::Refused, "E_VOLUME"),
        Reason::Damaged => (Exit::Differ, "E_DAMAGED"),
        Reason::Unavailable => (Exit::Network, "E_STORE"),
    }
}

fn of_source(error: &SourceError) -> (Exit, &'static str) {
    match error {
        SourceError::Refused(refusal) => of_reason(refusal.reason),
        SourceError::Protocol(_) => (Exit::Failure, "E_PROTO"),
        SourceError::Timeout(_) => (Exit::Network, "E_NETWORK"),
    }
}

fn of_transport(error: &TransportError) -> (Exit, &'static str) {
    use backhaul_protocol::wire::message::CloseCode;
    match error {
        TransportError::Frame(_) | TransportError::Hello(_) => (Exit::Failure, "E_PROTO"),
        TransportError::Bind { .. } => (Exit::Network, "E_BIND"),
        e if e.is_authentication() => (Exit::Authentication, "E_AUTH"),
        e if e.close_code() == Some(CloseCode::Superseded) => (Exit::Busy, "E_SUPERSEDED"),
        _ => (Exit::Network, "E_NETWORK"),
    }
}

fn of_target(error: &TargetError) -> (Exit, &'static str) {
    match error.kind() {
        TargetErrorKind::Refused => (Exit::Refused, "E_TARGET"),
        TargetErrorKind::NotFound => (Exit::NotFound, "E_TARGET"),
        TargetErrorKind::NoSpace => (Exit::NoSpace, "E_NOSPACE"),
        TargetErrorKind::Permission => (Exit::Refused, "E_TARGET"),
        TargetErrorKind::Io => (Exit::Failure, "E_TARGET"),
    }
}

fn of_io(error: &std::io::Error) -> Option<(Exit, &'static str)> {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Some((Exit::NoSpace, "E_NOSPACE")),
        _ => None,
    }
}
