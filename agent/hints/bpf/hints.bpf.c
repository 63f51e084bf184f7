// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// Marks the blocks of protected volumes that writes have reached. Read first: `mark`, then the three programs at the end.
// The kernel lets only programs under a licence compatible with the GPL look into its structures; hence this file's own.
//
// A block is marked when its write completes, before whoever waits for it is told: a mark at submission could be taken
// before the data lands, one after would come too late for a reader who has been told. Failed writes are marked as
// well, they may have landed.
//
// The maps' layout is told in src/layout.rs; it is agreed on by LAYOUT there. Rebuild with scripts/build-bpf.sh.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define CORE __attribute__((preserve_access_index))
#define inline inline __attribute__((always_inline))
// A program of its own to the verifier: checked once, not once for each turn of the loop that calls it.
#define checked_alone __attribute__((noinline))

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;

// What we know of the kernel's structures; the loader finds where the fields are in the kernel that runs.
struct gendisk;
struct bio;
struct block_device { u32 bd_dev; struct gendisk *bd_disk; } CORE;
struct gendisk { struct block_device *part0; } CORE;
struct bvec_iter { u64 bi_sector; u32 bi_size; } CORE;
struct bio { struct bio *bi_next; struct block_device *bi_bdev; u32 bi_opf; struct bvec_iter bi_iter; void *bi_private; } CORE;
struct request_queue { struct gendisk *disk; } CORE;
struct request { struct request_queue *q; u32 cmd_flags; u64 __sector; struct bio *bio; } CORE;
// Up to kernel 5.16.
struct request___old { struct gendisk *rq_disk; } CORE;

// include/linux/blk_types.h; these numbers have never changed since they were introduced.
enum {
  OP_READ = 0, OP_WRITE = 1, OP_FLUSH = 2, OP_DISCARD = 3, OP_SECURE_ERASE = 5,
  OP_WRITE_SAME = 7, // Since 6.18 or so ZONE_APPEND.
  OP_WRITE_ZEROES = 9, OP_DRV_IN = 34,
  OP_MASK = 255,
};

#define VOLUMES 256
#define GROUP_WORDS 64
#define GROUP_SHIFT 12 // blocks of a group: 64 words of 64 bits
#define MAX_GROUPS 68 // of one event: 4 GiB, the most a bio or request has, in blocks of 16 KiB, and one for each end
#define MAX_RANGES 256 // of a discard; NVMe has the most

struct slot {
  u64 start, end; // sectors on the disk
  u32 shift; // sectors of a block, as a power of two
  u32 live; // element of the first group
  u32 kind;
  u32 pad;
  u64 volume[2], map, pad2;
};

struct table {
  u64 head[32]; // the agent's
  u32 count; // slots to look at
  u32 bios; // how many are on devices without requests
  u32 pad[62];
  u32 dev[VOLUMES]; // of the whole disk; 0 is nobody
  struct slot slot[VOLUMES];
  u64 bases[2][VOLUMES]; // the agent's
};
_Static_assert(sizeof(struct table) == 22016 && sizeof(struct slot) == 64, "src/layout.rs");

// For each slot the sectors that completed writes and discards of its disk had. These programs' own: while another
// version takes over both count.
struct sectors { u64 seen[VOLUMES]; };

#define NOEXIST 1

enum { KIND_REQUESTS = 0, KIND_BIOS = 1 };

// Words of a volume's first element.
enum { LOST = 48, COMMANDS = 49, STRANGERS = 50 };

struct group { u64 word[GROUP_WORDS]; };

// The loader knows them by name and makes them.
int table SEC("maps");
int volumes SEC("maps");
int flights SEC("maps");
int seen SEC("maps");

// A write to a device without requests, from submission to completion.
struct flight { u64 sector; u32 sectors; u32 dev; };

static inline struct table *the_table(void) {
  u32 zero = 0;
  return bpf_map_lookup_elem(&table, &zero);
}

static inline struct group *element(u32 slot, u32 index) {
  void *volume = bpf_map_lookup_elem(&volumes, &slot);
  return volume ? bpf_map_lookup_elem(volume, &index) : 0;
}

// Counts something that the agent must know of: what it does not see marked it must not believe unchanged.
checked_alone int count(u32 slot, u32 what) {
  struct group *head = element(slot, 0);
  if (head) __sync_fetch_and_add(&head->word[what & (GROUP_WORDS - 1)], 1);
  return 0;
}

// Sets bits first..=last of one group, then the group's bit in the summary. In this order, and with the first a full
// barrier (an atomic that fetches): who takes the summary's bit before it looks at the group cannot miss a bit.
checked_alone int mark_group(u32 slot, u32 live, u32 group, u32 first, u32 last) {
  struct group *bits = element(slot, live + group);
  struct group *summary = element(slot, 1 + (group >> GROUP_SHIFT));
  if (!bits || !summary) return count(slot, LOST);
  u64 before = ~0ull;
  for (u32 i = 0; i < GROUP_WORDS; i++) {
    u32 at = (first >> 6) + i;
    if (at > last >> 6) break;
    u64 mask = ~0ull;
    if (i == 0) mask <<= first & 63;
    if (at == last >> 6) mask &= ~0ull >> (63 - (last & 63));
    before &= __sync_fetch_and_or(&bits->word[at & (GROUP_WORDS - 1)], mask);
  }
  u64 *word = &summary->word[(group >> 6) & (GROUP_WORDS - 1)], bit = 1ull << (group & 63);
  if (!(*(volatile u64 *)word & bit)) before &= __sync_fetch_and_or(word, bit);
  // Used, so that the compiler takes the fetching forms.
  return (int)before & 1;
}

// Marks what of sectors sector..sector+sectors of its disk is in one volume.
checked_alone int mark(u32 slot, u64 sector, u64 sectors) {
  struct table *t = the_table();
  if (!t) return 0;
  struct slot *s = &t->slot[slot & (VOLUMES - 1)];
  u64 start = s->start, from = sector, to = sector + sectors;
  if (to < from || to > s->end) to = s->end;
  if (from < start) from = start;
  if (from >= to) return 0;
  u32 shift = s->shift & 31, live = s->live;
  u64 first = (from - start) >> shift, last = (to - 1 - start) >> shift;
  u64 group = first >> GROUP_SHIFT, end = last >> GROUP_SHIFT;
  for (u32 i = 0; i < MAX_GROUPS; i++) {
    if (group > end) return 0;
    u32 a = group == first >> GROUP_SHIFT ? first & ((1 << GROUP_SHIFT) - 1) : 0;
    u32 b = group == end ? last & ((1 << GROUP_SHIFT) - 1) : (1 << GROUP_SHIFT) - 1;
    mark_group(slot, live, group, a, b);
    group++;
  }
  if (group <= end) count(slot, LOST);
  return 0;
}

// The same in all volumes on a disk.
checked_alone int mark_all(u32 dev, u64 sector, u64 sectors) {
  struct table *t = the_table();
  if (!t) return 0;
  u32 n = t->count;
  for (u32 i = 0; i < VOLUMES; i++) {
    if (i >= n) break;
    if (t->dev[i] == dev) mark(i, sector, sectors);
  }
  return 0;
}

checked_alone int count_all(u32 dev, u32 what, int bios_only) {
  struct table *t = the_table();
  if (!t) return 0;
  u32 n = t->count;
  for (u32 i = 0; i < VOLUMES; i++) {
    if (i >= n) break;
    if (t->dev[i] == dev && (!bios_only || t->slot[i].kind == KIND_BIOS)) count(i, what);
  }
  return 0;
}

// Counts what the block layer counts itself, for requests right after this event: the agent compares the two.
checked_alone int see(u32 dev, u64 sectors) {
  u32 zero = 0;
  struct table *t = the_table();
  struct sectors *all = bpf_map_lookup_elem(&seen, &zero);
  if (!t || !all) return 0;
  u32 n = t->count;
  for (u32 i = 0; i < VOLUMES; i++) {
    if (i >= n) break;
    if (t->dev[i] == dev) __sync_fetch_and_add(&all->seen[i], sectors);
  }
  return 0;
}

// A flush that carries data is an OP_WRITE.
static inline int changes_nothing(u32 op) { return op == OP_READ || op == OP_FLUSH || op == OP_DRV_IN; }

// Says which sectors it changes. Others are a drive's private commands and those of zoned disks.
static inline int has_range(u32 op) {
  return op == OP_WRITE || op == OP_DISCARD || op == OP_SECURE_ERASE || op == OP_WRITE_SAME || op == OP_WRITE_ZEROES;
}

static inline u32 disk_of(struct bio *bio) {
  // Not bi_bdev's own number: that may be the partition's, while the sector is the disk's.
  struct block_device *bdev = bio->bi_bdev;
  if (!bdev) return 0;
  struct gendisk *disk = bdev->bd_disk;
  return disk ? disk->part0->bd_dev : 0;
}

// (struct request *rq, int or blk_status_t error, unsigned int nr_bytes). Once for each part of a request that is
// done, with __sector where that part begins.
SEC("tp_btf/block_rq_complete") int rq_complete(u64 *ctx) {
  struct request *rq = (void *)ctx[0];
  u32 bytes = ctx[2];
  u32 op = rq->cmd_flags & OP_MASK;
  if (changes_nothing(op)) return 0;
  struct gendisk *disk;
  struct request___old *old = (void *)rq;
  if (__builtin_preserve_field_info(old->rq_disk, 2 /* exists */)) {
    disk = old->rq_disk;
  } else {
    disk = rq->q->disk;
  }
  // A queue without a disk takes a controller's own commands.
  if (!disk) return 0;
  u32 dev = disk->part0->bd_dev;
  if (!has_range(op)) {
    count_all(dev, COMMANDS, 0);
    return 0;
  }
  // The end of a flush that followed its data, which was marked when it landed.
  if (!bytes) return 0;
  see(dev, bytes >> 9);
  struct bio *bio = rq->bio;
  if (op == OP_DISCARD && bio && bio->bi_next) {
    // Discards are merged although they do not touch: the request's sector is only the first's.
    for (u32 i = 0; i < MAX_RANGES; i++) {
      if (!bio) return 0;
      mark_all(dev, bio->bi_iter.bi_sector, bio->bi_iter.bi_size >> 9);
      bio = bio->bi_next;
    }
    if (bio) count_all(dev, LOST, 0);
    return 0;
  }
  u64 sector = rq->__sector;
  if (sector == ~0ull) {
    count_all(dev, LOST, 0);
    return 0;
  }
  mark_all(dev, sector, ((u64)bytes + 511) >> 9);
  return 0;
}

// (struct bio *bio). At completion a bio may say something else than at submission: what was split from it has been cut
// off (device mapper), or it has gone to another device. So what it said is kept for as long as it is under way.
SEC("tp_btf/block_bio_queue") int bio_queue(u64 *ctx) {
  struct table *t = the_table();
  if (!t || !t->bios) return 0;
  struct bio *bio = (void *)ctx[0];
  u32 op = bio->bi_opf & OP_MASK, n = t->count;
  if (changes_nothing(op)) return 0;
  struct flight flight = {.sector = bio->bi_iter.bi_sector, .sectors = bio->bi_iter.bi_size >> 9, .dev = disk_of(bio)};
  for (u32 i = 0; i < VOLUMES; i++) {
    if (i >= n) return 0;
    if (t->dev[i] == flight.dev && t->slot[i].kind == KIND_BIOS) break;
    if (i == VOLUMES - 1) return 0;
  }
  if (!has_range(op)) {
    count_all(flight.dev, COMMANDS, 1);
    return 0;
  }
  // Also one without data, or its completion would be a stranger's. One that is there already: its completion was lost.
  u64 key = (u64)bio;
  if (bpf_map_update_elem(&flights, &key, &flight, NOEXIST)) {
    count_all(flight.dev, LOST, 1);
    bpf_map_update_elem(&flights, &key, &flight, 0);
  }
  return 0;
}

// (struct request_queue *q, struct bio *bio). Devices with requests are silent here, but for what fails early.
SEC("tp_btf/block_bio_complete") int bio_complete(u64 *ctx) {
  struct table *t = the_table();
  if (!t || !t->count) return 0;
  struct bio *bio = (void *)ctx[1];
  u32 op = bio->bi_opf & OP_MASK;
  if (changes_nothing(op)) return 0;
  if (t->bios) {
    u64 key = (u64)bio;
    struct flight *kept = bpf_map_lookup_elem(&flights, &key);
    if (kept) {
      struct flight flight = *kept;
      bpf_map_delete_elem(&flights, &key);
      if (!flight.sectors) return 0;
      mark_all(flight.dev, flight.sector, flight.sectors);
      see(flight.dev, flight.sectors);
      return 0;
    }
  }
  u32 dev = disk_of(bio), sectors = bio->bi_iter.bi_size >> 9;
  if (!has_range(op)) return 0;
  if (sectors) mark_all(dev, bio->bi_iter.bi_sector, sectors);
  if (!t->bios) return 0;
  // A part that was split off; the whole is marked when the last part is done. Anything else was under way before the
  // device was tracked, and may have been cut.
  u64 whole = (u64)bio->bi_private;
  if (!bpf_map_lookup_elem(&flights, &whole)) count_all(dev, STRANGERS, 1);
  return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
