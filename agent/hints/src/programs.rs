//! The programs that the kernel runs, and their pins.
//!
//! Read first: [`Programs::load`] and [`Programs::pinned`]. A loaded set has a folder of its own, "set-N", so that a new
//! version's programs run on the same maps before the old ones go: there is no moment without.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use crate::btf::{self, BadTypes, Btf};
use crate::doubt::Unavailable;
use std::sync::atomic::Ordering::SeqCst;

use crate::layout::{self, checksum};
use crate::object::Object;
use crate::sys::{self, MAPPABLE, MapKind, MapShape, Shared};

/// The program, compiled: `scripts/build-bpf.sh` makes it from `bpf/hints.bpf.c`.
pub const OBJECT: &[u8] = include_bytes!("../prebuilt/hints.bpf.o");

/// In this order they are attached: a write is noted before its completion is looked for.
pub const TRACEPOINTS: [&str; 3] = ["block_rq_complete", "block_bio_complete", "block_bio_queue"];

/// Three programs that run.
#[derive(Debug)]
pub struct Programs {
    programs: Vec<OwnedFd>,
    links: Vec<OwnedFd>,
    seen_map: OwnedFd,
    seen: Shared,
}

const SEEN: MapShape =
    MapShape { kind: MapKind::Array, key: 4, value: layout::SEEN as u32, entries: 1, flags: MAPPABLE };

/// The maps that they work on.
#[derive(Debug)]
pub struct Maps {
    pub table: OwnedFd,
    pub volumes: OwnedFd,
    pub flights: OwnedFd,
}

/// Tells builds of the program apart.
pub fn build(object: &[u8]) -> u64 {
    checksum(object.chunks(8).map(|c| c.iter().fold(0, |n, b| n << 8 | u64::from(*b))))
}

impl Programs {
    /// Loads and attaches an object's programs, and pins them in a new folder.
    pub fn load(object: &[u8], maps: &Maps, folder: &Path) -> Result<Self, Unavailable> {
        let kernel_file = std::fs::read("/sys/kernel/btf/vmlinux").map_err(Unavailable::NoTypes)?;
        let kernel = Btf::parse(&kernel_file).map_err(bad_kernel)?;
        let mut object = Object::parse(object).map_err(|e| bad_kernel(e.into()))?;
        let btf_bytes = btf::without_variables(&object.btf).map_err(bad_kernel)?;
        let own = Btf::parse(&btf_bytes).map_err(bad_kernel)?;
        let mut functions = std::mem::take(&mut object.functions);
        btf::relocate(&own, &object.btf_ext, &kernel, &mut functions).map_err(bad_kernel)?;
        object.functions = functions;
        let types = btf::function_types(&own, &object.btf_ext).map_err(bad_kernel)?;
        let btf = sys::btf_load(&btf_bytes).map_err(|(error, log)| refused("types", error, &log))?;
        std::fs::create_dir(folder).map_err(Unavailable::io("make a folder in bpffs"))?;
        let seen_map = sys::map_create("backhaul_seen", SEEN, None).map_err(Unavailable::io("make a BPF map"))?;
        let seen = Shared::new(&seen_map, layout::SEEN).map_err(Unavailable::io("map memory"))?;
        sys::pin(&seen_map, &folder.join("seen")).map_err(Unavailable::io("pin a map"))?;
        let fds = [("table", &maps.table), ("volumes", &maps.volumes), ("flights", &maps.flights), ("seen", &seen_map)];
        let fds: BTreeMap<&str, i32> = fds.into_iter().map(|(name, fd)| (name, fd.as_raw_fd())).collect();
        let (mut programs, mut links) = (Vec::new(), Vec::new());
        for tracepoint in TRACEPOINTS {
            let program = load_one(&object, tracepoint, &fds, &kernel, &types, &btf)?;
            let link = sys::attach(&program).map_err(Unavailable::io("attach the tracking program"))?;
            sys::pin(&program, &folder.join(format!("program-{tracepoint}")))
                .and_then(|()| sys::pin(&link, &folder.join(format!("link-{tracepoint}"))))
                .map_err(Unavailable::io("pin the tracking program"))?;
            crate::reach("hints.programs.pinned");
            programs.push(program);
            links.push(link);
        }
        Ok(Self { programs, links, seen_map, seen })
    }

    /// The programs of a folder, if all of them are there.
    pub fn pinned(folder: &Path) -> io::Result<Self> {
        let open = |what: &str| -> io::Result<Vec<OwnedFd>> {
            TRACEPOINTS.iter().map(|t| sys::pinned(&folder.join(format!("{what}-{t}")))).collect()
        };
        let seen_map = sys::pinned(&folder.join("seen"))?;
        let seen = Shared::new(&seen_map, layout::SEEN)?;
        Ok(Self { programs: open("program")?, links: open("link")?, seen_map, seen })
    }

    /// Sectors that these programs have seen written to the disk of a slot.
    pub fn seen(&self, slot: usize) -> u64 {
        self.seen.word(slot).load(SeqCst)
    }

    /// Each program's id (high) with its link's, and that of the map they count in. No number comes again before four
    /// thousand million others.
    pub fn ids(&self) -> io::Result<[u64; layout::IDS]> {
        let mut ids = [0; layout::IDS];
        let [_, seen] = sys::info(&self.seen_map)?;
        ids[TRACEPOINTS.len()] = seen.into();
        for ((id, program), link) in ids.iter_mut().zip(&self.programs).zip(&self.links) {
            let [_, program] = sys::info(program)?;
            // Kind, id, program.
            let [_, link, linked] = sys::info(link)?;
            if program != linked {
                return Err(io::Error::other("the link leads to another program"));
            }
            *id = u64::from(program) << 32 | u64::from(link);
        }
        Ok(ids)
    }

    /// Events that the kernel did not give to these programs since they were loaded, because the same program ran on
    /// that CPU already. One system call each and nothing else.
    pub fn missed(&self) -> io::Result<u64> {
        // recursion_misses in struct bpf_prog_info, kernel 5.12.
        const WORD: usize = 208 / 4;
        let mut sum = 0;
        for program in &self.programs {
            let info: [u32; WORD + 2] = sys::info(program)?;
            sum += u64::from(info[WORD]) | u64::from(info[WORD + 1]) << 32;
        }
        Ok(sum)
    }
}

fn load_one(
    object: &Object,
    tracepoint: &str,
    fds: &BTreeMap<&str, i32>,
    kernel: &Btf<'_>,
    types: &[(String, usize, u32)],
    btf: &OwnedFd,
) -> Result<OwnedFd, Unavailable> {
    let missing = |what: String| Unavailable::Kernel { release: release(), what };
    let type_id = kernel.tracepoint(tracepoint).ok_or_else(|| missing(format!("it has no tracepoint {tracepoint}")))?;
    let arguments = match tracepoint {
        "block_rq_complete" => 3,
        "block_bio_complete" => 2,
        _ => 1,
    };
    if kernel.arguments(type_id) != Some(arguments) {
        return Err(missing(format!("its tracepoint {tracepoint} has other arguments")));
    }
    let (program, _) = object.programs().find(|(_, t)| *t == tracepoint).ok_or_else(|| missing("no program".into()))?;
    let linked = object.link(program, fds).map_err(|e| bad_kernel(e.into()))?;
    let type_of = |index: usize| {
        let function = &object.functions[index];
        types.iter().find(|t| t.0 == function.section && t.1 == function.offset).map_or(0, |t| t.2)
    };
    let functions: Vec<[u32; 2]> = linked.functions.iter().map(|&(at, f)| [at as u32, type_of(f)]).collect();
    let loaded = sys::program_load(&sys::Program {
        name: &object.functions[program].name,
        instructions: &linked.code,
        license: &object.license,
        btf: btf.as_fd(),
        functions: &functions,
        attach_type_id: type_id,
    });
    loaded.map_err(|(error, log)| refused(tracepoint, error, &log))
}

fn refused(program: &str, error: io::Error, log: &str) -> Unavailable {
    let lockdown = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if error.raw_os_error() == Some(libc::EPERM) && lockdown.contains("[confidentiality]") {
        return Unavailable::Lockdown(error);
    }
    if log.trim().is_empty() && matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) {
        return Unavailable::Privilege(error);
    }
    // Long enough for the instruction and the reason.
    let lines: Vec<&str> = log.lines().filter(|l| !l.starts_with("processed ")).collect();
    let log = lines[lines.len().saturating_sub(12)..].join("\n");
    Unavailable::Verifier { program: program.to_owned(), error, log }
}

fn bad_kernel(error: BadTypes) -> Unavailable {
    Unavailable::Kernel { release: release(), what: error.to_string() }
}

pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
