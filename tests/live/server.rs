//! A server with file systems on loop devices, an agent that protects them, and a receiver.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backhaul_tests::device::{Loop, Mount};
use backhaul_tests::fixture::Serving;
use backhaul_tests::process::{Child, tool, until};
use backhaul_tests::{Agent, Fixture};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// XFS and btrfs refuse smaller ones.
const SIZE: u64 = 320 * MIB;
pub const PROMPT: Duration = Duration::from_secs(60);

/// A type of file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    fn make(self, device: &Path) {
        let device = device.to_str().expect("UTF-8");
        match self {
            Self::Ext4 => tool("mkfs.ext4", ["-q", "-F", device]),
            Self::Xfs => tool("mkfs.xfs", ["-q", "-f", device]),
            Self::Btrfs => tool("mkfs.btrfs", ["-q", "-f", device]),
        };
    }

    /// After its journal was replayed. Panics with what it says if something is wrong.
    pub fn check(self, device: &Path) {
        let device = device.to_str().expect("UTF-8");
        match self {
            Self::Ext4 => tool("e2fsck", ["-f", "-n", device]),
            Self::Xfs => tool("xfs_repair", ["-n", device]),
            Self::Btrfs => tool("btrfs", ["check", "--readonly", device]),
        };
    }
}

pub struct Disk {
    pub mount: Option<Mount>,
    pub device: Loop,
}

/// Volumes `a` and `b`, mounted.
pub struct Server {
    pub disks: Vec<Disk>,
    pub agent: Agent,
    _serving: Serving,
    pub fixture: Fixture,
}

impl Server {
    pub fn new(kind: Kind, volumes: usize) -> Self {
        let fixture = Fixture::new();
        let serving = fixture.serve();
        let agent = fixture.joined("agent", &serving);
        let mut disks = Vec::new();
        for name in ["a", "b"].into_iter().take(volumes) {
            let device = Loop::new(&fixture.path(&format!("{name}.img")), SIZE);
            kind.make(device.path());
            let mount = Some(Mount::new(device.path(), &fixture.path(&format!("mnt-{name}"))));
            agent.protect(name, device.path());
            disks.push(Disk { mount, device });
        }
        Self { disks, agent, _serving: serving, fixture }
    }

    pub fn mounted(&self, disk: usize) -> PathBuf {
        self.disks[disk].mount.as_ref().expect("it is mounted").path().to_owned()
    }

    /// Runs the service.
    pub fn run(&self) -> Child {
        self.agent.start(&["run", "--every", "1s"])
    }

    pub fn status(&self) -> Value {
        self.agent.run(&["status"]).ok()
    }

    /// Waits for a point of all that is written by now.
    pub fn wait_for_point(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as i64;
        let reached = || {
            let status = self.status();
            status["consistency"] == "crash" && status["protected_until_ms"].as_i64().is_some_and(|at| at > now)
        };
        until("a point of what is there now", PROMPT, reached);
    }

    /// Restores a volume as it was at a point, to a file.
    pub fn restored(&self, volume: &str, point: u64) -> PathBuf {
        let to = self.fixture.path(&format!("restored-{volume}"));
        let _ = std::fs::remove_file(&to);
        let what = format!("{}/{volume}@{point}", backhaul_tests::fixture::GROUP);
        self.fixture.receiver(&["restore", &what, "--to", to.to_str().expect("UTF-8")]).ok();
        to
    }

    /// Nothing is mounted any more: what is restored can be, though it is the same file system.
    pub fn unmount(&mut self) {
        for disk in &mut self.disks {
            if let Some(mount) = disk.mount.take() {
                tool("umount", [mount.path()]);
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ends what is pinned.
        for name in ["a", "b"].into_iter().take(self.disks.len()) {
            let _ = self.agent.command(&["unprotect", name]).output();
        }
    }
}

/// A write to a file system that is frozen does not end: this must, soon.
pub fn assert_not_frozen(mounted: &Path) {
    let probe = mounted.join("probe");
    let script = format!("echo x > {0} && sync {0}", probe.display());
    let begun = std::time::Instant::now();
    let ended = Command::new("timeout").args(["20", "sh", "-c", &script]).status().expect("sh runs");
    assert!(ended.success(), "{}: a write did not end in 20 s", mounted.display());
    assert!(begun.elapsed() < Duration::from_secs(5), "{}: frozen for {:?}", mounted.display(), begun.elapsed());
}
