//! The helper process as the agent's hidden command will be: everything behind the first argument is for the crate.
fn main() -> std::process::ExitCode {
    match std::env::args_os().nth(1).as_deref().and_then(|a| a.to_str()) {
        Some("freeze-helper") => backhaul_freeze::helper_main(std::env::args_os().skip(2).collect()),
        _ => std::process::ExitCode::from(2),
    }
}
