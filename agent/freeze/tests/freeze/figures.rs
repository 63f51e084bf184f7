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
    let kinds = ["ext4", "xfs", "btrfs"].map(|kind| vec![kind]);
    for kinds in kinds.into_iter().chain([vec!["ext4"; 4], vec!["ext4"; 8]]) {
        for busy in [false, true] {
            let place = Place::new();
            let all: Vec<_> =
                kinds.iter().enumerate().map(|(n, kind)| place.mounted(kind, &format!("{kind}-{n}"))).collect();
            let writers: Vec<_> = all.iter().filter(|_| busy).map(|m| Writers::on(m.at())).collect();
            let devices: Vec<_> = all.iter().map(|m| m.dev()).collect();
            let mut freezer = place.freezer();
            let began = Instant::now();
            let found = freezer.find(&devices).expect("found");
            let look = began.elapsed();
            let began = Instant::now();
            let mut prepared = freezer.prepare(found).expect("prepared");
            println!("{kinds:?}, {}: find {look:?}, prepare {:?}", if busy { "busy" } else { "idle" }, began.elapsed());
            // The kernel's locks are slow to be taken the first time in a while (a grace period of RCU), and quick again.
            for (pause, rounds) in [(500, 10), (2, 50)] {
                let (mut frozen_for, mut freezes, mut thaws) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..rounds {
                    std::thread::sleep(Duration::from_millis(pause));
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
                }
                println!("  every {pause} ms: frozen {}", median(frozen_for));
                println!("    call of freeze: {}; of thaw, with a second look: {}", median(freezes), median(thaws));
            }
            drop(writers);
        }
    }
}
