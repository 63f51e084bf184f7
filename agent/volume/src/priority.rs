//! How a thread ranks among those that read and write disks.
//!
//! Read first: [`of_this_thread`]. Schedulers that know no ranks (`none`) pass over it.

use std::io;

use crate::sys;

/// A class of `ioprio_set(2)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoClass {
    /// As the process.
    #[default]
    Unchanged,
    /// Best effort, after all others in that class.
    BestEffort,
    /// Only when nobody else wants the disk.
    Idle,
}

/// IOPRIO_CLASS_BE, IOPRIO_CLASS_IDLE: <linux/ioprio.h>.
const BEST_EFFORT: i32 = 2;
const IDLE: i32 = 3;
/// IOPRIO_CLASS_SHIFT.
const SHIFT: i32 = 13;
/// The last of eight.
const LOWEST: i32 = 7;

impl IoClass {
    fn code(self) -> Option<i32> {
        match self {
            Self::Unchanged => None,
            Self::BestEffort => Some((BEST_EFFORT << SHIFT) | LOWEST),
            Self::Idle => Some((IDLE << SHIFT) | LOWEST),
        }
    }
}

/// Sets the class of the calling thread.
pub fn of_this_thread(class: IoClass) -> io::Result<()> {
    class.code().map_or(Ok(()), sys::set_io_priority)
}

/// The class of the calling thread; what is none of ours is unchanged.
pub fn class_of_this_thread() -> IoClass {
    let code = sys::io_priority().ok();
    let ours = [IoClass::BestEffort, IoClass::Idle];
    ours.into_iter().find(|c| c.code() == code).unwrap_or_default()
}
