//! Planted mistakes: each is one that a storage system could really have. A simulation switches one on, for its own
//! thread, and must find it.
//!
//! A place in product code asks [`planted`]; without the feature `testing` the answer is `false` at compile time.

macro_rules! mutants {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// A mistake.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Mutant { $($(#[doc = $doc])* $name),* }
        impl Mutant {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
        impl std::str::FromStr for Mutant {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let found = Self::ALL.iter().find(|m| format!("{m:?}") == text);
                found.copied().ok_or_else(|| format!("no mutant {text}"))
            }
        }
    };
}

mutants! {
    /// A commit that was built on an older record is put behind the newest one.
    NoBaseCheck,
    /// A log record replaces one that is there.
    NoConditionalPut,
    /// The agent hears of a point before its record is in the store.
    CommittedBeforeRecord,
    /// A writer that slept does not look whether its number was deleted meanwhile.
    FloorNotRead,
    /// The agent believes its index without comparing.
    IndexAdoptedUnseen,
    /// Of two records of one block the one that was found first counts.
    CaptureNumbersIgnored,
    /// Captures of a session begin where the base's end, and not the draft's.
    CapturesStartAgain,
    /// What was sent for another base is taken for the draft.
    DraftOfAnotherBase,
    /// The agent takes pages that a draft touches for what the index has.
    DraftPagesNotAsked,
    /// Any nonce will do.
    NonceNotChecked,
    /// Any machine will do.
    MachineNotChecked,
    /// An agent that saw a later point is not told that the store was rolled back.
    HighWaterIgnored,
    /// Somebody else's record under the number counts as a success.
    TheirsTakenForOurs,
    /// Blocks that became zero are not sent.
    ZeroesNotSent,
    /// A commit is asked for before the agent has written down that it will be.
    PendingNotWritten,
    /// The nonce of a commit that landed after all is not taken.
    LandedCommitForgotten,
    /// A volume that moved while it was read is called crash-consistent.
    FuzzyCalledCrash,
    /// A volume that is added takes the slot of one that was dropped.
    SlotUsedAgain,
    /// What arrived is not compared with what the agent states, and some records do not arrive.
    DigestsNotCompared,
    /// Folding drops zeroes from a delta map, although something lies below it.
    FoldForgetsZeroes,
    /// A new base map forgets what the delta maps say of one page.
    FoldForgetsPage,
    /// A failed write of a segment counts as done.
    SegmentFailureIgnored,
    /// Adopting does not begin a new generation, and the nonce stays.
    AdoptKeepsNonce,
}

/// Whether this mistake is to be made.
#[inline(always)]
pub fn planted(_mutant: Mutant) -> bool {
    #[cfg(feature = "testing")]
    return crate::world::has(_mutant);
    #[cfg(not(feature = "testing"))]
    false
}
