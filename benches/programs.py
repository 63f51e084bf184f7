"""Runs Backhaul's release programs for the scripts beside this one, and tells what they took. Read first: Programs."""
import os, random, signal, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BIN = os.environ.get("BACKHAUL_BIN", os.path.join(ROOT, "target", "release"))


def require():
    for tool in ("backhaul-agent", "backhaul-receiver"):
        if not os.path.exists(os.path.join(BIN, tool)):
            sys.exit(f"{BIN}/{tool} is missing: cargo build --release -p backhaul-agent -p backhaul-receiver")


class Process:
    """A child under /usr/bin/time, which tells its peak memory when it has ended: what the kernel says of a child of this
    script is at least the script's own."""

    def __init__(self, env, args, log):
        self.memory = tempfile.NamedTemporaryFile("r")
        self.args, self.began = args, time.monotonic()
        command = ["/usr/bin/time", "-q", "-o", self.memory.name, "-f", "%M", *args]
        self.child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)

    def own_pid(self):
        children = open(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read().split()
        return int(children[0])

    def finish(self):
        out = self.child.stdout.read()
        _, status, used = os.wait4(self.child.pid, 0)  # of time and its child; to the microsecond
        self.child.returncode = os.waitstatus_to_exitcode(status)
        if self.child.returncode != 0:
            sys.exit(f"{' '.join(self.args)}: exit {self.child.returncode}\n{out}")
        rss = int(self.memory.read().split()[-1]) / 1024
        self.memory.close()
        return out, {"wall": time.monotonic() - self.began, "cpu": used.ru_utime + used.ru_stime, "rss_mib": rss}

    def stop(self):
        os.kill(self.own_pid(), signal.SIGTERM)
        return self.finish()[1]


class Programs:
    """One store with its receiver, and the first of its agents, in one folder that is there and empty."""

    def __init__(self, folder, log, store=None):
        self.dir, self.log = folder, log
        self.env = dict(os.environ, BACKHAUL_STORE=store or f"file://{folder}/store",
                        BACKHAUL_RECEIVER_STATE=f"{folder}/receiver", BACKHAUL_AGENT_STATE=f"{folder}/agent")
        self.address = "127.0.0.1:" + str(random.randrange(20000, 30000))

    def tool(self, name, *args):
        return [os.path.join(BIN, f"backhaul-{name}"), *args]

    def run(self, *args, env=None, **kw):
        done = subprocess.run(args, env=env or self.env, stdout=subprocess.PIPE, stderr=self.log, text=True, **kw)
        if done.returncode != 0:
            sys.exit(f"{' '.join(args)}: exit {done.returncode}; see {self.log.name}")
        return done.stdout

    def measured(self, *args, env=None):
        return Process(env or self.env, args, self.log)

    def serve(self, *under):
        """Starts the receiver, under another program where one is named."""
        receiver = self.measured(*under, *self.tool("receiver", "serve", "--listen", self.address))
        if "listening on" not in receiver.child.stdout.readline():
            sys.exit(f"the receiver did not start; see {self.log.name}")
        return receiver

    def join(self, image, group="bench", env=None):
        """Makes the image the only volume of a new group, while a receiver serves."""
        token = self.run(*self.tool("receiver", "token", "--group", group, "--address", self.address))
        self.run(*self.tool("agent", "join", "-"), input=token, env=env)
        self.run(*self.tool("agent", "protect", f"disk={image}"), env=env)
