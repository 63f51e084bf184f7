#!/usr/bin/env python3
"""Measures how memory and time of the release programs grow: with volumes, with points, with agents. Prints Markdown.

    benches/scale.py [--work DIR] [--only volumes,points,agents] [--sizes GIB,...] [--points N,...] [--agents N,...] [--runs N]

volumes  sparse images with the same 256 MiB: 4,096 pieces of 64 KiB, spread evenly, so that each is on an index page of its
         own where the volume is large enough; and in one piece at the beginning, so that one thread has all the work while
         the others run ahead. The receiver starts and stops inside each sync.
points   one group of one small volume; between the marks each point has one changed block, made by `sync` against a
         receiver that stays. At a mark: what each command takes, with a receiver that starts cold, or one that is warm.
agents   so many at once on one receiver, each with a state folder, a group and 64 MiB of random data of its own.

Times are the smallest of N runs, memory is the largest. DIR is best a file system in memory: the marks of
`points` are ten thousand commits, each flushed.
"""
import argparse, collections, itertools, json, os, random, re, shutil, subprocess, sys, tempfile, time

from programs import Programs, require

BLOCK = 64 << 10
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid, what):
    """VmHWM is the peak, VmRSS what it has now."""
    return int(re.search(rf"{what}:\s+(\d+)", open(f"/proc/{pid}/status").read()).group(1)) / 1024


def forget_peak(pid):
    with open(f"/proc/{pid}/clear_refs", "w") as f:
        f.write("5")


def best(runs):
    """Of several measurements of one process."""
    return {"wall": min(r["wall"] for r in runs), "cpu": min(r["cpu"] for r in runs), "rss_mib": max(r["rss_mib"] for r in runs)}


def table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---:|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def ms(seconds):
    return f"{seconds * 1e3:,.0f}"


def times(measured):
    return f"{ms(measured['wall'])} ({ms(measured['cpu'])})"


def both(agent, receiver):
    return f"{ms(agent['wall'])} ({ms(agent['cpu'])} + {ms(receiver['cpu'])})"


def peak(*measured):
    return f"{max(m['rss_mib'] for m in measured):.0f}"


def peaks(*syncs):
    """Of agent and receiver."""
    return " + ".join(f"{max(s[i]['rss_mib'] for s in syncs):.0f}" for i in (0, 1))


class Scale(Programs):
    def __init__(self, args, name):
        folder = os.path.join(args.work, name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        super().__init__(folder, open(os.path.join(args.work, "scale.log"), "a"))
        self.args, self.image = args, os.path.join(folder, "volume.img")
        self.run(*self.tool("receiver", "init"))

    def begin(self):
        receiver = self.serve()
        self.join(self.image)
        receiver.stop()

    def sync(self):
        out, agent = self.measured(*self.tool("agent", "sync", "--json")).finish()
        return json.loads(out)["point"], agent

    def cold_sync(self, before=lambda: None, runs=1):
        agents, receivers = [], []
        for _ in range(runs):
            before()
            receiver = self.serve()
            agents.append(self.sync()[1])
            receivers.append(receiver.stop())
        return best(agents), best(receivers)

    def warm_sync(self, before=lambda: None):
        """The same with a receiver that knows the group already. The kernel tells the CPU time of who still runs in steps
        of 10 ms: a mean of many."""
        receiver = self.serve()
        self.sync()
        pid, many = receiver.own_pid(), 10
        used, agents = cpu_seconds(pid), []
        for _ in range(many):
            before()
            agents.append(self.sync()[1])
        used = (cpu_seconds(pid) - used) / many
        return best(agents), {"cpu": used, "rss_mib": receiver.stop()["rss_mib"]}

    def opened(self, point="latest"):
        command = self.tool("receiver", "restore", f"bench/disk@{point}", "--to", f"{self.dir}/never", "--dry-run", "--json")
        return best([self.measured(*command).finish()[1] for _ in range(self.args.runs)])

    def restored(self):
        """To a new file, which is read back and then removed."""
        target, runs = f"{self.dir}/restored.img", []
        for _ in range(self.args.runs):
            command = self.tool("receiver", "restore", "bench/disk", "--to", target, "--verify", "cached", "--json")
            runs.append(self.measured(*command).finish()[1])
            os.unlink(target)
        return best(runs)

    def listed(self):
        command = self.tool("receiver", "points", "bench", "--json")
        return best([self.measured(*command).finish()[1] for _ in range(self.args.runs)])

    def objects(self):
        """How many of each kind, and the bytes of all."""
        kinds, size = collections.Counter(), 0
        for folder, _, names in os.walk(f"{self.dir}/store"):
            kinds[os.path.basename(folder)] += len(names)
            size += sum(os.path.getsize(os.path.join(folder, name)) for name in names)
        return kinds, size

    def close(self):
        shutil.rmtree(self.dir)


def volumes(args):
    rows, pieces = [], 4096
    for gib, layout in itertools.product(args.sizes, ("spread", "one piece")):
        bench, rng = Scale(args, "volumes"), random.Random(1)
        apart = (gib << 30) // pieces // BLOCK * BLOCK if layout == "spread" else BLOCK
        with open(bench.image, "wb") as f:
            f.truncate(gib << 30)
            for piece in range(pieces):
                f.seek(piece * apart)
                f.write(rng.randbytes(BLOCK))
        bench.begin()
        first, idle, opened, listed = bench.cold_sync(), bench.cold_sync(runs=args.runs), bench.opened(), bench.listed()
        restored = bench.restored()
        stored = bench.objects()[1]
        state = sum(os.stat(os.path.join(d, n)).st_blocks * 512 for d, _, names in os.walk(f"{bench.dir}/agent") for n in names)
        rows.append([f"{gib:,} GiB, {layout}", both(*first), peaks(first), both(*idle), peaks(idle), times(opened), peak(opened),
                     times(restored), peak(restored), times(listed), f"{stored / 2**20:.1f}", f"{state / 2**20:.1f}"])
        print(rows[-1], file=sys.stderr)
        bench.close()
    table("256 MiB in a sparse volume; wall ms (CPU ms), of a sync agent + receiver; peaks in MiB",
          ["volume", "first sync", "peak", "no change", "peak", "`restore --dry-run`", "peak", "restore", "peak", "`points`",
           "store MiB", "agent's state MiB"], rows)


class Traced:
    """What a receiver asks of the store's folders during one sync, from strace."""

    def __init__(self, bench):
        with tempfile.NamedTemporaryFile("r", suffix=".strace") as trace:
            receiver = bench.serve("strace", "-f", "-qq", "-e", "trace=getdents64,openat2,newfstatat,statx", "-o", trace.name)
            start = os.path.getsize(trace.name)
            bench.sync()
            receiver_pid = receiver.own_pid()  # strace, which passes the signal on by ending
            children = open(f"/proc/{receiver_pid}/task/{receiver_pid}/children").read().split()
            os.kill(int(children[0]), 15)
            receiver.finish()
            trace.seek(start)
            text = trace.read()
        names = [int(n) for n in re.findall(r"getdents64\(.*?/\* (\d+) entries \*/", text)]
        names += [int(n) for n in re.findall(r"<\.\.\. getdents64 resumed>.*?/\* (\d+) entries \*/", text)]
        self.folders, self.names = sum(1 for n in names if n == 0), sum(names)
        self.opens = len(re.findall(r"openat2\(", text))


def points(args):
    bench = Scale(args, "points")
    rng, blocks = random.Random(1), 256
    with open(bench.image, "wb") as f:
        f.truncate(256 << 20)
        for _ in range(blocks):
            f.write(rng.randbytes(64) * (BLOCK // 64))

    def change():
        with open(bench.image, "r+b") as f:
            f.seek(rng.randrange(blocks) * BLOCK)
            f.write(rng.randbytes(4096))

    bench.begin()
    rows, store, making = [], [], []
    for mark in args.points:
        receiver = bench.serve()
        pid, oldest = receiver.own_pid(), 1
        point = bench.sync()[0]
        while point < mark:
            start, used, n = time.monotonic(), cpu_seconds(pid), min(1000, mark - point)
            agents = os.times()
            for _ in range(n):
                change()
                bench.run(*bench.tool("agent", "sync", "-q"))
            point, now = point + n, os.times()
            agents = now.children_user + now.children_system - agents.children_user - agents.children_system
            each = time.monotonic() - start, agents, cpu_seconds(pid) - used
            making.append([f"{point:,}", *(f"{seconds / n * 1e3:.1f}" for seconds in each), f"{memory(pid, 'VmRSS'):.0f}",
                           f"{memory(pid, 'VmHWM'):.0f}"])
            print(making[-1], file=sys.stderr)
        receiver.stop()
        oldest, newest, listed = bench.opened(oldest), bench.opened(), bench.listed()
        syncs = [bench.cold_sync(runs=args.runs), bench.cold_sync(change, args.runs), bench.warm_sync(), bench.warm_sync(change)]
        rows.append([f"{point:,}", *(both(*s) for s in syncs), peaks(*syncs), times(newest), times(oldest),
                     peak(newest, oldest), times(listed), peak(listed)])
        (kinds, size), traced = bench.objects(), Traced(bench) if shutil.which("strace") else None
        store.append([f"{point:,}", *(f"{kinds[k]:,}" for k in ("log", "segments", "maps", "checkpoints")), f"{size / 2**20:.1f}",
                      *([f"{traced.folders}", f"{traced.names:,}", f"{traced.opens:,}"] if traced else ["", "", ""])])
        print(rows[-1], store[-1], file=sys.stderr)
    table("Points of one group; wall ms (CPU ms), of a sync agent + receiver; peaks in MiB",
          ["points", "no change, cold", "one change, cold", "no change, warm", "one change, warm", "peak", "open newest",
           "open oldest", "peak", "`points`", "peak"], rows)
    table("Objects in the store, and what one sync with a cold receiver reads of its folders",
          ["points", "log", "segments", "maps", "checkpoints", "MiB", "folders read", "names read", "opens of a file or folder"], store)
    table("Making them, a point, since the row above: milliseconds, and the receiver's memory in MiB",
          ["up to point", "wall", "agent's CPU", "receiver's CPU", "receiver now", "peak"], making)
    bench.close()


class Fleet(Scale):
    """Machines that replicate to one receiver, each a group of its own."""

    def __init__(self, args, count):
        super().__init__(args, "agents")
        self.receiver, self.machines = self.serve(), []
        self.pid = self.receiver.own_pid()
        for n in range(count):
            folder = f"{self.dir}/machine{n}"
            os.makedirs(folder)
            env = dict(self.env, BACKHAUL_AGENT_STATE=f"{folder}/agent")
            with open(f"{folder}/volume.img", "wb") as f:
                f.write(random.Random(n).randbytes(64 << 20))
            self.join(f"{folder}/volume.img", f"g{n}", env)
            self.machines.append(env)

    def start(self, *command):
        forget_peak(self.pid)
        return [self.measured(*self.tool("agent", *command), env=env) for env in self.machines]

    def sync_all(self):
        start, used = time.monotonic(), cpu_seconds(self.pid)
        ended = [r.finish()[1] for r in self.start("sync", "-q")]
        mean = sum(e["cpu"] for e in ended) / len(ended)
        return [f"{time.monotonic() - start:.1f}", f"{mean:.2f} + {cpu_seconds(self.pid) - used:.2f}",
                f"{max(e['rss_mib'] for e in ended):.0f} + {memory(self.pid, 'VmHWM'):.0f}"]

    def idle(self, seconds):
        """All are connected, and have been for as long as they are then watched."""
        running = self.start("run", "-q")
        time.sleep(seconds)
        pids, used = [r.own_pid() for r in running], cpu_seconds(self.pid)
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        mean, used = (sum(map(cpu_seconds, pids)) - before) / len(pids), cpu_seconds(self.pid) - used
        memories = max(memory(pid, "VmRSS") for pid in pids), memory(self.pid, "VmRSS")
        for r in running:
            r.stop()
        return [f"{mean / seconds * 60:.2f} + {used / seconds * 60:.2f}", " + ".join(f"{m:.0f}" for m in memories)]


def agents(args):
    rows = []
    for count in args.agents:
        bench = Fleet(args, count)
        rows.append([str(count), *bench.sync_all(), *bench.sync_all(), *bench.idle(args.idle)])
        print(rows[-1], file=sys.stderr)
        bench.receiver.stop()
        bench.close()
    table("Agents at once on one receiver, 64 MiB of random data each; CPU seconds and peak MiB of one agent + the receiver",
          ["agents", "first sync, wall s", "CPU s", "peak", "no change, wall s", "CPU s", "peak", "idle, CPU s a minute", "MiB"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]
    parts = {"volumes": volumes, "points": points, "agents": agents}
    parser.add_argument("--work", default="/dev/shm/backhaul-scale")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(parts))
    parser.add_argument("--sizes", type=numbers, default=[1, 16, 256, 4096, 15360], help="volume sizes in GiB; ext4 takes files of less than 16 TiB")
    parser.add_argument("--points", type=numbers, default=[1, 100, 1000, 10000])
    parser.add_argument("--agents", type=numbers, default=[1, 10, 50], help="how many at once")
    parser.add_argument("--idle", type=int, default=60, help="seconds to watch idle agents")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    require()
    if set(args.only) - set(parts):
        sys.exit(f"--only takes {', '.join(parts)}")
    os.makedirs(args.work, exist_ok=True)
    for name in args.only:
        parts[name](args)


if __name__ == "__main__":
    main()
