//! The helper process as the agent's hidden command will be (everything behind the first argument is for the crate), and
//! an agent that tests can stop, kill and put on a frozen file system.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use backhaul_freeze::{Freezer, Helper, Options, Thawed};
use backhaul_volume::sysfs::Dev;

fn main() -> ExitCode {
    match std::env::args_os().nth(1).as_deref().and_then(|a| a.to_str()) {
        Some("freeze-helper") => backhaul_freeze::helper_main(std::env::args_os().skip(2).collect()),
        Some("agent") => agent(&std::env::args().skip(2).collect::<Vec<_>>()),
        _ => ExitCode::from(2),
    }
}

/// `JOURNAL LIMIT_MS HOLD_MS ROUNDS DEVICE...`; waits for a byte before it freezes. What it says goes out at once: a
/// pipe is no file system.
fn agent(args: &[String]) -> ExitCode {
    let say = |text: String| std::io::stdout().write_all(format!("{text}\n").as_bytes()).expect("somebody listens");
    let number = |i: usize| args[i].parse::<u64>().expect("a number");
    let (limit, hold) = (Duration::from_millis(number(1)), Duration::from_millis(number(2)));
    let devices: Vec<Dev> = args[4..].iter().map(|d| Dev::of_path(d.as_ref()).expect("a device")).collect();
    let helper = Helper::Spawn {
        program: std::env::current_exe().expect("a program"),
        args: vec!["freeze-helper".into()],
        journal: PathBuf::from(&args[0]),
    };
    let run = || -> Result<(), backhaul_freeze::FreezeError> {
        let mut freezer = Freezer::start(&Options { helper })?;
        say(format!("helper {}", freezer.helper_process().expect("a child")));
        let found = freezer.find(&devices)?;
        let mut prepared = freezer.prepare(found)?;
        say("prepared".into());
        std::io::stdin().read_exact(&mut [0]).expect("a byte");
        for _ in 0..number(3) {
            prepared.sync(Duration::from_secs(2))?;
            let frozen = prepared.freeze(limit)?;
            if hold > Duration::from_millis(50) {
                say("frozen".into());
            }
            std::thread::sleep(hold);
            match frozen.thaw() {
                Thawed::Held { frozen_for } => say(format!("held {}", frozen_for.as_micros())),
                Thawed::Broken(why) => say(format!("broken {why:?}")),
            }
        }
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(format!("error {e:?}"));
            ExitCode::FAILURE
        }
    }
}
