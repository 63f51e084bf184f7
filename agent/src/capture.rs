//! Where a round reads its volumes from, and how it learns whether they held still.
//!
//! Read first: [`Provider`] and [`Capture`].
//!
//! | file | owns |
//! |---|---|
//! | [`live`] | volumes as they are |
//! | [`reflink`] | clones of image files |
//! | [`hooks`] | what commands of the user prepare |
//! | [`held`] | a volume that a provider opened before it was asked for, and closes when all was read |

pub(crate) mod held;
pub mod hooks;
pub mod live;
pub mod reflink;

use std::sync::Arc;

use backhaul_protocol::consistency::Consistency;
use backhaul_volume::stability::Stability;
use backhaul_volume::sysfs::Dev;
use backhaul_volume::{Volume, VolumeError};

use crate::config::snapshot::Snapshot;
use crate::state::{Joined, ProtectedVolume, StateDir, StateError};
use hooks::HookError;
use hooks::round::HookRound;
pub use live::Live;
use reflink::{Clones, Which};

/// Why there is nothing to read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A command of the user.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A volume.
    #[error("volume {name}: {source}")]
    Volume {
        /// Which.
        name: backhaul_protocol::ids::Name,
        /// Why.
        source: VolumeError,
    },
    /// What is owed can't be written down.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What is to be done before the first volume is opened, in a thread that may block.
pub type Begin = Box<dyn FnOnce() -> Result<(), SnapshotError> + Send>;

/// Opens volumes for one round. Dropping it ends what it began.
pub trait Provider: Send + Sync {
    /// What is to be done first, if anything is.
    fn begin(&self) -> Option<Begin> {
        None
    }
    /// Opens one, read-only.
    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError>;
    /// Everything was read, and every watch has ended: what is given up here is not needed any more. `found` is what
    /// the watches found; gives what the point may claim, and adds why.
    fn finish(&self, found: Consistency, caveats: &mut Vec<String>) -> Consistency {
        let _ = caveats;
        found
    }
}

/// A volume that is open for a round.
pub trait Capture: Volume {
    /// Begins to watch it. May block.
    fn watch(&self) -> Box<dyn Watching>;
    /// Whether it is still what was opened: same device, same size.
    fn recheck(&self) -> Result<(), VolumeError>;
    /// How much to read at once, bytes.
    fn read_len(&self) -> usize;
    /// The block device that it is.
    fn device(&self) -> Option<Dev> {
        None
    }
    /// Whether it is read in the place of the volume, by somebody's word: it may hold what the volume never held.
    fn stands_in(&self) -> bool {
        false
    }
}

/// A watch over a volume, from before its first byte is read until after the last.
pub trait Watching: Send {
    /// Whether it is lost already. `false` proves nothing yet.
    fn has_moved(&self) -> bool;
    /// What it can't see, for people.
    fn caveats(&self) -> &[String];
    /// Ends it.
    fn finish(self: Box<Self>) -> Stability;
}

/// Where a round reads from by these settings.
pub fn provider(
    snapshot: &Snapshot,
    state: &StateDir,
    joined: &Joined,
    volumes: &[ProtectedVolume],
) -> Box<dyn Provider> {
    match snapshot {
        Snapshot::Auto => Box::new(Clones::new(Which::Written, volumes)),
        Snapshot::Reflink => Box::new(Clones::new(Which::All, volumes)),
        Snapshot::Hooks(hooks) => Box::new(HookRound::new(hooks, state, joined, volumes)),
        Snapshot::Freeze | Snapshot::None => Box::new(Live),
    }
}
