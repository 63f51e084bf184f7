#!/usr/bin/env bash
# Sets up and runs everything that must hold: format, lints, unit tests, end-to-end tests, documentation tests.
# Tests that need root say so and are skipped; as root nothing may be skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin:$HOME/.cargo/bin"
step() { printf '\n== %s\n' "$*"; }

step "set up"
scripts/setup-tests.sh
for component in rustfmt clippy; do
  cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1 || rustup component add "$component"
done

step "format"
cargo fmt --all --check
step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
step "build"
# The end-to-end tests start these. Of the whole workspace, so that nothing is built twice with other features.
cargo build --workspace --bins --locked
cargo nextest run --workspace --locked --no-run
step "no release has what is for tests"
features=$(cargo tree --locked -p backhaul-agent -p backhaul-receiver -e features,normal -i backhaul-seams)
if [[ $features == *testing* ]]; then
  echo "the feature testing of backhaul-seams is on in a release" >&2
  exit 1
fi

step "test"
if [[ $(id -u) == 0 ]]; then
  export BACKHAUL_REQUIRE_ALL=${BACKHAUL_REQUIRE_ALL:-1}
else
  echo "SKIPPED: not root, so the tests on loop devices and small disks do not run; run this as root for all of them"
fi
cargo nextest run --workspace --locked
step "an independent reader"
target/python/bin/python -B tests/independent/test_restore.py
step "documentation tests"
cargo test --workspace --locked --doc --quiet
step "all is well"
