//! The kernel's doors: the `bpf` system call and memory shared with a program. Nothing is decided here.
//!
//! All `unsafe` of this crate is in this module: neither rustix nor memmap2 has a safe form of these.
#![allow(unsafe_code, reason = "the bpf system call and atomics on memory shared with the kernel")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{MmapOptions, MmapRaw};

// <linux/bpf.h>; libc does not have them.
const MAP_CREATE: u32 = 0;
const MAP_LOOKUP: u32 = 1;
const MAP_UPDATE: u32 = 2;
const MAP_DELETE: u32 = 3;
const PROG_LOAD: u32 = 5;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const OBJ_INFO: u32 = 15;
const RAW_TRACEPOINT_OPEN: u32 = 17;
const BTF_LOAD: u32 = 18;
const PROG_TYPE_TRACING: u32 = 26;
const ATTACH_RAW_TRACEPOINT: u32 = 23;

/// The kinds of map in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapKind {
    Hash = 1,
    Array = 2,
    ArrayOfMaps = 12,
}

/// The memory of the map can be mapped by the agent.
pub const MAPPABLE: u32 = 1 << 10;
/// Maps of other sizes can take its place in an array of maps.
pub const INNER: u32 = 1 << 12;

/// What a map is made as.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapShape {
    pub kind: MapKind,
    pub key: u32,
    pub value: u32,
    pub entries: u32,
    pub flags: u32,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    numa_node: u32,
    name: [u8; 16],
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    btf: u32,
    func_info_size: u32,
    func_info: u64,
    func_info_count: u32,
    line_info_size: u32,
    line_info: u64,
    line_info_count: u32,
    attach_type_id: u32,
    attach_to: u32,
    pad: u32,
}

#[repr(C)]
struct BtfLoad {
    btf: u64,
    log: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    pad: u32,
}

#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct Attach {
    name: u64,
    program: u32,
    pad: u32,
}

#[repr(C)]
struct ObjInfo {
    fd: u32,
    size: u32,
    info: u64,
}

fn bpf<T>(command: u32, attributes: &T) -> io::Result<i32> {
    // SAFETY: every T here is a prefix of `union bpf_attr` for its command, without padding that is not named; the
    // kernel reads size_of::<T>() bytes of it. What its addresses point to is alive: the callers borrow it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn descriptor(result: io::Result<i32>) -> io::Result<OwnedFd> {
    // SAFETY: the command gave a new descriptor (close-on-exec) that nobody else has.
    result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd() as u32
}

fn short(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    // The last byte ends it.
    out.iter_mut().take(15).zip(name.bytes()).for_each(|(o, b)| *o = b);
    out
}

/// Makes a map; an array of maps needs one of those to know their shape.
pub fn map_create(name: &str, shape: MapShape, inner: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let MapShape { kind, key, value, entries, flags } = shape;
    let (inner, name) = (inner.map_or(0, number), short(name));
    descriptor(bpf(MAP_CREATE, &MapCreate { kind: kind as u32, key, value, entries, flags, inner, numa_node: 0, name }))
}

/// The id of the map in a place of an array of maps.
pub fn map_get(map: impl AsFd, key: u32) -> io::Result<u32> {
    let mut value = 0u32;
    let (key, out) = (&raw const key as u64, &raw mut value as u64);
    bpf(MAP_LOOKUP, &Element { map: number(map), pad: 0, key, value: out, flags: 0 })?;
    Ok(value)
}

/// Puts a map into a place of an array of maps. When this returns no program still runs that may have seen what was
/// there before, or any shared memory as it was before: the kernel waits for them (since 5.0).
pub fn map_put(map: impl AsFd, key: u32, value: impl AsFd) -> io::Result<()> {
    let value = number(value);
    let (key, value) = (&raw const key as u64, &raw const value as u64);
    bpf(MAP_UPDATE, &Element { map: number(map), pad: 0, key, value, flags: 0 }).map(drop)
}

/// Empties a place of an array of maps, and waits as [`map_put`] does.
pub fn map_remove(map: impl AsFd, key: u32) -> io::Result<()> {
    bpf(MAP_DELETE, &Element { map: number(map), pad: 0, key: &raw const key as u64, value: 0, flags: 0 }).map(drop)
}

/// What is to be loaded.
pub struct Program<'a> {
    pub name: &'a str,
    /// Eight bytes each.
    pub instructions: &'a [[u8; 8]],
    pub license: &'a str,
    pub btf: BorrowedFd<'a>,
    /// Pairs of first instruction and type.
    pub functions: &'a [[u32; 2]],
    /// The kernel's type of the tracepoint.
    pub attach_type_id: u32,
}

/// Has the verifier look at a program; its words if it refuses.
pub fn program_load(program: &Program<'_>) -> Result<OwnedFd, (io::Error, String)> {
    let license = CString::new(program.license).unwrap_or_default();
    let load = |log: &mut [u8]| {
        descriptor(bpf(
            PROG_LOAD,
            &ProgLoad {
                kind: PROG_TYPE_TRACING,
                count: program.instructions.len() as u32,
                instructions: program.instructions.as_ptr() as u64,
                license: license.as_ptr() as u64,
                log_level: u32::from(!log.is_empty()),
                log_size: log.len() as u32,
                log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
                kernel: 0,
                flags: 0,
                name: short(program.name),
                interface: 0,
                attach_type: ATTACH_RAW_TRACEPOINT,
                btf: number(program.btf),
                func_info_size: 8,
                func_info: program.functions.as_ptr() as u64,
                func_info_count: program.functions.len() as u32,
                line_info_size: 0,
                line_info: 0,
                line_info_count: 0,
                attach_type_id: program.attach_type_id,
                attach_to: 0,
                pad: 0,
            },
        ))
    };
    load(&mut []).map_err(|error| (error, logged(load)))
}

/// Gives the kernel a program's types; its words if it refuses.
pub fn btf_load(btf: &[u8]) -> Result<OwnedFd, (io::Error, String)> {
    let load = |log: &mut [u8]| {
        descriptor(bpf(
            BTF_LOAD,
            &BtfLoad {
                btf: btf.as_ptr() as u64,
                log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
                size: btf.len() as u32,
                log_size: log.len() as u32,
                log_level: u32::from(!log.is_empty()),
                pad: 0,
            },
        ))
    };
    load(&mut []).map_err(|error| (error, logged(load)))
}

/// What the kernel says of what it refuses.
fn logged(load: impl Fn(&mut [u8]) -> io::Result<OwnedFd>) -> String {
    // 16 MiB, the most that old kernels take; the end is what tells.
    let mut log = vec![0; (16 << 20) - 1];
    let _ = load(&mut log);
    let text: Vec<u8> = log.into_iter().take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&text).into_owned()
}

/// Has the kernel call a program from now on, for as long as the result or a pin of it is there.
pub fn attach(program: impl AsFd) -> io::Result<OwnedFd> {
    descriptor(bpf(RAW_TRACEPOINT_OPEN, &Attach { name: 0, program: number(program), pad: 0 }))
}

/// Gives a map, program or link a name in bpffs.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(OBJ_PIN, &Pin { path: path.as_ptr() as u64, fd: number(object), flags: 0 }).map(drop)
}

/// Opens what has a name in bpffs.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    descriptor(bpf(OBJ_GET, &Pin { path: path.as_ptr() as u64, fd: 0, flags: 0 }))
}

/// As many words as the kernel has to say of an object, beginning with its kind and id.
pub fn info<const WORDS: usize>(object: impl AsFd) -> io::Result<[u32; WORDS]> {
    let mut info = [0u32; WORDS];
    let size = (WORDS * 4) as u32;
    // For all three kinds of object the words asked for are given by value; addresses in them stay zero.
    bpf(OBJ_INFO, &ObjInfo { fd: number(object), size, info: info.as_mut_ptr() as u64 })?;
    Ok(info)
}

/// A map's memory. All of it is there from the start: the kernel fills in the page table when it maps, so that no
/// access faults, and it does not swap it.
#[derive(Debug)]
pub struct Shared {
    memory: MmapRaw,
}

impl Shared {
    /// Maps an array map with elements of a multiple of eight bytes, this many bytes in all.
    pub fn new(map: &OwnedFd, bytes: usize) -> io::Result<Self> {
        Ok(Self { memory: MmapOptions::new().len(bytes).map_raw(map)? })
    }

    /// Words of eight bytes.
    pub fn len(&self) -> usize {
        self.memory.len() / 8
    }

    /// A word of eight bytes, counted in such.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.len(), "word {index} of {}", self.len());
        // SAFETY: inside the mapping (above) and aligned, since it begins at a page; the mapping lives as long as self.
        // The kernel's programs and other mappings of it access it atomically or in words of their own.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(index)) }
    }

    /// A word of four bytes, counted in such; never half of what is used as a word of eight.
    pub fn half(&self, index: usize) -> &AtomicU32 {
        assert!(index / 2 < self.len(), "half {index} of {}", self.len());
        // SAFETY: as in `word`.
        unsafe { AtomicU32::from_ptr(self.memory.as_mut_ptr().cast::<u32>().add(index)) }
    }
}
