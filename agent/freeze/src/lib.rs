//! One instant of all file systems on a set of devices: finds them, freezes each once and thaws.
//!
//! Read first: [`Freezer`] (what the agent calls), [`superblocks`] (what is found), then `holding` (the thaw that all
//! processes share) and `journal`.
//!
//! What may never happen: a file system left frozen; a thaw of somebody else's freeze; [`Thawed::Held`] when something
//! was not frozen all the time. Three processes see to it:
//!
//! ```text
//! agent ---socket--- helper ---socket--- guard
//!   |                  |                   |
//!   | thaws when the   | freezes; thaws on | thaws when the helper ends, or does
//!   | helper ends, if  | request, at the   | not move at the deadline and a bit
//!   | it may (it may   | deadline, when    |
//!   | be unprivileged) | the agent ends or |
//!   |                  | it is told to end |
//!   +------ the journal on tmpfs: what may be frozen by us, for them and for the next start ------+
//! ```
//!
//! Each holds descriptors of the superblocks that were opened before; helper and guard have all their memory locked.
//! Between the first FIFREEZE and the last FITHAW nobody opens, logs or allocates.
//!
//! Known limits. FITHAW does not say whose freeze it ended: if another program thaws ours and freezes again within the
//! limit we thaw its freeze and do not notice, so whoever reads between freeze and thaw must also see that nothing was
//! written (the second take of the bitmap). If the helper is killed within the microsecond in which the kernel tells it
//! that a file system is frozen by somebody else, the guard thaws that: it cannot know. A file system whose disk hangs in
//! the thaw stays frozen until that ends; it keeps no other one frozen.

mod client;
mod clock;
mod error;
mod find;
mod found;
mod guard;
mod helper;
mod holding;
mod journal;
mod left_over;
mod mounts;
mod process;
mod session;
mod spread;
mod watch;
mod wire;

use std::time::Duration;

pub use client::{Freezer, Frozen, Helper, Options, Prepared, Thawed};
pub use error::{Broken, FreezeError};
pub use find::{devices_of, superblocks};
pub use found::{Found, NotFreezable, Superblock, Swap, WhyNot};
pub use left_over::{LeftOver, ThawedLeftOver, thaw_left_over};
pub use process::helper_main;

/// How long file systems may be frozen, if nothing else is said. Programs wait that long for their writes; arbitrary,
/// below what people notice.
pub const DEFAULT_LIMIT: Duration = Duration::from_millis(500);

/// How long after the helper's deadline the guard thaws, and as long again the agent: enough for a helper that is late
/// on a busy machine, arbitrary above that.
pub(crate) const SLACK: Duration = Duration::from_millis(250);
