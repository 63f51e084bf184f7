//! Restore over the network: the receiver as Source. The agent asks what a point holds and which blocks it wants;
//! records go out as they are stored.
//!
//! Read first: [`Reading`].

use std::sync::Arc;

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::VolumeSlot;
use backhaul_protocol::session::compare::BlockSet;
use backhaul_protocol::store::entry::{Content, Page};
use backhaul_protocol::store::key::GroupKeys;
use backhaul_protocol::wire::message::{PointSpec, ReadOpened, ReadVolume, Reason, ReceiverMessage, Refusal};
use backhaul_transport::link::Link;
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::catalog::GroupLog;
use crate::plan::reads::{MAX_GAP, MAX_READ, Read, Wanted, plan_reads, record_in};
use crate::read_error::ReadError;
use crate::salvage::{BadIndex, OpenedView, open_view};
use crate::store::ObjectStore;
use crate::view::View;

/// Reads from the store that one session may have under way: 4 MiB each.
const READS: usize = 4;
/// Wanted pages that may wait; more make the agent wait.
const PAGES: usize = 4;

/// A point that is being read.
pub struct Reading {
    view: Arc<View>,
    wants: mpsc::Sender<(VolumeSlot, PageIndex, Vec<Wanted>)>,
    _server: JoinSet<()>,
}

impl Reading {
    /// Opens the point; blocks are sent over `link`, notices through `out`.
    pub async fn open(
        log: GroupLog,
        spec: PointSpec,
        link: Arc<dyn Link>,
        out: mpsc::Sender<ReceiverMessage>,
    ) -> Result<(Self, ReadOpened), ReadError> {
        let (record, point) = log.find(spec).await?;
        let OpenedView { view, holes, .. } = open_view(&log, &point, BadIndex::Rebuild).await?;
        if let Some(hole) = holes.first() {
            return Err(hole.error().clone());
        }
        let view = Arc::new(view);
        let volumes = point.volumes.iter().map(|v| ReadVolume {
            slot: v.slot,
            id: v.id,
            name: v.name.clone(),
            geometry: v.geometry,
            digest: v.digest,
        });
        let opened = ReadOpened {
            seq: record.seq,
            time: record.time,
            consistency: point.consistency,
            volumes: volumes.collect(),
        };
        let (wants, wanted) = mpsc::channel(PAGES);
        let mut server = JoinSet::new();
        let (store, keys) = (log.store().clone(), log.keys());
        server.spawn(async move {
            if let Err(refused) = serve_wants(store, keys, wanted, link, &out).await {
                let _ = out.send(ReceiverMessage::Refused(refused)).await;
            }
        });
        Ok((Self { view, wants, _server: server }, opened))
    }

    /// What the point looks like.
    pub fn view(&self) -> &View {
        &self.view
    }

    async fn view_page(&self, slot: VolumeSlot, index: PageIndex) -> Result<Page, ReadError> {
        let volume =
            self.view.volume(slot).ok_or_else(|| ReadError::NotFound("no such volume in this point".into()))?;
        self.view.page(volume, index).await
    }

    /// The digests of a page; a committed point has no draft.
    pub async fn page(&self, slot: VolumeSlot, index: PageIndex) -> Result<(Vec<u8>, Vec<BlockDigest>), ReadError> {
        let page = self.view_page(slot, index).await?;
        Ok((BlockSet::default().to_bytes(), page.digests()))
    }

    /// The agent wants these blocks. Waits while much is under way.
    pub async fn want(&mut self, slot: VolumeSlot, index: PageIndex, blocks: &[u8]) -> Result<(), Refusal> {
        let protocol = |text: &str| Refusal { reason: Reason::Protocol, text: text.into() };
        let set = BlockSet::from_bytes(blocks).ok_or_else(|| protocol("a block set of the wrong size"))?;
        if self.view.volume(slot).is_none_or(|v| index.0 >= v.geometry.pages()) {
            return Err(protocol("a page that is not in this session"));
        }
        let page = self.view_page(slot, index).await.map_err(|e| e.refusal())?;
        let wanted = page.blocks().filter(|(block, _)| set.contains(block.in_page())).filter_map(|(block, held)| {
            // Zero blocks are never sent: the agent knows them by their digest.
            let Some((_, Content::Data { digest, location })) = held else { return None };
            Some(Wanted { volume: slot, block, digest, location })
        });
        let request = (slot, index, wanted.collect());
        self.wants.send(request).await.map_err(|_| protocol("reading has failed"))
    }
}

async fn serve_wants(
    store: Arc<dyn ObjectStore>,
    keys: GroupKeys,
    mut wanted: mpsc::Receiver<(VolumeSlot, PageIndex, Vec<Wanted>)>,
    link: Arc<dyn Link>,
    out: &mpsc::Sender<ReceiverMessage>,
) -> Result<(), Refusal> {
    let slots = Arc::new(Semaphore::new(READS));
    while let Some((volume, page, wants)) = wanted.recv().await {
        let records = wants.len() as u64;
        let mut reads = JoinSet::new();
        for read in plan_reads(wants, MAX_GAP, MAX_READ) {
            let slot = slots.clone().acquire_owned().await.expect("never closed");
            let (store, link) = (store.clone(), link.clone());
            reads.spawn(async move {
                let sent = send_read(&*store, keys, &read, &*link).await;
                drop(slot);
                sent
            });
            while let Some(done) = reads.try_join_next() {
                done.expect("sending does not panic")?;
            }
        }
        while let Some(done) = reads.join_next().await {
            done.expect("sending does not panic")?;
        }
        let _ = out.send(ReceiverMessage::Sent { volume, page: page.0, records }).await;
    }
    Ok(())
}

/// Reads one range and sends its records on a stream of their own. Only their headers are looked at here: the agent
/// hashes everything.
async fn send_read(store: &dyn ObjectStore, keys: GroupKeys, read: &Read, link: &dyn Link) -> Result<(), Refusal> {
    let key = keys.segment(read.object);
    let bytes = store.get_range(&key, read.range.clone()).await.map_err(|e| ReadError::from(e).refusal())?;
    let lost = |e: &dyn std::fmt::Display| Refusal { reason: Reason::Busy, text: format!("connection lost: {e}") };
    let mut stream = link.open_blocks().await.map_err(|e| lost(&e))?;
    let mut start = None::<(usize, usize)>;
    let mut chunks: Vec<Bytes> = Vec::new();
    for wanted in &read.records {
        let (_, _, raw) = record_in(read, &bytes, wanted).map_err(|cause| {
            let (offset, end) = (u64::from(wanted.location.offset), wanted.location.end());
            ReadError::Record { key: key.clone(), offset, end, cause }.refusal()
        })?;
        let at = (u64::from(wanted.location.offset) - read.range.start) as usize;
        match &mut start {
            Some((_, end)) if *end == at => *end += raw.len(),
            _ => {
                if let Some((from, to)) = start.replace((at, at + raw.len())) {
                    chunks.push(bytes.slice(from..to));
                }
            }
        }
    }
    if let Some((from, to)) = start {
        chunks.push(bytes.slice(from..to));
    }
    for chunk in chunks {
        stream.write(chunk).await.map_err(|e| lost(&e))?;
    }
    stream.finish();
    Ok(())
}
