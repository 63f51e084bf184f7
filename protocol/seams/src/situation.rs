//! Situations inside the programs that tests must have reached often enough to prove anything: counted in simulations.

macro_rules! situations {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// A situation that can't be seen from outside.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Situation { $($(#[doc = $doc])* $name),* }
        impl Situation {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

situations! {
    /// The record was there already, and was our own.
    AppendedBefore,
    /// Another writer's record was first.
    AppendLost,
    /// The number had been deleted: this writer slept.
    BelowFloor,
    /// What was known of a group was not the newest any more.
    KnownHeadWasOld,
    /// An earlier session's segments were found again.
    DraftRecovered,
    /// Segments that were bound to another base were passed over.
    ForeignDraft,
    /// A draft became a delta map.
    DraftFolded,
    /// Loose segments of a point became a delta map.
    PointFolded,
    /// A base map was written anew.
    BaseWritten,
    /// The index of the newest point was damaged and left out.
    Mending,
    /// A small point lies inside its log record.
    InlinePoint,
    /// A session took a group over from an older one.
    TakenOver,
    /// A checkpoint was written.
    Checkpoint,
    /// The agent believed its index after comparing one digest.
    IndexTrusted,
    /// The agent asked for range digests.
    RangesCompared,
    /// The agent asked for the digests of a page.
    PageAsked,
    /// A commit whose answer was lost turned out to exist.
    PendingLanded,
    /// A commit whose answer was lost turned out not to exist.
    PendingLost,
    /// A store operation was tried again.
    StoreRetried,
    /// A conditional write failed because our own earlier try had succeeded.
    OwnWriteFound,
}

/// Counts a situation, in a simulation.
#[inline(always)]
pub fn reached(_situation: Situation) {
    #[cfg(feature = "testing")]
    crate::world::count(_situation);
}
