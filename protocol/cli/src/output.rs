//! Results on standard output, errors where the user looks for them.

use std::io::Write;

use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::{Classifier, Exit, classify};
use crate::progress::Progress;

/// Where results go.
#[derive(Clone, Debug)]
pub struct Output {
    json: bool,
    quiet: bool,
    own_errors: Classifier,
}

impl Output {
    /// Text, or one JSON object; `own_errors` knows the program's errors.
    pub fn new(json: bool, quiet: bool, own_errors: Classifier) -> Self {
        Self { json, quiet, own_errors }
    }

    /// Whether JSON is wanted.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Prints the result: `value` as JSON with its `schema` (`backhaul.sync/1`), or `text`.
    pub fn result(&self, schema: &str, value: &impl Serialize, text: &str) {
        if self.json {
            let mut object = json!({ "schema": schema });
            if let (Some(map), Ok(Value::Object(fields))) = (object.as_object_mut(), serde_json::to_value(value)) {
                map.extend(fields);
            }
            print_line(&object.to_string());
        } else if !text.is_empty() {
            print_line(text);
        }
    }

    /// Prints an error, with what to type next, and gives its exit code.
    pub fn failure(&self, error: &anyhow::Error) -> Exit {
        let (exit, code, next) = classify(error, self.own_errors);
        let message = whole_chain(error);
        if self.json {
            print_error(code, &message, next.as_deref());
        }
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "error[{code}]: {message}");
        if let Some(next) = next {
            let _ = writeln!(err, "next: {next}");
        }
        exit
    }

    /// An error in one line, with what to type next.
    pub fn explain(&self, error: &anyhow::Error) -> String {
        let message = whole_chain(error);
        match classify(error, self.own_errors).2 {
            Some(next) => format!("{message}; next: {next}"),
            None => message,
        }
    }

    /// A warning that the user should see, unless only errors are wanted.
    pub fn warn(&self, text: &str) {
        if self.quiet {
            return;
        }
        let _ = writeln!(std::io::stderr().lock(), "warning: {text}");
    }

    /// The same, without progress.
    #[must_use]
    pub fn quieted(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Progress on standard error, in so many phases.
    pub fn progress(&self, phases: usize) -> Progress {
        Progress::new(phases, self.quiet)
    }
}

/// An error as JSON.
pub(crate) fn print_error(code: &str, message: &str, next: Option<&str>) {
    let error = json!({ "code": code, "message": message, "next": next });
    print_line(&json!({ "schema": "backhaul.error/1", "error": error }).to_string());
}

/// A reader that went away (`| head`) is no error of ours.
fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}

/// One line with every cause that the text before it does not tell already.
fn whole_chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}
