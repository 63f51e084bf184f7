//! What can go wrong with an object, as the questions that callers ask: which kind is it, is it worth another try.
//! Read [`StoreError`] and [`Kind`].

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What a caller may do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No object has this key.
    NotFound,
    /// An object with this key is there already, and `put_new` left it alone.
    Exists,
    /// The store knows who we are and says no, or does not believe who we say we are; or there is nothing to say it by.
    Permission,
    /// No room. Nothing became visible; the same call may succeed when there is room again.
    NoSpace,
    /// No answer, or "later". A `put_new` that ends so **may have been applied**.
    Unavailable,
    /// The bytes are not what they must be: a checksum, a length, an object shorter or longer than it can be.
    Corrupt,
    /// The system finds it and can't read it: a bad sector, a checksum of the file system. Another medium may have it.
    Unreadable,
    /// Somebody has to change a setting: no such bucket, wrong region, an illegal name.
    Config,
    /// Anything else. Another try does not help.
    Other,
}

/// What was being done. The order is that of the counters in [`super::mem`] and [`super::fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Opening the store itself.
    Open,
    /// [`super::ObjectStore::put_new`]
    PutNew,
    /// [`super::ObjectStore::put_hint`]
    PutHint,
    /// [`super::ObjectStore::get`]
    Get,
    /// [`super::ObjectStore::get_range`]
    GetRange,
    /// [`super::ObjectStore::list`]
    List,
    /// [`super::ObjectStore::delete`]
    Delete,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Open => "open",
            Verb::PutNew => "write",
            Verb::PutHint => "write hint",
            Verb::Get => "read",
            Verb::GetRange => "read range of",
            Verb::List => "list",
            Verb::Delete => "delete",
        })
    }
}

/// An operation on the store that failed: what was done to which object, why, and in `source()` what the system or
/// the server said. It never holds a secret.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot {verb} {object}: {what}")]
pub struct StoreError {
    kind: Kind,
    verb: Verb,
    object: String,
    what: String,
    retryable: bool,
    source: Option<Cause>,
}

/// An error of another library, shared so that a [`StoreError`] can be handed to everybody who waits.
#[derive(Debug, Clone)]
struct Cause(Arc<dyn Error + Send + Sync>);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Cause {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

impl StoreError {
    /// `object` is a key, a prefix, or for [`Verb::Open`] the store. Only [`Kind::Unavailable`] is worth another try,
    /// unless [`StoreError::retryable`] says otherwise.
    pub fn new(kind: Kind, verb: Verb, object: impl fmt::Display, what: impl Into<String>) -> Self {
        let retryable = kind == Kind::Unavailable;
        let mut object = object.to_string();
        if object.is_empty() {
            // The empty prefix.
            object.push_str("the store");
        }
        Self { kind, verb, object, what: what.into(), retryable, source: None }
    }
    /// The same error as one of opening the store: the call that failed was only made to find out.
    pub(super) fn while_opening(mut self, store: impl fmt::Display) -> Self {
        self.verb = Verb::Open;
        self.object = store.to_string();
        self
    }
    /// Adds what the system said.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(Cause(Arc::from(cause.into())));
        self
    }
    /// Overrides whether another try is worth it.
    #[must_use]
    pub fn retryable(mut self, yes: bool) -> Self {
        self.retryable = yes;
        self
    }
    /// Says how often and how long it was tried, where that was more than once.
    #[must_use]
    pub(super) fn after(mut self, attempts: u32, took: std::time::Duration) -> Self {
        if attempts > 1 {
            self.what = format!("{} (tried {attempts} times in {:.1} s)", self.what, took.as_secs_f64());
        }
        self
    }
    /// What a caller may do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }
    /// What was being done.
    pub fn verb(&self) -> Verb {
        self.verb
    }
    /// The key, prefix or store it was done to.
    pub fn object(&self) -> &str {
        &self.object
    }
    /// Whether the same call, a little later, may well succeed. [`super::retry::Retrying`] asks this and nobody
    /// else has to: what reaches a caller through it was tried for as long as the settings allow.
    pub fn is_retryable(&self) -> bool {
        self.retryable
    }
    /// `NotFound`, which readers that probe for the next key ask all the time.
    pub fn is_not_found(&self) -> bool {
        self.kind == Kind::NotFound
    }
    /// `Exists`: somebody was first.
    pub fn is_exists(&self) -> bool {
        self.kind == Kind::Exists
    }
}
