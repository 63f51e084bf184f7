//! Reads what programs tell Prometheus, as strictly as the format can be read. Read [`scrape`].

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A family of samples.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Label text (`{a="b"}`, or nothing) with what stands behind the name, and value.
    pub samples: BTreeMap<String, f64>,
}

/// All families by name.
pub type Families = BTreeMap<String, Family>;

/// `GET /metrics`; `None` while nobody listens.
pub fn scrape(at: SocketAddr) -> Option<Families> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    Some(parse(body))
}

/// Panics where the text is not as the format has it.
#[track_caller]
pub fn parse(text: &str) -> Families {
    let mut families = Families::new();
    let (mut helped, mut current) = (String::new(), String::new());
    assert!(text.ends_with('\n'), "the last line ends");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a name and a help");
            assert!(!help.trim().is_empty() && !families.contains_key(name), "{line}");
            helped = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a type");
            assert_eq!(name, helped, "HELP comes before TYPE");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            families.insert(name.to_owned(), Family { kind: kind.to_owned(), ..Family::default() });
            current = name.to_owned();
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            let rest = sample.strip_prefix(&current).unwrap_or_else(|| panic!("not of {current}: {line}"));
            let family = families.get_mut(&current).expect("it has begun");
            let (suffix, labels) = rest.split_once('{').map_or((rest, ""), |(suffix, labels)| (suffix, labels));
            let suffixes: &[&str] = if family.kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line}");
            assert!(labels.is_empty() || labels.ends_with("\"}"), "{line}");
            let value: f64 = value.parse().unwrap_or_else(|e| panic!("{line}: {e}"));
            assert!(value.is_finite(), "{line}");
            assert!(family.samples.insert(rest.to_owned(), value).is_none(), "twice: {line}");
        }
    }
    families
}

/// A sample, by its labels as they are written.
#[track_caller]
pub fn value(families: &Families, name: &str, labels: &str) -> f64 {
    let family = families.get(name).unwrap_or_else(|| panic!("no {name}"));
    *family.samples.get(labels).unwrap_or_else(|| panic!("no {name}{labels}: {family:?}"))
}
