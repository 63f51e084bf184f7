//! Failpoints: named places after every durable step, where a test makes the process die, the step fail, or time pass.
//!
//! Read first: [`reach`]. A test build takes `BACKHAUL_FAILPOINT=NAME=ACTION`, several with commas between, where ACTION
//! is `abort` (SIGKILL, as kill -9), `error` or `delay:MILLISECONDS`. Each happens once in all processes that have the
//! same folder `BACKHAUL_FAILPOINT_ONCE`: the first that makes the file NAME there. Every process that has
//! `BACKHAUL_FAILPOINT_LOG` appends the name of every place that it reaches to that file.

use std::io;

/// Does what a test wants done here; usually nothing. An error is to be treated as that of the step before.
#[inline(always)]
pub fn reach<N: AsRef<str>>(_name: impl FnOnce() -> N) -> io::Result<()> {
    #[cfg(feature = "testing")]
    return armed::reach(_name().as_ref());
    #[cfg(not(feature = "testing"))]
    Ok(())
}

#[cfg(feature = "testing")]
mod armed {
    use std::io::{self, Write};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::time::Duration;

    #[derive(Clone, Copy)]
    enum Action {
        Abort,
        Error,
        Delay(Duration),
    }

    struct Armed {
        actions: Vec<(String, Action)>,
        once: PathBuf,
    }

    fn armed() -> Option<&'static Armed> {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        // A typing error in a test must not pass for a test that found nothing.
        let read = || {
            let text = std::env::var("BACKHAUL_FAILPOINT").ok()?;
            let once = std::env::var_os("BACKHAUL_FAILPOINT_ONCE").expect("BACKHAUL_FAILPOINT_ONCE=FOLDER").into();
            let action = |text| parse(text).unwrap_or_else(|| panic!("NAME=abort|error|delay:MILLISECONDS: {text}"));
            Some(Armed { actions: text.split(',').map(action).collect(), once })
        };
        ARMED.get_or_init(read).as_ref()
    }

    fn parse(text: &str) -> Option<(String, Action)> {
        let (name, action) = text.split_once('=')?;
        let action = match action.split_once(':') {
            None if action == "abort" => Action::Abort,
            None if action == "error" => Action::Error,
            Some(("delay", millis)) => Action::Delay(Duration::from_millis(millis.parse().ok()?)),
            _ => return None,
        };
        Some((name.to_owned(), action))
    }

    pub(super) fn reach(name: &str) -> io::Result<()> {
        log(name);
        let Some(armed) = armed() else { return Ok(()) };
        let Some((_, action)) = armed.actions.iter().find(|(armed, _)| armed == name) else { return Ok(()) };
        if std::fs::File::create_new(armed.once.join(name)).is_err() {
            return Ok(());
        }
        match action {
            Action::Abort => {
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                // The signal is delivered before the call returns to this thread; never here.
                std::process::abort()
            }
            Action::Error => Err(io::Error::other(format!("failpoint {name}"))),
            Action::Delay(time) => {
                std::thread::sleep(*time);
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
