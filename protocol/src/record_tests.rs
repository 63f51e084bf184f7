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

#[test]
fn a_frame_that_grows_past_its_block_is_refused() {
    let bomb = zstd::bulk::compress(&vec![1; 1 << 28], 1).expect("zstd");
    let body =
        RecordBody::Data { digest: BlockDigest([1; 32]), encoding: Encoding::Zstd, payload_len: bomb.len() as u32 };
    let header = RecordHeader { volume: VolumeSlot(0), block: BlockIndex(0), capture: CaptureNumber(0), body };
    let found = Verifier::new().expect("zstd").verify(&header, &bomb, geometry()).err();
    assert_eq!(found, Some(RecordError::Decompress(BlockIndex(0))));
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
