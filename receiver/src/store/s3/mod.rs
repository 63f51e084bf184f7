//! A store in a bucket of S3 or a server that speaks its language. One request per call, no retries: they belong to
//! [`super::retry`]. Read [`S3Store`]; `connect` has the settings of the SDK, each with the trap that it closes, and
//! `errors` what the answers of servers mean.
//!
//! Objects are written by single PUTs from memory with `If-None-Match: *`. There are no multipart uploads: the
//! largest segment is far below the 5 GiB that a single PUT may carry, and there is nothing to clean up after a crash.

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::put_object::builders::PutObjectFluentBuilder;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode};
use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;

use super::{
    Kind, ObjectStore, S3Settings, S3Url, StoreError, Verb, check_key, check_prefix, range_len, too_long, too_short,
};

mod connect;
mod errors;

pub use connect::Credentials;

/// Most keys that S3 puts on one page
/// (<https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html>).
const MAX_PAGE: usize = 1000;

/// Objects in a bucket, below the URL's prefix. Cheap calls and expensive ones go over the same pool of connections.
pub struct S3Store {
    client: Client,
    url: S3Url,
    /// Empty, or ends with `/`.
    prefix: String,
    /// Where requests go, for messages.
    endpoint: String,
    settings: S3Settings,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the client: its settings hold credentials.
        write!(f, "S3Store({})", self.url)
    }
}

impl S3Store {
    fn name(&self, key: &ObjectKey) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Bounds one step of a request by time. The SDK's own limits lie behind this one: they know no sizes.
    async fn within<T>(
        &self,
        limit: Duration,
        verb: Verb,
        object: &str,
        step: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(limit, step).await {
            Ok(result) => result,
            Err(_) => {
                let what = format!("no answer from {} within {:.1} s", self.endpoint, limit.as_secs_f64());
                Err(StoreError::new(Kind::Unavailable, verb, object, what))
            }
        }
    }

    fn put(&self, key: &ObjectKey, body: Bytes) -> PutObjectFluentBuilder {
        self.client
            .put_object()
            .bucket(&self.url.bucket)
            .key(self.name(key))
            .content_type("application/octet-stream")
            // The server compares, and Object Lock insists on one. Explicit, because the SDK's default may change, and
            // CRC32C because all servers know it.
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .body(ByteStream::from(body))
    }

    async fn send_put(
        &self,
        verb: Verb,
        key: &ObjectKey,
        put: PutObjectFluentBuilder,
        len: usize,
    ) -> Result<(), StoreError> {
        let send = async { put.send().await.map_err(|error| self.failure(verb, key, error)) };
        let reply = self.within(self.settings.limit(len), verb, key.as_str(), send).await?;
        self.check_etag(verb, key, reply.e_tag())
    }

    /// A proxy or a sign-in page says 200 to everything, also to a PUT that went nowhere. Every S3 server names the
    /// ETag of what it stored or sends.
    fn check_etag(&self, verb: Verb, key: &ObjectKey, etag: Option<&str>) -> Result<(), StoreError> {
        match etag {
            Some(_) => Ok(()),
            None => Err(StoreError::new(Kind::Unavailable, verb, key, errors::no_s3(&self.endpoint))),
        }
    }

    /// Reads a body of exactly `len` bytes. More cannot come: the client stops at the length in the header, which was
    /// compared with `len`, and a body without such a header is cut here.
    async fn body(&self, verb: Verb, key: &ObjectKey, mut body: ByteStream, len: usize) -> Result<Bytes, StoreError> {
        let broken = |what: String| StoreError::new(Kind::Unavailable, verb, key, what);
        let read = async {
            let mut all = Vec::new();
            all.try_reserve_exact(len).map_err(|error| broken(format!("no memory for {len} bytes")).because(error))?;
            while let Some(part) = body.try_next().await.map_err(|error| {
                broken(format!("the reply from {} broke off or was damaged", self.endpoint)).because(error)
            })? {
                if part.len() > len - all.len() {
                    return Err(broken(format!("the reply is longer than the {len} bytes that it announced")));
                }
                all.extend_from_slice(&part);
            }
            match all.len() == len {
                true => Ok(Bytes::from(all)),
                false => Err(broken(format!("the reply ended after {} of {len} bytes", all.len()))),
            }
        };
        self.within(self.settings.limit(len), verb, key.as_str(), read).await
    }

    async fn page(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let full = format!("{}{prefix}", self.prefix);
        let request = self.client.list_objects_v2().bucket(&self.url.bucket).prefix(full);
        let request = request.set_start_after(after.map(str::to_owned)).max_keys(limit.min(MAX_PAGE) as i32);
        let send = async { request.send().await.map_err(|error| self.failure(Verb::List, prefix, error)) };
        let page = self.within(self.settings.limit(0), Verb::List, prefix, send).await?;
        let names = page.contents().iter().filter_map(|object| {
            let size = u64::try_from(object.size().unwrap_or(0)).unwrap_or(0);
            object.key().map(|name| (name.to_owned(), size))
        });
        Ok(Page { names: names.collect(), more: page.is_truncated() == Some(true) })
    }
}

struct Page {
    names: Vec<(String, u64)>,
    more: bool,
}

/// Length of the whole object by the `Content-Range` of a part of it, and where the part starts.
fn content_range(reply: &GetObjectOutput) -> Option<(u64, u64)> {
    let (part, whole) = reply.content_range()?.strip_prefix("bytes ")?.split_once('/')?;
    Some((part.split_once('-')?.0.parse().ok()?, whole.parse().ok()?))
}

#[async_trait]
impl ObjectStore for S3Store {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        check_key(Verb::PutNew, key)?;
        let len = body.len();
        self.send_put(Verb::PutNew, key, self.put(key, body).if_none_match("*"), len).await
    }

    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        check_key(Verb::PutHint, key)?;
        let len = body.len();
        self.send_put(Verb::PutHint, key, self.put(key, body), len).await
    }

    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        check_key(Verb::Get, key)?;
        // The checksum that came with the PUT is asked for, and compared by the SDK where the server keeps it.
        let get = self.client.get_object().bucket(&self.url.bucket).key(self.name(key));
        let get = get.checksum_mode(ChecksumMode::Enabled);
        let send = async { get.send().await.map_err(|error| self.failure(Verb::Get, key, error)) };
        let reply = self.within(self.settings.limit(0), Verb::Get, key.as_str(), send).await?;
        self.check_etag(Verb::Get, key, reply.e_tag())?;
        let Some(len) = reply.content_length().and_then(|len| u64::try_from(len).ok()) else {
            let what = format!("{} does not say how long it is", self.endpoint);
            return Err(StoreError::new(Kind::Config, Verb::Get, key, what));
        };
        match usize::try_from(len) {
            Ok(len) if len <= max => self.body(Verb::Get, key, reply.body, len).await,
            _ => Err(too_long(key, len, max)),
        }
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(Verb::GetRange, key)?;
        let len = range_len(key, &range)?;
        if len == 0 {
            return Ok(Bytes::new());
        }
        let get = self.client.get_object().bucket(&self.url.bucket).key(self.name(key));
        let get = get.range(format!("bytes={}-{}", range.start, range.end - 1));
        let send = async { get.send().await.map_err(|error| self.failure(Verb::GetRange, key, error)) };
        let reply = self.within(self.settings.limit(0), Verb::GetRange, key.as_str(), send).await?;
        self.check_etag(Verb::GetRange, key, reply.e_tag())?;
        match content_range(&reply) {
            // S3 shortens a range that goes beyond the end, and calls that success.
            Some((_, whole)) if whole < range.end => return Err(too_short(key, whole, &range)),
            Some((start, _)) if start == range.start && reply.content_length() == Some(len as i64) => {}
            _ => {
                let what = format!("{} does not send the part of an object that it was asked for", self.endpoint);
                return Err(StoreError::new(Kind::Config, Verb::GetRange, key, what));
            }
        }
        self.body(Verb::GetRange, key, reply.body, len).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        check_prefix(prefix)?;
        let mut found = Vec::new();
        let mut after = after.map(|key| self.name(key));
        while found.len() < limit {
            let page = self.page(prefix, after.as_deref(), limit - found.len()).await?;
            let senseless = |how: &str| {
                StoreError::new(Kind::Config, Verb::List, prefix, format!("{} lists names {how}", self.endpoint))
            };
            if page.more && page.names.is_empty() {
                return Err(senseless("without end"));
            }
            for (name, size) in page.names {
                if after.as_ref().is_some_and(|after| name <= *after) {
                    return Err(senseless("out of order, or again and again"));
                }
                let key = name.strip_prefix(&self.prefix).map(ObjectKey::parse);
                // Other names are not ours; the bucket may be shared.
                if let Some(Ok(key)) = key
                    && key.as_str().starts_with(prefix)
                {
                    found.push((key, size));
                }
                after = Some(name);
            }
            if !page.more {
                break;
            }
        }
        // A server may send more than a page was to hold.
        found.truncate(limit);
        Ok(found)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        check_key(Verb::Delete, key)?;
        let delete = self.client.delete_object().bucket(&self.url.bucket).key(self.name(key));
        let send = async { delete.send().await.map_err(|error| self.failure(Verb::Delete, key, error)) };
        match self.within(self.settings.limit(0), Verb::Delete, key.as_str(), send).await {
            // S3 itself calls that success, some servers do not.
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn describe(&self) -> String {
        let place = if self.prefix.is_empty() { "" } else { &self.prefix[..self.prefix.len() - 1] };
        format!("bucket {}, prefix {place:?}, at {}", self.url.bucket, self.endpoint)
    }
}
