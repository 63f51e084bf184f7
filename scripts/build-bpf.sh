#!/usr/bin/env bash
# Rebuilds the program that the kernel runs for change tracking from its source. The object is kept in the repository,
# so that building Backhaul needs no clang. With an argument writes there instead.
set -euo pipefail
cd "$(dirname "$0")/../agent/hints"
out=$(realpath -m "${1:-prebuilt/hints.bpf.o}")
# Line information and paths are of no use to the kernel; -mcpu=v3 has the atomic instructions.
cd bpf
clang=$(command -v clang-14 || command -v clang) || { echo "clang is missing: apt-get install clang llvm" >&2; exit 1; }
"$clang" -O2 -g -Wall -Wextra -Werror -target bpfel -mcpu=v3 -fdebug-prefix-map="$PWD=." -fno-ident -c hints.bpf.c -o "$out"
strip=$(command -v llvm-strip || ls -v /usr/lib/llvm-*/bin/llvm-strip 2>/dev/null | tail -1) || true
[[ -n $strip ]] || { echo "llvm-strip is missing: apt-get install llvm" >&2; exit 1; }
"$strip" --strip-debug "$out"
