//! Devices to write to and pins to remove: each test has its own, given back when dropped. Needs root and bpffs.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use backhaul_hints::{Baseline, Blocks, Options, Start, Subject, Tracked, Tracker};
use backhaul_volume::sysfs::Dev;

pub const BLOCK: u32 = 64 << 10;
pub const EPOCH: [u8; 16] = [7; 16];

/// Whether this test can run here. Where not it says so loudly, and fails if `BACKHAUL_REQUIRE_ALL` is 1.
#[track_caller]
pub fn needs_root(test: &str) -> bool {
    let missing = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/dev/loop-control").exists() {
        "needs loop devices"
    } else if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        "needs a kernel with BTF"
    } else {
        return true;
    };
    skipped(test, missing)
}

/// Runs a test that needs root. Runs it again where it says nothing: when the kernel lost an event and said so
/// ([`backhaul_hints::Doubt::Unseen`]: some virtual machines' kernels do), and when somebody else took the loop device
/// that was to get another image.
#[track_caller]
pub fn root_test(name: &str, test: impl Fn()) {
    if !needs_root(name) {
        return;
    }
    for _ in 0..4 {
        let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&test)) else { return };
        let text = panic.downcast_ref::<String>().map_or("", String::as_str);
        if text.contains("losetup") && text.contains("busy") {
            continue;
        }
        // What was found, not what was expected: a loss that was not noticed must fail.
        let found = text.lines().find(|l| l.trim_start().starts_with("left:")).unwrap_or(text);
        if !found.contains("Unseen") {
            std::panic::resume_unwind(panic);
        }
        println!("AGAIN: the kernel lost an event in {name}, and it was noticed: {text}");
        eprintln!("AGAIN: the kernel lost an event in {name}, and it was noticed: {text}");
    }
    panic!("{name}: this kernel loses too many events");
}

#[track_caller]
pub fn skipped(test: &str, missing: &str) -> bool {
    assert!(std::env::var("BACKHAUL_REQUIRE_ALL").as_deref() != Ok("1"), "{test} {missing}, and must not be skipped");
    println!("SKIPPED: {test} {missing}");
    eprintln!("SKIPPED: {test} {missing}");
    false
}

/// Runs a tool and gives what it says.
#[track_caller]
pub fn tool<const N: usize>(name: &str, args: [&str; N]) -> String {
    let out = Command::new(name).args(args).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A folder for pins that no other test has.
pub struct Pins(pub Options);

impl Pins {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let pin = PathBuf::from(format!("/sys/fs/bpf/backhaul-test-{}-{n}", std::process::id()));
        Self(Options { pin, owner: [9; 16] })
    }

    /// One that a process before made, and removes.
    pub fn at(pin: &Path) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self(Options { pin: pin.to_owned(), owner: [9; 16] }))
    }

    pub fn open(&self) -> Tracker {
        Tracker::open(&self.0).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The agent's folder.
    pub fn folder(&self) -> PathBuf {
        self.0.pin.join("09".repeat(16))
    }

    pub fn volume(&self, id: u8) -> PathBuf {
        self.folder().join(format!("volume-{}", format!("{id:02x}").repeat(16)))
    }

    pub fn set(&self) -> PathBuf {
        let entries = fs::read_dir(self.folder()).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("set-")).last().unwrap()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0.pin);
    }
}

/// A loop device over a sparse file.
pub struct Loop {
    pub path: PathBuf,
    pub file: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

impl Loop {
    pub fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        File::create(&file).unwrap().set_len(size).unwrap();
        let path = tool("losetup", ["--find", "--show", file.to_str().unwrap()]).into();
        Self { path, file, _dir: Some(dir) }
    }

    /// Has another image under the same name.
    pub fn swap(&self, image: &Path) {
        let path = self.path.to_str().unwrap();
        tool("losetup", ["-d", path]);
        tool("losetup", [path, image.to_str().unwrap()]);
    }

    /// Partitions from these sectors on with these lengths, as the kernel knows them; no table is written.
    pub fn partition(&self, parts: &[(u64, u64)]) -> Vec<PathBuf> {
        let disk = self.path.to_str().unwrap();
        let add = |(n, (start, size)): (usize, &(u64, u64))| {
            tool("addpart", [disk, &n.to_string(), &start.to_string(), &size.to_string()]);
            PathBuf::from(format!("{disk}p{n}"))
        };
        (1..).zip(parts).map(add).collect()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let path = self.path.to_str().unwrap();
        let _ = Command::new("partx").args(["-d", path]).stderr(Stdio::null()).status();
        let _ = Command::new("losetup").args(["-d", path]).stderr(Stdio::null()).status();
    }
}

/// A compressed disk in memory: a device without requests.
pub struct Zram {
    pub path: PathBuf,
    number: String,
}

impl Zram {
    /// None if the kernel has none.
    pub fn new(size: u64) -> Option<Self> {
        let control = Path::new("/sys/class/zram-control/hot_add");
        if !control.exists() {
            let _ = Command::new("modprobe").args(["zram", "num_devices=0"]).status();
        }
        let number = fs::read_to_string(control).ok()?.trim().to_owned();
        fs::write(format!("/sys/block/zram{number}/disksize"), size.to_string()).unwrap();
        Some(Self { path: format!("/dev/zram{number}").into(), number })
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

/// A mounted file system.
pub struct Mounted(pub tempfile::TempDir);

impl Mounted {
    pub fn new(device: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        tool("mount", ["-o", options, device.to_str().unwrap(), dir.path().to_str().unwrap()]);
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

pub fn size_of(device: &Path) -> u64 {
    Dev::of_path(device).unwrap().attribute("size").unwrap().parse::<u64>().unwrap() * 512
}

pub fn subject(device: &Path, id: u8, number: Option<u64>) -> Subject {
    Subject {
        volume: [id; 16],
        dev: Dev::of_path(device).unwrap(),
        block_size: BLOCK,
        length: size_of(device),
        baseline: number.map(baseline),
    }
}

pub fn baseline(number: u64) -> Baseline {
    Baseline { epoch: EPOCH, number }
}

#[track_caller]
pub fn track(tracker: &Tracker, device: &Path, id: u8, number: Option<u64>) -> Tracked {
    tracker.track(&subject(device, id, number)).unwrap_or_else(|e| panic!("{e}"))
}

/// A volume as after its first full scan: all taken and settled as number 1.
#[track_caller]
pub fn settled(tracker: &Tracker, device: &Path, id: u8) -> Tracked {
    let tracked = track(tracker, device, id, None);
    assert!(matches!(tracked.start(), Start::Fresh(_)));
    tracked.take().unwrap();
    tracked.settle(&Blocks::all(tracked.blocks()), baseline(1));
    tracked
}

pub fn direct(device: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT).open(device).unwrap()
}

/// Sectors of bytes that no other write has, at an address that O_DIRECT takes.
pub struct Payload(Vec<u8>, usize);

impl Payload {
    pub fn new(bytes: usize) -> Self {
        let buffer = vec![0; bytes + 4096];
        let offset = buffer.as_ptr().align_offset(4096);
        Self(buffer, offset)
    }

    pub fn random(bytes: usize) -> Self {
        let mut new = Self::new(bytes);
        fastrand::fill(new.bytes_mut());
        new
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.0.len() - (4096 - self.1)]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let end = self.0.len() - (4096 - self.1);
        &mut self.0[self.1..end]
    }
}

/// Writes this past all caches.
pub fn write_at(device: &Path, at: u64, bytes: usize) {
    direct(device).write_all_at(Payload::random(bytes).bytes(), at).unwrap();
}

/// A number for what each block holds, read past all caches.
pub fn contents(device: &Path) -> Vec<u64> {
    contents_of(device, &Blocks::all(size_of(device).div_ceil(BLOCK.into()))).into_iter().map(|(_, sum)| sum).collect()
}

/// The same of some blocks, with their numbers.
pub fn contents_of(device: &Path, blocks: &Blocks) -> Vec<(u64, u64)> {
    let (length, file, block) = (size_of(device), direct(device), u64::from(BLOCK));
    let mut buffer = Payload::new(4 << 20);
    let mut sums = Vec::new();
    for range in blocks.ranges() {
        for first in range.clone().step_by((4 << 20) / BLOCK as usize) {
            let end = (range.end * block).min(length).min(first * block + (4 << 20));
            let bytes = &mut buffer.bytes_mut()[..(end - first * block) as usize];
            file.read_exact_at(bytes, first * block).unwrap();
            sums.extend((first..).zip(bytes.chunks(BLOCK as usize).map(sum)));
        }
    }
    sums
}

fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
    words.fold(0u64, |sum, word| (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// I7: every block that is not what it was is marked. Gives how many are.
#[track_caller]
pub fn assert_all_marked(before: &[u64], after: &[u64], marked: &Blocks, what: &str) -> u64 {
    let changed = (0..before.len() as u64).filter(|b| before[*b as usize] != after[*b as usize]);
    let (mut count, mut missed) = (0, Vec::new());
    for block in changed {
        count += 1;
        if !marked.contains(block) {
            missed.push(block);
        }
    }
    assert!(missed.is_empty(), "I7: {what}: {} of {count} changed blocks not marked: {missed:?}", missed.len());
    count
}

pub fn seed() -> u64 {
    let seed =
        std::env::var("BACKHAUL_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("BACKHAUL_TEST_SEED={seed}");
    seed
}
