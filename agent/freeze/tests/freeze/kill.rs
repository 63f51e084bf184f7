//! Whoever is killed, whenever: within a second nothing is frozen, and what others froze is.

use std::time::{Duration, Instant};

use backhaul_freeze::{LeftOver, thaw_left_over};
use rustix::process::Signal;

use crate::support::*;

/// The durable steps and those between them, in the order in which they are reached.
const STEPS: [&str; 10] = [
    "freeze.journal-written",
    "freeze.guard-prepared",
    "freeze.guard-armed",
    "freeze.intent-recorded",
    "freeze.one-frozen",
    "freeze.one-recorded",
    "freeze.all-frozen",
    "freeze.thaw-done",
    "freeze.thaw-recorded",
    "freeze.all-thawed",
];

fn kill(agent: &Agent, who: u8) {
    let pids = [agent.child.id(), agent.helper, agent.guard];
    for (n, pid) in pids.into_iter().enumerate() {
        if who & 1 << n != 0 && pid > 0 {
            signal(pid, Signal::KILL);
        }
    }
}

/// As a start of the helper does: who was killed may be in the kernel for a while, and holds the journal so long.
fn settled(journal: &std::path::Path) -> Vec<backhaul_freeze::ThawedLeftOver> {
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        match thaw_left_over(journal) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other.expect("a journal, or none"),
        }
    }
}

#[test]
fn killed_at_any_moment() {
    if !can_run("killed_at_any_moment") {
        return;
    }
    let mut random = fastrand::Rng::with_seed(seed());
    let place = Place::new();
    let all = [place.mounted("ext4", "a"), place.mounted("ext4", "b"), place.mounted("xfs", "c")];
    let writers = all.each_ref().map(|m| Writers::on(m.at()));
    let devices = all.each_ref().map(|m| m.dev());
    let journal = place.at("run/journal");
    let (began, mut frozen) = (Instant::now(), 0);
    for round in 0..200 {
        // Each of them, each pair, and in every eighth round all three.
        let who = if round % 8 == 7 { 7 } else { round % 7 % 6 + 1 };
        let hold = random.u64(0..8);
        let mut agent = Agent::start(Agent::command(HELPER.as_ref(), &journal, [2000, hold, 1000], &devices));
        assert!(agent.guard > 0, "round {round}: {}", agent.line());
        agent.go();
        std::thread::sleep(Duration::from_micros(random.u64(0..25_000)));
        kill(&agent, who);
        if who == 7 {
            // Nobody is left. The next start does it.
            agent.wait_gone();
            let left = settled(&journal);
            assert!(left.iter().all(|l| !matches!(l.outcome, LeftOver::Failed(_))), "{left:#?}");
            frozen += usize::from(left.iter().any(|l| l.outcome == LeftOver::Thawed));
            kill(&agent, 7);
        }
        for one in &all {
            let within = writes_within(one.at(), Duration::from_secs(1));
            assert!(within, "I24: round {round}, killed {who:03b}: {} was left frozen", one.at().display());
        }
        // While the helper is being killed in FIFREEZE the others must not be: with all three gone it is for the next
        // start to thaw.
        if who & 2 != 0 {
            eventually("the helper is gone", || !is_alive(agent.helper));
            let within = all.iter().all(|one| writes_within(one.at(), Duration::from_secs(1)));
            assert!(within || who == 7, "I24: round {round}, killed {who:03b}");
        }
        drop(agent.stdin.take());
        drop(agent.child.kill());
        agent.wait_gone();
        // Not again later, either.
        if round % 10 == 9 {
            all.iter().for_each(|one| assert_thawed(one.at()));
        }
    }
    drop(writers);
    all.iter().for_each(|one| assert_thawed(one.at()));
    println!("200 kills in {:?}; {frozen} times all three died and left it frozen", began.elapsed());
    assert!(frozen > 0, "no kill came while it was frozen: this test tests nothing");
}

#[test]
fn killed_at_every_step() {
    if !can_run("killed_at_every_step") {
        return;
    }
    let place = Place::new();
    let all = [place.mounted("ext4", "a"), place.mounted("xfs", "b")];
    let devices = all.each_ref().map(|m| m.dev());
    let journal = place.at("run/journal");
    let _writers = all.each_ref().map(|m| Writers::on(m.at()));
    // Alone; with the guard; with everybody.
    for with in [0u8, 4, 5] {
        for (n, step) in STEPS.iter().enumerate() {
            let once = place.folder(&format!("once-{with}-{n}"));
            let mut command = Agent::command(HELPER.as_ref(), &journal, [2000, 2, 3], &devices);
            command.env("BACKHAUL_FAILPOINT", format!("{step}=abort")).env("BACKHAUL_FAILPOINT_ONCE", &once);
            let mut agent = Agent::start(command);
            agent.go();
            eventually(step, || once.join(step).exists() || !is_alive(agent.child.id()));
            assert!(once.join(step).exists(), "never: {step}, with {with:03b}; the agent says {}", agent.line());
            kill(&agent, with);
            if with == 5 {
                agent.wait_gone();
                let left = settled(&journal);
                assert!(left.iter().all(|l| !matches!(l.outcome, LeftOver::Failed(_))), "{step}: {left:#?}");
            }
            for one in &all {
                assert!(writes_within(one.at(), Duration::from_secs(1)), "I24: {step}, with {with:03b}");
            }
            drop(agent.stdin.take());
            if with == 4 {
                // It is the last one, and ends when nothing is frozen: what was killed may be in FIFREEZE yet, so that
                // to kill this one too would leave it to the next start.
                eventually("the agent ends", || !is_alive(agent.child.id()));
                for one in &all {
                    assert!(writes_within(one.at(), Duration::from_secs(1)), "I24: {step}, the agent has ended");
                }
            }
            drop(agent.child.kill());
            agent.wait_gone();
            all.iter().for_each(|one| assert_thawed(one.at()));
        }
    }
}

/// The helper says that a freeze failed before it has thawed what was frozen until then.
#[test]
fn killed_after_a_failure_was_told() {
    if !can_run("killed_after_a_failure_was_told") {
        return;
    }
    let place = Place::new();
    let all = [place.mounted("ext4", "a"), place.mounted("xfs", "b")];
    let devices = all.each_ref().map(|m| m.dev());
    let once = place.folder("once");
    let mut command = Agent::command(HELPER.as_ref(), &place.at("run/journal"), [2000, 2, 1], &devices);
    command.env("BACKHAUL_FAILPOINT", "freeze.one-recorded=error,freeze.failure-told=delay:5000");
    command.env("BACKHAUL_FAILPOINT_ONCE", &once);
    let mut agent = Agent::start(command);
    agent.go();
    eventually("it is told", || once.join("freeze.failure-told").exists());
    // Time for an agent that takes this for the end.
    std::thread::sleep(Duration::from_millis(200));
    kill(&agent, 6);
    for one in &all {
        assert!(writes_within(one.at(), Duration::from_secs(1)), "I24: {}", one.at().display());
    }
    assert!(!agent.child.wait().expect("it ends").success());
    all.iter().for_each(|one| assert_thawed(one.at()));
}

#[test]
fn an_error_at_every_step_thaws() {
    if !can_run("an_error_at_every_step_thaws") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    for step in [
        "freeze.journal-written",
        "freeze.guard-prepared",
        "freeze.intent-recorded",
        "freeze.one-frozen",
        "freeze.one-recorded",
    ] {
        let once = place.folder(&format!("once-{step}"));
        let mut command = Agent::command(HELPER.as_ref(), &place.at("run/journal"), [2000, 2, 1], &[one.dev()]);
        command.env("BACKHAUL_FAILPOINT", format!("{step}=error")).env("BACKHAUL_FAILPOINT_ONCE", &once);
        let mut agent = Agent::start(command);
        agent.go();
        assert!(!agent.child.wait().expect("it ends").success(), "{step}: an error is one");
        agent.wait_gone();
        assert_thawed(one.at());
    }
}

/// All three die at one instant, with everything frozen.
fn leave_frozen(place: &Place, all: &[&Mounted]) {
    let devices: Vec<_> = all.iter().map(|m| m.dev()).collect();
    let mut agent = Agent::start(Agent::command(HELPER.as_ref(), &place.at("run/journal"), [5000, 4000, 1], &devices));
    agent.go();
    assert_eq!(agent.line(), "frozen");
    // Stopped first: none of them sees another end.
    let pids = [agent.guard, agent.helper, agent.child.id()];
    pids.iter().for_each(|p| signal(*p, Signal::STOP));
    std::thread::sleep(Duration::from_millis(10));
    pids.iter().for_each(|p| signal(*p, Signal::KILL));
    let _ = agent.child.wait();
    agent.wait_gone();
    all.iter().for_each(|one| assert_frozen(one.at()));
}

#[test]
fn the_next_start_thaws_what_the_journal_names() {
    if !can_run("the_next_start_thaws_what_the_journal_names") {
        return;
    }
    let place = Place::new();
    let (a, b, theirs) = (place.mounted("ext4", "a"), place.mounted("btrfs", "b"), place.mounted("ext4", "theirs"));
    let journal = place.at("run/journal");
    let path = |m: &Mounted| m.at().to_str().expect("UTF-8").to_owned();
    tool("fsfreeze", &["--freeze", &path(&theirs)]);

    leave_frozen(&place, &[&a, &b]);
    // Also reached when the mount point is not what it was.
    tool("mount", &["--move", &path(&a), words(&place.folder("moved"))]);
    let moved = place.at("moved");
    drop(place.freezer());
    assert_thawed(&moved);
    assert_thawed(b.at());
    assert_frozen(theirs.at());
    tool("mount", &["--move", words(&moved), &path(&a)]);

    // The same as a command, and once more: nothing is left to do.
    leave_frozen(&place, &[&a, &b]);
    for _ in 0..2 {
        tool(HELPER, &["freeze-helper", "thaw", words(&journal)]);
        assert_thawed(a.at());
        assert_thawed(b.at());
        assert!(!journal.exists());
    }

    // Of another boot: whatever is frozen now is somebody else's.
    leave_frozen(&place, &[&a]);
    let text = std::fs::read(&journal).expect("a journal");
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    std::fs::write(&journal, replace(&text, boot.trim(), &boot.trim().replace(|c: char| c != '-', "0"))).expect("room");
    assert_eq!(thaw_left_over(&journal).expect("read"), []);
    assert_frozen(a.at());
    // And of this one, with somebody else's file system in the place of ours: the number alone does not count.
    let (ours, other) = (format!("{}:{}", a.dev().numbers().0, a.dev().numbers().1), theirs.dev().numbers());
    let swapped = replace(&text, &ours, &format!("{}:{}", other.0, other.1));
    std::fs::write(&journal, swapped).expect("room");
    let left = thaw_left_over(&journal).expect("read");
    assert_eq!(left.iter().map(|l| &l.outcome).collect::<Vec<_>>(), [&LeftOver::Gone]);
    assert_frozen(theirs.at());
    std::fs::write(&journal, &text).expect("room");
    assert_eq!(thaw_left_over(&journal).expect("read")[0].outcome, LeftOver::Thawed);
    assert_thawed(a.at());
    thaw(theirs.at());
    assert_thawed(theirs.at());
}

/// As the stop of a unit does after a kill of all: one that is in FIFREEZE yet has the journal, and nobody else thaws.
#[test]
fn the_command_waits_for_who_is_being_killed() {
    if !can_run("the_command_waits_for_who_is_being_killed") {
        return;
    }
    let place = Place::new();
    let one = place.mounted("ext4", "one");
    let journal = place.at("run/journal");
    leave_frozen(&place, &[&one]);
    let dying = std::fs::File::open(&journal).expect("a journal");
    dying.lock().expect("nobody has it");
    let thaw = std::thread::spawn(move || tool(HELPER, &["freeze-helper", "thaw", words(&journal)]));
    std::thread::sleep(Duration::from_millis(500));
    assert_frozen(one.at());
    drop(dying);
    thaw.join().expect("it succeeds");
    assert_thawed(one.at());
}

#[test]
fn what_no_path_leads_to_is_thawed_once_one_does() {
    if !can_run("what_no_path_leads_to_is_thawed_once_one_does") {
        return;
    }
    let place = Place::new();
    let mut one = place.mounted("ext4", "one");
    one.point.without_lifeline();
    let journal = place.at("run/journal");
    leave_frozen(&place, &[&one]);
    struct Again<'a>(&'a Mounted);
    impl Drop for Again<'_> {
        fn drop(&mut self) {
            if try_tool("mount", &[words(&self.0.disk.path), words(self.0.at())]).is_ok() {
                thaw(self.0.at());
                let _ = try_tool("umount", &[words(self.0.at())]);
            }
        }
    }
    let _again = Again(&one);
    tool("umount", &["--lazy", words(one.at())]);
    eventually("it is kept for later, or a waiting writer was a way in", || {
        matches!(settled(&journal).last().map(|l| &l.outcome), Some(LeftOver::Failed(_) | LeftOver::Thawed))
    });
    tool("mount", &[words(&one.disk.path), words(one.at())]);
    settled(&journal);
    assert_thawed(one.at());
    assert!(!place.at("run/journal.unresolved").exists());
}

/// In the description of a journal: see `src/journal.rs`.
fn replace(journal: &[u8], what: &str, with: &str) -> Vec<u8> {
    let (head, text) = journal.split_at(512);
    let text = std::str::from_utf8(text).expect("JSON");
    assert!(text.contains(what), "{what} is in it");
    let (mut out, text) = (head.to_vec(), text.replace(what, with));
    out[12..16].copy_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
    out
}

fn words(path: &std::path::Path) -> &str {
    path.to_str().expect("UTF-8")
}
