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
    let version =
        Command::new("clang").arg("--version").output().ok().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    // Other versions make other code of the same source.
    if !version.is_some_and(|v| v.contains("version 14.")) {
        skipped(name, "needs clang 14, as in Debian 12");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("hints.bpf.o");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/build-bpf.sh");
    let status = Command::new(script).arg(&out).status().unwrap();
    assert!(status.success());
    assert!(std::fs::read(out).unwrap() == OBJECT, "run scripts/build-bpf.sh and commit what it makes");
}
