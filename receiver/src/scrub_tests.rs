//! I8: damage is found, wherever it is, and named.

use bytes::Bytes;

use super::*;
use crate::store::mem::MemStore;
use crate::testing::{TestGroup, noise};

async fn check(group: &TestGroup, share: &str) -> Result<PointReport, FetchError> {
    let scrub = Scrub {
        group: group.name.clone(),
        log: group.catalog.expect_group(&group.name).await?,
        volume: None,
        share: Share::parse(share).expect("right"),
        threads: Arc::new(Semaphore::new(2)),
    };
    let mut progress = backhaul_cli::Output::new(false, true, crate::cmd::meaning).progress(1);
    verify_point(&scrub, PointSpec::Latest, |_, total| progress.phase("", total)).await
}

/// Two points, the second with records inside its log record.
async fn group() -> (Arc<MemStore>, TestGroup, usize) {
    let store = Arc::new(MemStore::new());
    let mut group = TestGroup::new(store.clone(), 1 << 20).await;
    let mut bytes = noise(4 << 20, 1);
    group.commit(&[("disk", 16384, &bytes)]).await;
    bytes[100_000] ^= 1;
    group.commit(&[("disk", 16384, &bytes)]).await;
    (store, group, bytes.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_whole_is_called_so() {
    let (_, group, len) = group().await;
    let report = check(&group, "100%").await.expect("checked");
    assert!(report.damaged.is_empty(), "{:?}", report.damaged);
    assert_eq!((report.point, report.bytes_verified), (2, len as u64));
    assert!(report.volumes[0].digest_matches && report.volumes[0].blocks_read == 256);
    let report = check(&group, "0%").await.expect("checked");
    assert_eq!((report.bytes_verified, report.volumes[0].blocks), (0, 256));
    for _ in 0..20 {
        let report = check(&group, "25%").await.expect("checked");
        assert!((62..=66).contains(&report.volumes[0].blocks_read), "{}", report.volumes[0].blocks_read);
    }
    assert!(Share::parse("101%").is_err() && Share::parse("-1").is_err() && Share::parse("x").is_err());
}

/// Flips a byte of every object, here and there: nothing is passed over, unless no restore of the point needs it.
#[tokio::test(flavor = "multi_thread")]
async fn flipped_bytes_are_found() {
    let (store, group, _) = group().await;
    let mut passed_over = 0;
    for (key, whole) in store.objects() {
        let needed = ["/segments/", "/log/", "/maps/"].iter().any(|part| key.as_str().contains(part));
        if !needed {
            continue;
        }
        for at in (0..whole.len()).step_by(whole.len() / 23 + 1) {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 0x10;
            store.tamper(&key, Some(Bytes::from(bytes)));
            let found = match check(&group, "100%").await {
                Ok(report) => report.damaged.iter().any(|d| d.lost.object == key.as_str()),
                Err(FetchError::Read(e)) => e.is_damage(),
                Err(e) => panic!("{key} at {at}: {e}"),
            };
            // The head of a segment repeats what its reference says; only drafts need it.
            let is_head = key.as_str().contains("/segments/") && at < 160;
            if !found && !is_head {
                passed_over += 1;
            }
        }
        store.tamper(&key, Some(whole));
    }
    // At most the record of a block that the second point has anew.
    assert!(passed_over <= 1, "{passed_over}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_index_is_damage_all_the_same() {
    let (store, group, len) = group().await;
    let key = store.objects().into_keys().find(|k| k.as_str().contains("/segments/")).expect("a segment");
    let mut bytes = store.objects()[&key].to_vec();
    *bytes.last_mut().expect("bytes") ^= 1;
    store.tamper(&key, Some(Bytes::from(bytes)));
    let report = check(&group, "100%").await.expect("checked");
    let [damage] = &report.damaged[..] else { panic!("{:?}", report.damaged) };
    assert_eq!(damage.lost.object, key.as_str());
    assert_eq!(report.bytes_verified, len as u64, "no block is lost");
}
