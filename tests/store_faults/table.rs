//! What is expected. Read [`WORDS`], then [`rows`].

use std::time::Duration;

use backhaul_tests::faults::{HttpFault, Rule};
use backhaul_tests::s3::Conditional;

/// What the words of the table mean.
pub const WORDS: &str = "\
list: damage there shows or does not, by what it hits; nothing is believed of a name but what its object says
ok: done at the first try   again: done by trying again   later: given up when the time was over, may be tried again
denied, config, full, absent, corrupt, exists, other: an error of this kind
hash: passed on damaged, and the block's hash finds it   WRONG: other names or bytes than there are
one: of two racing writers one won   both: both believe that they did
left: not deleted, and nothing depends on it
single: the probe says, one receiver only   unfit: the probe says, of no use as a store
";

/// One fault, and what becomes of each operation.
#[derive(Debug, Clone)]
pub struct Row {
    pub fault: &'static str,
    pub server: Conditional,
    pub faults: Vec<(Rule, HttpFault)>,
    /// A refusal that is final is not asked for twice.
    pub refused_at_once: bool,
    /// A word for each operation.
    pub expected: &'static str,
}

fn row(fault: &'static str, rule: Rule, http: HttpFault, expected: &'static str) -> Row {
    Row { fault, server: Conditional::Atomic, faults: vec![(rule, http)], refused_at_once: true, expected }
}

fn server(fault: &'static str, server: Conditional, expected: &'static str) -> Row {
    Row { fault, server, faults: Vec::new(), refused_at_once: true, expected }
}

/// After a `PUT` whose reply was lost.
fn then(fault: &'static str, rule: Rule, http: HttpFault, expected: &'static str) -> Row {
    let lost = (Rule::method("PUT").times(1), HttpFault::LostReply);
    Row { refused_at_once: false, faults: vec![lost, (rule, http)], ..row(fault, rule, HttpFault::Silent, expected) }
}

const PAGE: &str = "<html><body>Welcome to the hotel. Please sign in.</body></html>";
const ENDLESS: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult><IsTruncated>true</IsTruncated>\
<KeyCount>0</KeyCount></ListBucketResult>";
const DISORDER: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult><IsTruncated>false</IsTruncated>\
<Contents><Key>p/names/0007</Key><Size>0</Size></Contents><Contents><Key>p/names/0003</Key><Size>0</Size></Contents>\
</ListBucketResult>";

#[rustfmt::skip]
pub fn rows() -> Vec<Row> {
    use HttpFault::*;
    let (any, get) = (Rule::default, || Rule::method("GET"));
    let refuse = |status, code| Refuse(status, code);
    vec![
        //                                                                                open   put    1MiB   race   hint   get    range  list   delete probe
        server("nothing is wrong", Conditional::Atomic,                                  "ok     ok     ok     one    ok     ok     ok     ok     ok     ok"),
        row("503 SlowDown, 3 times", any().times(3), refuse(503, "SlowDown"),            "again  again  again  one    again  again  again  again  again  again"),
        row("500 InternalError, 3 times", any().times(3), refuse(500, "InternalError"),  "again  again  again  one    again  again  again  again  again  again"),
        row("429 without a word, 3 times", any().times(3), refuse(429, ""),              "again  again  again  one    again  again  again  again  again  again"),
        row("409 conflict, 2 times", any().times(2), refuse(409, "ConditionalRequestConflict"), "again  again  again  one    again  again  again  again  again  again"),
        row("connection reset, 3 times", any().times(3), LostRequest,                    "again  again  again  one    again  again  again  again  again  again"),
        row("done and the reply lost, 2 times", any().times(2), LostReply,               "again  again  again  one    again  again  again  again  again  again"),
        row("done and never answered, once", any().times(1), Silent,                     "again  again  again  one    again  again  again  again  again  again"),
        row("answered late, within the limit", any().times(2), Delay(Duration::from_millis(150)), "ok     ok     ok     one    ok     ok     ok     ok     ok     ok"),
        row("upload cut, once", any().times(1), CutUpload(10),                           "again  again  again  one    again  again  again  again  again  again"),
        row("upload at 0 B/s, once", any().times(1), StalledUpload,                      "again  again  again  one    again  again  again  again  again  again"),
        row("upload damaged on the way, once", any().times(1), FlipUpload(3),            "ok     again  again  one    again  ok     ok     ok     ok     again"),
        row("reply cut, once", any().times(1), Cut(5),                                   "again  again  again  one    again  again  again  again  ok     again"),
        row("reply at 0 B/s, once", any().times(1), Stall(5),                            "again  again  again  one    again  again  again  again  ok     again"),
        row("reply drips, once", get().times(1), Drip(2),                               "again  ok     ok     one    ok     again  again  again  ok     ok"),
        row("reply damaged on the way, once", get().times(1), Flip(180),                 "ok     ok     ok     one    ok     again  hash   WRONG  ok     ok"),
        row("a proxy's page with 200, once", any().times(1), Say(200, PAGE),             "again  again  again  one    again  again  again  again  left   again"),
        row("503 SlowDown for good", any(), refuse(503, "SlowDown"),                     "later  later  later  later  later  later  later  later  later  later"),
        row("connection reset for good", any(), LostRequest,                             "later  later  later  later  later  later  later  later  later  later"),
        row("done and never answered, for good", any(), Silent,                          "later  later  later  later  later  later  later  later  later  later"),
        row("reply at 0 B/s for good", any(), Stall(5),                                  "later  later  later  later  later  later  later  later  ok     later"),
        row("upload at 0 B/s for good", any(), StalledUpload,                            "later  later  later  later  later  later  later  later  later  later"),
        row("403 AccessDenied", any(), refuse(403, "AccessDenied"),                      "denied denied denied denied denied denied denied denied denied denied"),
        row("404 NoSuchBucket", any(), refuse(404, "NoSuchBucket"),                      "config config config config config config config config config config"),
        row("301 another region", any(), WrongRegion("eu-north-1"),                      "config config config config config config config config config config"),
        row("507 no space", any(), refuse(507, "XMinioStorageFull"),                     "full   full   full   full   full   full   full   full   full   full"),
        row("501 not implemented", any(), refuse(501, "NotImplemented"),                 "config config config config config config config config config config"),
        row("400 the clock is wrong", any(), refuse(403, "RequestTimeTooSkewed"),        "config config config config config config config config config config"),
        row("404 for what is there", get(), refuse(404, "NoSuchKey"),                    "config ok     ok     one    ok     absent absent config ok     unfit"),
        // A bucket that answers is opened: what is wrong with an object is found by who reads it.
        row("416 for what is there", get(), refuse(416, "InvalidRange"),                 "ok     ok     ok     one    ok     corrupt corrupt corrupt ok  corrupt"),
        row("replies damaged for good", get(), Flip(180),                                "ok     ok     ok     one    ok     later  hash   config ok     later"),
        row("whole objects where a part is asked for", get(), NoRanges,                  "ok     ok     ok     one    ok     ok     config ok     ok     unfit"),
        row("a proxy's page with 200 for good", any(), Say(200, PAGE),                   "later  later  later  later  later  later  later  later  left   later"),
        row("lists that do not end", get().path("list-type"), Say(200, ENDLESS),         "config ok     ok     one    ok     ok     ok     config ok     ok"),
        row("lists out of order", get().path("list-type"), Say(200, DISORDER),           "config ok     ok     one    ok     ok     ok     config ok     ok"),
        then("reply lost, then 403", any(), refuse(403, "AccessDenied"),                 "denied denied denied denied denied denied denied denied denied denied"),
        then("reply lost, then 507", any(), refuse(507, ""),                             "full   full   full   full   full   full   full   full   full   full"),
        then("reply lost, reading back: 404", get(), refuse(404, "NoSuchKey"),           "config later  later  later  again  absent absent config ok     later"),
        then("reply lost, reading back: silence", get(), Silent,                         "later  later  later  later  again  later  later  later  ok     later"),
        then("reply lost, reading back: damaged, once", get().times(1), Flip(100),           "ok     again  again  one    again  again  hash   ok     ok     again"),
        server("If-None-Match ignored", Conditional::Ignored,                            "ok     ok     ok     both   ok     ok     ok     ok     ok     single"),
        server("If-None-Match kept, and not atomic", Conditional::Racy(Duration::from_millis(400)), "ok ok     ok     both   ok     ok     ok     ok     ok     single"),
    ]
}
