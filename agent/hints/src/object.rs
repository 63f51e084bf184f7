//! The compiled program: an ELF file as clang writes it for BPF. It is our own, from within this binary.
//!
//! Read first: [`Object::parse`] and [`Object::link`].

use std::collections::BTreeMap;

/// The object is not as clang writes it. Tests see to it that the one that is shipped is.
#[derive(Debug, thiserror::Error)]
#[error("the eBPF object is damaged: {0}")]
pub struct BadObject(pub &'static str);

const CODE_TO_DATA: u32 = 1;
const CODE_TO_CODE: u32 = 10;
/// Load of eight bytes that follow in two instructions, and the mark that these are a map's descriptor.
const LOAD_WIDE: u8 = 0x18;
const MAP_DESCRIPTOR: u8 = 1;
const CALL: u8 = 0x85;
const CALL_OWN: u8 = 1;

/// An instruction: operation, registers, offset, immediate.
pub type Instruction = [u8; 8];

/// A function as it lies in the object.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its own name.
    pub name: String,
    /// The name of its section, for a program "tp_btf/TRACEPOINT".
    pub section: String,
    /// Bytes from the beginning of the section.
    pub offset: usize,
    /// The code before relocation.
    pub code: Vec<Instruction>,
    /// Instruction and symbol.
    relocations: Vec<(usize, usize)>,
}

/// A parsed object.
#[derive(Debug)]
pub struct Object {
    /// Types.
    pub btf: Vec<u8>,
    /// Which functions and fields the code has.
    pub btf_ext: Vec<u8>,
    pub license: String,
    pub functions: Vec<Function>,
    symbols: Vec<Symbol>,
}

#[derive(Clone, Debug)]
struct Symbol {
    name: String,
    section: usize,
    offset: usize,
    size: usize,
    is_function: bool,
}

/// A program with what it calls, ready but for the kernel's fields.
#[derive(Debug)]
pub struct Linked {
    pub code: Vec<Instruction>,
    /// First instruction and index in [`Object::functions`].
    pub functions: Vec<(usize, usize)>,
}

/// Little-endian integers of untrusted length.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn u16(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.0.get(at..)?.first_chunk().copied()?))
    }
    pub fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.0.get(at..)?.first_chunk().copied()?))
    }
    fn u64(&self, at: usize) -> Option<usize> {
        usize::try_from(u64::from_le_bytes(self.0.get(at..)?.first_chunk().copied()?)).ok()
    }
    pub fn text(&self, at: usize) -> Option<&str> {
        let rest = self.0.get(at..)?;
        std::str::from_utf8(&rest[..rest.iter().position(|b| *b == 0)?]).ok()
    }
}

struct Section<'a> {
    name: String,
    kind: u32,
    link: usize,
    info: usize,
    data: &'a [u8],
}

const SYMBOLS: u32 = 2;
const NO_BITS: u32 = 8;
const RELOCATIONS: u32 = 9;

impl Object {
    /// Takes an object apart.
    pub fn parse(file: &[u8]) -> Result<Self, BadObject> {
        let sections = sections(file).ok_or(BadObject("sections"))?;
        let named = |name: &str| sections.iter().find(|s| s.name == name).map(|s| s.data);
        let table = sections.iter().find(|s| s.kind == SYMBOLS).ok_or(BadObject("no symbols"))?;
        let names = Bytes(sections.get(table.link).ok_or(BadObject("no names"))?.data);
        let symbols: Option<Vec<_>> = table.data.chunks_exact(24).map(|raw| symbol(raw, &names)).collect();
        let symbols = symbols.ok_or(BadObject("symbols"))?;
        let license = Bytes(named("license").ok_or(BadObject("no licence"))?).text(0).unwrap_or_default().to_owned();
        let mut functions = Vec::new();
        for symbol in symbols.iter().filter(|s| s.is_function) {
            functions.push(function(symbol, &sections).ok_or(BadObject("function"))?);
        }
        let btf = named(".BTF").ok_or(BadObject("no types"))?.to_vec();
        let btf_ext = named(".BTF.ext").ok_or(BadObject("no type extensions"))?.to_vec();
        Ok(Self { btf, btf_ext, license, functions, symbols })
    }

    /// The programs, by index, with the tracepoints that they are for.
    pub fn programs(&self) -> impl Iterator<Item = (usize, &str)> {
        self.functions.iter().enumerate().filter_map(|(i, f)| Some((i, f.section.strip_prefix("tp_btf/")?)))
    }

    /// Puts a program and all functions that it calls behind each other. Code comes already with the kernel's fields.
    pub fn link(&self, program: usize, maps: &BTreeMap<&str, i32>) -> Result<Linked, BadObject> {
        let (mut code, mut starts, mut wanted) = (Vec::new(), BTreeMap::new(), vec![program]);
        let mut order = Vec::new();
        while let Some(index) = wanted.pop() {
            if starts.contains_key(&index) {
                continue;
            }
            starts.insert(index, code.len());
            order.push((code.len(), index));
            code.extend_from_slice(&self.functions[index].code);
            wanted.extend(self.calls(index).map(|(_, callee)| callee));
        }
        for &(start, index) in &order {
            for &(at, symbol) in &self.functions[index].relocations {
                let name = self.symbols.get(symbol).map_or("", |s| s.name.as_str());
                let place = code.get_mut(start + at).ok_or(BadObject("relocation"))?;
                if place[0] == LOAD_WIDE {
                    place[1] = place[1] & 0xf | MAP_DESCRIPTOR << 4;
                    let descriptor = maps.get(name).ok_or(BadObject("unknown map"))?;
                    place[4..].copy_from_slice(&descriptor.to_le_bytes());
                }
            }
            for (at, callee) in self.calls(index) {
                let (from, to) = ((start + at) as i32, starts[&callee] as i32);
                code[start + at][4..].copy_from_slice(&(to - from - 1).to_le_bytes());
            }
        }
        Ok(Linked { code, functions: order })
    }

    /// Calls of our own functions: instruction and function.
    fn calls(&self, index: usize) -> impl Iterator<Item = (usize, usize)> {
        let function = &self.functions[index];
        function.relocations.iter().filter_map(|&(at, symbol)| {
            let is_call = function.code[at][0] == CALL && function.code[at][1] >> 4 == CALL_OWN;
            let name = &self.symbols.get(symbol)?.name;
            let callee = self.functions.iter().position(|f| f.name == *name)?;
            is_call.then_some((at, callee))
        })
    }
}

fn sections(file: &[u8]) -> Option<Vec<Section<'_>>> {
    let bytes = Bytes(file);
    // 64 bits, little-endian, for the machine BPF.
    if !file.starts_with(b"\x7fELF\x02\x01") || bytes.u16(18)? != 247 {
        return None;
    }
    let (table, size, count, names) =
        (bytes.u64(40)?, bytes.u16(58)? as usize, bytes.u16(60)? as usize, bytes.u16(62)? as usize);
    let header = |i: usize| table.checked_add(i.checked_mul(size)?);
    let data = |i: usize| {
        let at = header(i)?;
        let (offset, size) = (bytes.u64(at + 24)?, bytes.u64(at + 32)?);
        if bytes.u32(at + 4)? == NO_BITS { Some(&[][..]) } else { file.get(offset..offset.checked_add(size)?) }
    };
    let all_names = Bytes(data(names)?);
    (0..count)
        .map(|i| {
            let at = header(i)?;
            let name = all_names.text(bytes.u32(at)? as usize)?.to_owned();
            let (kind, link, info) = (bytes.u32(at + 4)?, bytes.u32(at + 40)? as usize, bytes.u32(at + 44)? as usize);
            Some(Section { name, kind, link, info, data: data(i)? })
        })
        .collect()
}

fn symbol(raw: &[u8], names: &Bytes<'_>) -> Option<Symbol> {
    let raw = Bytes(raw);
    let name = names.text(raw.u32(0)? as usize)?.to_owned();
    let is_function = raw.0[4] & 0xf == 2;
    Some(Symbol { name, section: raw.u16(6)? as usize, offset: raw.u64(8)?, size: raw.u64(16)?, is_function })
}

fn function(symbol: &Symbol, sections: &[Section<'_>]) -> Option<Function> {
    let section = sections.get(symbol.section)?;
    let range = symbol.offset..symbol.offset.checked_add(symbol.size)?;
    let code =
        section.data.get(range.clone())?.chunks_exact(8).map(|c| [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
    let mut relocations = Vec::new();
    for table in sections.iter().filter(|s| s.kind == RELOCATIONS && s.info == symbol.section) {
        for raw in table.data.chunks_exact(16).map(Bytes) {
            let at = raw.u64(0)?;
            if range.contains(&at) {
                let kind = raw.u32(8)?;
                (kind == CODE_TO_DATA || kind == CODE_TO_CODE).then_some(())?;
                relocations.push(((at - range.start) / 8, raw.u32(12)? as usize));
            }
        }
    }
    let (name, section) = (symbol.name.clone(), section.name.clone());
    Some(Function { name, section, offset: symbol.offset, code: code.collect(), relocations })
}
