//! Rounds without an agent and without a network.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_protocol::consistency::Consistency;
use backhaul_protocol::geometry::Geometry;
use backhaul_protocol::ids::{AgentId, Generation, Incarnation, LogSeq, StateId, VolumeSlot};
use backhaul_protocol::session::sink::{Peer, Sink};
use backhaul_protocol::store::log::{Body, MachineId, PromoteBody, UnixMillis};
use backhaul_protocol::wire::message::{Open, OpenVolume, Reason, VolumesChanged};
use tokio::sync::watch;

use super::{GroupState, LATE, Late, wait_for};
use crate::fold::FoldTarget;
use crate::ingest::Progress;
use crate::limits::Limits;
use crate::object_ids::IdSource;
use crate::store::fault::{Fault, FaultStore, When};
use crate::store::mem::MemStore;
use crate::store::{Kind, Verb};
use crate::testing::{TestGroup, noise};

const BLOCK: u32 = 16 << 10;

/// Of a point whose index is damaged nobody may believe the digest, and an unchanged volume is no reason to leave it so.
#[tokio::test]
async fn a_damaged_index_is_compared_anew_and_replaced() {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let bytes = noise(64 * BLOCK as usize, 1);
    let volumes = [("disk", BLOCK, &*bytes)];
    group.commit(&volumes).await;
    let opened = group.reopened(&volumes).await;
    assert!(opened.volumes[0].digest.is_some() && opened.volumes_changed == VolumesChanged::No);
    let key = store.objects().into_keys().find(|k| k.as_str().contains("/segments/")).expect("a segment");
    store.tamper(&key, None);
    let opened = group.reopened(&volumes).await;
    assert!(opened.volumes[0].digest.is_none() && opened.volumes_changed == VolumesChanged::Yes);
}

/// A minute is 50 ms here.
const SOON: Late = Late { next: Duration::from_millis(50), all: Duration::from_millis(250) };

#[tokio::test]
async fn a_commit_does_not_wait_for_ever_for_records_that_trickle_in() {
    let progress = watch::Sender::new(Progress::default());
    let waiting = tokio::spawn(wait_for(progress.subscribe(), 1000, SOON));
    let began = Instant::now();
    while !waiting.is_finished() {
        // Often enough for the patience of one record, too seldom for all of them.
        tokio::time::sleep(SOON.next / 5).await;
        progress.send_modify(|p| p.records += 1);
        assert!(began.elapsed() < 4 * SOON.all, "it waits on and on");
    }
    let refused = waiting.await.expect("no panic").expect_err("they never came");
    assert!(!refused.text.is_empty(), "{refused}");
}

#[tokio::test]
async fn a_commit_waits_for_records_that_are_on_their_way_and_no_others() {
    let progress = watch::Sender::new(Progress::default());
    let waiting = tokio::spawn(wait_for(progress.subscribe(), 3, LATE));
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        progress.send_modify(|p| p.records += 1);
    }
    waiting.await.expect("no panic").expect("all came");
    // And not at all for what can't be.
    for records in [1 << 20, u64::MAX] {
        let refused = tokio::time::timeout(SOON.all, wait_for(progress.subscribe(), records, LATE)).await;
        refused.expect("at once").expect_err("more than can be on their way");
    }
    let refused = wait_for(progress.subscribe(), 4, SOON).await.expect_err("it never comes");
    assert_eq!(refused.reason, Reason::Busy, "{refused}");
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
    group.commit(&[("a", BLOCK, &bytes)]).await;
    let maps = || {
        let puts = store.trace();
        puts.iter().filter(|s| s.verb == Verb::PutNew && s.key.contains("/maps/")).count()
    };
    // Until the point would not be within its limits: that one folds.
    for point in 2.. {
        assert!(point < 100, "it never folds");
        bytes[point * 18_000..][..2000].copy_from_slice(&noise(2000, point as u64));
        let before = maps();
        store.add(When::verb(Verb::PutNew).key("/log/").times(1), Fault::Before(Kind::Unavailable));
        let failed = group.try_commit_as(Consistency::Crash, &[("a", BLOCK, &bytes)]).await;
        failed.expect_err("the record is not stored");
        store.heal();
        if maps() > before {
            break;
        }
        group.state.forget();
        group.commit(&[("a", BLOCK, &bytes)]).await;
    }
    group.state.forget();
    let known = group.state.refresh().await.expect("readable");
    assert!(known.draft.deltas.is_empty(), "{:?}", known.draft.deltas);
}

/// What a receiver remembers is no excuse: the log went on, and was pruned beyond the record after the one it knows.
#[tokio::test]
async fn a_log_that_was_pruned_meanwhile_is_read_anew() {
    let mut group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
    group.commit(&[("a", BLOCK, &noise(100_000, 0))]).await;
    let mut slept = GroupState::new(group.state.log().clone(), None);
    assert_eq!(slept.refresh().await.expect("readable").head.record.seq, LogSeq(1));
    for i in 1..7 {
        group.commit(&[("a", BLOCK, &noise(100_000, i))]).await;
    }
    group.prune(LogSeq(6)).await;
    assert_eq!(slept.refresh().await.expect("readable").head.record.seq, LogSeq(7));
}

/// Whatever the receiver's clock does: points are never older than those before them.
#[tokio::test]
async fn a_clock_that_goes_backwards_makes_no_point_older_than_the_one_before() {
    let mut group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
    let mut last = UnixMillis(0);
    for (i, now) in [1_700_000_000_000, 1_600_000_000_000, -5, 0, i64::MIN, 1_700_000_000_001].into_iter().enumerate() {
        group.now = UnixMillis(now);
        let seq = group.commit(&[("a", BLOCK, &noise(100_000, i as u64))]).await;
        let (record, _) = group.state.log().read(seq).await.expect("readable").expect("it is there");
        assert!(record.time >= last, "{:?} after {last:?}", record.time);
        last = record.time;
    }
    assert!(last >= UnixMillis(1_700_000_000_001));
    let points = group.state.log().history().await.expect("readable").points;
    assert!(points.is_sorted_by_key(|p| p.time));
}

/// A draft is opened without looking at its entries: there may be 20 GB of them, and an agent waits.
#[tokio::test]
async fn a_draft_is_found_again_without_reading_its_pages() {
    let store = Arc::new(FaultStore::new(MemStore::new(), 1));
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let page = BLOCK as usize * 1024;
    let mut bytes = vec![0; 6 * page];
    for at in (0..6).map(|i| i * page + 5) {
        bytes[at..at + 200_000].copy_from_slice(&noise(200_000, at as u64));
    }
    group.leave_draft(&[("a", BLOCK, &bytes)]).await;
    let (store_of, keys) = (group.state.log().store().clone(), group.state.log().keys());
    let known = group.state.known.as_mut().expect("just used");
    let exact = known.draft.max_capture;
    let geometry = Geometry::new(BLOCK, bytes.len() as u64).expect("legal");
    let volumes = vec![(VolumeSlot(0), geometry)];
    let target = FoldTarget { store: store_of, keys, binding: known.draft.binding, volumes, limits: Limits::default() };
    let mut ids = IdSource::new(LogSeq(0), Generation(1), 77);
    known.draft.fold(&target, &mut ids).await.expect("it folds");
    let pages = known.draft.pages().await.expect("readable");
    group.state.forget();
    let before = store.trace().len();
    let known = group.state.refresh().await.expect("readable");
    let trace = store.trace();
    let reads = trace[before..].iter().filter(|s| s.verb != Verb::List && s.key.contains("/maps/")).count();
    assert_eq!(known.draft.deltas.len(), 1);
    assert!(reads <= 3, "head, rows and reach, and no page: {:?}", &trace[before..]);
    assert!(known.draft.max_capture >= exact && known.end_capture > known.draft.max_capture);
    assert_eq!(known.draft.pages().await.expect("readable"), pages);
}

/// Whom the operator made the writer may have been restored from an old image, list of volumes and all; nobody else.
#[tokio::test]
async fn an_adopted_agent_may_come_with_an_older_list_of_volumes() {
    let mut group = TestGroup::new(Arc::new(MemStore::new()), 1 << 20).await;
    group.commit(&[("a", BLOCK, &noise(40 * BLOCK as usize, 1))]).await;
    let (mut head, _) = group.state.log().head().await.expect("readable");
    let (_, point) = head.point.as_mut().expect("a point");
    point.volumes[0].incarnation = Incarnation(5);
    let (agent, machine, nonces) = (point.agent, point.machine, vec![head.record.nonce]);
    let held = head.volumes()[0].clone();
    let peer = Peer { agent, joined_machine: machine };
    let shorter = Geometry::new(BLOCK, 30 * u64::from(BLOCK)).expect("legal");
    let mut promoted = head.clone();
    promoted.record.body = Body::Promote(PromoteBody { agent });
    for (incarnation, geometry, is_older) in [
        (Incarnation(5), held.geometry, false),
        (Incarnation(6), shorter, false),
        (Incarnation(4), held.geometry, true),
        (Incarnation(5), shorter, true),
        (Incarnation(3), shorter, true),
    ] {
        let offer = OpenVolume { id: held.id, name: held.name.clone(), incarnation, geometry };
        let (state, nonces) = (StateId([1; 16]), nonces.clone());
        let open = Open { state, nonces, machine, high_water: LogSeq(0), volumes: vec![offer] };
        let refused = Sink::new(peer).open(&head, &open).err().map(|refused| refused.reason);
        assert_eq!(refused, is_older.then_some(Reason::Volume), "{incarnation:?} {geometry:?}");
        let taken = Sink::new(peer).open(&promoted, &open).expect("the operator has named this agent");
        assert_eq!(taken.volumes[0].slot, held.slot, "the same volume, in the same place");
        let whole = geometry == held.geometry;
        assert_eq!(taken.volumes[0].head_digest.is_some(), whole, "of another size everything is compared");
        let other = Peer { agent: AgentId([77; 16]), joined_machine: machine };
        let machine = MachineId([1; 32]);
        let refused = Sink::new(other).open(&promoted, &Open { machine, ..open }).expect_err("nobody else");
        assert_eq!(refused.reason, Reason::Diverged);
    }
}
