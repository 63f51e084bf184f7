//! Every bound that is checked before a number from outside is believed.

/// Smallest block size of a volume, bytes.
pub const MIN_BLOCK_SIZE: u32 = 16 << 10;
/// Largest block size of a volume, bytes.
pub const MAX_BLOCK_SIZE: u32 = 1 << 20;
/// Block size where the user names none: measured as the best of hash speed, compression and bytes sent for a
/// scattered small write.
pub const DEFAULT_BLOCK_SIZE: u32 = 64 << 10;
/// Blocks whose digests are hashed together into one range digest; also the blocks of one map page.
pub const BLOCKS_PER_PAGE: u64 = 1024;
/// Longest volume: 64 TiB. Arbitrary, but it keeps every byte offset far from overflow.
pub const MAX_VOLUME_LENGTH: u64 = 64 << 40;
/// Volumes of one group. Keeps an `Open` and a `Commit` well inside one control frame.
pub const MAX_VOLUMES: usize = 64;
/// Longest control frame, bytes, without its length prefix.
pub const MAX_FRAME: usize = 64 << 10;
/// Largest segment object, bytes.
pub const MAX_SEGMENT_SIZE: u32 = 64 << 20;
/// A segment is sealed at this size, bytes, where the settings name none.
pub const DEFAULT_SEGMENT_SIZE: u32 = 16 << 20;
/// A segment is sealed at this many records, so that the index of one segment stays under 1 MiB.
pub const MAX_SEGMENT_RECORDS: u32 = 8192;
/// Loose segments that a point may list; more are folded into a delta map.
pub const MAX_LOOSE_SEGMENTS: usize = 64;
/// Index entries of all loose segments of a point; more are folded into a delta map.
pub const MAX_LOOSE_ENTRIES: usize = 65_536;
/// Delta maps that a point may list; more are merged.
pub const MAX_DELTA_MAPS: usize = 16;
/// Records of a commit lie inside the log record itself if they and their index have up to this many bytes.
pub const MAX_INLINE_RECORDS: usize = 256 << 10;
/// Largest log record, bytes: inline records with their index, and 128 KiB for all the rest (64 volumes, 16 delta
/// maps and 64 segments need 20 KiB).
pub const MAX_LOG_RECORD: usize = MAX_INLINE_RECORDS + (128 << 10);
/// Log records between two checkpoints.
pub const CHECKPOINT_INTERVAL: u64 = 1024;
/// Longest name of a group, volume or agent.
pub const MAX_NAME: usize = 63;
/// Bytes without meaning that a receiver takes to measure a path: 10 Gbit/s for most of a second, 1 Gbit/s for 8 s.
pub const MAX_PROBE_BYTES: u64 = 1 << 30;
/// And for how long, seconds: long enough for congestion control to find the rate of a long path.
pub const MAX_PROBE_SECONDS: u64 = 10;
