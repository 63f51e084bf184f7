//! What goes wrong between a client and an S3 server, at the level of HTTP, so that the real SDK goes through it. Read
//! [`HttpFault`] and [`Rule`]; [`crate::s3::TestS3::fault`] puts them to use.

use std::collections::VecDeque;
use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::{Response, StatusCode};
use s3s::Body;
use s3s::service::S3Service;

type AnyError = Box<dyn Error + Send + Sync>;

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpFault {
    /// This status with this S3 error code, and nothing is done.
    Refuse(u16, &'static str),
    /// A refusal that names the bucket's region, as S3 answers the wrong one.
    WrongRegion(&'static str),
    /// Is done, and the connection is closed without a word.
    LostReply,
    /// The connection is closed and nothing is done.
    LostRequest,
    /// Is done, and no reply ever comes.
    Silent,
    /// Is done this much later.
    Delay(Duration),
    /// The reply's body ends after so many bytes, with the connection.
    Cut(usize),
    /// The reply's body stops after so many bytes, and the connection stays open: 0 B/s.
    Stall(usize),
    /// One bit of this byte of the reply's body is flipped.
    Flip(usize),
    /// The reply's body comes, so many bytes every 50 ms.
    Drip(usize),
    /// The reply has the whole object where a part was asked for.
    NoRanges,
    /// The connection is closed after so many bytes of the request's body, and nothing is done.
    CutUpload(usize),
    /// The request's body is never read, and no reply ever comes: 0 B/s.
    StalledUpload,
    /// One bit of this byte of the request's body is flipped on the way.
    FlipUpload(usize),
    /// Nothing is done, and this status and body come back, as from a proxy that stands in between.
    Say(u16, &'static str),
}

impl HttpFault {
    /// Whether the client gets an answer, and not from the server.
    fn is_answered_alone(&self) -> bool {
        matches!(self, Self::Refuse(..) | Self::WrongRegion(_) | Self::Say(..))
    }
}

/// Mark on a request that the server does not look at its range.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IgnoreRange;

/// Which requests. The default is every one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rule {
    /// Only `PUT`, `GET`, ...
    pub method: Option<&'static str>,
    /// Only paths (with the query) that contain this.
    pub path: &'static str,
    /// Only so many; `None` is all.
    pub times: Option<u32>,
}

impl Rule {
    /// Requests with this method.
    pub fn method(method: &'static str) -> Self {
        Self { method: Some(method), ..Self::default() }
    }
    /// Only so many.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self { times: Some(times), ..self }
    }
    /// Only paths that contain `text`.
    #[must_use]
    pub fn path(self, text: &'static str) -> Self {
        Self { path: text, ..self }
    }
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `PUT`, `GET`, ...
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names and values of the headers, `; ` between them; for looking for one.
    pub headers: String,
}

/// Stands before the server and spoils what the rules name.
#[derive(Clone)]
pub(crate) struct Front {
    service: S3Service,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    rules: Vec<(Rule, HttpFault)>,
    requests: Vec<Request>,
}

impl Front {
    pub(crate) fn new(service: S3Service) -> Self {
        Self { service, shared: Arc::default() }
    }
    pub(crate) fn add(&self, rule: Rule, fault: HttpFault) {
        self.lock().rules.push((rule, fault));
    }
    pub(crate) fn heal(&self) {
        self.lock().rules.clear();
    }
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the request down and says what is to happen to it.
    fn decide(&self, request: Request) -> Option<HttpFault> {
        let mut shared = self.lock();
        let fits = |(rule, _): &&mut (Rule, HttpFault)| {
            rule.method.is_none_or(|method| method == request.method)
                && request.path.contains(rule.path)
                && rule.times != Some(0)
        };
        let fault = shared.rules.iter_mut().find(fits).map(|(rule, fault)| {
            rule.times = rule.times.map(|left| left - 1);
            fault.clone()
        });
        shared.requests.push(request);
        fault
    }

    async fn answer(self, request: hyper::Request<Incoming>) -> Result<Response<Reply>, AnyError> {
        let headers = request.headers().iter();
        let headers = headers.map(|(name, value)| format!("{name}: {}; ", String::from_utf8_lossy(value.as_bytes())));
        let fault = self.decide(Request {
            method: request.method().to_string(),
            path: request.uri().to_string(),
            headers: headers.collect(),
        });
        let mut request = request.map(Body::from);
        if fault.as_ref().is_some_and(HttpFault::is_answered_alone) {
            // A connection that is closed on a body half-way is reset, and the answer is lost on its way now and then: the
            // client is right to ask again, and nothing was tested.
            let _ = request.body_mut().store_all_limited(1 << 30).await;
        }
        match &fault {
            Some(HttpFault::Refuse(status, code)) => return refuse(*status, code, None),
            Some(HttpFault::WrongRegion(region)) => return refuse(301, "PermanentRedirect", Some(region)),
            Some(HttpFault::Say(status, body)) => return say(*status, body),
            Some(HttpFault::LostRequest) => return Err("the request was lost on purpose".into()),
            Some(HttpFault::StalledUpload) => std::future::pending::<()>().await,
            Some(HttpFault::CutUpload(at)) => {
                read_at_least(request.body_mut(), *at).await;
                return Err("the request was cut on purpose".into());
            }
            Some(HttpFault::FlipUpload(at)) => {
                let body = request.body_mut().store_all_limited(1 << 30).await?;
                *request.body_mut() = Body::from(flipped(body, *at));
            }
            Some(HttpFault::Delay(time)) => tokio::time::sleep(*time).await,
            // The header is signed, so the server must see it.
            Some(HttpFault::NoRanges) => drop(request.extensions_mut().insert(IgnoreRange)),
            _ => {}
        }
        let (head, mut body) = self.service.call(request).await?.into_parts();
        match fault {
            Some(HttpFault::LostReply) => return Err("the reply was lost on purpose".into()),
            Some(HttpFault::Silent) => std::future::pending::<()>().await,
            _ => {}
        }
        let (at, end) = match fault {
            Some(HttpFault::Cut(at)) => (at, End::Cut),
            Some(HttpFault::Stall(at)) => (at, End::Stall),
            Some(HttpFault::Flip(at)) => (at, End::Clean),
            Some(HttpFault::Drip(bytes)) => {
                let all = body.store_all_limited(1 << 30).await?;
                let next = tokio::time::interval(Duration::from_millis(50));
                return Ok(Response::from_parts(head, Reply::Dripping { all, bytes, next }));
            }
            _ => return Ok(Response::from_parts(head, Reply::Whole(body))),
        };
        let mut all = body.store_all_limited(1 << 30).await?;
        if end == End::Clean {
            all = flipped(all, at);
        } else {
            all.truncate(at);
        }
        Ok(Response::from_parts(head, Reply::Scripted([all].into(), end)))
    }
}

/// A bit of this byte flipped, where there is one.
fn flipped(bytes: Bytes, at: usize) -> Bytes {
    let mut bytes = bytes.to_vec();
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1;
    }
    bytes.into()
}

async fn read_at_least(body: &mut Body, bytes: usize) {
    let mut seen = 0;
    while seen < bytes {
        let frame = std::future::poll_fn(|cx| hyper::body::Body::poll_frame(Pin::new(&mut *body), cx)).await;
        let Some(Ok(frame)) = frame else { return };
        seen += frame.data_ref().map_or(0, Bytes::len);
    }
}

fn say(status: u16, body: &'static str) -> Result<Response<Reply>, AnyError> {
    let response = Response::builder().status(StatusCode::from_u16(status)?).header("content-type", "text/html");
    Ok(response.body(Reply::Whole(Body::from(body.to_owned())))?)
}

fn refuse(status: u16, code: &str, region: Option<&str>) -> Result<Response<Reply>, AnyError> {
    let body = format!("<Error><Code>{code}</Code><Message>on purpose</Message></Error>");
    let response = Response::builder().status(StatusCode::from_u16(status)?).header("content-type", "application/xml");
    let response = match region {
        Some(region) => response.header("x-amz-bucket-region", region),
        None => response,
    };
    Ok(response.body(Reply::Whole(Body::from(body)))?)
}

impl hyper::service::Service<hyper::Request<Incoming>> for Front {
    type Response = Response<Reply>;
    type Error = AnyError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;
    fn call(&self, request: hyper::Request<Incoming>) -> Self::Future {
        Box::pin(self.clone().answer(request))
    }
}

/// How a scripted body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Clean,
    Cut,
    Stall,
}

/// The body of a reply.
pub(crate) enum Reply {
    Whole(Body),
    Scripted(VecDeque<Bytes>, End),
    Dripping { all: Bytes, bytes: usize, next: tokio::time::Interval },
}

impl hyper::body::Body for Reply {
    type Data = Bytes;
    type Error = AnyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnyError>>> {
        match &mut *self {
            Reply::Whole(body) => Pin::new(body).poll_frame(cx),
            Reply::Scripted(parts, end) => match (parts.pop_front(), end) {
                (Some(part), _) => Poll::Ready(Some(Ok(Frame::data(part)))),
                (None, End::Clean) => Poll::Ready(None),
                (None, End::Cut) => Poll::Ready(Some(Err("the reply was cut on purpose".into()))),
                (None, End::Stall) => Poll::Pending,
            },
            Reply::Dripping { all, .. } if all.is_empty() => Poll::Ready(None),
            Reply::Dripping { all, bytes, next } => {
                std::task::ready!(next.poll_tick(cx));
                Poll::Ready(Some(Ok(Frame::data(all.split_to((*bytes).min(all.len()))))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Whole(body) => body.is_end_stream(),
            Reply::Scripted(parts, end) => parts.is_empty() && *end == End::Clean,
            Reply::Dripping { all, .. } => all.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Whole(body) => body.size_hint(),
            Reply::Scripted(..) | Reply::Dripping { .. } => SizeHint::default(),
        }
    }
}
