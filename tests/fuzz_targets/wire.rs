//! What comes over the wire.

use std::fmt::Debug;

use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::limits::{MAX_BLOCK_SIZE, MAX_FRAME};
use backhaul_protocol::record::{HEADER_LEN, RecordHeader, Verifier, split_record};
use backhaul_protocol::wire::frame::{self, Receivable, Sendable};
use backhaul_protocol::wire::hello;
use backhaul_protocol::wire::message::{AgentMessage, ReceiverMessage};

use crate::Choices;

fn both_ways<M: Receivable + Sendable + PartialEq + Debug>(data: &[u8]) {
    let Ok(message) = frame::decode::<M>(data) else { return };
    // A message may be written longer than it must be; then it is read the same all the same.
    let Ok(bytes) = frame::encode(&message) else { return };
    let prefix = bytes[..4].try_into().expect("four bytes");
    assert_eq!(frame::frame_len(prefix).expect("own"), bytes.len() - 4);
    assert_eq!(frame::decode::<M>(&bytes[4..]).expect("own"), message);
}

pub(crate) fn message(data: &[u8]) {
    if let Some(prefix) = data.first_chunk::<4>()
        && let Ok(len) = frame::frame_len(*prefix)
    {
        assert!((1..=MAX_FRAME).contains(&len));
    }
    if data.len() <= MAX_FRAME {
        both_ways::<AgentMessage>(data);
        both_ways::<ReceiverMessage>(data);
    }
}

pub(crate) fn hello(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<{ hello::HELLO_LEN }>() else { return };
    let _ = hello::accept(bytes);
    if let Ok((answer, goes_on)) = hello::answer(bytes) {
        assert_eq!(hello::accept(&answer).is_ok(), goes_on.is_ok(), "both sides agree on whether they do");
    }
}

/// Block records back to back, as ingest and restore take them.
pub(crate) fn records(data: &[u8]) {
    let mut choices = Choices(data);
    let (size, length) = (choices.byte().unwrap_or(0), choices.number());
    let Ok(geometry) = Geometry::new(1 << (size % 24), length % (1 << 40)) else { return };
    let mut verifier = Verifier::new().expect("memory");
    let mut rest = choices.0;
    while let Ok(Some(split)) = split_record(rest) {
        assert!(split.payload.len() <= MAX_BLOCK_SIZE as usize);
        assert_eq!(split.rest.len() + split.payload.len() + HEADER_LEN, rest.len());
        assert_eq!(RecordHeader::parse(&split.header.to_bytes()).expect("own"), split.header);
        if let Ok(block) = verifier.verify(&split.header, split.payload, geometry) {
            // I8: what is taken for a block is one.
            assert!(geometry.contains(block.block()) && block.bytes().len() == geometry.block_len(block.block()));
            assert_eq!(backhaul_protocol::digest::BlockDigest::of(block.bytes()), block.digest());
        }
        rest = split.rest;
    }
}
