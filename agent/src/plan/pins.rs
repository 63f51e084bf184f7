//! A tracker in the kernel that is there while we look, beside the one of a service that may run.
//!
//! Read first: [`Pins::open`]. What is pinned outlives a process that is killed, so every pin folder is locked by who
//! uses it: one that is not is left over, and removed at the next start.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use backhaul_hints::{Options, Tracker};
use backhaul_seams::random;
use rustix::fs::FlockOperation;

/// Where all of them are: not where services have theirs.
const ROOT: &str = "/sys/fs/bpf/backhaul-plan";
/// Somebody else may take a folder for left over before it is locked.
const TRIES: usize = 3;

/// A tracker whose pins go with it.
#[derive(Debug)]
pub struct Pins {
    tracker: Option<Tracker>,
    root: PathBuf,
    _lock: File,
}

impl Pins {
    /// Removes what others left and begins. `Err` says why writes can't be tracked here.
    pub fn open() -> Result<Self, String> {
        Self::open_at(Path::new(ROOT))
    }

    fn open_at(root: &Path) -> Result<Self, String> {
        // There may be none, and it may be in no BPF file system yet: the tracker sees to that.
        let _ = remove_left_over(root);
        let mut last = String::new();
        for _ in 0..TRIES {
            let options = Options { pin: root.to_owned(), owner: random::id() };
            let tracker = match Tracker::open(&options) {
                Ok(tracker) => tracker,
                Err(error) if is_hopeless(&error) => return Err(error.to_string()),
                Err(error) => {
                    last = error.to_string();
                    continue;
                }
            };
            let folder = root.join(options.owner.iter().map(|b| format!("{b:02x}")).collect::<String>());
            match lock(&folder, FlockOperation::LockExclusive) {
                Ok(lock) if folder.join("table").exists() => {
                    return Ok(Self { tracker: Some(tracker), root: root.to_owned(), _lock: lock });
                }
                Ok(_) => last = "somebody removed what was pinned".into(),
                Err(error) => {
                    last = format!("cannot lock {}: {error}", folder.display());
                    let _ = tracker.remove();
                }
            }
        }
        Err(last)
    }

    /// What tracks.
    pub fn tracker(&self) -> &Tracker {
        self.tracker.as_ref().expect("there until this is dropped")
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.tracker.take().map(Tracker::remove) {
            tracing::warn!(%error, "could not remove what was pinned to look; the next `plan` does");
        }
        // The last one to go: fails while others look.
        let _ = fs::remove_dir(&self.root);
    }
}

/// Whether trying again is of no use.
fn is_hopeless(error: &backhaul_hints::Unavailable) -> bool {
    !matches!(error, backhaul_hints::Unavailable::Io { .. })
}

fn lock(folder: &Path, how: FlockOperation) -> io::Result<File> {
    let file = File::open(folder)?;
    rustix::fs::flock(&file, how)?;
    Ok(file)
}

/// Removes folders that nobody has locked.
fn remove_left_over(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        if let Ok(_lock) = lock(&path, FlockOperation::NonBlockingLockExclusive) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
