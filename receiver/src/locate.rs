//! Opening a store and finding its groups although something small is damaged: `format` and names are a convenience
//! for readers, and each group's first log record tells its name too.
//!
//! Read first: [`Catalog::open_to_read`], then [`Catalog::locate`].

use std::sync::Arc;

use backhaul_protocol::ids::{GroupId, LogSeq, Name, RepositoryId};
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_protocol::store::envelope::{self, FormatError};
use backhaul_protocol::store::key::{self, ObjectKey};
use backhaul_protocol::store::log::Body;

use crate::catalog::{Catalog, GroupLog, SMALL, get_optional};
use crate::read_error::ReadError;
use crate::store::{Kind, ObjectStore, StoreError, Verb, list_all};

/// The groups of a store.
#[derive(Clone, Debug, Default)]
pub struct Located {
    /// By name.
    pub groups: Vec<(Name, GroupLog)>,
    /// Names that are damaged or gone. Their groups are among the others where their log tells them.
    pub damaged: Vec<ReadError>,
}

impl Catalog {
    /// Opens a store for reading only: damage of its description is handed back, and no reason to stop. A newer format
    /// is.
    pub async fn open_to_read(store: Arc<dyn ObjectStore>) -> Result<(Self, Option<ReadError>), ReadError> {
        let error = match Self::open(store.clone()).await {
            Ok(catalog) => return Ok((catalog, None)),
            Err(e) => e,
        };
        let damage = match error {
            ReadError::Damaged { cause: FormatError::Version(_) | FormatError::Features(_), .. }
                // Each other object has a version of its own, so that a flipped bit here opens nothing that is newer.
                if get_optional(&*store, &key::format(), SMALL).await?.is_some_and(|b| envelope::is_whole(&b)) =>
            {
                return Err(error);
            }
            ReadError::NotFound(_) if store.list("groups/", None, 1).await?.is_empty() => return Err(error),
            ReadError::NotFound(_) => gone(&key::format()),
            e if e.is_damage() => e,
            e => return Err(e),
        };
        // Readers need neither; the cautious answer to who may write.
        let format = StoreFormat { repository: RepositoryId([0; 16]), sharing: Sharing::OneReceiver };
        Ok((Self { store, format }, Some(damage)))
    }

    /// All groups. Those whose name can't be read are found by the first record of their log.
    pub async fn locate(&self) -> Result<Located, ReadError> {
        let mut found = Located::default();
        let names = list_all(&*self.store, key::GROUP_NAMES).await?;
        for name in names.iter().filter_map(|(key, _)| key.as_str()[key::GROUP_NAMES.len()..].parse::<Name>().ok()) {
            match self.group(&name).await {
                Ok(Some(group)) => found.groups.push((name, self.log(group))),
                Ok(None) => {}
                Err(e) if e.is_damage() => found.damaged.push(e),
                Err(e) => return Err(e),
            }
        }
        for group in self.group_ids().await? {
            if found.groups.iter().any(|(_, log)| log.group() == group) {
                continue;
            }
            let Some(name) = self.name_of(group).await? else { continue };
            let key = key::group_name(&name);
            if !found.damaged.iter().any(|e| crate::salvage::object_of(e) == key.as_str()) {
                found.damaged.push(gone(&key));
            }
            if !found.groups.iter().any(|(n, _)| *n == name) {
                found.groups.push((name, self.log(group)));
            }
        }
        found.groups.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(found)
    }

    /// The group of this name, or an error that says what there is. A name that can't be read is told by the log.
    pub async fn expect_group(&self, name: &Name) -> Result<GroupLog, ReadError> {
        let error = match self.group(name).await {
            Ok(Some(group)) => return Ok(self.log(group)),
            Ok(None) => None,
            Err(e) if e.is_damage() => Some(e),
            Err(e) => return Err(e),
        };
        let located = self.locate().await?;
        if let Some((_, log)) = located.groups.iter().find(|(n, _)| n == name) {
            let object = key::group_name(name);
            tracing::warn!(%object, "damaged or gone; the group was found by its log");
            return Ok(log.clone());
        }
        if let Some(error) = error {
            return Err(error);
        }
        let names: Vec<String> = located.groups.iter().map(|(n, _)| n.to_string()).collect();
        let have = if names.is_empty() { "it has none yet".into() } else { format!("it has {}", names.join(", ")) };
        Err(ReadError::NotFound(format!("no group \"{name}\" in {}: {have}", self.store.describe())))
    }

    /// Ids of all groups that have any object, a request for each.
    async fn group_ids(&self) -> Result<Vec<GroupId>, ReadError> {
        const PREFIX: &str = "groups/";
        let mut ids = Vec::new();
        let mut after: Option<ObjectKey> = None;
        while let Some((key, _)) = self.store.list(PREFIX, after.as_ref(), 1).await?.into_iter().next() {
            let Some((id, _)) = key.as_str()[PREFIX.len()..].split_once('/') else { break };
            ids.extend(id.parse::<GroupId>().ok());
            // Of everything below the folder `z` is the last: nothing in it begins with one.
            after = ObjectKey::parse(&format!("{PREFIX}{id}/zz")).ok();
            if after.is_none() {
                break;
            }
        }
        Ok(ids)
    }

    async fn name_of(&self, group: GroupId) -> Result<Option<Name>, ReadError> {
        match self.log(group).read(LogSeq(0)).await {
            Ok(Some((record, _))) => Ok(match record.body {
                Body::Create(create) => Some(create.name),
                _ => None,
            }),
            Ok(None) => Ok(None),
            Err(e) if e.is_damage() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn gone(key: &ObjectKey) -> ReadError {
    StoreError::new(Kind::NotFound, Verb::Get, key, "it is gone").into()
}
