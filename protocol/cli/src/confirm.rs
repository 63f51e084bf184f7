//! The question before a device that has content is overwritten.

use std::io::{IsTerminal, Write};

use backhaul_volume::target::{Refusal, TargetError};

use crate::output::Output;

/// If the error is about a device that has content and nobody confirmed, and somebody sits at a terminal: asks, and
/// gives what was typed, for the same attempt again. Nothing typed is a no.
pub async fn confirm(out: &Output, error: &TargetError) -> Option<String> {
    let TargetError::Refused { path, why: Refusal::Unconfirmed { type_this } } = error else { return None };
    if out.is_json() || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return None;
    }
    let question = format!("{} has content that would be overwritten. To do that, type {type_this}: ", path.display());
    // Off the async threads, so that an interrupt ends the waiting.
    let typed = tokio::task::spawn_blocking(move || {
        // Not locked while it waits: an interrupt is told there.
        let mut err = std::io::stderr();
        write!(err, "{question}").and_then(|()| err.flush()).ok()?;
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).ok()?;
        Some(line.trim().to_owned())
    });
    typed.await.ok().flatten().filter(|typed| !typed.is_empty())
}
