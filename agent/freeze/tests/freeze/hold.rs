//! A freeze holds, or is said not to have held.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use backhaul_freeze::{Broken, FreezeError, Freezer, Helper, Options, Thawed};
use rustix::process::Signal;

use crate::support::*;

#[test]
fn writers_wait_and_go_on() {
    if !can_run("writers_wait_and_go_on") {
        return;
    }
    let place = Place::new();
    let all = ["ext4", "xfs", "btrfs"].map(|kind| place.mounted(kind, kind));
    let writers = all.each_ref().map(|m| Writers::on(m.at()));
    let mut freezer = place.freezer();
    let found = freezer.find(&all.each_ref().map(|m| m.dev())).expect("found");
    assert_eq!(found.superblocks.len(), 3, "{found:#?}");
    let mut prepared = freezer.prepare(found).expect("prepared");
    // One preparation is good for many.
    for _ in 0..3 {
        prepared.sync(Duration::from_secs(20)).expect("synced");
        let frozen = prepared.freeze(LIMIT).expect("frozen");
        let began = Instant::now();
        for one in &all {
            assert_frozen(one.at());
        }
        let held = began.elapsed();
        match frozen.thaw() {
            Thawed::Held { frozen_for } => assert!(frozen_for >= held && frozen_for < LIMIT, "{frozen_for:?}"),
            broken => panic!("{broken:?}"),
        }
        for one in &all {
            assert!(writes_within(one.at(), Duration::from_secs(1)), "I24");
        }
    }
    drop(writers);
    drop(prepared);
    for one in &all {
        assert_thawed(one.at());
    }
    eventually("the journal is removed", || !place.at("run/journal").exists());
}

#[test]
fn the_freeze_of_others_is_left_alone() {
    if !can_run("the_freeze_of_others_is_left_alone") {
        return;
    }
    let place = Place::new();
    let (first, theirs) = (place.mounted("ext4", "first"), place.mounted("ext4", "theirs"));
    let mut freezer = place.freezer();
    let found = freezer.find(&[first.dev(), theirs.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    tool("fsfreeze", &["--freeze", theirs.at().to_str().expect("UTF-8")]);
    for _ in 0..2 {
        match prepared.freeze(LIMIT).expect_err("it is frozen") {
            e @ FreezeError::FrozenByOther { .. } => {
                assert!(e.is_retryable() && e.to_string().contains("theirs"), "{e}");
            }
            e => panic!("{e:?}"),
        }
        assert_thawed(first.at());
    }
    drop(prepared);
    drop(freezer);
    assert_frozen(theirs.at());
    // One thaw is enough: it was frozen once.
    tool("fsfreeze", &["--unfreeze", theirs.at().to_str().expect("UTF-8")]);
    assert_thawed(theirs.at());
}

#[test]
fn a_thaw_of_others_breaks_it() {
    if !can_run("a_thaw_of_others_breaks_it") {
        return;
    }
    let place = Place::new();
    let (a, b) = (place.mounted("ext4", "a"), place.mounted("xfs", "b"));
    let mut freezer = place.freezer();
    let found = freezer.find(&[a.dev(), b.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    tool("fsfreeze", &["--unfreeze", b.at().to_str().expect("UTF-8")]);
    match frozen.thaw() {
        Thawed::Broken(Broken::ThawedByOther { what }) => assert!(what.contains("/b"), "{what}"),
        other => panic!("I6: {other:?}"),
    }
    assert_thawed(a.at());
    assert_thawed(b.at());
    // What was broken once holds the next time.
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    assert!(matches!(frozen.thaw(), Thawed::Held { .. }));
}

#[test]
fn the_deadline_thaws() {
    if !can_run("the_deadline_thaws") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let mut freezer = place.freezer();
    let helper = freezer.helper_process().expect("a child");
    let found = freezer.find(&[one.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let (began, used) = (Instant::now(), processor_ticks(helper));
    let frozen = prepared.freeze(Duration::from_millis(300)).expect("frozen");
    assert!(frozen.remaining() <= Duration::from_millis(300));
    assert!(writes_within(one.at(), Duration::from_secs(2)), "I24");
    let lasted = began.elapsed();
    // Before the guard, who would come a quarter of a second later.
    assert!(lasted >= Duration::from_millis(250) && lasted < Duration::from_millis(500), "{lasted:?}");
    // Of 30 ticks. It waits, and does not ask all the time.
    assert!(processor_ticks(helper) - used < 10, "I24");
    assert_eq!(frozen.thaw(), Thawed::Broken(Broken::Deadline), "I6");
    // Nothing is that fast: it says so, and all is thawed.
    match prepared.freeze(Duration::from_nanos(1)).expect_err("no time") {
        e @ FreezeError::TooSlow { .. } => assert!(e.is_retryable()),
        e => panic!("{e:?}"),
    }
    assert_thawed(one.at());
    assert!(matches!(prepared.sync(Duration::ZERO), Err(FreezeError::TooSlow { .. })));
    drop(prepared.freeze(LIMIT).expect("frozen"));
    assert_thawed(one.at());
}

#[test]
fn an_agent_that_is_stopped_holds_nobody_up() {
    if !can_run("an_agent_that_is_stopped_holds_nobody_up") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let mut agent = Agent::start(Agent::command(HELPER.as_ref(), &place.at("run/journal"), [300, 60, 1], &[one.dev()]));
    agent.go();
    assert_eq!(agent.line(), "frozen");
    signal(agent.child.id(), Signal::STOP);
    assert!(writes_within(one.at(), Duration::from_secs(1)), "I24");
    signal(agent.child.id(), Signal::CONT);
    assert_eq!(agent.line(), "broken Deadline", "I6");
    assert_thawed(one.at());

    // Nor if its helper does not move either: the guard has a clock of its own.
    let mut agent = Agent::start(Agent::command(HELPER.as_ref(), &place.at("run/journal"), [300, 60, 1], &[one.dev()]));
    agent.go();
    assert_eq!(agent.line(), "frozen");
    [agent.child.id(), agent.helper].iter().for_each(|p| signal(*p, Signal::STOP));
    let thawed = writes_within(one.at(), Duration::from_secs(2));
    [agent.child.id(), agent.helper].iter().for_each(|p| signal(*p, Signal::CONT));
    assert!(thawed, "I24");
    assert!(agent.line().starts_with("broken Rescued"), "I6");
    assert_thawed(one.at());
}

#[test]
fn a_helper_that_is_stopped_is_stood_in_for() {
    if !can_run("a_helper_that_is_stopped_is_stood_in_for") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("xfs", "one");
    let mut freezer = place.freezer();
    let helper = freezer.helper_process().expect("a child");
    let found = freezer.find(&[one.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let guard = guard_of(helper).expect("a guard");
    // By the guard; and by the agent, if that one does not move either.
    for stopped in [vec![helper], vec![helper, guard]] {
        let frozen = prepared.freeze(Duration::from_millis(200)).expect("frozen");
        stopped.iter().for_each(|p| signal(*p, Signal::STOP));
        let thawed = writes_within(one.at(), Duration::from_secs(2));
        stopped.iter().for_each(|p| signal(*p, Signal::CONT));
        assert!(thawed, "I24");
        assert!(matches!(frozen.thaw(), Thawed::Broken(Broken::Rescued { .. })), "I6");
        assert_thawed(one.at());
    }
}

#[test]
fn what_is_killed_or_told_to_end_breaks_it() {
    if !can_run("what_is_killed_or_told_to_end_breaks_it") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let kill_guard = |helper| signal(guard_of(helper).expect("a guard"), Signal::KILL);
    let cases: [(&dyn Fn(u32), Broken); 3] = [
        (&|helper| signal(helper, Signal::KILL), Broken::HelperGone),
        (&|helper| signal(helper, Signal::TERM), Broken::Ended),
        (&kill_guard, Broken::GuardGone),
    ];
    for (act, broken) in cases {
        let mut freezer = place.freezer();
        let helper = freezer.helper_process().expect("a child");
        let found = freezer.find(&[one.dev()]).expect("found");
        let mut prepared = freezer.prepare(found).expect("prepared");
        let frozen = prepared.freeze(LIMIT).expect("frozen");
        act(helper);
        assert!(writes_within(one.at(), Duration::from_secs(1)), "I24, {broken:?}");
        // What it was told may come after the thaw was seen.
        std::thread::sleep(Duration::from_millis(20));
        let thawed = frozen.thaw();
        let ended = broken == Broken::Ended && thawed == Thawed::Broken(Broken::HelperGone);
        assert!(ended || thawed == Thawed::Broken(broken), "I6: {thawed:?}");
        assert_thawed(one.at());
    }
}

#[test]
fn without_a_guard_nothing_is_frozen() {
    if !can_run("without_a_guard_nothing_is_frozen") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let mut freezer = place.freezer();
    let helper = freezer.helper_process().expect("a child");
    let found = freezer.find(&[one.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    signal(guard_of(helper).expect("a guard"), Signal::KILL);
    assert!(matches!(prepared.freeze(LIMIT), Err(FreezeError::GuardGone)));
    drop(prepared);
    // The next preparation has a new one.
    let found = freezer.find(&[one.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    assert!(matches!(prepared.freeze(LIMIT).expect("frozen").thaw(), Thawed::Held { .. }));
}

#[test]
fn a_mount_in_between_breaks_it() {
    if !can_run("a_mount_in_between_breaks_it") {
        return;
    }
    let place = Place::new();
    let (disk, parts) = Disk::partitioned(&place.at("disk"), &[16, 16]);
    parts.iter().for_each(|p| mkfs("ext4", p));
    let _one = Point::new(&parts[0], &place.folder("one"), &[]);
    let mut freezer = place.freezer();
    let found = freezer.find(&[disk.dev]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    let _two = Point::new(&parts[1], &place.folder("two"), &[]);
    assert_eq!(frozen.thaw(), Thawed::Broken(Broken::Changed), "I6");
    drop(prepared);
    // What was found once is not what is there.
    let found = freezer.find(&[disk.dev]).expect("found");
    let mut other = found.clone();
    other.superblocks.pop();
    assert!(matches!(freezer.prepare(other), Err(FreezeError::Changed)));
    let found = freezer.find(&[disk.dev]).expect("found");
    assert_eq!(found.superblocks.len(), 2);
    let mut prepared = freezer.prepare(found).expect("prepared");
    assert!(matches!(prepared.freeze(LIMIT).expect("frozen").thaw(), Thawed::Held { .. }));
}

#[test]
fn an_agent_may_live_on_what_it_freezes() {
    if !can_run("an_agent_may_live_on_what_it_freezes") {
        return;
    }
    let place = Place::new();
    let disk = place.disk("image", 128);
    mkfs("ext4", &disk.path);
    let one = Mounted::new(disk, &place.folder("one"));
    let program = one.at().join("agent");
    std::fs::copy(HELPER, &program).expect("room");
    // Not from the cache of the copy: as after a boot.
    tool("sync", &[]);
    let mut command = Agent::command(&program, &place.at("run/journal"), [2000, 100, 3], &[one.dev()]);
    command.current_dir(one.at()).env("HOME", one.at()).env("TMPDIR", one.at());
    let mut agent = Agent::start(command);
    agent.go();
    for _ in 0..3 {
        assert_eq!(agent.line(), "frozen");
        let line = agent.line();
        assert!(line.starts_with("held "), "{line}");
    }
    assert!(agent.child.wait().expect("it ends").success());
    agent.wait_gone();
    assert_thawed(one.at());
}

#[test]
fn a_helper_behind_a_socket_serves_one_after_the_other() {
    if !can_run("a_helper_behind_a_socket_serves_one_after_the_other") {
        return;
    }
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let path = place.folder("run").join("freezer.sock");
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket");
    bind(&socket, &SocketAddrUnix::new(&path).expect("a name")).expect("bound");
    listen(&socket, 4).expect("listening");
    let mut command = std::process::Command::new(HELPER);
    command.args(["freeze-helper", "listen"]).arg(place.at("run/journal")).stdin(std::process::Stdio::from(socket));
    let mut child = command.spawn().expect("a helper");
    for _ in 0..2 {
        let mut freezer = Freezer::start(&Options { helper: Helper::Connect(path.clone()) }).expect("reached");
        let found = freezer.find(&[one.dev()]).expect("found");
        let mut prepared = freezer.prepare(found).expect("prepared");
        assert!(matches!(prepared.freeze(LIMIT).expect("frozen").thaw(), Thawed::Held { .. }));
    }
    signal(child.id(), Signal::TERM);
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn a_journal_is_in_memory_and_has_one_owner() {
    if !can_run("a_journal_is_in_memory_and_has_one_owner") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let with = |journal: PathBuf| Options {
        helper: Helper::Spawn { program: HELPER.into(), args: vec!["freeze-helper".into()], journal },
    };
    // A folder that a freeze would take with it.
    assert!(Freezer::start(&with(one.at().join("run/journal"))).is_err());
    let mut freezer = place.freezer();
    let found = freezer.find(&[one.dev()]).expect("found");
    let mut prepared = freezer.prepare(found).expect("prepared");
    let frozen = prepared.freeze(LIMIT).expect("frozen");
    let left = backhaul_freeze::thaw_left_over(&place.at("run/journal"));
    assert_eq!(left.expect_err("its owner lives").kind(), std::io::ErrorKind::WouldBlock);
    match Freezer::start(&place.options()) {
        Err(FreezeError::InUse { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(frozen.thaw(), Thawed::Held { .. }), "nobody else thawed");
}

/// To thaw may be to write: a disk that hangs keeps its own file systems frozen, and no other.
#[test]
fn a_disk_that_hangs_keeps_no_other_frozen() {
    if !can_run("a_disk_that_hangs_keeps_no_other_frozen") {
        return;
    }
    let place = Place::new();
    let before = place.mounted("ext4", "before");
    let disk = place.disk("outer.image", 64);
    mkfs("ext4", &disk.path);
    let outer = Mounted::new(disk, &place.folder("outer"));
    let disk = Disk::new(&outer.at().join("inner.image"), 16);
    mkfs("ext4", &disk.path);
    let inner = Mounted::new(disk, &place.folder("inner"));
    let after = place.mounted("ext4", "after");
    let mut freezer = place.freezer();
    let helper = freezer.helper_process().expect("a child");
    for killed in [false, true] {
        let found = freezer.find(&[before.dev(), inner.dev(), after.dev()]).expect("found");
        let mut prepared = freezer.prepare(found).expect("prepared");
        let frozen = prepared.freeze(Duration::from_secs(1)).expect("frozen");
        tool("fsfreeze", &["--freeze", outer.at().to_str().expect("UTF-8")]);
        if killed {
            signal(helper, Signal::KILL);
        }
        // By the deadline, or by the guard.
        for one in [&before, &after] {
            assert!(writes_within(one.at(), Duration::from_secs(2)), "I24: {}", one.at().display());
        }
        assert_frozen(inner.at());
        tool("fsfreeze", &["--unfreeze", outer.at().to_str().expect("UTF-8")]);
        assert!(matches!(frozen.thaw(), Thawed::Broken(_)), "I6");
        drop(prepared);
        for one in [&before, &inner, &after, &outer] {
            assert_thawed(one.at());
        }
    }
}

/// After an upgrade the old helper may serve still.
#[test]
fn a_helper_of_another_version_is_refused() {
    use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("freezer.sock");
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).expect("a name")).expect("bound");
    rustix::net::listen(&socket, 4).expect("listening");
    let old = std::thread::spawn(move || {
        let client = rustix::net::accept(&socket).expect("somebody comes");
        rustix::net::send(&client, b"h", SendFlags::NOSIGNAL).expect("somebody listens");
        client
    });
    let refused = Freezer::start(&Options { helper: Helper::Connect(path) }).expect_err("it is old");
    assert!(matches!(refused, FreezeError::System { .. }), "{refused}");
    drop(old.join());
}
