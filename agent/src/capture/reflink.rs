//! Clones of image files that somebody writes to, on file systems that share blocks between files.
//!
//! Read first: [`Clones::prepare`]; [`backhaul_volume::reflink`] says why a clone is of one instant.
//!
//! **Several volumes.** A point is of the instant of the last clone: the watches of what is not cloned begin before
//! the first clone and end after the last byte, and of images that were cloned before the last one nothing was written
//! until then. Whoever was written to last is cloned last, so that one busy image beside idle ones is no doubt.
//!
//! **Room.** Whoever writes to a cloned image needs room for what it overwrites. A clone is made only while as much is
//! free as can be written, or a tenth of the image, and given up when half of that is left.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{Name, VolumeId};
use backhaul_volume::reflink::{CloneError, Moment, Room};
use backhaul_volume::{Source, VolumeError};

use super::held::{Held, Role, lock};
use super::live::Live;
use super::{Begin, Capture, Provider, SnapshotError, Watching};
use crate::state::ProtectedVolume;

/// What must be free, unless the image is smaller, and however small a part of the image it is. Arbitrary: a second or
/// two of a fast disk.
const LEAST_ROOM: u64 = 256 << 20;
/// What part of the image must be free. Arbitrary.
const ROOM_PART: u64 = 10;

/// Which images are cloned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    /// Those that can't be watched because somebody has them open for writing.
    Written,
    /// All.
    All,
}

/// Volumes as they are, and clones of images. For one round.
pub struct Clones {
    which: Which,
    volumes: Vec<ProtectedVolume>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    held: BTreeMap<VolumeId, Arc<Held>>,
    /// Why the clones may not be of one instant.
    apart: Option<String>,
}

/// A volume that was opened.
struct Opened {
    volume: ProtectedVolume,
    source: Source,
    watch: Option<Box<dyn Watching>>,
}

/// An image that is to be cloned.
struct Candidate {
    opened: Opened,
    written: Moment,
    floor: Result<u64, String>,
}

impl Clones {
    /// For a round over these volumes.
    pub fn new(which: Which, volumes: &[ProtectedVolume]) -> Self {
        Self { which, volumes: volumes.to_vec(), shared: Arc::default() }
    }
}

impl Provider for Clones {
    fn begin(&self) -> Option<Begin> {
        // Block devices have no clones, and need no thread to learn that.
        let images = self.volumes.iter().any(|v| std::fs::metadata(&v.path).is_ok_and(|m| m.is_file()));
        let (which, volumes, shared) = (self.which, self.volumes.clone(), self.shared.clone());
        images.then(|| -> Begin { Box::new(move || prepare(which, volumes).map(|made| *lock(&shared) = made)) })
    }

    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError> {
        match lock(&self.shared).held.get(&volume.id) {
            Some(held) => Ok(held.clone()),
            None => Live.open(volume),
        }
    }

    fn finish(&self, found: Consistency, caveats: &mut Vec<String>) -> Consistency {
        let shared = std::mem::take(&mut *lock(&self.shared));
        // Clones take room for as long as they are there.
        shared.held.values().for_each(|held| held.close());
        match shared.apart {
            Some(why) => {
                caveats.push(why);
                found.min(Consistency::Fuzzy)
            }
            None => found,
        }
    }
}

impl Drop for Clones {
    fn drop(&mut self) {
        lock(&self.shared).held.values().for_each(|held| held.close());
    }
}

/// Opens everything, watches what can be watched, and clones the rest: in that order.
fn prepare(which: Which, volumes: Vec<ProtectedVolume>) -> Result<Shared, SnapshotError> {
    let (mut as_they_are, mut candidates) = (Vec::new(), Vec::new());
    for volume in volumes {
        let failed = |source| SnapshotError::Volume { name: volume.name.clone(), source };
        let source = Source::open(&volume.path).map_err(failed)?;
        let (written, room) = (source.moment().map_err(failed)?, source.room().map_err(failed)?);
        let Some((written, room)) = written.zip(room) else {
            as_they_are.push(Opened { volume, source, watch: None });
            continue;
        };
        // A lease that is refused is lost at once.
        let watch = Some(Capture::watch(&source)).filter(|watch| which == Which::Written && !watch.has_moved());
        let cloned = watch.is_none();
        let opened = Opened { volume, source, watch };
        if cloned {
            candidates.push((Candidate { opened, written, floor: Ok(0) }, room));
        } else {
            as_they_are.push(opened);
        }
    }
    let mut shared = Shared::default();
    for Opened { volume, source, watch } in as_they_are {
        // A device's watch flushes its disk: not before it is known that it must have begun before a clone is made.
        let watch = watch.or_else(|| (!candidates.is_empty()).then(|| Capture::watch(&source)));
        shared.held.insert(volume.id, Arc::new(Held::new(source, Role::Itself, watch, Vec::new())));
    }
    let mut candidates = with_room(candidates);
    candidates.sort_by_key(|c| c.written.newest());
    shared.apart = clone_all(candidates, &mut shared.held)?;
    Ok(shared)
}

/// Finds out for which there is room. Images on one file system need it together.
fn with_room(candidates: Vec<(Candidate, Room)>) -> Vec<Candidate> {
    let mut needed: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, room) in &candidates {
        *needed.entry(room.file_system).or_default() += room.taken.min((room.taken / ROOM_PART).max(LEAST_ROOM));
    }
    let with_floor = |(mut candidate, room): (Candidate, Room)| {
        let needed = needed.get(&room.file_system).copied().unwrap_or(0);
        candidate.floor = if room.free >= needed {
            Ok(needed / 2)
        } else {
            Err(format!(
                "{} bytes are free where it lies, and while a clone is there writes may need {needed}",
                room.free
            ))
        };
        candidate
    };
    candidates.into_iter().map(with_floor).collect()
}

/// Clones them one after the other; gives why that was not one instant. What can't be cloned is read as it is.
fn clone_all(
    candidates: Vec<Candidate>,
    held: &mut BTreeMap<VolumeId, Arc<Held>>,
) -> Result<Option<String>, SnapshotError> {
    // Those that must not have been written to since they were cloned.
    let mut cloned: Vec<(Name, Source, Moment)> = Vec::new();
    // The instant of the point is that of the last clone, unless a watch began after it.
    let mut last_is_clone = false;
    for Candidate { opened: Opened { volume, source, .. }, floor, .. } in candidates {
        let failed = |source| SnapshotError::Volume { name: volume.name.clone(), source };
        // Before the clone: what is written from here on is seen, whether the clone has it or not.
        let Some(before) = source.moment().map_err(failed)? else { continue };
        let made = floor.map_err(CloneError::Unable).and_then(|floor| Ok((source.clone_image()?, floor)));
        last_is_clone = made.is_ok();
        let now = match made {
            Ok((clone, floor)) => {
                cloned.push((volume.name.clone(), source, before));
                Held::new(clone, Role::Clone(floor), None, Vec::new())
            }
            Err(CloneError::Volume(error)) => return Err(failed(error)),
            Err(error) => {
                let watch = Some(Capture::watch(&source));
                Held::new(source, Role::Itself, watch, vec![format!("there is no clone of it: {error}")])
            }
        };
        held.insert(volume.id, Arc::new(now));
    }
    if last_is_clone {
        cloned.pop();
    }
    for (name, source, before) in cloned {
        let after = source.moment().map_err(|source| SnapshotError::Volume { name: name.clone(), source })?;
        if !after.is_some_and(|after| before.lasts_until(&after)) {
            let why = "it is written to, and not the only one: clones of several images are not of one instant";
            return Ok(Some(format!("{name}: {why}")));
        }
    }
    Ok(None)
}
