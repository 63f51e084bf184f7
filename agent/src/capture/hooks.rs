//! Commands of the user around a round: `pre` before anything is read, `post` after it, always.
//!
//! Read first: [`round::HookRound`], then [`HookError`].
//!
//! | file | owns |
//! |---|---|
//! | [`round`] | when they run in a round, and what the point may claim |
//! | [`process`] | one command: its time, its output, its end |
//! | [`answer`] | what `pre` printed |
//! | [`debt`] | that a `post` is owed, written down before `pre` begins |

pub mod answer;
pub mod debt;
pub mod process;
pub mod round;

use std::fmt;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Before anything is read.
    Pre,
    /// After everything was read.
    Post,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pre => "pre",
            Self::Post => "post",
        })
    }
}

/// How a hook fails.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It can't be started.
    #[error("the {hook} hook can't be started: {source}")]
    Start {
        /// Which.
        hook: Hook,
        /// Why.
        source: std::io::Error,
    },
    /// It was started, and did not end well.
    #[error("the {hook} hook {how}{said}")]
    Failed {
        /// Which.
        hook: Hook,
        /// How it ended.
        how: String,
        /// The end of what it said on standard error.
        said: Said,
    },
    /// What it printed is not what it may print.
    #[error("the pre hook's output: {0}")]
    Answer(String),
}

/// The last lines of standard error.
#[derive(Clone, Debug, Default)]
pub struct Said(pub Vec<String>);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, "; it said: {}", self.0.join(" | "))
    }
}
