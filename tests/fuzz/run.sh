#!/usr/bin/env bash
# The long run, guided by coverage: tests/fuzz/run.sh SECONDS [TARGET ...]. On a stable compiler: RUSTC_BOOTSTRAP lets it
# build for libFuzzer, and there is no `unsafe` in what is fuzzed for a sanitizer to watch. What is found lies in
# artifacts/; new inputs join corpus/ and are thinned out to those that reach something of their own.
# BACKHAUL_FUZZ_PROGRAMS=1 also takes the targets that need the programs' libraries, which take long to build.
set -euo pipefail
cd "$(dirname "$0")"
export RUSTC_BOOTSTRAP=1
seconds=${1:?seconds for each target}
shift
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
targets=("$@")
((${#targets[@]})) || mapfile -t targets < <(cd src && ls *.rs | sed 's/\.rs$//')
for target in "${targets[@]}"; do
  features=()
  case $target in arguments | settings | store_url)
    [[ ${BACKHAUL_FUZZ_PROGRAMS:-} == 1 ]] || { echo "SKIPPED: $target, without BACKHAUL_FUZZ_PROGRAMS=1"; continue; }
    features=(--features programs) ;;
  esac
  work=$(mktemp -d)
  cp corpus/"$target"/* "$work"/
  # Memory of one allocation is bounded too: no length from outside is believed.
  cargo fuzz run --fuzz-dir . --sanitizer none "${features[@]}" "$target" "$work" -- \
    -max_total_time="$seconds" -max_len=4096 -timeout=5 -malloc_limit_mb=256 -rss_limit_mb=1024 -print_final_stats=1
  thin=$(mktemp -d)
  cargo fuzz run --fuzz-dir . --sanitizer none "${features[@]}" "$target" -- -merge=1 -max_len=2048 "$thin" corpus/"$target" "$work"
  rm -rf "$work"
  # The smallest first, so that what is kept stays small in all.
  find "$thin" -type f -printf '%s %p\n' | sort -n | awk -v most="${BACKHAUL_FUZZ_KEEP:-40}" 'NR <= most' | while read -r _ file; do
    cp -n "$file" corpus/"$target"/
  done
  rm -rf "$thin"
done
