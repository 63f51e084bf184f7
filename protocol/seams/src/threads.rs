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
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shut down, and cancels what has not begun. Whoever waits here ends with it.
            Err(_cancelled) => std::future::pending().await,
        },
    }
}

/// Whether this thread runs a simulation.
pub fn is_simulated() -> bool {
    #[cfg(feature = "testing")]
    return crate::world::is_simulated();
    #[cfg(not(feature = "testing"))]
    false
}
