//! What the cases work with. Read [`Shared`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use backhaul_tests::faults::{HttpFault, Rule};
use backhaul_tests::fixture::{Serving, copy_folder};
use backhaul_tests::process::{Ran, program, run};
use backhaul_tests::s3::TestS3;
use backhaul_tests::{Agent, Fixture, Random, image};

/// A receiver at work, and what everybody uses.
pub struct World {
    serving: Serving,
    pub shared: Shared,
}

/// A store with one point of `data` in group `web`, agents, and a bucket. Cases change none of it.
pub struct Shared {
    pub f: Fixture,
    /// The writer of the group.
    pub agent: Agent,
    /// One that may only restore.
    pub reader: Agent,
    pub address: String,
    pub bucket: TestS3,
    /// A server that says the same to everybody.
    pub web: TestS3,
    /// Tokens: used already, expired, of the same authority and another store, of another authority.
    pub used: String,
    pub expired: String,
    pub unknown: String,
    pub foreign: String,
    count: AtomicUsize,
}

impl World {
    pub fn new() -> Self {
        let f = Fixture::new();
        let serving = f.serve();
        let address = serving.address();
        let (expired, made) = (f.token(&address, &["--ttl", "1s"]), std::time::Instant::now());
        let (agent, reader) = (f.agent("agent"), f.agent("reader"));
        let used = f.token(&address, &[]);
        agent.join(&used).ok();
        reader.join(&f.token(&address, &["--restore-only"])).ok();
        image::random(&f.path("disk.img"), 1 << 20, &mut Random::new(1));
        agent.protect("data", &f.path("disk.img"));
        agent.sync();
        let other = Fixture::new();
        let foreign = other.token(&address, &[]);
        let elsewhere = |args: &[&str]| {
            let mut command = Command::new(program("backhaul-receiver"));
            let store = format!("file://{}", f.path("elsewhere").display());
            command.args(args).args(["--json", "--store", &store, "--state"]).arg(f.receiver_state());
            run(command, None).ok()
        };
        elsewhere(&["init"]);
        let unknown =
            elsewhere(&["token", "--group", "web", "--address", &address])["token"].as_str().expect("one").into();
        std::fs::write(f.path("file"), "x").expect("there is room");
        std::fs::create_dir(f.path("folder")).expect("it can be made");
        let (bucket, web) = (TestS3::start(), TestS3::start());
        web.fault(Rule::default(), HttpFault::Say(200, "<html>It works!</html>"));
        let count = AtomicUsize::new(0);
        // Until it has expired.
        std::thread::sleep(std::time::Duration::from_millis(1200).saturating_sub(made.elapsed()));
        Self {
            serving,
            shared: Shared { f, agent, reader, address, bucket, web, used, expired, unknown, foreign, count },
        }
    }

    /// After all of it: the receiver works, and the point is the same.
    pub fn unharmed(self) {
        let Shared { f, agent, .. } = self.shared;
        assert_eq!(f.points().len(), 1, "nothing was committed");
        f.receiver(&["verify"]).ok();
        agent.sync();
        assert!(!self.serving.child.err().contains("panicked"), "{}", self.serving.child.err());
        self.serving.stop();
    }
}

impl Shared {
    /// All of them.
    pub fn tokens(&self) -> [&String; 4] {
        [&self.used, &self.expired, &self.unknown, &self.foreign]
    }

    /// A name that nobody else has.
    pub fn fresh(&self, what: &str) -> String {
        format!("{what}-{}", self.count.fetch_add(1, Ordering::Relaxed))
    }

    pub fn path(&self, name: &str) -> String {
        self.f.path(name).display().to_string()
    }

    /// An agent that has not joined.
    pub fn stranger(&self, args: &[&str]) -> Ran {
        self.f.agent(&self.fresh("stranger")).run(args)
    }

    pub fn joins_with(&self, token: &str) -> Ran {
        self.f.agent(&self.fresh("stranger")).join(token)
    }

    /// An agent with these settings.
    pub fn agent_with(&self, settings: &str, args: &[&str]) -> Ran {
        let agent = self.f.agent(&self.fresh("set"));
        agent.settings(settings);
        agent.run(args)
    }

    /// The writer, with a state folder of its own that something happens to.
    pub fn agent_after(&self, change: impl FnOnce(&Path), args: &[&str]) -> Ran {
        let state = self.f.path(&self.fresh("state"));
        copy_folder(&self.agent.state, &state);
        change(&state);
        self.agent.clone().with_state(&state).run(args)
    }

    /// The receiver on another store.
    pub fn on_store(&self, store: &str, args: &[&str]) -> Ran {
        run(self.on_store_command(store, args), None)
    }

    fn on_store_command(&self, store: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program("backhaul-receiver"));
        command.env_remove("BACKHAUL_STORE").env_remove("BACKHAUL_RECEIVER_STATE");
        command.args(args).args(["--json", "--store", store, "--state"]).arg(self.f.path(&self.fresh("receiver")));
        command
    }

    /// The receiver on a place in the bucket, with other variables.
    pub fn on_bucket(&self, url: &str, envs: &[(&str, &str)], args: &[&str]) -> Ran {
        let mut command = self.on_store_command(url, args);
        command.envs(self.bucket.envs()).envs(envs.iter().copied());
        run(command, None)
    }

    /// The receiver on the store, with a state folder of its own that something happens to.
    pub fn receiver_after(&self, change: impl FnOnce(&Path), args: &[&str]) -> Ran {
        let state = self.f.path(&self.fresh("receiver"));
        copy_folder(self.f.receiver_state(), &state);
        change(&state);
        let mut command = Command::new(program("backhaul-receiver"));
        command.args(args).args(["--json", "--store", self.f.store_url(), "--state"]).arg(&state);
        run(command, None)
    }

    /// The receiver with these settings and no store but what they name.
    pub fn receiver_with(&self, settings: &str, args: &[&str]) -> Ran {
        let file: PathBuf = self.f.path(&self.fresh("receiver.toml"));
        std::fs::write(&file, settings).expect("there is room");
        let mut command = Command::new(program("backhaul-receiver"));
        command.env_remove("BACKHAUL_STORE").args(args).arg("--json").arg("--config").arg(&file);
        run(command, None)
    }

    /// The receiver on a copy of the store that something happens to.
    pub fn store_after(&self, change: impl FnOnce(&Path), args: &[&str]) -> Ran {
        let store = self.f.path(&self.fresh("store"));
        copy_folder(&self.f.store_path(), &store);
        change(&store);
        self.on_store(&format!("file://{}", store.display()), args)
    }
}
