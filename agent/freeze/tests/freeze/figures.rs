//! Not a test: how long a freeze lasts and what asking the helper costs.
//! `cargo nextest run -p backhaul-freeze --run-ignored only figures --no-capture`

use std::time::{Duration, Instant};

use backhaul_freeze::Thawed;

use crate::support::*;

#[test]
#[ignore = "prints figures"]
fn figures() {
    let median = |mut times: Vec<Duration>| {
        times.sort();
        format!("median {:?}, worst {:?}", times[times.len() / 2], times[times.len() - 1])
    };
    for kind in ["ext4", "xfs", "btrfs"] {
        for busy in [false, true] {
            let place = Place::new();
            let one = place.mounted(kind, kind);
            let writers = busy.then(|| Writers::on(one.at()));
            let mut freezer = place.freezer();
            let began = Instant::now();
            let found = freezer.find(&[one.dev()]).expect("found");
            let look = began.elapsed();
            let began = Instant::now();
            let mut prepared = freezer.prepare(found).expect("prepared");
            let prepare = began.elapsed();
            let (mut frozen_for, mut freezes, mut thaws) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..50 {
                prepared.sync(LIMIT).expect("synced");
                let began = Instant::now();
                let frozen = prepared.freeze(LIMIT).expect("frozen");
                freezes.push(began.elapsed());
                let began = Instant::now();
                match frozen.thaw() {
                    Thawed::Held { frozen_for: time } => frozen_for.push(time),
                    broken => panic!("{broken:?}"),
                }
                thaws.push(began.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            println!("{kind}, {}: find {look:?}, prepare {prepare:?}", if busy { "busy" } else { "idle" });
            println!("  first FIFREEZE to last FITHAW: {}", median(frozen_for));
            println!("  call of freeze: {}; call of thaw, with a second look: {}", median(freezes), median(thaws));
            drop(writers);
        }
    }
}
