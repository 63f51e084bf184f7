use proptest::prelude::*;

use super::*;

fn geometry() -> Geometry {
    Geometry::new(65536, 10 * 65536 + 100).expect("legal")
}

fn encoded(block: u64, plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = Encoder::new(1).expect("zstd");
    encoder.encode(VolumeSlot(3), BlockIndex(block), CaptureNumber(9), BlockDigest::of(plain), plain, &mut out);
    out
}

fn open(bytes: &[u8]) -> Result<Vec<u8>, RecordError> {
    let Split { header, payload, rest } = split_record(bytes)?.ok_or(RecordError::Bounds("length"))?;
    assert!(rest.is_empty());
    Ok(Verifier::new().expect("zstd").verify(&header, payload, geometry())?.bytes().to_vec())
}

#[test]
fn what_does_not_compress_is_stored_raw() {
    let mut random = vec![0; 65536];
    blake3::Hasher::new().finalize_xof().fill(&mut random);
    let record = encoded(0, &random);
    assert_eq!(record.len(), HEADER_LEN + 65536);
    assert_eq!(open(&record).as_deref(), Ok(&random[..]));
    assert!(encoded(0, &[7; 65536]).len() < 200);
    assert_eq!(open(&encoded(10, &[7; 100])).as_deref(), Ok(&[7; 100][..]));
    assert_eq!(open(&encoded(10, &[7; 1])).err(), Some(RecordError::Bounds("payload length")));
}

fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut random = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut random);
    random
}

/// Payload bytes of such blocks, one after the other.
fn sizes<'a>(encoder: &mut Encoder, blocks: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<usize> {
    let size = |plain: &Vec<u8>| {
        let mut out = Vec::new();
        encoder.encode(VolumeSlot(3), BlockIndex(0), CaptureNumber(9), BlockDigest::of(plain), plain, &mut out);
        assert_eq!(open(&out).as_ref(), Ok(plain));
        out.len() - HEADER_LEN
    };
    blocks.into_iter().map(size).collect()
}

#[test]
fn effort_changes_from_one_block_to_the_next() {
    let plain: Vec<u8> = (0..65536u32).flat_map(|i| (i * i / 7 % 251).to_le_bytes()).take(65536).collect();
    let mut encoder = Encoder::new(1).expect("zstd");
    let mut with = |effort| {
        encoder.set_effort(effort).expect("zstd");
        sizes(&mut encoder, [&plain])[0]
    };
    let [none, fast, hard] = [Effort::None, Effort::Level(-7), Effort::Level(6)].map(&mut with);
    assert!(none == 65536 && fast < none && hard < fast, "{none} {fast} {hard}");
    assert_eq!([Effort::Level(-7), Effort::None, Effort::Level(6)].map(with), [fast, none, hard]);
}

/// Skipping what looks random must not cost a byte where something can be made smaller.
#[test]
fn among_random_blocks_what_can_be_smaller_is_made_smaller() {
    // Text, numbers, one byte in eight that is known, and random bytes that come again.
    let text: Vec<u8> = random(1, 65536).iter().map(|b| b'a' + b % 26).collect();
    let numbers: Vec<u8> = (0..8192u64).flat_map(|i| ((1 << 40) | (i * 37)).to_le_bytes()).collect();
    let mut sparse = random(2, 65536);
    sparse.iter_mut().step_by(8).for_each(|b| *b = 0);
    let compressible = [text, numbers, sparse];
    let noise: Vec<Vec<u8>> = (10..18).map(|seed| random(seed, 65536)).collect();
    for plain in &compressible {
        let alone = sizes(&mut Encoder::new(1).expect("zstd"), [plain])[0];
        let mut encoder = Encoder::new(1).expect("zstd");
        let after = sizes(&mut encoder, noise.iter().chain([plain]));
        assert!(after[..8].iter().all(|n| *n == 65536) && after[8] == alone && alone < 65536, "{after:?}, {alone}");
    }
    // What was not tried was not in vain.
    // Again after 20,000 bytes: none of the sampled places has the bytes of another.
    let again: Vec<u8> = random(3, 20_000).into_iter().cycle().take(65536).collect();
    assert!(looks_random(&again));
    let mut encoder = Encoder::new(1).expect("zstd");
    encoder.set_effort(Effort::None).expect("zstd");
    assert!(sizes(&mut encoder, &noise).iter().all(|n| *n == 65536));
    encoder.set_effort(Effort::Level(1)).expect("zstd");
    assert!(sizes(&mut encoder, [&again])[0] < 40000);
    // What only comes again looks random: it is found when one is tried, and from then on.
    let many = vec![again; 40];
    let found = sizes(&mut Encoder::new(1).expect("zstd"), noise.iter().chain(&many));
    assert!(found[8..].iter().filter(|n| **n > 40000).count() <= 16, "{found:?}");
}

#[test]
fn random_bytes_look_random_and_nothing_else_does() {
    assert!((0..200).all(|seed| looks_random(&random(seed, 65536))));
    let coded: Vec<u8> = random(5, 65536).iter().map(|b| b & 0x7f).collect();
    assert!(!looks_random(&coded) && !looks_random(&[7; 65536]) && !looks_random(&random(1, 1000)));
}

#[test]
fn a_frame_that_grows_past_its_block_is_refused() {
    let bomb = frame(&vec![1; 1 << 28], |_| Ok(()));
    assert!(is_plain_frame(&bomb));
    let body =
        RecordBody::Data { digest: BlockDigest([1; 32]), encoding: Encoding::Zstd, payload_len: bomb.len() as u32 };
    let header = RecordHeader { volume: VolumeSlot(0), block: BlockIndex(0), capture: CaptureNumber(0), body };
    let found = Verifier::new().expect("zstd").verify(&header, &bomb, geometry()).err();
    assert_eq!(found, Some(RecordError::Decompress(BlockIndex(0))));
}

/// As the encoder writes them, but for what `change` sets.
fn frame(plain: &[u8], change: impl Fn(&mut zstd::bulk::Compressor<'_>) -> std::io::Result<()>) -> Vec<u8> {
    use zstd::zstd_safe::CParameter as P;
    let mut compressor = zstd::bulk::Compressor::new(1).expect("zstd");
    for parameter in [P::ContentSizeFlag(false), P::ChecksumFlag(false), P::DictIdFlag(false), P::WindowLog(20)] {
        compressor.set_parameter(parameter).expect("zstd");
    }
    change(&mut compressor).expect("zstd");
    compressor.compress(plain).expect("zstd")
}

/// What STORE.md forbids would be a point that other readers can't restore.
#[test]
fn only_one_plain_frame_is_taken() {
    use zstd::zstd_safe::CParameter as P;
    let plain = [7; 65536];
    let taken = |payload: &[u8]| {
        let payload_len = payload.len() as u32;
        let body = RecordBody::Data { digest: BlockDigest::of(&plain), encoding: Encoding::Zstd, payload_len };
        let header = RecordHeader { volume: VolumeSlot(0), block: BlockIndex(0), capture: CaptureNumber(0), body };
        match Verifier::new().expect("zstd").verify(&header, payload, geometry()) {
            Ok(_) => true,
            Err(e) => {
                assert_eq!(e, RecordError::Decompress(BlockIndex(0)));
                false
            }
        }
    };
    let good = frame(&plain, |_| Ok(()));
    assert!(taken(&good));
    assert!(!taken(&frame(&plain, |c| c.set_parameter(P::ContentSizeFlag(true)))), "content size");
    assert!(!taken(&frame(&plain, |c| c.set_parameter(P::ChecksumFlag(true)))), "checksum");
    let halves = [frame(&plain[..30_000], |_| Ok(())), frame(&plain[30_000..], |_| Ok(()))].concat();
    assert!(!taken(&halves), "two frames");
    let skippable = [&0x184D_2A50_u32.to_le_bytes()[..], &4_u32.to_le_bytes(), b"more"].concat();
    assert!(!taken(&[&skippable[..], &good].concat()), "a skippable frame before it");
    assert!(!taken(&[&good[..], &skippable].concat()), "a skippable frame behind it");
    assert!(!taken(&[&good[..], b"x"].concat()), "something behind it");
    let mut wide = good.clone();
    wide[5] = 11 << 3;
    assert!(!taken(&wide), "a window of 2 MiB");
    assert!(!taken(&good[..5]) && !taken(&[]), "less than a header");
}

proptest! {
    #[test]
    fn every_flipped_bit_is_noticed(plain in proptest::collection::vec(0u8..4, 65536), bit in 0usize..400_000) {
        let mut record = encoded(1, &plain);
        let bit = bit % (record.len() * 8);
        record[bit / 8] ^= 1 << (bit % 8);
        // Flips of volume, block and capture make a legal header of another block: whoever asked for one compares.
        if !(8 * 8..12 * 8).contains(&bit) && !(16 * 8..32 * 8).contains(&bit) {
            prop_assert!(open(&record).is_err() || open(&record).as_deref() == Ok(&plain[..]));
        }
    }

    #[test]
    fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = split_record(&bytes);
        let mut with_magic = bytes;
        if with_magic.len() >= 8 {
            with_magic[..8].copy_from_slice(b"BHB1\x02\0\0\0");
        }
        let _ = split_record(&with_magic);
    }
}
