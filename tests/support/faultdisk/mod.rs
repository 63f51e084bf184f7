//! Disks that fail on demand: a block device (loop over FUSE) that logs every write and flush, and does what real disks
//! do on bad days.
//!
//! Read first: [`FaultDisk`]; then [`Rule`] for what can go wrong and [`log`] for power losses. The program that serves
//! them is `tests/faultdisk/main.rs`: a process of its own, so that a test that is killed takes the disk with it and
//! nobody waits for it in the kernel for ever.

pub mod disk;
pub mod log;
mod order;
pub mod replica;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

pub use log::{Crash, Kept, WriteLog};
pub use order::{Effect, Op, Order, Rule, Told};
pub use replica::{FileSystem, Mounted, Replica};

use crate::Loop;
use crate::process::program;

/// A disk that fails on demand. Detached, unmounted and ended when dropped; what lies on it must be unmounted before.
pub struct FaultDisk {
    device: Option<Loop>,
    child: std::process::Child,
    talk: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    log: PathBuf,
    folder: PathBuf,
}

impl FaultDisk {
    /// A disk of zeroes. Its log and its mount point lie in `folder`.
    pub fn new(folder: &Path, name: &str, size: u64) -> Self {
        let (at, log) = (folder.join(format!("{name}.fuse")), folder.join(format!("{name}.log")));
        std::fs::create_dir_all(&at).expect("a folder can be made");
        let mut command = Command::new(program("faultdisk"));
        command.arg(&at).arg(size.to_string()).arg(&log).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the fault disk starts");
        let orders = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        answers.read_line(&mut line).expect("it says when it is mounted");
        assert_eq!(line, "ready\n", "the fault disk can be mounted");
        let device = Loop::attach(&at.join("disk"));
        Self { device: Some(device), child, talk: Mutex::new(Some((orders, answers))), log, folder: at }
    }

    /// The block device.
    pub fn path(&self) -> &Path {
        self.device.as_ref().expect("attached until dropped").path()
    }

    /// Gives an order.
    pub fn order(&self, order: &Order) -> Told {
        let mut talk = self.talk.lock().expect("no order panics");
        let (orders, answers) = talk.as_mut().expect("open until dropped");
        let line = serde_json::to_string(order).expect("an order is JSON");
        writeln!(orders, "{line}").and_then(|()| orders.flush()).expect("the fault disk listens");
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("the fault disk answers");
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer:?}"))
    }

    /// How it is doing.
    pub fn told(&self) -> Told {
        self.order(&Order::Tell)
    }

    /// Where in its log it is.
    pub fn position(&self) -> u64 {
        self.told().position
    }

    /// From now on this goes wrong.
    pub fn fault(&self, rule: Rule) {
        self.order(&Order::Fault(rule));
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.order(&Order::Heal);
    }

    /// What happened so far.
    pub fn log(&self) -> WriteLog {
        self.told();
        WriteLog::read(&self.log)
    }

    /// Takes the device away and attaches it anew: nothing of it is in any cache of the kernel's.
    pub fn reattach(&mut self) {
        let disk = self.folder.join("disk");
        self.device = None;
        self.device = Some(Loop::attach(&disk));
    }
}

impl Drop for FaultDisk {
    fn drop(&mut self) {
        self.device = None;
        // It unmounts itself when nobody talks to it any more.
        if let Ok(mut talk) = self.talk.lock() {
            *talk = None;
        }
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}
