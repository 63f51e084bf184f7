//! What readers use so that they need not read the whole log: checkpoints, the floor, the head hint; and the
//! store's own description.

use crate::bytes::{FieldError, FieldReader, FieldWriter};
use crate::consistency::{Checked, Consistency};
use crate::digest::{ObjectDigest, VolumeDigest};
use crate::ids::{Generation, GroupId, LogSeq, Name, RepositoryId};
use crate::limits::MAX_VOLUMES;
use crate::store::envelope::{self, FormatError, Kind};
use crate::store::log::{Record, UnixMillis};

/// What a list of points shows of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PointSummary {
    /// Its number.
    pub seq: LogSeq,
    /// By the receiver's clock.
    pub time: UnixMillis,
    /// What it claims.
    pub consistency: Consistency,
    /// The least that was checked of any of its volumes.
    pub checked: Checked,
    /// Its volumes.
    pub volumes: Vec<VolumeSummary>,
}

/// What a list of points shows of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSummary {
    /// Its name.
    pub name: Name,
    /// Its length, bytes.
    pub bytes: u64,
    /// Its digest.
    pub digest: VolumeDigest,
}

impl PointSummary {
    /// Of a log record; `None` if it is no point.
    pub fn of(record: &Record) -> Option<Self> {
        let point = record.point()?;
        Some(Self {
            seq: record.seq,
            time: record.time,
            consistency: point.consistency,
            checked: point.volumes.iter().map(|v| v.checked).min().unwrap_or(Checked::Delta),
            volumes: point
                .volumes
                .iter()
                .map(|v| VolumeSummary { name: v.name.clone(), bytes: v.geometry.length(), digest: v.digest })
                .collect(),
        })
    }
}

/// The retained points up to `seq` and the hash chain so far; written every 1024 records.
///
/// ```text
/// 64 16 group  80 8 seq  88 32 hash of record seq  120 2 generation  122 6 reserved 0
/// 128 4 number of points, then each: seq 8, time 8, consistency 1, checked 1, volumes 4,
///       then each: name 1+n, bytes 8, digest 32
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    /// Whose.
    pub group: GroupId,
    /// The last record that it covers.
    pub seq: LogSeq,
    /// The hash of that record.
    pub hash: ObjectDigest,
    /// The generation then.
    pub generation: Generation,
    /// All points that are retained, ascending.
    pub points: Vec<PointSummary>,
}

impl Checkpoint {
    /// The stored bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.group.0);
        out.put_u64(self.seq.0);
        out.extend_from_slice(&self.hash.0);
        out.put_u16(self.generation.0);
        out.extend_from_slice(&[0; 6]);
        out.put_u32(self.points.len() as u32);
        for p in &self.points {
            out.put_u64(p.seq.0);
            out.put_i64(p.time.0);
            out.push(p.consistency.to_byte());
            out.push(p.checked.to_byte());
            out.put_u32(p.volumes.len() as u32);
            for v in &p.volumes {
                out.put_text(v.name.as_str());
                out.put_u64(v.bytes);
                out.extend_from_slice(&v.digest.0);
            }
        }
        envelope::seal(Kind::Checkpoint, &mut out);
        out
    }

    /// The other way, checked.
    pub fn parse(group: GroupId, seq: LogSeq, bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = envelope::open(Kind::Checkpoint, bytes)?;
        if r.array("group")? != group.0 || r.u64("seq")? != seq.0 {
            return Err(FieldError::Value("group or number").into());
        }
        let hash = ObjectDigest(r.array("hash")?);
        let generation = Generation(r.u16("generation")?);
        r.bytes(6, "zero")?;
        let count = r.count(usize::MAX, 22, "points")?;
        let mut points = Vec::with_capacity(count);
        for _ in 0..count {
            let (seq, time) = (LogSeq(r.u64("seq")?), UnixMillis(r.i64("time")?));
            let consistency = Consistency::from_byte(r.u8("consistency")?).ok_or(FieldError::Value("consistency"))?;
            let checked = Checked::from_byte(r.u8("checked")?).ok_or(FieldError::Value("checked"))?;
            let volumes = r.count(MAX_VOLUMES, 41, "volumes")?;
            let volumes = (0..volumes).map(|_| read_volume(&mut r)).collect::<Result<_, _>>()?;
            points.push(PointSummary { seq, time, consistency, checked, volumes });
        }
        r.finish()?;
        Ok(Self { group, seq, hash, generation, points })
    }
}

fn read_volume(r: &mut FieldReader<'_>) -> Result<VolumeSummary, FieldError> {
    let name = r.text("name")?.parse().map_err(|_| FieldError::Value("name"))?;
    Ok(VolumeSummary { name, bytes: r.u64("bytes")?, digest: VolumeDigest(r.array("digest")?) })
}

/// An object that holds one log number: the floor or the head hint.
pub fn write_seq(kind: Kind, seq: LogSeq) -> Vec<u8> {
    let mut out = envelope::begin();
    out.put_u64(seq.0);
    envelope::seal(kind, &mut out);
    out
}

/// The other way.
pub fn read_seq(kind: Kind, bytes: &[u8]) -> Result<LogSeq, FormatError> {
    let mut r = envelope::open(kind, bytes)?;
    let seq = LogSeq(r.u64("seq")?);
    r.finish()?;
    if !seq.is_possible() {
        return Err(FieldError::Value("seq").into());
    }
    Ok(seq)
}

/// How far the store can be trusted to let only one of two writers win.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Conditional puts are atomic: any number of receivers.
    ManyReceivers,
    /// They are not: one receiver only, which serialises its commits itself.
    OneReceiver,
}

/// The store itself: `format`.
///
/// ```text
/// 64 16 repository  80 4 write features, 0  84 4 sharing: 1 many receivers, 2 one receiver
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreFormat {
    /// Chosen at `init`.
    pub repository: RepositoryId,
    /// What the probe at `init` found.
    pub sharing: Sharing,
}

impl StoreFormat {
    /// The stored bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = envelope::begin();
        out.extend_from_slice(&self.repository.0);
        out.put_u32(0);
        out.put_u32(match self.sharing {
            Sharing::ManyReceivers => 1,
            Sharing::OneReceiver => 2,
        });
        envelope::seal(Kind::Format, &mut out);
        out
    }
    /// The other way.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = envelope::open(Kind::Format, bytes)?;
        let repository = RepositoryId(r.array("repository")?);
        let features = r.u32("write features")?;
        if features != 0 {
            return Err(FormatError::Features(features));
        }
        let sharing = match r.u32("sharing")? {
            1 => Sharing::ManyReceivers,
            2 => Sharing::OneReceiver,
            _ => return Err(FieldError::Value("sharing").into()),
        };
        r.finish()?;
        Ok(Self { repository, sharing })
    }
}
