//! Work that blocks or computes for long: on threads of its own, or at once in a simulation, where everything happens
//! on one thread in an order that the seed decides.

/// Runs `work` where it keeps nobody waiting.
///
/// # Panics
/// If the work panics.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    if is_simulated() {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The runtime only cancels blocking work that has not begun, when it is shut down: then nobody waits here.
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

/// Whether this thread runs a simulation.
pub fn is_simulated() -> bool {
    #[cfg(feature = "testing")]
    return crate::world::is_simulated();
    #[cfg(not(feature = "testing"))]
    false
}
