//! One story: a store, a receiver, an agent; joins, points, restores by both programs, a revocation. Read
//! [`Story::tell`].

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use backhaul_tests::fixture::{GROUP, number};
use backhaul_tests::{Agent, Fixture, Ran, Random, image};

use crate::beside::{Onlooker, Supervised};
use crate::steps::Step;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 65536;
/// Of the protected volume: some pages' worth of blocks, and an odd end.
const LEN: u64 = 3 * MIB + 4711;
/// So small that a short story folds, and writes maps and checkpoints.
const LIMITS: &str = "inline=150000,segments=2,entries=20,deltas=2,checkpoint_interval=2";
/// How often a command is typed before the user gives up.
const TRIES: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Program {
    Receiver,
    Agent,
}

/// What goes wrong.
pub enum Plan {
    /// Nothing; every step that is reached is logged.
    Log,
    /// This, once.
    Step(Step, String),
    /// These take so many milliseconds, each once, while others look on.
    Slow(Vec<Step>, u64),
    /// A seed, how many kills, and how long each command usually takes.
    Kills(u64, usize, Vec<Duration>),
}

/// How a story went.
pub struct Outcome {
    /// How long each command took.
    pub commands: Vec<Duration>,
    /// How many programs were killed from outside.
    pub killed: usize,
}

/// When a command is killed, or the receiver meanwhile.
struct Kill {
    command: usize,
    after: Duration,
    victim: Program,
}

pub struct Story {
    f: Fixture,
    plan: Plan,
    address: String,
    receiver: Mutex<Option<Supervised>>,
    kills: Mutex<Vec<Kill>>,
    killed: AtomicUsize,
    took: Mutex<Vec<Duration>>,
    /// What the volume held, each time that it was changed.
    states: Mutex<Vec<Vec<u8>>>,
    /// Points that an agent was told of, and which state they are of.
    told: Mutex<Vec<(u64, usize)>>,
}

impl Story {
    pub fn new(plan: Plan) -> Self {
        // An address of its own, so that a receiver that is started again is where it was.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let [_, a, b, _] = std::process::id().to_be_bytes();
        let [.., low] = std::process::id().to_be_bytes();
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + (u16::from(a ^ b) << 8 | u16::from(low)) % 20_000;
        let address = format!("{}:{port}", Ipv4Addr::new(127, 77, (n / 250) as u8, (n % 250) as u8 + 1));
        let mut kills = Vec::new();
        if let Plan::Kills(seed, count, usual) = &plan {
            let mut random = Random::new(*seed);
            for _ in 0..*count {
                let command = random.between(0, usual.len() as u64) as usize;
                let micros = usual[command].as_micros() as u64 * 12 / 10;
                let victim = if random.number().is_multiple_of(2) { Program::Receiver } else { Program::Agent };
                kills.push(Kill { command, after: Duration::from_micros(random.between(0, micros.max(1))), victim });
            }
        }
        let f = Fixture::bare();
        std::fs::create_dir(f.path("once")).expect("a folder");
        Self {
            f,
            plan,
            address,
            receiver: Mutex::new(None),
            kills: Mutex::new(kills),
            killed: AtomicUsize::new(0),
            took: Mutex::default(),
            states: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// From the first command to the last, and what must be so in the end.
    pub fn tell(&self) -> Outcome {
        self.again(Program::Receiver, None, || self.f.receiver_command(&["init"]));
        *self.receiver.lock().expect("not poisoned") = Some(Supervised::start(self.serve_commands()));
        let onlooker = matches!(self.plan, Plan::Slow(..)).then(|| Onlooker::start(&self.f));
        let agent = self.f.agent("agent");
        let token = || self.f.receiver_command(&["token", "--group", GROUP, "--address", &self.address]);
        let token = self.again(Program::Receiver, None, token).ok()["token"].as_str().expect("a token").to_owned();
        self.again(Program::Agent, Some(&format!("{token}\n")), || agent.command(&["join", "-"]));
        let disk = self.f.path("disk.img");
        image::random(&disk, LEN, &mut Random::new(7));
        image::write(&disk, 5 * BLOCK, &vec![0; 9 * BLOCK as usize]);
        self.again(Program::Agent, None, || agent.command(&["protect", &format!("data={}", disk.display())]));
        self.sync(&agent, &disk);
        // A few blocks, many, one, zeroes where data was: records in the log, loose segments, folds.
        for (at, len) in [(0, 2 * BLOCK), (20 * BLOCK, 15 * BLOCK), (3 * BLOCK + 5, 1), (16 * BLOCK, 8 * BLOCK)] {
            let bytes = if at == 16 * BLOCK { vec![0; len as usize] } else { Random::new(at).bytes(len as usize) };
            image::write(&disk, at, &bytes);
            self.sync(&agent, &disk);
        }
        self.restores(&agent);
        self.again(Program::Receiver, None, || self.f.receiver_command(&["verify"]));
        let id = agent.id();
        self.again(Program::Receiver, None, || self.f.receiver_command(&["revoke", &id]));
        agent.run(&["sync"]).fails(12, "E_AUTH");
        if let Some(onlooker) = onlooker {
            onlooker.end();
        }
        self.receiver.lock().expect("not poisoned").take().expect("it was started").stop();
        self.prove();
        let commands = self.took.lock().expect("not poisoned").clone();
        Outcome { commands, killed: self.killed.load(Ordering::Relaxed) }
    }

    fn sync(&self, agent: &Agent, disk: &Path) {
        self.states.lock().expect("not poisoned").push(std::fs::read(disk).expect("it is there"));
        let made = self.again(Program::Agent, None, || agent.command(&["sync"])).ok();
        let state = self.states.lock().expect("not poisoned").len() - 1;
        self.told.lock().expect("not poisoned").push((number(&made, "point"), state));
    }

    /// To a new file, over other content, and over content of another length, by each program.
    fn restores(&self, agent: &Agent) {
        let newest = self.states.lock().expect("not poisoned").last().expect("there were some").clone();
        let mut older = newest.clone();
        older[3 * BLOCK as usize..9 * BLOCK as usize].fill(77);
        older[16 * BLOCK as usize..18 * BLOCK as usize].fill(77);
        older[..4096].fill(78);
        // What happens elsewhere needs one restore only.
        let elsewhere = matches!(&self.plan, Plan::Step(step, _) if !step.name.starts_with("target."));
        for program in [Program::Receiver, Program::Agent] {
            for (name, before) in
                [("new", None), ("older", Some(&older[..])), ("longer", Some(&[&older[..], &[9; 5000]].concat()))]
            {
                if elsewhere && (program, name) != (Program::Agent, "older") {
                    continue;
                }
                let to = self.f.path(&format!("{program:?}-{name}"));
                if let Some(before) = before {
                    std::fs::write(&to, before).expect("there is room");
                }
                let target = to.to_str().expect("UTF-8");
                let restored = self.repeat(program, None, &mut |failed| {
                    if failed {
                        not_half_restored(&to, before, &newest);
                    }
                    match program {
                        Program::Receiver => {
                            self.f.receiver_command(&["restore", &format!("{GROUP}/data"), "--to", target])
                        }
                        Program::Agent => agent.command(&["restore", "data", "--to", target]),
                    }
                });
                restored.ok();
                assert!(std::fs::read(&to).expect("it is there") == newest, "{target} is not what was protected");
            }
        }
    }

    /// What must be so in the end: every point that somebody was told of is there, and every point that is there is
    /// what was protected, in the order in which it was.
    fn prove(&self) {
        if let Plan::Step(step, _) = &self.plan {
            assert!(self.f.path("once").join(&step.name).exists(), "the step was not reached");
        }
        self.f.receiver(&["verify"]).ok();
        let states = self.states.lock().expect("not poisoned");
        let mut at = 0;
        let mut found = Vec::new();
        for point in self.f.points() {
            let seq = number(&point, "point");
            let to = self.f.path("point");
            let _ = std::fs::remove_file(&to);
            let from = format!("{GROUP}/data@{seq}");
            self.f.receiver(&["restore", &from, "--verify", "cached", "--to", to.to_str().expect("UTF-8")]).ok();
            let bytes = std::fs::read(&to).expect("it is there");
            let next = (at..states.len()).find(|state| states[*state] == bytes);
            at = next.unwrap_or_else(|| panic!("point {seq} is no state of the volume, or one from before"));
            found.push((seq, at));
        }
        let told = self.told.lock().expect("not poisoned");
        let lost: Vec<_> = told.iter().filter(|t| !found.contains(t)).collect();
        assert!(lost.is_empty(), "told of {told:?}, found {found:?}");
    }

    /// Types a command until it ends well.
    fn again(&self, program: Program, input: Option<&str>, command: impl Fn() -> Command) -> Ran {
        self.repeat(program, input, &mut |_| command())
    }

    fn repeat(&self, program: Program, input: Option<&str>, command: &mut dyn FnMut(bool) -> Command) -> Ran {
        let index = {
            let mut took = self.took.lock().expect("not poisoned");
            took.push(Duration::ZERO);
            took.len() - 1
        };
        let mut failures = Vec::new();
        for attempt in 0..TRIES {
            let mut command = command(attempt > 0);
            self.arm(program, &mut command);
            let begun = Instant::now();
            let ran = self.run(index, attempt, command, input);
            self.took.lock().expect("not poisoned")[index] = begun.elapsed();
            assert!(!ran.err.contains("panicked"), "{ran:#?}");
            match ran.code {
                Some(0) => return ran,
                Some(_) => {
                    let said = ran.json();
                    assert_eq!(said["schema"], "backhaul.error/1", "{ran:#?}");
                    // It died or failed when everything was done.
                    if attempt > 0 && said["error"]["code"] == "E_JOINED" {
                        return ran;
                    }
                }
                None => {}
            }
            failures.push(ran);
        }
        panic!("it does not get better: {failures:#?}");
    }

    /// Runs it, and kills it or the receiver where that is planned.
    fn run(&self, index: usize, attempt: usize, mut command: Command, input: Option<&str>) -> Ran {
        let planned = {
            let mut kills = self.kills.lock().expect("not poisoned");
            let mine = kills.iter().position(|k| k.command == index);
            mine.filter(|_| attempt < TRIES - 1).map(|at| kills.remove(at))
        };
        let Some(kill) = planned else { return backhaul_tests::process::run(command, input) };
        // The command runs under a watch of its own: `run` knows nothing of its process.
        let pid_file = self.f.path("pid");
        let _ = std::fs::remove_file(&pid_file);
        match kill.victim {
            Program::Receiver => {
                let receiver = self.receiver.lock().expect("not poisoned").as_ref().map(|r| r.current.clone());
                let killer = std::thread::spawn(move || {
                    std::thread::sleep(kill.after);
                    receiver.is_some_and(|r| r.kill())
                });
                let ran = backhaul_tests::process::run(command, input);
                self.killed.fetch_add(usize::from(killer.join().expect("it ends")), Ordering::Relaxed);
                ran
            }
            Program::Agent => {
                // A limit of time, after which the kernel's signal is the hardest there is.
                let mut timed = Command::new("timeout");
                timed.args(["--signal=KILL", &format!("{:.6}", kill.after.as_secs_f64())]);
                timed.arg(command.get_program()).args(command.get_args());
                for (name, value) in command.get_envs() {
                    match value {
                        Some(value) => timed.env(name, value),
                        None => timed.env_remove(name),
                    };
                }
                command = timed;
                let mut ran = backhaul_tests::process::run(command, input);
                if ran.code == Some(137) || ran.code.is_none() {
                    self.killed.fetch_add(1, Ordering::Relaxed);
                    ran.code = None;
                }
                ran
            }
        }
    }

    /// What a program is told of the plan.
    fn arm(&self, program: Program, command: &mut Command) {
        command.env("BACKHAUL_LIMITS", LIMITS);
        let text = match &self.plan {
            Plan::Log => {
                command.env("BACKHAUL_FAILPOINT_LOG", self.log_file(program));
                return;
            }
            Plan::Step(step, action) if step.program == program => format!("{}={action}", step.name),
            Plan::Slow(steps, millis) => {
                let mine = steps.iter().filter(|s| s.program == program);
                mine.map(|s| format!("{}=delay:{millis}", s.name)).collect::<Vec<_>>().join(",")
            }
            _ => String::new(),
        };
        if !text.is_empty() {
            command.env("BACKHAUL_FAILPOINT", text).env("BACKHAUL_FAILPOINT_ONCE", self.f.path("once"));
        }
    }

    fn log_file(&self, program: Program) -> PathBuf {
        self.f.path(&format!("{program:?}.steps"))
    }

    /// All steps that a program came to.
    pub fn logged(&self, program: Program) -> BTreeSet<Step> {
        let text = std::fs::read_to_string(self.log_file(program)).expect("some step was reached");
        text.lines().map(|name| Step { program, name: name.to_owned() }).collect()
    }

    fn serve_commands(&self) -> (Box<dyn Fn() -> Command + Send>, PathBuf) {
        // What a command is made of is decided now: the thread that uses it outlives no story.
        let mut made = self.f.receiver_command(&["serve", "--listen", &self.address, "-v"]);
        self.arm(Program::Receiver, &mut made);
        let (program, args): (_, Vec<_>) =
            (made.get_program().to_owned(), made.get_args().map(ToOwned::to_owned).collect());
        let envs: Vec<_> = made.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        let make = move || {
            let mut command = Command::new(&program);
            command.args(&args);
            for (name, value) in &envs {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            command
        };
        (Box::new(make), self.f.path("serve.err"))
    }
}

/// An unfinished restore is seen as one: its first bytes are zeroes, or nothing was changed, or it was all done.
fn not_half_restored(to: &Path, before: Option<&[u8]>, wanted: &[u8]) {
    let Ok(found) = std::fs::read(to) else { return };
    let same = |other: &[u8]| found == other;
    let marked = found.iter().take(4096).all(|b| *b == 0);
    assert!(marked || same(wanted) || before.is_some_and(same), "a half restored {} looks whole", to.display());
}
