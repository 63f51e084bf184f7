//! Sources: what is read is what is there, holes are not read, faults have names, nothing is written.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::IdentityMatch;
use crate::buffer::AlignedBuffer;
use crate::testing::{LoopDevice, Mount, noise, root, run};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn read(source: &impl Volume, at: u64, len: usize) -> Vec<u8> {
    let mut buf = AlignedBuffer::new(len);
    source.read_at(ByteOffset(at), &mut buf).expect("read");
    buf.to_vec()
}

#[test]
fn image_tail_bounds_and_truncation() {
    let dir = folder();
    let path = dir.path().join("a.img");
    let bytes = noise(100_001, 1);
    std::fs::write(&path, &bytes).expect("written");
    let source = Source::open(&path).expect("opened");
    assert_eq!((source.length(), source.is_device(), source.sector_size()), (100_001, false, 1));
    assert!(read(&source, 65_536, 34_465) == bytes[65_536..]);
    let mut buf = [0; 10];
    assert!(matches!(source.read_at(ByteOffset(99_992), &mut buf), Err(VolumeError::OutOfBounds { .. })));
    assert!(matches!(source.read_at(ByteOffset(u64::MAX), &mut buf), Err(VolumeError::OutOfBounds { .. })));
    source.recheck().expect("unchanged");

    OpenOptions::new().write(true).open(&path).expect("opened").set_len(50_000).expect("cut");
    let e = source.read_at(ByteOffset(49_995), &mut buf).expect_err("short");
    assert!(matches!(e, VolumeError::ShortRead { got: 5, .. }), "{e}");
    let text = e.to_string();
    assert!(text.contains("a.img") && text.contains("49995") && text.contains("50005"), "{text}");
    assert!(matches!(source.recheck(), Err(VolumeError::Changed { .. })));
    // Behind the new end there is no data; that must not pass for a hole.
    assert!(matches!(source.next_data(ByteOffset(60_000)), Err(VolumeError::Changed { .. })));
}

#[test]
fn what_is_not_a_volume_is_refused_without_hanging() {
    let dir = folder();
    let fifo = dir.path().join("fifo");
    run("mkfifo", &[fifo.to_str().expect("text")]);
    std::fs::write(dir.path().join("empty"), b"").expect("written");
    for (path, what) in [
        (dir.path().to_owned(), "a directory"),
        (fifo, "a pipe"),
        ("/dev/null".into(), "a character device"),
        (dir.path().join("empty"), "an empty file"),
    ] {
        match Source::open(&path) {
            Err(e @ VolumeError::NotAVolume { .. }) => assert!(e.to_string().contains(what), "{e}"),
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("{} was opened", path.display()),
        }
    }
    let missing = Source::open(dir.path().join("none")).expect_err("not there");
    assert!(matches!(missing, VolumeError::Open { .. }) && !missing.is_retryable());
}

#[test]
fn holes_are_found_and_not_data() {
    let dir = folder();
    let path = dir.path().join("sparse");
    let file = std::fs::File::create(&path).expect("made");
    file.set_len(1 << 30).expect("grown");
    file.write_all_at(&[1; 4096], 300 << 20).expect("written");
    let source = Source::open(&path).expect("opened");
    let data = source.next_data(ByteOffset(0)).expect("asked").expect("some");
    assert!(data.contains(&(300 << 20)) && data.end - data.start <= 2 << 20, "{data:?}");
    assert_eq!(source.next_data(ByteOffset(data.end)).expect("asked"), None);
    assert_eq!(source.next_data(ByteOffset(1 << 30)).expect("asked"), None);
    // A writer that fills a hole is seen at once, before its pages are on disk.
    file.write_all_at(&[1], 700 << 20).expect("written");
    let data = source.next_data(ByteOffset(data.end)).expect("asked").expect("some");
    assert!(data.contains(&(700 << 20)), "{data:?}");
}

#[test]
fn another_inode_under_the_path_is_the_same_image() {
    let dir = folder();
    let path = dir.path().join("a.img");
    std::fs::write(&path, noise(5000, 1)).expect("written");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("linked");
    let old = Source::open(&link).expect("opened");
    std::fs::write(dir.path().join("b"), noise(6000, 2)).expect("written");
    std::fs::rename(dir.path().join("b"), &path).expect("renamed");
    old.recheck().expect("what was read is one file, whole");
    let new = Source::open(&link).expect("opened");
    assert_eq!(old.identity().same_as(new.identity()), IdentityMatch::Grown { from: 5000, to: 6000 });
    assert_eq!(new.path(), path.canonicalize().expect("a path"));
    assert!(!new.identity().weak());
}

#[test]
fn device_is_read_past_the_cache_at_any_alignment() {
    if !root() {
        return;
    }
    let dir = folder();
    let device = LoopDevice::new(dir.path(), "a", (4 << 20) + 512);
    let bytes = noise((4 << 20) + 512, 3);
    let mut writer = OpenOptions::new().write(true).open(&device.node).expect("opened");
    writer.write_all(&bytes).and_then(|()| writer.sync_all()).expect("written");
    let before = std::fs::read(&device.image).expect("read");
    let source = Source::open(&device.node).expect("opened");
    assert_eq!((source.length(), source.sector_size()), (bytes.len() as u64, 512));
    assert!(source.identity().weak(), "a loop device has no serial");
    for (at, len) in [(0, 65_536), (4 << 20, 512), (1, 1), (511, 3), (4095, 2_000_000), (bytes.len() - 7, 7)] {
        assert!(read(&source, at as u64, len) == bytes[at..at + len], "{at} {len}");
        let mut odd = vec![0; len + 1];
        source.read_at(ByteOffset(at as u64), &mut odd[1..]).expect("read");
        assert!(odd[1..] == bytes[at..at + len], "{at} {len}");
    }
    assert_eq!(source.next_data(ByteOffset(5)).expect("asked"), Some(5..source.length()));
    let mut buf = AlignedBuffer::new(512);
    assert!(source.read_at(ByteOffset(source.length()), &mut buf).is_err());
    // I23
    assert!(std::fs::read(&device.image).expect("read") == before, "reading writes nothing");
    if let Kind::Device(d) = &source.kind {
        assert!(d.direct.write(0, &[0; 512]).is_err(), "opened for reading only");
    }
}

#[test]
fn sectors_of_4096_end_with_the_last_whole_one() {
    if !root() {
        return;
    }
    let dir = folder();
    let image = dir.path().join("a");
    let bytes = noise((1 << 20) + 1536, 4);
    std::fs::write(&image, &bytes).expect("written");
    let device = LoopDevice::over(&image, &["-b", "4096"]);
    let source = Source::open(&device.node).expect("opened");
    assert_eq!(source.sector_size(), 4096);
    assert_eq!(source.length(), 1 << 20);
    source.recheck().expect("unchanged");
    assert!(read(&source, (1 << 20) - 5000, 5000) == bytes[(1 << 20) - 5000..1 << 20]);
}

#[test]
fn a_mounted_device_is_read_as_the_disk_is() {
    if !root() {
        return;
    }
    for mkfs in ["mkfs.ext4", "mkfs.xfs"] {
        let dir = folder();
        let device = LoopDevice::new(dir.path(), "a", 400 << 20);
        run(mkfs, &["-q", device.text()]);
        let mount = Mount::new(&device.node, &dir.path().join("m"));
        let source = Source::open(&device.node).expect("mounted and still readable");
        let mut stale = vec![0; 64 << 20];
        source.read_at(ByteOffset(0), &mut stale).expect("read");
        let needle = noise(4096, 5);
        std::fs::write(mount.0.join("f"), &needle).expect("written");
        run("sync", &["-f", mount.0.to_str().expect("text")]);
        let mut now = AlignedBuffer::new(400 << 20);
        source.read_at(ByteOffset(0), &mut now).expect("read");
        assert!(now.chunks(1024).any(|c| *c == needle[..1024]), "{mkfs}: the file's block is on the disk");
    }
}

#[test]
fn resized_and_swapped_devices_are_noticed() {
    if !root() {
        return;
    }
    let dir = folder();
    let device = LoopDevice::new(dir.path(), "a", 4 << 20);
    let source = Source::open(&device.node).expect("opened");
    source.recheck().expect("unchanged");
    OpenOptions::new().write(true).open(&device.image).and_then(|f| f.set_len(8 << 20)).expect("grown");
    run("losetup", &["-c", device.text()]);
    let e = source.recheck().expect_err("grown");
    assert!(matches!(e, VolumeError::Changed { .. }) && e.is_retryable(), "{e}");
    let now = Source::open(&device.node).expect("opened");
    assert_eq!(source.identity().same_as(now.identity()), IdentityMatch::Grown { from: 4 << 20, to: 8 << 20 });

    let other_device = LoopDevice::new(dir.path(), "b", 8 << 20);
    let other = Source::open(&other_device.node).expect("opened");
    assert!(matches!(now.identity().same_as(other.identity()), IdentityMatch::Replaced { .. }));

    // The node itself leads elsewhere, as after a disk was pulled and another one found: F12.
    let node = dir.path().join("node");
    let node_text = node.to_str().expect("text");
    let minor = |s: &Source| rustix::fs::minor(std::fs::metadata(s.path()).expect("stat").rdev()).to_string();
    run("mknod", &[node_text, "b", "7", &minor(&now)]);
    let mine = Source::open(&node).expect("opened");
    mine.recheck().expect("unchanged");
    std::fs::remove_file(&node).expect("removed");
    run("mknod", &[node_text, "b", "7", &minor(&other)]);
    let e = mine.recheck().expect_err("another device");
    assert!(e.to_string().contains("another device"), "{e}");
}

#[test]
fn what_the_disk_cannot_read_is_an_error_and_not_zeroes() {
    if !root() {
        return;
    }
    let dir = folder();
    let device = LoopDevice::new(dir.path(), "a", 4 << 20);
    let source = Source::open(&device.node).expect("opened");
    // The medium ends early beneath the device: F9.
    OpenOptions::new().write(true).open(&device.image).and_then(|f| f.set_len(1 << 20)).expect("cut");
    let mut buf = AlignedBuffer::new(65_536);
    source.read_at(ByteOffset(0), &mut buf).expect("what is there");
    match source.read_at(ByteOffset(2 << 20), &mut buf) {
        Err(e @ (VolumeError::Read { .. } | VolumeError::ShortRead { .. })) => {
            let text = e.to_string();
            assert!(text.contains(device.text()) && text.contains("2097152 to 2162688"), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // And one that reaches over the end of what can be read.
    let mut across = vec![0; 2 << 20];
    assert!(source.read_at(ByteOffset(0), &mut across).is_err());
}
