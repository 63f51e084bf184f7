//! What the answers of servers mean, and what to do about them. The table is [`meaning`].

use std::error::Error;
use std::fmt;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::S3Store;
use crate::store::{Kind, StoreError, Verb};

impl S3Store {
    /// Turns a failed request into an error that names kind, cause and remedy.
    pub(super) fn failure<E>(
        &self,
        verb: Verb,
        object: impl fmt::Display,
        error: SdkError<E, HttpResponse>,
    ) -> StoreError
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let at = &self.endpoint;
        let error_with = |kind, what: String| StoreError::new(kind, verb, &object, what);
        match error {
            SdkError::ServiceError(reply) => {
                let (status, code) = (reply.raw().status().as_u16(), reply.err().code().unwrap_or_default());
                let region = reply.raw().headers().get("x-amz-bucket-region").map(str::to_owned);
                let said = Said { status, code: code.to_owned(), message: reply.err().message().map(str::to_owned) };
                let (kind, what) = self.meaning(verb, status, code, region.as_deref());
                // Damaged on the way: the next attempt sends the same bytes again. An object that is too short stays so.
                let again = kind == Kind::Unavailable || kind == Kind::Corrupt && status != 416;
                error_with(kind, what).retryable(again).because(said)
            }
            SdkError::DispatchFailure(failure) => {
                let text = failure.as_connector_error().map_or_else(String::new, |cause| chain_text(cause));
                let (kind, what) = match failure.is_user() {
                    true => (Kind::Config, format!("the request cannot be sent to {at}")),
                    false => (Kind::Unavailable, unreachable(at, &text)),
                };
                error_with(kind, what).because(text)
            }
            SdkError::TimeoutError(_) => error_with(Kind::Unavailable, format!("{at} did not answer in time")),
            SdkError::ResponseError(_) => {
                error_with(Kind::Unavailable, format!("the answer from {at} broke off or makes no sense"))
                    .because(error)
            }
            // No credentials any more, or a bug of ours.
            error => error_with(Kind::Config, "the request could not be made".to_owned()).because(chain_text(&error)),
        }
    }

    /// Kind and remedy by status and code. Codes are S3's
    /// (<https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>) and MinIO's where they begin with X.
    fn meaning(&self, verb: Verb, status: u16, code: &str, region: Option<&str>) -> (Kind, String) {
        let (bucket, at) = (&self.url.bucket, &self.endpoint);
        match (status, code) {
            (412, _) if verb == Verb::PutNew => (Kind::Exists, "it exists already".to_owned()),
            (409, _) => (Kind::Unavailable, "somebody else is writing it at this moment".to_owned()),
            (_, "NoSuchBucket") => {
                (Kind::Config, format!("there is no bucket {bucket} at {at}; make it, or correct the URL"))
            }
            (301 | 307, _)
            | (_, "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException") => {
                let region = region.unwrap_or("NAME, with the region's name");
                (Kind::Config, format!("the bucket {bucket} is in another region; give the URL ?region={region}"))
            }
            (_, "InvalidAccessKeyId" | "NotSignedUp" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken") => (
                Kind::Permission,
                format!(
                    "{at} does not accept the credentials; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the session token"
                ),
            ),
            (_, "RequestTimeTooSkewed") => (Kind::Config, "this machine's clock is wrong; set it (NTP)".to_owned()),
            (
                _,
                "BadDigest"
                | "InvalidDigest"
                | "XAmzContentSHA256Mismatch"
                | "XAmzContentChecksumMismatch"
                | "IncompleteBody",
            ) => (Kind::Corrupt, "the bytes were damaged on their way".to_owned()),
            (507, _) | (_, "XMinioStorageFull" | "QuotaExceeded" | "XMinioAdminBucketQuotaExceeded") => {
                (Kind::NoSpace, format!("{at} has no space left for {bucket}"))
            }
            (429 | 500 | 502 | 503 | 504 | 408, _)
            | (_, "SlowDown" | "RequestTimeout" | "Throttling" | "InternalError") => {
                (Kind::Unavailable, format!("{at} asks to come back later (HTTP {status} {code})"))
            }
            (401 | 403, _) => (
                Kind::Permission,
                format!(
                    "access denied; {bucket} must grant s3:PutObject and s3:GetObject, and s3:ListBucket (without it even a missing object looks like this)"
                ),
            ),
            (404, _) if matches!(verb, Verb::Get | Verb::GetRange | Verb::Delete) => {
                (Kind::NotFound, "no such object".to_owned())
            }
            (404, _) => (Kind::Config, format!("{at} knows no bucket {bucket}; is this the right endpoint?")),
            (416, _) => (Kind::Corrupt, "it ends before the part that was asked for begins".to_owned()),
            // Not what S3 says to a request like this, and not XML.
            (200..=299, _) => (Kind::Unavailable, no_s3(at)),
            (501, _) => (Kind::Config, format!("{at} cannot do this, and Backhaul needs it")),
            _ => (Kind::Other, format!("{at} refused it")),
        }
    }
}

/// The words of the server. Its request ids and hosts are for debug logs, not for users.
#[derive(Debug)]
struct Said {
    status: u16,
    code: String,
    message: Option<String>,
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HTTP {}", self.status)?;
        if !self.code.is_empty() {
            write!(f, " {}", self.code)?;
        }
        match &self.message {
            Some(message) => write!(f, ": {message}"),
            None => Ok(()),
        }
    }
}

impl Error for Said {}

/// The words for an answer that no S3 server gives.
pub(super) fn no_s3(at: &str) -> String {
    format!(
        "the answer from {at} is not that of an S3 server; is this the right endpoint, or does a proxy stand before it?"
    )
}

/// Why there is no connection, in words of what to look at.
fn unreachable(at: &str, cause: &str) -> String {
    let cause = cause.to_ascii_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| cause.contains(word));
    if has(&["connection refused"]) {
        format!("nothing listens at {at}; is the server running, and the port right?")
    } else if has(&["dns error", "name or service not known", "failed to lookup"]) {
        format!("the name of {at} is not known; check it, and DNS")
    } else if has(&["no route", "network is unreachable", "host is unreachable"]) {
        format!("there is no route to {at}; check the network, a VPC endpoint or NAT")
    } else if has(&["certificate", "tls", "handshake"]) {
        format!("no trusted connection to {at}; check its certificate, and https or http")
    } else if has(&["timeout", "timed out", "deadline"]) {
        format!("{at} does not answer; check the network and firewalls")
    } else {
        format!("the connection to {at} broke")
    }
}

/// An error of the SDK with everything below it on one line: its own text says little ("dispatch failure").
pub(super) fn chain_text(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        // Many layers repeat the words of the one below.
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    // Some are lists with a line for each thing that was tried.
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
