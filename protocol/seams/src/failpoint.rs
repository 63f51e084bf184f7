//! Failpoints: named places before and after every durable step, where a test makes the process die, the step fail, or
//! time pass.
//!
//! Read first: [`reach`]. A test build takes `BACKHAUL_FAILPOINT=NAME=ACTION[@N]`, where ACTION is `abort` (SIGKILL, as
//! kill -9), `error` or `delay:MILLISECONDS`, at the N-th time that the place is reached (from 1; every time without
//! it), and appends the name of every place that it reaches to the file `BACKHAUL_FAILPOINT_LOG`.

use std::io;

/// Does what a test wants done here; usually nothing. An error is to be treated as that of the step itself.
#[inline(always)]
pub fn reach(_name: &'static str) -> io::Result<()> {
    #[cfg(feature = "testing")]
    return armed::reach(_name);
    #[cfg(not(feature = "testing"))]
    Ok(())
}

#[cfg(feature = "testing")]
mod armed {
    use std::io::{self, Write};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    enum Action {
        Abort,
        Error,
        Delay(Duration),
    }

    struct Armed {
        name: String,
        action: Action,
        /// 0 is every time.
        at: u64,
        reached: AtomicU64,
    }

    fn armed() -> Option<&'static Armed> {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        ARMED.get_or_init(|| std::env::var("BACKHAUL_FAILPOINT").ok().map(|text| parse(&text))).as_ref()
    }

    /// A typing error in a test must not pass for a test that found nothing.
    fn parse(text: &str) -> Armed {
        try_parse(text).unwrap_or_else(|| panic!("BACKHAUL_FAILPOINT={text}: NAME=abort|error|delay:MILLISECONDS[@N]"))
    }

    fn try_parse(text: &str) -> Option<Armed> {
        let (name, action) = text.split_once('=')?;
        let (action, at) = action.split_once('@').unwrap_or((action, "0"));
        let action = match action.split_once(':') {
            None if action == "abort" => Action::Abort,
            None if action == "error" => Action::Error,
            Some(("delay", millis)) => Action::Delay(Duration::from_millis(millis.parse().ok()?)),
            _ => return None,
        };
        Some(Armed { name: name.to_owned(), action, at: at.parse().ok()?, reached: AtomicU64::new(0) })
    }

    pub(super) fn reach(name: &'static str) -> io::Result<()> {
        log(name);
        let Some(armed) = armed().filter(|a| a.name == name) else { return Ok(()) };
        let times = armed.reached.fetch_add(1, Ordering::Relaxed) + 1;
        if armed.at != 0 && armed.at != times {
            return Ok(());
        }
        match armed.action {
            Action::Abort => {
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                // The signal is delivered before the call returns to this thread; never here.
                std::process::abort()
            }
            Action::Error => Err(io::Error::other(format!("failpoint {name}"))),
            Action::Delay(time) => {
                std::thread::sleep(time);
                Ok(())
            }
        }
    }

    fn log(name: &str) {
        static LOG: OnceLock<Option<std::fs::File>> = OnceLock::new();
        let open = || {
            let path = std::env::var_os("BACKHAUL_FAILPOINT_LOG")?;
            std::fs::OpenOptions::new().create(true).append(true).open(path).ok()
        };
        if let Some(mut file) = LOG.get_or_init(open).as_ref() {
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
    }
}
