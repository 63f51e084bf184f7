//! Hooks in a round: `pre`, what it says to read, and `post` as soon as all was read, or whatever else happened.
//!
//! Read first: [`HookRound`]. Dropping it runs what is still owed: a round that fails, a connection that breaks and
//! SIGTERM all end there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::VolumeId;
use backhaul_seams::random;
use backhaul_volume::VolumeError;

use super::debt::{self, Debt, Outcome};
use super::{Hook, HookError, Said, answer, process};
use crate::capture::held::{Held, Role, lock};
use crate::capture::live::Live;
use crate::capture::{Begin, Capture, Provider, SnapshotError};
use crate::config::snapshot::Hooks;
use crate::state::{Joined, ProtectedVolume, StateDir};

/// Where hooks look for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The hooks of one round.
pub struct HookRound {
    shared: Arc<Shared>,
}

struct Shared {
    hooks: Hooks,
    state: StateDir,
    volumes: Vec<ProtectedVolume>,
    env: Vec<(String, String)>,
    /// The round is given up: `pre` is ended.
    stop: AtomicBool,
    all_was_read: AtomicBool,
    /// What is owed; held while a hook runs.
    owed: Mutex<Option<Debt>>,
    stand_ins: Mutex<BTreeMap<VolumeId, Arc<Held>>>,
}

impl HookRound {
    /// For a round over these volumes. Nothing runs yet.
    pub fn new(hooks: &Hooks, state: &StateDir, joined: &Joined, volumes: &[ProtectedVolume]) -> Self {
        let shared = Shared {
            hooks: hooks.clone(),
            state: state.clone(),
            volumes: volumes.to_vec(),
            env: environment(state, joined, volumes),
            stop: AtomicBool::new(false),
            all_was_read: AtomicBool::new(false),
            owed: Mutex::default(),
            stand_ins: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }
}

/// What both hooks are given, and nothing else.
fn environment(state: &StateDir, joined: &Joined, volumes: &[ProtectedVolume]) -> Vec<(String, String)> {
    let names: Vec<&str> = volumes.iter().map(|v| v.name.as_str()).collect();
    let round: String = random::id().iter().take(8).map(|b| format!("{b:02x}")).collect();
    let mut env: Vec<(String, String)> = vec![
        ("PATH".into(), PATH.into()),
        ("LC_ALL".into(), "C.UTF-8".into()),
        ("HOME".into(), std::env::var("HOME").unwrap_or_else(|_| "/".into())),
        ("BACKHAUL_HOOK".into(), "pre".into()),
        ("BACKHAUL_GROUP".into(), joined.group_name.to_string()),
        ("BACKHAUL_STATE".into(), state.path().display().to_string()),
        ("BACKHAUL_ROUND".into(), round),
        ("BACKHAUL_VOLUMES".into(), names.join(" ")),
    ];
    // Names have small letters, digits and "-": none of them can meet another one here.
    let variable = |v: &ProtectedVolume| format!("BACKHAUL_PATH_{}", v.name.as_str().to_uppercase().replace('-', "_"));
    env.extend(volumes.iter().map(|v| (variable(v), v.path.display().to_string())));
    env
}

impl Shared {
    /// `pre`, and what it says to read. What it began is ended if it fails.
    fn begin(&self) -> Result<(), SnapshotError> {
        let mut owed = lock(&self.owed);
        debt::pay(&self.state, Some(&self.hooks))?;
        if self.stop.load(Ordering::Acquire) {
            let (hook, how) = (Hook::Pre, "was not run: the round was given up".to_owned());
            return Err(HookError::Failed { hook, how, said: Said::default() }.into());
        }
        let mut debt = Debt::new(&self.hooks, &self.env);
        debt.write(&self.state)?;
        let Hooks { pre, timeout, .. } = &self.hooks;
        let note = |pid| debt.note(&self.state, pid);
        let ran = process::run(Hook::Pre, pre, &self.env, *timeout, Some(&self.stop), note);
        *owed = Some(debt);
        let opened = ran.and_then(|printed| self.open_stand_ins(&printed));
        if opened.is_err() {
            self.end(owed.take());
        }
        Ok(opened?)
    }

    fn open_stand_ins(&self, printed: &[u8]) -> Result<(), HookError> {
        let mut seen = BTreeMap::new();
        for (id, path) in answer::parse(printed, &self.volumes)? {
            let Some(volume) = self.volumes.iter().find(|v| v.id == id) else { continue };
            let source = answer::open(volume, &path)?;
            if let Some(other) = seen.insert(source.path().to_owned(), &volume.name) {
                let text = format!("{} is to be read as {other} and as {}", path.display(), volume.name);
                return Err(HookError::Answer(text));
            }
            tracing::debug!(volume = %volume.name, read = %path.display(), "the pre hook named another path");
            lock(&self.stand_ins).insert(id, Arc::new(Held::new(source, Role::StandIn, None, Vec::new())));
        }
        Ok(())
    }

    /// Closes what was read, and runs `post`.
    fn end(&self, debt: Option<Debt>) {
        lock(&self.stand_ins).values().for_each(|held| held.close());
        let outcome = if self.all_was_read.load(Ordering::Acquire) { Outcome::Read } else { Outcome::Failed };
        if let Some(debt) = debt {
            debt.pay(&self.state, Some(&self.hooks), outcome);
        }
    }

    fn pay(&self) {
        let mut owed = lock(&self.owed);
        let debt = owed.take();
        self.end(debt);
    }

    fn claim(&self, found: Consistency, caveats: &mut Vec<String>) -> Consistency {
        if found < Consistency::Crash {
            return found;
        }
        let several = self.volumes.len() > 1 && !lock(&self.stand_ins).is_empty();
        match self.hooks.claims {
            Some(claims) => claims,
            None if several => {
                let why = "whether what the pre hook named is of one instant with the other volumes only you know: if it \
                           is, set hooks.claims = \"crash\"";
                caveats.push(why.to_owned());
                Consistency::Fuzzy
            }
            None => found,
        }
    }
}

impl Provider for HookRound {
    fn begin(&self) -> Option<Begin> {
        let shared = self.shared.clone();
        Some(Box::new(move || shared.begin()))
    }

    fn open(&self, volume: &ProtectedVolume) -> Result<Arc<dyn Capture>, VolumeError> {
        match lock(&self.shared.stand_ins).get(&volume.id) {
            Some(held) => Ok(held.clone()),
            None => Live.open(volume),
        }
    }

    fn finish(&self, found: Consistency, caveats: &mut Vec<String>) -> Consistency {
        let claim = self.shared.claim(found, caveats);
        self.shared.all_was_read.store(true, Ordering::Release);
        // Beside the commit, so that what `post` removes lives no longer than it must. Where there is no thread, `drop`
        // does it.
        let shared = self.shared.clone();
        let _ = std::thread::Builder::new().name("backhaul-post".into()).spawn(move || shared.pay());
        claim
    }
}

impl Drop for HookRound {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // Waits for `pre`, which is told to stop, and for a `post` that runs already.
        self.shared.pay();
    }
}
