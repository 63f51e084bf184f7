//! Types: the kernel's own and the program's, and where in the running kernel the fields are that the program reads
//! ("compile once, run everywhere"). Only what our program needs: offsets of members, and whether there are any.
//!
//! Read first: [`relocate`].

use crate::object::{BadObject, Bytes, Function};

const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const PROTOTYPE: u32 = 13;
const VARIABLE: u32 = 14;
const SECTION: u32 = 15;
const DECLARATION_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

const FIELD_OFFSET: u32 = 0;
const FIELD_EXISTS: u32 = 2;

/// What the program needs is not in the kernel's types.
#[derive(Debug, thiserror::Error)]
pub enum BadTypes {
    /// Neither we nor clang wrote it.
    #[error("the kernel's types cannot be read: {0}")]
    Unreadable(&'static str),
    /// Another kernel than we know.
    #[error("the kernel's {0} is not as the program needs it")]
    Missing(String),
    /// Ours.
    #[error(transparent)]
    Object(#[from] BadObject),
}

/// A set of types in BTF.
pub struct Btf<'a> {
    bytes: Bytes<'a>,
    /// Where each type begins; the first is void.
    types: Vec<usize>,
    strings: usize,
}

struct Member {
    name: usize,
    kind: u32,
    bits: u32,
    is_bitfield: bool,
}

impl<'a> Btf<'a> {
    /// Finds where types begin.
    pub fn parse(data: &'a [u8]) -> Result<Self, BadTypes> {
        Self::find(data).ok_or(BadTypes::Unreadable("not BTF"))
    }

    fn find(data: &'a [u8]) -> Option<Self> {
        let bytes = Bytes(data);
        if bytes.u16(0)? != 0xeb9f {
            return None;
        }
        let header = bytes.u32(4)? as usize;
        let (at, len, strings) = (bytes.u32(8)? as usize, bytes.u32(12)? as usize, bytes.u32(16)? as usize);
        let (mut at, end) = (header + at, header + at + len);
        let mut types = vec![0];
        while at < end {
            types.push(at);
            at += 12 + tail(bytes.u32(at + 4)?)?;
        }
        Some(Self { bytes, types, strings: header + strings })
    }

    fn info(&self, id: u32) -> Option<(u32, u32)> {
        let at = *self.types.get(id as usize).filter(|at| **at != 0)?;
        let info = self.bytes.u32(at + 4)?;
        Some((info >> 24 & 0x1f, info & 0xffff))
    }

    fn text(&self, at: usize) -> Option<&str> {
        self.bytes.text(self.strings + at)
    }

    fn name(&self, id: u32) -> Option<&str> {
        self.text(self.bytes.u32(self.types[id as usize])? as usize)
    }

    /// Size in bytes of a number or structure; the type behind a typedef or pointer.
    fn size_or_type(&self, id: u32) -> Option<u32> {
        self.bytes.u32(self.types[id as usize] + 8)
    }

    /// All types of this kind with this name.
    fn named(&self, kinds: &[u32], name: &str) -> Vec<u32> {
        let is = |id: &u32| self.info(*id).is_some_and(|(k, _)| kinds.contains(&k)) && self.name(*id) == Some(name);
        (1..self.types.len() as u32).filter(is).collect()
    }

    /// The type of a tracepoint, if the kernel has it.
    pub fn tracepoint(&self, name: &str) -> Option<u32> {
        self.named(&[TYPEDEF], &format!("btf_trace_{name}")).first().copied()
    }

    /// How many arguments a tracepoint hands over.
    pub fn arguments(&self, tracepoint: u32) -> Option<u32> {
        let pointer = self.size_or_type(tracepoint)?;
        let (kind, count) = self.info(self.size_or_type(pointer)?)?;
        // The first is the tracepoint's own.
        (kind == PROTOTYPE).then(|| count.checked_sub(1))?
    }

    fn plain(&self, mut id: u32) -> Option<u32> {
        while matches!(self.info(id)?.0, TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG) {
            id = self.size_or_type(id)?;
        }
        Some(id)
    }

    fn members(&self, id: u32) -> Option<Vec<Member>> {
        let (kind, count) = self.info(id)?;
        (kind == STRUCT || kind == UNION).then_some(())?;
        let at = self.types[id as usize];
        let has_bitfields = self.bytes.u32(at + 4)? >> 31 == 1;
        let member = |i: usize| {
            let at = at + 12 + 12 * i;
            let bits = self.bytes.u32(at + 8)?;
            let (bits, is_bitfield) = if has_bitfields { (bits & 0xff_ffff, bits >> 24 != 0) } else { (bits, false) };
            Some(Member { name: self.bytes.u32(at)? as usize, kind: self.bytes.u32(at + 4)?, bits, is_bitfield })
        };
        (0..count as usize).map(member).collect()
    }

    /// Offset in bytes and type of a member, also of one inside members without names.
    fn member(&self, id: u32, name: &str) -> Option<(u32, u32)> {
        for member in self.members(id)? {
            let (base, its) = (member.bits / 8, self.text(member.name)?);
            if its == name {
                return (!member.is_bitfield).then_some((base, self.plain(member.kind)?));
            }
            if its.is_empty()
                && let Some((offset, kind)) = self.plain(member.kind).and_then(|k| self.member(k, name))
            {
                return Some((base + offset, kind));
            }
        }
        None
    }

    fn size(&self, id: u32) -> Option<u32> {
        match self.info(id)?.0 {
            PTR => Some(8),
            INT | ENUM | ENUM64 | STRUCT | UNION => self.size_or_type(id),
            _ => None,
        }
    }

    /// Offset, and size of a number or pointer, of a chain of members of a structure.
    fn chain(&self, root: &str, names: &[String]) -> Option<(u32, u32)> {
        // The kernel has more than one structure of a name now and then: all that have the members must agree.
        let walk = |id: u32| {
            let end = names.iter().try_fold((0, id), |(offset, id), name| {
                let (more, kind) = self.member(id, name)?;
                Some((offset + more, kind))
            });
            end.and_then(|(offset, kind)| Some((offset, self.size(kind)?)))
        };
        let mut found = self.named(&[STRUCT], root).into_iter().filter_map(walk);
        let first = found.next()?;
        found.all(|other| other == first).then_some(first)
    }
}

/// Bytes of a type after its first twelve.
fn tail(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    Some(match info >> 24 & 0x1f {
        INT | VARIABLE | DECLARATION_TAG => 4,
        ARRAY => 12,
        STRUCT | UNION | SECTION | ENUM64 => 12 * count,
        ENUM | PROTOTYPE => 8 * count,
        0 | 20.. => return None,
        _ => 0,
    })
}

/// The program's types as every kernel takes them: variables and sections, which only some know and which our loader
/// has no use for, become numbers and structures.
pub fn without_variables(data: &[u8]) -> Result<Vec<u8>, BadTypes> {
    let btf = Btf::parse(data)?;
    let mut out = data.to_vec();
    for &at in &btf.types[1..] {
        let info = btf.bytes.u32(at + 4).unwrap_or(0);
        let (kind, rest) = match info >> 24 & 0x1f {
            VARIABLE => (INT, 0),
            SECTION => (STRUCT, info & 0xffff),
            _ => continue,
        };
        out[at..at + 4].fill(0);
        out[at + 4..at + 8].copy_from_slice(&(kind << 24 | rest).to_le_bytes());
        out[at + 8..at + 12].copy_from_slice(&4u32.to_le_bytes());
        if kind == INT {
            out[at + 12..at + 16].copy_from_slice(&32u32.to_le_bytes());
        }
        for member in 0..rest as usize {
            let at = at + 12 + 12 * member;
            // Type, offset and size become name, type and offset. None must lie beyond its structure.
            out.copy_within(at..at + 4, at + 4);
            out[at..at + 4].fill(0);
            out[at + 8..at + 12].fill(0);
        }
    }
    Ok(out)
}

/// The records of one part of the extension, by section: its name and the record's words.
fn records<'e>(own: &Btf<'_>, ext: &'e [u8], part: usize) -> Option<Vec<(String, Vec<u32>)>> {
    let bytes: Bytes<'e> = Bytes(ext);
    let header = bytes.u32(4)? as usize;
    let (start, len) = (header + bytes.u32(8 + 8 * part)? as usize, bytes.u32(12 + 8 * part)? as usize);
    let size = bytes.u32(start)? as usize;
    let (mut at, end) = (start + 4, start + len);
    let mut out = Vec::new();
    while at < end {
        let name = own.text(bytes.u32(at)? as usize)?.to_owned();
        let count = bytes.u32(at + 4)?;
        at += 8;
        for _ in 0..count {
            let words: Option<Vec<u32>> = (0..size / 4).map(|i| bytes.u32(at + 4 * i)).collect();
            out.push((name.clone(), words?));
            at += size;
        }
    }
    Some(out)
}

/// The type of each function, by section and offset.
pub fn function_types(own: &Btf<'_>, ext: &[u8]) -> Result<Vec<(String, usize, u32)>, BadTypes> {
    let all = records(own, ext, 0).ok_or(BadObject("function types"))?;
    Ok(all.into_iter().map(|(section, words)| (section, words[0] as usize, words[1])).collect())
}

/// Writes where the kernel has its fields into the code.
pub fn relocate(own: &Btf<'_>, ext: &[u8], kernel: &Btf<'_>, functions: &mut [Function]) -> Result<(), BadTypes> {
    for (section, words) in records(own, ext, 2).ok_or(BadObject("field relocations"))? {
        let &[at, kind, access, what] = words.as_slice() else { return Err(BadObject("field relocation").into()) };
        let at = at as usize;
        let inside = |f: &&mut Function| f.section == section && (f.offset..f.offset + 8 * f.code.len()).contains(&at);
        let function = functions.iter_mut().find(inside).ok_or(BadObject("field outside code"))?;
        let instruction = &mut function.code[(at - function.offset) / 8];
        let (root, names) = names(own, kind, access).ok_or(BadObject("field"))?;
        // Structures that differ from kernel to kernel are told apart by what follows three underscores.
        let root = root.split("___").next().unwrap_or_default();
        match (what, kernel.chain(root, &names)) {
            (FIELD_EXISTS, found) => put(instruction, u32::from(found.is_some())),
            (FIELD_OFFSET, Some((offset, size))) => check_size(instruction, size)
                .then(|| put(instruction, offset))
                .ok_or_else(|| BadTypes::Missing(format!("{root}.{}", names.join("."))))?,
            (FIELD_OFFSET, None) if names.first().is_some_and(|n| n == "rq_disk") => poison(instruction),
            (FIELD_OFFSET, None) => return Err(BadTypes::Missing(format!("{root}.{}", names.join(".")))),
            _ => return Err(BadObject("unknown field relocation").into()),
        }
    }
    Ok(())
}

/// The structure and the names of members that a relocation such as "0:3:1" means.
fn names(own: &Btf<'_>, kind: u32, access: u32) -> Option<(String, Vec<String>)> {
    let mut id = own.plain(kind)?;
    let root = own.name(id)?.to_owned();
    let path: Option<Vec<usize>> = own.text(access as usize)?.split(':').map(|n| n.parse().ok()).collect();
    let mut out = Vec::new();
    for &index in path?.get(1..)? {
        let members = own.members(id)?;
        let member = members.get(index)?;
        out.push(own.text(member.name)?.to_owned());
        id = own.plain(member.kind)?;
    }
    Some((root, out))
}

const CLASS: u8 = 7;

/// A load reads as many bytes as the kernel's field has; other instructions only compute addresses.
fn check_size(instruction: &[u8; 8], size: u32) -> bool {
    let loads = match instruction[0] >> 3 & 3 {
        0 => 4,
        1 => 2,
        2 => 1,
        _ => 8,
    };
    // LDX, ST, STX.
    !matches!(instruction[0] & CLASS, 1..=3) || loads == size
}

fn put(instruction: &mut [u8; 8], value: u32) {
    match instruction[0] & CLASS {
        1..=3 => instruction[2..4].copy_from_slice(&(value as u16).to_le_bytes()),
        _ => instruction[4..].copy_from_slice(&value.to_le_bytes()),
    }
}

/// A call that no kernel has: the verifier refuses it where it can be reached, and here it cannot.
fn poison(instruction: &mut [u8; 8]) {
    *instruction = [0x85, 0, 0, 0, 0x10, 0x23, 0xad, 0x0b];
}
