//! Where objects are kept: a folder, a bucket, or memory. Objects are immutable and appear whole or not at all; what
//! they mean is told in `protocol`'s `store`. Read [`ObjectStore`] first, then [`open`], [`StoreUrl`] and
//! [`StoreError`].
//!
//! | module | owns | does not own |
//! |---|---|---|
//! | [`dir`], [`s3`], [`mem`] | one backend each; one attempt per call | trying again |
//! | [`retry`] | the only retry layer; what a lost reply meant | talking to a backend |
//! | [`fault`] | failures on demand, for tests and simulation | |
//! | [`Waits`] | which calls get no answer at this moment | telling anybody |
//! | [`probe`] | finding out what a store really enforces | deciding what to do about it |

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use backhaul_protocol::store::key::{self, ObjectKey};
use bytes::Bytes;

pub mod dir;
mod error;
pub mod fault;
pub mod mem;
pub mod probe;
pub mod retry;
pub mod s3;
mod settings;
mod url;
mod waits;

pub use error::{Kind, StoreError, Verb};
pub use settings::{MissingRoot, RetrySettings, S3Settings, StoreSettings};
pub use url::{S3Url, StoreUrl, UrlError};
pub use waits::{Waiting, Waits};

/// Longest part of a key, bytes: NAME_MAX of Linux file systems. Every backend keeps to it, so that a store can be
/// copied from any backend to any other.
pub const MAX_PART: usize = 255;

/// A handful of verbs that a folder and a bucket can both keep.
///
/// - A key is never also the folder of another key (`a` and `a/b`): a file system cannot hold both.
/// - Dropping the future of a call does not undo it: a write may still be applied later.
/// - What a read returns was written whole by some `put_new` or `put_hint` of exactly this key.
#[async_trait]
pub trait ObjectStore: Send + Sync + std::fmt::Debug {
    /// Creates the object if no object has this key, and is durable when it returns. Of all callers in all processes
    /// exactly one gets `Ok`, the others [`Kind::Exists`] (where [`probe`] says that the store is atomic).
    /// After [`Kind::Unavailable`] the object may or may not be there.
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError>;

    /// Creates or replaces the object, whole. Only for hints (`head`, when an agent was last seen): nothing that is
    /// needed to restore may be written so, and after a power loss the old content may be back.
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError>;

    /// The whole object. One that is longer than `max` bytes is [`Kind::Corrupt`], and is not read: no more than
    /// `max` bytes are ever allocated, whatever the other side claims.
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError>;

    /// Exactly the bytes of `range`, or an error: [`Kind::Corrupt`] when the object ends before the range does.
    /// An empty range is answered with nothing, without asking whether the object exists.
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Keys that start with `prefix` (text, not folders: `log/0` finds `log/01`) and come after `after`, with their
    /// sizes in bytes, sorted by key (bytes). Fewer than `limit` means that there are no more. Names that are no
    /// [`ObjectKey`] are left out.
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError>;

    /// Removes the object; that there is none is fine.
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError>;

    /// What can be seen of the folder that these keys are in survives a power loss when this returns, whoever wrote it:
    /// a writer that was killed may have come to the name and not to its flush. To be called before anybody is told
    /// that something is committed. Nothing to do where what can be seen is durable; decorators hand it on.
    async fn settle(&self, _prefix: &str) -> Result<(), StoreError> {
        Ok(())
    }

    /// Where this is, for messages. Holds no secret.
    fn describe(&self) -> String;

    /// The calls that get no answer; `None` where nobody keeps track.
    fn waits(&self) -> Option<Waits> {
        None
    }
}

/// All keys that start with `prefix`. A thousand at a time, so that what fails is tried again from where it was.
pub async fn list_all(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
    let mut found: Vec<(ObjectKey, u64)> = Vec::new();
    loop {
        let page = store.list(prefix, found.last().map(|(key, _)| key), LIST_PAGE).await?;
        let is_last = page.len() < LIST_PAGE;
        found.extend(page);
        if is_last {
            return Ok(found);
        }
    }
}

/// Keys that S3 lists at once.
const LIST_PAGE: usize = 1000;

/// Longest that [`open`] tries to reach a bucket: who mistyped an address wants to know soon. Arbitrary.
const FIRST_CONTACT: Duration = Duration::from_secs(10);

/// Opens the store that the user named, with the retry layer around it. A bucket is asked for one object first, so that
/// a wrong address, region, bucket or key is said now and not after all the retries of some later call.
pub async fn open(url: &StoreUrl, settings: &StoreSettings) -> Result<Arc<dyn ObjectStore>, StoreError> {
    match url {
        StoreUrl::Dir(path) => {
            let store = dir::DirStore::open(path, settings.missing_root).await?;
            Ok(Arc::new(retry::Retrying::new(store, settings.retry.clone())))
        }
        StoreUrl::S3(url) => open_s3(url, settings, s3::Credentials::Chain).await,
    }
}

/// [`open`] for a bucket, with credentials that need not come from the environment.
pub async fn open_s3(
    url: &S3Url,
    settings: &StoreSettings,
    credentials: s3::Credentials,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let store = Arc::new(s3::S3Store::connect(url, &settings.s3, credentials).await?);
    let soon = RetrySettings { total: settings.retry.total.min(FIRST_CONTACT), ..settings.retry.clone() };
    let first = retry::Retrying::new(Arc::clone(&store), soon);
    let found = match first.get_range(&key::format(), 0..1).await {
        // Not found is also what a bucket says that is not there, and a server that is none of S3.
        Err(e) if e.kind() == Kind::NotFound => first.list("", None, 1).await.map(drop),
        // Whatever it is, it is there: who reads it says what is wrong with it.
        Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::Unreadable) => Ok(()),
        found => found.map(drop),
    };
    found.map_err(|e| e.while_opening(url))?;
    Ok(Arc::new(retry::Retrying::new(store, settings.retry.clone())))
}

#[async_trait]
impl<S: ObjectStore + ?Sized> ObjectStore for Arc<S> {
    async fn put_new(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        (**self).put_new(key, body).await
    }
    async fn put_hint(&self, key: &ObjectKey, body: Bytes) -> Result<(), StoreError> {
        (**self).put_hint(key, body).await
    }
    async fn get(&self, key: &ObjectKey, max: usize) -> Result<Bytes, StoreError> {
        (**self).get(key, max).await
    }
    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, StoreError> {
        (**self).get_range(key, range).await
    }
    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<(ObjectKey, u64)>, StoreError> {
        (**self).list(prefix, after, limit).await
    }
    async fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        (**self).delete(key).await
    }
    async fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        (**self).settle(prefix).await
    }
    fn describe(&self) -> String {
        (**self).describe()
    }
    fn waits(&self) -> Option<Waits> {
        (**self).waits()
    }
}

/// Refuses what one of the backends could not keep.
fn check_key(verb: Verb, key: &ObjectKey) -> Result<(), StoreError> {
    if key.as_str().split('/').all(|part| part.len() <= MAX_PART) {
        return Ok(());
    }
    Err(StoreError::new(Kind::Config, verb, key, format!("a part of the name is longer than {MAX_PART} bytes")))
}

/// Refuses a prefix that no key can start with, which is a mistake and not an empty list.
fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    // A key can start with it if it becomes a key when one more letter follows.
    if ObjectKey::parse(&format!("{prefix}0")).is_ok() {
        return Ok(());
    }
    Err(StoreError::new(Kind::Config, Verb::List, format!("{prefix:?}"), "no object can have a name like that"))
}

/// Length of a range that is asked for. The range comes from an index that was checked; a mistake is an error here
/// and not an allocation.
fn range_len(key: &ObjectKey, range: &Range<u64>) -> Result<usize, StoreError> {
    let len = range.end.checked_sub(range.start).and_then(|len| usize::try_from(len).ok());
    len.filter(|len| *len <= isize::MAX as usize).ok_or_else(|| {
        StoreError::new(Kind::Other, Verb::GetRange, key, format!("{}..{} is not a range", range.start, range.end))
    })
}

/// The error for an object that is longer than its reader allows.
fn too_long(key: &ObjectKey, size: u64, max: usize) -> StoreError {
    let what = format!("it holds {size} bytes, and no more than {max} can be right");
    StoreError::new(Kind::Corrupt, Verb::Get, key, what)
}

/// The error for an object that ends before the range does.
fn too_short(key: &ObjectKey, size: u64, range: &Range<u64>) -> StoreError {
    let what = format!("it ends at byte {size}, and bytes {}..{} were expected", range.start, range.end);
    StoreError::new(Kind::Corrupt, Verb::GetRange, key, what)
}
