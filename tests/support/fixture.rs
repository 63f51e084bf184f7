//! A store, receivers and agents in a folder that goes when the test ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::process::{Child, Ran, program, run};

/// The group of most tests.
pub const GROUP: &str = "web";

/// A folder with a store in it, and the state of its receivers.
#[derive(Debug)]
pub struct Fixture {
    dir: tempfile::TempDir,
    store: String,
    state: PathBuf,
    /// For the receiver's commands.
    envs: Vec<(String, String)>,
}

impl Fixture {
    /// An initialised directory store.
    pub fn new() -> Self {
        let fixture = Self::bare();
        fixture.receiver(&["init"]).ok();
        fixture
    }

    /// Nothing made yet.
    pub fn bare() -> Self {
        let dir = tempfile::Builder::new().prefix("backhaul-test-").tempdir().expect("a temporary folder");
        let (store, state) = (format!("file://{}", dir.path().join("store").display()), dir.path().join("receiver"));
        Self { dir, store, state, envs: Vec::new() }
    }

    /// A place in a bucket, not initialised yet; the keys are in the environment.
    pub fn in_bucket(url: &str, envs: &[(&str, &str)]) -> Self {
        let envs = envs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { store: url.to_owned(), envs, ..Self::bare() }
    }

    /// An initialised store in a folder of the caller's.
    pub fn with_store(folder: &Path) -> Self {
        let mut fixture = Self::bare();
        fixture.store = format!("file://{}", folder.display());
        fixture.receiver(&["init"]).ok();
        fixture
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The folder of the directory store.
    pub fn store_path(&self) -> PathBuf {
        self.store.trim_start_matches("file://").into()
    }

    /// The store's URL.
    pub fn store_url(&self) -> &str {
        &self.store
    }

    /// The receiver's state folder.
    pub fn receiver_state(&self) -> &Path {
        &self.state
    }

    /// A command of the receiver, not run yet.
    pub fn receiver_command(&self, args: &[&str]) -> Command {
        let mut command = clean(program("backhaul-receiver"));
        command.args(args).arg("--json").args(["--store", &self.store]).arg("--state").arg(&self.state);
        command.envs(self.envs.iter().cloned());
        command
    }

    /// Runs a command of the receiver.
    #[track_caller]
    pub fn receiver(&self, args: &[&str]) -> Ran {
        run(self.receiver_command(args), None)
    }

    /// Starts a receiver.
    #[track_caller]
    pub fn serve(&self) -> Serving {
        self.serve_with(&[])
    }

    /// Starts a receiver with more arguments.
    #[track_caller]
    pub fn serve_with(&self, more: &[&str]) -> Serving {
        Serving::start(self.serve_command(more), &self.path("serve.err"))
    }

    /// The command that starts a receiver.
    pub fn serve_command(&self, more: &[&str]) -> Command {
        let mut command = self.receiver_command(&["serve", "--listen", "127.0.0.1:0", "-v"]);
        command.args(more);
        command
    }

    /// The command that starts another receiver on the same store: it has the same authority in a state folder of its
    /// own.
    pub fn second_command(&self, more: &[&str]) -> Command {
        let state = self.path("receiver-2");
        copy_folder(&self.state, &state);
        let mut command = clean(program("backhaul-receiver"));
        command.args(["serve", "--listen", "127.0.0.1:0", "-v", "--json", "--store", &self.store]);
        command.arg("--state").arg(&state).args(more);
        command
    }

    /// Starts it.
    #[track_caller]
    pub fn serve_second(&self) -> Serving {
        Serving::start(self.second_command(&[]), &self.path("serve-2.err"))
    }

    /// A join token.
    #[track_caller]
    pub fn token(&self, address: &str, more: &[&str]) -> String {
        let args = [&["token", "--group", GROUP, "--address", address], more].concat();
        let token = self.receiver(&args).ok()["token"].as_str().expect("a token").to_owned();
        assert!(token.starts_with("bh1."));
        token
    }

    /// An agent that has not joined yet.
    pub fn agent(&self, name: &str) -> Agent {
        Agent::new(self.dir.path(), name)
    }

    /// An agent that joined the group of this receiver.
    #[track_caller]
    pub fn joined(&self, name: &str, serving: &Serving) -> Agent {
        let agent = self.agent(name);
        agent.join(&self.token(&serving.address(), &[])).ok();
        agent
    }

    /// The points that the receiver lists.
    #[track_caller]
    pub fn points(&self) -> Vec<Value> {
        self.receiver(&["points"]).ok()["points"].as_array().expect("a list of points").clone()
    }

    /// The objects of the directory store with their sizes.
    pub fn objects(&self) -> BTreeMap<String, u64> {
        let root = self.store_path();
        let mut out = BTreeMap::new();
        walk(&root, &mut |path, size| {
            out.insert(path.strip_prefix(&root).expect("below").to_string_lossy().into_owned(), size);
        });
        out
    }

    /// Bytes of all objects whose name contains a text.
    pub fn stored(&self, containing: &str) -> u64 {
        self.objects().iter().filter(|(name, _)| name.contains(containing)).map(|(_, size)| size).sum()
    }

    /// Paths of the objects whose name contains a text.
    pub fn objects_with(&self, containing: &str) -> Vec<PathBuf> {
        let names = self.objects();
        names.keys().filter(|n| n.contains(containing)).map(|n| self.store_path().join(n)).collect()
    }
}

impl Default for Fixture {
    fn default() -> Self {
        Self::new()
    }
}

fn walk(folder: &Path, see: &mut impl FnMut(&Path, u64)) {
    // A file that goes away meanwhile is one that is not there.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => walk(&entry.path(), see),
            Ok(meta) => see(&entry.path(), meta.len()),
            Err(_) => {}
        }
    }
}

/// Copies a folder with everything in it, but for sockets.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder can be made");
    for entry in std::fs::read_dir(from).expect("it is there").flatten() {
        let kind = entry.file_type().expect("it has a type");
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_folder(&entry.path(), &target);
        } else if kind.is_file() {
            // Fresh: the modes of the old file must not be in the way.
            let _ = std::fs::remove_file(&target);
            std::fs::copy(entry.path(), &target).expect("it can be copied");
        }
    }
}

/// Without the settings of whoever runs the tests.
fn clean(program: PathBuf) -> Command {
    let mut command = Command::new(program);
    for name in
        ["BACKHAUL_STORE", "BACKHAUL_RECEIVER_STATE", "BACKHAUL_AGENT_STATE", "BACKHAUL_RECEIVER", "BACKHAUL_LISTEN"]
    {
        command.env_remove(name);
    }
    command
}

/// A receiver at work.
#[derive(Debug)]
pub struct Serving {
    /// The process.
    pub child: Child,
    address: SocketAddr,
}

impl Serving {
    /// Starts it and waits until it listens.
    #[track_caller]
    pub fn start(command: Command, err: &Path) -> Self {
        let mut child = Child::start(command, err);
        let line = child.line(Duration::from_secs(60));
        let address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}"));
        let address = address.parse().expect("an address");
        Self { child, address }
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// The same, for sockets.
    pub fn socket(&self) -> SocketAddr {
        self.address
    }

    /// SIGTERM; it must end well.
    #[track_caller]
    pub fn stop(mut self) {
        self.child.signal(Signal::TERM);
        let status = self.child.wait(Duration::from_secs(40));
        assert_eq!(status.code(), Some(0), "{}", self.child.err());
    }
}

/// An agent: its state folder and settings.
#[derive(Clone, Debug)]
pub struct Agent {
    folder: PathBuf,
    name: String,
    /// Its state folder.
    pub state: PathBuf,
    config: PathBuf,
    receiver: Option<String>,
}

impl Agent {
    fn new(folder: &Path, name: &str) -> Self {
        let agent = Self {
            folder: folder.to_owned(),
            name: name.to_owned(),
            state: folder.join(name),
            config: folder.join(format!("{name}.toml")),
            receiver: None,
        };
        agent.runs_on("the first machine");
        agent.settings("");
        agent
    }

    fn machine_file(&self) -> PathBuf {
        self.folder.join(format!("{}.machine-id", self.name))
    }

    /// Puts the agent on another machine.
    pub fn runs_on(&self, machine: &str) {
        std::fs::write(self.machine_file(), machine).expect("it can be written");
    }

    /// More lines for its settings file.
    pub fn settings(&self, more: &str) {
        let text = format!("machine_id_file = \"{}\"\n{more}\n", self.machine_file().display());
        std::fs::write(&self.config, text).expect("it can be written");
    }

    /// Its receiver is elsewhere from now on.
    #[must_use]
    pub fn through(mut self, address: &str) -> Self {
        self.receiver = Some(address.to_owned());
        self
    }

    /// The same settings over another state folder.
    #[must_use]
    pub fn with_state(mut self, state: &Path) -> Self {
        self.state = state.to_owned();
        self
    }

    /// The same with another settings file.
    #[must_use]
    pub fn with_config(mut self, file: &str) -> Self {
        self.config = file.into();
        self
    }

    /// Its settings file.
    pub fn config_file(&self) -> &Path {
        &self.config
    }

    /// A command, not run yet.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = clean(program("backhaul-agent"));
        command.args(args).arg("--json").arg("--config").arg(&self.config).arg("--state").arg(&self.state);
        if let Some(receiver) = &self.receiver {
            command.args(["--receiver", receiver]);
        }
        command
    }

    /// Runs a command.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Ran {
        run(self.command(args), None)
    }

    /// Starts a command that goes on.
    #[track_caller]
    pub fn start(&self, args: &[&str]) -> Child {
        Child::start(self.command(args), &self.folder.join(format!("{}.err", self.name)))
    }

    /// Joins with a token on standard input.
    #[track_caller]
    pub fn join(&self, token: &str) -> Ran {
        run(self.command(&["join", "-"]), Some(&format!("{token}\n")))
    }

    /// Protects a volume.
    #[track_caller]
    pub fn protect(&self, name: &str, path: &Path) -> Value {
        self.run(&["protect", &format!("{name}={}", path.display())]).ok()
    }

    /// Makes a point.
    #[track_caller]
    pub fn sync(&self) -> Value {
        self.run(&["sync"]).ok()
    }

    /// Its own id.
    pub fn id(&self) -> String {
        self.run(&["status"]).ok()["agent"].as_str().expect("an id").to_owned()
    }

    /// Files of its index.
    pub fn index_files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.state.join("index")).expect("an index folder");
        entries.flatten().map(|e| e.path()).collect()
    }
}

/// A number of a result.
#[track_caller]
pub fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {value}"))
}
