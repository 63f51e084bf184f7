//! How sessions end, as the other side sees it.

use std::sync::Mutex;

use async_trait::async_trait;
use backhaul_protocol::wire::frame::FrameError;
use backhaul_transport::link::{ReceiveHalf, SendHalf};

use super::*;

/// Notes how it is closed.
#[derive(Default)]
struct Closed(Mutex<Option<(CloseCode, String)>>);

#[async_trait]
impl Link for Closed {
    async fn open_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        std::future::pending().await
    }
    async fn accept_control(&self) -> Result<(Box<dyn SendHalf>, Box<dyn ReceiveHalf>), TransportError> {
        std::future::pending().await
    }
    async fn open_blocks(&self) -> Result<Box<dyn SendHalf>, TransportError> {
        std::future::pending().await
    }
    async fn accept_blocks(&self) -> Result<Box<dyn ReceiveHalf>, TransportError> {
        std::future::pending().await
    }
    fn allow(&self, _bytes: u32) {}
    fn close(&self, code: CloseCode, text: &str) {
        *self.0.lock().expect("no panic") = Some((code, text.to_owned()));
    }
    fn close_reason(&self) -> Option<TransportError> {
        None
    }
    async fn closed(&self) {}
    async fn goodbye(&self) {}
}

fn closed(served: Result<CloseCode, TransportError>) -> (CloseCode, String) {
    let link = Closed::default();
    close(&link, served);
    link.0.into_inner().expect("no panic").expect("it is closed")
}

/// An agent that is told that it broke the protocol does not come again by itself.
#[test]
fn a_broken_connection_is_not_a_broken_protocol() {
    let broken = [
        TransportError::Stream("finished in the middle of a message".into()),
        TransportError::Connection(quinn::ConnectionError::TimedOut),
        TransportError::Connection(quinn::ConnectionError::Reset),
        TransportError::Timeout(PATIENCE),
    ];
    for error in broken {
        let text = error.to_string();
        assert_eq!(closed(Err(error)), (CloseCode::Done, String::new()), "{text}");
    }
    let wrong = TransportError::Frame(FrameError::Length(usize::MAX));
    assert_eq!(closed(Err(wrong)).0, CloseCode::Protocol);
    for code in [CloseCode::Superseded, CloseCode::Revoked, CloseCode::ShuttingDown, CloseCode::Refused] {
        let (told, text) = closed(Ok(code));
        assert!(told == code && !text.is_empty(), "{code:?}: {text}");
    }
}
