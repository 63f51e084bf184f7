//! Each byte of a small store flipped in turn: `verify` reports it, or every point is still there and restores byte by
//! byte; no panic, no restore that ends well with other bytes, and what does not need the damaged object restores as
//! before (I8, I9, I19). The store is in `tests/golden/store`, written once and never edited (I21).
//!
//! Read [`every_byte_flipped_is_found_or_harmless`] first; what is in the store is told in `build.rs`.

mod build;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use backhaul_protocol::store::key::ObjectKey;
use bytes::Bytes;

use crate::build::POINTS;
use crate::look::Looker;

/// A restore follows every so many flips that were found; those that were not are all followed by one.
const RESTORED: usize = 29;

/// Every object can be changed in two ways at every byte.
#[derive(Clone, Copy)]
struct Flip<'a> {
    key: &'a ObjectKey,
    at: usize,
    mask: u8,
}

/// Points that can't be restored without each object.
type Needs = BTreeMap<ObjectKey, BTreeSet<u64>>;

#[test]
fn the_golden_store_is_read_as_it_was_written() {
    let objects = build::load();
    let bytes: usize = objects.values().map(Bytes::len).sum();
    println!("{} objects, {bytes} bytes", objects.len());
    assert!(bytes < 40 << 10, "small enough for every byte");
    let looker = Looker::new();
    assert_eq!(looker.found(&objects), Ok(Vec::new()));
    assert_eq!(looker.points(&objects), POINTS);
    for point in POINTS {
        looker.restore(&objects, point).unwrap_or_else(|e| panic!("I21: point {point}: {e}"));
    }
}

#[test]
fn every_byte_flipped_is_found_or_harmless() {
    let objects = build::load();
    let needs = needs(&objects);
    let flips: Vec<Flip> = objects
        .iter()
        .flat_map(|(key, bytes)| {
            (0..bytes.len()).flat_map(move |at| [1 << (at % 8), 0xff].map(|mask| Flip { key, at, mask }))
        })
        .collect();
    let (next, bad, counts) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                let looker = Looker::new();
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(flip) = flips.get(n) else { return };
                    match one(&looker, &objects, &needs, *flip, n) {
                        Ok(what) => *counts.lock().unwrap().entry((kind(flip.key), what)).or_insert(0) += 1,
                        Err(e) => {
                            bad.lock().unwrap().push(format!("{} byte {} ^ {:#x}: {e}", flip.key, flip.at, flip.mask))
                        }
                    }
                }
            });
        }
    });
    let counts = counts.into_inner().unwrap();
    report(&objects, &counts);
    // What no restore needs an agent needs: there is nothing in a store that may be damaged without a word.
    let harmless: Vec<_> = counts.keys().filter(|(_, came)| *came == Came::Harmless).map(|(kind, _)| kind).collect();
    assert!(harmless.is_empty(), "not reported: {harmless:?}");
    let bad = bad.into_inner().unwrap();
    assert!(bad.is_empty(), "{} flips:\n{}", bad.len(), bad[..bad.len().min(40)].join("\n"));
}

/// What came of a flip.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Came {
    Found,
    Harmless,
}

fn one(
    looker: &Looker,
    objects: &BTreeMap<ObjectKey, Bytes>,
    needs: &Needs,
    flip: Flip,
    n: usize,
) -> Result<Came, String> {
    let mut twin = objects.clone();
    let mut bytes = twin[flip.key].to_vec();
    bytes[flip.at] ^= flip.mask;
    twin.insert(flip.key.clone(), bytes.into());
    let found = looker.found(&twin)?;
    if found.is_empty() {
        let points = looker.points(&twin);
        if points != POINTS {
            return Err(format!("nothing is reported, and the points are {points:?}"));
        }
        for point in POINTS {
            looker.restore(&twin, point).map_err(|e| format!("nothing is reported, and point {point}: {e}"))?;
        }
        return Ok(Came::Harmless);
    }
    // What verify names is what must be put back.
    let number = flip.key.as_str().rsplit_once("/log/").and_then(|(_, number)| number.parse::<u64>().ok());
    let by_number = |text: &str| number.is_some_and(|number| text.contains(&format!("record {number}:")));
    if !found.iter().any(|text| text.contains(flip.key.as_str()) || by_number(text)) {
        return Err(format!("I8: it is not named: {found:?}"));
    }
    if n.is_multiple_of(RESTORED) {
        for point in POINTS {
            match looker.restore(&twin, point) {
                // Other bytes would have been an error of its own kind.
                Ok(()) => {}
                Err(e) if e.starts_with("WRONG") || !needs[flip.key].contains(&point) => {
                    return Err(format!("point {point}: {e}"));
                }
                Err(_) => {}
            }
        }
    }
    Ok(Came::Found)
}

/// Which points fail without an object: those that need it.
fn needs(objects: &BTreeMap<ObjectKey, Bytes>) -> Needs {
    let looker = Looker::new();
    let without = |key: &ObjectKey| {
        let mut twin = objects.clone();
        twin.remove(key);
        POINTS.into_iter().filter(|point| looker.restore(&twin, *point).is_err()).collect()
    };
    objects.keys().map(|key| (key.clone(), without(key))).collect()
}

/// What kind of object a key is of: its folder.
fn kind(key: &ObjectKey) -> String {
    let text = key.as_str();
    let parts: Vec<&str> = text.split('/').collect();
    match parts.as_slice() {
        ["groups", _, name] | [name] => (*name).to_owned(),
        ["groups", _, kind, _] | [kind, _] => (*kind).to_owned(),
        _ => text.to_owned(),
    }
}

fn report(objects: &BTreeMap<ObjectKey, Bytes>, counts: &BTreeMap<(String, Came), u64>) {
    let mut text = format!("{:<12}{:>9}{:>9}{:>9}{:>10}\n", "", "objects", "bytes", "found", "harmless");
    for kind_of in objects.keys().map(kind).collect::<BTreeSet<_>>() {
        let own = || objects.iter().filter(|(key, _)| kind(key) == kind_of);
        let count = |came| counts.get(&(kind_of.clone(), came)).copied().unwrap_or(0);
        let bytes: usize = own().map(|(_, b)| b.len()).sum();
        let (found, harmless) = (count(Came::Found), count(Came::Harmless));
        text.push_str(&format!("{kind_of:<12}{:>9}{bytes:>9}{found:>9}{harmless:>10}\n", own().count()));
    }
    println!("{text}");
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/flipped-bytes.txt"), text).expect("there is room");
}
