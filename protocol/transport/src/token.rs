//! Join tokens as text: `bh1.<authority's fingerprint>.<secret>.<expiry ms>.<host:port>`.

use std::fmt;
use std::str::FromStr;

use backhaul_protocol::store::log::UnixMillis;

/// What an operator hands to a server that is to join.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// BLAKE3 of the authority's certificate.
    pub fingerprint: [u8; 32],
    /// Good once.
    pub secret: [u8; 32],
    /// By the receiver's clock.
    pub expires: UnixMillis,
    /// Where the receiver is.
    pub address: String,
}

/// The text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: want the one line that `backhaul-receiver token` printed")]
pub struct TokenError;

impl JoinToken {
    /// What the store keeps of the secret.
    pub fn secret_hash(secret: &[u8; 32]) -> [u8; 32] {
        *blake3::Hasher::new_derive_key("backhaul 2026-11 join token").update(secret).finalize().as_bytes()
    }
    /// The text. Secret: for standard output only.
    pub fn reveal(&self) -> String {
        let hex = |b: &[u8; 32]| blake3::Hash::from_bytes(*b).to_hex();
        format!("bh1.{}.{}.{}.{}", hex(&self.fingerprint), hex(&self.secret), self.expires.0, self.address)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("address", &self.address).finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = text.trim().splitn(5, '.').collect();
        let ["bh1", fingerprint, secret, expires, address] = parts[..] else { return Err(TokenError) };
        let hex = |s: &str| blake3::Hash::from_hex(s).map(|h| *h.as_bytes()).map_err(|_| TokenError);
        if address.is_empty() || address.len() > 300 {
            return Err(TokenError);
        }
        Ok(Self {
            fingerprint: hex(fingerprint)?,
            secret: hex(secret)?,
            expires: UnixMillis(expires.parse().map_err(|_| TokenError)?),
            address: address.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_never_shows_itself() {
        let token = JoinToken {
            fingerprint: [1; 32],
            secret: [0xab; 32],
            expires: UnixMillis(5),
            address: "[::1]:4433".into(),
        };
        assert_eq!(token.reveal().parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("abab"));
        for bad in ["", "bh1", "bh2.a.b.c.d", "bh1.00.00.1.h:1"] {
            assert_eq!(bad.parse::<JoinToken>(), Err(TokenError));
        }
    }
}
