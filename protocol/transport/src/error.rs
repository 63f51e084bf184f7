//! How a connection fails.

use backhaul_protocol::wire::frame::FrameError;
use backhaul_protocol::wire::hello::HelloError;
use backhaul_protocol::wire::message::CloseCode;

/// How a connection fails.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The UDP socket can't be had.
    #[error("can't bind UDP {address}: {cause}")]
    Bind {
        /// Which address.
        address: std::net::SocketAddr,
        /// Why.
        cause: std::io::Error,
    },
    /// The address is none, or has no IP address.
    #[error("can't resolve \"{address}\": {cause}")]
    Resolve {
        /// As typed.
        address: String,
        /// Why.
        cause: std::io::Error,
    },
    /// The connection could not be made or broke.
    #[error("{}", describe(.0))]
    Connection(#[from] quinn::ConnectionError),
    /// The connection could not be begun.
    #[error("can't connect: {0}")]
    Connect(#[from] quinn::ConnectError),
    /// A stream ended where it should not.
    #[error("the stream ended: {0}")]
    Stream(String),
    /// A frame is not to be believed.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The greeting failed.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// Certificates or keys are not usable.
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    /// Nothing came in time.
    #[error("no answer within {0:?}")]
    Timeout(std::time::Duration),
}

fn describe(error: &quinn::ConnectionError) -> String {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            format!("the other side closed the connection: {}", String::from_utf8_lossy(&close.reason))
        }
        quinn::ConnectionError::TimedOut => "no answer: timed out (is the address right, and UDP let through?)".into(),
        other => format!("connection lost: {other}"),
    }
}

impl TransportError {
    /// Whether connecting again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connection(quinn::ConnectionError::ApplicationClosed(_)) => {
                !matches!(self.close_code(), Some(CloseCode::Revoked | CloseCode::Refused | CloseCode::Protocol))
            }
            Self::Connection(quinn::ConnectionError::ConnectionClosed(close)) => !is_tls_alert(close.error_code),
            Self::Connection(quinn::ConnectionError::TransportError(error)) => !is_tls_alert(error.code),
            Self::Connection(_) | Self::Stream(_) | Self::Timeout(_) | Self::Resolve { .. } => true,
            Self::Bind { .. } | Self::Connect(_) | Self::Frame(_) | Self::Hello(_) | Self::Tls(_) => false,
        }
    }

    /// Whether the other side closed a connection that was not made yet, and not for what it was shown: it waited too
    /// long for the rest, or has no room.
    pub fn is_given_up(&self) -> bool {
        matches!(self, Self::Connection(quinn::ConnectionError::ConnectionClosed(_))) && self.is_retryable()
    }

    /// Whether the other side's certificate, or ours, was the reason.
    pub fn is_authentication(&self) -> bool {
        match self {
            Self::Connection(quinn::ConnectionError::ConnectionClosed(close)) => is_tls_alert(close.error_code),
            Self::Connection(quinn::ConnectionError::TransportError(error)) => is_tls_alert(error.code),
            Self::Connection(_) => self.close_code() == Some(CloseCode::Revoked),
            Self::Tls(_) => true,
            _ => false,
        }
    }

    /// How the other side closed the connection.
    pub fn close_code(&self) -> Option<CloseCode> {
        let Self::Connection(quinn::ConnectionError::ApplicationClosed(close)) = self else { return None };
        use CloseCode::{Done, Protocol, Refused, Revoked, ShuttingDown, Superseded};
        [Done, Superseded, Revoked, ShuttingDown, Protocol, Refused]
            .into_iter()
            .find(|c| close.error_code == quinn::VarInt::from_u32(*c as u32))
    }
}

/// TLS alerts are the QUIC codes 0x100 to 0x1ff.
fn is_tls_alert(code: quinn::TransportErrorCode) -> bool {
    (0x100..0x200).contains(&u64::from(code))
}

impl From<quinn::WriteError> for TransportError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::ConnectionLost(lost) => lost.into(),
            other => Self::Stream(other.to_string()),
        }
    }
}

impl From<quinn::ReadError> for TransportError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::ConnectionLost(lost) => lost.into(),
            other => Self::Stream(other.to_string()),
        }
    }
}
