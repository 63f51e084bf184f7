//! Limits that a test build of the programs takes smaller, so that a short test gets to where a long life would.

/// `usual`, or in a test build what `BACKHAUL_LIMITS=NAME=NUMBER,...` says for this name.
pub fn limit(_name: &str, usual: u64) -> u64 {
    #[cfg(feature = "testing")]
    if let Ok(text) = std::env::var("BACKHAUL_LIMITS") {
        let said = text.split(',').find_map(|one| one.strip_prefix(_name)?.strip_prefix('='));
        return said.map_or(usual, |number| number.parse().unwrap_or_else(|_| panic!("BACKHAUL_LIMITS={text}")));
    }
    usual
}
