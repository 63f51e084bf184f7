//! I7: every kind of write is marked, and nothing else is.

mod support;


use support::*;

#[test]
fn a_direct_write_marks_its_blocks_and_no_others() {
    if !needs_root("a_direct_write_marks_its_blocks_and_no_others") {
        return;
    }
    let (pins, disk) = (Pins::new(), Loop::new(64 << 20));
    let tracked = settled(&pins.open(), &disk.path, 1);
    assert!(tracked.is_clean());
    write_at(&disk.path, 3 * u64::from(BLOCK) - 4096, 8192);
    assert!(!tracked.is_clean());
    let taken = tracked.take().unwrap();
    assert_eq!(taken.ranges().collect::<Vec<_>>(), [2..4]);
    assert!(tracked.is_clean() && tracked.take().unwrap().is_empty());
    assert_eq!(tracked.unsettled(), taken);
}
