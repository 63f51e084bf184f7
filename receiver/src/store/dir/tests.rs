use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::sync::atomic::AtomicUsize;

use super::*;

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

async fn store() -> (tempfile::TempDir, DirStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(&dir.path().join("root"), MissingRoot::Create).await.unwrap();
    (dir, store)
}

fn tmp_files(store: &DirStore) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(store.root.path.join(TMP)) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A store whose flush does what `flush` says.
async fn with_flush(
    flush: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<()> + Send + Sync + 'static,
) -> (tempfile::TempDir, DirStore) {
    let dir = tempfile::tempdir().unwrap();
    let mut root = Root::open(dir.path().to_owned(), MissingRoot::Refuse).unwrap();
    root.flush = Box::new(flush);
    (dir, DirStore { root: Arc::new(root) })
}

#[tokio::test]
async fn a_missing_folder_is_refused_unless_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    let error = DirStore::open(&path, MissingRoot::Refuse).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config);
    assert!(error.to_string().contains("no such folder"), "{error}");
    assert!(!path.exists());
    DirStore::open(&path, MissingRoot::Create).await.unwrap();
    DirStore::open(&path, MissingRoot::Refuse).await.unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    let error = DirStore::open(&dir.path().join("file"), MissingRoot::Create).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Config, "{error}");
}

#[tokio::test]
async fn only_the_owner_can_read() {
    let (_dir, store) = store().await;
    store.put_new(&key("a/b/c"), Bytes::from_static(b"x")).await.unwrap();
    store.put_hint(&key("a/head"), Bytes::from_static(b"x")).await.unwrap();
    for (path, mode) in [("", 0o700), (TMP, 0o700), ("a", 0o700), ("a/b", 0o700), ("a/b/c", 0o600), ("a/head", 0o600)] {
        let found = std::fs::metadata(store.root.path.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(found, mode, "{path}");
    }
    assert_eq!(tmp_files(&store), [""; 0], "temp files are gone");
}

#[tokio::test]
async fn links_out_of_the_root_are_not_followed() {
    let (dir, store) = store().await;
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), b"secret").unwrap();
    symlink(&outside, store.root.path.join("link")).unwrap();
    symlink(outside.join("secret"), store.root.path.join("leaf")).unwrap();
    symlink(outside.join("nowhere"), store.root.path.join("dangling")).unwrap();
    // Not even within the root: one object would have two names.
    std::fs::create_dir(store.root.path.join("real")).unwrap();
    std::fs::write(store.root.path.join("real/object"), b"object").unwrap();
    symlink("real", store.root.path.join("inside")).unwrap();
    let body = Bytes::from_static(b"mine");
    for name in ["link/secret", "leaf", "dangling", "link/new", "inside/object"] {
        let name = key(name);
        assert_eq!(store.get(&name, 100).await.unwrap_err().kind(), Kind::Config, "{name}");
        assert_eq!(store.get_range(&name, 0..3).await.unwrap_err().kind(), Kind::Config, "{name}");
        assert_eq!(store.put_new(&name, body.clone()).await.unwrap_err().kind(), Kind::Config, "{name}");
    }
    assert!(store.put_hint(&key("link/secret"), body.clone()).await.is_err());
    assert!(store.delete(&key("link/secret")).await.is_err());
    // A hint replaces a link itself, and not what it points to.
    store.put_hint(&key("leaf"), body).await.unwrap();
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "nothing was made outside");
    let names: Vec<_> = store.list("", None, 10).await.unwrap().into_iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!(names, ["leaf", "real/object"]);
}

#[tokio::test]
async fn strange_files_are_neither_listed_nor_read() {
    let (_dir, store) = store().await;
    let root = &store.root.path;
    store.put_new(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
    for name in ["README.TXT", "with space", ".hidden~", "a/Upper"] {
        std::fs::write(root.join(name), b"x").unwrap();
    }
    std::fs::create_dir(root.join("empty")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), rustix::fs::FileType::Fifo, FILE_MODE, 0).unwrap();
    assert_eq!(store.list("", None, 10).await.unwrap(), [(key("a/b"), 1)]);
    // A pipe must not hang the reader.
    assert_eq!(store.get(&key("pipe"), 10).await.unwrap_err().kind(), Kind::Config);
    assert_eq!(store.get(&key("a"), 10).await.unwrap_err().kind(), Kind::NotFound, "a folder is no object");
    assert_eq!(store.get(&key("a/b/c"), 10).await.unwrap_err().kind(), Kind::NotFound, "nothing is below an object");
    assert_eq!(store.put_new(&key("a"), Bytes::new()).await.unwrap_err().kind(), Kind::Config);
    assert_eq!(store.put_new(&key("a/b/c"), Bytes::new()).await.unwrap_err().kind(), Kind::Config);
}

#[tokio::test]
async fn everything_is_flushed_before_put_new_returns() {
    let flushed = Arc::new(Mutex::new(HashSet::new()));
    let seen = Arc::clone(&flushed);
    let (dir, store) = with_flush(move |fd| {
        seen.lock().unwrap().insert(rustix::fs::fstat(fd)?.st_ino);
        Ok(())
    })
    .await;
    store.put_new(&key("a/b/c"), Bytes::from_static(b"x")).await.unwrap();
    let inode = |path: &str| std::fs::metadata(dir.path().join(path)).unwrap().ino();
    for path in ["", "a", "a/b", "a/b/c"] {
        assert!(flushed.lock().unwrap().contains(&inode(path)), "{path:?} was not flushed");
    }
    // What is there may be the work of a process that has not flushed the folder yet.
    flushed.lock().unwrap().clear();
    assert_eq!(store.put_new(&key("a/b/c"), Bytes::new()).await.unwrap_err().kind(), Kind::Exists);
    assert!(flushed.lock().unwrap().contains(&inode("a/b")));
    // Neither is a folder believed that this process did not flush itself.
    std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
    store.put_new(&key("d/e/f"), Bytes::new()).await.unwrap();
    for path in ["", "d", "d/e"] {
        assert!(flushed.lock().unwrap().contains(&inode(path)), "{path:?} was not flushed");
    }
}

/// F6: for each flush of a write, that flush fails. The call fails, no flush is tried again, nothing is written after.
#[tokio::test]
async fn a_failed_flush_is_final() {
    for fails_at in 0..4 {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let (_dir, store) = with_flush(move |_| {
            let call = counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            if call == fails_at { Err(Errno::IO) } else { Ok(()) }
        })
        .await;
        let error = store.put_new(&key("a/b/c"), Bytes::from_static(b"x")).await.expect_err("flush failed");
        assert_eq!((error.kind(), error.is_retryable()), (Kind::Other, false), "{error}");
        let after = calls.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(after, fails_at + 1, "the failed flush was the last");
        for key in [key("a/b/c"), key("other")] {
            let error = store.put_new(&key, Bytes::new()).await.expect_err("the disk cannot be believed");
            assert_eq!(error.kind(), Kind::Other, "not Exists, which would read as success");
            assert!(error.to_string().contains("restarted"), "{error}");
            assert!(store.put_hint(&key, Bytes::new()).await.is_err());
        }
        assert_eq!(calls.load(std::sync::atomic::Ordering::SeqCst), after);
        assert_eq!(tmp_files(&store), [""; 0]);
    }
}

/// F19, by a flush that finds out late. A full file system of its own is in `tests/store_contract.rs`.
#[tokio::test]
async fn no_space_is_typed_and_passes() {
    let full = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&full);
    let (_dir, store) =
        with_flush(move |_| if flag.load(std::sync::atomic::Ordering::SeqCst) { Err(Errno::NOSPC) } else { Ok(()) })
            .await;
    let error = store.put_new(&key("a/b"), Bytes::from_static(b"x")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    assert_eq!(store.list("", None, 10).await.unwrap(), []);
    assert_eq!(tmp_files(&store), [""; 0]);
    full.store(false, std::sync::atomic::Ordering::SeqCst);
    store.put_new(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
}

#[tokio::test]
async fn leftovers_of_a_crash_are_swept_by_the_next_writer() {
    let (_dir, store) = store().await;
    let tmp = store.root.path.join(TMP);
    std::fs::create_dir(&tmp).unwrap();
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    let mut held = Vec::new();
    for (name, old, locked) in [("dead", true, false), ("young", false, false), ("alive", true, true)] {
        let file = std::fs::File::create(tmp.join(name)).unwrap();
        if old {
            file.set_modified(hour_ago).unwrap();
        }
        if locked {
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
            held.push(file);
        }
    }
    // Reading changes nothing.
    assert_eq!(store.list("", None, 10).await.unwrap(), []);
    assert_eq!(tmp_files(&store).len(), 3);
    store.put_new(&key("a"), Bytes::new()).await.unwrap();
    let mut left = tmp_files(&store);
    left.sort();
    assert_eq!(left, ["alive", "young"]);
}

#[tokio::test]
async fn a_folder_that_was_removed_is_made_again() {
    let (_dir, store) = store().await;
    store.put_new(&key("a/b/c"), Bytes::new()).await.unwrap();
    std::fs::remove_dir_all(store.root.path.join("a")).unwrap();
    store.put_new(&key("a/b/c"), Bytes::from_static(b"again")).await.unwrap();
    assert_eq!(store.get(&key("a/b/c"), 10).await.unwrap(), "again");
}

/// What NFS gets instead of `RENAME_NOREPLACE`.
#[tokio::test]
async fn hard_links_publish_without_clobbering() {
    let (_dir, store) = store().await;
    let a = key("a");
    let write = |body: &'static [u8]| store.root.write_temp(Verb::PutNew, &a, body).unwrap();
    let folder = store.root.open_folder("").unwrap();
    write::link_new(&write(b"first"), &folder, "a").unwrap();
    assert_eq!(write::link_new(&write(b"second"), &folder, "a"), Err(Errno::EXIST));
    assert_eq!(store.get(&a, 10).await.unwrap(), "first");
    assert_eq!(tmp_files(&store), [""; 0]);
}

/// What another process gave its name and did not flush, because it was killed: whoever is told of it builds on it (I3).
#[tokio::test]
async fn what_can_be_seen_is_flushed_before_it_is_told() {
    let flushed = Arc::new(Mutex::new(Vec::new()));
    let (seen, fails) = (Arc::clone(&flushed), Arc::new(AtomicBool::new(false)));
    let failing = Arc::clone(&fails);
    let (dir, store) = with_flush(move |fd| {
        seen.lock().unwrap().push(rustix::fs::fstat(fd)?.st_ino);
        if failing.load(std::sync::atomic::Ordering::SeqCst) { Err(Errno::IO) } else { Ok(()) }
    })
    .await;
    std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
    std::fs::write(dir.path().join("a/b/c"), b"left by a killed writer").unwrap();
    let inode = std::fs::metadata(dir.path().join("a/b")).unwrap().ino();
    for prefix in ["a/b/c", "a/b/", "a/b/0001-"] {
        flushed.lock().unwrap().clear();
        store.settle(prefix).await.unwrap();
        assert_eq!(*flushed.lock().unwrap(), [inode], "{prefix}");
    }
    store.settle("no/such/folder").await.unwrap();
    // Once that has failed nothing that is there can be called durable, and no flush is tried again (F6).
    fails.store(true, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..2 {
        flushed.lock().unwrap().clear();
        let error = store.settle("a/b/c").await.unwrap_err();
        assert!(error.to_string().contains("restarted"), "{error}");
    }
    assert_eq!(flushed.lock().unwrap().len(), 0);
    assert_eq!(store.get(&key("a/b/c"), 100).await.unwrap(), "left by a killed writer", "reading goes on");
}

#[tokio::test]
async fn large_objects_of_any_length_come_back_from_any_offset() {
    let (_dir, store) = store().await;
    let unit = backhaul_volume::buffer::ALIGNMENT;
    let from = direct::DIRECT_FROM;
    for len in [from - 1, from, from + 1, from + unit - 1, (4 << 20) - unit, (4 << 20) + 13] {
        let key = key(&format!("large/{len}"));
        let body: Vec<u8> = (0..len).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect();
        store.put_new(&key, Bytes::from(body.clone())).await.unwrap();
        assert!(store.get(&key, len).await.unwrap() == body, "{len} bytes");
        let ends = [from, from + 1, len / 2, len - unit, len - 1, len];
        for (start, end) in [0, 1, unit - 1, unit, unit + 1, 3 * unit].into_iter().flat_map(|s| ends.map(|e| (s, e))) {
            if end < start || end > len {
                continue;
            }
            let got = store.get_range(&key, start as u64..end as u64).await.unwrap();
            assert!(got == body[start..end], "{start} to {end} of {len}");
        }
        let beyond = store.get_range(&key, 1..len as u64 + 1).await.unwrap_err();
        assert_eq!(beyond.kind(), Kind::Corrupt, "{beyond}");
    }
}

#[tokio::test]
async fn large_objects_do_not_stay_in_the_page_cache() {
    let (_dir, store) = store().await;
    let body = vec![7; 8 << 20];
    store.put_new(&key("large"), Bytes::from(body)).await.unwrap();
    store.get(&key("large"), 8 << 20).await.unwrap();
    let path = store.root.path.join("large");
    let kind = std::process::Command::new("stat").args(["-f", "-c", "%T"]).arg(&path).output().unwrap();
    if kind.stdout.starts_with(b"tmpfs") {
        return;
    }
    let pages = std::process::Command::new("fincore").args(["-n", "-b", "-o", "RES"]).arg(&path).output().unwrap();
    let cached: usize = String::from_utf8(pages.stdout).unwrap().trim().parse().unwrap();
    assert!(cached < 1 << 20, "{cached} bytes are cached");
}
