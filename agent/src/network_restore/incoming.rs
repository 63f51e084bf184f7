//! Block records as they come in: checked against what is wanted, hashed, written.
//!
//! Read first: [`Incoming`], then [`take_streams`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use backhaul_cli::Phase;
use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{Name, VolumeSlot};
use backhaul_protocol::record::{HEADER_LEN, RecordBody, RecordError, Verifier, split_record};
use backhaul_protocol::session::compare::BlockSet;
use backhaul_protocol::wire::message::ReadVolume;
use backhaul_seams::threads;
use backhaul_transport::blocks::RecordReader;
use backhaul_transport::link::{Link, ReceiveHalf};
use backhaul_volume::rebuild::BlockWriter;
use backhaul_volume::target::{Durability, Target};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::{RestoreError, lock};

/// Takes block streams until one fails or the connection ends.
pub(super) async fn take_streams(link: &dyn Link, incoming: Arc<Incoming>) -> RestoreError {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            Some(done) = streams.join_next() => {
                if let Err(error) = done.expect("taking a stream does not panic") {
                    return error;
                }
            }
            stream = link.accept_blocks() => match stream {
                Ok(stream) => {
                    streams.spawn(incoming.clone().take(stream));
                }
                Err(error) => return error.into(),
            },
        }
    }
}

/// Blocks that are wanted and have not come.
#[derive(Default)]
pub(super) struct Incoming(Mutex<State>, Mutex<Vec<Bench>>);

#[derive(Default)]
pub(super) struct State {
    volume: Option<Receiving>,
    pages: HashMap<PageIndex, Wanted>,
    /// Bytes of records that came, of all volumes.
    pub(super) bytes: u64,
}

/// The volume that records come for.
#[derive(Clone)]
struct Receiving {
    slot: VolumeSlot,
    name: Name,
    geometry: Geometry,
    target: Arc<Target>,
    durability: Durability,
    phase: Phase,
}

struct Wanted {
    digests: Vec<BlockDigest>,
    blocks: BlockSet,
    /// Those that came; each comes once.
    came: BlockSet,
    /// How many are not written yet.
    left: usize,
    _permit: OwnedSemaphorePermit,
}

/// What a thread needs to open records; kept.
struct Bench {
    verifier: Verifier,
    /// Of which volume, and how it is written.
    writer: (VolumeSlot, BlockWriter),
}

impl Incoming {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// Records of this volume come next; the one before is whole.
    pub(super) fn begin(&self, v: &ReadVolume, target: Arc<Target>, durability: Durability, phase: &Phase) {
        let mut state = self.lock();
        let (slot, name, geometry, phase) = (v.slot, v.name.clone(), v.geometry, phase.clone());
        state.volume = Some(Receiving { slot, name, geometry, target, durability, phase });
    }

    pub(super) fn want(
        &self,
        page: PageIndex,
        digests: Vec<BlockDigest>,
        blocks: BlockSet,
        permit: OwnedSemaphorePermit,
    ) {
        let wanted = Wanted { digests, blocks, came: BlockSet::default(), left: blocks.len(), _permit: permit };
        self.lock().pages.insert(page, wanted);
    }

    /// Whether the receiver sends as many as were asked for. A page that is whole already is gone from here.
    pub(super) fn sent(&self, page: PageIndex, records: u64) -> bool {
        self.lock().pages.get(&page).is_none_or(|w| w.blocks.len() as u64 == records)
    }

    async fn take(self: Arc<Self>, stream: Box<dyn ReceiveHalf>) -> Result<(), RestoreError> {
        let mut reader = RecordReader::new(stream);
        while let Some(batch) = reader.next_batch().await? {
            let this = self.clone();
            let work = move || this.write_batch(&batch);
            threads::blocking(work).await?;
        }
        Ok(())
    }

    fn write_batch(&self, batch: &[u8]) -> Result<(), RestoreError> {
        const UNASKED: RestoreError = RestoreError::Protocol("a block that was not asked for");
        let volume = self.lock().volume.clone().ok_or(UNASKED)?;
        let wrong = |cause| RestoreError::Record { volume: volume.name.clone(), cause };
        let own = lock(&self.1).pop().filter(|b| b.writer.0 == volume.slot);
        let mut bench = match own {
            Some(bench) => bench,
            None => Bench {
                verifier: Verifier::new().map_err(RestoreError::Setup)?,
                writer: (volume.slot, BlockWriter::new(&volume.target, volume.geometry, volume.durability)),
            },
        };
        let mut records = Vec::with_capacity(batch.len() / 4096 + 1);
        let mut at = 0;
        while at < batch.len() {
            let split = split_record(&batch[at..]).and_then(|s| s.ok_or(RecordError::Bounds("length")));
            let split = split.map_err(wrong)?;
            at += HEADER_LEN + split.payload.len();
            let RecordBody::Data { digest, .. } = split.header.body else { return Err(UNASKED) };
            if split.header.volume != volume.slot || !self.claim(split.header.block, digest) {
                return Err(UNASKED);
            }
            records.push(split);
        }
        // In the order of the volume, so that neighbours are written together.
        records.sort_unstable_by_key(|s| s.header.block);
        for record in &records {
            let block = bench.verifier.verify(&record.header, record.payload, volume.geometry).map_err(wrong)?;
            bench.writer.1.push(&volume.target, &block)?;
        }
        bench.writer.1.flush(&volume.target)?;
        lock(&self.1).push(bench);
        let mut state = self.lock();
        state.bytes += batch.len() as u64;
        for record in &records {
            let len = volume.geometry.block_len(record.header.block) as u64;
            volume.phase.add(len);
            let page = record.header.block.page();
            if let Some(wanted) = state.pages.get_mut(&page) {
                wanted.left -= 1;
                if wanted.left == 0 {
                    state.pages.remove(&page);
                }
            }
        }
        Ok(())
    }

    /// Whether the block is wanted, with this digest, and did not come before.
    fn claim(&self, block: BlockIndex, digest: BlockDigest) -> bool {
        let mut state = self.lock();
        let Some(wanted) = state.pages.get_mut(&block.page()) else { return false };
        let i = block.in_page();
        let right = wanted.blocks.contains(i) && !wanted.came.contains(i) && wanted.digests.get(i) == Some(&digest);
        wanted.came.insert(i);
        right
    }
}
