//! One command, one file.

pub mod agents;
pub mod check;
pub mod init;
pub mod points;
pub mod restore;
pub mod serve;
pub mod token;
pub mod verify;

use anyhow::Context as _;
use backhaul_cli::{Exit, Failure, Meaning, Output};
use backhaul_volume::durable::LockError;

use crate::access::AccessError;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::keys::{self, KeysError};
use crate::presence::PresenceError;
use crate::read_error::ReadError;
use crate::store::{self, Kind, StoreError, StoreSettings, StoreUrl};

/// What every command is given.
#[derive(Clone, Debug)]
pub struct Context {
    /// What is meant by flags, environment and file.
    pub config: Config,
}

impl Context {
    /// Where the store is.
    pub fn store_url(&self) -> Result<&StoreUrl, Failure> {
        self.config.store.as_ref().ok_or_else(|| {
            Failure::new(Exit::Usage, "E_USAGE", "no store is named")
                .next("add --store file:///path or --store s3://bucket/prefix, or set `store` in the settings")
        })
    }

    /// Opens the store.
    pub async fn catalog(&self) -> anyhow::Result<Catalog> {
        let store = store::open(self.store_url()?, &StoreSettings::default()).await?;
        Ok(Catalog::open(store).await?)
    }

    /// Opens the store for reading only: damage of its description is said and handed back, and no reason to stop.
    pub async fn catalog_to_read(&self, out: &Output) -> anyhow::Result<(Catalog, Option<ReadError>)> {
        let store = store::open(self.store_url()?, &StoreSettings::default()).await?;
        let (catalog, damage) = Catalog::open_to_read(store).await?;
        if let Some(damage) = &damage {
            out.warn(&format!("the description of the store is damaged, and is not needed to read: {damage}"));
        }
        Ok((catalog, damage))
    }

    /// The authority of this receiver.
    pub fn authority(&self) -> anyhow::Result<backhaul_transport::authority::Authority> {
        keys::load(&self.config.state).context("this needs the receiver's state folder")
    }
}

const ASK_VERIFY: &str = "backhaul-receiver verify tells everything that is damaged, and which bytes of which volume";

/// What the receiver's own errors mean to the shell.
pub fn meaning(cause: &(dyn std::error::Error + 'static)) -> Option<Meaning> {
    if let Some(error) = cause.downcast_ref::<ReadError>() {
        return match error {
            ReadError::Store(e) => Some(of_store(e)),
            ReadError::NotFound(_) => Some((Exit::NotFound, "E_NOTFOUND", None)),
            ReadError::Damaged { .. } | ReadError::Record { .. } | ReadError::Log { .. } | ReadError::Point { .. } => {
                Some((Exit::Differ, "E_DAMAGED", Some(ASK_VERIFY.into())))
            }
        };
    }
    if let Some(error) = cause.downcast_ref::<AccessError>() {
        return match error {
            AccessError::Read(inner) => meaning(inner),
            AccessError::Tls(_) => Some((Exit::Authentication, "E_AUTH", None)),
            AccessError::Denied(_) => Some((Exit::Refused, "E_DENIED", None)),
            AccessError::NotFound(_) => Some((Exit::NotFound, "E_NOTFOUND", None)),
        };
    }
    if let Some(error) = cause.downcast_ref::<KeysError>() {
        let next = match error {
            KeysError::Missing(_) => Some("backhaul-receiver init --store URL".into()),
            _ => None,
        };
        return Some((Exit::Config, "E_STATE_DIR", next));
    }
    if let Some(PresenceError::Taken(_)) = cause.downcast_ref::<PresenceError>() {
        return Some((Exit::Busy, "E_BUSY", Some("stop the other receiver first".into())));
    }
    if cause.downcast_ref::<LockError>().is_some() {
        return Some((Exit::Busy, "E_BUSY", None));
    }
    cause.downcast_ref::<StoreError>().map(of_store)
}

fn of_store(error: &StoreError) -> Meaning {
    let exit = match error.kind() {
        Kind::NotFound | Kind::Corrupt | Kind::Unreadable => {
            return (Exit::Differ, "E_DAMAGED", Some(ASK_VERIFY.into()));
        }
        Kind::Exists => Exit::Busy,
        Kind::Permission => Exit::Authentication,
        Kind::NoSpace => return (Exit::NoSpace, "E_NOSPACE", None),
        Kind::Unavailable => Exit::Network,
        Kind::Config => Exit::Config,
        Kind::Other => Exit::Failure,
    };
    (exit, "E_STORE", None)
}
