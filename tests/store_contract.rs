//! One contract, every backend: a folder, memory, a bucket of the server in `support/s3.rs`, and any other bucket that
//! `BACKHAUL_TEST_S3_URL` names (with credentials in the environment). Below the contract is what only a bucket can do
//! wrong, through the real SDK.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_protocol::store::key::ObjectKey;
use backhaul_receiver::store::dir::DirStore;
use backhaul_receiver::store::fault::{Fault, FaultStore, When};
use backhaul_receiver::store::mem::MemStore;
use backhaul_receiver::store::probe::{ConditionalPut, probe};
use backhaul_receiver::store::retry::Retrying;
use backhaul_receiver::store::s3::{Credentials, S3Store};
use backhaul_receiver::store::{
    Kind, MissingRoot, ObjectStore, RetrySettings, S3Settings, StoreError, StoreSettings, StoreUrl, Verb, open, open_s3,
};
use backhaul_tests::faults::{HttpFault, Rule};
use backhaul_tests::s3::{Conditional, TestS3};
use bytes::Bytes;
use tokio::task::JoinSet;

fn key(text: &str) -> ObjectKey {
    ObjectKey::parse(text).unwrap()
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Kind {
    result.expect_err("this must fail").kind()
}

async fn names(store: &dyn ObjectStore, prefix: &str) -> Vec<String> {
    store.list(prefix, None, 10_000).await.unwrap().into_iter().map(|(key, _)| key.to_string()).collect()
}

/// Past the capture of the test harness: a test that did not run must not look like one that passed.
fn skipped(what: &str) {
    let _ = std::io::stderr().write_all(format!("SKIPPED: {what}\n").as_bytes());
}

mod contract {
    use super::*;

    pub async fn put_new_creates_once(store: Arc<dyn ObjectStore>) {
        let a = key("groups/a/log/00000000000000000001");
        assert_eq!(kind(store.get(&a, 10).await), Kind::NotFound);
        store.put_new(&a, bytes("first")).await.unwrap();
        let error = store.put_new(&a, bytes("second")).await.unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (Kind::Exists, false), "{error}");
        assert!(error.to_string().contains(a.as_str()), "the error names the object: {error}");
        assert_eq!(store.get(&a, 10).await.unwrap(), "first");
    }

    pub async fn sixteen_writers_have_one_winner(store: Arc<dyn ObjectStore>) {
        for round in 0..10 {
            // New folders too: making them is part of the race.
            let key = key(&format!("race/{round}/record"));
            let mut writers = JoinSet::new();
            for writer in 0..16 {
                let (store, key) = (Arc::clone(&store), key.clone());
                let body = Bytes::from(format!("{writer:02}").repeat(5000));
                writers.spawn(async move { (body.clone(), store.put_new(&key, body).await) });
            }
            let mut winners = Vec::new();
            for (body, result) in writers.join_all().await {
                match result {
                    Ok(()) => winners.push(body),
                    Err(error) => assert_eq!(error.kind(), Kind::Exists, "{error}"),
                }
            }
            assert_eq!(winners.len(), 1, "round {round}");
            assert_eq!(store.get(&key, 10_000).await.unwrap(), winners[0], "round {round}");
        }
    }

    pub async fn ranges_are_exact_or_errors(store: Arc<dyn ObjectStore>) {
        let a = key("a");
        store.put_new(&a, bytes("0123456789")).await.unwrap();
        for (range, want) in [(0..10, "0123456789"), (0..1, "0"), (3..7, "3456"), (9..10, "9")] {
            assert_eq!(store.get_range(&a, range.clone()).await.unwrap(), want, "{range:?}");
        }
        for range in [0..0, 5..5, 10..10, 99..99] {
            assert_eq!(store.get_range(&a, range.clone()).await.unwrap(), "", "{range:?}");
        }
        // The last ones would take exabytes if anybody believed them.
        for range in [0..11, 9..11, 10..11, 50..60, 0..1 << 62, 5..u64::MAX / 2] {
            let error = store.get_range(&a, range.clone()).await.unwrap_err();
            assert_eq!((error.kind(), error.is_retryable()), (Kind::Corrupt, false), "{range:?}: {error}");
        }
        #[allow(clippy::reversed_empty_ranges, reason = "that is the test")]
        let reversed = store.get_range(&a, 7..3).await;
        assert_eq!(kind(reversed), Kind::Other);
        assert_eq!(kind(store.get_range(&key("b"), 0..1).await), Kind::NotFound);
    }

    pub async fn get_refuses_more_than_max(store: Arc<dyn ObjectStore>) {
        let a = key("a");
        store.put_new(&a, bytes("0123456789")).await.unwrap();
        for max in [10, 11, usize::MAX] {
            assert_eq!(store.get(&a, max).await.unwrap().len(), 10, "{max}");
        }
        for max in [0, 9] {
            let error = store.get(&a, max).await.unwrap_err();
            assert_eq!((error.kind(), error.is_retryable()), (Kind::Corrupt, false), "{max}: {error}");
        }
    }

    pub async fn lists_are_sorted_and_paged(store: Arc<dyn ObjectStore>) {
        // Around "/", which sorts after "-" and "." and before digits: where folders and keys sort apart.
        let mut all: BTreeSet<String> =
            ["a-b/x", "a.b", "a/b", "a0", "ab", "z/a-/1", "z/a/1", "z/a0/1"].map(String::from).into();
        all.extend((0..2500).map(|n| format!("groups/{:03}/log/{:020}", n % 7, n)));
        put_all(&store, &all).await;
        let expected: Vec<_> = all.iter().cloned().collect();
        assert_eq!(names(&*store, "").await, expected);
        for page in [1, 7, 999, 1000, 1001, 2600] {
            let prefix = if page == 1 { "z/" } else { "" };
            let mut found: Vec<ObjectKey> = Vec::new();
            loop {
                let part = store.list(prefix, found.last(), page).await.unwrap();
                assert!(part.len() <= page);
                let end = part.len() < page;
                found.extend(part.into_iter().map(|(key, size)| {
                    assert_eq!(size, key.as_str().len() as u64, "{key}");
                    key
                }));
                if end {
                    break;
                }
            }
            let expected: Vec<_> = expected.iter().filter(|name| name.starts_with(prefix)).cloned().collect();
            assert_eq!(found.iter().map(ObjectKey::to_string).collect::<Vec<_>>(), expected, "pages of {page}");
        }
        // A prefix is text and not a folder.
        assert_eq!(names(&*store, "a").await, ["a-b/x", "a.b", "a/b", "a0", "ab"]);
        assert_eq!(names(&*store, "a/").await, ["a/b"]);
        assert_eq!(names(&*store, "groups/003/log/000000000000000000").await.len(), 14);
        assert_eq!(names(&*store, "nothing/").await, [""; 0]);
        assert_eq!(store.list("", None, 0).await.unwrap(), []);
        // What comes after need not exist, nor have the prefix.
        let after = |after: &'static str, prefix: &'static str| {
            let store = Arc::clone(&store);
            async move { store.list(prefix, Some(&key(after)), 1).await.unwrap().first().map(|(key, _)| key.to_string()) }
        };
        assert_eq!(after("a-c", "").await.as_deref(), Some("a.b"));
        assert_eq!(after("a", "z/").await.as_deref(), Some("z/a-/1"));
        assert_eq!(after("z/b", "a").await, None);
    }

    async fn put_all(store: &Arc<dyn ObjectStore>, names: &BTreeSet<String>) {
        let mut writers = JoinSet::new();
        for name in names.clone() {
            if writers.len() >= 32 {
                writers.join_next().await.unwrap().unwrap();
            }
            let store = Arc::clone(store);
            writers.spawn(async move { store.put_new(&key(&name), Bytes::from(name.into_bytes())).await.unwrap() });
        }
        writers.join_all().await;
    }

    pub async fn empty_objects_are_objects(store: Arc<dyn ObjectStore>) {
        let a = key("a");
        store.put_new(&a, Bytes::new()).await.unwrap();
        assert_eq!(kind(store.put_new(&a, bytes("x")).await), Kind::Exists);
        assert_eq!(store.get(&a, 0).await.unwrap(), "");
        assert_eq!(store.get(&a, 10).await.unwrap(), "");
        assert_eq!(store.list("", None, 10).await.unwrap(), [(a.clone(), 0)]);
        assert_eq!(kind(store.get_range(&a, 0..1).await), Kind::Corrupt);
    }

    pub async fn a_large_object_comes_back(store: Arc<dyn ObjectStore>) {
        let body = noise(16 << 20);
        let a = key("a");
        let start = Instant::now();
        store.put_new(&a, body.clone()).await.unwrap();
        let put = start.elapsed();
        let start = Instant::now();
        assert!(store.get(&a, body.len()).await.unwrap() == body, "16 MiB differ");
        println!("16 MiB, {}: put {put:?}, get {:?}", store.describe(), start.elapsed());
        for start in [0, 1, 65_535, 5 << 20, (16 << 20) - 70_000] {
            let range = start..start + 70_000;
            let part = store.get_range(&a, range.start as u64..range.end as u64).await.unwrap();
            assert!(part == body[range.clone()], "{range:?} differs");
        }
    }

    pub async fn hints_are_replaced(store: Arc<dyn ObjectStore>) {
        let head = key("groups/a/head");
        for body in ["1", "a longer one", "2", ""] {
            store.put_hint(&head, bytes(body)).await.unwrap();
            assert_eq!(store.get(&head, 100).await.unwrap(), body);
        }
        assert_eq!(names(&*store, "").await, ["groups/a/head"]);
    }

    pub async fn hints_are_never_seen_in_part(store: Arc<dyn ObjectStore>) {
        let head = key("head");
        let body = |n: u8| Bytes::from(vec![n; 100_000 + usize::from(n)]);
        store.put_hint(&head, body(0)).await.unwrap();
        let writer = tokio::spawn({
            let (store, head) = (Arc::clone(&store), head.clone());
            async move {
                for n in 0..40 {
                    store.put_hint(&head, body(n)).await.unwrap();
                }
            }
        });
        while !writer.is_finished() {
            let found = store.get(&head, 200_000).await.unwrap();
            assert_eq!(found, body(found[0]));
        }
        writer.await.unwrap();
    }

    pub async fn delete_is_idempotent(store: Arc<dyn ObjectStore>) {
        let (a, b) = (key("x/a"), key("x/b"));
        store.delete(&a).await.unwrap();
        store.put_new(&a, bytes("1")).await.unwrap();
        store.put_new(&b, bytes("2")).await.unwrap();
        store.delete(&a).await.unwrap();
        store.delete(&a).await.unwrap();
        assert_eq!(kind(store.get(&a, 10).await), Kind::NotFound);
        assert_eq!(names(&*store, "").await, ["x/b"]);
        store.put_new(&a, bytes("again")).await.unwrap();
        assert_eq!(store.get(&a, 10).await.unwrap(), "again");
    }

    pub async fn strange_names_are_refused_and_odd_ones_kept(store: Arc<dyn ObjectStore>) {
        let long = key(&format!("a/{}", "b".repeat(256)));
        for error in [
            store.put_new(&long, Bytes::new()).await.unwrap_err(),
            store.put_hint(&long, Bytes::new()).await.unwrap_err(),
            store.get(&long, 1).await.unwrap_err(),
            store.get_range(&long, 0..1).await.unwrap_err(),
            store.delete(&long).await.unwrap_err(),
            store.list("../", None, 1).await.unwrap_err(),
            store.list("/a", None, 1).await.unwrap_err(),
            store.list("a//", None, 1).await.unwrap_err(),
            store.list("A", None, 1).await.unwrap_err(),
        ] {
            assert_eq!((error.kind(), error.is_retryable()), (Kind::Config, false), "{error}");
        }
        let mut odd = vec![".hidden", "tmp/a", "...", "-", "a/b/c/d/e/f/g", "lost.found/_"]
            .into_iter()
            .map(key)
            .collect::<Vec<_>>();
        odd.push(key(&"b".repeat(255)));
        odd.push(key(&format!("{}/{}", "c".repeat(255), "d".repeat(255))));
        for key in &odd {
            store.put_new(key, Bytes::from(key.to_string())).await.unwrap();
        }
        for key in &odd {
            assert_eq!(store.get(key, 600).await.unwrap(), key.as_str());
        }
        odd.sort();
        assert_eq!(store.list("", None, 100).await.unwrap().into_iter().map(|(key, _)| key).collect::<Vec<_>>(), odd);
    }

    pub async fn many_read_at_the_same_time(store: Arc<dyn ObjectStore>) {
        let body = noise(2 << 20);
        let a = key("a");
        store.put_new(&a, body.clone()).await.unwrap();
        let mut readers = JoinSet::new();
        for n in 0..64 {
            let (store, a, body) = (Arc::clone(&store), a.clone(), body.clone());
            readers.spawn(async move {
                let range = n * 30_000..n * 30_000 + 60_000;
                let part = store.get_range(&a, range.start as u64..range.end as u64).await.unwrap();
                assert!(part == body[range.clone()], "{range:?} differs");
            });
        }
        readers.join_all().await;
    }

    pub async fn the_probe_finds_nothing_wrong_and_leaves_nothing(store: Arc<dyn ObjectStore>) {
        store.put_new(&key("format"), bytes("x")).await.unwrap();
        let seen = probe(&store).await.unwrap();
        assert_eq!(seen.conditional_put, ConditionalPut::Atomic, "{seen}");
        assert!(seen.several_receivers() && seen.usable() && seen.list && seen.delete, "{seen}");
        assert_eq!(names(&*store, "").await, ["format"]);
    }

    /// Bytes that look random and are the same every time.
    pub fn noise(len: usize) -> Bytes {
        let mut state = 1_u64;
        let words = (0..len.div_ceil(8)).flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()
        });
        let mut all: Vec<u8> = words.collect();
        all.truncate(len);
        all.into()
    }
}

/// Makes every test of the contract for every backend.
macro_rules! contract {
    ($($test:ident),* $(,)?) => {
        mod dir {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let dir = tempfile::tempdir().unwrap();
                let url = super::StoreUrl::Dir(dir.path().join("store"));
                let settings = super::StoreSettings { missing_root: super::MissingRoot::Create, ..Default::default() };
                super::contract::$test(super::open(&url, &settings).await.unwrap()).await;
            })*
        }
        mod mem {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::contract::$test(std::sync::Arc::new(super::MemStore::new())).await;
            })*
        }
        mod s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let s3 = super::TestS3::start();
                let url = s3.s3_url("some/Prefix");
                let store = super::open_s3(&url, &super::StoreSettings::default(), s3.credentials()).await.unwrap();
                super::contract::$test(store).await;
                assert!(s3.objects().keys().all(|name| name.starts_with("some/Prefix/")));
            })*
        }
        mod other_s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                if let Some(store) = super::other_s3().await {
                    super::contract::$test(std::sync::Arc::clone(&store)).await;
                    super::empty(&*store).await;
                }
            })*
        }
    };
}

contract!(
    put_new_creates_once,
    sixteen_writers_have_one_winner,
    ranges_are_exact_or_errors,
    get_refuses_more_than_max,
    lists_are_sorted_and_paged,
    empty_objects_are_objects,
    a_large_object_comes_back,
    hints_are_replaced,
    hints_are_never_seen_in_part,
    delete_is_idempotent,
    strange_names_are_refused_and_odd_ones_kept,
    many_read_at_the_same_time,
    the_probe_finds_nothing_wrong_and_leaves_nothing,
);

/// A fresh place in the bucket that the environment names.
async fn other_s3() -> Option<Arc<dyn ObjectStore>> {
    let Ok(url) = std::env::var("BACKHAUL_TEST_S3_URL") else {
        skipped("no other S3 server, because BACKHAUL_TEST_S3_URL is not set");
        return None;
    };
    let StoreUrl::S3(mut url) = url.parse().unwrap() else { panic!("BACKHAUL_TEST_S3_URL is not s3://..") };
    let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let fresh = format!("contract-{nanos}-{}", std::process::id());
    url.prefix = if url.prefix.is_empty() { fresh } else { format!("{}/{fresh}", url.prefix) };
    Some(open(&StoreUrl::S3(url), &StoreSettings::default()).await.unwrap())
}

async fn empty(store: &dyn ObjectStore) {
    for (key, _) in store.list("", None, usize::MAX).await.unwrap() {
        store.delete(&key).await.unwrap();
    }
}

mod bucket {
    //! What only a bucket can do wrong: every cell is an HTTP fault through the real SDK.

    use super::*;

    /// Short enough for tests, long enough for a busy machine.
    fn quick() -> StoreSettings {
        let ms = Duration::from_millis;
        let s3 = S3Settings { connect: ms(1000), answer: ms(1500), min_rate: 10_000_000, stall: ms(500) };
        let retry = RetrySettings { first_pause: ms(5), longest_pause: ms(50), total: ms(10_000), seed: None };
        StoreSettings { s3, retry, ..StoreSettings::default() }
    }

    async fn bare(s3: &TestS3) -> S3Store {
        S3Store::connect(&s3.s3_url("p"), &quick().s3, s3.credentials()).await.unwrap()
    }

    async fn retrying(s3: &TestS3) -> Arc<dyn ObjectStore> {
        Arc::new(Retrying::new(bare(s3).await, quick().retry))
    }

    fn puts(s3: &TestS3) -> usize {
        s3.requests().iter().filter(|request| request.method == "PUT").count()
    }

    /// One retry layer: without ours a fault is one request and one error.
    #[tokio::test]
    async fn the_sdk_does_not_retry() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        for fault in
            [HttpFault::Refuse(503, "SlowDown"), HttpFault::Refuse(500, "InternalError"), HttpFault::LostRequest]
        {
            s3.fault(Rule::method("PUT").times(1), fault.clone());
            let before = puts(&s3);
            let error = store.put_new(&key("a"), bytes("x")).await.unwrap_err();
            assert_eq!((error.kind(), error.is_retryable()), (Kind::Unavailable, true), "{fault:?}: {error}");
            assert_eq!(puts(&s3) - before, 1, "{fault:?}");
        }
    }

    /// The requests are what the design says, whatever the SDK's next version likes better.
    #[tokio::test]
    async fn puts_are_conditional_and_carry_a_checksum() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        store.put_new(&key("a"), bytes("x")).await.unwrap();
        store.put_hint(&key("b"), bytes("x")).await.unwrap();
        store.get(&key("a"), 10).await.unwrap();
        let requests = s3.requests();
        for put in &requests[..2] {
            assert!(put.path.starts_with("/backhaul-test/p/"), "path style: {}", put.path);
            assert!(put.headers.contains("x-amz-checksum-crc32c: "), "{}", put.headers);
            assert!(!put.headers.contains("trailer"), "a trailing checksum breaks some servers: {}", put.headers);
            assert!(put.headers.contains("AWS4-HMAC-SHA256"), "{}", put.headers);
        }
        assert!(requests[0].headers.contains("if-none-match: *;"));
        assert!(!requests[1].headers.contains("if-none-match"));
    }

    #[tokio::test]
    async fn passing_faults_are_survived() {
        let refuse = HttpFault::Refuse;
        let faults = [
            refuse(503, "SlowDown"),
            refuse(500, "InternalError"),
            refuse(502, ""),
            refuse(504, ""),
            refuse(429, "TooManyRequests"),
            refuse(400, "RequestTimeout"),
            refuse(409, "ConditionalRequestConflict"),
            refuse(400, "BadDigest"),
            HttpFault::LostRequest,
            HttpFault::LostReply,
        ];
        let s3 = TestS3::start();
        let store = retrying(&s3).await;
        for (n, fault) in faults.iter().enumerate() {
            let a = key(&format!("a{n}"));
            let fail = || s3.fault(Rule::default().times(3), fault.clone());
            fail();
            store.put_new(&a, bytes("body")).await.unwrap_or_else(|e| panic!("put_new, {fault:?}: {e}"));
            fail();
            assert_eq!(store.get(&a, 10).await.unwrap(), "body", "{fault:?}");
            fail();
            assert_eq!(store.get_range(&a, 1..3).await.unwrap(), "od", "{fault:?}");
            fail();
            assert_eq!(store.list("a", None, 100).await.unwrap().len(), n + 1, "{fault:?}");
            fail();
            store.put_hint(&key("head"), bytes("hint")).await.unwrap_or_else(|e| panic!("put_hint, {fault:?}: {e}"));
            fail();
            store.delete(&key("nothing")).await.unwrap_or_else(|e| panic!("delete, {fault:?}: {e}"));
        }
        assert_eq!(s3.objects().len(), faults.len() + 1);
    }

    /// Requests that are done and never answered, one of each verb at the same time.
    #[tokio::test]
    async fn silence_is_survived() {
        let s3 = TestS3::start();
        let store = retrying(&s3).await;
        let (a, b, head, gone) = (key("a"), key("b"), key("head"), key("gone"));
        store.put_new(&a, bytes("body")).await.unwrap();
        store.put_new(&gone, bytes("body")).await.unwrap();
        s3.fault(Rule::default().times(6), HttpFault::Silent);
        let (put, hint, get, range, list, delete) = tokio::join!(
            store.put_new(&b, bytes("ours")),
            store.put_hint(&head, bytes("hint")),
            store.get(&a, 10),
            store.get_range(&a, 1..3),
            store.list("a", None, 10),
            store.delete(&gone),
        );
        put.unwrap();
        hint.unwrap();
        delete.unwrap();
        assert_eq!((get.unwrap(), range.unwrap(), list.unwrap().len()), (bytes("body"), bytes("od"), 1));
        assert_eq!(s3.objects().into_keys().collect::<Vec<_>>(), ["p/a", "p/b", "p/head"]);
    }

    /// F16: our own lost success is success, somebody else's is not.
    #[tokio::test]
    async fn a_lost_reply_is_told_from_a_lost_race() {
        let s3 = TestS3::start();
        let store = retrying(&s3).await;
        s3.fault(Rule::method("PUT").times(1), HttpFault::LostReply);
        store.put_new(&key("ours"), bytes("our commit id")).await.unwrap();
        assert_eq!(s3.objects()["p/ours"], "our commit id");
        // The request never arrives, and before the next one somebody else writes.
        for theirs in ["their commit id", "a longer record of theirs", "short", ""] {
            s3.tamper("p/theirs", Some(bytes(theirs)));
            s3.fault(Rule::method("PUT").times(1), HttpFault::LostRequest);
            assert_eq!(kind(store.put_new(&key("theirs"), bytes("our commit id")).await), Kind::Exists, "{theirs}");
            assert_eq!(s3.objects()["p/theirs"], theirs);
        }
        // Without a failure before it, Exists is Exists, even of equal bytes: nobody reads back for nothing.
        let gets = || s3.requests().iter().filter(|request| request.method == "GET").count();
        let before = gets();
        assert_eq!(kind(store.put_new(&key("ours"), bytes("our commit id")).await), Kind::Exists);
        assert_eq!(gets(), before);
    }

    #[tokio::test]
    async fn broken_bodies_are_read_again() {
        let s3 = TestS3::start();
        let store = retrying(&s3).await;
        let body = contract::noise(1 << 20);
        let a = key("a");
        store.put_new(&a, body.clone()).await.unwrap();
        for fault in [HttpFault::Cut(0), HttpFault::Cut(1000), HttpFault::Cut((1 << 20) - 1), HttpFault::Stall(1000)] {
            s3.fault(Rule::method("GET").times(1), fault.clone());
            assert!(store.get(&a, 2 << 20).await.unwrap() == body, "{fault:?}");
            s3.fault(Rule::method("GET").times(1), fault.clone());
            assert!(store.get_range(&a, 0..1 << 20).await.unwrap() == body, "{fault:?}");
        }
        // The checksum of the PUT comes back with a whole object and is compared.
        s3.fault(Rule::method("GET").times(1), HttpFault::Flip(777));
        assert!(store.get(&a, 2 << 20).await.unwrap() == body);
        let error = {
            s3.fault(Rule::method("GET").times(1), HttpFault::Flip(777));
            bare(&s3).await.get(&a, 2 << 20).await.unwrap_err()
        };
        assert!(error.to_string().contains("damaged"), "{error}");
    }

    /// 0 B/s at each stage ends in an error within the limits, and no earlier than they say.
    #[tokio::test]
    async fn stalls_end() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        store.put_new(&key("a"), contract::noise(1 << 20)).await.unwrap();
        // Each limit in turn is far below the others, so that it is this one that ends it.
        let (short, long) = (Duration::from_millis(500), Duration::from_secs(20));
        for (fault, answer, stall) in [(HttpFault::Silent, short, long), (HttpFault::Stall(5), long, short)] {
            let settings = S3Settings { answer, stall, ..quick().s3 };
            let store = S3Store::connect(&s3.s3_url("p"), &settings, s3.credentials()).await.unwrap();
            s3.fault(Rule::default().times(1), fault.clone());
            let start = Instant::now();
            let error = store.get(&key("a"), 2 << 20).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{fault:?}: {error}");
            let took = start.elapsed();
            println!("{fault:?} took {took:?}: {error}");
            assert!(took > short.mul_f32(0.9) && took < long / 2, "{fault:?} took {took:?}");
        }
        // A body that drips is ended by the limit of its size, whatever the stall limit thinks.
        let settings = S3Settings { answer: short, stall: long, ..quick().s3 };
        let slow = S3Store::connect(&s3.s3_url("p"), &settings, s3.credentials()).await.unwrap();
        s3.fault(Rule::default().times(1), HttpFault::Stall(5));
        let start = Instant::now();
        assert_eq!(kind(slow.get_range(&key("a"), 0..1 << 20).await), Kind::Unavailable);
        assert!(start.elapsed() < long / 2, "{:?}", start.elapsed());
        // A server that accepts and never speaks, for as long as there are attempts.
        s3.fault(Rule::default(), HttpFault::Silent);
        let retry = RetrySettings { total: Duration::from_secs(2), ..quick().retry };
        let store = Retrying::new(store, retry);
        let start = Instant::now();
        let error = store.put_new(&key("b"), bytes("x")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_server_that_ignores_ranges_is_found_out() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        store.put_new(&key("a"), bytes("0123456789")).await.unwrap();
        s3.fault(Rule::method("GET"), HttpFault::NoRanges);
        assert_eq!(kind(store.get_range(&key("a"), 2..4).await), Kind::Config);
    }

    /// I3: a proxy or a sign-in page says 200 to everything, and nothing is written.
    #[tokio::test]
    async fn an_answer_that_is_not_that_of_a_store_is_none() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        store.put_new(&key("a"), bytes("body")).await.unwrap();
        s3.fault(Rule::default(), HttpFault::Say(200, "<html>Please sign in.</html>"));
        let (a, b) = (key("a"), key("b"));
        for error in [
            store.put_new(&b, bytes("x")).await.expect_err("nothing was written"),
            store.put_hint(&b, bytes("x")).await.expect_err("nothing was written"),
            store.get(&a, 1000).await.expect_err("these are other bytes"),
            store.get_range(&a, 0..1).await.expect_err("these are other bytes"),
            store.list("", None, 10).await.expect_err("this is no list"),
        ] {
            assert_eq!((error.kind(), error.is_retryable()), (Kind::Unavailable, true), "{error}");
            assert!(error.to_string().contains("right endpoint"), "{error}");
        }
    }

    #[tokio::test]
    async fn names_that_are_not_ours_are_not_listed() {
        let s3 = TestS3::start();
        let store = bare(&s3).await;
        store.put_new(&key("b"), bytes("1")).await.unwrap();
        for name in ["p/", "p/A", "p/a b", "p/ä", "q/c", "p", "p/a/", "p/c//d"] {
            s3.tamper(name, Some(Bytes::new()));
        }
        assert_eq!(names(&store, "").await, ["b"]);
        assert_eq!(store.list("", None, 1).await.unwrap().len(), 1, "a page full of strangers is not the end");
    }

    /// Each message says what to do.
    #[tokio::test]
    async fn refusals_say_what_to_do() {
        let s3 = TestS3::start();
        let settings = quick();
        let open = |url, credentials| {
            let settings = settings.clone();
            async move { open_s3(&url, &settings, credentials).await.expect_err("must be refused") }
        };
        let check = |error: StoreError, kind: Kind, words: &str| {
            let chain =
                format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
            println!("{chain}");
            assert_eq!(error.kind(), kind, "{chain}");
            assert!(chain.contains(words), "{chain}");
            assert!(!chain.contains(backhaul_tests::s3::SECRET_KEY), "{chain}");
        };
        let other = |access_key: &str, secret_key: &str| Credentials::Static {
            access_key: access_key.to_owned(),
            secret_key: secret_key.to_owned(),
        };
        let mut url = s3.s3_url("p");
        check(open(url.clone(), other("AKIANOBODY", "x")).await, Kind::Permission, "AWS_ACCESS_KEY_ID");
        check(
            open(url.clone(), other(backhaul_tests::s3::ACCESS_KEY, "x")).await,
            Kind::Permission,
            "AWS_SECRET_ACCESS_KEY",
        );
        url.bucket = "no-such-bucket".to_owned();
        check(open(url.clone(), s3.credentials()).await, Kind::Config, "no bucket no-such-bucket");
        for (fault, kind, words) in [
            (HttpFault::Refuse(403, "AccessDenied"), Kind::Permission, "s3:ListBucket"),
            (HttpFault::Refuse(403, "RequestTimeTooSkewed"), Kind::Config, "clock"),
            (HttpFault::WrongRegion("eu-north-1"), Kind::Config, "?region=eu-north-1"),
            (HttpFault::Refuse(400, "ExpiredToken"), Kind::Permission, "session token"),
            (HttpFault::Refuse(507, "XMinioStorageFull"), Kind::NoSpace, "no space"),
            (HttpFault::Refuse(501, "NotImplemented"), Kind::Config, "cannot do this"),
        ] {
            s3.fault(Rule::default().times(1), fault);
            check(open(s3.s3_url("p"), s3.credentials()).await, kind, words);
        }
        let nowhere = |endpoint: &str| {
            let mut url = s3.s3_url("p");
            url.endpoint = Some(endpoint.to_owned());
            let credentials = s3.credentials();
            async move {
                let store = S3Store::connect(&url, &S3Settings::default(), credentials).await.unwrap();
                store.list("", None, 1).await.expect_err("must be refused")
            }
        };
        check(nowhere("http://127.0.0.1:1").await, Kind::Unavailable, "nothing listens");
        // Where there is no DNS at all this takes its time and has other words.
        let unknown = nowhere("http://no-such-host.invalid").await;
        let words = if unknown.to_string().contains("DNS") { "is not known" } else { "answer" };
        check(unknown, Kind::Unavailable, words);
        check(nowhere(&s3.endpoint().replace("http:", "https:")).await, Kind::Unavailable, "https or http");
    }
}

mod probing {
    use super::*;

    async fn seen(store: impl ObjectStore + 'static) -> backhaul_receiver::store::probe::Capabilities {
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        let seen = probe(&store).await.unwrap();
        println!("{seen}");
        seen
    }

    #[tokio::test]
    async fn a_racy_server_is_found_out() {
        for pause in [Duration::from_millis(1), Duration::from_millis(20)] {
            let s3 = TestS3::with(Conditional::Racy(pause));
            let store = open_s3(&s3.s3_url("p"), &StoreSettings::default(), s3.credentials()).await.unwrap();
            let seen = seen(store).await;
            assert!(matches!(seen.conditional_put, ConditionalPut::Racy { winners: 2.. }), "{seen}");
            assert!(!seen.several_receivers() && seen.usable());
            assert!(seen.to_string().contains("Only one receiver"), "{seen}");
            assert!(s3.objects().is_empty());
        }
    }

    #[tokio::test]
    async fn a_server_that_ignores_the_condition_is_found_out() {
        let s3 = TestS3::with(Conditional::Ignored);
        let store = open_s3(&s3.s3_url("p"), &StoreSettings::default(), s3.credentials()).await.unwrap();
        let seen = seen(store).await;
        assert_eq!(seen.conditional_put, ConditionalPut::Ignored, "{seen}");
        assert!(seen.ranges && seen.list && seen.usable() && !seen.several_receivers(), "{seen}");
        assert!(s3.objects().is_empty());
    }

    #[tokio::test]
    async fn lies_of_a_store_are_found_out() {
        let faulty = |when: When, fault: Fault| {
            let store = FaultStore::new(MemStore::new(), 1);
            store.add(when, fault);
            store
        };
        assert!(!seen(faulty(When::verb(Verb::Get).skip(2).times(1), Fault::Stale)).await.read_after_write);
        assert!(!seen(faulty(When::verb(Verb::Get).skip(2).times(1), Fault::Flip(9))).await.read_after_write);
        assert!(!seen(faulty(When::verb(Verb::GetRange), Fault::Truncate(1))).await.ranges);
        assert!(!seen(faulty(When::verb(Verb::List), Fault::Stale)).await.list);
        // A role that may only append.
        let append_only = seen(faulty(When::verb(Verb::Delete), Fault::Before(Kind::Permission))).await;
        assert!(!append_only.delete && append_only.several_receivers(), "{append_only}");
        // One writer of sixty that wins wrongly is enough.
        let rare = seen(faulty(When::verb(Verb::PutNew).skip(40).times(1), Fault::IgnoreConditional)).await;
        assert_eq!(rare.conditional_put, ConditionalPut::Racy { winners: 2 }, "{rare}");
    }

    #[tokio::test]
    async fn what_says_nothing_about_the_store_is_an_error() {
        let store = FaultStore::new(MemStore::new(), 1);
        store.add(When::verb(Verb::PutNew).skip(20).times(1), Fault::Before(Kind::Unavailable));
        let store = Arc::new(store);
        let as_store: Arc<dyn ObjectStore> = Arc::clone(&store) as _;
        assert_eq!(kind(probe(&as_store).await), Kind::Unavailable);
        assert!(store.inner().objects().is_empty(), "it cleans up all the same");
    }
}

/// F19 on a file system that is really full.
#[tokio::test]
async fn a_full_disk_is_typed_and_leaves_nothing_half() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mounted) = tmpfs(dir.path(), "size=1m") else { return };
    let store = DirStore::open(dir.path(), MissingRoot::Refuse).await.unwrap();
    let body = contract::noise(300_000);
    let mut kept = Vec::new();
    for n in 0..10 {
        let key = key(&format!("folder{n}/object"));
        match store.put_new(&key, body.clone()).await {
            Ok(()) => kept.push(key),
            Err(error) => {
                assert_eq!((error.kind(), error.is_retryable()), (Kind::NoSpace, false), "{error}");
                assert_eq!(kind(store.get(&key, 1 << 20).await), Kind::NotFound);
            }
        }
    }
    assert_eq!(kept.len(), 3, "three fit, seven do not");
    assert_eq!(std::fs::read_dir(dir.path().join("+tmp")).unwrap().count(), 0, "no temp file keeps space");
    for key in &kept {
        assert_eq!(store.get(key, 1 << 20).await.unwrap(), body);
    }
    assert_eq!(names(&store, "").await.len(), 3);
    store.delete(&kept[0]).await.unwrap();
    store.put_new(&key("again"), body).await.unwrap();
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn tmpfs(path: &std::path::Path, options: &str) -> Option<Mounted> {
    let options = std::ffi::CString::new(options).unwrap();
    match rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), options.as_c_str()) {
        Ok(()) => Some(Mounted(path.to_owned())),
        Err(error) => {
            skipped(&format!("a full disk, because mounting a tmpfs needs root: {error}"));
            None
        }
    }
}
