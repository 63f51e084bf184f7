#!/usr/bin/env bash
# Installs what building and testing need on Debian: a C compiler for the crypto library, the tools of the
# file systems that the tests make, cargo-nextest, and Python packages in target/python. Run again it installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() { if [[ $(id -u) == 0 ]]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 127; fi; }

# mke2fs and friends lie in folders that are not in every user's PATH.
export PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"

declare -A package=([cc]=build-essential [mke2fs]=e2fsprogs [debugfs]=e2fsprogs [mkfs.ext4]=e2fsprogs [mkfs.xfs]=xfsprogs [losetup]=mount
                    [partx]=util-linux [mount]=mount [fsfreeze]=util-linux [unshare]=util-linux
                    [mkfs.btrfs]=btrfs-progs [mksquashfs]=squashfs-tools [clang]=clang [llvm-strip]=llvm)
wanted=(cc mke2fs debugfs)
[[ ${1:-} == --build-only ]] || wanted+=(mkfs.ext4 mkfs.xfs mkfs.btrfs mksquashfs losetup partx mount fsfreeze unshare clang llvm-strip)
missing=()
for tool in "${wanted[@]}"; do
  command -v "$tool" >/dev/null || missing+=("${package[$tool]}")
done
# Debian's python3 comes without what makes a venv.
[[ ${1:-} == --build-only ]] || python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3 python3-venv)
if ((${#missing[@]})); then
  echo "installing ${missing[*]}"
  if command -v apt-get >/dev/null; then
    as_root apt-get update -q && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qy "${missing[@]}" ||
      { echo "could not install ${missing[*]}: install them as root and come again" >&2; exit 1; }
  else
    echo "install these with your system's package manager and come again: ${missing[*]}" >&2
    exit 1
  fi
fi
# Disks that fail on demand are served through FUSE; no library of it is needed.
[[ ${1:-} == --build-only || -e /dev/fuse ]] || as_root modprobe fuse || echo "no /dev/fuse: tests on disks that fail are skipped" >&2
command -v cargo >/dev/null || { echo "Rust is missing: https://rustup.rs" >&2; exit 1; }
[[ ${1:-} == --build-only ]] && exit 0
if ! cargo nextest --version >/dev/null 2>&1; then
  echo "installing cargo-nextest"
  cargo install --locked --quiet cargo-nextest
fi
if ! target/python/bin/python -c 'import blake3, zstandard' 2>/dev/null; then
  echo "installing blake3 and zstandard for Python"
  python3 -m venv --clear target/python
  target/python/bin/pip install --quiet --disable-pip-version-check blake3==1.0.11 zstandard==0.25.0
fi
