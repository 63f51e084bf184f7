//! Settings files: TOML, unknown keys refused. What differs between machines can also be given by flag and by
//! environment, in that order of precedence: flag, environment, file, default.

use std::path::Path;

use backhaul_transport::tuning::{Segmentation, Tuning};
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

/// How connections treat their path.
pub fn tuning(congestion: Option<&str>, segmentation_offload: Option<bool>) -> Result<Tuning, String> {
    let defaults = Tuning::default();
    Ok(Tuning {
        congestion: congestion.map_or(Ok(defaults.congestion), str::parse)?,
        segmentation: segmentation_offload.map_or(defaults.segmentation, Segmentation::offload),
    })
}

/// Whether this is HOST:PORT, with a port that can be connected to; an IPv6 address stands in brackets.
pub fn check_address(text: &str) -> Result<(), String> {
    let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let is_host = |host: &str| match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
    };
    match parts {
        Some((host, 1..)) if is_host(host) => Ok(()),
        _ => Err(format!("\"{text}\" is not HOST:PORT")),
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

/// Bytes per second as people write them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate(pub u64);

impl<'de> serde::Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        crate::text::parse_rate(&text).map(Self).map_err(serde::de::Error::custom)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for good in ["dr.example.com:4433", "10.0.0.1:1", "[2001:db8::1]:65535", "localhost:4433"] {
            assert_eq!(check_address(good), Ok(()));
        }
        for bad in
            ["", "host", ":1", "host:", "host:0", "host:65536", "2001:db8::1:4433", "[::1:4433", "a b:1", "https://a:1"]
        {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }
}
