//! Images that somebody writes to while a point is made, on file systems that can clone them.
//!
//! Writers write a counter first to one place and then to another: at no instant is the second ahead of the first, nor
//! the first ahead by more than one. A point that is called `crash` must show that (F10).

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backhaul_tests::fixture::number;
use backhaul_tests::process::{tool, until};
use backhaul_tests::{Agent, Child, Fixture, Loop, Mount, Network, Random, image, needs_root};

const MIB: u64 = 1 << 20;
const LEN: u64 = 48 * MIB;
const PROMPT: Duration = Duration::from_secs(30);

/// Python, since writing through a mapping is `unsafe` here. `MODE IMAGE FIRST SECOND`
const WRITER: &str = r#"
import mmap, os, struct, sys
mode, path, first, second = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
direct = mode == "direct"
fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
memory = mmap.mmap(fd, 0) if mode == "mmap" else mmap.mmap(-1, 4096)
# One store of eight bytes; struct.pack_into writes zeroes first.
words = memoryview(memory).cast("Q")
n = 0
def write(at):
    if mode == "mmap":
        words[at // 8] = n
    elif direct:
        words[0] = n
        os.pwritev(fd, [memory], at)
    else:
        os.pwrite(fd, struct.pack("<Q", n), at)
print("ready", flush=True)
while True:
    n += 1
    write(first)
    write(second)
"#;

/// Where a writer writes: the first place at the end of the image, where it is read last.
const PLACES: [(&str, u64, u64); 4] = [
    ("mmap", MIB, 40 * MIB),
    ("mmap", 41 * MIB, 2 * MIB),
    ("pwrite", 42 * MIB, 3 * MIB),
    ("direct", 43 * MIB, 4 * MIB),
];

struct Disk {
    // Order matters: unmounted before it is detached.
    mount: Mount,
    _device: Loop,
}

impl Disk {
    fn new(f: &Fixture, kind: &str) -> Self {
        let device = Loop::new(&f.path("disk"), 400 * MIB);
        let path = device.path().to_str().expect("UTF-8");
        match kind {
            "xfs" => tool("mkfs.xfs", ["-q", "-f", path]),
            "xfs without clones" => tool("mkfs.xfs", ["-q", "-f", "-m", "reflink=0", path]),
            "ext4" => tool("mkfs.ext4", ["-q", "-F", path]),
            _ => tool("mkfs.btrfs", ["-q", "-f", path]),
        };
        let mount = Mount::new(device.path(), &f.path("mnt"));
        if kind == "btrfs without checksums" {
            tool("chattr", ["+C", mount.path().to_str().expect("UTF-8")]);
        }
        Self { mount, _device: device }
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.mount.path().join(name);
        image::random(&path, LEN, &mut Random::new(7));
        // From zero.
        PLACES.iter().for_each(|(_, a, b)| [a, b].into_iter().for_each(|at| image::write(&path, *at, &[0; 8])));
        path
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.mount.path()).expect("mounted");
        stat.f_bavail * stat.f_frsize
    }

    fn names(&self) -> usize {
        std::fs::read_dir(self.mount.path()).expect("mounted").count()
    }
}

fn write(f: &Fixture, path: &Path, place: (&str, u64, u64)) -> Child {
    let mut command = std::process::Command::new("python3");
    command.args(["-c", WRITER, place.0, path.to_str().expect("UTF-8"), &place.1.to_string(), &place.2.to_string()]);
    let mut child = Child::start(command, &f.path("writer.err"));
    assert_eq!(child.line(PROMPT), "ready", "{}", child.err());
    child
}

fn counter(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    std::fs::File::open(path).and_then(|f| f.read_exact_at(&mut bytes, at)).expect("it was restored");
    u64::from_le_bytes(bytes)
}

/// Restores a point and gives what the writers had written.
fn restored(f: &Fixture, volume: &str, point: u64) -> Vec<(u64, u64)> {
    let to = f.path("restored");
    let what = format!("web/{volume}@{point}");
    f.receiver(&["restore", &what, "--to", to.to_str().expect("UTF-8")]).ok();
    PLACES.iter().map(|(_, first, second)| (counter(&to, *first), counter(&to, *second))).collect()
}

fn setup(kind: &str) -> (Fixture, backhaul_tests::Serving, Agent, Disk) {
    let f = Fixture::new();
    let serving = f.serve();
    let agent = f.joined("agent", &serving);
    let disk = Disk::new(&f, kind);
    (f, serving, agent, disk)
}

fn of_one_instant(kind: &str) {
    if !needs_root(&format!("an image on {kind} that is written to is of one instant")) {
        return;
    }
    let (f, _serving, agent, disk) = setup(kind);
    let path = disk.image("a.img");
    agent.protect("data", &path);
    let writers: Vec<Child> = PLACES.iter().map(|place| write(&f, &path, *place)).collect();
    let mut last = vec![0; PLACES.len()];
    for round in 0..6 {
        let synced = agent.sync();
        assert_eq!(synced["consistency"], "crash", "{kind}: {synced}");
        let found = restored(&f, "data", number(&synced, "point"));
        for ((place, (first, second)), last) in PLACES.iter().zip(found).zip(&mut last) {
            assert!(second <= first && first <= second + 1, "I6: {kind}, round {round}, {place:?}: {first} {second}");
            assert!(second > *last, "{kind}: {place:?} went on between points: {second} after {last}");
            *last = second;
        }
    }
    // What the test can see at all: read as it is, it is not called of one instant.
    agent.settings("snapshot = \"none\"");
    assert_eq!(agent.sync()["consistency"], "fuzzy");
    drop(writers);
    assert_eq!(disk.names(), 1, "clones have no names");
    agent.settings("");
    let still = agent.sync();
    assert_eq!(
        (&still["consistency"], &still["volumes"][0]["digest"]),
        (&"crash".into(), &image::digest(&path, 65536).into())
    );
}

#[test]
fn on_xfs() {
    of_one_instant("xfs");
}

#[test]
fn on_btrfs() {
    of_one_instant("btrfs");
}

#[test]
fn on_btrfs_without_checksums() {
    of_one_instant("btrfs without checksums");
}

#[test]
fn where_nothing_can_be_cloned_that_is_said() {
    if !needs_root("where_nothing_can_be_cloned_that_is_said") {
        return;
    }
    for (kind, says) in [("ext4", "xfs, btrfs"), ("xfs without clones", "reflink=0")] {
        let (_f, _serving, agent, disk) = setup(kind);
        let path = disk.image("a.img");
        agent.protect("data", &path);
        let writer = std::fs::OpenOptions::new().write(true).open(&path).expect("it is there");
        for set in ["", "snapshot = \"reflink\""] {
            agent.settings(set);
            let ran = agent.run(&["sync"]);
            assert_eq!(ran.ok()["consistency"], "fuzzy", "{kind}: {ran:#?}");
            assert!(ran.err.contains("no clone of it") && ran.err.contains(says), "{kind}: {}", ran.err);
        }
        drop(writer);
        // Asked for, not possible and not needed.
        assert_eq!(agent.sync()["consistency"], "crash");
        agent.settings("snapshot = \"none\"");
        let _writer = std::fs::OpenOptions::new().write(true).open(&path).expect("it is there");
        let ran = agent.run(&["sync"]);
        assert_eq!(ran.ok()["consistency"], "fuzzy");
        assert!(!ran.err.contains("clone"), "not tried: {}", ran.err);
    }
}

#[test]
fn several_images_are_of_one_instant_only_if_one_is_written_to() {
    if !needs_root("several_images_are_of_one_instant_only_if_one_is_written_to") {
        return;
    }
    let (f, _serving, agent, disk) = setup("xfs");
    let (a, b) = (disk.image("a.img"), disk.image("b.img"));
    agent.protect("a", &a);
    agent.protect("b", &b);
    // Open for writing, and idle for longer than times can be wrong.
    let open = |path: &Path| std::fs::OpenOptions::new().write(true).open(path).expect("it is there");
    let _idle = [open(&a), open(&b)];
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(agent.sync()["consistency"], "crash", "nobody writes");
    for busy in [&a, &b] {
        let _writer = write(&f, busy, PLACES[2]);
        let synced = agent.sync();
        assert_eq!(synced["consistency"], "crash", "the other one is as it was: {synced}");
        drop(_writer);
        std::thread::sleep(Duration::from_millis(1200));
    }
    let _writers = [write(&f, &a, PLACES[0]), write(&f, &b, PLACES[2])];
    let ran = agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "fuzzy", "I6: {ran:#?}");
    assert!(ran.err.contains("several images"), "{}", ran.err);
}

#[test]
fn a_clone_takes_no_room_that_writers_need() {
    if !needs_root("a_clone_takes_no_room_that_writers_need") {
        return;
    }
    let (f, serving, agent, disk) = setup("xfs");
    let path = disk.image("a.img");
    agent.protect("data", &path);
    let _open = std::fs::OpenOptions::new().write(true).open(&path).expect("it is there");
    let ballast = disk.mount.path().join("ballast");
    let file = std::fs::File::create(&ballast).expect("there is room");
    let most = disk.free() - 30 * MIB;
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, most).expect("there is room");
    let ran = agent.run(&["sync"]);
    assert_eq!(ran.ok()["consistency"], "fuzzy", "{ran:#?}");
    assert!(ran.err.contains("bytes are free"), "{}", ran.err);
    // While it is read, room gets scarce: it is given up, and what writers took is theirs.
    std::fs::remove_file(&ballast).expect("it is there");
    drop(file);
    image::random(&path, LEN, &mut Random::new(8));
    let network = Network::to(serving.socket());
    let slow = agent.clone().through(&network.address());
    let mut child = slow.start(&["sync"]);
    until("under way", PROMPT, || network.bytes_up() > MIB);
    // kill -9: nothing is left of the clone.
    child.kill();
    assert_eq!(disk.names(), 1);
    let free = disk.free();
    assert!(free > 250 * MIB, "{free}");
    assert_eq!(agent.sync()["consistency"], "crash");
    assert_eq!(f.points().len(), 2);
}
