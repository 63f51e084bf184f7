//! A store without an atomic conditional write takes one receiver only. This is how a second one is noticed: the
//! receiver that serves says so in the object `receiver`, again and again.
//!
//! Read first: [`Presence::claim`]. It is a guard against mistakes, not a lock: two receivers that start in the same
//! second can both pass. Stores with atomic conditional writes need none of it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backhaul_protocol::bytes::{FieldReader, FieldWriter};
use backhaul_protocol::store::envelope::{self, Kind};
use backhaul_protocol::store::key::{self, ObjectKey};
use backhaul_seams::random;
use bytes::Bytes;

use crate::access::unix_millis;
use crate::catalog::{SMALL, get_optional};
use crate::read_error::ReadError;
use crate::store::{ObjectStore, StoreError};

const INTERVAL: Duration = Duration::from_secs(10);
/// A receiver that has not said anything for so long is gone: six times the interval, for a store that is slow.
const FRESH: Duration = Duration::from_secs(60);

/// Says that this receiver serves the store, until it is dropped.
pub struct Presence {
    store: Arc<dyn ObjectStore>,
    id: [u8; 16],
    task: tokio::task::JoinHandle<()>,
}

/// How claiming ends.
#[derive(Debug, thiserror::Error)]
pub enum PresenceError {
    /// Another receiver serves the store.
    #[error(
        "another receiver served this store {0:?} ago, and the store can take only one: it has no atomic conditional write"
    )]
    Taken(Duration),
    /// The store.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PresenceError {
    /// Whether trying again may help: the other receiver may end.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Taken(_) => true,
            Self::Read(e) => e.is_retryable(),
            Self::Store(e) => e.is_retryable(),
        }
    }
}

fn object(id: [u8; 16], at: i64) -> Bytes {
    let mut out = envelope::begin();
    out.extend_from_slice(&id);
    out.put_i64(at);
    envelope::seal(Kind::Receiver, &mut out);
    Bytes::from(out)
}

async fn last_said(store: &dyn ObjectStore, key: &ObjectKey) -> Result<Option<i64>, ReadError> {
    let Some(bytes) = get_optional(store, key, SMALL).await? else { return Ok(None) };
    let read = |bytes: &[u8]| -> Result<i64, envelope::FormatError> {
        let mut r: FieldReader<'_> = envelope::open(Kind::Receiver, bytes)?;
        let _: [u8; 16] = r.array("receiver")?;
        Ok(r.i64("time")?)
    };
    // A damaged claim is none: it is replaced.
    Ok(read(&bytes).ok())
}

impl Presence {
    /// Claims the store for this receiver.
    pub async fn claim(store: Arc<dyn ObjectStore>) -> Result<Self, PresenceError> {
        let key = key::receiver();
        let now = unix_millis(SystemTime::now()).0;
        if let Some(at) = last_said(&*store, &key).await? {
            let ago = Duration::from_millis(now.abs_diff(at));
            if ago < FRESH {
                return Err(PresenceError::Taken(ago));
            }
        }
        let id = random::bytes();
        store.put_hint(&key, object(id, now)).await?;
        let again = store.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let now = unix_millis(SystemTime::now()).0;
                if let Err(error) = again.put_hint(&key, object(id, now)).await {
                    tracing::warn!(%error, "could not say that this receiver serves the store");
                }
            }
        });
        Ok(Self { store, id, task })
    }

    /// Lets the next receiver start at once.
    pub async fn leave(self) {
        self.task.abort();
        if let Err(error) = self.store.put_hint(&key::receiver(), object(self.id, 0)).await {
            tracing::warn!(%error, "could not say that this receiver is gone");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;

    #[tokio::test]
    async fn one_receiver_at_a_time() {
        let store: Arc<dyn ObjectStore> = Arc::new(MemStore::new());
        let first = Presence::claim(store.clone()).await.expect("nobody is there");
        let second = Presence::claim(store.clone()).await.err().expect("somebody is there");
        assert!(matches!(second, PresenceError::Taken(_)) && second.is_retryable(), "{second}");
        first.leave().await;
        let third = Presence::claim(store.clone()).await.expect("the first one left");
        // One that was killed says nothing any more, and after a while it counts as gone.
        drop(third);
        assert!(Presence::claim(store.clone()).await.is_err());
        let long_ago = unix_millis(SystemTime::now()).0 - FRESH.as_millis() as i64 - 1;
        store.put_hint(&key::receiver(), object([1; 16], long_ago)).await.expect("stored");
        Presence::claim(store.clone()).await.expect("long gone");
    }

    #[tokio::test]
    async fn a_clock_that_went_back_does_not_make_another_receiver_old() {
        let store: Arc<dyn ObjectStore> = Arc::new(MemStore::new());
        let ahead = unix_millis(SystemTime::now()).0 + 30_000;
        store.put_hint(&key::receiver(), object([1; 16], ahead)).await.expect("stored");
        assert!(Presence::claim(store).await.is_err());
    }
}
