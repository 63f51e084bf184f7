//! What is protected: named by the user, looked at again before every round.
//!
//! Read first: [`refresh`].

use std::path::Path;

use backhaul_protocol::geometry::{Geometry, GeometryError};
use backhaul_protocol::ids::{Incarnation, Name, VolumeId};
use backhaul_protocol::limits::MAX_VOLUMES;
use backhaul_seams::random;
use backhaul_volume::{IdentityMatch, Source, Volume, VolumeError};

use crate::state::{ProtectedVolume, StateDir, StateError};
use crate::tracker::hash_index::HashIndex;

/// Why something can't be protected, or not any more.
#[derive(Debug, thiserror::Error)]
pub enum ProtectError {
    /// The volume.
    #[error("volume {name}: {source}")]
    Volume {
        /// Which.
        name: Name,
        /// Why.
        source: VolumeError,
    },
    /// Its size.
    #[error("volume {name}: {source}")]
    Geometry {
        /// Which.
        name: Name,
        /// Why.
        source: GeometryError,
    },
    /// It is not what it was.
    #[error("volume {name}: {what}")]
    Changed {
        /// Which.
        name: Name,
        /// What became of it.
        what: String,
        /// Where it is now.
        path: std::path::PathBuf,
    },
    /// Not possible as asked.
    #[error("{0}")]
    Refused(String),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
}

impl ProtectError {
    /// Whether trying again may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Volume { source, .. } => source.is_retryable(),
            Self::State(e) => e.is_retryable(),
            Self::Geometry { .. } | Self::Changed { .. } | Self::Refused(_) => false,
        }
    }
}

/// There is no volume to make a point of.
pub fn nothing() -> backhaul_cli::Failure {
    use backhaul_cli::{Exit, Failure};
    Failure::new(Exit::Config, "E_NOTHING", "nothing is protected").next("backhaul-agent protect NAME=PATH")
}

/// Looks at a path as a volume.
fn look(name: &Name, path: &Path) -> Result<Source, ProtectError> {
    Source::open(path).map_err(|source| ProtectError::Volume { name: name.clone(), source })
}

fn geometry(name: &Name, block_size: u32, length: u64) -> Result<Geometry, ProtectError> {
    Geometry::new(block_size, length).map_err(|source| ProtectError::Geometry { name: name.clone(), source })
}

/// What naming a volume did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Named {
    /// It is protected from now on.
    New,
    /// It has another path or device now, and a new incarnation.
    Repointed,
    /// It was protected like this already.
    Same,
}

/// Adds volumes or re-points them; nothing is written unless all can be.
pub fn protect(
    state: &StateDir,
    named: &[(Name, std::path::PathBuf)],
    block_size: u32,
) -> Result<Vec<(ProtectedVolume, Named)>, ProtectError> {
    let _lock = state.lock_volumes()?;
    let mut volumes = state.volumes()?;
    let mut done: Vec<(ProtectedVolume, Named)> = Vec::new();
    for (i, (name, path)) in named.iter().enumerate() {
        if named[..i].iter().any(|(other, _)| other == name) {
            return Err(ProtectError::Refused(format!("{name} is named twice")));
        }
        let source = look(name, path)?;
        // What was resolved is kept: a working folder is not part of a volume's identity.
        let path = source.path().to_owned();
        let existing = volumes.iter_mut().find(|v| v.name == *name);
        let what = match existing {
            Some(v) => {
                if v.path == path && v.identity.same_as(source.identity()) == IdentityMatch::Same {
                    Named::Same
                } else {
                    v.geometry = geometry(name, v.geometry.block_size(), source.length())?;
                    v.incarnation = v.incarnation.next();
                    v.identity = source.identity().clone();
                    v.path = path.clone();
                    Named::Repointed
                }
            }
            None => {
                volumes.push(ProtectedVolume {
                    id: VolumeId(random::id()),
                    name: name.clone(),
                    path: path.clone(),
                    identity: source.identity().clone(),
                    incarnation: Incarnation(1),
                    geometry: geometry(name, block_size, source.length())?,
                });
                Named::New
            }
        };
        let volume = volumes.iter().find(|v| v.name == *name).cloned();
        done.push((volume.expect("just added or found"), what));
    }
    for (i, v) in volumes.iter().enumerate() {
        if let Some(other) = volumes[..i].iter().find(|o| o.path == v.path) {
            let text = format!("{} is named twice, as {} and {}", v.path.display(), other.name, v.name);
            return Err(ProtectError::Refused(text));
        }
    }
    if volumes.len() > MAX_VOLUMES {
        return Err(ProtectError::Refused(format!("a group has at most {MAX_VOLUMES} volumes")));
    }
    state.write_volumes(&volumes)?;
    Ok(done)
}

/// Takes a volume off; its points stay.
pub fn unprotect(state: &StateDir, name: &Name) -> Result<Option<ProtectedVolume>, ProtectError> {
    let _lock = state.lock_volumes()?;
    let mut volumes = state.volumes()?;
    let Some(at) = volumes.iter().position(|v| v.name == *name) else { return Ok(None) };
    let removed = volumes.remove(at);
    state.write_volumes(&volumes)?;
    if let Err(error) = HashIndex::remove(&state.index_dir(), removed.id) {
        tracing::warn!(%error, "could not remove the index; it is not used any more");
    }
    Ok(Some(removed))
}

/// What is protected, looked at anew: a volume that grew gets a new incarnation, one that shrank or was replaced is
/// refused until it is named again. Gives the volumes and what should be said.
pub fn refresh(state: &StateDir) -> Result<(Vec<ProtectedVolume>, Vec<String>), ProtectError> {
    let (volumes, said, Grown::No) = look_again(state.volumes()?)? else {
        // Read again under the lock, which is a write to the folder and not for every round.
        let _lock = state.lock_volumes()?;
        let (volumes, said, _) = look_again(state.volumes()?)?;
        state.write_volumes(&volumes)?;
        return Ok((volumes, said));
    };
    Ok((volumes, said))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Grown {
    No,
    Yes,
}

fn look_again(mut volumes: Vec<ProtectedVolume>) -> Result<(Vec<ProtectedVolume>, Vec<String>, Grown), ProtectError> {
    let mut said = Vec::new();
    let mut grown = Grown::No;
    for v in &mut volumes {
        let source = look(&v.name, &v.path)?;
        match v.identity.same_as(source.identity()) {
            IdentityMatch::Same => {}
            IdentityMatch::Grown { from, to } => {
                v.geometry = geometry(&v.name, v.geometry.block_size(), to)?;
                v.incarnation = v.incarnation.next();
                v.identity = source.identity().clone();
                said.push(format!("volume {} grew from {from} to {to} bytes: everything is compared", v.name));
                grown = Grown::Yes;
            }
            IdentityMatch::Shrunk { from, to } => {
                let what = format!("it shrank from {from} to {to} bytes");
                return Err(ProtectError::Changed { name: v.name.clone(), what, path: v.path.clone() });
            }
            IdentityMatch::Replaced { was, is } => {
                let what = format!("another device is in its place: it was {was}, it is {is}");
                return Err(ProtectError::Changed { name: v.name.clone(), what, path: v.path.clone() });
            }
        }
        if v.identity.weak() {
            said.push(format!(
                "volume {}: {} has no serial number, WWN or partition UUID; it is known by its path and size only",
                v.name,
                v.path.display()
            ));
        }
    }
    Ok((volumes, said, grown))
}
