//! What the scanned pages of a round add up to: digests, counts, bytes.

use std::collections::BTreeMap;

use backhaul_cli::Phase;
use backhaul_protocol::geometry::PageIndex;
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::session::compare::{RoundDigester, RoundDigests};

use super::feeding::PlannedVolume;
use crate::pipeline::scanner::Scanned;

/// What a scan adds up to.
pub(super) struct ScanSum {
    pub(super) digests: RoundDigests,
    pub(super) records: u64,
    pub(super) bytes_scanned: u64,
    pub(super) bytes_sent: u64,
    pub(super) max_capture: CaptureNumber,
}

/// Puts pages back in order and adds them up.
pub(super) struct Summing<'a> {
    planned: &'a [PlannedVolume],
    digester: RoundDigester,
    /// The volume and page that come next.
    next: (usize, u64),
    begun: bool,
    early: BTreeMap<(VolumeSlot, PageIndex), Scanned>,
    pages: u64,
    records: u64,
    bytes_scanned: u64,
    progress: Phase,
}

impl<'a> Summing<'a> {
    pub(super) fn new(planned: &'a [PlannedVolume], progress: Phase) -> Self {
        Self {
            planned,
            digester: RoundDigester::default(),
            next: (0, 0),
            begun: false,
            early: BTreeMap::new(),
            pages: 0,
            records: 0,
            bytes_scanned: 0,
            progress,
        }
    }

    pub(super) fn add(&mut self, scanned: Scanned) {
        self.early.insert((scanned.slot, scanned.page), scanned);
        while let Some(volume) = self.planned.get(self.next.0) {
            if !self.begun {
                self.digester.begin_volume(volume.opened.slot, volume.scan.geometry);
                self.begun = true;
            }
            let page = PageIndex(self.next.1);
            let Some(s) = self.early.remove(&(volume.opened.slot, page)) else { return };
            self.digester.push_range(page, s.range, &s.digests, &s.draft, &s.sent);
            self.pages += 1;
            self.records += s.records;
            self.bytes_scanned += s.bytes_read;
            self.progress.add(volume.scan.geometry.page_len(page));
            self.next.1 += 1;
            if self.next.1 == volume.scan.geometry.pages() {
                self.next = (self.next.0 + 1, 0);
                self.begun = false;
            }
        }
    }

    /// Pages that are added up, and of which nothing is kept any more.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn is_complete(&self) -> bool {
        self.next.0 == self.planned.len()
    }

    pub(super) fn finish(self, bytes_sent: u64, max_capture: CaptureNumber) -> ScanSum {
        self.progress.finish();
        ScanSum {
            digests: self.digester.finish(),
            records: self.records,
            bytes_scanned: self.bytes_scanned,
            bytes_sent,
            max_capture,
        }
    }
}
