//! What must hold at the end, whatever happened: every point that can be seen was offered as it is, every point that was
//! acknowledged is there, and the log is one history.
//!
//! Read first: [`examine`].

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backhaul_agent::connection::{Connected, greet};
use backhaul_agent::network_restore::{RestoreRequest, restore};
use backhaul_agent::replicate::CommitWhen;
use backhaul_cli::Output;
use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{GroupId, LogSeq, Name, WriterNonce};
use backhaul_protocol::store::key::ObjectKey;
use backhaul_protocol::store::log::{Body, PointBody, Record};
use backhaul_protocol::wire::message::PointSpec;
use backhaul_receiver::catalog::{Catalog, GroupLog};
use backhaul_receiver::restore::{Prepared, Request};
use backhaul_receiver::salvage::OnDamage;
use backhaul_receiver::store::ObjectStore;
use backhaul_volume::target::Durability;

use crate::disk::{Content, Snapshot, Watched, bytes_of};
use crate::history::World;
use crate::ledger::Offer;

/// A restore over the network may wait for a store for minutes, several times.
const RESTORE: Duration = Duration::from_secs(3600);

/// Looks at everything.
pub async fn examine(world: &World) {
    // As any reader finds it: no weather, no delay.
    let store: Arc<dyn ObjectStore> = Arc::new(world.bucket.objects().fork());
    for group in &world.groups {
        examine_group(world, &store, group.id, &group.name).await;
    }
}

async fn examine_group(world: &World, store: &Arc<dyn ObjectStore>, group: GroupId, name: &Name) {
    let ledger = &world.ledger;
    let catalog = Catalog::open(store.clone()).await.expect("the description is never harmed");
    let log = catalog.log(group);
    let history = match log.whole_history().await {
        Ok(history) => history,
        Err(error) => return ledger.violation("I4", format_args!("{name}: the log can't be read: {error}")),
    };
    for error in history.unreadable.iter().map(|(_, e)| e).chain(&history.broken) {
        ledger.violation("I4", format_args!("{name}: {error}"));
    }
    let visible: BTreeSet<LogSeq> = history.points.iter().map(|p| p.seq).collect();
    let floor = log.floor().await.unwrap_or_default();
    if let Some(revived) = visible.iter().find(|seq| **seq < floor) {
        ledger.violation("I4", format_args!("{name}: point {revived} lies below the floor {floor}, and is shown"));
    }
    for (seq, commit) in ledger.all_acked(group) {
        let found = log.read(seq).await.ok().flatten().map(|(record, _)| record.commit);
        if found != Some(commit) || !visible.contains(&seq) {
            ledger.violation("I2", format_args!("{name}: point {seq} was acknowledged as {commit}, it is {found:?}"));
        }
    }
    for seq in &visible {
        match log.read(*seq).await {
            Ok(Some((record, _))) => examine_point(world, store, &log, name, &record).await,
            other => ledger.violation("I2", format_args!("{name}: point {seq} can't be read: {other:?}")),
        }
    }
}

async fn examine_point(world: &World, store: &Arc<dyn ObjectStore>, log: &GroupLog, name: &Name, record: &Record) {
    let (ledger, seq) = (&world.ledger, record.seq);
    let Some(point) = record.point() else {
        return ledger.violation("I1", format_args!("{name}: {seq} is listed as a point and is none"));
    };
    let Some(offer) = ledger.offered(record.commit) else {
        return ledger.violation("I1", format_args!("{name}: nobody offered point {seq} ({})", record.commit));
    };
    if offer.group != log.group() {
        ledger.violation("I17", format_args!("{name}: point {seq} was offered by an agent of another group"));
    }
    examine_writer(world, log, name, record, &offer).await;
    examine_instant(world, name, seq, point, &offer);
    for volume in &point.volumes {
        let Some((_, offered)) = offer.volumes.iter().find(|(id, _)| *id == volume.id) else {
            ledger.violation("I1", format_args!("{name}: volume {} of point {seq} was not offered", volume.name));
            continue;
        };
        match restored(world, store.clone(), name, seq, &volume.name).await {
            Ok(bytes) => compare(world, name, point, seq, &volume.name, offered, &bytes),
            Err(error) if is_named(&world.bucket.harmed(), &error) => {
                ledger.count("harm before prevented a restore");
                let whole: Arc<dyn ObjectStore> = Arc::new(world.bucket.unharmed());
                match restored(world, whole, name, seq, &volume.name).await {
                    Ok(bytes) => compare(world, name, point, seq, &volume.name, offered, &bytes),
                    Err(error) => {
                        ledger.violation("I2", format_args!("{name}: unharmed {}@{seq}: {error:#}", volume.name))
                    }
                }
            }
            Err(error) => {
                ledger.violation("I2", format_args!("{name}: {}@{seq} can't be restored: {error:#}", volume.name));
            }
        }
    }
    if point.volumes.len() != offer.volumes.len() {
        ledger.violation("I1", format_args!("{name}: point {seq} has other volumes than were offered"));
    }
    ledger.count("point restored");
}

/// I8: whether one of these objects is what an error is about.
pub fn is_named(harmed: &[ObjectKey], error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    harmed.iter().any(|key| text.contains(key.as_str()))
}

/// I4, I5: only who was entitled to the record before may have written this one.
async fn examine_writer(world: &World, log: &GroupLog, name: &Name, record: &Record, offer: &Offer) {
    let (ledger, seq) = (&world.ledger, record.seq);
    let Some(before) = seq.0.checked_sub(1).map(LogSeq) else { return };
    // Below the floor it is gone.
    if before < log.floor().await.unwrap_or_default() {
        return;
    }
    let Ok(Some((before, _))) = log.read(before).await else { return };
    if before.nonce != WriterNonce::OPEN && !offer.shown.nonces.contains(&before.nonce) {
        ledger.violation("I4", format_args!("{name}: the writer of {seq} did not know the nonce of {}", before.seq));
    }
    if let Body::Point(point) = &before.body
        && offer.shown.machine != Some(point.machine)
    {
        ledger.violation("I4", format_args!("{name}: {seq} was written by another machine than {}", before.seq));
    }
    // What the operator decides stands.
    let chosen = matches!(before.body, Body::Promote(_));
    if offer.shown.high_water > before.seq && !chosen {
        let seen = offer.shown.high_water;
        ledger.violation("I4", format_args!("{name}: the writer of {seq} had seen {seen}, and was not told"));
    }
    if before.time > record.time {
        ledger.violation("I15", format_args!("{name}: {seq} is older than {}", before.seq));
    }
}

/// I6: there is one instant that all volumes of a point were of, unless it is called fuzzy.
fn examine_instant(world: &World, name: &Name, seq: LogSeq, point: &PointBody, offer: &Offer) {
    if point.consistency == Consistency::Fuzzy {
        return;
    }
    let watches = || offer.volumes.iter().map(|(_, snapshot)| snapshot.watched);
    let from = watches().map(|w| w.from).max();
    // A watch that goes on when the commit is asked for has seen nothing yet.
    let until = watches().map(|w| w.until.unwrap_or(0)).min();
    if from >= until {
        let text =
            format_args!("{name}: the volumes of {seq} are of no common instant, and it is {}", point.consistency);
        world.ledger.violation("I6", text);
    }
    if offer.volumes.len() > 1 {
        world.ledger.count("one instant of several volumes");
    }
}

/// The bytes of a volume, as a user gets them back.
pub async fn restored(
    world: &World,
    store: Arc<dyn ObjectStore>,
    group: &Name,
    seq: LogSeq,
    volume: &Name,
) -> anyhow::Result<Vec<u8>> {
    let to = world.dir.path().join("restored");
    let _ = std::fs::remove_file(&to);
    let request = Request {
        group: group.clone(),
        volume: Some(volume.clone()),
        point: PointSpec::Number(seq),
        targets: vec![to.display().to_string()],
        refuse: Vec::new(),
        confirm: Vec::new(),
        durability: Durability::Cached,
        on_damage: OnDamage::Fail,
    };
    let mut progress = Output::new(false, true, |_| None).progress(4);
    let prepared = Prepared::new(Catalog::open(store).await?, request, &mut progress).await?;
    prepared.run(&mut progress).await?;
    Ok(std::fs::read(&to)?)
}

/// Whether these are the bytes that were offered.
pub fn compare(
    world: &World,
    name: &Name,
    point: &PointBody,
    seq: LogSeq,
    volume: &Name,
    offered: &Snapshot,
    bytes: &[u8],
) {
    let ledger = &world.ledger;
    if bytes.len() as u64 != offered.geometry.length() {
        return ledger.violation("I1", format_args!("{name}: {volume}@{seq} has {} bytes", bytes.len()));
    }
    let mut expected = Vec::new();
    for (i, held) in bytes.chunks(offered.geometry.block_size() as usize).enumerate() {
        expected.resize(held.len(), 0);
        let is = |content: Content, expected: &mut [u8]| {
            bytes_of(content, expected);
            *held == *expected
        };
        let right = match point.consistency {
            // Of one instant: nothing was written from the beginning of the look until after its end.
            Consistency::Fuzzy => offered.seen[i].iter().any(|c| is(*c, &mut expected)),
            _ => is(offered.blocks[i], &mut expected),
        };
        if !right {
            let what = (point.consistency, offered.blocks[i], &offered.seen[i]);
            return ledger.violation("I1", format_args!("{name}: block {i} of {volume}@{seq} is wrong: {what:?}"));
        }
    }
}

/// After healing: the newest point is what the volumes hold, and a second look finds nothing to send.
pub async fn newest_is_what_there_is(world: &mut World, node: usize) {
    let (id, group) = (world.nodes[node].identity.group, world.group_of(node));
    let name = world.groups[group].name.clone();
    let log = world.log(id).await;
    let newest = match log.head().await {
        Ok((head, _)) => head.point,
        Err(error) => return world.ledger.violation("I14", format_args!("{name}: no newest point: {error}")),
    };
    let Some((seq, point)) = newest else {
        return world.ledger.violation("I14", format_args!("{name}: no point after a commit"));
    };
    let store: Arc<dyn ObjectStore> = Arc::new(world.bucket.objects().fork());
    for volume in &point.volumes {
        let Some(disk) = world.nodes[node].disks.get(volume.id) else { continue };
        let (blocks, geometry) = (disk.blocks(), disk.geometry());
        let seen = blocks.iter().map(|c| [*c].into()).collect();
        let now = Snapshot { blocks, seen, geometry, watched: Watched { from: 0, until: None } };
        match restored(world, store.clone(), &name, seq, &volume.name).await {
            Ok(bytes) => compare(world, &name, &point, seq, &volume.name, &now, &bytes),
            Err(error) => world.ledger.violation("I2", format_args!("{name}: newest {}: {error:#}", volume.name)),
        }
    }
    let link = world.dial(node, 0);
    world.nodes[node].begin(Some(link), CommitWhen::Changed, false);
    match world.nodes[node].wait().await {
        Some(Ok(report)) if report.committed.is_none() && report.bytes_sent == 0 => {}
        Some(Ok(report)) => {
            let what = (report.committed.map(|c| c.seq), report.bytes_sent);
            world.ledger.violation("I11", format_args!("{name}: nothing changed, and {what:?} came of it"));
        }
        Some(Err(error)) => world.ledger.violation("I14", format_args!("{name}: a second look fails: {error}")),
        None => {}
    }
}

/// An agent restores one of its newest points; faults may make it fail, never make it wrong (I9).
pub async fn restore_over_network(world: &mut World, node: usize, receiver: usize, back: u64) {
    let group = world.nodes[node].identity.group;
    let Ok(newest) = world.log(group).await.newest().await else { return };
    let wanted = LogSeq(newest.0.saturating_sub(back));
    let Ok(link) = world.dial(node, receiver) else { return };
    let Ok(Connected { link, sender, receiver }) = greet(link).await else { return };
    let folder = world.dir.path().join("restored-over-network");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder in memory");
    // The volumes of the point are known to the oracle only; what is not in it is an error that names them.
    let Ok(Some((record, _))) = world.log(group).await.read(wanted).await else { return };
    let Some(point) = record.point().cloned() else { return };
    let target = |v: &Name| folder.join(v.as_str()).display().to_string();
    let request = RestoreRequest {
        volume: None,
        point: PointSpec::Number(wanted),
        targets: match &point.volumes[..] {
            [one] => vec![target(&one.name)],
            all => all.iter().map(|v| format!("{}={}", v.name, target(&v.name))).collect(),
        },
        confirm: Vec::new(),
        refuse: Vec::new(),
        durability: Durability::Cached,
    };
    let mut progress = Output::new(false, true, |_| None).progress(4);
    let attempt = restore(&*link, (sender, receiver), &request, &mut progress, |_| {});
    let done = tokio::time::timeout(RESTORE, attempt).await;
    link.goodbye().await;
    match done {
        Err(_) => world.ledger.violation("I14", format_args!("a restore over the network hangs")),
        Ok(Err(error)) => {
            world.ledger.trace(format_args!("restore: {error}"));
            world.ledger.count("network restore failed");
        }
        Ok(Ok(_)) => {
            world.ledger.count("network restore");
            let Some(offer) = world.ledger.offered(record.commit) else { return };
            for volume in &point.volumes {
                let bytes = std::fs::read(Path::new(&target(&volume.name))).unwrap_or_default();
                if let Some((_, offered)) = offer.volumes.iter().find(|(id, _)| *id == volume.id) {
                    let name = world.groups[world.group_of(node)].name.clone();
                    compare(world, &name, &point, wanted, &volume.name, offered, &bytes);
                }
            }
        }
    }
}
