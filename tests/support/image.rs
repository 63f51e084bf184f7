//! Images, and what their digests must be: computed here from the bytes, without the agent.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use backhaul_protocol::digest::{BlockDigest, RangeDigest, VolumeDigester};
use backhaul_protocol::geometry::{Geometry, PageIndex};

/// Random numbers that can be had again: splitmix64, <https://prng.di.unimi.it/splitmix64.c>.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From `BACKHAUL_TEST_SEED`, else from the clock; printed, so that a failure can be had again.
    pub fn printed(test: &str) -> Self {
        let given = std::env::var("BACKHAUL_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            now.as_nanos() as u64
        });
        println!("{test}: BACKHAUL_TEST_SEED={seed}");
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `low` up to and without `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.number() % (high - low)
    }

    /// Bytes that do not compress.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.number().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// Makes an image of random bytes.
pub fn random(path: &Path, len: u64, random_numbers: &mut Random) {
    let file = File::create(path).expect("an image can be made");
    let mut at = 0;
    while at < len {
        let piece = random_numbers.bytes((len - at).min(4 << 20) as usize);
        file.write_all_at(&piece, at).expect("there is room");
        at += piece.len() as u64;
    }
}

/// Makes a sparse image: one hole.
pub fn sparse(path: &Path, len: u64) {
    File::create(path).and_then(|f| f.set_len(len)).expect("an image can be made");
}

/// Writes into an image, and closes it again.
pub fn write(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("the image is there");
    file.write_all_at(bytes, at).expect("there is room");
}

/// The `VolumeDigest` of a file or device, as hex.
pub fn digest(path: &Path, block_size: u32) -> String {
    use std::io::{Seek, SeekFrom};
    let mut file = File::open(path).expect("the volume is there");
    let length = file.seek(SeekFrom::End(0)).expect("it has a length");
    let geometry = Geometry::new(block_size, length).expect("a legal volume");
    let mut digester = VolumeDigester::new(geometry);
    let mut block = vec![0; block_size as usize];
    for page in (0..geometry.pages()).map(PageIndex) {
        let first = page.first_block().0;
        let digests: Vec<BlockDigest> = (0..geometry.page_blocks(page) as u64)
            .map(|i| {
                let at = (first + i) * u64::from(block_size);
                let len = (length - at).min(u64::from(block_size)) as usize;
                file.read_exact_at(&mut block[..len], at).expect("it can be read");
                BlockDigest::of(&block[..len])
            })
            .collect();
        digester.push(RangeDigest::of(&digests));
    }
    digester.finish().to_string()
}

/// Whether two files or devices hold the same bytes, as far as the shorter length of a file goes.
pub fn same(a: &Path, b: &Path) -> bool {
    let (a, b) = (File::open(a).expect("there"), File::open(b).expect("there"));
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let n = a.read_at(&mut x, at).expect("readable");
        if n == 0 {
            return b.read_at(&mut y, at).expect("readable") == 0;
        }
        if b.read_exact_at(&mut y[..n], at).is_err() || x[..n] != y[..n] {
            return false;
        }
        at += n as u64;
    }
}
