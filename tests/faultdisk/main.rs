//! `faultdisk FOLDER SIZE LOG`: mounts a file system on FOLDER with one file in it, `disk`, for a loop device to lie
//! over. Takes orders from standard input and answers each; unmounts and ends when standard input ends.
//!
//! The disk itself is [`backhaul_tests::faultdisk::disk`].

use std::ffi::OsStr;
use std::io::{BufRead, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use backhaul_tests::faultdisk::Order;
use backhaul_tests::faultdisk::disk::{Disk, Fails};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

const FILE: INodeNo = INodeNo(2);
/// Nothing about the file ever changes.
const LONG: Duration = Duration::from_secs(3600);
/// `FALLOC_FL_PUNCH_HOLE` and `FALLOC_FL_ZERO_RANGE` of linux/falloc.h.
const MAKES_ZERO: i32 = 0x02 | 0x10;

#[derive(Clone)]
struct Served(Arc<Mutex<Disk>>);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, size, log] = &args[..] else { panic!("usage: faultdisk FOLDER SIZE LOG") };
    let log = std::fs::File::create(PathBuf::from(log)).expect("the log can be made");
    let log = BufWriter::with_capacity(1 << 20, log);
    let disk = Disk::new(size.parse().expect("a size in bytes"), Some(Box::new(log)));
    let served = Served(Arc::new(Mutex::new(disk)));
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("faultdisk".into()), MountOption::NoExec];
    let session = fuser::Session::new(served.clone(), folder, &config).expect("it can be mounted: needs root and FUSE");
    let serving = session.spawn().expect("a thread that serves it");
    println!("ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let order: Order = serde_json::from_str(&line).expect("an order");
        let told = served.disk().obey(order);
        println!("{}", serde_json::to_string(&told).expect("an answer is JSON"));
        std::io::stdout().flush().expect("somebody listens");
    }
    // If something still lies over it, it ends with this process: nobody may hang in the kernel for its sake.
    let _ = std::process::Command::new("umount").arg("--lazy").arg(folder).status();
    drop(serving);
}

impl Served {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attr(&self, ino: INodeNo) -> FileAttr {
        let size = self.disk().size();
        let now = SystemTime::UNIX_EPOCH;
        let (kind, perm, size) =
            if ino == FILE { (FileType::RegularFile, 0o600, size) } else { (FileType::Directory, 0o700, 0) };
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn errno(fails: Fails) -> Errno {
    match fails {
        Fails::Eio => Errno::EIO,
        Fails::Enospc => Errno::ENOSPC,
    }
}

fn done(reply: ReplyEmpty, result: Result<(), Fails>) {
    match result {
        Ok(()) => reply.ok(),
        Err(fails) => reply.error(errno(fails)),
    }
}

impl Filesystem for Served {
    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "disk" {
            reply.entry(&LONG, &self.attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &self.attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // No cache of this file: a flipped bit must be seen, and each write must come here before it is done.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.disk().read(offset, size as usize) {
            Ok(bytes) => reply.data(&bytes),
            Err(fails) => reply.error(errno(fails)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.disk().write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(fails) => reply.error(errno(fails)),
        }
    }

    /// At each close; nothing is kept back.
    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        done(reply, self.disk().flush());
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match mode & MAKES_ZERO {
            0 => reply.error(Errno::EOPNOTSUPP),
            _ => done(reply, self.disk().zero(offset, length)),
        }
    }
}
