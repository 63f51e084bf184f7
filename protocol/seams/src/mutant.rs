//! Planted mistakes: each is one that a storage system could really have. A simulation switches one on, for its own
//! thread, and must find it.
//!
//! A place in product code asks [`planted`]; without the feature `testing` the answer is `false` at compile time.

macro_rules! mutants {
    (
        histories { $($(#[doc = $doc:literal])* $name:ident),* $(,)? }
        sessions { $($(#[doc = $of_session:literal])* $session:ident),* $(,)? }
    ) => {
        /// A mistake.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Mutant { $($(#[doc = $doc])* $name,)* $($(#[doc = $of_session])* $session),* }
        impl Mutant {
            /// Those that histories without QUIC find.
            pub const IN_HISTORIES: &'static [Self] = &[$(Self::$name),*];
            /// Those that sessions of real QUIC find.
            pub const IN_SESSIONS: &'static [Self] = &[Self::CommittedBeforeRecord, $(Self::$session),*];
        }
        impl std::str::FromStr for Mutant {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                let found = Self::IN_HISTORIES.iter().chain(Self::IN_SESSIONS).find(|m| format!("{m:?}") == text);
                found.copied().ok_or_else(|| format!("no mutant {text}"))
            }
        }
    };
}

mutants! {
    histories {
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
        /// The watch over a volume begins when that over the volume before has ended.
        WatchedOneByOne,
        /// A task that nobody waits for panics.
        PanicsUnheard,
    }
    sessions {
        /// A connection to a peer that is gone never ends.
        NoIdleTimeout,
        /// Nothing is said on a connection that has nothing to say.
        NoKeepAlive,
        /// A receiver that was started again can't tell agents so.
        ResetKeyMadeAnew,
        /// An agent leaves it to QUIC to try again.
        OneAttemptToConnect,
        /// An agent waits for the greeting for ever.
        GreetingWaitedFor,
        /// An agent waits for an answer for ever.
        AnswerWaitedFor,
        /// A receiver waits for a greeting for ever.
        HelloWaitedFor,
        /// An agent does not hear that its receiver waits.
        WaitingNotHeard,
        /// An agent takes a receiver that waits for one that broke off.
        WaitingIsABreak,
        /// A receiver that works for long does not say so.
        WaitingNotSaid,
        /// What arrived before a session broke is forgotten.
        DraftForgotten,
        /// The place of a session that broke stays taken.
        PlaceKept,
        /// The credit of a session that broke is never given back.
        CreditKept,
        /// The memory of records that nobody collects any more is never given back.
        MemoryKept,
        /// A refusal is a closed connection and nothing else.
        RefusalNotSaid,
        /// The connection is closed before a refusal can have arrived.
        RefusalCutOff,
        /// Who may not write is told to come again.
        RefusalOfAnotherKind,
        /// The older session of a group does not hear that there is a newer one.
        OlderNotTold,
        /// A session that opens does not hear of a newer one.
        HolderNotTold,
        /// Two sessions of one group do not know of each other.
        GroupsNotShared,
        /// A session whose agent is gone waits for the store all the same.
        GoneNotNoticed,
        /// A revoked agent may stay where it is.
        RevokedStays,
        /// A receiver that shuts down lets nobody finish.
        ShutdownWaitsForNobody,
        /// A stream's task is left behind when its session ends.
        TaskLeftBehind,
    }
}

/// Whether this mistake is to be made.
#[inline(always)]
pub fn planted(_mutant: Mutant) -> bool {
    #[cfg(feature = "testing")]
    return crate::world::has(_mutant);
    #[cfg(not(feature = "testing"))]
    false
}
