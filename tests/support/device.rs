//! Loop devices, mounts and small disks: given back when dropped. They need root; see [`needs_root`].

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::process::tool;

/// Whether this test can run here. Where not it says so loudly, and fails if `BACKHAUL_REQUIRE_ALL` is 1.
#[track_caller]
pub fn needs_root(test: &str) -> bool {
    let missing = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/dev/loop-control").exists() {
        "needs loop devices"
    } else {
        return true;
    };
    skipped(test, missing)
}

/// Says so; gives `false`.
#[track_caller]
fn skipped(test: &str, missing: &str) -> bool {
    assert!(std::env::var("BACKHAUL_REQUIRE_ALL").as_deref() != Ok("1"), "{test} {missing}, and must not be skipped");
    // To the terminal itself as well: the test runner keeps what passing tests say.
    println!("SKIPPED: {test} {missing}");
    eprintln!("SKIPPED: {test} {missing}");
    false
}

/// [`needs_root`] for tests with a [fault disk](crate::faultdisk), which also need FUSE.
#[track_caller]
pub fn needs_fault_disk(test: &str) -> bool {
    needs_root(test) && (Path::new("/dev/fuse").exists() || skipped(test, "needs FUSE (modprobe fuse)"))
}

/// A loop device over a file.
#[derive(Debug)]
pub struct Loop {
    path: PathBuf,
}

impl Loop {
    /// Attaches a file.
    pub fn attach(file: &Path) -> Self {
        let path = tool("losetup", ["--find", "--show", file.to_str().expect("UTF-8")]);
        Self { path: path.trim().into() }
    }

    /// Makes a file of this size and attaches it.
    pub fn new(file: &Path, size: u64) -> Self {
        File::create(file).and_then(|f| f.set_len(size)).expect("there is room");
        Self::attach(file)
    }

    /// Attaches a file, to be read only.
    pub fn read_only(file: &Path) -> Self {
        let path = tool("losetup", ["--find", "--show", "--read-only", file.to_str().expect("UTF-8")]);
        Self { path: path.trim().into() }
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes one partition from the first MiB to the end; gives its device.
    pub fn partition(&self) -> PathBuf {
        use std::io::{Seek, SeekFrom};
        use std::os::unix::fs::FileExt;
        const START: u32 = 2048;
        let mut disk = File::options().read(true).write(true).open(&self.path).expect("the device is there");
        let sectors = (disk.seek(SeekFrom::End(0)).expect("it has a size") / 512) as u32;
        // An MBR by hand, so that no partitioning tool is needed: one entry of type Linux.
        let mut mbr = [0; 512];
        mbr[446 + 4] = 0x83;
        mbr[446 + 8..446 + 12].copy_from_slice(&START.to_le_bytes());
        mbr[446 + 12..446 + 16].copy_from_slice(&(sectors - START).to_le_bytes());
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        disk.write_all_at(&mbr, 0).and_then(|()| disk.sync_all()).expect("it can be written");
        drop(disk);
        tool("partx", ["--add", self.path.to_str().expect("UTF-8")]);
        let partition = PathBuf::from(format!("{}p1", self.path.display()));
        assert!(partition.exists(), "{} is missing", partition.display());
        partition
    }

    /// Takes on the new size of its file.
    pub fn resized(&self) {
        tool("losetup", ["--set-capacity", self.path.to_str().expect("UTF-8")]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let path = self.path.as_os_str();
        let quietly = |name: &str, args: &[&std::ffi::OsStr]| {
            let _ = std::process::Command::new(name).args(args).stderr(std::process::Stdio::null()).status();
        };
        quietly("partx", &["--delete".as_ref(), path]);
        quietly("losetup", &["--detach".as_ref(), path]);
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
}

impl Mount {
    /// Mounts a device on a new folder.
    pub fn new(device: &Path, at: &Path) -> Self {
        std::fs::create_dir_all(at).expect("a folder can be made");
        tool("mount", [device, at]);
        Self { at: at.to_owned() }
    }

    /// Memory as a disk of this many bytes.
    pub fn tmpfs(at: &Path, size: u64) -> Self {
        std::fs::create_dir_all(at).expect("a folder can be made");
        let size = format!("size={size}");
        tool("mount", ["-t", "tmpfs", "-o", &size, "tmpfs", at.to_str().expect("UTF-8")]);
        Self { at: at.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

/// An ext4 file system of this size on a loop device.
#[derive(Debug)]
pub struct SmallDisk {
    // Order matters: unmounted before it is detached.
    mount: Mount,
    _device: Loop,
}

impl SmallDisk {
    /// Makes and mounts one.
    pub fn new(folder: &Path, name: &str, size: u64) -> Self {
        let device = Loop::new(&folder.join(format!("{name}.disk")), size);
        tool("mkfs.ext4", ["-q", "-F", "-m", "0", device.path().to_str().expect("UTF-8")]);
        let mount = Mount::new(device.path(), &folder.join(name));
        Self { mount, _device: device }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// Takes all room but so many bytes; dropping the file's path gives it back.
    pub fn fill(&self, but: u64) -> PathBuf {
        let ballast = self.path().join("ballast");
        let stat = rustix::fs::statvfs(self.path()).expect("mounted");
        let free = stat.f_bavail * stat.f_frsize;
        let file = File::create(&ballast).expect("there is room");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free.saturating_sub(but).max(1))
            .expect("there is room");
        ballast
    }

    /// [`Self::fill`] to the last blocks, which a single file can't take; removing the files gives the room back.
    pub fn fill_up(&self, but: u64) -> Vec<PathBuf> {
        let mut files = vec![self.fill(but.max(1 << 20))];
        for n in 0.. {
            let stat = rustix::fs::statvfs(self.path()).expect("mounted");
            let path = self.path().join(format!("ballast-{n}"));
            if stat.f_bavail * stat.f_frsize <= but || std::fs::write(&path, [1; 4096]).is_err() {
                // The folder's own blocks may have taken the last ones.
                files.push(path);
                break;
            }
            files.push(path);
        }
        files
    }
}
