//! Micro benches: `cargo bench -p backhaul-benches`. Ratios between them and over time are what counts; absolute figures
//! are those of the machine.

use std::hint::black_box;

use backhaul_benches::{BLOCK, mixed, object, records};
use backhaul_protocol::digest::{BlockDigest, RangeDigest};
use backhaul_protocol::geometry::{BlockIndex, Geometry, PageIndex};
use backhaul_protocol::ids::{CaptureNumber, CommitId, GroupId, VolumeSlot};
use backhaul_protocol::record::{Encoder, Verifier, split_record};
use backhaul_protocol::store::entry::{Content, Entry, Location};
use backhaul_protocol::store::map::{MapBuilder, Role};
use backhaul_protocol::store::segment::{DraftBinding, SegmentBuilder, read_index};
use backhaul_receiver::plan::reads::{MAX_GAP, MAX_READ, Wanted, plan_reads};
use backhaul_volume::VolumeError;
use backhaul_volume::mem::MemVolume;
use backhaul_volume::scan::{FILE_READ, PageScanner};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const BINDING: DraftBinding = DraftBinding { group: GroupId([1; 16]), base_commit: CommitId([2; 16]) };

fn scan(c: &mut Criterion) {
    let data = mixed(1024 * BLOCK);
    let geometry = Geometry::new(BLOCK as u32, data.len() as u64).expect("legal");
    let volume = MemVolume::new(data);
    let mut group = c.benchmark_group("scan");
    group.throughput(Throughput::Bytes(geometry.length()));
    let mut scanner = PageScanner::new(geometry, FILE_READ);
    group.bench_function("page_64MiB", |b| {
        b.iter(|| {
            scanner.scan::<VolumeError>(&volume, geometry, PageIndex(0), |_, _, _| Ok(())).expect("memory reads")
        });
    });
    let zeroes = MemVolume::zeroed(1024 * BLOCK);
    group.bench_function("zero_page_64MiB", |b| {
        b.iter(|| {
            scanner.scan::<VolumeError>(&zeroes, geometry, PageIndex(0), |_, _, _| Ok(())).expect("memory reads")
        });
    });
    group.finish();
}

fn record(c: &mut Criterion) {
    let plain = mixed(BLOCK);
    let digest = BlockDigest::of(&plain);
    let geometry = Geometry::new(BLOCK as u32, BLOCK as u64).expect("legal");
    let mut group = c.benchmark_group("record");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    for level in [-5, 1, 3] {
        let mut encoder = Encoder::new(level).expect("zstd");
        let mut out = Vec::with_capacity(2 * BLOCK);
        group.bench_function(format!("encode_level_{level}"), |b| {
            b.iter(|| {
                out.clear();
                encoder.encode(VolumeSlot(0), BlockIndex(0), CaptureNumber(1), digest, &plain, &mut out);
            });
        });
    }
    let bytes = records(1);
    let split = split_record(&bytes).expect("own bytes").expect("whole");
    let mut verifier = Verifier::new().expect("zstd");
    group.bench_function("verify", |b| {
        b.iter(|| black_box(verifier.verify(&split.header, split.payload, geometry).expect("own bytes").digest()));
    });
    group.finish();
}

fn segment(c: &mut Criterion) {
    let bytes = records(512);
    let build = || {
        let mut builder = SegmentBuilder::with_capacity(16 << 20);
        let mut rest = &bytes[..];
        while let Some(split) = split_record(rest).expect("own bytes") {
            builder.push(&split.header, split.payload);
            rest = split.rest;
        }
        builder
    };
    let mut group = c.benchmark_group("segment");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("build_and_seal", |b| b.iter(|| black_box(build().seal(BINDING, object(0)).bytes.len())));
    let sealed = build().seal(BINDING, object(0));
    let index = sealed.bytes[sealed.reference.index_offset as usize..].to_vec();
    group.bench_function("read_index_512", |b| {
        b.iter(|| read_index(&sealed.reference, &index).expect("own bytes").len())
    });
    group.finish();
}

fn entries(page: u64) -> Vec<Entry> {
    let entry = |i: u64| Entry {
        block: BlockIndex(page * 1024 + i),
        count: 1,
        capture: CaptureNumber(page * 1024 + i),
        content: Content::Data {
            digest: BlockDigest([i as u8 | 1; 32]),
            location: Location {
                object: object(i as u32 / 700),
                offset: 160 + (i as u32 % 700) * 22_000,
                stored_len: 21_000,
            },
        },
    };
    (0..1024).map(entry).collect()
}

fn map(c: &mut Criterion) {
    let pages: Vec<Vec<Entry>> = (0..64).map(entries).collect();
    let mut group = c.benchmark_group("map");
    group.throughput(Throughput::Elements(64 * 1024));
    group.bench_function("build_64_pages", |b| {
        b.iter(|| {
            let mut builder = MapBuilder::new(BINDING, Role::Delta, object(0));
            for (i, page) in pages.iter().enumerate() {
                let part = builder.push_page(VolumeSlot(0), PageIndex(i as u64), page, RangeDigest::ZERO);
                black_box(part.map(|p| p.bytes.len()));
            }
            black_box(builder.finish().0.bytes.len())
        });
    });
    group.finish();
}

fn plan(c: &mut Criterion) {
    let wanted: Vec<Wanted> = (0..4)
        .flat_map(entries)
        .filter_map(|e| match e.content {
            Content::Data { digest, location } => {
                Some(Wanted { volume: VolumeSlot(0), block: e.block, digest, location })
            }
            Content::Zero => None,
        })
        .collect();
    let mut group = c.benchmark_group("plan");
    group.throughput(Throughput::Elements(wanted.len() as u64));
    group.bench_function("reads_of_4_pages", |b| b.iter(|| plan_reads(wanted.clone(), MAX_GAP, MAX_READ).len()));
    group.finish();
}

criterion_group!(benches, scan, record, segment, map, plan);
criterion_main!(benches);
