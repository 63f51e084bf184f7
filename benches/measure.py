#!/usr/bin/env python3
"""Measures whole runs of the release binaries on a volume that you name.

    benches/measure.py VOLUME [--work DIR] [--runs N] [--verify cached|device] [--store URL]

VOLUME is an image file or a block device. It is only read: it is copied to DIR first, and the copy is what changes.
Phases: first sync, no change, scattered (one 4 KiB write in 1 % of the 64 KiB blocks), restore to a new file, and in place
onto the first state. For each process: wall and CPU seconds and peak memory; for each phase: bytes read, sent, stored.
The receiver starts and stops inside each measured phase. Prints a table, medians of N runs.
"""
import argparse, json, os, random, shutil, statistics, subprocess, sys, time

from programs import Programs, require

BLOCK = 64 << 10


class Bench(Programs):
    def __init__(self, args):
        self.args, self.rows = args, {}
        super().__init__(os.path.join(args.work, "measure"), open(os.path.join(args.work, "measure.log"), "w"), args.store)
        self.image = os.path.join(self.dir, "volume.img")

    def prepare(self):
        shutil.rmtree(self.dir, ignore_errors=True)
        os.makedirs(self.dir)
        print(f"copying {self.args.volume}", file=sys.stderr)
        self.run("cp", "--sparse=never", "--reflink=auto", self.args.volume, self.image)
        self.run(*self.tool("receiver", "init"))
        receiver = self.serve()
        self.join(self.image)
        receiver.stop()

    def stored(self):
        out = subprocess.run(["du", "-sb", f"{self.dir}/store"], capture_output=True, text=True).stdout
        return int(out.split()[0]) if out else 0

    def warm(self, *paths):
        subprocess.run(["sync"])
        for path in paths:
            for base, _, names in os.walk(path) if os.path.isdir(path) else [(os.path.dirname(path), [], [os.path.basename(path)])]:
                for name in names:
                    with open(os.path.join(base, name), "rb") as f:
                        while f.read(1 << 22):
                            pass

    def note(self, phase, wall, processes, **bytes_):
        self.rows.setdefault(phase, []).append((wall, processes, bytes_))

    def sync(self, phase):
        self.warm(self.image)
        before, start = self.stored(), time.monotonic()
        receiver = self.serve()
        agent = self.measured(*self.tool("agent", "sync", "--json"))
        out, agent_times = agent.finish()
        receiver_times = receiver.stop()
        wall = time.monotonic() - start
        result = json.loads(out)
        self.note(phase, wall, {"agent": agent_times, "receiver": receiver_times}, read=result["bytes_scanned"],
                  sent=result["bytes_sent"] + result["metadata_bytes"], stored=self.stored() - before)

    def restore(self, phase, target):
        self.warm(f"{self.dir}/store", *([target] if os.path.exists(target) else []))
        start = time.monotonic()
        command = self.tool("receiver", "restore", "bench/disk", "--to", target, "--verify", self.args.verify, "--json")
        out, times = self.measured(*command).finish()
        result = json.loads(out)
        self.note(phase, time.monotonic() - start, {"receiver": times}, read=result["bytes_read"],
                  sent=result["bytes_fetched"] + result["metadata_bytes"], stored=result["bytes_written"])
        if subprocess.run(["cmp", "-s", self.image, target]).returncode != 0:
            sys.exit(f"{phase}: the restored file differs from the volume")

    def scatter(self):
        rng = random.Random(3)
        blocks = os.path.getsize(self.image) // BLOCK
        with open(self.image, "r+b") as f:
            for block in sorted(rng.sample(range(blocks), max(1, blocks // 100))):
                f.seek(block * BLOCK + rng.randrange((BLOCK - 4096) // 512 + 1) * 512)
                f.write(rng.randbytes(4096))

    def once(self):
        self.prepare()
        stale = os.path.join(self.dir, "stale.img")
        self.sync("first sync")
        self.sync("no change")
        shutil.copyfile(self.image, stale)
        self.scatter()
        self.sync("scattered")
        self.restore("restore", os.path.join(self.dir, "restored.img"))
        os.unlink(os.path.join(self.dir, "restored.img"))
        self.restore("in place", stale)

    def table(self, size):
        print(f"\nvolume {size / 2**20:.0f} MiB, {self.args.runs} runs, medians; restore read back: {self.args.verify}")
        print(f"{'phase':12} {'wall s':>8} {'MB/s':>7}  {'process':10} {'wall s':>7} {'cpu s':>7} {'cpu s/GB':>8} {'rss MiB':>8}"
              f" {'read MiB':>9} {'sent MiB':>9} {'stored MiB':>10}")
        for phase, runs in self.rows.items():
            wall = statistics.median(r[0] for r in runs)
            for i, name in enumerate(runs[0][1]):
                median = lambda key: statistics.median(r[1][name][key] for r in runs)
                head = f"{phase:12} {wall:8.2f} {size / 1e6 / wall:7.0f}" if i == 0 else " " * 29
                tail = "".join(f" {statistics.median(r[2][k] for r in runs) / 2**20:{w}.1f}"
                               for k, w in (("read", 9), ("sent", 9), ("stored", 10))) if i == 0 else ""
                print(f"{head}  {name:10} {median('wall'):7.2f} {median('cpu'):7.2f} {median('cpu') / size * 1e9:8.2f} {median('rss_mib'):8.0f}{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume")
    parser.add_argument("--work", default="/tmp/backhaul-measure")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--verify", choices=["cached", "device"], default="cached")
    parser.add_argument("--store", help="URL of an empty store; default: a folder in the work folder")
    args = parser.parse_args()
    require()
    if args.store and args.runs != 1:
        sys.exit("--store names one empty store: use --runs 1")
    os.makedirs(args.work, exist_ok=True)
    bench = Bench(args)
    for _ in range(args.runs):
        bench.once()
    bench.table(os.path.getsize(bench.image))
    shutil.rmtree(bench.dir)


if __name__ == "__main__":
    main()
