//! What `pre` may print: lines `NAME=PATH`, each a protected volume and what is to be read in its place.
//!
//! Read first: [`parse`]. Strict: a slip must not have the volume itself read, as if nothing had been said.

use std::collections::BTreeMap;
use std::path::PathBuf;

use backhaul_protocol::ids::{Name, VolumeId};
use backhaul_volume::{Source, Volume};

use super::HookError;
use crate::state::ProtectedVolume;

/// Longer lines are cut in messages.
const SHOWN: usize = 100;

/// Parses it.
pub fn parse(printed: &[u8], volumes: &[ProtectedVolume]) -> Result<BTreeMap<VolumeId, PathBuf>, HookError> {
    let wrong = |text: String| HookError::Answer(text);
    let text = std::str::from_utf8(printed).map_err(|_| wrong("it is not UTF-8".into()))?;
    let mut out = BTreeMap::new();
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        let shown: String = line.chars().take(SHOWN).flat_map(char::escape_debug).collect();
        let Some((name, path)) = line.split_once('=') else {
            return Err(wrong(format!("\"{shown}\" is not NAME=PATH; what is for people belongs on standard error")));
        };
        let name: Name = name.parse().map_err(|_| wrong(format!("\"{shown}\": that is no volume's name")))?;
        let volume = volumes.iter().find(|v| v.name == name);
        let volume = volume.ok_or_else(|| wrong(format!("no volume {name} is protected")))?;
        if !path.starts_with('/') {
            return Err(wrong(format!("\"{shown}\": the path must begin with /")));
        }
        if out.insert(volume.id, PathBuf::from(path)).is_some() {
            return Err(wrong(format!("{name} is named twice")));
        }
    }
    Ok(out)
}

/// Opens what is to be read in the place of a volume.
pub fn open(volume: &ProtectedVolume, path: &std::path::Path) -> Result<Source, HookError> {
    use std::error::Error;
    let wrong = |text: String| HookError::Answer(format!("{}={}: {text}", volume.name, path.display()));
    let source = Source::open(path).map_err(|e| {
        let cause = e.source().map(|c| format!(": {c}")).unwrap_or_default();
        wrong(format!("{e}{cause}"))
    })?;
    let (has, wants) = (source.length(), volume.geometry.length());
    if has != wants {
        return Err(wrong(format!("it has {has} bytes, and the volume has {wants}")));
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use backhaul_protocol::geometry::Geometry;
    use backhaul_protocol::ids::Incarnation;
    use backhaul_volume::Identity;

    fn volume(name: &str, n: u8) -> ProtectedVolume {
        let path = PathBuf::from("/dev/null");
        ProtectedVolume {
            id: VolumeId([n; 16]),
            name: name.parse().expect("a name"),
            identity: Identity::of_image(&path, 65536),
            path,
            incarnation: Incarnation(1),
            geometry: Geometry::new(65536, 65536).expect("legal"),
        }
    }

    #[test]
    fn only_whole_lines_about_protected_volumes() {
        let volumes = [volume("root", 1), volume("data-1", 2)];
        let paths = parse(b"root=/dev/vg/a\n\n  \ndata-1=/x=y z\n", &volumes).expect("legal");
        assert_eq!(paths[&VolumeId([2; 16])], PathBuf::from("/x=y z"));
        assert_eq!(paths.len(), 2);
        assert_eq!(parse(b"", &volumes).expect("nothing else is read").len(), 0);
        for bad in [
            &b"Logical volume created."[..],
            b"root =/a",
            b"other=/a",
            b"root=a",
            b"root=",
            b"root=/a\nroot=/b",
            b"\xff",
        ] {
            assert!(parse(bad, &volumes).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
