#!/usr/bin/env python3
"""Restores volumes from a Backhaul store that lies in a folder, without Backhaul.

It is for the day on which no program of Backhaul runs any more, and the proof that protocol/STORE.md says all that is needed:
it is written from that text alone and must stay so. It needs Python 3.11 and two packages: pip install blake3 zstandard

    restore.py STORE_FOLDER list
    restore.py STORE_FOLDER restore GROUP POINT VOLUME TARGET     (POINT: a number or "latest"; TARGET: a new file)
    restore.py STORE_FOLDER selfcheck

STORE_FOLDER holds the objects as files under their keys: a folder store, or a copy of a bucket's prefix. It is never
written to, and nothing in it is trusted: every object's checksum, every block's digest, the hashes that chain the log, and
at the end the digest of the volume, read back from the file, must be right. The exit code is 0 if all of that was proven;
else it is 1 and there is no TARGET, since until then TARGET.unfinished is written.
"""

import datetime
import os
import re
import stat
import struct
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3

FORMAT, LOG, SEGMENT, MAP, CHECKPOINT, FLOOR, HEAD, NAME = range(1, 9)  # kinds of objects
CREATE, POINT, PROMOTE, BASE, DELTA = 0, 1, 2, 1, 2  # types of log records, roles of maps
CONSISTENCY = {1: "fuzzy", 2: "crash", 3: "application"}
ENVELOPE, ROW, ENTRY, HEADER, INDEX_ROW = 64, 128, 72, 64, 64  # sizes in bytes
MAP_REF, SEGMENT_REF = "16sQQ32s", "16sIII4x32s"
MAX_VOLUMES, MAX_DELTAS, MAX_SEGMENTS, MAX_RECORDS, MAX_PAYLOAD, PAGE = 64, 16, 64, 8192, 1 << 20, 1024
MAX_INLINE, MAX_LOG, MAX_SEGMENT, MAX_NUMBER = 262_144, 393_216, 64 << 20, (1 << 48) - 1
ZERO = bytes(32)
RANGE_DIGEST, VOLUME_DIGEST = "backhaul 2026-11 range digest", "backhaul 2026-11 volume digest"
NAME_RULE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Damage(Exception):
    """Something in the store is not as it should be, or is not there."""


class Unknown(Exception):
    """An object of a newer version: nobody can tell what it says."""


ObjectId = NamedTuple("ObjectId", [("seq", int), ("generation", int), ("session", int), ("n", int)])
# How a point names a map (count: its entries; index: 0), or a segment (count: its records; index: where that begins).
Ref = NamedTuple("Ref", [("id", ObjectId), ("size", int), ("index", int), ("count", int), ("digest", bytes)])
# What a source says of a block, or of a run of zero blocks.
Entry = NamedTuple("Entry", [("block", int), ("count", int), ("digest", bytes), ("holder", ObjectId), ("offset", int),
                             ("stored", int), ("capture", int)])
# Where a map has the entries of a page.
Row = NamedTuple("Row", [("entries", int), ("holder", ObjectId), ("at", int), ("range_digest", bytes), ("half", bytes)])
Volume = NamedTuple("Volume", [("slot", int), ("name", str), ("block_size", int), ("length", int), ("digest", bytes),
                               ("base", Ref | None)])
Point = NamedTuple("Point", [("number", int), ("time", int), ("consistency", str), ("volumes", list[Volume]),
                             ("deltas", list[Ref]), ("segments", list[Ref])])


@dataclass
class Store:
    folder: Path
    group: uuid.UUID = uuid.UUID(int=0)
    prefix: str = ""  # of the keys of the group
    sizes: dict[str, int] = field(default_factory=dict)  # of the objects whose checksum was found right
    warnings: list[str] = field(default_factory=list)


def need(good: bool, key: str, what: str) -> None:
    if not good:
        raise Damage(f"{key}: {what}")


def open_object(store: Store, key: str) -> tuple[int, int]:
    """File and size. Keys are made of numbers, ids and checked names only; links are not followed either."""
    path = store.folder / key
    try:
        need(path.resolve(strict=True) == path and stat.S_ISREG(path.stat().st_mode), key, "is a link or no file")
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Damage(f"{key}: missing") from None
    return fd, os.fstat(fd).st_size


def chunks(store: Store, key: str, at: int, length: int) -> Iterator[bytes]:
    fd, size = open_object(store, key)
    try:
        need(at + length <= size, key, f"ends before byte {at + length}")
        for start in range(at, at + length, 1 << 20):
            data = os.pread(fd, min(1 << 20, at + length - start), start)
            need(len(data) == min(1 << 20, at + length - start), key, "cannot be read")
            yield data
    finally:
        os.close(fd)


def read(store: Store, key: str, at: int, length: int) -> bytes:
    return b"".join(chunks(store, key, at, length))


def prove(store: Store, key: str, kind: int, limit: int = 1 << 62) -> int:
    """Checks the envelope and the checksum of a whole object, once. Returns its size."""
    fd, size = open_object(store, key)
    os.close(fd)
    need(ENVELOPE <= size <= limit, key, f"has {size} bytes")
    if store.sizes.get(key) == size:
        return size
    head = read(store, key, 0, ENVELOPE)
    magic, its_kind, version, features, length = struct.unpack_from("<8sHHIQ", head)
    need(magic == b"BACKHAUL", key, "is no object of Backhaul")
    known = version == 1 and features == 0
    if known or kind == FORMAT:  # a format of an unknown version alone counts as damaged if its checksum is wrong
        hasher = blake3(head[:32])
        for data in chunks(store, key, ENVELOPE, size - ENVELOPE):
            hasher.update(data)
        need(hasher.digest() == head[32:], key, "checksum wrong")
    if not known:
        raise Unknown(f"{key}: version {version}, features {features:#x}: this program knows version 1 without any")
    need(its_kind == kind, key, f"is of kind {its_kind}, not {kind}")
    need(length == size, key, f"has {size} bytes and says {length}")
    store.sizes[key] = size
    return size


def hint(store: Store, key: str, kind: int, layout: str) -> tuple[Any, ...] | None:
    """The fields of an object without which a restore does as well; none if it is missing or damaged."""
    try:
        prove(store, key, kind)
        return struct.unpack(layout, read(store, key, ENVELOPE, struct.calcsize(layout)))
    except Damage as why:
        if os.path.lexists(store.folder / key):
            store.warnings.append(f"{why} (not needed)")
        return None


def names_in(store: Store, prefix: str, rule: str) -> list[str]:
    path = store.folder / prefix
    plain = path.is_dir() and path.resolve() == path
    return sorted(e.name for e in os.scandir(path) if re.fullmatch(rule, e.name)) if plain else []


def object_id(data: bytes) -> ObjectId:
    return ObjectId(int.from_bytes(data[:6], "little"), *struct.unpack("<HII", data[6:16]))


def object_key(store: Store, id: ObjectId, kind: int) -> str:
    if id.session == 0:
        need(kind == SEGMENT and id.generation == id.n == 0, str(id), "is no id of an object")
        return f"{store.prefix}log/{id.seq:020}"
    folder = "segments" if kind == SEGMENT else "maps"
    return f"{store.prefix}{folder}/{id.generation:05}-{id.seq:020}-{id.session:08x}-{id.n:08}"


def prove_holder(store: Store, id: ObjectId, kind: int) -> tuple[str, int]:
    """Proves a map, a segment, or the log record with the inline records. Returns its key and where its content ends."""
    key = object_key(store, id, kind)
    size = prove(store, key, *(LOG, MAX_LOG) if id.session == 0 else (kind, MAX_SEGMENT if kind == SEGMENT else 1 << 62))
    if id.session == 0:
        group, number = struct.unpack("<16sQ", read(store, key, 64, 24))
        need(group == store.group.bytes and number == id.seq, key, "belongs elsewhere")
        return key, size
    head = read(store, key, 64, 96)
    need(head[:16] == store.group.bytes and object_id(head[32:48]) == id, key, "belongs elsewhere")
    records, end = struct.unpack_from("<II", head, 48)
    if kind == SEGMENT:
        need(records <= MAX_RECORDS and 160 <= end and end + records * INDEX_ROW == size, key, "index misplaced")
    else:
        (end,) = struct.unpack_from("<Q", head, 64)  # where the rows begin
        need(192 <= end <= size, key, "rows misplaced")
    return key, end


def parse_point(key: str, data: bytes, number: int, time: int) -> Point:
    at = 168

    def get(layout: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize("<" + layout)
        need(at <= len(data), key, "is cut short")
        return struct.unpack_from("<" + layout, data, at - struct.calcsize("<" + layout))

    def count(limit: int) -> range:
        (n,) = get("I")
        need(n <= limit, key, f"{n} of at most {limit}")
        return range(n)

    def ref(layout: str) -> Ref:
        id, size, *index, n, digest = get(layout)
        return Ref(object_id(id), size, sum(index), n, digest)

    built_on, consistency, zeroes, free_slot = get("QB7s120xI")
    need(built_on < number and consistency in CONSISTENCY and not any(zeroes), key, "bad head of the point")
    volumes: list[Volume] = []
    for _ in count(MAX_VOLUMES):
        slot, letters = get("I16xB")
        name = get(f"{letters}s")[0].decode("utf-8", "replace")
        need(NAME_RULE.fullmatch(name) is not None and slot < free_slot, key, f"bad volume {name!r}")
        size, length, digest, has_base = get("4xIQ32s9xB")
        need(size in [1 << n for n in range(14, 21)] and 1 <= length <= 1 << 46 and has_base <= 1, key, f"bad {name}")
        volumes.append(Volume(slot, name, size, length, digest, ref(MAP_REF) if has_base else None))
    need(len({v.name for v in volumes}) == len({v.slot for v in volumes}) == len(volumes), key, "a volume twice")
    deltas = [ref(MAP_REF) for _ in count(MAX_DELTAS)]
    segments = [ref(SEGMENT_REF) for _ in count(MAX_SEGMENTS)]
    (inline,) = get("I")
    own = [s for s in segments if s.id.session == 0 and s.id.seq == number]
    need(len(own) <= 1 and own == segments[len(segments) - len(own) :], key, "inline records are not the last segment")
    if own:  # the bytes of inline records do not count their index rows
        rows = own[0].count * INDEX_ROW
        need(own[0].index == at + inline and inline + rows <= MAX_INLINE, key, "inline index misplaced")
        get(f"{inline + rows}x")
    need(at == len(data) and (inline == 0 or len(own) == 1), key, "something follows the last field")
    return Point(number, time, CONSISTENCY[consistency], volumes, deltas, segments)


def open_group(store: Store, group: str) -> list[Point]:
    """Finds the group, proves its whole log, and returns all points."""
    need(group in (known := groups(store)), group, "no such group")
    store.group, store.prefix = known[group], f"groups/{known[group]}/"
    floor = hint(store, store.prefix + "floor", FLOOR, "<Q")
    head = hint(store, store.prefix + "head", HEAD, "<Q")
    marks = [int(n) for n in names_in(store, store.prefix + "checkpoints", r"[0-9]{20}")]
    numbers = {int(n) for n in names_in(store, store.prefix + "log", r"[0-9]{20}")}
    need(bool(numbers), store.prefix + "log", "no log")
    newest = max(numbers | set(marks) | set(head or ()))
    need(newest <= MAX_NUMBER, store.prefix + "log", f"number {newest}")
    first = newest
    while first - 1 in numbers and (floor is None or first > floor[0]):
        first -= 1
    floor_damaged = floor is None and os.path.lexists(store.folder / f"{store.prefix}floor")
    need(floor_damaged or first <= (floor[0] if floor else 0), f"{store.prefix}log/{first - 1:020}", "missing")
    checkpoints: dict[int, bytes] = {}
    for mark in marks:
        if found := hint(store, f"{store.prefix}checkpoints/{mark:020}", CHECKPOINT, "<16sQ32s"):
            need(found[:2] == (store.group.bytes, mark), f"checkpoint {mark}", "belongs elsewhere")
            checkpoints[mark] = found[2]
    points: list[Point] = []
    generation, before = 0, ZERO if first == 0 else checkpoints.get(first - 1)
    anchored = before is not None
    for number in range(first, newest + 1):
        key = f"{store.prefix}log/{number:020}"
        data = read(store, key, 0, prove(store, key, LOG, MAX_LOG))
        need(len(data) >= 168 and blake3(data[:32] + data[64:]).digest() == data[32:64], key, "changed or cut short")
        its_group, own, previous, its_generation, kind, time = struct.unpack_from("<16sQ32sHH36xq", data, 64)
        need(its_group == store.group.bytes and own == number, key, "belongs elsewhere")
        need(before is None or previous == before, key, "does not continue the record before: the log is not one history")
        steady = its_generation == generation or (its_generation > generation and kind == PROMOTE)
        need(number == first or steady, key, f"generation {its_generation} after {generation}")
        need((kind == CREATE) == (number == 0), key, f"type {kind}")
        generation, before = its_generation, blake3(data).digest()
        need(checkpoints.get(number, before) == before, key, "is not the record that the checkpoint knows")
        anchored = anchored or number in checkpoints
        if kind == CREATE:
            its_format = hint(store, "format", FORMAT, "<16sI") or (data[168:184], 0)
            its_body = struct.pack("<16sHB", its_format[0], 0, len(group)) + group.encode()
            need(data[168:] == its_body and its_format[1] == 0, key, "is of another group, store or cipher")
        elif kind == POINT:
            points.append(parse_point(key, data, number, time))
        elif kind != PROMOTE:
            store.warnings.append(f"{key}: of unknown type {kind}, passed over")
    need(anchored, f"{store.prefix}log/{first:020}", "neither record 0 nor a checkpoint tells how the log began")
    return points


def groups(store: Store) -> dict[str, uuid.UUID]:
    """All groups by name. One whose name is lost is known from the first record of its log, else by its id."""
    found: dict[str, uuid.UUID] = {}
    for name in names_in(store, "names", NAME_RULE.pattern):
        if fields := hint(store, f"names/{name}", NAME, "<16s"):
            found[name] = uuid.UUID(bytes=fields[0])
    for text in names_in(store, "groups", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"):
        if (id := uuid.UUID(text)) not in found.values():
            create = hint(store, f"groups/{id}/log/{0:020}", LOG, "<122xB")
            name = read(store, f"groups/{id}/log/{0:020}", 187, create[0]).decode("utf-8", "replace") if create else text
            need(name not in found, f"groups/{id}", f"another group is named {name}")
            found[name if NAME_RULE.fullmatch(name) else text] = id
    return found


def checked(entry: Entry, key: str) -> Entry:
    run = 1 <= entry.count <= PAGE and entry.block // PAGE == (entry.block + entry.count - 1) // PAGE
    data = entry.digest != ZERO and entry.count == 1 and HEADER < entry.stored <= HEADER + MAX_PAYLOAD
    need(run and (data or (entry.digest == ZERO and entry.stored == 0)), key, f"bad entry of block {entry.block}")
    return entry


def segment_entries(store: Store, ref: Ref) -> Iterator[tuple[int, Entry]]:
    """Slot and entry of every index row of a segment, or of inline records."""
    key, _ = prove_holder(store, ref.id, SEGMENT)
    end = ref.index + ref.count * INDEX_ROW
    need(ref.count <= MAX_RECORDS and end <= store.sizes[key], key, "the index lies outside")
    need(ref.size == (0 if ref.id.session == 0 else end), key, "is not of the size in its reference")
    index = read(store, key, ref.index, end - ref.index)
    need(blake3(index).digest() == ref.digest, key, "the index is not the one in its reference")
    for slot, stored, block, capture, offset, count, digest in struct.iter_unpack("<IIQQII32s", index):
        need(offset + stored <= ref.index, key, "a record lies outside")
        yield slot, checked(Entry(block, count, digest, ref.id, offset, stored, capture), key)


def map_rows(store: Store, ref: Ref, role: int, slot: int) -> dict[int, Row]:
    """The rows of a map for one slot, by page; every row is checked."""
    key, _ = prove_holder(store, ref.id, MAP)
    head = read(store, key, 0, 192)
    its_role, zeroes, its_slot, rows, rows_at, reach, reach_at, entries = struct.unpack_from("<B3sIQQQQQ", head, 112)
    whole = store.sizes[key] == ref.size and blake3(head[64:160]).digest() == ref.digest == head[160:192]
    need(whole, key, "is not the map in its reference")
    need(its_role == role and not any(zeroes) and its_slot == (slot if role == BASE else 0), key, "is of another role")
    need(192 <= rows_at and rows_at + rows * ROW == reach_at and reach_at + reach * 32 == ref.size, key, "misplaced")
    found: dict[int, Row] = {}
    last, total = (-1, -1), 0
    for data in chunks(store, key, rows_at, rows * ROW):
        for at in range(0, len(data), ROW):
            row = data[at : at + ROW]
            need(blake3(row[:112]).digest()[:16] == row[112:], key, "a row is damaged")
            its_slot, count, page, id, offset, range_digest, half = struct.unpack_from("<IIQ16sQ8x32s16s", row)
            need(last < (its_slot, page) and count <= PAGE, key, "rows out of order")
            last, total = (its_slot, page), total + count
            if its_slot == slot:
                found[page] = Row(count, object_id(id), offset, range_digest, half)
    need(total == entries == ref.count, key, f"{total} entries, {ref.count} in its reference")
    return found


def page_entries(store: Store, row: Row, page: int, base: bool) -> list[Entry]:
    key, end = prove_holder(store, row.holder, MAP)
    need(192 <= row.at <= row.at + row.entries * ENTRY <= end, key, "a page lies outside")
    data = read(store, key, row.at, row.entries * ENTRY)
    need(blake3(data).digest()[:16] == row.half, key, f"page {page} is damaged")
    found = []
    for block, digest, id, offset, stored, capture in struct.iter_unpack("<Q32s16sIIQ", data):
        count, at = (offset, 0) if digest == ZERO else (1, offset)
        found.append(checked(Entry(block, count, digest, object_id(id), at, stored, capture), key))
        need(block // PAGE == page, key, f"block {block} in page {page}")
    if base:
        by_block = {e.block % PAGE: e.digest for e in found}
        right = range_digest([by_block.get(n, ZERO) for n in range(PAGE)]) == row.range_digest
        need(right, key, f"page {page} has another range digest")
    return found


def range_digest(digests: list[bytes]) -> bytes:
    last = max((n for n, d in enumerate(digests) if d != ZERO), default=-1)
    return blake3(b"".join(digests[: last + 1]), derive_key_context=RANGE_DIGEST).digest() if last >= 0 else ZERO


def fetch(store: Store, e: Entry, slot: int, length: int) -> bytes:
    """The bytes of a block, proven."""
    key, end = prove_holder(store, e.holder, SEGMENT)
    need(160 <= e.offset and e.offset + e.stored <= end, key, f"the record of block {e.block} lies outside")
    data = read(store, key, e.offset, e.stored)
    magic, kind, encoding, cipher, zero, *rest = struct.unpack("<4sBBBBIIQQ32s", data[:HEADER])
    need((magic, kind, cipher, zero) == (b"BHB1", 1, 0, 0) and encoding in (0, 1), key, f"bad record at {e.offset}")
    need(rest == [slot, e.stored - HEADER, e.block, e.capture, e.digest], key, f"no block {e.block} at {e.offset}")
    plain = data[HEADER:]
    if encoding == 1:
        try:
            frame = zstandard.get_frame_parameters(plain)
            unsized = frame.content_size == zstandard.CONTENTSIZE_UNKNOWN  # else zstandard would believe that size
            need(unsized and not frame.has_checksum and not frame.dict_id, key, f"strange frame at {e.offset}")
            plain = zstandard.ZstdDecompressor().decompress(plain, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as why:
            raise Damage(f"{key}: block {e.block}: {why}") from None
    need(len(plain) == length and blake3(plain).digest() == e.digest, key, f"block {e.block} is damaged")
    return plain


def volume_digest(volume: Volume, pages: Iterable[list[bytes]]) -> bytes:
    whole = blake3(struct.pack("<IQ", volume.block_size, volume.length), derive_key_context=VOLUME_DIGEST)
    for digests in pages:
        whole.update(range_digest(digests))
    return whole.digest()


def pages_of_store(store: Store, point: Point, volume: Volume, target: int | None) -> Iterator[list[bytes]]:
    """Reads and proves all blocks, and writes them to an empty file if there is one. Yields their digests."""
    blocks = -(-volume.length // volume.block_size)
    deltas = [map_rows(store, ref, DELTA, volume.slot) for ref in point.deltas]
    base = map_rows(store, volume.base, BASE, volume.slot) if volume.base else {}
    loose: dict[int, list[Entry]] = {}
    for ref in point.segments:
        for slot, entry in segment_entries(store, ref):
            if slot == volume.slot:
                loose.setdefault(entry.block // PAGE, []).append(entry)
    for page in range(-(-blocks // PAGE)):
        entries = loose.get(page, [])
        for rows in [base, *deltas]:
            if row := rows.get(page):
                entries = entries + page_entries(store, row, page, rows is base)
        best: dict[int, Entry] = {}
        for entry in entries:
            for block in range(entry.block, min(entry.block + entry.count, blocks)):
                if block not in best or (best[block].capture, best[block].digest) < (entry.capture, entry.digest):
                    best[block] = entry
        digests = [ZERO] * PAGE
        for block, entry in best.items():
            digests[block % PAGE] = entry.digest
            if entry.digest != ZERO:
                at = block * volume.block_size
                plain = fetch(store, entry, volume.slot, min(volume.block_size, volume.length - at))
                if target is not None:
                    need(os.pwrite(target, plain, at) == len(plain), "target", "could not be written")
        yield digests


def pages_of_file(fd: int, volume: Volume) -> Iterator[list[bytes]]:
    for start in range(0, volume.length, PAGE * volume.block_size):
        digests = []
        for at in range(start, min(start + PAGE * volume.block_size, volume.length), volume.block_size):
            data = os.pread(fd, min(volume.block_size, volume.length - at), at)
            digests.append(blake3(data).digest() if data.strip(b"\0") else ZERO)
        yield digests


def restore(store: Store, point: Point, volume: Volume, target: int | None) -> None:
    """Proves a volume, and if there is an empty file makes it the volume and reads it back."""
    right = volume_digest(volume, pages_of_store(store, point, volume, target)) == volume.digest
    need(right, volume.name, f"the volume digest is not the one in point {point.number}")
    if target is not None:
        os.truncate(target, volume.length)
        os.fsync(target)
        right = volume_digest(volume, pages_of_file(target, volume)) == volume.digest
        need(right, "target", "read back it has another digest")


def list_points(store: Store) -> None:
    for name in (found := groups(store)):
        print(f"group {name} {found[name]}")
        for p in open_group(store, name):
            time = datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=max(-(1 << 45), min(p.time, 1 << 45)))
            print(f"  point {p.number}  {time.isoformat(timespec='milliseconds')}Z  {p.consistency}")
            for v in p.volumes:
                print(f"    {v.name}  {v.length} bytes in blocks of {v.block_size}  {v.digest.hex()}")


def restore_volume(store: Store, group: str, which: str, name: str, target: str) -> None:
    points = open_group(store, group)
    if which == "latest":
        which = str(max((p.number for p in points if p.consistency != "fuzzy"), default="latest"))
    found = [(p, v) for p in points if str(p.number) == which for v in p.volumes if v.name == name]
    need(len(found) == 1, f"{group}/{name}@{which}", "no such point or volume")
    need(not os.path.lexists(target), target, "exists already")
    (point, volume), unfinished = found[0], target + ".unfinished"
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        restore(store, point, volume, fd)
        os.rename(unfinished, target)
    except BaseException:
        os.unlink(unfinished)
        raise
    finally:
        os.close(fd)
    print(f"{group}/{name}@{point.number}: {volume.length} bytes, proven, digest {volume.digest.hex()}")


def selfcheck(store: Store) -> None:
    """Reads all that the latest point of every group needs; the newest one if all are fuzzy."""
    bad = 0
    for name in groups(store):
        try:
            points = open_group(store, name)
            good = [p for p in points if p.consistency != "fuzzy"] or points
            for volume in good[-1].volumes if good else ():
                restore(store, good[-1], volume, None)
                print(f"{name}/{volume.name}@{good[-1].number}: proven")
        except (Damage, Unknown, OSError) as why:
            bad += 1
            print(f"{name}: {why}", file=sys.stderr)
    print(f"{len(store.sizes)} objects read")
    need(bad == 0 and not store.warnings, "store", f"{bad} groups damaged, {len(store.warnings)} warnings")


def main(arguments: list[str]) -> int:
    store = Store(Path(arguments[0] if arguments else ".").resolve())
    try:
        match arguments[1:]:
            case ["list"]:
                list_points(store)
            case ["restore", group, point, volume, target]:
                restore_volume(store, group, point, volume, target)
            case ["selfcheck"]:
                selfcheck(store)
            case _:
                raise Damage(f"no such command\n{__doc__}")
        code = 0
    except (Damage, Unknown, OSError) as why:
        print(f"not proven: {why}", file=sys.stderr)
        code = 1
    for warning in dict.fromkeys(store.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
