//! Names that must not be lost, overwritten or half there.

use std::sync::Barrier;

use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .expect("a folder")
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[test]
fn create_new_never_overwrites_and_leaves_no_litter() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a");
    create_new(&path, b"one", 0o640).expect("created");
    assert!(matches!(create_new(&path, b"two", 0o600), Err(DurableError::AlreadyExists { .. })));
    assert_eq!(std::fs::read(&path).expect("read"), b"one");
    assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o640);
    replace(&path, b"three", 0o600).expect("replaced");
    assert_eq!(std::fs::read(&path).expect("read"), b"three");
    assert_eq!(std::fs::metadata(&path).expect("stat").permissions().mode() & 0o777, 0o600);
    assert_eq!(names(dir.path()), ["a"]);
}

#[test]
fn one_of_eight_racing_creators_wins() {
    let dir = tempfile::tempdir().expect("a folder");
    for round in 0..20 {
        let path = dir.path().join(format!("{round}"));
        let barrier = Barrier::new(8);
        let won: Vec<u8> = std::thread::scope(|s| {
            let racers: Vec<_> = (0..8u8)
                .map(|n| {
                    let (barrier, path) = (&barrier, &path);
                    s.spawn(move || {
                        barrier.wait();
                        create_new(path, &[n], 0o600).is_ok().then_some(n)
                    })
                })
                .collect();
            racers.into_iter().filter_map(|r| r.join().expect("no panic")).collect()
        });
        assert_eq!(won.len(), 1);
        assert_eq!(std::fs::read(&path).expect("read"), won);
    }
}

#[test]
fn errors_say_what_and_where() {
    let dir = tempfile::tempdir().expect("a folder");
    let missing = dir.path().join("none/a");
    let e = create_new(&missing, b"x", 0o600).expect_err("no such folder");
    assert!(e.to_string().contains("none/a") && !e.is_retryable(), "{e}");
    assert!(replace(Path::new("/"), b"x", 0o600).is_err());
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).expect("made");
    assert!(matches!(create_new(&folder, b"x", 0o600), Err(DurableError::AlreadyExists { .. })));
    assert!(replace(&folder, b"x", 0o600).is_err());
    assert_eq!(names(dir.path()), ["folder"]);
}

#[test]
fn a_lock_has_one_holder_and_says_who() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("lock");
    let held = lock(&path).expect("free");
    match lock(&path) {
        Err(e @ LockError::Held { holder, .. }) => {
            assert_eq!(holder, Some(std::process::id()));
            assert!(e.is_retryable() && e.to_string().contains(&std::process::id().to_string()));
        }
        other => panic!("{other:?}"),
    }
    drop(held);
    let _again = lock(&path).expect("free again");
}
