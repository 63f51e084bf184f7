//! The object that is shipped is what its source says.

#![allow(clippy::unwrap_used, reason = "as in tests, which say where it was")]

mod support;

use std::path::Path;
use std::process::Command;

use backhaul_hints::testing::OBJECT;
use support::skipped;

#[test]
fn the_prebuilt_object_is_what_clang_makes_of_the_source() {
    let name = "the_prebuilt_object_is_what_clang_makes_of_the_source";
    // As the script looks for it. Other versions make other code of the same source.
    let said = |clang: &str| {
        Some(String::from_utf8_lossy(&Command::new(clang).arg("--version").output().ok()?.stdout).into_owned())
    };
    if !["clang-14", "clang"].into_iter().find_map(said).is_some_and(|v| v.contains("version 14.")) {
        skipped(name, "needs clang 14, as in Debian 12 (apt-get install clang-14 llvm)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("hints.bpf.o");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/build-bpf.sh");
    let made = Command::new(script).arg(&out).output().unwrap();
    assert!(made.status.success(), "scripts/build-bpf.sh: {}", String::from_utf8_lossy(&made.stderr));
    assert!(
        std::fs::read(out).unwrap() == OBJECT,
        "agent/hints/prebuilt/hints.bpf.o is not what clang makes of agent/hints/bpf/hints.bpf.c: somebody changed one of \
         the two. Run scripts/build-bpf.sh and commit what it makes; where the layout of a map changed, raise ABI in \
         agent/hints/src/layout.rs as well"
    );
}
