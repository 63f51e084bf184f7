use super::*;

const MIB: f64 = (1 << 20) as f64;

/// Ten intervals of 15 s with 160 blocks of 64 KiB each, that compress to a half; a link of 10 MiB/s.
fn given() -> Given {
    let load = Load { seconds: 15.0, blocks: 160.0, bytes: 10.0 * MIB };
    let second = Load { seconds: 1.0, blocks: 80.0, bytes: 5.0 * MIB };
    Given {
        every: 15.0,
        keep: MONTH,
        changes: Together {
            intervals: vec![load; 10],
            seconds: vec![second; 150],
            whole: Load { seconds: 150.0, blocks: 320.0, bytes: 20.0 * MIB },
        },
        stored_share: 0.5,
        length: 1024.0 * MIB,
        data_blocks: 8192.0,
        data: Estimate { value: 512.0 * MIB, margin: 0.0 },
        stored: Estimate { value: 256.0 * MIB, margin: 25.6 * MIB },
        read: 1000.0 * MIB,
        hash: 2000.0 * MIB,
        compress: 400.0 * MIB,
        scanned: 0.0,
        link: Some(Link { round_trip: 0.1, rate: 10.0 * MIB }),
        put_price: Some(0.005),
        month_price: Some(0.02),
    }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= b.abs() * 1e-3
}

#[test]
fn the_rpo_is_an_interval_and_a_round() {
    let f = forecast(&given());
    let asked = f.policies.iter().find(|p| p.every == 15.0).expect("the policy asked for");
    // 5 MiB and 160 headers over 10 MiB/s, three round trips, the commit.
    let round = (5.0 * MIB + 160.0 * 64.0) / (10.0 * MIB) + 0.3 + COMMIT;
    let [median, peak] = asked.rpo.expect("there is a link");
    assert!(near(median, 15.0 + round) && near(peak, median), "{asked:?}, {round}");
    assert_eq!(asked.keeps_up, Some(true));
    assert!(near(asked.needed, (5.0 * MIB + 160.0 * 64.0) / 15.0), "{asked:?}");
}

#[test]
fn a_second_does_not_fit_where_fifteen_do() {
    let mut slow = given();
    slow.link = Some(Link { round_trip: 0.1, rate: 2.0 * MIB });
    let f = forecast(&slow);
    let verdicts: Vec<_> = f.policies.iter().map(|p| (p.every, p.keeps_up)).collect();
    assert_eq!(verdicts, [(1.0, Some(false)), (15.0, Some(true)), (150.0, Some(true))]);
    // It comes as often as it can: the age is two rounds.
    let [round, _] = f.policies[0].round.expect("a link");
    let [rpo, _] = f.policies[0].rpo.expect("a link");
    assert!(round > 1.0 && near(rpo, 2.0 * round), "{f:?}");
    slow.link = Some(Link { round_trip: 0.1, rate: 0.1 * MIB });
    assert!(forecast(&slow).policies.iter().any(|p| p.every == 15.0 && p.keeps_up == Some(false)), "5 MiB in 15 s");
}

#[test]
fn looking_for_changes_takes_its_time_without_hints() {
    let mut read = given();
    read.scanned = read.length;
    let [with, _] = forecast(&given()).policies[1].rpo.expect("a link");
    let [without, _] = forecast(&read).policies[1].rpo.expect("a link");
    assert!(near(without - with, 1024.0 / 1000.0), "1 GiB at 1,000 MiB/s: {with} {without}");
    assert!(forecast(&read).sustainable < forecast(&given()).sustainable);
}

#[test]
fn what_takes_the_time_of_a_first_sync_and_a_restore() {
    let f = forecast(&given());
    assert_eq!((f.first_sync_limit, f.limit), (Limit::Link, Some(Limit::Link)));
    assert!(near(f.first_sync.value, 25.6 + 0.3 + COMMIT) && near(f.first_sync.margin, 2.56), "{f:?}");
    // Fetched while it is written, then read back.
    assert!(near(f.restore.value, 25.6 + 0.512), "{f:?}");
    let fast = Given { link: Some(Link { round_trip: 0.0, rate: 1e12 }), ..given() };
    let f = forecast(&fast);
    // 512 MiB hashed and compressed at 400, the other 512 hashed at 2,000 MiB/s.
    assert_eq!(f.first_sync_limit, Limit::Cpu);
    assert!(near(f.first_sync.value, 1.28 + 0.256 + COMMIT), "{f:?}");
    let disk = Given { read: 10.0 * MIB, ..fast };
    assert_eq!((forecast(&disk).first_sync_limit, forecast(&disk).limit), (Limit::Disk, Some(Limit::Disk)));
    let none = Given { link: None, ..given() };
    let f = forecast(&none);
    assert_eq!((f.sustainable, f.policies[0].rpo, f.policies[0].keeps_up), (None, None, None));
    assert!(near(f.first_sync.value, 1.536), "{f:?}");
}

#[test]
fn the_sustainable_rate_is_what_the_rest_of_the_interval_carries() {
    let f = forecast(&given());
    // Of a changed byte 0.5 and a share of a header are sent.
    let share = (0.5 * 20.0 * MIB + 320.0 * 64.0) / (20.0 * MIB);
    let want = 10.0 * MIB / share * (15.0 - 0.3 - COMMIT) / 15.0;
    assert!(near(f.sustainable.expect("a link"), want), "{f:?} {want}");
}

#[test]
fn requests_are_counted_by_what_a_point_is_made_of() {
    let f = forecast(&given());
    let r = f.requests;
    assert_eq!(r.points_per_month, 172_800.0, "each 15 s for 30 days");
    // 5 MiB a point: one segment each; a map for 64 of them, a larger one for 16 maps.
    assert_eq!((r.log, r.segments), (172_800.0, 172_800.0));
    assert!(near(r.maps, 172_800.0 / 64.0 * (1.0 + 1.0 / 16.0) + 168.75), "{r:?}");
    assert_eq!(r.hints, 86_400.0 + 43_200.0);
    assert_eq!(r.puts_per_month, r.log + r.segments + r.maps + r.hints);
    assert_eq!(r.first_sync_puts, 16.0 + 1.0 + 2.0);
    assert_eq!(r.restore_gets, 64.0 + 8.0 + 8.0);
    // Small points lie in their log record, an idle volume has one an hour.
    let mut small = given();
    small.changes.intervals = vec![Load { seconds: 15.0, blocks: 1.0, bytes: MIB / 16.0 }; 4];
    assert_eq!(forecast(&small).requests.segments, 0.0);
    small.changes.intervals = vec![Load::default(); 4];
    let idle = forecast(&small).requests;
    assert_eq!((idle.points_per_month, idle.segments), (720.0, 0.0));
}

#[test]
fn everything_stays_since_nothing_is_pruned() {
    let f = forecast(&given());
    let per_point = 5.0 * MIB + 160.0 * (64.0 + 64.0 + 72.0) + 2_600.0;
    assert!(near(f.storage.per_day, per_point * 86_400.0 / 15.0), "{:?} {per_point}", f.storage);
    assert!(near(f.storage.after_keep, f.storage.first.value + 30.0 * f.storage.per_day));
    let cost = f.cost.expect("prices were given");
    assert!(near(cost.puts.expect("a price"), f.requests.puts_per_month * 0.000_005));
    assert!(near(cost.storage.expect("a price"), f.storage.after_keep * 0.02e-9));
    assert_eq!(forecast(&Given { put_price: None, month_price: None, ..given() }).cost, None);
}

#[test]
fn nothing_known_is_no_reason_to_divide_by_it() {
    let f = forecast(&Given {
        every: 15.0,
        keep: 1.0,
        link: Some(Link { round_trip: 0.0, rate: 0.0 }),
        ..Given::default()
    });
    let text = format!("{f:?}");
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
}
