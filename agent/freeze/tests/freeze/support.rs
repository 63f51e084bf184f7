//! Loop devices, file systems and mounts that are thawed and given back when dropped, and writers that notice a freeze.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use backhaul_freeze::{Freezer, Helper, Options};
use backhaul_volume::sysfs::Dev;
use rustix::process::{Pid, Signal, kill_process};

pub const HELPER: &str = env!("CARGO_BIN_EXE_backhaul-freeze-helper");
/// Far above what a freeze takes on a machine that has other things to do.
pub const LIMIT: Duration = Duration::from_secs(5);

/// Whether tests with loop devices can run. Where not it says so, and fails if `BACKHAUL_REQUIRE_ALL` is 1.
#[track_caller]
pub fn can_run(test: &str) -> bool {
    let tools = ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "mksquashfs", "losetup", "partx", "fsfreeze", "unshare"];
    let missing = if !rustix::process::geteuid().is_root() {
        "needs root".to_owned()
    } else if !Path::new("/dev/loop-control").exists() {
        "needs loop devices".to_owned()
    } else if let Some(tool) = tools.iter().find(|t| !in_path(t)) {
        format!("needs {tool}")
    } else {
        return true;
    };
    assert!(std::env::var("BACKHAUL_REQUIRE_ALL").as_deref() != Ok("1"), "{test} {missing}, and must not be skipped");
    println!("SKIPPED: {test} {missing}");
    eprintln!("SKIPPED: {test} {missing}");
    false
}

fn in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.into_iter().any(|f: PathBuf| f.join(tool).exists())
}

/// What it prints; fails with what it says if it fails.
#[track_caller]
pub fn tool(name: &str, args: &[&str]) -> String {
    try_tool(name, args).unwrap_or_else(|e| panic!("{name} {args:?}: {e}"))
}

pub fn try_tool(name: &str, args: &[&str]) -> Result<String, String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out = Command::new(name).args(args).env("PATH", path).output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() { Ok(text) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A folder in memory for images, mount points and journals. Dropped after everything in it.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("backhaul-freeze-").tempdir_in("/dev/shm").expect("/dev/shm"))
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(&path).expect("a folder");
        path
    }

    pub fn options(&self) -> Options {
        let journal = self.at("run/journal");
        Options { helper: Helper::Spawn { program: HELPER.into(), args: vec!["freeze-helper".into()], journal } }
    }

    #[track_caller]
    pub fn freezer(&self) -> Freezer {
        Freezer::start(&self.options()).expect("a helper")
    }

    /// A new loop device of so many MiB.
    pub fn disk(&self, name: &str, mib: u64) -> Disk {
        Disk::new(&self.at(name), mib)
    }

    /// A loop device with a mounted file system.
    pub fn mounted(&self, kind: &str, name: &str) -> Mounted {
        let disk = self.disk(&format!("{name}.image"), size_of(kind));
        mkfs(kind, &disk.path);
        Mounted::new(disk, &self.folder(name))
    }
}

/// MiB: the smallest that mkfs makes.
pub fn size_of(kind: &str) -> u64 {
    match kind {
        "xfs" => 320,
        "btrfs" => 128,
        _ => 16,
    }
}

pub fn mkfs(kind: &str, device: &Path) {
    let args = match kind {
        "ext4" => vec!["-q", "-F"],
        "btrfs" => vec!["-q", "-f"],
        _ => vec!["-q", "-f", "-K"],
    };
    tool(&format!("mkfs.{kind}"), &[args, vec![text(device)]].concat());
}

pub struct Disk {
    pub path: PathBuf,
    pub dev: Dev,
    pub image: PathBuf,
}

impl Disk {
    pub fn new(image: &Path, mib: u64) -> Self {
        fs::File::create(image).and_then(|f| f.set_len(mib << 20)).expect("room");
        Self::attach(image)
    }

    pub fn attach(image: &Path) -> Self {
        // Another test may be given the same free number at the same time.
        let attached = (0..20).find_map(|_| try_tool("losetup", &["--find", "--show", text(image)]).ok());
        let path = PathBuf::from(attached.expect("a loop device").trim());
        Self { dev: Dev::of_path(&path).expect("a device"), path, image: image.into() }
    }

    /// With a table of partitions of so many MiB each.
    pub fn partitioned(image: &Path, mib: &[u64]) -> (Self, Vec<PathBuf>) {
        let mut table = [0; 512];
        let (mut at, sectors) = (2048, |m: &u64| (m << 11) as u32);
        for (n, size) in mib.iter().enumerate() {
            // An entry of a DOS table: type Linux, first sector, sectors.
            let entry = &mut table[446 + n * 16..][..16];
            entry[4] = 0x83;
            entry[8..12].copy_from_slice(&u32::to_le_bytes(at));
            entry[12..].copy_from_slice(&sectors(size).to_le_bytes());
            at += sectors(size);
        }
        table[510..].copy_from_slice(&[0x55, 0xaa]);
        fs::write(image, table).expect("room");
        fs::File::options().write(true).open(image).and_then(|f| f.set_len(u64::from(at) << 9)).expect("room");
        let disk = Self::attach(image);
        tool("partx", &["--add", text(&disk.path)]);
        let paths: Vec<_> = (1..=mib.len()).map(|n| PathBuf::from(format!("{}p{n}", text(&disk.path)))).collect();
        eventually("partitions appear", || paths.iter().all(|p| p.exists()));
        (disk, paths)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = try_tool("partx", &["--delete", text(&self.path)]);
        let _ = try_tool("losetup", &["--detach", text(&self.path)]);
    }
}

/// Everything that a test mounted and did not give back, in that order.
static MOUNTED: Mutex<Vec<Weak<fs::File>>> = Mutex::new(Vec::new());

/// A way onto a file system by which it is thawed when a test ends, also one that failed.
#[derive(Clone)]
pub struct Lifeline(Arc<fs::File>);

impl Lifeline {
    pub fn to(at: &Path) -> Self {
        let file = Arc::new(fs::File::open(at).expect("a folder"));
        MOUNTED.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&file));
        Self(file)
    }
}

impl Drop for Lifeline {
    /// Of all: to thaw a file system in an image is to write to the one that the image lies on, which comes first.
    fn drop(&mut self) {
        for file in MOUNTED.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            while backhaul_volume::frozen::thaw(&*file).is_ok() {}
        }
        while backhaul_volume::frozen::thaw(&*self.0).is_ok() {}
    }
}

/// A mount point; thawed before it is unmounted, since umount waits for a frozen file system.
pub struct Point(pub PathBuf, Option<Lifeline>);

impl Point {
    #[track_caller]
    pub fn new(what: &Path, at: &Path, options: &[&str]) -> Self {
        tool("mount", &[options, &[text(what), text(at)]].concat());
        Self(at.into(), Some(Lifeline::to(at)))
    }

    /// Has nothing open there any more, for tests of how one gets there.
    pub fn without_lifeline(&mut self) {
        self.1 = None;
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        self.1 = None;
        thaw(&self.0);
        let gone = (0..50).any(|n| {
            std::thread::sleep(Duration::from_millis(u64::from(n > 0) * 20));
            try_tool("umount", &[text(&self.0)]).is_ok()
        });
        if !gone {
            let _ = try_tool("umount", &["--lazy", text(&self.0)]);
        }
    }
}

/// Whatever holds it, however often.
pub fn thaw(at: &Path) {
    for _ in 0..8 {
        if try_tool("fsfreeze", &["--unfreeze", text(at)]).is_err() {
            return;
        }
    }
}

pub struct Mounted {
    // Dropped in this order.
    pub point: Point,
    pub disk: Disk,
}

impl Mounted {
    #[track_caller]
    pub fn new(disk: Disk, at: &Path) -> Self {
        Self { point: Point::new(&disk.path, at, &[]), disk }
    }

    pub fn at(&self) -> &Path {
        &self.point.0
    }

    pub fn dev(&self) -> Dev {
        self.disk.dev
    }
}

/// Whether a write there comes through within this time. One that does not waits in a thread until there is a thaw.
pub fn writes_within(at: &Path, time: Duration) -> bool {
    let (done, result) = mpsc::channel();
    let path = at.join("no-such-file");
    std::thread::spawn(move || {
        // Takes the same gate as any write and changes nothing.
        let _ = fs::remove_file(path);
        let _ = done.send(());
    });
    result.recv_timeout(time).is_ok()
}

#[track_caller]
pub fn assert_frozen(at: &Path) {
    assert!(!writes_within(at, Duration::from_millis(60)), "{} is not frozen", at.display());
}

/// I24: within a second no file system is frozen, for writers and for whoever wants to freeze.
#[track_caller]
pub fn assert_thawed(at: &Path) {
    assert!(writes_within(at, Duration::from_secs(1)), "{} was left frozen (I24)", at.display());
    // Later too: an unexpected freeze of a process that is still being killed.
    tool("fsfreeze", &["--freeze", text(at)]);
    tool("fsfreeze", &["--unfreeze", text(at)]);
}

#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Writes and syncs small files until dropped.
pub struct Writers {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Writers {
    pub fn on(at: &Path) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        for n in 0..2 {
            let (stop, path) = (stop.clone(), at.join(format!("written-{n}")));
            std::thread::spawn(move || {
                let mut file = fs::File::create(&path).expect("a file");
                for round in 0u64.. {
                    if stop.load(std::sync::atomic::Ordering::SeqCst) {
                        break;
                    }
                    use std::os::unix::fs::FileExt;
                    let _ = file.write_all_at(&[round as u8; 4096], round % 64 * 4096);
                    if round % 16 == 0 {
                        let _ = file.sync_data();
                        file = fs::File::create(&path).expect("a file");
                    }
                }
            });
        }
        Self { stop }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether any of its threads is: one that was killed in FIFREEZE goes on with that, whatever became of the first one.
pub fn is_alive(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let stats = threads.filter_map(|t| fs::read_to_string(t.ok()?.path().join("stat")).ok());
    stats.into_iter().any(|s| !s.contains(") Z ") && !s.contains(") X "))
}

/// Of its processor time, a hundredth of a second each.
pub fn processor_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields: Vec<&str> = stat.rsplit(") ").next().expect("fields").split(' ').collect();
    [11, 12].iter().map(|f| fields[*f].parse::<u64>().expect("a number")).sum()
}

/// The guard of a helper: its only child.
pub fn guard_of(helper: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{helper}/task/{helper}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// An agent of its own process, and what it says.
pub struct Agent {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    pub helper: u32,
    pub guard: u32,
}

impl Agent {
    pub fn command(program: &Path, journal: &Path, times: [u64; 3], devices: &[Dev]) -> Command {
        let mut command = Command::new(program);
        command.arg("agent").arg(journal).args(times.map(|t| t.to_string()));
        command.args(devices.iter().map(|d| d.node().expect("a node")));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    /// Started and waiting to freeze, if it comes so far.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("an agent");
        let (said, lines) = mpsc::channel();
        let out = child.stdout.take().expect("piped");
        std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).for_each(|l| drop(said.send(l))));
        let stdin = child.stdin.take();
        let mut agent = Self { child, stdin, lines, helper: 0, guard: 0 };
        let helper = agent.line();
        agent.helper = helper.strip_prefix("helper ").and_then(|p| p.parse().ok()).unwrap_or(0);
        if agent.line() == "prepared" {
            agent.guard = guard_of(agent.helper).unwrap_or(0);
        }
        agent
    }

    pub fn go(&mut self) {
        if let Some(stdin) = &mut self.stdin {
            let _ = stdin.write_all(b"x");
        }
    }

    /// What it says next; empty when it ended.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(20)).unwrap_or_default()
    }

    pub fn wait_gone(&self) {
        eventually("helper and guard end", || ![self.helper, self.guard].iter().any(|p| *p > 0 && is_alive(*p)));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for pid in [self.helper, self.guard].into_iter().filter(|p| *p > 0) {
            signal(pid, Signal::CONT);
        }
        signal(self.child.id(), Signal::CONT);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// From the environment or by chance, printed for a replay.
pub fn seed() -> u64 {
    let seed =
        std::env::var("BACKHAUL_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("BACKHAUL_TEST_SEED={seed}");
    seed
}
