//! `snapshot` and `[hooks]`: how a point becomes one of a single instant.
//!
//! Read first: [`Snapshot::build`].

use std::ops::RangeInclusive;
use std::time::Duration;

use backhaul_cli::settings::Span;
use backhaul_protocol::consistency::Consistency;
use serde::Deserialize;

/// How long a hook may take where nothing else is said. Arbitrary.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// What it may be: the longest is arbitrary, and more than a snapshot should take.
const TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
/// What `snapshot` may be, for messages.
const WORDS: &str = "want \"auto\", \"freeze\", \"hooks\", \"reflink\" or \"none\"";

/// `[hooks]` as it is written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookTable {
    /// What is run before anything is read.
    pub pre: Option<String>,
    /// What is run after it.
    pub post: Option<String>,
    /// How long each may take.
    pub timeout: Option<Span>,
    /// What points claim by your word.
    pub claims: Option<String>,
}

/// Where a point comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Snapshot {
    /// Volumes as they are; file systems on devices are frozen for an instant where writes to them are marked, and an image
    /// that somebody writes to is cloned, where there are clones.
    Auto,
    /// The same without clones.
    Freeze,
    /// What commands of the user prepare.
    Hooks(Hooks),
    /// A clone of every image.
    Reflink,
    /// Volumes as they are.
    None,
}

/// Commands of the user.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hooks {
    /// Run before anything is read.
    pub pre: String,
    /// Always run after that.
    pub post: String,
    /// How long each may take.
    pub timeout: Duration,
    /// What the user says of points that these make, if all that was read held still.
    pub claims: Option<Consistency>,
}

impl Snapshot {
    /// What is meant by the settings.
    pub fn build(word: Option<&str>, hooks: Option<HookTable>) -> Result<Self, String> {
        let word = word.unwrap_or("auto");
        let snapshot = match word {
            "auto" => Self::Auto,
            "freeze" => Self::Freeze,
            "reflink" => Self::Reflink,
            "none" => Self::None,
            "hooks" => {
                return hooks.ok_or("snapshot = \"hooks\" needs [hooks] with pre and post".into()).and_then(build);
            }
            _ => return Err(format!("snapshot = \"{word}\": {WORDS}")),
        };
        match hooks {
            Some(_) => Err(format!("[hooks] would never run: snapshot is \"{word}\", not \"hooks\"")),
            None => Ok(snapshot),
        }
    }

    /// As it is written.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Freeze => "freeze",
            Self::Hooks(_) => "hooks",
            Self::Reflink => "reflink",
            Self::None => "none",
        }
    }

    /// Whether file systems are frozen.
    pub fn freezes(&self) -> bool {
        matches!(self, Self::Auto | Self::Freeze)
    }

    /// The hooks, if there are any.
    pub fn hooks(&self) -> Option<&Hooks> {
        match self {
            Self::Hooks(hooks) => Some(hooks),
            _ => None,
        }
    }
}

fn build(table: HookTable) -> Result<Snapshot, String> {
    let command = |name: &str, text: Option<String>, hint: &str| {
        let text = text.ok_or_else(|| format!("[hooks] has no {name}{hint}"))?;
        if text.trim().is_empty() || text.contains('\0') {
            return Err(format!("hooks.{name} is not a command"));
        }
        Ok(text)
    };
    let pre = command("pre", table.pre, "")?;
    let post = command("post", table.post, ": where nothing is to be undone, post = \"true\"")?;
    let timeout = table.timeout.map_or(DEFAULT_TIMEOUT, |s| s.0);
    if !TIMEOUT.contains(&timeout) {
        return Err(format!("hooks.timeout = {timeout:?}: want from 1s to 1h"));
    }
    let claims = match table.claims.as_deref() {
        None => None,
        Some("crash") => Some(Consistency::Crash),
        Some("application") => Some(Consistency::Application),
        Some(other) => return Err(format!("hooks.claims = \"{other}\": want \"crash\" or \"application\"")),
    };
    Ok(Snapshot::Hooks(Hooks { pre, post, timeout, claims }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pre: Option<&str>, post: Option<&str>) -> Option<HookTable> {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Some(HookTable { pre: owned(pre), post: owned(post), timeout: None, claims: None })
    }

    #[test]
    fn hooks_are_whole_and_meant() {
        assert_eq!(Snapshot::build(None, None), Ok(Snapshot::Auto));
        assert!(Snapshot::build(Some("hooks"), table(Some("a"), Some("b"))).is_ok_and(|s| s.hooks().is_some()));
        for (word, hooks) in [
            ("hooks", None),
            ("hooks", table(None, Some("b"))),
            ("hooks", table(Some("a"), None)),
            ("hooks", table(Some(" "), Some("b"))),
            ("auto", table(Some("a"), Some("b"))),
            ("Auto", None),
            ("", None),
        ] {
            assert!(Snapshot::build(Some(word), hooks.clone()).is_err(), "{word} {hooks:?}");
        }
    }
}
