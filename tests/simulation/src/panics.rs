//! Panics on the thread of a history, wherever they happen: in a session, in a task that nobody waits for, in work that
//! would have a thread of its own. Each is a violation (I19); to the rest of the world it may look like a lost
//! connection, and heal.
//!
//! Read first: [`hear`].

use std::cell::RefCell;
use std::sync::Once;

use backhaul_seams::threads;

thread_local! {
    static HEARD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Hears every panic on this thread from now on.
pub fn hear() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            // Nothing is said of a thread that ends.
            let _ = HEARD.try_with(|heard| heard.borrow_mut().push(panic.to_string()));
            // In a history it is told as a violation.
            if !threads::is_simulated() {
                before(panic);
            }
        }));
    });
    heard();
}

/// What was heard since.
pub fn heard() -> Vec<String> {
    HEARD.take()
}
