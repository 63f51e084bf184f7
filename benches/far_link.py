#!/usr/bin/env python3
"""Measures Backhaul's release binaries, TCP with TLS and rsync over a long link, all over the same one.

    cargo build --release -p backhaul-agent -p backhaul-receiver -p backhaul-benches
    sudo benches/far_link.py [--rtt 50,100] [--loss 0,0.1,1] [--size MIB] [--cases NAME,...] [--runs N]
    sudo benches/far_link.py --share [--rate MBIT]       two flows share the link: who gets what
    benches/far_link.py --proxy                          without root: Backhaul alone, through the UDP proxy

The link is `far-link` (benches/far_link/): packets of at most 1,500 bytes, a rate, a queue of one round trip that drops
what does not fit, random loss, a delay. As root it lies between two network namespaces that this script makes, and
carries TCP too; the kernel's windows for TCP are raised to what the link needs. Data is random: nothing is compressed.
Each way: `up` is a first sync or the same bytes sent, `down` a restore over the network or the same bytes fetched.
Wire MB/s are IP bytes that the link passed on in that direction, divided by the wall time of the whole command; steady:
the same between 15 and 85 % of the bytes. A command that takes longer than a minute is cut off; its rate counts.
"""
import argparse, fcntl, json, os, shutil, signal, statistics, struct, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.environ.get("BACKHAUL_BIN", os.path.join(ROOT, "target", "release"))
LINK = os.environ.get("FAR_LINK", os.path.join(BIN, "far-link"))
NEAR, FAR = "10.77.0.1", "10.77.0.2"
LIMIT = float(os.environ.get("FAR_LINK_LIMIT", "60"))  # seconds that a command may take; then its rate so far counts


TLS = """
import os, socket, ssl, sys
end, key, host, port, way, path = sys.argv[1:]
size, buffer = os.path.getsize(path), bytearray(1 << 20)
if end == "far":
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key + ".crt", key)
    stream = context.wrap_socket(socket.create_server((host, int(port))).accept()[0], server_side=True)
else:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = context.wrap_socket(socket.create_connection((host, int(port))))
if (end == "near") == (way == "up"):
    with open(path, "rb") as f:
        while n := f.readinto(buffer):
            stream.sendall(memoryview(buffer)[:n])
    assert stream.recv(1) == b"k"
else:
    while size > 0:
        size -= stream.recv_into(buffer)
    stream.sendall(b"k")
"""


class Process:
    """A child under /usr/bin/time, which tells its CPU time and peak memory when it has ended."""

    def __init__(self, args, where=(), **kw):
        self.times = tempfile.NamedTemporaryFile("r", delete=False)
        self.args, self.began = args, time.monotonic()
        command = [*where, "/usr/bin/time", "-q", "-o", self.times.name, "-f", "%e %U %S %M", *args]
        self.child = subprocess.Popen(command, text=True, **kw)

    def stop(self):
        """Ends the program, which is a child of time, and so on."""
        pid = self.child.pid
        while (children := open(f"/proc/{pid}/task/{pid}/children").read().split()):
            pid = int(children[0])
            if os.readlink(f"/proc/{pid}/exe").split("/")[-1] == os.path.basename(os.path.realpath(shutil.which(self.args[0]) or self.args[0])):
                break
        os.kill(pid, signal.SIGTERM)
        return self.finish(any_exit=True)

    def finish(self, any_exit=False):
        try:
            out, _ = self.child.communicate(timeout=LIMIT)
            failed = self.child.returncode != 0 and not any_exit
        except subprocess.TimeoutExpired:
            self.stop_hard()
            out, any_exit, failed = None, True, False
        times = open(self.times.name).read().split()[-4:]
        os.unlink(self.times.name)
        if failed or len(times) < 4:
            return None
        wall, user, system, rss = times
        return {"wall": float(wall), "cpu": float(user) + float(system), "rss": int(rss) / 1024, "whole": out is not None or not failed and self.child.returncode == 0}

    def stop_hard(self):
        pid = self.child.pid
        while (children := open(f"/proc/{pid}/task/{pid}/children").read().split()):
            pid = int(children[0])
        os.kill(pid, signal.SIGKILL)                # the program, so that time can still tell
        self.child.wait()


class Tun:
    """Two namespaces: this process's own, and one that a sleeping child keeps. Packets pass between them here only."""

    def __init__(self):
        self.holder = subprocess.Popen(["unshare", "-n", "sleep", "7200"])
        time.sleep(0.3)
        self.far = ["nsenter", "-t", str(self.holder.pid), "-n"]
        self.fds = []
        for name in ("near", "far"):
            fd = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF: TUN, no header
            self.fds.append(fd)
        run("ip", "link", "set", "far", "netns", str(self.holder.pid))
        for where, name, address in (([], "near", NEAR), (self.far, "far", FAR)):
            run(*where, "ip", "link", "set", "lo", "up")
            run(*where, "ip", "address", "add", f"{address}/24", "dev", name)
            run(*where, "ip", "link", "set", name, "mtu", "1500", "txqueuelen", "10000", "up")
            for setting in ("net.ipv4.tcp_rmem=4096 131072 67108864", "net.ipv4.tcp_wmem=4096 65536 67108864"):
                run(*where, "sysctl", "-qw", setting)
        self.listen = self.connect = f"{FAR}:4433"

    def congestion(self, name):
        # By route: a namespace may not set every default.
        for where, device in (([], "near"), (self.far, "far")):
            run(*where, "ip", "route", "replace", "10.77.0.0/24", "dev", device, "congctl", name)

    def start(self, options):
        return subprocess.Popen([LINK, "tun", *options], stdin=self.fds[0], stdout=self.fds[1])

    def close(self):
        os.kill(self.holder.pid, signal.SIGTERM)


class Proxy:
    """Loopback."""

    far, listen, connect = [], "127.0.0.1:44330", "127.0.0.1:44331"

    def start(self, options):
        return subprocess.Popen([LINK, "udp", "--listen", self.connect, "--to", self.listen, *options], stdout=subprocess.DEVNULL)

    def close(self):
        pass


def run(*args, **kw):
    return subprocess.run(args, check=True, stdout=subprocess.PIPE, text=True, **kw).stdout


class Bench:
    def __init__(self, args):
        self.args, self.dir = args, os.path.join(args.work, "far_link")
        shutil.rmtree(self.dir, ignore_errors=True)
        os.makedirs(self.dir)
        self.log = open(os.path.join(args.work, "far_link.log"), "w")
        self.image, self.stats = os.path.join(self.dir, "volume.img"), os.path.join(self.dir, "stats")
        with open(self.image, "wb") as f:
            for _ in range(args.size):
                f.write(os.urandom(1 << 20))
        self.net = Proxy() if args.proxy else Tun()
        self.link = None

    def shape(self, rtt, loss, seed=1):
        """The link from now on."""
        if rtt > 1:
            self.asked = (rtt, loss, seed)
        self.unlink()
        options = ["--delay", str(rtt / 2), "--loss", str(loss), "--rate", str(self.args.rate), "--seed", str(seed), "--stats", self.stats, "--life", "7200"]
        if self.args.queue:
            options += ["--queue", str(self.args.queue)]
        self.link = self.net.start(options)
        time.sleep(0.5)

    def unlink(self):
        if self.link:
            self.link.terminate()
            self.link.wait()
        self.link = None

    def counts(self):
        time.sleep(0.7)
        lines = open(self.stats).read().splitlines()
        return json.loads(lines[-1]) if lines else {"up": {"bytes": 0, "lost": 0, "dropped": 0}, "down": {"bytes": 0, "lost": 0, "dropped": 0}, "flows": {}}

    def note(self, way, result, far, before):
        """What the link says about a command, beside what its ends say."""
        after = self.counts()[way]
        if result is None:
            return None
        lines = [json.loads(line) for line in open(self.stats)]
        passed = [(line["seconds"], line[way]["bytes"] - before) for line in lines]
        middle = [(s, b) for s, b in passed if 0.15 * passed[-1][1] <= b <= 0.85 * passed[-1][1]]
        (s0, b0), (s1, b1) = middle[0], middle[-1]
        result.update(wire=(after["bytes"] - before) / 1e6 / result["wall"], steady=(b1 - b0) / 1e6 / max(s1 - s0, 0.1),
                      far=far, lost=after["lost"], dropped=after["dropped"])
        return result

    def warm(self):
        """In the page cache, and nothing dirty, so that disks are left out."""
        os.sync()
        subprocess.run(["cat", self.image], stdout=subprocess.DEVNULL)

    # --- Backhaul ---

    def settings(self, name, text):
        path = os.path.join(self.dir, name)
        open(path, "w").write(text)
        return path

    def key(self, congestion):
        return f'congestion = "{congestion}"\n' if congestion else ""

    def backhaul_start(self, congestion, agents=1, extra=""):
        for name in ("store", "receiver", *(f"agent{i}" for i in range(agents))):
            shutil.rmtree(os.path.join(self.dir, name), ignore_errors=True)
        congestions = congestion if isinstance(congestion, list) else [congestion] * agents
        receiver = self.settings("receiver.toml", f'state = "{self.dir}/receiver"\nstore = "file://{self.dir}/store"\nlisten = "{self.net.listen}"\n{self.key(congestions[0])}{extra}')
        self.receiver_tool = [os.path.join(BIN, "backhaul-receiver"), "--config", receiver]
        self.agent_tools = []
        run(*self.receiver_tool, "init", stderr=self.log)
        receiver = Process([*self.receiver_tool, "serve"], self.net.far, stdout=subprocess.PIPE, stderr=self.log)
        if "listening on" not in receiver.child.stdout.readline():
            sys.exit(f"the receiver did not start; see {self.log.name}")
        for i in range(agents):
            config = self.settings(f"agent{i}.toml", f'state = "{self.dir}/agent{i}"\n{self.key(congestions[i])}{extra}')
            tool = [os.path.join(BIN, "backhaul-agent"), "--config", config]
            token = run(*self.receiver_tool, "token", "--group", f"bench{i}", "--address", self.net.connect, stderr=self.log)
            run(*tool, "join", "-", input=token, stderr=self.log)
            run(*tool, "protect", f"disk={self.image}", stderr=self.log)
            self.agent_tools.append(tool)
        return receiver

    def measured(self, way, receiver, *command):
        self.warm()
        before = self.counts()[way]["bytes"]
        result = Process([*self.agent_tools[0], *command], stdout=subprocess.PIPE, stderr=self.log).finish()
        time.sleep(0.7)
        return self.note(way, result, receiver.stop(), before)

    def backhaul(self, congestion):
        receiver = self.backhaul_start(congestion)
        result = self.measured("up", receiver, "sync", "--json")
        yield "up", result
        if not result or not result["whole"]:
            # A restore needs a point: made over a link that is quick.
            self.shape(1, 0)
            receiver = Process([*self.receiver_tool, "serve"], self.net.far, stdout=subprocess.PIPE, stderr=self.log)
            receiver.child.stdout.readline()
            run(*self.agent_tools[0], "sync", stderr=self.log)
            receiver.stop()
            self.shape(*self.asked)
        target = os.path.join(self.dir, "restored.img")
        receiver = Process([*self.receiver_tool, "serve"], self.net.far, stdout=subprocess.PIPE, stderr=self.log)
        receiver.child.stdout.readline()
        result = self.measured("down", receiver, "restore", "disk", "--to", target, "--verify", "cached", "--json")
        if result and result["whole"] and subprocess.run(["cmp", "-s", self.image, target]).returncode != 0:
            sys.exit("the restored file differs from the volume")
        yield "down", result
        for name in ("restored.img", "store"):
            path = os.path.join(self.dir, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.unlink(path)

    # --- TCP ---

    def tls_key(self):
        key = os.path.join(self.dir, "tls.pem")
        if not os.path.exists(key):
            run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=far", "-keyout", key, "-out", key + ".crt", stderr=self.log)
        return key

    def tls_pair(self, way, port=4444):
        """The commands of both ends: one file goes over, and the end that has it says so."""
        common = [self.tls_key(), FAR, str(port), way, self.image]
        return [[sys.executable, "-c", TLS, end, *common] for end in ("far", "near")]

    def tls(self, congestion):
        self.net.congestion(congestion)
        for way in ("up", "down"):
            self.warm()
            far, near = self.tls_pair(way)
            far = Process(far, self.net.far, stderr=self.log)
            time.sleep(0.5)
            before = self.counts()[way]["bytes"]
            result = Process(near, stderr=self.log).finish()
            if not result["whole"]:
                far.stop_hard()
            yield way, self.note(way, result, far.finish(any_exit=True), before)

    def rsync(self, congestion):
        self.net.congestion(congestion)
        target = os.path.join(self.dir, "rsync")
        os.makedirs(target, exist_ok=True)
        config = self.settings("rsyncd.conf", f"use chroot = no\n[m]\npath = {target}\nread only = no\nuid = 0\ngid = 0\n[v]\npath = {self.dir}\nuid = 0\ngid = 0\n")
        for way in ("up", "down"):
            self.warm()
            far = Process(["rsync", "--daemon", "--no-detach", "--address", FAR, "--port", "8730", "--config", config], self.net.far, stderr=self.log)
            time.sleep(0.5)
            before = self.counts()[way]["bytes"]
            url = f"rsync://{FAR}:8730"
            args = ["rsync", "-W", self.image, f"{url}/m/"] if way == "up" else ["rsync", "-W", f"{url}/v/volume.img", f"{target}/down.img"]
            result = Process(args, stdout=subprocess.DEVNULL, stderr=self.log).finish()
            time.sleep(0.7)
            yield way, self.note(way, result, far.stop(), before)
        shutil.rmtree(target)

    # --- tables ---

    def table(self):
        cases = {"backhaul": lambda: self.backhaul(None), "backhaul-bbr": lambda: self.backhaul("bbr"), "backhaul-cubic": lambda: self.backhaul("cubic")}
        if not self.args.proxy:
            for c in ("bbr", "cubic"):
                cases[f"tls-{c}"] = lambda c=c: self.tls(c)
                cases[f"rsync-{c}"] = lambda c=c: self.rsync(c)
        chosen = self.args.cases.split(",") if self.args.cases else [c for c in cases if c != "backhaul"]
        print(f"{self.args.size} MiB, {self.args.rate:.0f} Mbit/s, {self.args.runs} runs, medians; near is the agent, far the receiver")
        print(f"{'rtt ms':>6} {'loss %':>6} {'way':4} {'case':15} {'wire MB/s':>9} {'steady':>7} {'data MB/s':>9} {'wall s':>7} {'cpu s near':>10} {'far':>6} {'rss MiB near':>12} {'far':>5} {'dropped':>8} {'lost':>6}", flush=True)
        for rtt in map(float, self.args.rtt.split(",")):
            for loss in map(float, self.args.loss.split(",")):
                for name in chosen:
                    rows = {}
                    for i in range(self.args.runs):
                        self.shape(rtt, loss, seed=i + 1)
                        for way, result in cases[name]():
                            rows.setdefault(way, []).append(result)
                            self.shape(rtt, loss, seed=i + 101)
                    for way, results in rows.items():
                        if None in results:
                            print(f"{rtt:6.0f} {loss:6.1f} {way:4} {name:15} failed; see {self.log.name}", flush=True)
                            continue
                        whole = all(r["whole"] for r in results)
                        m = lambda f: statistics.median(f(r) for r in results)
                        size = self.args.size * (1 << 20) / 1e6
                        data = f"{m(lambda r: size / r['wall']):9.1f}" if whole else "  cut off"
                        far = lambda key: m(lambda r: r["far"][key] if r["far"] else 0)
                        print(f"{rtt:6.0f} {loss:6.1f} {way:4} {name:15} {m(lambda r: r['wire']):9.1f} {m(lambda r: r['steady']):7.1f} {data} {m(lambda r: r['wall']):7.1f} {m(lambda r: r['cpu']):10.2f} {far('cpu'):6.2f}"
                              f" {m(lambda r: r['rss']):12.0f} {far('rss'):5.0f} {m(lambda r: r['dropped']):8.0f} {m(lambda r: r['lost']):6.0f}", flush=True)

    def share(self):
        """Two flows, the second one five seconds later; rates while both run, without the first five seconds."""
        print(f"{self.args.rate:.0f} Mbit/s; MB/s of each flow from 5 s after both run, for up to 15 s")
        quic, tcp = ["backhaul-bbr", "backhaul-cubic"], ["tls-bbr", "tls-cubic"]
        if self.args.cases:
            pairs = [tuple(pair.split("+")) for pair in self.args.cases.split(",")]
        else:
            pairs = [(a, b) for i, a in enumerate(quic) for b in quic[i:] + tcp] + [("tls-bbr", "tls-cubic"), ("tls-cubic", "tls-cubic")]
        for rtt in map(float, self.args.rtt.split(",")):
            for first, second in pairs:
                self.shape(rtt, 0)
                names = [n for n in (first, second) if n.startswith("backhaul")]
                receiver = self.backhaul_start([n.split("-")[1] for n in names], len(names)) if names else None
                self.warm()
                flows, agents, servers = [], iter(self.agent_tools if names else []), []
                for i, name in enumerate((first, second)):
                    before = set(self.counts()["flows"])
                    kind, congestion = name.split("-")
                    if kind == "backhaul":
                        flow = Process([*next(agents), "sync", "--json"], stdout=subprocess.PIPE, stderr=self.log)
                    else:
                        self.net.congestion(congestion)
                        far, near = self.tls_pair("up", 4444 + i)
                        servers.append(Process(far, self.net.far, stderr=self.log))
                        time.sleep(0.5)
                        flow = Process(near, stderr=self.log)
                    time.sleep(2)
                    new = {k: v for k, v in self.counts()["flows"].items() if k not in before}
                    flows.append((name, flow, max(new, key=new.get)))
                    time.sleep(3)
                began = time.monotonic()
                start = self.counts()
                while all(f.child.poll() is None for _, f, _ in flows) and time.monotonic() - began < 15:
                    time.sleep(0.2)
                end = [json.loads(line) for line in open(self.stats)][-2]
                seconds = end["seconds"] - start["seconds"]
                rates = [(end["flows"][key] - start["flows"][key]) / 1e6 / seconds for _, _, key in flows]
                print(f"rtt {rtt:4.0f}: {first:15} {rates[0]:6.1f}   {second:15} {rates[1]:6.1f}   over {seconds:4.1f} s, {end['up']['dropped'] - start['up']['dropped']} dropped", flush=True)
                for _, flow, _ in flows:
                    if flow.child.poll() is None:
                        flow.stop_hard()
                for server in servers:
                    server.stop_hard() if server.child.poll() is None else None
                if receiver:
                    receiver.stop()

    def close(self):
        self.unlink()
        self.net.close()
        shutil.rmtree(self.dir)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", default="50,100", help="round trips, milliseconds")
    parser.add_argument("--loss", default="0,0.1,1", help="percent each way")
    parser.add_argument("--rate", type=float, default=1000, help="megabits a second each way")
    parser.add_argument("--queue", type=int, help="KiB before the bottleneck; default: one round trip")
    parser.add_argument("--size", type=int, default=1024, help="MiB")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--cases", help="backhaul (whose settings name nothing), backhaul-bbr, backhaul-cubic, tls-bbr, tls-cubic, rsync-bbr, rsync-cubic; with --share pairs as backhaul-bbr+tls-cubic")
    parser.add_argument("--work", default="/tmp/backhaul-far-link")
    parser.add_argument("--proxy", action="store_true")
    parser.add_argument("--share", action="store_true")
    args = parser.parse_args()
    if not args.proxy and os.environ.get("FAR_LINK_NAMESPACE") is None:
        if os.geteuid() != 0:
            sys.exit("needs root for namespaces and TUN devices; without: --proxy")
        os.environ["FAR_LINK_NAMESPACE"] = "own"
        os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])
    os.makedirs(args.work, exist_ok=True)
    bench = Bench(args)
    try:
        bench.share() if args.share else bench.table()
    finally:
        bench.close()


if __name__ == "__main__":
    main()
