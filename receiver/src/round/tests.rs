//! Rounds without an agent and without a network.

use std::sync::Arc;
use std::time::Duration;

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::ids::{LogSeq, VolumeSlot};
use backhaul_protocol::wire::message::Reason;
use tokio::sync::watch;

use super::{MAX_WAIT, wait_for};
use crate::ingest::Progress;
use crate::store::fault::{Fault, FaultStore, When};
use crate::store::mem::MemStore;
use crate::store::{Kind, Verb};
use crate::testing::{TestGroup, noise};

const BLOCK: u32 = 16 << 10;

#[tokio::test(start_paused = true)]
async fn a_commit_does_not_wait_for_ever_for_records_that_trickle_in() {
    let progress = watch::Sender::new(Progress::default());
    let waiting = tokio::spawn(wait_for(progress.subscribe(), 1000));
    let began = tokio::time::Instant::now();
    while !waiting.is_finished() {
        // Often enough for the patience of one record, too seldom for all of them.
        tokio::time::sleep(Duration::from_secs(30)).await;
        progress.send_modify(|p| p.records += 1);
        assert!(began.elapsed() < 2 * MAX_WAIT, "it waits on and on");
    }
    let refused = waiting.await.expect("no panic").expect_err("they never came");
    assert_eq!(refused.reason, Reason::Protocol, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_commit_waits_for_records_that_are_on_their_way() {
    let progress = watch::Sender::new(Progress::default());
    let waiting = tokio::spawn(wait_for(progress.subscribe(), 3));
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(20)).await;
        progress.send_modify(|p| p.records += 1);
    }
    waiting.await.expect("no panic").expect("all came");
    // And not at all for what can't be.
    let began = tokio::time::Instant::now();
    for records in [1 << 20, u64::MAX] {
        wait_for(progress.subscribe(), records).await.expect_err("more than can be on their way");
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
}

/// What a draft held of a volume that is not in the point stays in segments of the point: under a slot that nobody
/// else may get.
#[tokio::test]
async fn a_slot_that_only_a_draft_used_is_not_used_again() {
    let mut group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
    let (a, dropped) = (noise(300_000, 1), noise(400_000, 2));
    group.leave_draft(&[("a", BLOCK, &a), ("b", BLOCK, &dropped)]).await;
    group.commit(&[("a", BLOCK, &a)]).await;
    // Zeroes where the dropped volume had data: nothing of them is sent.
    let mut late = noise(400_000, 3);
    late[..200_000].fill(0);
    let seq = group.commit(&[("a", BLOCK, &a), ("c", BLOCK, &late)]).await;
    let (record, _) = group.state.log().read(seq).await.expect("readable").expect("it is there");
    let slots: Vec<VolumeSlot> = record.point().expect("a point").volumes.iter().map(|v| v.slot).collect();
    assert_eq!(slots, [VolumeSlot(0), VolumeSlot(2)]);
}

/// A commit that folds and then fails leaves maps behind. They hold base and draft in one, and must not be taken for
/// the draft.
#[tokio::test]
async fn maps_of_a_commit_that_failed_are_not_taken_for_the_drafts() {
    let store = Arc::new(FaultStore::new(MemStore::new(), 1));
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut bytes = noise(2_000_000, 1);
    for point in 0..64_u64 {
        bytes[(point as usize * 30_000)..][..20_000].copy_from_slice(&noise(20_000, point + 2));
        group.commit(&[("a", BLOCK, &bytes)]).await;
    }
    let maps = |store: &FaultStore<MemStore>| {
        let puts = store.trace();
        puts.iter().filter(|s| s.verb == Verb::PutNew && s.key.contains("/maps/")).count()
    };
    let before = maps(&store);
    bytes[..20_000].copy_from_slice(&noise(20_000, 99));
    store.add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::Before(Kind::Unavailable));
    group.try_commit_as(Consistency::Crash, &[("a", BLOCK, &bytes)]).await.expect_err("the record is not stored");
    assert!(maps(&store) > before, "it folded");
    group.state.forget();
    let known = group.state.refresh().await.expect("readable");
    assert!(known.draft.deltas.is_empty(), "{:?}", known.draft.deltas);
    assert_eq!(known.head.record.seq, LogSeq(64));
}
