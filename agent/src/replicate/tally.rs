//! What the passes of a round add up to: digests, counts, bytes.
//!
//! Pages may be scanned again, in any order. What each block is in the end is in the index; what is kept here is which
//! blocks the draft holds, 128 bytes for each page that has any.

use std::collections::BTreeMap;

use backhaul_protocol::geometry::{Geometry, PageIndex};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::session::compare::{BlockSet, RoundDigester, RoundDigests};

use crate::pipeline::scanner::Scanned;
use crate::tracker::hash_index::{HashIndex, IndexError};

/// What a round adds up to.
pub(super) struct ScanSum {
    pub(super) digests: RoundDigests,
    pub(super) records: u64,
    pub(super) bytes_scanned: u64,
    pub(super) bytes_sent: u64,
    pub(super) max_capture: CaptureNumber,
}

/// Adds up.
#[derive(Default)]
pub(super) struct Tally {
    drafted: BTreeMap<(VolumeSlot, PageIndex), BlockSet>,
    pub(super) records: u64,
    pub(super) bytes_scanned: u64,
}

impl Tally {
    /// One page more, or the same once more.
    pub(super) fn add(&mut self, scanned: &Scanned) {
        self.records += scanned.records;
        self.bytes_scanned += scanned.bytes_read;
        if !scanned.drafted.is_empty() {
            self.drafted.entry((scanned.slot, scanned.page)).or_default().insert_all(&scanned.drafted);
        }
    }

    /// The digests of all volumes, in the order of their slots, and of what the draft holds. Reads the index.
    pub(super) fn digests<'a>(
        &self,
        volumes: impl Iterator<Item = (VolumeSlot, Geometry, &'a HashIndex)>,
    ) -> Result<RoundDigests, IndexError> {
        let mut digester = RoundDigester::default();
        for (slot, geometry, index) in volumes {
            digester.begin_volume(slot, geometry);
            for (page, range) in (0..).map(PageIndex).zip(index.ranges()) {
                let (digests, drafted) = match self.drafted.get(&(slot, page)) {
                    Some(drafted) => (index.page(page)?, *drafted),
                    None => (Vec::new(), BlockSet::default()),
                };
                digester.push_range(page, range, &digests, &drafted, &BlockSet::default());
            }
        }
        Ok(digester.finish())
    }
}
