//! Who is there beside the commands of a story: a receiver that is started again when it dies, and somebody who looks on.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use backhaul_tests::Fixture;
use backhaul_tests::fixture::Serving;
use rustix::process::Signal;

/// Somebody who lists and verifies all the time, and never sees anything wrong.
pub struct Onlooker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Onlooker {
    pub fn start(f: &Fixture) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let store = f.store_url().to_owned();
        let state = f.receiver_state().to_owned();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for what in ["points", "verify", "agents"] {
                    let mut command = Command::new(backhaul_tests::process::program("backhaul-receiver"));
                    command.args([what, "--json", "--store", &store, "--state"]).arg(&state);
                    let ran = backhaul_tests::process::run(command, None);
                    assert_eq!(ran.code, Some(0), "somebody who looks on sees something wrong: {ran:#?}");
                }
            }
        });
        Self { stop, thread }
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// The receiver that is there now.
#[derive(Clone)]
pub struct Current(Arc<Mutex<Option<Serving>>>);

impl Current {
    /// kill -9; says whether there was one.
    pub fn kill(&self) -> bool {
        let serving = self.0.lock().expect("not poisoned");
        serving.as_ref().map(|s| s.child.signal(Signal::KILL)).is_some()
    }
}

/// A receiver that is started again when it dies.
pub struct Supervised {
    stop: Arc<AtomicBool>,
    pub current: Current,
    thread: JoinHandle<()>,
}

impl Supervised {
    pub fn start((command, err): (Box<dyn Fn() -> Command + Send>, PathBuf)) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let current = Current(Arc::default());
        let (ended, shown) = (stop.clone(), current.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let serving = Serving::start(command(), &err);
                *shown.0.lock().expect("not poisoned") = Some(serving);
                let _ = ready.send(());
                loop {
                    std::thread::sleep(Duration::from_millis(10));
                    let mut serving = shown.0.lock().expect("not poisoned");
                    let child = &mut serving.as_mut().expect("only taken when it has ended").child;
                    if !child.is_running() {
                        let err = child.err();
                        assert!(!err.contains("panicked"), "{err}");
                        *serving = None;
                        break;
                    }
                    if ended.load(Ordering::Relaxed) {
                        break;
                    }
                }
            }
        });
        is_ready.recv().expect("it starts");
        Self { stop, current, thread }
    }

    /// It must end well when it is asked to.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
        if let Some(serving) = self.current.0.lock().expect("not poisoned").take() {
            serving.stop();
        }
    }
}
