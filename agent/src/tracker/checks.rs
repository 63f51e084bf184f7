//! The background scan: everything is read again within a period, whatever the marks say, to see that they say all.
//!
//! Read first: [`Checks::due`], then [`Checks::judge`]. A block that was read and is not as the index has it is a suspect
//! until it is known that all marks are there: what is marked by then is explained. The rest are misses, and then marks
//! are not believed any more.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use backhaul_hints::Blocks;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::VolumeId;
use tokio::time::Instant;

/// Read at once, so that most rounds read nothing for this. Arbitrary; 36 s apart for a terabyte in a week.
const PORTION: u64 = 64 << 20;
/// A machine that slept does not make up for it at once.
const LONGEST: Duration = Duration::from_secs(120);

/// Of one volume.
#[derive(Debug)]
struct Check {
    since: Instant,
    suspects: Blocks,
    misses: u64,
}

/// Of all volumes. Outlives failed rounds.
#[derive(Debug)]
pub struct Checks {
    period: Duration,
    volumes: BTreeMap<VolumeId, Check>,
}

impl Checks {
    /// Everything is read within this time.
    pub fn new(period: Duration) -> Self {
        Self { period, volumes: BTreeMap::new() }
    }

    /// Another period from now on.
    pub fn set_period(&mut self, period: Duration) {
        self.period = period;
    }

    fn of(&mut self, volume: VolumeId, geometry: Geometry) -> &mut Check {
        let fits = |check: &Check| check.suspects.capacity() == geometry.blocks();
        if !self.volumes.get(&volume).is_some_and(fits) {
            let misses = self.volumes.get(&volume).map_or(0, |check| check.misses);
            let suspects = Blocks::none(geometry.blocks());
            self.volumes.insert(volume, Check { since: Instant::now(), suspects, misses });
        }
        self.volumes.get_mut(&volume).expect("it is there now")
    }

    /// Blocks from `cursor` on whose time has come. None in most rounds.
    pub fn due(&mut self, volume: VolumeId, geometry: Geometry, cursor: u64) -> Range<u64> {
        let period = self.period.as_secs_f64();
        let check = self.of(volume, geometry);
        let elapsed = check.since.elapsed().min(LONGEST);
        let bytes = geometry.length() as f64 * elapsed.as_secs_f64() / period;
        let portion = PORTION.min(geometry.length());
        if (bytes as u64) < portion && elapsed < LONGEST {
            return cursor..cursor;
        }
        check.since = Instant::now();
        let blocks = (bytes as u64).div_ceil(u64::from(geometry.block_size()));
        cursor..cursor.saturating_add(blocks).min(geometry.blocks())
    }

    /// These were not as the index had them.
    pub fn suspect(&mut self, volume: VolumeId, geometry: Geometry, blocks: &Blocks) {
        self.of(volume, geometry).suspects.insert_all(blocks);
    }

    /// Whether there are suspects.
    pub fn has_suspects(&self, volume: VolumeId) -> bool {
        self.volumes.get(&volume).is_some_and(|check| !check.suspects.is_empty())
    }

    /// All that was ever written is marked, and these were since the suspects were read: how many nothing explains.
    pub fn judge(&mut self, volume: VolumeId, geometry: Geometry, marked: &Blocks) -> u64 {
        let check = self.of(volume, geometry);
        check.suspects.remove_all(marked);
        let missed = check.suspects.count();
        check.suspects.clear();
        check.misses += missed;
        missed
    }

    /// What is suspected is no longer of use: everything is read.
    pub fn forget(&mut self, volume: VolumeId) {
        if let Some(check) = self.volumes.get_mut(&volume) {
            check.suspects.clear();
            check.since = Instant::now();
        }
    }

    /// Blocks that had changed and were not marked, since this process began.
    pub fn misses(&self) -> u64 {
        self.volumes.values().map(|check| check.misses).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn everything_is_due_within_the_period_and_nothing_before() {
        let geometry = Geometry::new(65536, 10 << 30).expect("legal");
        let volume = VolumeId([1; 16]);
        let mut checks = Checks::new(Duration::from_secs(1000));
        assert!(checks.due(volume, geometry, 0).is_empty());
        let (mut cursor, begun) = (0, Instant::now());
        while cursor < geometry.blocks() {
            tokio::time::advance(Duration::from_secs(1)).await;
            let due = checks.due(volume, geometry, cursor);
            assert!(due.is_empty() || (due.end - due.start) * 65536 < 2 * PORTION, "{due:?}");
            cursor = due.end;
        }
        let took = begun.elapsed().as_secs_f64();
        assert!((990.0..1010.0).contains(&took), "{took} s");
        // After a sleep it is not made up for.
        tokio::time::advance(Duration::from_secs(100_000)).await;
        let due = checks.due(volume, geometry, 0);
        assert!((due.end - due.start) < geometry.blocks() / 8, "{due:?}");
    }

    #[test]
    fn what_is_marked_explains_and_the_rest_is_missed() {
        let geometry = Geometry::new(65536, 100 * 65536).expect("legal");
        let volume = VolumeId([1; 16]);
        let mut checks = Checks::new(Duration::from_secs(1000));
        let set = |blocks: &[u64]| {
            let mut set = Blocks::none(100);
            blocks.iter().for_each(|b| set.insert(*b));
            set
        };
        checks.suspect(volume, geometry, &set(&[3, 4, 5]));
        assert!(checks.has_suspects(volume));
        assert_eq!(checks.judge(volume, geometry, &set(&[3, 5, 9])), 1);
        assert!(!checks.has_suspects(volume));
        assert_eq!(checks.misses(), 1);
    }
}
