#!/usr/bin/env bash
# The main job, to watch: a file-system image of real files, a receiver with a folder as its store, an agent that joins,
# a point, changes, a second point, both restored and proven. Needs no root; everything lies in one temporary folder.
# BACKHAUL_BIN names a folder with the two programs, to use them instead of building; KEEP=1 keeps the folder.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"

if [[ -z ${BACKHAUL_BIN:-} ]]; then
  scripts/setup-tests.sh --build-only
  echo "== building (a few minutes the first time)"
  cargo build --release --locked -p backhaul-agent -p backhaul-receiver
  BACKHAUL_BIN=${CARGO_TARGET_DIR:-target}/release
fi
bin=$(realpath "$BACKHAUL_BIN")
command -v mke2fs >/dev/null || { echo "mke2fs is missing: apt-get install e2fsprogs" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/backhaul-demo.XXXXXX")
server=
finish() {
  if [[ -n $server ]]; then kill "$server" 2>/dev/null && wait "$server" 2>/dev/null || true; fi
  if [[ ${KEEP:-} == 1 ]]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap finish EXIT
trap 'exit 130' INT TERM

for name in BACKHAUL_RECEIVER BACKHAUL_LISTEN; do unset "$name"; done
export BACKHAUL_STORE="file://$work/store" BACKHAUL_RECEIVER_STATE="$work/receiver" BACKHAUL_AGENT_STATE="$work/agent"
receiver() { "$bin/backhaul-receiver" "$@"; }
agent() { "$bin/backhaul-agent" "$@"; }
say() { printf '\n== %s\n' "$*"; }
show() { printf '$ %s\n' "$*" | sed "s|$work/||g"; "$@"; }
# A field of a one-line JSON object, numbers and plain texts only.
field() { sed -E "s/.*\"$2\":\"?([^,\"}]*).*/\1/" <<<"$1"; }
mib() { awk -v n="$1" 'BEGIN { printf "%.2f MiB", n / 1048576 }'; }
stored() { du -sb "$work/store" | cut -f1; }
rows=()
row() { rows+=("$(printf '%-22s %14s %14s %14s %9s s' "$@")"); }

say "1. A disk: an ext4 image made of real files (this repository's sources and this system's documentation)"
mkdir -p "$work/files"
cp -r agent receiver protocol docs Cargo.lock "$work/files/"
cp -r /usr/share/doc "$work/files/" 2>/dev/null || true
head -c 40000000 /dev/urandom >"$work/files/photos.bin"
mke2fs -q -F -t ext4 -d "$work/files" "$work/disk.img" 512M
ls -lsh "$work/disk.img" | sed "s|$work/||"

say "2. A receiver, its store a folder"
show receiver init
receiver serve --listen 127.0.0.1:0 >"$work/serve.out" 2>"$work/serve.err" &
server=$!
for _ in $(seq 100); do
  address=$(sed -n 's/^listening on //p' "$work/serve.out")
  [[ -n $address ]] && break
  kill -0 "$server" || { cat "$work/serve.err" >&2; exit 1; }
  sleep 0.1
done
[[ -n $address ]] || { echo "the receiver does not listen" >&2; exit 1; }
echo "listening on $address"

say "3. The agent joins and protects the disk"
receiver token --group demo --address "$address" | show agent join -
show agent protect disk="$work/disk.img"

sync_point() {
  local before result
  before=$(stored)
  result=$(agent sync --json)
  echo "point $(field "$result" point) ($(field "$result" consistency)), digest $(field "$result" digest)"
  row "$1" "$(mib "$(field "$result" bytes_scanned)")" "$(mib "$(field "$result" bytes_sent)")" \
    "$(mib $(($(stored) - before)))" "$(printf '%.2f' "$(field "$result" seconds)")"
}
say "4. The first point"
sync_point "first point"
cp --sparse=always "$work/disk.img" "$work/then.img"

say "5. Something changes: files are written into the image, one is removed"
head -c 3000000 /dev/urandom >"$work/new.bin"
debugfs -w -R "write $work/new.bin new.bin" "$work/disk.img" 2>/dev/null
debugfs -w -R "rm Cargo.lock" "$work/disk.img" 2>/dev/null
debugfs -R "ls -l /" "$work/disk.img" 2>/dev/null | awk '{ print "  " $NF, $6 }' | grep -E 'new.bin|photos.bin'
sync_point "second point"
sync_point "nothing changed"
show receiver points

restore_point() {
  local result
  result=$(receiver restore "demo/disk@$1" --to "$2" --json)
  echo "point $1 restored: $(field "$result" bytes_verified) bytes read back, digest $(field "$result" digest)"
  row "$3" "$(mib "$(field "$result" bytes_read)")" "$(mib "$(field "$result" bytes_fetched)") f" \
    "$(mib "$(field "$result" bytes_written)") w" "$(printf '%.2f' "$(field "$result" seconds)")"
}
say "6. Both points are restored and compared byte by byte with what the disk held then"
restore_point 1 "$work/restored.img" "restore of point 1"
cmp "$work/restored.img" "$work/then.img" && echo "point 1: every byte is equal"
restore_point 2 "$work/restored.img" "point 2, in place"
cmp "$work/restored.img" "$work/disk.img" && echo "point 2: every byte is equal (in place: only what differed was fetched)"
e2fsck -fn "$work/restored.img" >/dev/null 2>&1 && echo "e2fsck: the restored file system is clean"

say "7. The store is checked"
show receiver verify demo

say "What it cost"
printf '%-22s %14s %14s %14s %11s\n' "" "read" "sent" "stored" "time"
printf '%s\n' "${rows[@]}"
echo "(restores: f = fetched from the store, w = written to the target)"
