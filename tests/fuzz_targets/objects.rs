//! What lies in the store. A checksum would stop nearly everything that a fuzzer makes: each object is read as it is,
//! and once more with a right one, as a hostile owner of the bucket can write it (A5, A8).

use backhaul_protocol::ids::{GroupId, LogSeq};
use backhaul_protocol::limits::MAX_SEGMENT_SIZE;
use backhaul_protocol::store::checkpoint::{Checkpoint, StoreFormat, read_seq, write_seq};
use backhaul_protocol::store::envelope::{self, FormatError, Kind};
use backhaul_protocol::store::fleet::{
    JoinedAgent, Redeemed, Token, read_group_name, read_times, write_group_name, write_times,
};
use backhaul_protocol::store::log::Record;
use backhaul_protocol::store::map::{self, Row};
use backhaul_protocol::store::segment::{self, INDEX_ROW_LEN, SegmentRef};

use crate::Choices;

fn sealed(kind: Kind, body: &[u8]) -> Vec<u8> {
    let mut object = envelope::begin();
    object.extend_from_slice(body);
    envelope::seal(kind, &mut object);
    object
}

/// Group and number out of the body's first bytes, so that they fit.
fn place(body: &[u8]) -> (GroupId, LogSeq) {
    let mut choices = Choices(body);
    let mut group = [0; 16];
    let taken = choices.bytes(16);
    group[..taken.len()].copy_from_slice(taken);
    (GroupId(group), LogSeq(choices.number()))
}

pub(crate) fn log_record(data: &[u8]) {
    let (group, seq) = place(data);
    let _ = Record::parse(group, seq, data);
    let bytes = sealed(Kind::Log, data);
    let Ok(record) = Record::parse(group, seq, &bytes) else { return };
    let Some(point) = record.point() else {
        assert_eq!(Record::parse(group, seq, &record.to_bytes()).expect("own"), record);
        return;
    };
    for reference in &point.segments {
        if reference.id.is_inline() && reference.id.seq == seq {
            let start = reference.index_offset as usize;
            let _ = segment::read_index(reference, &bytes[start..][..reference.index_len() as usize]);
        }
    }
}

pub(crate) fn checkpoint(data: &[u8]) {
    let (group, seq) = place(data);
    let _ = Checkpoint::parse(group, seq, data);
    if let Ok(checkpoint) = Checkpoint::parse(group, seq, &sealed(Kind::Checkpoint, data)) {
        assert_eq!(Checkpoint::parse(group, seq, &checkpoint.to_bytes()).expect("own"), checkpoint);
    }
}

pub(crate) fn map(data: &[u8]) {
    let mut choices = Choices(data);
    match choices.byte().unwrap_or(0) % 3 {
        0 => {
            let mut body = choices.0.to_vec();
            if let Some((head, digest)) = body.split_at_mut_checked(96)
                && let Some(digest) = digest.first_chunk_mut::<32>()
            {
                *digest = *blake3::hash(head).as_bytes();
            }
            let object = sealed(Kind::Map, &body);
            let _ = map::read_head(choices.0, choices.0.len() as u64);
            if object.len() >= map::PAGES_START
                && let Ok((head, reference)) = map::read_head(&object[..map::PAGES_START], object.len() as u64)
            {
                // I19: what is read next lies inside the object.
                let rows = head.rows.checked_mul(map::ROW_LEN as u64).and_then(|len| len.checked_add(head.rows_offset));
                assert!(rows.is_some_and(|end| end <= object.len() as u64), "{head:?}");
                assert_eq!(reference.size, object.len() as u64);
            }
        }
        1 => row_and_page(choices.0),
        _ => drop(map::read_reach(choices.0)),
    }
}

fn row_and_page(data: &[u8]) {
    let Some((row, page)) = data.split_first_chunk::<{ map::ROW_LEN }>() else { return };
    let half = |bytes: &[u8]| -> [u8; 16] { *blake3::hash(bytes).as_bytes().first_chunk().expect("longer") };
    let mut row = *row;
    // Checksums that fit: of the page in the row, of the row at its end.
    row[80..96].copy_from_slice(&half(page));
    let own = half(&row[..map::ROW_LEN - 16]);
    row[map::ROW_LEN - 16..].copy_from_slice(&own);
    let Ok(row) = Row::parse(&row) else { return };
    if row.page_len() <= page.len() as u64
        && let Ok(entries) = row.read_page(&page[..row.page_len() as usize])
    {
        assert_eq!(entries.len(), row.entries as usize);
        assert!(entries.iter().all(|e| e.block.page() == row.page && e.count >= 1));
    }
}

pub(crate) fn segment(data: &[u8]) {
    let object = sealed(Kind::Segment, data);
    let _ = segment::read_head(data, data.len() as u64);
    if object.len() < segment::RECORDS_START {
        return;
    }
    let Ok((_, mut reference)) = segment::read_head(&object[..segment::RECORDS_START], object.len() as u64) else {
        return;
    };
    assert!(reference.size <= MAX_SEGMENT_SIZE);
    let Some(rows) = object.get(reference.index_offset as usize..) else {
        panic!("{reference:?} ends before its index")
    };
    assert_eq!(rows.len(), reference.records as usize * INDEX_ROW_LEN, "{reference:?}");
    reference.index_digest = backhaul_protocol::digest::ObjectDigest::of(rows);
    read_index(&reference, rows);
}

fn read_index(reference: &SegmentRef, rows: &[u8]) {
    let Ok(index) = segment::read_index(reference, rows) else { return };
    assert_eq!(index.len(), reference.records as usize);
    assert!(index.is_sorted_by_key(|row| row.sort_key()));
}

pub(crate) fn fleet(data: &[u8]) {
    let mut choices = Choices(data);
    let which = choices.byte().unwrap_or(0) % 10;
    let body = choices.0;
    // What is believed is written the same again.
    match which {
        0 => both_ways(Kind::Format, body, |b| StoreFormat::parse(b).map(StoreFormat::to_bytes)),
        1 => both_ways(Kind::Name, body, |b| read_group_name(b).map(write_group_name)),
        2 => both_ways(Kind::Token, body, |b| Token::parse(b).map(Token::to_bytes)),
        3 => both_ways(Kind::Redeemed, body, |b| Redeemed::parse(b).map(Redeemed::to_bytes)),
        4 => both_ways(Kind::Agent, body, |b| JoinedAgent::parse(b).map(|a| a.to_bytes())),
        5 => both_ways(Kind::Revoked, body, |b| {
            read_times::<1>(Kind::Revoked, b).map(|t| write_times(Kind::Revoked, &t))
        }),
        6 => both_ways(Kind::Seen, body, |b| read_times::<2>(Kind::Seen, b).map(|t| write_times(Kind::Seen, &t))),
        7 => both_ways(Kind::Floor, body, |b| read_seq(Kind::Floor, b).map(|s| write_seq(Kind::Floor, s))),
        8 => both_ways(Kind::Head, body, |b| read_seq(Kind::Head, b).map(|s| write_seq(Kind::Head, s))),
        _ => drop(JoinedAgent::parse(body)),
    }
}

fn both_ways(kind: Kind, body: &[u8], again: impl Fn(&[u8]) -> Result<Vec<u8>, FormatError>) {
    let object = sealed(kind, body);
    if let Ok(written) = again(&object) {
        assert_eq!(written, object);
    }
}

/// As it is: nothing but a whole object of the kind is believed.
pub(crate) fn envelope(data: &[u8]) {
    for kind in [Kind::Format, Kind::Log, Kind::Segment, Kind::Map, Kind::Receiver] {
        if envelope::open(kind, data).is_ok() {
            assert!(envelope::is_whole(data));
            assert_eq!(envelope::open_head(kind, data), Ok(data.len() as u64));
        }
    }
}
