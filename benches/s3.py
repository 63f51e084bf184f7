#!/usr/bin/env python3
"""Compares a bucket with a folder as the store: the same volume, the release programs, one after the other, alternating.

    benches/s3.py --url 's3://BUCKET/PREFIX?endpoint=http://HOST:PORT' --image FILE [--work DIR] [--runs N]

Credentials come from the environment, as for the programs. Every run has a prefix of its own, which stays in the bucket. A
server on the same machine takes processors from both ends.
"""
import argparse, json, os, shutil, statistics, tempfile, time

from programs import Programs, require


def one(args, folder, store):
    programs = Programs(folder, open(os.path.join(args.work, "s3.log"), "a"), store)
    programs.run(*programs.tool("receiver", "init"))
    receiver = programs.serve()
    programs.join(args.image)
    seconds = {}
    for phase in ("first sync", "no change"):
        result, _ = programs.measured(*programs.tool("agent", "sync", "--json")).finish()
        seconds[phase] = json.loads(result)["seconds"]
    receiver.stop()
    target = os.path.join(folder, "restored.img")
    restore = programs.tool("receiver", "restore", "bench/disk", "--to", target)
    seconds["restore"] = programs.measured(*restore).finish()[1]["wall"]
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--work", default="/var/tmp")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    require()
    size, times = os.path.getsize(args.image) / 1e6, {}
    base, _, query = args.url.partition("?")
    for run in range(args.runs):
        for kind in ("folder", "bucket"):
            folder = tempfile.mkdtemp(prefix="s3-", dir=args.work)
            url = f"{base}/{int(time.time() * 1000)}-{run}?{query}" if kind == "bucket" else None
            for phase, s in one(args, folder, url).items():
                times.setdefault((phase, kind), []).append(s)
            shutil.rmtree(folder)
    print("| phase | folder MB/s | bucket MB/s | bucket to folder, run by run |\n|---|---:|---:|---|")
    for phase in ("first sync", "no change", "restore"):
        folder, bucket = times[phase, "folder"], times[phase, "bucket"]
        ratios = ", ".join(f"{f / b:.2f}" for f, b in zip(folder, bucket))
        print(f"| {phase} | {size / statistics.median(folder):,.0f} | {size / statistics.median(bucket):,.0f} | {ratios} |")


main()
