use super::*;

fn moment(path: &Path) -> Moment {
    Source::open(path).and_then(|s| s.moment()).expect("it can be looked at").expect("an image")
}

#[test]
fn a_moment_lasts_until_something_is_written() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("a.img");
    std::fs::write(&path, [1; 8192]).expect("there is room");
    let young = moment(&path);
    assert!(
        !young.lasts_until(&moment(&path)),
        "just written: it may be written to again within one step of the clock"
    );
    // ctime can't be set back: only waiting makes it old.
    std::thread::sleep(SETTLED + Duration::from_millis(50));
    let quiet = moment(&path);
    assert!(quiet.lasts_until(&moment(&path)));
    std::os::unix::fs::FileExt::write_all_at(&File::options().write(true).open(&path).expect("there"), b"x", 4096)
        .expect("there is room");
    assert!(!quiet.lasts_until(&moment(&path)), "I6: a write between two moments is never missed");
}

#[test]
fn where_there_are_no_clones_it_says_so() {
    // Files in memory: tmpfs has none.
    let folder = tempfile::Builder::new().tempdir_in("/dev/shm").expect("temp folder");
    let path = folder.path().join("a.img");
    std::fs::write(&path, [1; 8192]).expect("there is room");
    let error = Source::open(&path).expect("opens").clone_image().expect_err("tmpfs can't clone");
    assert!(matches!(&error, CloneError::Unable(what) if what.contains("xfs, btrfs")), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1, "nothing is left behind");
}
