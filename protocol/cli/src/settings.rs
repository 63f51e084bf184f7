//! Settings files: TOML, unknown keys refused. What differs between machines can also be given by flag and by
//! environment, in that order of precedence: flag, environment, file, default.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::failure::{Exit, Failure};

/// Reads a settings file; one that was not named and is not there is empty.
pub fn load<T: DeserializeOwned + Default>(named: Option<&Path>, default: &Path) -> Result<T, Failure> {
    let path = named.unwrap_or(default);
    let wrong = |text: String| {
        Failure::new(Exit::Config, "E_CONFIG", text).next("mend the file; `config check` tells whether it is right")
    };
    match std::fs::read_to_string(path) {
        Ok(text) => {
            toml::from_str(&text).map_err(|e| wrong(format!("{}: {}", path.display(), one_line(&e.to_string()))))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => Ok(T::default()),
        Err(e) => Err(wrong(format!("{}: {e}", path.display()))),
    }
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A size as people write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bytes(pub u64);

impl<'de> serde::Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        crate::text::parse_bytes(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A duration as people write it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span(pub std::time::Duration);

impl<'de> serde::Deserialize<'de> for Span {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        crate::text::parse_duration(&text).map(Self).map_err(serde::de::Error::custom)
    }
}
