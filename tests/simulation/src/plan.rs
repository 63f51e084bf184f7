//! What happens in a history: a list of operations, made from the seed before anything runs, so that a failing one can be
//! stored, replayed and made shorter.
//!
//! Read first: [`Op`].

use backhaul_agent::replicate::CommitWhen;
use serde::{Deserialize, Serialize};

use crate::bucket::Weather;
use crate::chance::Chance;
use crate::disk::Write;

/// Which CommitWhen an attempt has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum When {
    /// Always a point.
    Always,
    /// Only if something changed.
    Changed,
}

impl From<When> for CommitWhen {
    fn from(when: When) -> Self {
        match when {
            When::Always => Self::Always,
            When::Changed => Self::Changed,
        }
    }
}

/// One thing that happens. Numbers of agents and receivers are taken modulo how many there are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after what they do")]
pub enum Op {
    /// Time passes, ms.
    Wait(u64),
    /// A server writes to its volume.
    Write {
        node: usize,
        volume: usize,
        writes: Vec<Write>,
    },
    /// It will write while the volume is read, after so many reads.
    WriteDuring {
        node: usize,
        volume: usize,
        reads: u64,
        writes: Vec<Write>,
    },
    /// An agent makes a point, if it is not at it.
    Sync {
        node: usize,
        receiver: usize,
        when: When,
        keep: bool,
    },
    /// Waits, at most so many ms, for it.
    Join {
        node: usize,
        at_most: u64,
    },
    KillAgent {
        node: usize,
    },
    KillReceiver {
        receiver: usize,
    },
    StopReceiver {
        receiver: usize,
    },
    StartReceiver {
        receiver: usize,
    },
    Pause {
        receiver: usize,
    },
    Resume {
        receiver: usize,
    },
    /// What the agent (or the receiver) sends does not arrive any more.
    Cut {
        node: usize,
        receiver: usize,
        from_agent: bool,
    },
    Mend {
        node: usize,
        receiver: usize,
    },
    Delay {
        node: usize,
        receiver: usize,
        longest: u64,
    },
    Weather {
        receiver: usize,
        weather: Weather,
    },
    /// Keeps a copy of an agent's state folder, and of its volumes.
    Keep {
        node: usize,
    },
    /// Puts it back; the volumes too if the whole machine is restored.
    PutBack {
        node: usize,
        machine: bool,
    },
    /// Puts an older index back and nothing else.
    PutBackIndex {
        node: usize,
    },
    /// Another machine starts with a copy of everything; or the same machine, twice.
    Clone {
        node: usize,
        other_machine: bool,
    },
    /// The operator says who the writer is.
    Adopt {
        node: usize,
    },
    Grow {
        node: usize,
        volume: usize,
        blocks: u64,
    },
    /// Smaller, or another disk: protected again.
    Replace {
        node: usize,
        volume: usize,
        blocks: u64,
    },
    AddVolume {
        node: usize,
        blocks: u64,
    },
    DropVolume {
        node: usize,
        volume: usize,
    },
    ClockJump {
        forwards: bool,
        hours: u64,
    },
    /// Retention: all but the newest so many log records go.
    Prune {
        node: usize,
        keep: u64,
    },
    /// The operator keeps a copy of the bucket.
    KeepBucket,
    /// One of the maps that the newest point needs is gone, or its beginning is not what it was.
    Harm {
        node: usize,
        seed: u64,
    },
    /// And puts it back, with all receivers down; what is no log record may stay.
    PutBackBucket {
        orphans: bool,
    },
    /// An agent restores a point over the network.
    Restore {
        node: usize,
        receiver: usize,
        back: u64,
    },
    /// Somebody with an agent's keys says anything.
    Hostile {
        node: usize,
        receiver: usize,
        seed: u64,
    },
}

/// Agents that a history has at most; a copy beyond is not made.
pub const MAX_NODES: usize = 4;
/// Blocks of a usual volume.
const BLOCKS: u64 = 24;

/// What a history is made of.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The seed of everything that is left to chance while it runs.
    pub seed: u64,
    /// Groups, each with one agent at first.
    pub groups: usize,
    /// Blocks of each agent's volumes.
    pub volumes: Vec<Vec<u64>>,
    /// Receivers.
    pub receivers: usize,
    /// What happens.
    pub ops: Vec<Op>,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let chance = Chance::new(seed);
        let groups = if chance.happens(0.3) { 2 } else { 1 };
        let receivers = if chance.happens(0.7) { 2 } else { 1 };
        let volume = || {
            // Sometimes more than one page, mostly zeroes.
            if chance.happens(0.08) { 1024 + chance.between(1, 20) } else { chance.between(1, BLOCKS) }
        };
        let volumes = (0..groups).map(|_| (0..chance.between(1, 3)).map(|_| volume()).collect()).collect();
        let count = chance.between(30, 90);
        let kinds = Kinds::of(&chance);
        let mut ops = Vec::new();
        for _ in 0..count {
            if chance.happens(0.06) {
                script(&chance, groups, &mut ops);
            }
            kinds.add(&chance, &mut ops);
            ops.push(Op::Wait(wait(&chance)));
        }
        Self { seed, groups, volumes, receivers, ops }
    }
}

/// Most of what matters happens within the milliseconds of a commit; some of it needs minutes.
fn wait(chance: &Chance) -> u64 {
    match chance.below(10) {
        0..4 => chance.below(20),
        4..8 => chance.below(300),
        8 => chance.below(5_000),
        _ => chance.below(60_000),
    }
}

fn writes(chance: &Chance) -> Vec<Write> {
    let count = match chance.below(4) {
        0..3 => chance.between(1, 5),
        _ => chance.between(5, 30),
    };
    // Few contents, so that old ones come back; zero is one of them.
    (0..count).map(|_| (place(chance), chance.below(5) as u32)).collect()
}

fn place(chance: &Chance) -> usize {
    if chance.happens(0.1) { 1020 + chance.below(20) as usize } else { chance.below(BLOCKS) as usize }
}

/// Sequences that chance alone would seldom make.
fn script(chance: &Chance, groups: usize, ops: &mut Vec<Op>) {
    let (node, receiver) = (chance.below(2) as usize, chance.below(2) as usize);
    let sync = |receiver| Op::Sync { node, receiver, when: When::Always, keep: false };
    let join = || Op::Join { node, at_most: 400_000 };
    let write = || Op::Write { node, volume: chance.below(2) as usize, writes: writes(chance) };
    let many =
        || Op::Write { node, volume: 0, writes: (0..BLOCKS as usize).map(|b| (b, chance.below(5) as u32)).collect() };
    match chance.below(17) {
        // A receiver falls asleep over a commit, others go on, the log is pruned, it wakes up.
        0..4 => {
            ops.extend([join(), write(), sync(receiver), Op::Wait(chance.between(20, 400)), Op::Pause { receiver }]);
            ops.extend([Op::KillAgent { node }, Op::Mend { node, receiver: receiver + 1 }]);
            for _ in 0..chance.between(1, 5) {
                ops.extend([write(), sync(receiver + 1), join()]);
            }
            ops.extend([
                Op::Prune { node, keep: chance.below(3) },
                Op::Resume { receiver },
                Op::Wait(chance.below(2000)),
            ]);
        }
        // A large draft over a slow link, broken off, and taken up again with other content.
        4..7 => {
            let longest = chance.pick(&[300, 2000]);
            ops.extend([join(), many(), Op::Delay { node, receiver, longest }, sync(receiver)]);
            ops.extend([Op::Wait(chance.between(100, 6000)), Op::KillAgent { node }]);
            // Sometimes by a receiver that does not find in lists what another has just written.
            let is_stale = chance.happens(0.3);
            if is_stale {
                let weather = Weather { stale: 1.0, ..Weather::default() };
                ops.extend([Op::Weather { receiver, weather }, Op::KillReceiver { receiver }]);
                ops.push(Op::StartReceiver { receiver });
            }
            ops.extend([many(), sync(receiver), Op::Wait(chance.between(100, 6000)), Op::KillAgent { node }]);
            if is_stale {
                ops.extend([Op::KillReceiver { receiver }, Op::StartReceiver { receiver }]);
            }
            ops.extend([many(), Op::Mend { node, receiver }, sync(receiver), join()]);
        }
        // An answer is lost, and the state is put back to before it.
        7..9 => {
            ops.extend([join(), write(), Op::Keep { node }, sync(receiver), Op::Wait(chance.between(20, 200))]);
            ops.extend([Op::Cut { node, receiver, from_agent: false }, Op::Wait(chance.between(100, 60_000))]);
            ops.extend([Op::KillAgent { node }, Op::Mend { node, receiver }]);
            if chance.happens(0.5) {
                ops.push(Op::PutBack { node, machine: false });
            }
            ops.extend([write(), sync(receiver), join()]);
        }
        // The bucket is put back to where the log is open to anybody who is in the group.
        9 => {
            ops.extend([Op::Adopt { node }, Op::KeepBucket, join(), write(), sync(receiver), join(), write()]);
            ops.extend([sync(receiver), join(), Op::PutBackBucket { orphans: chance.happens(0.7) }]);
            ops.extend([0, 1].map(|receiver| Op::StartReceiver { receiver }));
            ops.extend([sync(receiver), join(), Op::Adopt { node }, write(), sync(receiver), join()]);
        }
        // The same with drafts left behind that belong to records which are gone.
        10 => {
            ops.extend([join(), write(), sync(receiver), join(), Op::KeepBucket]);
            ops.extend([write(), sync(receiver), join(), many(), sync(receiver), Op::Wait(chance.between(100, 2000))]);
            ops.extend([Op::KillAgent { node }, Op::Wait(8000), Op::PutBackBucket { orphans: true }]);
            ops.extend([0, 1].map(|receiver| Op::StartReceiver { receiver }));
            ops.extend([Op::Adopt { node }, Op::StartReceiver { receiver }, write(), sync(receiver), join(), write()]);
            ops.extend([sync(receiver), join()]);
        }
        14 | 15 => survivor(chance, groups, ops),
        // A map is harmed while the group goes on, and is read again or not.
        16 => {
            for _ in 0..3 {
                ops.extend([join(), many(), sync(receiver)]);
            }
            ops.extend([join(), Op::Harm { node, seed: chance.below(u64::MAX) }]);
            if chance.happens(0.7) {
                ops.extend([Op::KillReceiver { receiver }, Op::StartReceiver { receiver }]);
            }
            ops.extend([write(), sync(receiver), join(), write(), sync(receiver), join()]);
        }
        // A, B, A within a draft that is broken off twice.
        _ => {
            let content = [1, 2, 1].map(|c| Op::Write { node, volume: 0, writes: (0..8).map(|b| (b, c)).collect() });
            for write in content {
                ops.extend([join(), write, sync(receiver), Op::Wait(chance.between(50, 400)), Op::KillAgent { node }]);
            }
            ops.extend([sync(receiver), join()]);
        }
    }
}

/// A receiver falls asleep over the commit of an agent that lives on and waits. The operator makes a copy of it the
/// writer, the log goes on and is pruned; all within the time that the connection lives.
fn survivor(chance: &Chance, groups: usize, ops: &mut Vec<Op>) {
    let copies = ops.iter().filter(|op| matches!(op, Op::Clone { .. })).count();
    // What a copy is called is known only as long as there is room for one.
    let copy = groups + copies;
    if copy >= MAX_NODES {
        return;
    }
    let node = chance.below(copy as u64) as usize;
    let content = chance.pick(&[1, 3]);
    let toggle = |node, i: u32| {
        let writes = (0..8).map(|b| (b, 1 + (content + 2 * i + 2 * b as u32) % 4)).collect();
        Op::Write { node, volume: 0, writes }
    };
    let sync = |node, receiver| Op::Sync { node, receiver, when: When::Always, keep: false };
    let join = |node| Op::Join { node, at_most: 400_000 };
    ops.extend([join(node), Op::Adopt { node }]);
    for receiver in [0, 1] {
        ops.extend([Op::Weather { receiver, weather: Weather::default() }, Op::Resume { receiver }]);
        ops.extend([Op::StartReceiver { receiver }, Op::Mend { node, receiver }]);
        ops.push(Op::Mend { node: copy, receiver });
    }
    ops.extend([Op::KillAgent { node }, toggle(node, 0), sync(node, 0), join(node), toggle(node, 1)]);
    ops.extend([Op::Clone { node, other_machine: chance.happens(0.5) }, sync(node, 0)]);
    ops.extend([Op::Wait(chance.between(60, 220)), Op::Pause { receiver: 0 }, Op::Adopt { node }]);
    for i in 2..chance.between(7, 10) as u32 {
        ops.extend([toggle(copy, i), sync(copy, 1), join(copy)]);
    }
    ops.extend([Op::Prune { node, keep: chance.below(2) }, Op::Resume { receiver: 0 }, join(node)]);
}

/// How often what happens in one history: histories differ in their troubles, so that each gets some far.
struct Kinds {
    agents: bool,
    receivers: bool,
    network: bool,
    store: bool,
    state: bool,
    shapes: bool,
    operator: bool,
}

impl Kinds {
    fn of(chance: &Chance) -> Self {
        let some = || chance.happens(0.55);
        Self {
            agents: some(),
            receivers: some(),
            network: some(),
            store: some(),
            state: some(),
            shapes: some(),
            operator: some(),
        }
    }

    fn add(&self, chance: &Chance, ops: &mut Vec<Op>) {
        let (node, receiver) = (chance.below(4) as usize, chance.below(2) as usize);
        let volume = chance.below(3) as usize;
        let op = match chance.below(30) {
            0..7 => Op::Write { node, volume, writes: writes(chance) },
            7 => Op::WriteDuring { node, volume, reads: chance.below(3), writes: writes(chance) },
            8..16 => {
                let when = if chance.happens(0.7) { When::Always } else { When::Changed };
                let sync = Op::Sync { node, receiver, when, keep: chance.happens(0.5) };
                if chance.happens(0.6) {
                    ops.push(sync);
                    Op::Join { node, at_most: chance.pick(&[50, 1000, 400_000]) }
                } else {
                    sync
                }
            }
            16..18 if self.agents => Op::KillAgent { node },
            18..20 if self.receivers => return self.receiver(chance, receiver, ops),
            20..22 if self.network => {
                let longest = chance.pick(&[5, 50, 500, 12_000]);
                match chance.below(4) {
                    0 => Op::Cut { node, receiver, from_agent: chance.happens(0.5) },
                    1 => Op::Delay { node, receiver, longest },
                    _ => Op::Mend { node, receiver },
                }
            }
            22..24 if self.store => Op::Weather { receiver, weather: weather(chance) },
            24..26 if self.state => match chance.below(7) {
                0..3 => Op::Keep { node },
                3 => Op::PutBack { node, machine: false },
                4 => Op::PutBack { node, machine: true },
                5 => Op::PutBackIndex { node },
                _ => Op::Clone { node, other_machine: chance.happens(0.5) },
            },
            26..28 if self.shapes => match chance.below(6) {
                0..2 => Op::Grow { node, volume, blocks: chance.between(1, 12) },
                2 => Op::Replace { node, volume, blocks: chance.between(1, BLOCKS) },
                3 => Op::DropVolume { node, volume },
                _ => Op::AddVolume { node, blocks: chance.between(1, BLOCKS) },
            },
            28 if self.operator => match chance.below(9) {
                0..2 => Op::ClockJump { forwards: chance.happens(0.5), hours: chance.between(1, 2000) },
                2..4 => Op::Prune { node, keep: chance.between(1, 4) },
                4 => Op::KeepBucket,
                5 => Op::PutBackBucket { orphans: chance.happens(0.5) },
                6 => Op::Adopt { node },
                _ => Op::Hostile { node, receiver, seed: chance.below(u64::MAX) },
            },
            29 => Op::Restore { node, receiver, back: chance.below(3) },
            _ => Op::Write { node, volume, writes: writes(chance) },
        };
        ops.push(op);
    }

    fn receiver(&self, chance: &Chance, receiver: usize, ops: &mut Vec<Op>) {
        let (away, back) = match chance.below(3) {
            0 => (Op::Pause { receiver }, Op::Resume { receiver }),
            1 => (Op::KillReceiver { receiver }, Op::StartReceiver { receiver }),
            _ => (Op::StopReceiver { receiver }, Op::StartReceiver { receiver }),
        };
        // What is away comes back after a while; it may be away over several other operations.
        if chance.happens(0.5) {
            ops.push(away);
            ops.push(Op::Wait(wait(chance)));
            ops.push(back);
        } else if chance.happens(0.5) {
            ops.push(away);
        } else {
            ops.push(back);
        }
    }
}

fn weather(chance: &Chance) -> Weather {
    let some = |likely: f64| if chance.happens(0.4) { likely } else { 0.0 };
    match chance.below(3) {
        0 => Weather::default(),
        _ => Weather {
            refused: some(0.1),
            ambiguous: some(0.15),
            slow: some(0.05),
            flipped: some(0.01),
            silent: some(0.01),
            full: some(0.2),
            resent: some(0.1),
            stale: some(0.9),
        },
    }
}
