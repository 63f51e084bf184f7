//! Which volume of a restore goes where, and whether it may: the same on both ends.
//!
//! Read first: [`match_targets`] and [`check_confirmed`].

use std::path::{Path, PathBuf};

use backhaul_protocol::ids::Name;

use crate::target::{CheckedTarget, Refusal, Target, TargetError, TargetNeeds};

/// Which of the volumes goes where, by what was typed: `NAME=TARGET` for each, or `TARGET` where there is one. The numbers
/// are places in `volumes`. An error is for the user.
pub fn match_targets(volumes: &[&str], typed: &[String]) -> Result<Vec<(usize, PathBuf)>, String> {
    let mut left: Vec<usize> = (0..volumes.len()).collect();
    let mut out: Vec<(usize, PathBuf)> = Vec::new();
    for one in typed {
        let named = one.split_once('=').and_then(|(name, path)| {
            let at = left.iter().position(|i| volumes[*i] == name)?;
            Some((left.remove(at), path))
        });
        match named {
            Some((volume, path)) => out.push((volume, path.into())),
            None if volumes.len() == 1 && left.len() == 1 && !is_for_another(one) => {
                out.push((left.remove(0), one.into()));
            }
            None if volumes.len() == 1 && is_for_another(one) => {
                return Err(format!("--to {one}: the volume is {}; a path that is meant is ./{one}", volumes[0]));
            }
            None => return Err(format!("--to {one}: want --to NAME=TARGET, each of {} once", volumes.join(", "))),
        }
    }
    if !left.is_empty() {
        let missing: Vec<&str> = left.iter().map(|i| volumes[*i]).collect();
        let missing = missing.join(", ");
        return Err(format!("no target for {missing}: add --to NAME=TARGET for it, or name one volume to restore"));
    }
    for (i, (_, path)) in out.iter().enumerate() {
        if path.as_os_str().is_empty() {
            return Err("an empty target".to_owned());
        }
        if out[..i].iter().any(|(_, other)| is_same_place(other, path)) {
            return Err(format!("{} is named for two volumes", path.display()));
        }
    }
    Ok(out)
}

/// Whether this is NAME=TARGET, here of a volume that is not restored. Taken for a path, it would be a new file of a
/// strange name instead of the device that was meant.
fn is_for_another(typed: &str) -> bool {
    typed.split_once('=').is_some_and(|(name, _)| name.parse::<Name>().is_ok())
}

fn is_same_place(a: &Path, b: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |p: &Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino(), m.rdev()));
    // What is not there yet is in a folder that is.
    let folder = |p: &Path| match p.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.canonicalize().ok(),
        _ => Path::new(".").canonicalize().ok(),
    };
    match (id(a), id(b)) {
        (Some(a), Some(b)) => a == b,
        (None, None) => a == b || (a.file_name() == b.file_name() && folder(a).is_some() && folder(a) == folder(b)),
        _ => false,
    }
}

/// [`Target::check`] with each of the confirmations: one that names another target is no mistake where there are
/// several targets.
pub fn check_confirmed(
    path: &Path,
    needs: &TargetNeeds,
    confirm: &[String],
    targets: usize,
) -> Result<CheckedTarget, TargetError> {
    let with = |confirm| Target::check(path, &TargetNeeds { confirm, ..needs.clone() });
    let mut refused = None;
    for given in confirm {
        match with(Some(given.clone())) {
            Err(e @ TargetError::Refused { why: Refusal::WrongConfirmation { .. }, .. }) => refused = Some(e),
            other => return other,
        }
    }
    match refused {
        Some(e) if targets == 1 => Err(e),
        _ => with(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_volume_has_one_place() {
        let dir = tempfile::tempdir().expect("a folder");
        let there = dir.path().join("there");
        std::fs::write(&there, b"x").expect("written");
        std::os::unix::fs::symlink(&there, dir.path().join("link")).expect("a link");
        let [there, link, new, same] =
            ["there", "link", "new", "./new"].map(|n| format!("{}/{n}", dir.path().display()));
        let aim = |volumes: &[&str], typed: &[&str]| {
            match_targets(volumes, &typed.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(aim(&["a"], &["x"]), Ok(vec![(0, "x".into())]));
        assert_eq!(aim(&["a"], &["a=x"]), Ok(vec![(0, "x".into())]));
        assert_eq!(aim(&["a"], &["./b=x"]), Ok(vec![(0, "./b=x".into())]), "a path may have a =");
        assert!(aim(&["a"], &["b=x"]).is_err(), "another volume's target");
        assert_eq!(aim(&["a", "b"], &["b=x", "a=y"]), Ok(vec![(1, "x".into()), (0, "y".into())]));
        for bad in [&["x"][..], &["a=x"], &["a=x", "a=y"], &["a=x", "b=x"], &["a=x", "b=y", "c=z"], &["a=", "b=y"]] {
            assert!(aim(&["a", "b"], bad).is_err(), "{bad:?}");
        }
        for (a, b) in [(&there, &link), (&new, &same)] {
            assert!(aim(&["a", "b"], &[&format!("a={a}"), &format!("b={b}")]).is_err(), "{a} {b}");
        }
        assert!(aim(&["a", "b"], &[&format!("a={there}"), &format!("b={new}")]).is_ok());
    }
}
