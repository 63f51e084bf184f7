//! An S3 server for tests, in process, on a port of its own: real HTTP, real signatures, checksums compared, objects in
//! memory. Read [`TestS3`]; what can go wrong on demand is in [`crate::faults`].
//!
//! Its conditional PUT is atomic, unlike that of s3s-fs, and can be made racy or ignored to test who finds that out.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backhaul_receiver::store::s3::Credentials;
use backhaul_receiver::store::{S3Url, StoreUrl};
use bytes::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use s3s::auth::SimpleAuth;
use s3s::checksum::ChecksumHasher;
use s3s::dto::{
    ChecksumMode, ContentLength, DeleteObjectInput, DeleteObjectOutput, ETag, GetObjectInput, GetObjectOutput,
    HeadBucketInput, HeadBucketOutput, ListObjectsV2Input, ListObjectsV2Output, Object, PutObjectInput,
    PutObjectOutput, StreamingBlob,
};
use s3s::service::S3ServiceBuilder;
use s3s::{Body, S3, S3Request, S3Response, S3Result, s3_error};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::faults::{Front, HttpFault, IgnoreRange, Request, Rule};

/// The only bucket.
pub const BUCKET: &str = "backhaul-test";
/// The only user.
pub const ACCESS_KEY: &str = "AKIATESTBACKHAUL";
/// The user's key.
pub const SECRET_KEY: &str = "not/a+secret";

/// What the server does with `If-None-Match: *`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditional {
    /// Keeps it: of all writers one wins.
    Atomic,
    /// Looks, waits until somebody else has looked for the same name, or this long, and writes: what s3s-fs 0.14 does when
    /// both look at once, however late the second one comes.
    Racy(Duration),
    /// Takes no notice, as Garage 2.5 does.
    Ignored,
}

/// A server that runs until it is dropped. Works from plain and async tests: it has threads of its own.
pub struct TestS3 {
    address: SocketAddr,
    objects: Objects,
    front: Front,
    runtime: Option<Runtime>,
}

impl TestS3 {
    /// A server as it should be.
    pub fn start() -> Self {
        Self::with(Conditional::Atomic)
    }

    /// A server with another idea of a conditional PUT.
    pub fn with(conditional: Conditional) -> Self {
        let objects = Objects::default();
        let mut service =
            S3ServiceBuilder::new(Backend { objects: objects.clone(), conditional, looks: Mutex::default() });
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let front = Front::new(service.build());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime for the S3 server");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port for the S3 server");
        listener.set_nonblocking(true).expect("a socket that does not block");
        let address = listener.local_addr().expect("the port of the S3 server");
        let served = front.clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener for tokio");
            let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            while let Ok((socket, _)) = listener.accept().await {
                let connection = http.serve_connection(TokioIo::new(socket), served.clone()).into_owned();
                // Connections break on demand.
                tokio::spawn(async move { drop(connection.await) });
            }
        });
        Self { address, objects, front, runtime: Some(runtime) }
    }

    /// `http://127.0.0.1:PORT`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A place in the bucket, as a user types it.
    pub fn url(&self, prefix: &str) -> String {
        StoreUrl::S3(self.s3_url(prefix)).to_string()
    }

    /// A place in the bucket.
    pub fn s3_url(&self, prefix: &str) -> S3Url {
        let (bucket, prefix) = (BUCKET.to_owned(), prefix.to_owned());
        S3Url { bucket, prefix, endpoint: Some(self.endpoint()), region: None }
    }

    /// What [`S3Store::connect`](backhaul_receiver::store::s3::S3Store::connect) needs.
    pub fn credentials(&self) -> Credentials {
        Credentials::Static { access_key: ACCESS_KEY.to_owned(), secret_key: SECRET_KEY.to_owned() }
    }

    /// What a program needs, for `Command::envs`: keys, and nothing of the machine that the tests run on.
    pub fn envs(&self) -> [(&'static str, &'static str); 5] {
        [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ]
    }

    /// Adds something that goes wrong.
    pub fn fault(&self, rule: Rule, fault: HttpFault) {
        self.front.add(rule, fault);
    }

    /// Nothing goes wrong from now on.
    pub fn heal(&self) {
        self.front.heal();
    }

    /// All requests so far, refused ones too.
    pub fn requests(&self) -> Vec<Request> {
        self.front.requests()
    }

    /// Everything in the bucket, by its full name. Bodies are shared, not copied.
    pub fn objects(&self) -> BTreeMap<String, Bytes> {
        self.objects.lock().iter().map(|(name, object)| (name.clone(), object.body.clone())).collect()
    }

    /// Puts something into the bucket, or takes it away, behind everybody's back.
    pub fn tamper(&self, name: &str, body: Option<Bytes>) {
        let mut objects = self.objects.lock();
        match body {
            Some(body) => objects.insert(name.to_owned(), Stored { body, crc32c: None }),
            None => objects.remove(name),
        };
    }
}

impl Drop for TestS3 {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait: the test that drops this may be async.
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone, Default)]
struct Objects(Arc<Mutex<BTreeMap<String, Stored>>>);

#[derive(Clone)]
struct Stored {
    body: Bytes,
    crc32c: Option<String>,
}

impl Objects {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Stored>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Backend {
    objects: Objects,
    conditional: Conditional,
    /// How many looked for a name before they wrote it.
    looks: Mutex<BTreeMap<String, u32>>,
}

impl Backend {
    /// Waits until somebody else has looked too, or so long.
    async fn wait_for_another_look(&self, name: &str, limit: Duration) {
        let looks = || self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        *looks().entry(name.to_owned()).or_default() += 1;
        let until = tokio::time::Instant::now() + limit;
        while looks()[name] < 2 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn check_bucket(bucket: &str) -> S3Result<()> {
    if bucket == BUCKET { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
}

#[async_trait::async_trait]
impl S3 for Backend {
    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        check_bucket(&input.bucket)?;
        let mut body = Body::from(input.body.ok_or_else(|| s3_error!(IncompleteBody))?);
        let body = body.store_all_limited(5 << 30).await.map_err(|_| s3_error!(IncompleteBody))?;
        if input.content_length.is_some_and(|len| len != body.len() as ContentLength) {
            return Err(s3_error!(IncompleteBody));
        }
        if let Some(claimed) = &input.checksum_crc32c {
            let mut hasher = ChecksumHasher { crc32c: Some(Default::default()), ..Default::default() };
            hasher.update(&body);
            if hasher.finalize().checksum_crc32c.as_ref() != Some(claimed) {
                return Err(s3_error!(BadDigest));
            }
        }
        let stored = Stored { body, crc32c: input.checksum_crc32c };
        let only_if_absent = input.if_none_match.is_some_and(|condition| condition.is_any());
        let taken = || s3_error!(PreconditionFailed);
        match self.conditional {
            Conditional::Atomic => {
                let mut objects = self.objects.lock();
                if only_if_absent && objects.contains_key(&input.key) {
                    return Err(taken());
                }
                objects.insert(input.key, stored);
            }
            Conditional::Racy(limit) => {
                if only_if_absent && self.objects.lock().contains_key(&input.key) {
                    return Err(taken());
                }
                if only_if_absent {
                    self.wait_for_another_look(&input.key, limit).await;
                }
                self.objects.lock().insert(input.key, stored);
            }
            Conditional::Ignored => drop(self.objects.lock().insert(input.key, stored)),
        }
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong("0".to_owned())), ..Default::default() }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        check_bucket(&input.bucket)?;
        let stored = self.objects.lock().get(&input.key).cloned().ok_or_else(|| s3_error!(NoSuchKey))?;
        let whole = stored.body.len() as u64;
        let mut output = GetObjectOutput { e_tag: Some(ETag::Strong("0".to_owned())), ..Default::default() };
        let range = input.range.filter(|_| req.extensions.get::<IgnoreRange>().is_none());
        let body = match range {
            Some(range) => {
                let part = range.check(whole)?;
                output.content_range = Some(format!("bytes {}-{}/{whole}", part.start, part.end - 1));
                stored.body.slice(part.start as usize..part.end as usize)
            }
            None => {
                let asked = input.checksum_mode.is_some_and(|mode| mode.as_str() == ChecksumMode::ENABLED);
                output.checksum_crc32c = stored.crc32c.filter(|_| asked);
                stored.body
            }
        };
        output.content_length = Some(body.len() as ContentLength);
        output.body = Some(StreamingBlob::from(Body::from(body)));
        Ok(S3Response::new(output))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        check_bucket(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.start_after.clone().unwrap_or_default();
        let limit = usize::try_from(input.max_keys.unwrap_or(1000)).unwrap_or(0).min(1000);
        let objects = self.objects.lock();
        let range = (Bound::Excluded(after), Bound::Unbounded);
        let mut matching = objects.range(range).filter(|(name, _)| name.starts_with(&prefix));
        let contents = matching.by_ref().take(limit).map(|(name, stored)| Object {
            key: Some(name.clone()),
            size: Some(stored.body.len() as i64),
            ..Default::default()
        });
        let contents: Vec<_> = contents.collect();
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: Some(contents.len() as i32),
            is_truncated: Some(matching.next().is_some()),
            contents: Some(contents),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        check_bucket(&req.input.bucket)?;
        self.objects.lock().remove(&req.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        check_bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }
}
