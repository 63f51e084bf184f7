//! Every superblock is found, and a descriptor of it is one of it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use backhaul_freeze::{Found, Swap, Thawed, WhyNot, devices_of, superblocks};
use backhaul_volume::sysfs::Dev;

use crate::support::*;

fn find(devices: &[Dev]) -> Found {
    superblocks(devices).expect("it can be looked at")
}

fn kinds(found: &Found) -> Vec<&str> {
    found.superblocks.iter().map(|s| s.kind.as_str()).collect()
}

/// Freezes what lies on the devices; whether `inside` all wait and `outside` all do not.
#[track_caller]
fn freezes(place: &Place, devices: &[Dev], inside: &[&Path], outside: &[&Path]) {
    let mut freezer = place.freezer();
    let found = freezer.find(devices).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    for at in outside {
        assert!(writes_within(at, Duration::from_secs(1)), "{} was frozen and is not ours", at.display());
    }
    inside.iter().for_each(|at| assert_frozen(at));
    assert!(matches!(frozen.thaw(), Thawed::Held { .. }));
    drop(prepared);
    inside.iter().for_each(|at| assert_thawed(at));
}

/// A shell that does this and then waits until it is dropped.
struct Shell(Child);

impl Shell {
    fn new(through: &[&str], script: &str) -> Self {
        let mut args = [through, &["sh", "-c"]].concat();
        let script = format!("{script}; echo ready; exec sleep 1000");
        args.push(&script);
        let mut child = Command::new(args[0]).args(&args[1..]).stdout(Stdio::piped()).spawn().expect("a shell");
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().expect("piped")), &mut line)
            .expect("a line");
        assert_eq!(line, "ready\n", "{script}");
        Self(child)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bind mount at a path that is no text.
struct Bound(PathBuf);

impl Bound {
    fn new(what: &Path, at: &Path) -> Self {
        assert!(Command::new("mount").arg("--bind").args([what, at]).status().expect("mount").success());
        Self(at.into())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn words(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn through_partitions_and_bind_mounts() {
    if !can_run("through_partitions_and_bind_mounts") {
        return;
    }
    let place = Place::new();
    let (disk, parts) = Disk::partitioned(&place.at("disk"), &[16, 320, 16]);
    mkfs("ext4", &parts[0]);
    mkfs("xfs", &parts[1]);
    let (a, b) = (place.folder("a"), place.folder("b with space"));
    let _a = Point::new(&parts[0], &a, &[]);
    let _b = Point::new(&parts[1], &b, &[]);
    std::fs::create_dir(a.join("sub")).expect("a folder");
    // No UTF-8, which a path need not be.
    let bound = place.at("bound").join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff"));
    std::fs::create_dir_all(&bound).expect("a folder");
    let _bound = Bound::new(&a.join("sub"), &bound);
    let other = place.mounted("ext4", "other");

    let found = find(&[disk.dev]);
    assert_eq!(kinds(&found), ["ext4", "xfs"], "{found:#?}");
    assert_eq!(found.superblocks[0].mounts, [a.clone(), place.at("bound/\u{fffd}")]);
    assert_eq!(found.superblocks[1].mounts, std::slice::from_ref(&b));
    assert_eq!(found.unmounted, [Dev::of_path(&parts[2]).expect("a device")]);
    assert!(found.not_freezable.is_empty() && found.caveats.is_empty(), "{found:#?}");
    // A partition is only itself.
    let part = Dev::of_path(&parts[1]).expect("a device");
    assert_eq!(kinds(&find(&[part])), ["xfs"]);
    freezes(&place, &[disk.dev], &[&a, &b], &[other.at()]);
}

#[test]
fn in_other_mount_namespaces() {
    if !can_run("in_other_mount_namespaces") {
        return;
    }
    let place = Place::new();
    let disk = place.disk("image", 16);
    mkfs("ext4", &disk.path);
    let at = place.folder("at");
    let script = format!("mount {} {}", words(&disk.path), words(&at));
    let shell = Shell::new(&["unshare", "--mount", "--propagation", "private"], &script);
    let found = find(&[disk.dev]);
    assert_eq!(kinds(&found), ["ext4"], "{found:#?}");
    assert_eq!(found.superblocks[0].mounts, std::slice::from_ref(&at));
    // As seen from there; here it is an empty folder.
    let there = PathBuf::from(format!("/proc/{}/root{}", shell.0.id(), words(&at)));
    let lifeline = Lifeline::to(&there);
    freezes(&place, &[disk.dev], &[&there], &[&at]);
    // In a chroot's own table paths begin elsewhere.
    drop(lifeline);
    drop(shell);
    let one = Mounted::new(disk, &at);
    let _shell = Shell::new(&["unshare", "--mount", "--propagation", "private", "--root", "/"], "true");
    freezes(&place, &[one.dev()], &[one.at()], &[]);
}

#[test]
fn beneath_other_mounts() {
    if !can_run("beneath_other_mounts") {
        return;
    }
    let place = Place::new();
    let mut one = place.mounted("ext4", "at");
    one.point.without_lifeline();
    let other = place.disk("other", 16);
    mkfs("ext4", &other.path);
    let bound = place.folder("bound");
    let mut through = Point::new(one.at(), &bound, &["--bind"]);
    // The path of `one` now leads to `other`, which is not asked for.
    let over = Point::new(&other.path, one.at(), &[]);
    freezes(&place, &[one.dev()], &[&bound], &[one.at()]);
    through.without_lifeline();

    // No path leads there any more, only a process that was there before.
    drop(over);
    let script = format!("cd {}", words(one.at()));
    let shell = Shell::new(&["env"], &script);
    drop(through);
    let over = Point::new(&other.path, one.at(), &[]);
    let inside = PathBuf::from(format!("/proc/{}/cwd", shell.0.id()));
    freezes(&place, &[one.dev()], &[&inside], &[one.at()]);

    // Nothing at all.
    drop(shell);
    let found = find(&[one.dev()]);
    assert!(found.superblocks.is_empty(), "{found:#?}");
    assert_eq!(found.not_freezable[0].why, WhyNot::Unreachable, "I6");
    drop(over);
}

#[test]
fn unmounted_while_in_use() {
    if !can_run("unmounted_while_in_use") {
        return;
    }
    for kind in ["ext4", "btrfs"] {
        let place = Place::new();
        let disk = place.disk("image", size_of(kind));
        mkfs(kind, &disk.path);
        let at = place.folder("at");
        let mut point = Point::new(&disk.path, &at, &[]);
        point.without_lifeline();
        let shell = Shell::new(&["env"], &format!("cd {}", words(&at)));
        tool("umount", &["--lazy", words(&at)]);
        let found = find(&[disk.dev]);
        assert_eq!(kinds(&found), [kind], "{found:#?}");
        assert!(found.superblocks[0].mounts.is_empty());
        let inside = PathBuf::from(format!("/proc/{}/cwd", shell.0.id()));
        freezes(&place, &[disk.dev], &[&inside], &[]);
        // Held by something that cannot be seen.
        drop(shell);
        let _claimed = rustix::fs::open(
            &disk.path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL,
            rustix::fs::Mode::empty(),
        );
        eventually("it is claimed, and by nothing that is known", || {
            let found = find(&[disk.dev]);
            _claimed.is_err() || found.not_freezable.first().is_some_and(|n| n.why == WhyNot::Claimed)
        });
        std::mem::forget(point);
    }
}

#[test]
fn btrfs_with_subvolumes_and_two_devices() {
    if !can_run("btrfs_with_subvolumes_and_two_devices") {
        return;
    }
    let place = Place::new();
    let (one, two) = (place.disk("one", 128), place.disk("two", 128));
    tool("mkfs.btrfs", &["-q", "-f", "-d", "raid1", "-m", "raid1", words(&one.path), words(&two.path)]);
    let (at, sub) = (place.folder("at"), place.folder("sub"));
    let _at = Point::new(&one.path, &at, &[]);
    tool("btrfs", &["subvolume", "create", words(&at.join("volume"))]);
    let _sub = Point::new(&one.path, &sub, &["-o", "subvol=volume"]);
    for asked in [&[one.dev][..], &[two.dev], &[two.dev, one.dev]] {
        let found = find(asked);
        assert_eq!(kinds(&found), ["btrfs"], "one superblock, however often it is mounted: {found:#?}");
        let superblock = &found.superblocks[0];
        assert_eq!(superblock.mounts, [at.clone(), sub.clone()]);
        let outside: Vec<Dev> = [one.dev, two.dev].into_iter().filter(|d| !asked.contains(d)).collect();
        assert_eq!(superblock.outside, outside, "I6");
        assert_eq!(found.caveats.is_empty(), outside.is_empty(), "{:?}", found.caveats);
        freezes(&place, asked, &[&at, &sub], &[]);
    }
}

#[test]
fn images_on_file_systems_come_first() {
    if !can_run("images_on_file_systems_come_first") {
        return;
    }
    for kind in ["ext4", "btrfs"] {
        let place = Place::new();
        let disk = place.disk("image", 256);
        mkfs(kind, &disk.path);
        let outer = Mounted::new(disk, &place.folder("outer"));
        let disk = Disk::new(&outer.at().join("inner.image"), 16);
        mkfs("ext4", &disk.path);
        let inner = Mounted::new(disk, &place.folder("inner"));
        assert_eq!(devices_of(&inner.disk.image).expect("an image"), [inner.dev()]);
        let found = find(&[outer.dev()]);
        assert_eq!(kinds(&found), ["ext4", kind], "{found:#?}");
        assert_eq!(found.superblocks.iter().map(|s| s.level).collect::<Vec<_>>(), [1, 0]);
        // Not the other way round: the outer is none of the inner's.
        assert_eq!(find(&[inner.dev()]).superblocks.len(), 1);
        // The other order would have the freeze of the inner wait for the thaw of the outer.
        let writers = [Writers::on(inner.at()), Writers::on(outer.at())];
        for _ in 0..3 {
            freezes(&place, &[outer.dev()], &[inner.at(), outer.at()], &[]);
        }
        drop(writers);
    }
}

#[test]
fn devices_on_devices() {
    if !can_run("devices_on_devices") {
        return;
    }
    let place = Place::new();
    let below = place.disk("image", 16);
    let above = Disk::attach(&below.path);
    mkfs("ext4", &above.path);
    let one = Mounted::new(above, &place.folder("one"));
    let other = place.mounted("ext4", "other");
    for asked in [below.dev, one.dev()] {
        let found = find(&[asked]);
        assert_eq!(found.superblocks.len(), 1, "{found:#?}");
        assert_eq!(found.superblocks[0].dev, one.dev());
        assert!(found.superblocks[0].outside.is_empty() && found.caveats.is_empty(), "{found:#?}");
        assert!(found.unmounted.is_empty() && found.not_freezable.is_empty(), "{found:#?}");
        freezes(&place, &[asked], &[one.at()], &[other.at()]);
    }
}

#[test]
fn what_cannot_be_frozen_or_need_not_is_said() {
    if !can_run("what_cannot_be_frozen_or_need_not_is_said") {
        return;
    }
    let place = Place::new();
    // No vfat in every kernel; no squashfs can be frozen either.
    let image = place.at("image");
    tool("mksquashfs", &["/etc/hostname", words(&image), "-quiet", "-no-progress"]);
    let squashed = Mounted::new(Disk::attach(&image), &place.folder("squashed"));
    let found = find(&[squashed.dev()]);
    assert!(found.superblocks.is_empty());
    assert_eq!((found.not_freezable[0].kind.as_str(), found.not_freezable[0].why), ("squashfs", WhyNot::Kind));

    // Read-only today; nobody can make it writable in between.
    let disk = place.disk("read-only", 16);
    mkfs("ext4", &disk.path);
    let at = place.folder("read-only-at");
    let _point = Point::new(&disk.path, &at, &["-o", "ro"]);
    let found = find(&[disk.dev]);
    assert!(found.superblocks[0].read_only, "{found:#?}");
    let mut freezer = place.freezer();
    let found = freezer.find(&[disk.dev]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    assert!(try_tool("mount", &["-o", "remount,rw", words(&at)]).is_err());
    assert!(matches!(frozen.thaw(), Thawed::Held { .. }));
    tool("mount", &["-o", "remount,rw", words(&at)]);
    drop(prepared);
    drop(freezer);

    // Nothing there, and nothing to do.
    let empty = place.disk("empty", 16);
    let found = find(&[empty.dev]);
    assert_eq!((&found.unmounted[..], found.superblocks.len()), (&[empty.dev][..], 0));
    freezes(&place, &[empty.dev], &[], &[at.as_ref()]);
}

#[test]
fn swap_is_told() {
    if !can_run("swap_is_told") {
        return;
    }
    struct On<'a>(&'a Path);
    impl Drop for On<'_> {
        fn drop(&mut self) {
            let _ = try_tool("swapoff", &[words(self.0)]);
        }
    }
    let place = Place::new();
    let disk = place.disk("swap", 16);
    tool("mkswap", &[words(&disk.path)]);
    let one = place.mounted("ext4", "one");
    let file = one.at().join("swap");
    std::fs::write(&file, vec![0; 4 << 20]).expect("room");
    let chmod = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&file, chmod).expect("ours");
    tool("mkswap", &[words(&file)]);
    if try_tool("swapon", &["--priority", "0", words(&disk.path)]).is_err() {
        println!("SKIPPED: this kernel does not swap to loop devices");
        return;
    }
    let _on = On(&disk.path);
    tool("swapon", &["--priority", "0", words(&file)]);
    let _also = On(&file);
    assert_eq!(find(&[disk.dev]).swap, [Swap::Device(disk.dev)]);
    assert!(find(&[disk.dev]).not_freezable.is_empty());
    let found = find(&[one.dev()]);
    assert_eq!(found.swap, [Swap::File(file.clone())]);
    assert_eq!(found.caveats.len(), 1, "{:?}", found.caveats);
}

#[test]
fn logs_and_journals_elsewhere() {
    if !can_run("logs_and_journals_elsewhere") {
        return;
    }
    let place = Place::new();
    let (data, log) = (place.disk("data", 320), place.disk("log", 320));
    tool("mkfs.xfs", &["-q", "-f", "-K", "-l", &format!("logdev={},size=100m", words(&log.path)), words(&data.path)]);
    let at = place.folder("xfs");
    let point = Point::new(&data.path, &at, &["-o", &format!("logdev={}", words(&log.path))]);
    let found = find(&[data.dev]);
    assert_eq!(found.superblocks[0].outside, [log.dev], "I6: {found:#?}");
    assert_eq!(find(&[log.dev]).superblocks[0].outside, [data.dev], "I6");
    assert!(find(&[log.dev, data.dev]).caveats.is_empty());
    drop(point);

    tool("mke2fs", &["-q", "-F", "-b", "4096", "-O", "journal_dev", words(&log.path)]);
    tool(
        "mke2fs",
        &["-q", "-F", "-b", "4096", "-t", "ext4", "-J", &format!("device={}", words(&log.path)), words(&data.path)],
    );
    let at = place.folder("ext4");
    let _point = Point::new(&data.path, &at, &[]);
    let found = find(&[data.dev]);
    assert_eq!(found.superblocks[0].outside, [log.dev], "I6: {found:#?}");
    freezes(&place, &[data.dev, log.dev], &[&at], &[]);
}
