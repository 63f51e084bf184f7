//! Where the counts of one set of programs end and those of the next begin.
//!
//! Read first: [`move_bases`] and [`crate::witness`].

use std::sync::atomic::Ordering::SeqCst;

use crate::device::Kind;
use crate::layout::{self, slot, table};
use crate::programs::Programs;
use crate::sys::Shared;
use crate::witness::{Verdict, Witness};

/// Has new programs' counts begin where the old ones' are, with all that these lost.
pub(crate) fn move_bases(shared: &Shared, (old, old_bank): (&Programs, usize), (new, new_bank): (&Programs, usize)) {
    for at in 0..layout::VOLUMES {
        let disk = shared.half(table::DEV + at).load(SeqCst);
        let is_bios = shared.word(table::SLOTS + at * slot::WORDS + slot::KIND).load(SeqCst) == 1;
        let kind = if is_bios { Kind::Bios } else { Kind::Requests };
        if disk == 0 {
            continue;
        }
        // A disk that is gone is another when it comes again.
        let Some(witness) = layout::dev(disk).and_then(|dev| Witness::of(dev, kind)) else { continue };
        let Some(base) = witness.base(|| new.seen(at)) else { continue };
        let old_base = shared.word(table::BASES[old_bank] + at).load(SeqCst);
        // Asked after the new base was taken: what is lost between counts twice rather than not at all.
        let lost = match (witness.judge(old_base, || old.seen(at)), witness.glance(old_base, || old.seen(at))) {
            (Verdict::Unseen(sectors), _) | (Verdict::Busy, Verdict::Unseen(sectors)) => sectors,
            (Verdict::Uncounted(sectors), _) => sectors.wrapping_neg(),
            _ => 0,
        };
        shared.word(table::BASES[new_bank] + at).store(base.wrapping_add(lost), SeqCst);
    }
}
