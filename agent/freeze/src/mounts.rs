//! Mount tables of every mount namespace that a process of ours can see, and ways onto a mounted file system.
//!
//! Read first: [`tables`], then [`Mount::open`].

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use backhaul_volume::sysfs::Dev;
use rustix::fs::{Mode, OFlags, openat};

/// One line of a mountinfo.
#[derive(Clone, Debug)]
pub(crate) struct Mount {
    /// Of all mounts of the machine that exist.
    id: u64,
    /// The superblock's own number: the same for all subvolumes of a btrfs, whatever `stat` says there.
    pub(crate) dev: Dev,
    pub(crate) point: PathBuf,
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
    /// Of the superblock, not of this mount.
    pub(crate) options: String,
    /// The root folder that `point` counts from, held open: it stays when the process ends.
    root: Rc<OwnedFd>,
}

/// All mounts that can be seen.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) mounts: Vec<Mount>,
    /// Processes whose table is not ours to read.
    pub(crate) unread: usize,
}

/// Reads one table for each namespace and root folder: who lives in a chroot sees only what is below it.
pub(crate) fn tables() -> io::Result<Tables> {
    let (mut seen, mut mounts, mut denied) = (BTreeSet::new(), Vec::<Mount>::new(), Vec::new());
    for process in std::iter::once(PathBuf::from("/proc/self")).chain(processes()?) {
        let root =
            rustix::fs::open(process.join("root"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let (Ok(namespace), Ok(root)) = (fs::read_link(process.join("ns/mnt")), root) else {
            // A process that is ending has no namespace any more; a kernel thread has the first one.
            denied.extend(is_denied(&process).then_some(process));
            continue;
        };
        let Ok(at) = rustix::fs::fstat(&root) else { continue };
        if seen.contains(&(namespace.clone(), at.st_dev, at.st_ino)) {
            continue;
        }
        // Empty when the process ended in between: another of its namespace is read then.
        let Ok(table) = fs::read(process.join("mountinfo")) else { continue };
        let root = Rc::new(root);
        let before = mounts.len();
        mounts.extend(table.split(|b| *b == b'\n').filter_map(|line| parse(line, &root)));
        if mounts.len() > before {
            seen.insert((namespace, at.st_dev, at.st_ino));
        }
    }
    // A table is readable where the rest of a process is not. If all of its mounts are known it is one that was read.
    let known: BTreeSet<u64> = mounts.iter().map(|m| m.id).collect();
    let is_known = |process: &PathBuf| {
        let table = fs::read(process.join("mountinfo")).unwrap_or_default();
        let lines = table.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let mut ids =
            lines.map(|line| std::str::from_utf8(line.split(|b| *b == b' ').next()?).ok()?.parse::<u64>().ok());
        !table.is_empty() && ids.all(|id| id.is_some_and(|id| known.contains(&id)))
    };
    let unread = denied.iter().filter(|p| !is_known(p) && is_denied(p)).count();
    Ok(Tables { mounts, unread })
}

/// The folders of all processes.
pub(crate) fn processes() -> io::Result<impl Iterator<Item = PathBuf>> {
    let paths = fs::read_dir("/proc")?.filter_map(|e| Some(e.ok()?.path()));
    Ok(paths.filter(|p| p.file_name().is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit())))
}

fn is_denied(process: &Path) -> bool {
    fs::read_link(process.join("ns/mnt")).is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
}

impl Mount {
    /// Opens the mount's root for reading; an error if the path leads somewhere else because another mount hides it.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let path = self.point.strip_prefix("/").unwrap_or(&self.point);
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let at = openat(&*self.root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        if mount_id(&at)? != self.id {
            return Err(io::Error::other(format!("{} is hidden by another mount", self.point.display())));
        }
        open_again(&at)
    }

    /// The value of one option of the superblock: "logdev".
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        self.options.split(',').find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.options.split(',').any(|o| o == "ro")
    }
}

/// Opens for reading what an `O_PATH` descriptor stands for. Only files and folders: to open a device or a pipe does
/// something.
pub(crate) fn open_again(at: impl AsFd) -> io::Result<OwnedFd> {
    let meta = rustix::fs::fstat(&at)?;
    let kind = rustix::fs::FileType::from_raw_mode(meta.st_mode);
    if !matches!(kind, rustix::fs::FileType::Directory | rustix::fs::FileType::RegularFile) {
        return Err(io::Error::other("neither a folder nor a file"));
    }
    let path = format!("/proc/self/fd/{}", at.as_fd().as_raw_fd());
    // Not blocking: a lease that somebody has on the file would have us wait.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let flags = if kind == rustix::fs::FileType::Directory { flags | OFlags::DIRECTORY } else { flags };
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// What processes have open, work in or call their root: ways onto a file system that no path leads to, because it
/// was unmounted lazily or another mount hides it. `wanted` is asked for the `st_dev` of each.
pub(crate) fn open_files(mut wanted: impl FnMut(u64) -> bool) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    for process in processes().into_iter().flatten() {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
        for path in [process.join("cwd"), process.join("root")].into_iter().chain(files) {
            // The link leads there by itself, not by its text.
            let Ok(meta) = fs::metadata(&path) else { continue };
            if !(meta.is_dir() || meta.is_file()) || !wanted(meta.dev()) {
                continue;
            }
            let at = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            found.extend(at.ok().and_then(|at| open_again(at).ok()));
        }
    }
    found
}

fn mount_id(fd: &OwnedFd) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = text.lines().find_map(|l| l.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("this kernel does not say which mount a file is on"))
}

/// `36 35 98:0 /root /mount/point options optional... - type source options`
fn parse(line: &[u8], root: &Rc<OwnedFd>) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let text = |i: usize| fields.get(i).and_then(|f| std::str::from_utf8(f).ok());
    let dash = fields.iter().position(|f| *f == b"-")?;
    Some(Mount {
        id: text(0)?.parse().ok()?,
        dev: Dev::parse(text(2)?)?,
        point: unescape(fields.get(4)?),
        kind: text(dash + 1)?.to_owned(),
        source: unescape(fields.get(dash + 2)?),
        options: String::from_utf8_lossy(fields.get(dash + 3).copied().unwrap_or_default()).into_owned(),
        root: root.clone(),
    })
}

/// The kernel writes space, tab, newline and backslash as `\040`.
pub(crate) fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match octal {
            Some(d) => {
                out.push(d.iter().fold(0u8, |n, b| n.wrapping_mul(8).wrapping_add(b - b'0')));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// What swap is on: devices and files.
pub(crate) fn swaps() -> Vec<PathBuf> {
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let lines = table.split(|b| *b == b'\n').skip(1).filter(|l| !l.is_empty());
    lines.filter_map(|l| l.split(|b| *b == b' ' || *b == b'\t').next()).map(unescape).collect()
}

/// A block device's node, opened for reading and at once closed by who calls. `exclusive` fails with EBUSY if a file
/// system, swap or another device has claimed it.
pub(crate) fn open_device(dev: Dev, exclusive: bool) -> io::Result<File> {
    let node = dev.node().ok_or_else(|| io::Error::other(format!("{dev} has no node in /dev")))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let flags = if exclusive { flags | OFlags::EXCL } else { flags };
    Ok(rustix::fs::open(node, flags, Mode::empty())?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines_are_understood() {
        let root = Rc::new(OwnedFd::from(File::open("/").expect("there is a root")));
        let line = br"36 35 98:0 / /mnt/a\040b\134 rw master:1 - xfs /dev/root rw,logdev=/dev/sdb";
        let mount = parse(line, &root).expect("a mount");
        assert_eq!((mount.id, mount.point.to_str()), (36, Some(r"/mnt/a b\")));
        assert_eq!((mount.kind.as_str(), mount.option("logdev")), ("xfs", Some("/dev/sdb")));
        assert!(!mount.is_read_only());
        for broken in [&b""[..], b"1 2 3", b"36 35 98:0 / /mnt - "] {
            assert!(parse(broken, &root).is_none(), "{}", String::from_utf8_lossy(broken));
        }
    }

    #[test]
    fn a_mount_opens_as_itself() {
        let tables = tables().expect("there is /proc");
        let root = tables.mounts.iter().find(|m| m.point == Path::new("/")).expect("a root");
        let fd = root.open().expect("it can be opened");
        assert_eq!(mount_id(&fd).expect("an id"), root.id);
    }
}
