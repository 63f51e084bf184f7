//! One cell: a server of its own, one fault, one operation; how it ended, and what is wrong whatever was expected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backhaul_receiver::store::retry::Retrying;
use backhaul_receiver::store::s3::S3Store;
use backhaul_receiver::store::{Kind, ObjectStore, RetrySettings, S3Settings, StoreError, StoreSettings, open_s3};
use backhaul_tests::s3::{SECRET_KEY, TestS3};
use bytes::Bytes;

use crate::operation::{Done, Operation, name_in_bucket};
use crate::table::Row;

/// How long a call is tried.
const TOTAL: Duration = Duration::from_secs(4);
/// What a busy machine may add to it.
const SLACK: Duration = Duration::from_secs(3);

/// How a cell ended.
#[derive(Debug, Clone)]
pub struct Seen {
    /// A word of [`crate::table::WORDS`].
    pub word: &'static str,
    /// What must never be.
    pub wrong: Vec<String>,
    /// The error in words.
    pub said: String,
}

/// The settings of a receiver, all times a hundredth or so of what they are.
fn settings() -> StoreSettings {
    let ms = Duration::from_millis;
    let s3 = S3Settings { connect: ms(1000), answer: ms(1000), min_rate: 10_000_000, stall: ms(400) };
    let retry = RetrySettings { first_pause: ms(5), longest_pause: ms(40), total: TOTAL, seed: Some(1) };
    StoreSettings { s3, retry, ..StoreSettings::default() }
}

pub async fn open(s3: &TestS3) -> Result<Arc<dyn ObjectStore>, StoreError> {
    open_s3(&s3.s3_url("p"), &settings(), s3.credentials()).await
}

/// What `open` gives, without asking the server first.
pub async fn connect(s3: &TestS3) -> Arc<dyn ObjectStore> {
    let store = S3Store::connect(&s3.s3_url("p"), &settings().s3, s3.credentials()).await;
    Arc::new(Retrying::new(store.expect("nothing is asked"), settings().retry))
}

/// A client with so much patience that a busy machine never makes it ask again.
async fn connect_patiently(s3: &TestS3) -> Arc<dyn ObjectStore> {
    let minute = Duration::from_secs(60);
    let patient = S3Settings { connect: minute, answer: minute, min_rate: 1000, stall: minute };
    let store = S3Store::connect(&s3.s3_url("p"), &patient, s3.credentials()).await;
    let retry = RetrySettings { total: minute, ..settings().retry };
    Arc::new(Retrying::new(store.expect("nothing is asked"), retry))
}

/// Requests that the operation makes when nothing is wrong.
async fn requests_of(operation: Operation, row: &Row) -> usize {
    let s3 = TestS3::with(row.server);
    let store = connect_patiently(&s3).await;
    operation.prepare(&*store, &s3).await;
    let before = s3.requests().len();
    let done = operation.run(&store, &s3).await;
    assert!(done.is_ok(), "{operation:?} without a fault");
    s3.requests().len() - before
}

pub async fn run(operation: Operation, row: &Row) -> Seen {
    let usual = requests_of(operation, row).await;
    let s3 = TestS3::with(row.server);
    let store = connect(&s3).await;
    operation.prepare(&*store, &s3).await;
    for (rule, fault) in &row.faults {
        s3.fault(*rule, fault.clone());
    }
    let (before, start) = (s3.requests().len(), Instant::now());
    let held = stored(&s3, operation);
    let done = operation.run(&store, &s3).await;
    let (took, asked) = (start.elapsed(), s3.requests().len() - before);
    let mut wrong = Vec::new();
    // A probe that can't be done also fails to clean up.
    let calls = if operation == Operation::Probe { 3 } else { 1 };
    if took > TOTAL * calls + SLACK {
        wrong.push(format!("took {took:.1?}"));
    }
    let (word, said) = match &done {
        Ok(done) => (word_of(done, asked > usual), String::new()),
        Err(error) => (word_of_kind(error.kind()), chain(error)),
    };
    check_error(done.as_ref().err(), operation, asked, row, &mut wrong);
    check_store(done.as_ref().err(), operation, &held, &stored(&s3, operation), &mut wrong);
    s3.heal();
    check_healed(operation, &store, &s3, &mut wrong).await;
    Seen { word, wrong, said }
}

fn word_of(done: &Done, asked_again: bool) -> &'static str {
    match done {
        Done::Well if asked_again => "again",
        Done::Well => "ok",
        Done::Other { found_out: true } => "hash",
        Done::Other { found_out: false } => "WRONG",
        Done::Winners(1) => "one",
        Done::Winners(_) => "both",
        Done::OneReceiver => "single",
        Done::Left => "left",
        Done::Unfit => "unfit",
    }
}

fn word_of_kind(kind: Kind) -> &'static str {
    match kind {
        Kind::NotFound => "absent",
        Kind::Exists => "exists",
        Kind::Permission => "denied",
        Kind::NoSpace => "full",
        Kind::Unavailable => "later",
        Kind::Corrupt => "corrupt",
        Kind::Unreadable => "unread",
        Kind::Config => "config",
        Kind::Other => "other",
    }
}

fn chain(error: &StoreError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

fn stored(s3: &TestS3, operation: Operation) -> Option<Bytes> {
    s3.objects().get(&name_in_bucket(&operation.key())).cloned()
}

/// An error says what it was about and tells no secret; what can't be helped is not tried again.
fn check_error(error: Option<&StoreError>, operation: Operation, asked: usize, row: &Row, wrong: &mut Vec<String>) {
    let Some(error) = error else { return };
    let text = chain(error);
    if text.contains(SECRET_KEY) {
        wrong.push("the error tells the secret key".into());
    }
    let about = match operation {
        Operation::Open => "backhaul-test",
        Operation::Probe => "probe/",
        Operation::List => "names/",
        _ => operation.key().as_str().rsplit_once('/').expect("a path").1.to_owned().leak(),
    };
    if !text.contains(about) {
        wrong.push(format!("the error does not name {about}"));
    }
    let final_at_once = matches!(error.kind(), Kind::Permission | Kind::Config | Kind::NoSpace | Kind::NotFound);
    let one_call = !matches!(operation, Operation::Race | Operation::Probe | Operation::List);
    // Opening looks for one object, and lists where that is not there.
    let calls = if matches!(operation, Operation::Open) { 1..=2 } else { 1..=1 };
    if final_at_once && one_call && row.refused_at_once && !calls.contains(&asked) {
        wrong.push(format!("{asked} requests for what no second try can change"));
    }
}

/// I3: what is said to be written is there, whole. What is not may be there whole after `Unavailable`, never in part,
/// and what was there before is there or replaced by exactly what was written.
fn check_store(
    error: Option<&StoreError>,
    operation: Operation,
    before: &Option<Bytes>,
    after: &Option<Bytes>,
    wrong: &mut Vec<String>,
) {
    let Some(body) = operation.body() else {
        if !matches!(operation, Operation::Race | Operation::Delete) && before != after {
            wrong.push("a read changed the store".into());
        }
        return;
    };
    let is_ours = after.as_ref() == Some(&body);
    match error {
        None if !is_ours => wrong.push("said to be written, and it is not there (I3)".into()),
        Some(_) if !is_ours && before != after => wrong.push("something else was left in the store".into()),
        _ => {}
    }
}

/// I14: when the fault is over, the same client does the same thing well.
async fn check_healed(operation: Operation, store: &Arc<dyn ObjectStore>, s3: &TestS3, wrong: &mut Vec<String>) {
    if operation == Operation::Race {
        return;
    }
    let again = operation.run(store, s3).await;
    match again {
        Ok(Done::Other { .. } | Done::Left) => wrong.push("wrong bytes after the fault".into()),
        Ok(_) => {}
        Err(error) if error.kind() == Kind::Exists && stored(s3, operation) == operation.body() => {}
        Err(error) => wrong.push(format!("does not recover: {error}")),
    }
}
