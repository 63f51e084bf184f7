//! The log of a group: contiguous, hash-chained, append-only. A record that is there is a fact; a point exists if
//! and only if its record does.
//!
//! Read first: [`Record`] and [`PointBody`].
//!
//! ```text
//!   0 64 envelope (kind 2)
//!  64 16 group
//!  80  8 own number
//!  88 32 BLAKE3 of the record before, all its bytes (record 0: zeroes)
//! 120  2 generation of the writer
//! 122  2 type: 0 create, 1 point, 2 promote, (3 prune, 4 drop, 5 rebase: reserved)
//! 124  4 reserved 0
//! 128 16 commit id
//! 144 16 writer nonce: what the next writer must show; zeroes: anything
//! 160  8 time of the commit by the receiver's clock, ms since 1970
//! 168    body of the type
//! ```

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::consistency::{Checked, Consistency};
use crate::digest::{DeltaDigest, ObjectDigest, VolumeDigest};
use crate::geometry::Geometry;
use crate::ids::{
    AgentId, CaptureNumber, CommitId, Generation, GroupId, Incarnation, LogSeq, Name, RepositoryId, VolumeId,
    VolumeSlot, WriterNonce,
};
use crate::limits::{MAX_DELTA_MAPS, MAX_INLINE_RECORDS, MAX_LOG_RECORD, MAX_LOOSE_SEGMENTS, MAX_VOLUMES};
use crate::store::envelope::{self, FormatError, Kind};
use crate::store::key::ObjectId;
use crate::store::map::MapRef;
use crate::store::segment::{INDEX_ROW_LEN, Inline, SegmentRef, write_index};

/// Bytes before the body.
pub const HEAD_LEN: usize = 168;

/// Milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, bincode::Encode, bincode::Decode)]
pub struct UnixMillis(pub i64);

/// One record of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Whose log.
    pub group: GroupId,
    /// Own number.
    pub seq: LogSeq,
    /// Hash of the record before.
    pub previous: ObjectDigest,
    /// Of the writer.
    pub generation: Generation,
    /// Chosen by the writer.
    pub commit: CommitId,
    /// What the next writer must show.
    pub nonce: WriterNonce,
    /// By the receiver's clock.
    pub time: UnixMillis,
    /// The rest.
    pub body: Body,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Body {
    /// The group was made. Number 0.
    Create(CreateBody),
    /// A recovery point.
    Point(Box<PointBody>),
    /// A new writer takes over; older generations are fenced.
    Promote(PromoteBody),
}

/// The group was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateBody {
    /// In which store.
    pub repository: RepositoryId,
    /// Its name then.
    pub name: Name,
}

/// A new writer takes over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromoteBody {
    /// Who may write from now on.
    pub agent: AgentId,
}

/// Which machine an agent says it runs on: a BLAKE3 of what identifies it there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct MachineId(pub [u8; 32]);

/// A committed state of all volumes of the group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointBody {
    /// The record that the draft was built on.
    pub base: LogSeq,
    /// What it claims.
    pub consistency: Consistency,
    /// The agent's clock when the first block was read.
    pub capture_start: UnixMillis,
    /// The agent's clock when the last block was read.
    pub capture_end: UnixMillis,
    /// No record of this or an earlier point has a higher one.
    pub max_capture: CaptureNumber,
    /// Of the winners of the commit.
    pub delta_digest: DeltaDigest,
    /// Number of winners.
    pub delta_blocks: u64,
    /// Bytes of records that the commit brought.
    pub delta_stored: u64,
    /// Who wrote it.
    pub agent: AgentId,
    /// Where.
    pub machine: MachineId,
    /// The lowest slot that no volume of the group ever had: slots are never reused.
    pub next_slot: VolumeSlot,
    /// All volumes, in the order in which the agent opened them.
    pub volumes: Vec<PointVolume>,
    /// What changed since the base maps, in no order of precedence: captures decide.
    pub deltas: Vec<MapRef>,
    /// The segments that no map covers yet.
    pub segments: Vec<SegmentRef>,
    /// The records of a small commit. Its reference is the last of `segments`.
    pub inline: Option<Inline>,
}

/// One volume of a point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointVolume {
    /// In block records.
    pub slot: VolumeSlot,
    /// For good.
    pub id: VolumeId,
    /// What the user calls it.
    pub name: Name,
    /// How often identity or size changed.
    pub incarnation: Incarnation,
    /// Block size and length.
    pub geometry: Geometry,
    /// Of every byte.
    pub digest: VolumeDigest,
    /// What the receiver had recomputed at the commit.
    pub checked: Checked,
    /// The agent's clock at the end of the last scan that read everything.
    pub full_scan: UnixMillis,
    /// Covers the volume but for deltas and segments; `None`: everything else is zero.
    pub base: Option<MapRef>,
}

impl Record {
    /// The stored bytes. References to inline records are filled in here.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.group.0);
        out.put_u64(self.seq.0);
        out.extend_from_slice(&self.previous.0);
        out.put_u16(self.generation.0);
        out.put_u16(match self.body {
            Body::Create(_) => 0,
            Body::Point(_) => 1,
            Body::Promote(_) => 2,
        });
        out.put_u32(0);
        out.extend_from_slice(&self.commit.0);
        out.extend_from_slice(&self.nonce.0);
        out.put_i64(self.time.0);
        debug_assert_eq!(out.len(), HEAD_LEN);
        match &self.body {
            Body::Create(create) => {
                out.extend_from_slice(&create.repository.0);
                out.put_u16(0); // cipher: none
                out.put_text(create.name.as_str());
            }
            Body::Promote(promote) => out.extend_from_slice(&promote.agent.0),
            Body::Point(point) => point.write(self.seq, &mut out),
        }
        envelope::seal(Kind::Log, &mut out);
        out
    }

    /// What the next record has as its `previous`.
    pub fn hash(stored: &[u8]) -> ObjectDigest {
        ObjectDigest::of(stored)
    }

    /// Checks and reads a record that was found as number `seq` of `group`.
    pub fn parse(group: GroupId, seq: LogSeq, bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MAX_LOG_RECORD {
            return Err(FormatError::Length { stated: MAX_LOG_RECORD as u64, found: bytes.len() as u64 });
        }
        let mut r = envelope::open(Kind::Log, bytes)?;
        if r.array("group")? != group.0 || r.u64("seq")? != seq.0 {
            return Err(FieldError::Value("group or number").into());
        }
        let previous = ObjectDigest(r.array("previous")?);
        let generation = Generation(r.u16("generation")?);
        let kind = r.u16("type")?;
        let _ = r.u32("zero")?;
        let commit = CommitId(r.array("commit")?);
        let nonce = WriterNonce(r.array("nonce")?);
        let time = UnixMillis(r.i64("time")?);
        let body = match kind {
            0 => {
                let repository = RepositoryId(r.array("repository")?);
                if r.u16("cipher")? != 0 {
                    return Err(FieldError::Value("cipher").into());
                }
                let name = r.text("name")?.parse().map_err(|_| FieldError::Value("name"))?;
                Body::Create(CreateBody { repository, name })
            }
            1 => Body::Point(Box::new(PointBody::read(seq, bytes.len(), &mut r)?)),
            2 => Body::Promote(PromoteBody { agent: AgentId(r.array("agent")?) }),
            _ => return Err(FieldError::Value("type of log record").into()),
        };
        r.finish()?;
        Ok(Self { group, seq, previous, generation, commit, nonce, time, body })
    }

    /// The point, if it is one.
    pub fn point(&self) -> Option<&PointBody> {
        match &self.body {
            Body::Point(point) => Some(point),
            _ => None,
        }
    }
}

impl PointBody {
    /// ```text
    ///   0  8 base        8 1 consistency   9 7 reserved 0   16 8 capture start ms   24 8 capture end ms
    ///  32  8 max capture 40 32 delta digest 72 8 delta blocks 80 8 delta bytes stored
    ///  88 16 agent     104 32 machine
    /// 136  4 next slot
    /// 140  4 number of volumes, then each: slot 4, id 16, name 1+n, incarnation 4, block size 4, length 8,
    ///        digest 32, checked 1, full scan ms 8, has base map 1, [map reference 64]
    ///   ?  4 number of delta maps, then each 64
    ///   ?  4 number of segments, then each 64; an inline one of this record is the last
    ///   ?  4 bytes of inline records, the records, their index
    /// ```
    fn write(&self, seq: LogSeq, out: &mut Vec<u8>) {
        out.put_u64(self.base.0);
        out.put_u64(u64::from(self.consistency.to_byte()));
        out.put_i64(self.capture_start.0);
        out.put_i64(self.capture_end.0);
        out.put_u64(self.max_capture.0);
        out.extend_from_slice(&self.delta_digest.0);
        out.put_u64(self.delta_blocks);
        out.put_u64(self.delta_stored);
        out.extend_from_slice(&self.agent.0);
        out.extend_from_slice(&self.machine.0);
        out.put_u32(self.next_slot.0);
        out.put_u32(self.volumes.len() as u32);
        for v in &self.volumes {
            out.put_u32(v.slot.0);
            out.extend_from_slice(&v.id.0);
            out.put_text(v.name.as_str());
            out.put_u32(v.incarnation.0);
            out.put_u32(v.geometry.block_size());
            out.put_u64(v.geometry.length());
            out.extend_from_slice(&v.digest.0);
            out.push(v.checked.to_byte());
            out.put_i64(v.full_scan.0);
            out.push(u8::from(v.base.is_some()));
            if let Some(base) = &v.base {
                base.write(out);
            }
        }
        out.put_u32(self.deltas.len() as u32);
        self.deltas.iter().for_each(|d| d.write(out));
        let inline_count = u32::from(self.inline.is_some());
        let own = ObjectId::inline(seq);
        let loose = self.segments.iter().filter(|s| s.id != own);
        out.put_u32(loose.clone().count() as u32 + inline_count);
        loose.for_each(|s| s.write(out));
        let Some(inline) = &self.inline else { return out.put_u32(0) };
        let records_start = out.len() + SegmentRef::LEN + 4;
        let rows = write_index(&inline.index, records_start as u32);
        SegmentRef {
            id: own,
            size: 0,
            index_offset: (records_start + inline.records.len()) as u32,
            records: inline.index.len() as u32,
            index_digest: ObjectDigest::of(&rows),
        }
        .write(out);
        out.put_u32(inline.records.len() as u32);
        out.extend_from_slice(&inline.records);
        out.extend_from_slice(&rows);
    }

    fn read(seq: LogSeq, object_len: usize, r: &mut FieldReader<'_>) -> Result<Self, FormatError> {
        let base = LogSeq(r.u64("base")?);
        if base >= seq {
            return Err(FieldError::Value("base").into());
        }
        let consistency = u8::try_from(r.u64("consistency")?).ok().and_then(Consistency::from_byte);
        let consistency = consistency.ok_or(FieldError::Value("consistency"))?;
        let (start, end) = (r.i64("capture start")?, r.i64("capture end")?);
        let max_capture = CaptureNumber(r.u64("max capture")?);
        let delta_digest = DeltaDigest(r.array("delta digest")?);
        let (delta_blocks, delta_stored) = (r.u64("delta blocks")?, r.u64("delta bytes")?);
        let agent = AgentId(r.array("agent")?);
        let machine = MachineId(r.array("machine")?);
        let next_slot = VolumeSlot(r.u32("next slot")?);
        let volumes = r.count(MAX_VOLUMES, 79, "volumes")?;
        let volumes = (0..volumes).map(|_| PointVolume::read(r)).collect::<Result<Vec<_>, _>>()?;
        let deltas = r.count(MAX_DELTA_MAPS, MapRef::LEN, "delta maps")?;
        let deltas = (0..deltas).map(|_| MapRef::read(r)).collect::<Result<Vec<_>, _>>()?;
        let segments = r.count(MAX_LOOSE_SEGMENTS, SegmentRef::LEN, "segments")?;
        let segments = (0..segments).map(|_| SegmentRef::read(r)).collect::<Result<Vec<_>, _>>()?;
        let inline_len = r.u32("inline records")? as usize;
        let own_id = ObjectId::inline(seq);
        // Anywhere else it would name an index that nobody has checked.
        if segments.iter().rev().skip(1).any(|s| s.id == own_id) {
            return Err(FieldError::Value("segments").into());
        }
        let own = segments.last().filter(|s| s.id == own_id);
        let inline = match own {
            None if inline_len == 0 => None,
            None => return Err(FieldError::Value("inline records").into()),
            Some(own) => {
                let records_start = object_len - r.remaining();
                if inline_len > MAX_INLINE_RECORDS || own.index_offset as usize != records_start + inline_len {
                    return Err(FieldError::Value("inline records").into());
                }
                let records = r.bytes(inline_len, "inline records")?.to_vec();
                let rows = r.bytes(own.records as usize * INDEX_ROW_LEN, "inline index")?;
                let mut index = crate::store::segment::read_index(own, rows)?;
                for row in &mut index {
                    if let crate::store::entry::Content::Data { location, .. } = &mut row.entry.content {
                        let at = location.offset.checked_sub(records_start as u32);
                        location.offset = at.ok_or(FieldError::Value("inline record's place"))?;
                    }
                }
                Some(Inline { records, index })
            }
        };
        Ok(Self {
            base,
            consistency,
            capture_start: UnixMillis(start),
            capture_end: UnixMillis(end),
            max_capture,
            delta_digest,
            delta_blocks,
            delta_stored,
            agent,
            machine,
            next_slot,
            volumes,
            deltas,
            segments,
            inline,
        })
    }

    /// The volume of this name.
    pub fn volume(&self, name: &Name) -> Option<&PointVolume> {
        self.volumes.iter().find(|v| v.name == *name)
    }
}

impl PointVolume {
    fn read(r: &mut FieldReader<'_>) -> Result<Self, FieldError> {
        let slot = VolumeSlot(r.u32("slot")?);
        let id = VolumeId(r.array("volume id")?);
        let name = r.text("volume name")?.parse().map_err(|_| FieldError::Value("volume name"))?;
        let incarnation = Incarnation(r.u32("incarnation")?);
        let (block_size, length) = (r.u32("block size")?, r.u64("length")?);
        let geometry = Geometry::new(block_size, length).map_err(|_| FieldError::Value("geometry"))?;
        let digest = VolumeDigest(r.array("volume digest")?);
        let checked = Checked::from_byte(r.u8("checked")?).ok_or(FieldError::Value("checked"))?;
        let full_scan = UnixMillis(r.i64("full scan")?);
        let base = match r.u8("has base")? {
            0 => None,
            1 => Some(MapRef::read(r)?),
            _ => return Err(FieldError::Value("has base")),
        };
        Ok(Self { slot, id, name, incarnation, geometry, digest, checked, full_scan, base })
    }
}
