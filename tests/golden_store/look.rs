//! What `verify`, `points` and `restore` make of a store in memory. Read [`Looker`].

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use backhaul_cli::Output;
use backhaul_protocol::ids::{LogSeq, Name};
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::wire::message::PointSpec;
use backhaul_receiver::catalog::Catalog;
use backhaul_receiver::membership;
use backhaul_receiver::restore::{Prepared, Request};
use backhaul_receiver::salvage::OnDamage;
use backhaul_receiver::scrub::{Scrub, Share, verify_group};
use backhaul_receiver::store::ObjectStore;
use backhaul_receiver::store::mem::MemStore;
use backhaul_volume::target::Durability;
use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use crate::build::{NAME, POINTS, VOLUMES, image};

type Objects = BTreeMap<ObjectKey, Bytes>;

/// A thread's own runtime and folder.
pub struct Looker {
    runtime: Runtime,
    dir: tempfile::TempDir,
}

fn store_of(objects: &Objects) -> Arc<dyn ObjectStore> {
    let store = MemStore::new();
    for (key, bytes) in objects {
        store.tamper(key, Some(bytes.clone()));
    }
    Arc::new(store)
}

fn name() -> Name {
    NAME.parse().expect("legal")
}

fn quiet() -> Output {
    Output::new(false, true, backhaul_receiver::cmd::meaning)
}

/// I19: a panic is an error like no other.
fn no_panic<T>(what: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(what)).unwrap_or_else(|_| Err("WRONG: it panics".into()))
}

impl Looker {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        Self { runtime, dir: dir.expect("a folder") }
    }

    /// What `verify` reports of the store and of all points, up to the first point of which there is anything.
    pub fn found(&self, objects: &Objects) -> Result<Vec<String>, String> {
        no_panic(|| self.runtime.block_on(found(store_of(objects))))
    }

    /// What `points` lists.
    pub fn points(&self, objects: &Objects) -> Vec<u64> {
        let listed = no_panic(|| {
            self.runtime.block_on(async {
                let (catalog, _) = Catalog::open_to_read(store_of(objects)).await.map_err(|e| e.to_string())?;
                let log = catalog.expect_group(&name()).await.map_err(|e| e.to_string())?;
                let history = log.whole_history().await.map_err(|e| e.to_string())?;
                Ok(history.points.iter().map(|p| p.seq.0).collect())
            })
        });
        listed.unwrap_or_default()
    }

    /// Restores all volumes of a point and compares them with what they must be. An error that begins with `WRONG`
    /// must never be.
    pub fn restore(&self, objects: &Objects, point: u64) -> Result<(), String> {
        no_panic(|| self.runtime.block_on(self.restore_point(objects, point)))
    }

    async fn restore_point(&self, objects: &Objects, point: u64) -> Result<(), String> {
        let to = |volume: &str| self.dir.path().join(volume);
        for (volume, _) in VOLUMES {
            // Never onto what is right already.
            let _ = std::fs::remove_file(to(volume));
        }
        let request = Request {
            group: name(),
            volume: None,
            point: PointSpec::Number(LogSeq(point)),
            targets: VOLUMES.iter().map(|(volume, _)| format!("{volume}={}", to(volume).display())).collect(),
            refuse: Vec::new(),
            confirm: Vec::new(),
            durability: Durability::Cached,
            on_damage: OnDamage::Fail,
        };
        let (catalog, _) = Catalog::open_to_read(store_of(objects)).await.map_err(|e| e.to_string())?;
        let mut progress = quiet().progress(4);
        let prepared = Prepared::new(catalog, request, &mut progress).await.map_err(|e| e.to_string())?;
        prepared.run(&mut progress).await.map_err(|e| e.to_string())?;
        for (slot, (volume, _)) in VOLUMES.iter().enumerate() {
            let bytes = std::fs::read(to(volume)).map_err(|e| format!("WRONG: {e}"))?;
            if bytes != image(point, slot as u32) {
                return Err(format!("WRONG: {volume} is restored with other bytes, and it is said to be well (I9)"));
            }
        }
        Ok(())
    }
}

async fn found(store: Arc<dyn ObjectStore>) -> Result<Vec<String>, String> {
    let (catalog, format) = match Catalog::open_to_read(store).await {
        Ok(opened) => opened,
        // A version that is not known, and the like: nothing is read.
        Err(e) => return Ok(vec![e.to_string()]),
    };
    let mut all: Vec<String> = format.iter().map(ToString::to_string).collect();
    let located = catalog.locate().await.map_err(|e| e.to_string())?;
    all.extend(located.damaged.iter().map(ToString::to_string));
    let groups: Vec<_> = located.groups.iter().map(|(_, log)| log.group()).collect();
    all.extend(
        membership::damaged(&catalog, &groups).await.map_err(|e| e.to_string())?.iter().map(ToString::to_string),
    );
    let log = match catalog.expect_group(&name()).await {
        Ok(log) => log,
        Err(e) => {
            all.push(e.to_string());
            return Ok(all);
        }
    };
    for point in POINTS.into_iter().rev() {
        if !all.is_empty() {
            break;
        }
        let scrub = Scrub {
            group: name(),
            log: log.clone(),
            volume: None,
            share: Share::parse("100%").expect("legal"),
            threads: Arc::new(Semaphore::new(1)),
        };
        let mut progress = quiet().progress(1);
        let spec = PointSpec::Number(LogSeq(point));
        match verify_group(&scrub, spec, |_, total| progress.phase("verify", total)).await {
            Ok(report) => all.extend(report.damaged.iter().map(|d| format!("{d:?}"))),
            Err(e) => all.push(e.to_string()),
        }
    }
    Ok(all)
}
