//! Every durable step of the agent, the receiver and the restores. Read [`all`].

use std::fmt;

use crate::story::Program;

/// After it, a test may stop a program.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Step {
    pub program: Program,
    pub name: String,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.program, self.name)
    }
}

/// Of a file that is there whole or not at all: its bytes are in a temporary file, that is flushed, it has its name,
/// and the name is flushed.
const WHOLE: [&str; 4] = ["written", "flushed", "placed", "done"];
/// Of a hint, whose name nobody has to flush.
const HINT: [&str; 3] = ["written", "flushed", "placed"];
const RECEIVER_FILES: [&str; 2] = ["authority.key", "authority.pem"];
const AGENT_FILES: [&str; 5] = ["agent.key", "agent.crt", "identity.json", "volumes.json", "writer.json"];
/// Kinds of objects, by the folder of the store that they are in.
const OBJECTS: [&str; 11] =
    ["agents", "checkpoints", "format", "log", "maps", "names", "probe", "redeemed", "revoked", "segments", "tokens"];
const HINTS: [&str; 2] = ["head", "seen"];
/// Of a file or device that a volume is restored to, in the order in which they come; each restore has some of them.
const TARGET: [&str; 10] = [
    "created",
    "resize-erased",
    "sized",
    "erased",
    "guarded",
    "written",
    "zeroed",
    "flushed",
    "head-flushed",
    "finished",
];

/// All of them. Between two that follow each other nothing durable is changed.
pub fn all() -> Vec<Step> {
    let mut steps = Vec::new();
    let mut add = |program, of: &str, names: &[&str]| {
        steps.extend(names.iter().map(|name| Step { program, name: format!("{of}.{name}") }));
    };
    RECEIVER_FILES.iter().for_each(|file| add(Program::Receiver, file, &WHOLE));
    OBJECTS.iter().for_each(|kind| add(Program::Receiver, kind, &WHOLE));
    HINTS.iter().for_each(|kind| add(Program::Receiver, kind, &HINT));
    add(Program::Receiver, "commit", &["sealed", "appended", "adopted"]);
    add(Program::Receiver, "target", &TARGET);
    AGENT_FILES.iter().for_each(|file| add(Program::Agent, file, &WHOLE));
    add(Program::Agent, "index", &["begun", "sized", "page"]);
    add(Program::Agent, "commit", &["decided", "answered"]);
    add(Program::Agent, "target", &TARGET);
    steps
}
