//! I10, F26: a restore cannot hit the wrong target, and a refusal has written nothing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::testing::{LoopDevice, Mount, noise, patiently, root, run};

const MIB: u64 = 1 << 20;

fn needs(length: u64) -> TargetNeeds {
    TargetNeeds { length, ..TargetNeeds::default() }
}

/// The check refuses with this class and says this.
#[track_caller]
fn refuses(path: impl AsRef<Path>, needs: &TargetNeeds, kind: TargetErrorKind, says: &str) {
    let not_meant = |e: &TargetError| is_busy(e) && !e.to_string().contains(says);
    match patiently(|| Target::check(path.as_ref(), needs), not_meant) {
        Ok(_) => panic!("{} was accepted; want \"{says}\"", path.as_ref().display()),
        Err(e) => {
            assert_eq!(e.kind(), kind, "{e}");
            let text = e.to_string();
            assert!(text.contains(says) && text.contains(&path.as_ref().display().to_string()), "{text}\nwant: {says}");
            assert!(!e.is_retryable());
        }
    }
}

fn is_busy(e: &TargetError) -> bool {
    matches!(e, TargetError::Refused { why: Refusal::Busy, .. })
}

fn accepts(path: impl AsRef<Path>, needs: &TargetNeeds) -> bool {
    patiently(|| Target::check(path.as_ref(), needs), is_busy).is_ok()
}

/// Claims a device as a mount does.
fn claim(path: &Path) -> File {
    let open = || File::options().read(true).custom_flags(libc::O_EXCL).open(path);
    patiently(open, |e| e.raw_os_error() == Some(libc::EBUSY)).expect("free")
}

use TargetErrorKind::{NoSpace, NotFound, Permission, Refused};

#[test]
fn what_is_no_target() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    run("mkfifo", &[at("fifo").to_str().expect("text")]);
    symlink(at("nowhere"), at("dangling")).expect("linked");
    std::fs::write(at("file"), b"x").expect("written");
    refuses(dir.path(), &needs(1), Refused, "a directory");
    refuses(at("fifo"), &needs(1), Refused, "a pipe");
    refuses("/dev/null", &needs(1), Refused, "a character device");
    refuses(at("none/file"), &needs(1), NotFound, "there is no folder");
    refuses(at("new/"), &needs(1), NotFound, "not there");
    refuses(at("dangling"), &needs(1), NotFound, "symbolic link");
    refuses("/dev/no-such-disk", &needs(1), NotFound, "no such device");
    let much = TargetNeeds { data_bytes: Some(u64::MAX), ..needs(1) };
    refuses(at("new"), &much, NoSpace, "are free");
    refuses(at("file"), &much, NoSpace, "are free");
    refuses(at("file/below"), &needs(1), NotFound, "there is no folder");
    assert!(!at("new").exists() && !at("nowhere").exists(), "a check makes nothing");
    assert_eq!(std::fs::read(at("file")).expect("read"), b"x");
}

#[test]
fn the_source_by_any_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("source"), noise(9000, 1)).expect("written");
    std::fs::hard_link(at("source"), at("hard")).expect("linked");
    symlink(at("source"), at("soft")).expect("linked");
    let needs = TargetNeeds { refuse: vec![at("gone"), at("source")], ..needs(9000) };
    for name in ["source", "hard", "soft"] {
        refuses(at(name), &needs, Refused, "being replicated");
    }
    assert!(accepts(at("other"), &needs));
    assert_eq!(std::fs::read(at("source")).expect("read"), noise(9000, 1));
}

#[test]
fn a_file_that_something_lies_on() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let device = LoopDevice::new(dir.path(), "a", 4 * MIB);
    refuses(&device.image, &needs(MIB), Refused, &format!("{} lies on it", device.text()));
    let replicated = TargetNeeds { refuse: vec![device.node.clone()], ..needs(MIB) };
    refuses(&device.image, &replicated, Refused, "being replicated");

    let program = dir.path().join("sleep");
    std::fs::copy("/bin/sleep", &program).expect("copied");
    let _running = Killed(Command::new(&program).arg("60").spawn().expect("started"));
    refuses(&program, &needs(MIB), Refused, "open exclusively");

    let disk = LoopDevice::new(dir.path(), "fs", 64 * MIB);
    run("mkfs.ext4", &["-q", disk.text()]);
    let mount = Mount::new(&disk.node, &dir.path().join("m"));
    let swap = mount.0.join("swap");
    std::fs::write(&swap, vec![0; 8 << 20]).expect("written");
    run("chmod", &["600", swap.to_str().expect("text")]);
    let swap_on = Swap::on(&swap);
    refuses(&swap, &needs(MIB), Refused, "swap");
    drop(swap_on);
    let fixed = mount.0.join("fixed");
    std::fs::write(&fixed, b"x").expect("written");
    run("chattr", &["+i", fixed.to_str().expect("text")]);
    refuses(&fixed, &needs(1), Permission, "not allowed");
    run("mount", &["-o", "remount,ro", mount.0.to_str().expect("text")]);
    refuses(&fixed, &needs(1), Refused, "read-only");
    refuses(mount.0.join("new"), &needs(1), Refused, "read-only");
}

struct Killed(Child);
impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Swap(PathBuf);
impl Swap {
    fn on(path: &Path) -> Self {
        let text = path.to_str().expect("text");
        run("mkswap", &["-q", text]);
        run("swapon", &[text]);
        Self(path.to_owned())
    }
}
impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).output();
    }
}

#[test]
fn devices_in_use() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 64 * MIB);
    let (one, two) = (disk.partition(1, 1, 40), disk.partition(2, 41, 20));
    run("mkfs.ext4", &["-q", one.to_str().expect("text")]);
    let name = disk.name();
    let point = dir.path().join("mount point");

    let mount = Mount::new(&one, &point);
    refuses(&one, &needs(MIB), Refused, "mount point");
    refuses(&disk.node, &needs(MIB), Refused, &format!("/dev/{name}p1 is mounted"));
    assert!(accepts(&two, &needs(MIB)), "another partition is free");
    drop(mount);

    // In a mount namespace of another process: only /proc/PID/mountinfo names it.
    let script = format!("mount {} {} && echo ready && sleep 60", one.display(), quoted(&point));
    let other = Command::new("unshare").args(["-m", "sh", "-c", &script]).stdout(Stdio::piped()).spawn();
    let mut other = Killed(other.expect("started"));
    let mut ready = [0; 5];
    std::io::Read::read_exact(other.0.stdout.as_mut().expect("piped"), &mut ready).expect("mounted");
    refuses(&one, &needs(MIB), Refused, "is mounted");
    run("sh", &["-c", &format!("kill $(pgrep -P {}) || true", other.0.id())]);
    drop(other);
    drop(claim(&one));

    let swap = Swap::on(&two);
    refuses(&two, &needs(MIB), Refused, "swap");
    refuses(&disk.node, &needs(MIB), Refused, &format!("/dev/{name}p2 is used as swap"));
    drop(swap);

    let above = LoopDevice::over(&two, &[]);
    refuses(&two, &needs(MIB), Refused, &format!("{} lies on it", above.text()));
    refuses(&disk.node, &needs(MIB), Refused, "lies on it");
    drop(above);

    let claimed = claim(&two);
    refuses(&two, &TargetNeeds { confirm: Some(format!("{name}p2")), ..needs(MIB) }, Refused, "open exclusively");
    drop(claimed);
    // And the other way round: while the target is checked, nobody else gets in.
    let sure = TargetNeeds { confirm: Some(format!("{name}p2")), ..needs(MIB) };
    let held = patiently(|| Target::check(&two, &sure), is_busy).expect("free");
    assert!(File::options().read(true).custom_flags(libc::O_EXCL).open(&two).is_err());
    drop(held);
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

#[test]
fn devices_that_do_not_fit() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 4 * MIB);
    refuses(&disk.node, &needs(4 * MIB + 1), Refused, "4194304 bytes and the volume needs 4194305");
    assert!(accepts(&disk.node, &needs(4 * MIB)));
    run("blockdev", &["--setro", disk.text()]);
    refuses(&disk.node, &needs(MIB), Refused, "read-only");
    run("blockdev", &["--setrw", disk.text()]);
    assert!(accepts(&disk.node, &needs(MIB)), "larger is allowed");
}

#[test]
fn replicated_devices_by_any_name() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let disk = LoopDevice::new(dir.path(), "a", 16 * MIB);
    let (one, two) = (disk.partition(1, 1, 4), disk.partition(2, 8, 4));
    let twin = LoopDevice::over(&disk.image, &[]);
    let link = dir.path().join("link");
    symlink(&disk.node, &link).expect("linked");
    let refuse = |path: &Path| TargetNeeds { refuse: vec![path.to_owned()], ..needs(MIB) };
    for target in [&disk.node, &link, &one, &twin.node] {
        refuses(target, &refuse(&disk.node), Refused, "being replicated");
    }
    refuses(&disk.node, &refuse(&one), Refused, "being replicated");
    refuses(&disk.node, &refuse(&disk.image), Refused, "being replicated");
    refuses(&one, &refuse(&disk.image), Refused, "being replicated");
    assert!(accepts(&two, &refuse(&one)), "another partition is another volume");
    let other = LoopDevice::new(dir.path(), "b", 4 * MIB);
    assert!(accepts(&other.node, &refuse(&disk.node)));
}

#[test]
fn content_needs_the_name_typed() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    for (at, what) in [(0, "first byte"), (MIB - 1, "in the first MiB"), (8 * MIB - 1, "last byte")] {
        let disk = LoopDevice::new(dir.path(), "a", 8 * MIB);
        assert!(accepts(&disk.node, &needs(MIB)), "empty: no question");
        let file = OpenOptions::new().write(true).open(&disk.node).expect("opened");
        file.write_all_at(&[1], at).and_then(|()| file.sync_all()).expect("written");
        let before = std::fs::read(&disk.image).expect("read");
        let say = format!("--confirm-target {}", disk.name());
        refuses(&disk.node, &needs(MIB), Refused, &say);
        let confirm = |name: &str| TargetNeeds { confirm: Some(name.to_owned()), ..needs(MIB) };
        for wrong in ["yes", "", "loop", "sda", "/dev/sda"] {
            refuses(&disk.node, &confirm(wrong), Refused, &say);
        }
        for right in [disk.name(), disk.text()] {
            assert!(accepts(&disk.node, &confirm(right)), "{what}: {right}");
        }
        assert!(std::fs::read(&disk.image).expect("read") == before, "a check writes nothing");
    }
    let empty = LoopDevice::new(dir.path(), "b", MIB);
    let wrong = TargetNeeds { confirm: Some("sda".to_owned()), ..needs(MIB) };
    refuses(&empty.node, &wrong, Refused, "but this is");
}

#[test]
fn what_was_checked_is_what_is_opened() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("mine"), noise(10, 1)).expect("written");
    std::fs::write(at("precious"), noise(10, 2)).expect("written");
    symlink(at("mine"), at("link")).expect("linked");
    let checked = Target::check(at("link"), &needs(5)).expect("a file");
    std::fs::remove_file(at("link")).expect("removed");
    symlink(at("precious"), at("link")).expect("linked");
    checked.open().expect("opened");
    assert_eq!(std::fs::read(at("precious")).expect("read"), noise(10, 2));
    assert_eq!(std::fs::metadata(at("mine")).expect("stat").len(), 5);

    let checked = Target::check(at("new"), &needs(5)).expect("nothing there");
    symlink(at("precious"), at("new")).expect("linked");
    let e = checked.open().expect_err("something appeared");
    assert_eq!(e.kind(), Refused, "{e}");
    assert_eq!(std::fs::read(at("precious")).expect("read"), noise(10, 2));
}
