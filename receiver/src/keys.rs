//! The receiver's state folder: the authority and nothing else. Its key never goes into the store.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use backhaul_transport::authority::Authority;
use backhaul_transport::tls::TlsError;
use backhaul_volume::durable::{self, DurableError};

const CERTIFICATE: &str = "authority.pem";
const KEY: &str = "authority.key";

/// How the state folder fails.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// No authority yet.
    #[error("{} holds no certificate authority", .0.display())]
    Missing(PathBuf),
    /// The key can be read by others.
    #[error("{} can be read by others: chmod 600 {}", .0.display(), .0.display())]
    Open(PathBuf),
    /// A file can't be read.
    #[error("can't read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The folder or a file can't be written.
    #[error("can't write the state folder {}: {source}", path.display())]
    Folder {
        /// Which folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file can't be written.
    #[error(transparent)]
    Write(#[from] DurableError),
    /// The files are no authority.
    #[error("the authority in {} is not usable: {source}", path.display())]
    Unusable {
        /// Which folder.
        path: PathBuf,
        /// Why.
        source: TlsError,
    },
}

impl KeysError {
    /// Never: somebody has to do something.
    pub fn is_retryable(&self) -> bool {
        false
    }
}

/// Reads the authority.
pub fn load(state: &Path) -> Result<Authority, KeysError> {
    let read = |name: &str| {
        let path = state.join(name);
        std::fs::read_to_string(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => KeysError::Missing(state.to_owned()),
            _ => KeysError::Read { path, source },
        })
    };
    let (certificate, key) = (read(CERTIFICATE)?, read(KEY)?);
    let path = state.join(KEY);
    let mode = std::fs::metadata(&path).map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()));
    if mode.is_ok_and(|m| m & 0o077 != 0) {
        return Err(KeysError::Open(path));
    }
    Authority::from_pem(&certificate, &key).map_err(|source| KeysError::Unusable { path: state.to_owned(), source })
}

/// Reads the authority, or makes one where there is none. The certificate is written last: without it there is none.
pub fn ensure(state: &Path) -> Result<Authority, KeysError> {
    match load(state) {
        Err(KeysError::Missing(_)) => {}
        other => return other,
    }
    let folder = |source| KeysError::Folder { path: state.to_owned(), source };
    std::fs::create_dir_all(state).map_err(folder)?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(state, private).map_err(folder)?;
    let unusable = |source| KeysError::Unusable { path: state.to_owned(), source };
    let (certificate, key) = Authority::generate(SystemTime::now()).map_err(unusable)?;
    if !state.join(CERTIFICATE).exists() {
        durable::replace(&state.join(KEY), key.as_bytes(), 0o600)?;
        durable::create_new(&state.join(CERTIFICATE), certificate.as_bytes(), 0o644)?;
    }
    load(state)
}
