//! What lets agents in and write: who joined, tokens, revocations, the first record of a group's log, its floor. No
//! restore needs any of it; an agent does.
//!
//! Read first: [`damaged`].

use backhaul_protocol::ids::{GroupId, LogSeq};
use backhaul_protocol::store::envelope::{FormatError, Kind};
use backhaul_protocol::store::fleet::{JoinedAgent, Redeemed, Token, read_times};
use backhaul_protocol::store::key::{self, GroupKeys};

use crate::catalog::{Catalog, SMALL, get_optional};
use crate::read_error::ReadError;
use crate::store::list_all;

type Parse = fn(&[u8]) -> Result<(), FormatError>;

/// Reads all of it: a request for each object.
pub async fn damaged(catalog: &Catalog, groups: &[GroupId]) -> Result<Vec<ReadError>, ReadError> {
    let agents = groups.iter().map(|g| GroupKeys(*g).agents());
    let of_store: [(&str, Parse); 4] = [
        (key::TOKENS, |b| Token::parse(b).map(drop)),
        (key::REDEEMED, |b| Redeemed::parse(b).map(drop)),
        (key::REVOKED, |b| read_times::<1>(Kind::Revoked, b).map(drop)),
        (key::SEEN, |b| read_times::<2>(Kind::Seen, b).map(drop)),
    ];
    let of_groups = agents.map(|prefix| (prefix, (|b| JoinedAgent::parse(b).map(drop)) as Parse));
    let mut found = Vec::new();
    for group in groups {
        let log = catalog.log(*group);
        // Behind a checkpoint nobody else reads the first record, but whoever joins.
        for error in [log.read(LogSeq(0)).await.err(), log.floor().await.err()].into_iter().flatten() {
            match error {
                e if e.is_damage() => found.push(e),
                e => return Err(e),
            }
        }
    }
    for (prefix, parse) in of_groups.chain(of_store.map(|(prefix, parse)| (prefix.to_owned(), parse))) {
        for (key, _) in list_all(&*catalog.store, &prefix).await? {
            match get_optional(&*catalog.store, &key, SMALL).await {
                Ok(None) => {}
                Ok(Some(bytes)) => found.extend(parse(&bytes).map_err(ReadError::damaged(&key)).err()),
                Err(e) => match ReadError::from(e) {
                    e if e.is_damage() => found.push(e),
                    e => return Err(e),
                },
            }
        }
    }
    Ok(found)
}
