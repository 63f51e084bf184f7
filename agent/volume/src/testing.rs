//! What the tests of this crate share: loop devices that go away again, and tests that do not skip in silence.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use backhaul_protocol::digest::BlockDigest;
use backhaul_protocol::geometry::{BlockIndex, Geometry};
use backhaul_protocol::ids::{CaptureNumber, VolumeSlot};
use backhaul_protocol::record::{Encoder, HEADER_LEN, RecordHeader, VerifiedBlock, Verifier};

/// Whether the test may go on. If not, says why, and fails where all tests are required.
pub(crate) fn can(what: &str, possible: bool) -> bool {
    if !possible {
        assert!(std::env::var("BACKHAUL_REQUIRE_ALL").as_deref() != Ok("1"), "needs {what}");
        // Not eprintln!, which the test harness swallows.
        let _ = writeln!(std::io::stderr(), "SKIPPED: needs {what}");
    }
    possible
}

pub(crate) fn root() -> bool {
    can("root and loop devices", rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists())
}

/// Runs a command that must succeed and gives what it printed.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text").trim().to_owned()
}

/// Bytes that are not zero and differ from place to place and seed to seed.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) as u8 | 1
    };
    (0..len).map(next).collect()
}

/// A loop device; detached when dropped, also by a panic.
pub(crate) struct LoopDevice {
    pub(crate) node: PathBuf,
    pub(crate) image: PathBuf,
}

impl LoopDevice {
    pub(crate) fn over(image: &Path, options: &[&str]) -> Self {
        let args = [options, &["-f", "--show", image.to_str().expect("text")]].concat();
        Self { node: run("losetup", &args).into(), image: image.to_owned() }
    }

    /// Over a new sparse image of this many bytes.
    pub(crate) fn new(folder: &Path, name: &str, bytes: u64) -> Self {
        let image = folder.join(name);
        std::fs::File::create(&image).and_then(|f| f.set_len(bytes)).expect("an image");
        Self::over(&image, &[])
    }

    pub(crate) fn name(&self) -> &str {
        self.node.file_name().and_then(|n| n.to_str()).expect("a name")
    }

    /// Adds a partition; both numbers in MiB.
    pub(crate) fn partition(&self, number: u32, start: u64, len: u64) -> PathBuf {
        let [number_text, start, len] = [u64::from(number), start * 2048, len * 2048].map(|n| n.to_string());
        run("addpart", &[self.text(), &number_text, &start, &len]);
        PathBuf::from(format!("{}p{number}", self.node.display()))
    }

    pub(crate) fn text(&self) -> &str {
        self.node.to_str().expect("text")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A child of another test holds our descriptors between fork and exec: busy now is not busy for long.
        for n in (1..5).flat_map(|n| [n; 200]) {
            if Path::new(&format!("/sys/class/block/{}p{n}", self.name())).exists() {
                let _ = Command::new("delpart").args([self.text(), &n.to_string()]).output();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let _ = Command::new("losetup").args(["-d", self.text()]).output();
        let backing = format!("/sys/class/block/{}/loop/backing_file", self.name());
        let mut patience = 200;
        while patience > 0 && std::fs::read_to_string(&backing).is_ok_and(|f| Path::new(f.trim()) == self.image) {
            std::thread::sleep(std::time::Duration::from_millis(5));
            patience -= 1;
        }
    }
}

/// A mount; unmounted when dropped.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn new(device: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).expect("a mount point");
        run("mount", &[device.to_str().expect("text"), at.to_str().expect("text")]);
        Self(at.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = || Command::new("umount").arg(&self.0).output().is_ok_and(|o| o.status.success());
        let _ = patiently(|| unmounted().then_some(()).ok_or(()), |()| true);
    }
}

/// Hands `use_it` the verified block that these bytes are.
pub(crate) fn verified<R>(g: Geometry, block: u64, plain: &[u8], use_it: impl FnOnce(&VerifiedBlock<'_>) -> R) -> R {
    let mut record = Vec::new();
    let block = BlockIndex(block);
    let digest = BlockDigest::of(plain);
    let mut encoder = Encoder::new(1).expect("an encoder");
    encoder.encode(VolumeSlot(1), block, CaptureNumber(1), digest, plain, &mut record);
    let (header, payload) = record.split_first_chunk::<HEADER_LEN>().expect("a header");
    let header = RecordHeader::parse(header).expect("a record");
    use_it(&Verifier::new().expect("a verifier").verify(&header, payload, g).expect("verified"))
}

/// Repeats `attempt` for up to a second while it fails as `passing` says. Tests beside this one start programs, and
/// between fork and exec a child holds every descriptor of ours, exclusive claims and all.
pub(crate) fn patiently<T, E>(attempt: impl Fn() -> Result<T, E>, passing: impl Fn(&E) -> bool) -> Result<T, E> {
    for _ in 0..200 {
        match attempt() {
            Err(e) if passing(&e) => std::thread::sleep(std::time::Duration::from_millis(5)),
            result => return result,
        }
    }
    attempt()
}
