//! What tells this machine from its clones.
//!
//! Read first: [`machine_id`].

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use backhaul_protocol::store::log::MachineId;

/// Where Linux keeps it. Containers and rescue systems may have none, which counts as empty.
pub const USUAL_FILE: &str = "/etc/machine-id";

/// The file that the settings name can't be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read machine_id_file {}: {source}", path.display())]
pub struct MachineIdError {
    path: PathBuf,
    source: std::io::Error,
}

impl MachineIdError {
    /// Whether another try may help without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        self.source.kind() == ErrorKind::Interrupted
    }
}

/// The machine id and the board's serial, where that can be read, hashed. The same agent, run the same way, always gets
/// the same answer: another one would make it diverged.
pub fn machine_id(file: &Path) -> Result<MachineId, MachineIdError> {
    let id = match std::fs::read(file) {
        Err(source) if source.kind() != ErrorKind::NotFound || file != Path::new(USUAL_FILE) => {
            return Err(MachineIdError { path: file.to_owned(), source });
        }
        id => id.unwrap_or_default(),
    };
    let board = std::fs::read("/sys/class/dmi/id/product_uuid").unwrap_or_default();
    let mut hasher = blake3::Hasher::new_derive_key("backhaul 2026-11 machine");
    for text in [id, board] {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(&text);
    }
    Ok(MachineId(*hasher.finalize().as_bytes()))
}
