//! `init`: makes a store and the receiver's authority, once; run again it changes nothing.

use std::sync::Arc;

use backhaul_cli::{Exit, Failure, Output};
use backhaul_protocol::ids::RepositoryId;
use backhaul_protocol::store::checkpoint::{Sharing, StoreFormat};
use backhaul_protocol::store::key;
use backhaul_seams::random;
use bytes::Bytes;
use serde::Serialize;

use super::Context;
use crate::catalog::{Catalog, SMALL, get_optional};
use crate::keys::{self, KeysError};
use crate::store::probe::probe;
use crate::store::{self, Kind, MissingRoot, ObjectStore, StoreSettings};

#[derive(Serialize)]
struct Initialised {
    store: String,
    repository: String,
    created: bool,
    several_receivers: bool,
    authority: String,
    found: Vec<String>,
}

/// Runs the command.
pub async fn run(ctx: &Context, out: Output) -> anyhow::Result<Exit> {
    let settings = StoreSettings { missing_root: MissingRoot::Create, ..StoreSettings::default() };
    let store = store::open(ctx.store_url()?, &settings).await?;
    let exists = get_optional(&*store, &key::format(), SMALL).await?.is_some();
    let state = &ctx.config.state;
    let authority = if exists {
        match keys::load(state) {
            Err(KeysError::Missing(_)) => {
                let text = format!(
                    "{} is a store already, and {} holds no certificate authority: agents that joined through another \
                     receiver would not know this one",
                    store.describe(),
                    state.display()
                );
                let next = format!(
                    "copy authority.pem and authority.key from the first receiver's state folder to {}",
                    state.display()
                );
                return Err(Failure::new(Exit::Refused, "E_STATE_DIR", text).next(next).into());
            }
            other => other?,
        }
    } else {
        keys::ensure(state)?
    };
    let mut found = Vec::new();
    if !exists {
        let capabilities = probe(&store).await?;
        found = capabilities.to_string().lines().map(str::to_owned).collect();
        if !capabilities.usable() {
            let text = format!("{} does not do what a store must: {}", store.describe(), found.join(" "));
            return Err(Failure::new(Exit::Refused, "E_STORE", text).into());
        }
        let sharing = if capabilities.several_receivers() { Sharing::ManyReceivers } else { Sharing::OneReceiver };
        create_format(&store, sharing).await?;
    }
    let catalog = Catalog::open(store.clone()).await?;
    let several = catalog.format.sharing == Sharing::ManyReceivers;
    if !several {
        out.warn("this store has no atomic conditional write: use one receiver only");
    }
    let result = Initialised {
        store: store.describe(),
        repository: catalog.format.repository.to_string(),
        created: !exists,
        several_receivers: several,
        authority: hex(&authority.fingerprint()),
        found,
    };
    let verb = if exists { "is a store already; nothing was changed" } else { "is ready" };
    let mut text = format!("{} {verb}\nauthority {} in {}", result.store, result.authority, state.display());
    for line in &result.found {
        text.push_str(&format!("\n  {line}"));
    }
    text.push_str("\nnext: backhaul-receiver serve, and backhaul-receiver token --group NAME for each server");
    out.result("backhaul.init/1", &result, &text);
    Ok(Exit::Done)
}

async fn create_format(store: &Arc<dyn ObjectStore>, sharing: Sharing) -> anyhow::Result<()> {
    let repository = RepositoryId(random::id());
    let bytes = StoreFormat { repository, sharing }.to_bytes();
    match store.put_new(&key::format(), Bytes::from(bytes)).await {
        // Somebody else ran `init` at the same time: one store all the same.
        Err(e) if e.kind() != Kind::Exists => Err(e.into()),
        _ => Ok(()),
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
