//! Ids for new objects.
//!
//! Read first: [`IdSource`].

use backhaul_protocol::ids::{Generation, LogSeq};
use backhaul_protocol::store::key::ObjectId;

/// Where new objects of a session get their ids from.
#[derive(Clone, Copy, Debug)]
pub struct IdSource {
    next: ObjectId,
}

impl IdSource {
    /// For a session with this random tag.
    pub fn new(base: LogSeq, generation: Generation, session: u32) -> Self {
        Self { next: ObjectId { seq: base, generation, session: session.max(1), n: 0 } }
    }
    /// The next id.
    pub fn take(&mut self) -> ObjectId {
        let id = self.next;
        self.next.n += 1;
        id
    }
    /// The next id, which stays unused; the user says with [`Self::used_up_to`] how many it took.
    pub fn peek(&self) -> ObjectId {
        self.next
    }
    /// The first id that is still unused.
    pub fn used_up_to(&mut self, next: ObjectId) {
        self.next = next;
    }
}
