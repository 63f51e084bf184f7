//! What is typed: arguments, settings files, the store's URL.

use backhaul_cli::{settings, text};
use backhaul_receiver::store::StoreUrl;

pub(crate) fn arguments(data: &[u8]) {
    let Ok(typed) = std::str::from_utf8(data) else { return };
    let _ = text::parse_bytes(typed);
    let _ = text::parse_duration(typed).map(text::duration);
    let _ = text::parse_point(typed);
    let _ = text::split_point(typed);
    let _ = settings::check_address(typed);
    let _ = backhaul_receiver::cmd::restore::parse_what(typed);
    let _ = backhaul_receiver::scrub::Share::parse(typed);
}

pub(crate) fn settings(data: &[u8]) {
    let Ok(typed) = std::str::from_utf8(data) else { return };
    let _ = toml::from_str::<backhaul_agent::config::Settings>(typed);
    let _ = toml::from_str::<backhaul_receiver::config::Settings>(typed);
}

pub(crate) fn store_url(data: &[u8]) {
    let Ok(typed) = std::str::from_utf8(data) else { return };
    if let Ok(url) = typed.parse::<StoreUrl>() {
        assert_eq!(url.to_string().parse::<StoreUrl>().expect("what is shown can be typed"), url);
    }
}
