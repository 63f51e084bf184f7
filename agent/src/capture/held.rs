//! A volume that a provider opened before it was asked for, and can close whoever still holds it.
//!
//! Read first: [`Held`]. A snapshot can't be removed while it is open, and threads of a round that was given up hold it
//! for as long as they like.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backhaul_protocol::geometry::ByteOffset;
use backhaul_volume::stability::Stability;
use backhaul_volume::sysfs::Dev;
use backhaul_volume::{Source, Volume, VolumeError};

use super::{Capture, Watching};

/// How long reads that are under way are waited for; a disk that takes longer keeps the snapshot open. Arbitrary.
const LAST_READS: Duration = Duration::from_secs(5);
/// How often room is looked at while a clone is read. Arbitrary: a disk fills up by some GiB in it.
const ROOM_EVERY: Duration = Duration::from_secs(1);

/// What it is to the volume.
pub(crate) enum Role {
    /// The volume itself.
    Itself,
    /// A clone of it, which is given up when less than so many bytes are free.
    Clone(u64),
    /// What somebody said to read.
    StandIn,
}

/// An open volume.
pub(crate) struct Held {
    source: Mutex<Option<Arc<Source>>>,
    watch: Mutex<Option<Box<dyn Watching>>>,
    role: Role,
    length: u64,
    text: String,
    path: std::path::PathBuf,
    begun: Instant,
    /// When room was last looked at, milliseconds since `begun`.
    looked: AtomicU64,
    /// For people, with what the watch can't see.
    notes: Vec<String>,
}

impl Held {
    /// Holds it, and the watch over it if one began already.
    pub(crate) fn new(source: Source, role: Role, watch: Option<Box<dyn Watching>>, notes: Vec<String>) -> Self {
        let what = match role {
            Role::Itself | Role::StandIn => String::new(),
            Role::Clone(_) => "clone of ".to_owned(),
        };
        Self {
            role,
            length: source.length(),
            text: what + &source.describe(),
            path: source.path().to_owned(),
            source: Mutex::new(Some(Arc::new(source))),
            watch: Mutex::new(watch),
            begun: Instant::now(),
            looked: AtomicU64::new(0),
            notes,
        }
    }

    /// Closes it: whoever reads from now on fails.
    pub(crate) fn close(&self) {
        drop(lock(&self.watch).take());
        let Some(source) = lock(&self.source).take() else { return };
        let begun = Instant::now();
        while Arc::strong_count(&source) > 1 && begun.elapsed() < LAST_READS {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn source(&self) -> Result<Arc<Source>, VolumeError> {
        let closed = || VolumeError::Changed { path: self.path.clone(), what: "the round that read it is over".into() };
        lock(&self.source).clone().ok_or_else(closed)
    }

    fn check_room(&self, source: &Source) -> Result<(), VolumeError> {
        let Role::Clone(floor) = self.role else { return Ok(()) };
        let now = self.begun.elapsed().as_millis() as u64;
        if now < self.looked.load(Ordering::Relaxed) + ROOM_EVERY.as_millis() as u64 {
            return Ok(());
        }
        self.looked.store(now, Ordering::Relaxed);
        match source.room()? {
            Some(room) if room.free < floor => {
                let what = format!("its clone is given up, only {} bytes are free where it lies", room.free);
                Err(VolumeError::Changed { path: self.path.clone(), what })
            }
            _ => Ok(()),
        }
    }
}

impl Volume for Held {
    fn length(&self) -> u64 {
        self.length
    }
    fn read_at(&self, at: ByteOffset, buf: &mut [u8]) -> Result<(), VolumeError> {
        let source = self.source()?;
        self.check_room(&source)?;
        source.read_at(at, buf)
    }
    fn next_data(&self, from: ByteOffset) -> Result<Option<Range<u64>>, VolumeError> {
        self.source()?.next_data(from)
    }
    fn describe(&self) -> String {
        self.text.clone()
    }
}

impl Capture for Held {
    fn watch(&self) -> Box<dyn Watching> {
        let begun = lock(&self.watch).take();
        let watch = begun.or_else(|| Some(Capture::watch(&*self.source().ok()?)));
        Box::new(HeldWatch::new(watch, &self.notes))
    }
    fn recheck(&self) -> Result<(), VolumeError> {
        self.source()?.recheck()
    }
    fn read_len(&self) -> usize {
        self.source().map_or(backhaul_volume::scan::FILE_READ, |s| s.read_len())
    }
    fn device(&self) -> Option<Dev> {
        match self.role {
            Role::Itself => self.source().ok()?.device(),
            Role::Clone(_) | Role::StandIn => None,
        }
    }
    fn stands_in(&self) -> bool {
        matches!(self.role, Role::StandIn)
    }
}

/// A watch with more to say.
struct HeldWatch {
    /// `None` of a volume that was closed.
    watch: Option<Box<dyn Watching>>,
    caveats: Vec<String>,
}

impl HeldWatch {
    fn new(watch: Option<Box<dyn Watching>>, notes: &[String]) -> Self {
        let seen = watch.as_ref().map_or(&[][..], |w| w.caveats());
        let caveats = notes.iter().chain(seen).cloned().collect();
        Self { watch, caveats }
    }
}

impl Watching for HeldWatch {
    fn has_moved(&self) -> bool {
        self.watch.as_ref().is_none_or(|w| w.has_moved())
    }
    fn caveats(&self) -> &[String] {
        &self.caveats
    }
    fn finish(self: Box<Self>) -> Stability {
        self.watch.map_or_else(|| Stability::Moved("it was closed".into()), |w| w.finish())
    }
}

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
