//! System calls that rustix has no safe form of: leases and the ioctls of block devices. Nothing is decided here.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Getter, NoArg, Setter, ioctl};

// <linux/fs.h>; libc does not have them.
const BLKROGET: u32 = 0x125e;
const BLKRRPART: u32 = 0x125f;
const BLKFLSBUF: u32 = 0x1261;
const BLKZEROOUT: u32 = 0x127f;
const BLKGETSIZE64: u32 = rustix::ioctl::opcode::read::<usize>(0x12, 114);
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
