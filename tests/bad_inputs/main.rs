//! What people type wrong, and what lies about wrongly: one table, each line with its exit code and message id (I19).
//!
//! Read [`cases::all`] first: the table. Every case runs the real program with `--json`: exactly one JSON object on
//! standard output, no panic, and on standard error the same error with what to do next.

mod cases;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use backhaul_tests::process::Ran;

use crate::cases::Case;
use crate::world::{Shared, World};

/// Cases at once. They wait for disks and networks more than they work.
const THREADS: usize = 6;

#[test]
fn every_bad_input_has_its_exit_code_and_message() {
    let world = World::new();
    let cases = cases::all();
    assert!(cases.len() >= 229, "{} cases", cases.len());
    let (next, rows) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((n, case)) = {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    cases.get(n).map(|c| (n, c))
                } {
                    let ran = (case.run)(&world.shared);
                    rows.lock().unwrap().push((n, judge(case, &ran, &world.shared), ran));
                }
            });
        }
    });
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|(n, ..)| *n);
    let mut text = String::new();
    let mut red = Vec::new();
    for (n, wrong, ran) in &rows {
        let Case { what, exit, id, .. } = &cases[*n];
        text.push_str(&format!("{exit:>4} {id:<14} {what}\n"));
        if !wrong.is_empty() {
            red.push(format!("{what}: {}\n    {}\n    {:?} {}", wrong.join("; "), ran.line, ran.code, ran.out.trim()));
        }
    }
    println!("{text}{} cases", rows.len());
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/bad-inputs.txt"), &text).expect("there is room");
    world.unharmed();
    assert!(red.is_empty(), "{} cases are red:\n{}", red.len(), red.join("\n"));
}

/// What is wrong with how a program ended.
fn judge(case: &Case, ran: &Ran, shared: &Shared) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut must = |good: bool, what: String| {
        if !good {
            wrong.push(what);
        }
    };
    must(ran.code == Some(case.exit), format!("exit {:?}, want {}", ran.code, case.exit));
    must(!ran.err.contains("panicked") && !ran.err.contains("RUST_BACKTRACE"), "it panics".into());
    let told_secret =
        |token: &String| token.split('.').nth(2).is_some_and(|s| format!("{}{}", ran.out, ran.err).contains(s));
    must(!shared.tokens().into_iter().any(told_secret), "it tells a token's secret".into());
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap_or_default();
    must(json["schema"] == "backhaul.error/1", "no error in JSON".into());
    let error = &json["error"];
    must(error["code"] == case.id, format!("{}, want {}", error["code"], case.id));
    must(error["message"].as_str().is_some_and(|m| m.len() > 8 && !m.contains('\n')), "no message".into());
    must(error["next"].as_str().is_some_and(|n| n.len() > 8), "not said what to do next".into());
    // Usage is told in clap's own words.
    let told = ran.err.contains("next: ") || ran.err.contains("--help");
    must(told && ran.err.contains("error"), "standard error does not tell".into());
    wrong
}
