//! How much memory a process has while something goes on. Read [`Sampler`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// Bytes of memory that a process has; 0 if it is gone.
pub fn resident(pid: Pid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap_or("VmRSS: 0 kB");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Looks at the memory of a process until it is dropped.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<(Duration, u64)>>>,
}

impl Sampler {
    /// Looks every 50 ms.
    pub fn start(pid: Pid) -> Self {
        let sampler = Self { stop: Arc::default(), seen: Arc::default() };
        let (stop, seen, begun) = (sampler.stop.clone(), sampler.seen.clone(), Instant::now());
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                seen.lock().expect("nobody panics with it").push((begun.elapsed(), resident(pid)));
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        sampler
    }

    /// When, and how many bytes.
    pub fn seen(&self) -> Vec<(Duration, u64)> {
        self.seen.lock().expect("nobody panics with it").clone()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
