#!/usr/bin/env python3
"""The reader that is written from protocol/STORE.md alone restores what the real programs wrote, and never says that
something is proven which is not (I4, I9, I21).

Run it with target/python/bin/python, which scripts/setup-tests.sh makes. BACKHAUL_BIN is the folder of the programs,
BACKHAUL_TEST_SEED replays a run.
"""

import contextlib
import io
import os
import random
import secrets
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from blake3 import blake3

import restore

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("BACKHAUL_BIN", REPOSITORY / "target/debug")).resolve()
SEED = int(os.environ.get("BACKHAUL_TEST_SEED") or secrets.randbits(32))
GROUP = "web"
PATIENCE = 60  # seconds; a command that takes longer hangs
FLIPS = 40
SMALL_POINTS = 70  # more than the 64 loose segments that a point may name, so that maps come to be


def read_by_script(store: Path, point: int | str, volume: str, target: Path) -> tuple[int, str]:
    """Exit code and standard error of restore.py in this process. An exception is a failure of the test."""
    target.unlink(missing_ok=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = restore.main([str(store), "restore", GROUP, str(point), volume, str(target)])
    return code, err.getvalue()


def clean_environment() -> dict[str, str]:
    """Without the settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BACKHAUL_")}


def run(program: str, *arguments: str | Path, stdin: str = "") -> str:
    command = [str(BIN / program), *map(str, arguments)]
    piped = {"input": stdin, "capture_output": True, "text": True, "timeout": PATIENCE}
    ran = subprocess.run(command, env=clean_environment(), **piped)
    if ran.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def restore_by_receiver(store: Path, point: int, volume: str, target: Path) -> bytes:
    target.unlink(missing_ok=True)
    source, aim = ["--store", f"file://{store}", f"{GROUP}/{volume}@{point}"], ["--to", target, "--verify", "cached"]
    run("backhaul-receiver", "restore", *source, *aim)
    return target.read_bytes()


def points_of(store: Path) -> list[restore.Point]:
    return restore.open_group(restore.Store(store.resolve()), GROUP)


def objects_of_newest(store: Path) -> set[str]:
    """Keys of all objects that are read to restore the volumes of the newest point."""
    opened = restore.Store(store.resolve())
    point = restore.open_group(opened, GROUP)[-1]
    for volume in point.volumes:
        restore.restore(opened, point, volume, None)
    return set(opened.sizes)


class InFolder(unittest.TestCase):
    def setUp(self) -> None:
        self.dir = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="backhaul-independent-")))


class Golden(InFolder):
    """The store in tests/golden/store; what it holds is told by tests/golden_store/build.rs."""

    STORE = REPOSITORY / "tests/golden/store"
    BLOCK = 16_384
    LENGTHS = {"root": 5 * BLOCK + 700, "data": 40 * BLOCK}

    @classmethod
    def block(cls, slot: int, index: int, version: int, length: int) -> bytes:
        seed = blake3(bytes([slot, index, version])).digest()
        if length < cls.BLOCK:
            return blake3(key=seed).digest(length=length)
        return (seed * (length // len(seed) + 1))[:length]

    @classmethod
    def image(cls, point: int, volume: str) -> bytes:
        contents = {(0, i): 1 for i in range(6)} | {(1, 1): 1, (1, 30): 1, (1, 31): 1}
        if point >= 3:
            contents[0, 2] = 2
            del contents[1, 31]
        if point >= 5:
            contents[0, 1] = contents[1, 3] = 3
        slot, out = list(cls.LENGTHS).index(volume), bytearray(cls.LENGTHS[volume])
        for (own, index), version in contents.items():
            if own == slot:
                at = index * cls.BLOCK
                out[at : at + cls.BLOCK] = cls.block(slot, index, version, min(cls.BLOCK, len(out) - at))
        return bytes(out)

    def test_every_point_of_the_golden_store_is_restored(self) -> None:
        points = points_of(self.STORE)
        self.assertEqual([p.number for p in points], [2, 3, 4, 5])
        for point in points:
            self.assertEqual({v.name: v.length for v in point.volumes}, self.LENGTHS)
            for volume in self.LENGTHS:
                with self.subTest(point=point.number, volume=volume):
                    self.assertEqual(read_by_script(self.STORE, point.number, volume, self.dir / "ours"), (0, ""))
                    right = self.image(point.number, volume)
                    self.assertTrue((self.dir / "ours").read_bytes() == right, "I21: other bytes")
                    theirs = restore_by_receiver(self.STORE, point.number, volume, self.dir / "theirs")
                    self.assertTrue(theirs == right, "the receiver restores other bytes")

    def test_what_is_not_there_is_not_restored(self) -> None:
        for point, volume in [(1, "root"), (6, "root"), (5, "none"), ("latest", "../root")]:
            code, err = read_by_script(self.STORE, point, volume, self.dir / "ours")
            self.assertEqual((code, "not proven" in err, os.listdir(self.dir)), (1, True, []))


class Fresh(InFolder):
    """A store that the programs of this build make: two volumes of odd sizes that change, grow and get holes."""

    def setUp(self) -> None:
        super().setUp()
        self.random = random.Random(SEED)
        self.store, self.saved = self.dir / "store", {}
        self.images = {"root": bytearray(self.noise(3_000_017)), "data": bytearray(5_242_881)}
        self.images["data"][1_000_000:1_300_000] = self.noise(300_000)

    def noise(self, length: int) -> bytes:
        """Half of it compresses."""
        return (self.random.randbytes(length // 2) + self.random.randbytes(7) * length)[:length]

    def write(self, volume: str, at: int, data: bytes) -> None:
        self.images[volume][at : at + len(data)] = data

    def receiver(self, *arguments: str | Path) -> str:
        at = ["--store", f"file://{self.store}", "--state", self.dir / "receiver"]
        return run("backhaul-receiver", *arguments, *at)

    def agent(self, *arguments: str | Path, stdin: str = "") -> str:
        at = ["--config", self.dir / "agent.toml", "--state", self.dir / "agent"]
        return run("backhaul-agent", *arguments, *at, stdin=stdin)

    def write_images(self) -> None:
        for volume, image in self.images.items():
            (self.dir / f"{volume}.img").write_bytes(image)

    def sync(self) -> None:
        """Makes a point and keeps what it must hold."""
        self.write_images()
        self.agent("sync")
        number = max(int(path.name) for path in self.store.glob("groups/*/log/*"))
        self.saved[number] = {volume: bytes(image) for volume, image in self.images.items()}

    def serve(self) -> str:
        """Starts a receiver on a free port; its address. It is ended by its id when the test ends."""
        at = ["--store", f"file://{self.store}", "--state", str(self.dir / "receiver")]
        command = [str(BIN / "backhaul-receiver"), "serve", "--listen", "127.0.0.1:0", *at]
        with (self.dir / "serve.err").open("w") as err:
            piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": err, "text": True}
            child = subprocess.Popen(command, env=clean_environment(), **piped)
        self.enterContext(child)
        for clean_up in (child.kill, lambda: child.wait(PATIENCE), child.terminate):  # the last one first
            self.addCleanup(clean_up)
        line = child.stdout.readline()
        self.assertTrue(line.startswith("listening on "), line + (self.dir / "serve.err").read_text())
        return line.split()[-1]

    def replicate(self) -> None:
        self.receiver("init")
        address = self.serve()
        (self.dir / "machine").write_text("the first machine\n")
        (self.dir / "agent.toml").write_text(f'machine_id_file = "{self.dir}/machine"\nblock_size = "16KiB"\n')
        words = self.receiver("token", "--group", GROUP, "--address", address).split()
        token = next(word for word in words if word.startswith("bh1."))
        self.agent("join", "-", stdin=token + "\n")
        self.write_images()
        self.agent("protect", *(f"{volume}={self.dir / volume}.img" for volume in self.images))
        self.sync()
        self.write("root", 123_456, self.noise(400_000))
        self.sync()
        self.write("root", 1_000_000, bytes(500_000))  # zeroes
        self.write("data", 1_050_000, bytes(100_000))
        self.sync()
        self.images["root"] += bytes(700_001) + self.noise(99_999)  # growth
        self.images["data"] += bytes(20_000_000)
        self.sync()
        for n in range(SMALL_POINTS):
            volume = self.random.choice(list(self.images))
            at = self.random.randrange(len(self.images[volume]) - 17_000)
            self.write(volume, at, self.noise(99) + bytes(16_384 * (n % 3 == 0)))
            self.sync()
        self.write("data", 3_000_000, self.noise(1_000_000))
        self.sync()

    def assert_points(self, numbers: list[int]) -> None:
        for number in numbers:
            for volume, right in self.saved[number].items():
                with self.subTest(point=number, volume=volume):
                    self.assertEqual(read_by_script(self.store, number, volume, self.dir / "ours"), (0, ""))
                    self.assertTrue((self.dir / "ours").read_bytes() == right, "I4: other bytes")

    def flip(self, newest: int, keys: list[str]) -> bool:
        """Flips a bit of an object; whether that was found. What ends well has the right bytes (I9)."""
        key, found = self.random.choice(keys), False
        good = (path := self.store / key).read_bytes()
        at, bit = self.random.randrange(len(good)), self.random.randrange(8)
        path.chmod(0o600)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        for volume, right in self.saved[newest].items():
            code, _ = read_by_script(self.store, newest, volume, self.dir / "ours")
            exists = (self.dir / "ours").exists()
            self.assertEqual(exists, code == 0, f"{key} byte {at} bit {bit}: exit {code}")
            self.assertTrue(code != 0 or (self.dir / "ours").read_bytes() == right, f"I9: {key} byte {at} bit {bit}")
            found |= code != 0
        path.write_bytes(good)
        return found

    def test_what_the_programs_wrote_is_restored_and_damage_is_found(self) -> None:
        self.replicate()
        numbers, newest = sorted(self.saved), max(self.saved)
        self.assertEqual([p.number for p in points_of(self.store)], numbers)
        self.assert_points([*numbers[:4], *numbers[-3:]])
        objects = objects_of_newest(self.store)
        found = dict.fromkeys(("/log/", "/segments/", "/maps/", ""), 0)
        for n in range(FLIPS):
            folder = list(found)[n % 4]
            keys = sorted(key for key in objects if folder in key)
            self.assertTrue(keys, f"the newest point needs none of {folder}")
            found[folder] += self.flip(newest, keys)
        print(f"{len(numbers)} points, {len(objects)} objects; found of {FLIPS} flips: {found}", file=sys.stderr)
        for folder in ("/log/", "/segments/", "/maps/"):
            self.assertEqual(found[folder], FLIPS // 4, "what is read whole is damaged, and nothing was said")
        self.assert_points([newest])


if __name__ == "__main__":
    print(f"BACKHAUL_TEST_SEED={SEED}", file=sys.stderr, flush=True)
    unittest.main(verbosity=2)
