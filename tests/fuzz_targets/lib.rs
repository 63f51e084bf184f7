//! What is fuzzed: every decoder and both session machines, each a function of bytes that panics when something that
//! must hold does not (I19; what was read is written and read again the same).
//!
//! Read [`TARGETS`]. The same functions run in `tests/fuzz.rs` (kept corpora and seeded mutation, stable compiler) and in
//! `tests/fuzz` (libFuzzer, guided by coverage).

mod objects;
#[cfg(feature = "programs")]
mod programs;
mod sessions;
mod text;
mod wire;

/// Something that takes any bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// The name of its corpus.
    pub name: &'static str,
    /// Panics when something does not hold.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "message", run: wire::message },
    Target { name: "hello", run: wire::hello },
    Target { name: "records", run: wire::records },
    Target { name: "log_record", run: objects::log_record },
    Target { name: "checkpoint", run: objects::checkpoint },
    Target { name: "map", run: objects::map },
    Target { name: "segment", run: objects::segment },
    Target { name: "fleet", run: objects::fleet },
    Target { name: "envelope", run: objects::envelope },
    Target { name: "names", run: text::names },
    Target { name: "token", run: text::token },
    Target { name: "source", run: sessions::source },
    Target { name: "sink", run: sessions::sink },
    #[cfg(feature = "programs")]
    Target { name: "arguments", run: programs::arguments },
    #[cfg(feature = "programs")]
    Target { name: "settings", run: programs::settings },
    #[cfg(feature = "programs")]
    Target { name: "store_url", run: programs::store_url },
];

/// The target of this name.
///
/// # Panics
/// If there is none.
pub fn target(name: &str) -> Target {
    *TARGETS.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no target {name}"))
}

/// Takes a decision out of the input, from its front.
pub(crate) struct Choices<'a>(pub(crate) &'a [u8]);

impl<'a> Choices<'a> {
    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.bytes(8);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
