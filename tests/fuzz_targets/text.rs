//! Names, keys, tokens, identities: what is text and comes from outside.

use backhaul_protocol::ids::{AgentId, GroupId, Name};
use backhaul_protocol::store::key::{GroupKeys, ObjectKey};
use backhaul_transport::token::JoinToken;
use backhaul_volume::Identity;

pub(crate) fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = text.parse::<Name>() {
        assert_eq!(name.to_string(), text);
        assert!(text.len() <= 63 && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
    }
    if let Ok(key) = ObjectKey::parse(text) {
        assert_eq!(key.as_str(), text);
        // A8: never a path out of the store.
        assert!(!text.starts_with('/') && text.split('/').all(|part| !part.is_empty() && part != "." && part != ".."));
        let keys = GroupKeys(GroupId([0x11; 16]));
        if let Some(id) = keys.object_id(&key) {
            assert!(keys.segment(id) == key || keys.map(id) == key, "{text}: one name for each object");
        }
    }
    if let Ok(id) = text.parse::<AgentId>() {
        assert_eq!(id.to_string().parse::<AgentId>().expect("own"), id);
    }
    if let Ok(identity) = text.parse::<Identity>() {
        assert_eq!(identity.to_string().parse::<Identity>().expect("own"), identity);
    }
}

pub(crate) fn token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(token) = text.parse::<JoinToken>() {
        assert_eq!(token.reveal().parse::<JoinToken>().expect("own"), token);
        let secret = blake3::Hash::from_bytes(token.secret).to_hex();
        // An address that is a secret shows itself: `join` takes only HOST:PORT.
        if !token.address.contains(secret.as_str()) {
            assert!(!format!("{token:?}").contains(secret.as_str()), "it shows itself");
        }
    }
}
