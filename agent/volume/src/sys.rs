//! System calls that rustix has no safe form of: leases, the ioctls of block devices and file systems, signals as a
//! descriptor. Nothing is decided here.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::ioctl::{Getter, NoArg, Setter, ioctl};

// <linux/fs.h>; libc does not have them.
const BLKROGET: u32 = 0x125e;
const BLKRRPART: u32 = 0x125f;
const BLKFLSBUF: u32 = 0x1261;
const BLKZEROOUT: u32 = 0x127f;
const BLKGETSIZE64: u32 = rustix::ioctl::opcode::read::<usize>(0x12, 114);
const FIFREEZE: u32 = rustix::ioctl::opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: u32 = rustix::ioctl::opcode::read_write::<libc::c_int>(b'X', 120);
// <linux/btrfs.h>: struct btrfs_ioctl_fs_info_args is 1024 bytes.
const BTRFS_IOC_FS_INFO: u32 = rustix::ioctl::opcode::read::<[u64; 128]>(0x94, 31);
// <linux/loop.h>: struct loop_info64 is 232 bytes.
const LOOP_GET_STATUS64: u32 = 0x4c05;
// <asm-generic/fcntl.h>; libc does not have it.
const F_SETSIG: libc::c_int = 10;

/// Has every large block of memory be a mapping of its own, which goes back to the system when it is freed. By itself
/// glibc raises the limit to the size of what was freed last, up to 32 MiB: segments would then lie in heaps that do
/// not shrink, and a receiver would keep several times of what it uses.
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two ints and changes how later allocations are made; it fails without effect.
    unsafe {
        // Not less: mapping costs more than copying does below it. Arbitrary above that.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
        // By itself eight for each core: what one thread frees lies idle in its own.
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Who `ioprio_set` is about: IOPRIO_WHO_PROCESS, which with 0 is the calling thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

/// Sets class and level of the calling thread for disks.
pub(crate) fn set_io_priority(code: i32) -> io::Result<()> {
    // SAFETY: ioprio_set takes three ints and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, code) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Class and level of the calling thread for disks.
pub(crate) fn io_priority() -> io::Result<i32> {
    // SAFETY: ioprio_get takes two ints and touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) } {
        -1 => Err(io::Error::last_os_error()),
        code => Ok(code as i32),
    }
}

/// Bytes of a block device.
pub(crate) fn device_bytes(fd: impl AsFd) -> io::Result<u64> {
    // SAFETY: BLKGETSIZE64 writes one u64 through its argument (its opcode says size_t for historical reasons).
    Ok(unsafe { ioctl(fd, Getter::<BLKGETSIZE64, u64>::new()) }?)
}

/// Whether a block device is set read-only.
pub(crate) fn device_is_read_only(fd: impl AsFd) -> io::Result<bool> {
    // SAFETY: BLKROGET writes one int through its argument.
    Ok(unsafe { ioctl(fd, Getter::<BLKROGET, libc::c_int>::new()) }? != 0)
}

/// Makes `len` bytes from `at` read as zeroes; both multiples of the sector size.
pub(crate) fn device_zero_out(fd: impl AsFd, at: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKZEROOUT reads two u64 through its argument: start and length in bytes.
    Ok(unsafe { ioctl(fd, Setter::<BLKZEROOUT, [u64; 2]>::new([at, len])) }?)
}

/// Writes back and drops what the kernel caches of a block device.
pub(crate) fn device_drop_cache(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument.
    Ok(unsafe { ioctl(fd, NoArg::<BLKFLSBUF>::new()) }?)
}

/// Has the kernel read the partition table of a whole disk anew.
pub(crate) fn device_reread_partitions(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: BLKRRPART takes no argument.
    Ok(unsafe { ioctl(fd, NoArg::<BLKRRPART>::new()) }?)
}

/// Freezes the file system that an open file or folder is on. Waits for writers and for a sync, and no signal ends the
/// wait, SIGKILL neither: a killed process may have frozen all the same. EBUSY if it is frozen already.
pub fn freeze(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: FIFREEZE reads and writes nothing through its argument.
    Ok(unsafe { ioctl(fd, NoArg::<FIFREEZE>::new()) }?)
}

/// Thaws it. EINVAL if it is not frozen; success does not say who froze it.
pub fn thaw(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: FITHAW reads and writes nothing through its argument.
    Ok(unsafe { ioctl(fd, NoArg::<FITHAW>::new()) }?)
}

/// The UUID of the btrfs that an open file or folder is on.
pub fn btrfs_id(fd: impl AsFd) -> io::Result<[u8; 16]> {
    // SAFETY: BTRFS_IOC_FS_INFO writes 1024 bytes through its argument; other file systems refuse it.
    let info = unsafe { ioctl(fd, Getter::<BTRFS_IOC_FS_INFO, [u64; 128]>::new()) }?;
    let mut id = [0; 16];
    // Behind two integers. The kernel wrote bytes, whatever the order within our words.
    #[allow(clippy::host_endian_bytes)]
    for (half, word) in id.chunks_exact_mut(8).zip(&info[2..4]) {
        half.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(id)
}

/// Device (as the kernel packs it) and inode number of the file beneath an open loop device.
pub fn loop_file(fd: impl AsFd) -> io::Result<(u64, u64)> {
    // SAFETY: LOOP_GET_STATUS64 writes 232 bytes through its argument; other devices refuse it.
    let info = unsafe { ioctl(fd, Getter::<LOOP_GET_STATUS64, [u64; 29]>::new()) }?;
    Ok((info[0], info[1]))
}

/// Locks one byte of a file that other processes may have open too, or fails at once. The lock is the process's, not the
/// open file's: who shares the open file is kept out, the other threads of this process are not.
pub fn lock_byte(fd: impl AsFd, at: u64) -> io::Result<()> {
    set_byte_lock(fd, at, libc::F_WRLCK)
}

/// Ends [`lock_byte`]; no error if this process does not have it.
pub fn unlock_byte(fd: impl AsFd, at: u64) -> io::Result<()> {
    set_byte_lock(fd, at, libc::F_UNLCK)
}

fn set_byte_lock(fd: impl AsFd, at: u64, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a zeroed struct flock is a valid one; what matters is set below.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at as libc::off_t;
    lock.l_len = 1;
    // SAFETY: F_SETLK reads a struct flock that lives through the call; the descriptor is open for the whole call.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLK, &raw const lock) }).map(drop)
}

/// From now on SIGTERM, SIGINT and SIGHUP do nothing to this thread and those that it starts, and come out of the
/// descriptor instead.
pub fn ending_signals() -> io::Result<OwnedFd> {
    // SAFETY: a zeroed set is memory that sigemptyset may write to.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours and the signals exist.
    unsafe {
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
    }
    // SAFETY: reads a set that was filled above; blocking signals breaks no memory.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => {}
        e => return Err(io::Error::from_raw_os_error(e)),
    }
    // SAFETY: reads a set that was filled above.
    let fd = check(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: the kernel just made it, and nobody else knows the number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes a read lease. While it is held nobody has the file open for writing; who wants to waits for [`end_lease`].
pub(crate) fn take_read_lease(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // A break sends SIGIO, which would end the process; SIGURG is ignored unless somebody asks for it. It is chosen
    // before the lease is taken, so that there is no moment in which a break could end us. We poll and need neither.
    // SAFETY: F_SETSIG takes an int; the descriptor is open for the whole call.
    check(unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) })?;
    // SAFETY: F_SETLEASE takes an int; the descriptor is open for the whole call.
    check(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) })?;
    // With no owner no signal is sent at all.
    // SAFETY: F_SETOWN takes an int; the descriptor is open for the whole call.
    check(unsafe { libc::fcntl(fd, libc::F_SETOWN, 0) })?;
    Ok(())
}

/// Whether the read lease is held and nobody waits for it to end.
pub(crate) fn lease_is_whole(fd: impl AsFd) -> bool {
    // SAFETY: F_GETLEASE takes no argument; the descriptor is open for the whole call.
    // While a break is pending it answers with what we must change to, F_UNLCK.
    unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) == libc::F_RDLCK }
}

/// Gives the lease back and lets waiting writers go on.
pub(crate) fn end_lease(fd: impl AsFd) {
    // It fails only if there is no lease, which is what is wanted.
    // SAFETY: F_SETLEASE takes an int; the descriptor is open for the whole call.
    unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Starts writing a file's dirty pages back and does not wait.
pub(crate) fn start_writeback(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: takes integers only; the descriptor is open for the whole call. Length 0 means to the end.
    check(unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) }).map(drop)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
