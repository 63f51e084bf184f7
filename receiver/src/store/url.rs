//! How a user names a store: `file:///path` or `s3://bucket/prefix?endpoint=..&region=..`. Read [`StoreUrl`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Longest prefix in a bucket, bytes: 512 of an `ObjectKey` and this stay within the 1,024 that S3 allows for a key
/// (<https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html>).
const MAX_S3_PREFIX: usize = 500;

/// A store, as the user named it. Parsing and printing are each other's inverse.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StoreUrl {
    /// A folder, absolute.
    Dir(PathBuf),
    /// A place in a bucket.
    S3(S3Url),
}

/// A place in a bucket. Credentials are never part of it: URLs end up in logs and process lists.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct S3Url {
    /// The bucket's name.
    pub bucket: String,
    /// Put before every key, without `/` at either end; may be empty.
    pub prefix: String,
    /// Another server than AWS, `http://..` or `https://..`.
    pub endpoint: Option<String>,
    /// The region, where the environment's is not meant.
    pub region: Option<String>,
}

/// A text that names no store: what is wrong with it and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a store: {0}")]
pub struct UrlError(String);

fn wrong<T>(what: impl Into<String>) -> Result<T, UrlError> {
    Err(UrlError(what.into()))
}

impl FromStr for StoreUrl {
    type Err = UrlError;
    fn from_str(text: &str) -> Result<Self, UrlError> {
        if let Some(rest) = text.strip_prefix("file://") {
            return parse_dir(rest).map(StoreUrl::Dir);
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            return parse_s3(rest).map(StoreUrl::S3);
        }
        if text.starts_with('/') {
            return wrong(format!("a folder is written file://{text}"));
        }
        match text.split_once(':') {
            Some(("file", _)) => wrong("a folder is written file:///absolute/path, with three slashes"),
            Some((scheme, _)) if !scheme.contains('/') => {
                wrong(format!("{scheme:?} is not known; write file:///absolute/path or s3://bucket/prefix"))
            }
            _ => wrong("write file:///absolute/path or s3://bucket/prefix"),
        }
    }
}

fn parse_dir(rest: &str) -> Result<PathBuf, UrlError> {
    let path = rest.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(rest);
    if !path.starts_with('/') {
        return wrong("the path of a folder must be absolute: file:///absolute/path, with three slashes");
    }
    if path.contains(['?', '#']) {
        return wrong("a folder takes no settings after '?' or '#'; write %3F or %23 if they are part of its name");
    }
    let path = PathBuf::from(decode(path)?);
    if path.components().any(|part| part == std::path::Component::ParentDir) {
        return wrong("the path of a folder must not contain \"..\"");
    }
    if path == Path::new("/") {
        return wrong("the root of the file system is not a place for a store; name a folder in it");
    }
    Ok(path)
}

fn parse_s3(rest: &str) -> Result<S3Url, UrlError> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    // Does not repeat what was typed: it may be a secret.
    if bucket.contains(['@', ':']) {
        return wrong(
            "credentials or ports do not go into the URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, \
                      and name another server by ?endpoint=http://host:port",
        );
    }
    if bucket.is_empty() {
        return wrong("the bucket is missing: s3://bucket/prefix");
    }
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(legal) {
        return wrong(format!("{bucket:?} is not the name of a bucket (3 to 63 of a-z, 0-9, '-' and '.')"));
    }
    let mut url = S3Url { bucket: bucket.to_owned(), prefix: parse_prefix(prefix)?, endpoint: None, region: None };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value)?;
        let (slot, value) = match name {
            "endpoint" => (&mut url.endpoint, parse_endpoint(&value)?),
            "region" => (&mut url.region, parse_region(&value)?),
            _ => return wrong(format!("{name:?} is not a setting of a bucket; known are endpoint and region")),
        };
        if slot.replace(value).is_some() {
            return wrong(format!("{name} is given twice"));
        }
    }
    Ok(url)
}

fn parse_prefix(text: &str) -> Result<String, UrlError> {
    let prefix = text.strip_suffix('/').unwrap_or(text);
    let part = |part: &str| {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-=+".contains(&b);
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(legal)
    };
    if text.is_empty() || prefix.len() <= MAX_S3_PREFIX && prefix.split('/').all(part) {
        return Ok(prefix.to_owned());
    }
    wrong(format!(
        "the prefix {text:?} must be parts of a-z, A-Z, 0-9 and '._-=+' with single slashes between, \
         at most {MAX_S3_PREFIX} bytes"
    ))
}

fn parse_endpoint(value: &str) -> Result<String, UrlError> {
    let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
    let host = host.map(|host| host.trim_end_matches('/'));
    match host {
        None => wrong("endpoint must start with http:// or https://"),
        Some(host) if host.contains('@') => wrong("credentials do not go into the endpoint; set AWS_ACCESS_KEY_ID"),
        Some(host) if host.is_empty() || host.contains(['?', '#']) || !host.bytes().all(|b| b.is_ascii_graphic()) => {
            wrong(format!("the endpoint {value:?} is not http://host:port"))
        }
        Some(_) => Ok(value.trim_end_matches('/').to_owned()),
    }
}

fn parse_region(value: &str) -> Result<String, UrlError> {
    if value.is_empty() || !value.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return wrong(format!("{value:?} is not a region; one looks like eu-central-1"));
    }
    Ok(value.to_owned())
}

fn decode(text: &str) -> Result<String, UrlError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|d| char::from(d).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) if (high, low) != (0, 0) => bytes.push((high * 16 + low) as u8),
            _ => return wrong(format!("{text:?} has a '%' without two hexadecimal digits after it (or %00)")),
        }
    }
    if bytes.contains(&0) {
        // No path has one, and nothing that is typed; a setting in a file may.
        return wrong(format!("{text:?} has a NUL"));
    }
    String::from_utf8(bytes).or_else(|_| wrong(format!("{text:?} is not UTF-8")))
}

/// Writes what would mean something else in a URL as %XX.
fn encode(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z'
            | b'A'..=b'Z'
            | b'0'..=b'9'
            | b'/'
            | b'.'
            | b'_'
            | b'-'
            | b':'
            | b'~'
            | b'+'
            | b'='
            | b'['
            | b']' => {
                write!(f, "{}", char::from(byte))?;
            }
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::Dir(path) => {
                f.write_str("file://")?;
                encode(&path.to_string_lossy(), f)
            }
            StoreUrl::S3(url) => url.fmt(f),
        }
    }
}

impl fmt::Display for S3Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if !self.prefix.is_empty() {
            write!(f, "/{}", self.prefix)?;
        }
        let mut mark = '?';
        for (name, value) in [("endpoint", &self.endpoint), ("region", &self.region)] {
            if let Some(value) = value {
                write!(f, "{mark}{name}=")?;
                encode(value, f)?;
                mark = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s3(bucket: &str, prefix: &str, endpoint: Option<&str>, region: Option<&str>) -> StoreUrl {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
        StoreUrl::S3(S3Url { bucket, prefix, endpoint: own(endpoint), region: own(region) })
    }

    #[test]
    fn reads_what_the_manual_says() {
        let cases = [
            ("file:///srv/backhaul", StoreUrl::Dir("/srv/backhaul".into())),
            ("file://localhost/srv", StoreUrl::Dir("/srv".into())),
            ("file:///a%20b/%C3%BC%3F", StoreUrl::Dir("/a b/ü?".into())),
            ("s3://bucket", s3("bucket", "", None, None)),
            ("s3://bucket/", s3("bucket", "", None, None)),
            ("s3://bucket/a/B-1/", s3("bucket", "a/B-1", None, None)),
            ("s3://b.1/p?region=eu-central-1", s3("b.1", "p", None, Some("eu-central-1"))),
            (
                "s3://bucket/p?endpoint=http://127.0.0.1:9000/&region=x",
                s3("bucket", "p", Some("http://127.0.0.1:9000"), Some("x")),
            ),
            ("s3://bucket?endpoint=https%3A%2F%2Fhost", s3("bucket", "", Some("https://host"), None)),
        ];
        for (text, want) in cases {
            let got: StoreUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(got, want, "{text}");
            assert_eq!(got.to_string().parse::<StoreUrl>().unwrap(), want, "printed as {got}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let cases = [
            ("", "write file:///"),
            ("/srv/backhaul", "file:///srv/backhaul"),
            ("srv", "write file:///"),
            ("file:srv", "three slashes"),
            ("file://srv/backhaul", "absolute"),
            ("file://", "absolute"),
            ("file:///", "name a folder"),
            ("file:///a?b=c", "takes no settings"),
            ("file:///a/../b", "\"..\""),
            ("file:///a%0", "two hexadecimal digits"),
            ("file:///a%00", "%00"),
            ("file:///a\0b", "NUL"),
            ("ftp://host/path", "\"ftp\" is not known"),
            ("s3://", "bucket is missing"),
            ("s3:///prefix", "bucket is missing"),
            ("s3://Bucket", "not the name of a bucket"),
            ("s3://ab", "not the name of a bucket"),
            ("s3://bucket/a//b", "single slashes"),
            ("s3://bucket//", "single slashes"),
            ("s3://bucket/../x", "single slashes"),
            ("s3://bucket/a b", "must be parts of"),
            ("s3://bucket?enpoint=http://x", "\"enpoint\" is not a setting"),
            ("s3://bucket?endpoint=host:9000", "http://"),
            ("s3://bucket?endpoint=http://", "not http://host:port"),
            ("s3://bucket?endpoint=http:////", "not http://host:port"),
            ("s3://bucket?endpoint=http://a%0Ab", "not http://host:port"),
            ("s3://bucket?region=", "not a region"),
            ("s3://bucket?region=a&region=b", "twice"),
        ];
        for (text, want) in cases {
            let error = text.parse::<StoreUrl>().expect_err(text).to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn never_repeats_a_secret() {
        for text in ["s3://AKIA:topsecret@bucket/p", "s3://bucket?endpoint=http://AKIA:topsecret@host"] {
            let error = text.parse::<StoreUrl>().expect_err(text).to_string();
            assert!(!error.contains("topsecret"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn folders_print_and_parse_back(path in "(/[^/\u{0}]{1,12}){1,4}") {
            prop_assume!(!path.split('/').any(|part| part == "." || part == ".."));
            let url = StoreUrl::Dir(path.into());
            prop_assert_eq!(url.to_string().parse::<StoreUrl>(), Ok(url));
        }
        #[test]
        fn any_text_is_an_answer(text in "(s3|file)?:?/{0,3}\\PC{0,40}") {
            if let Ok(url) = text.parse::<StoreUrl>() {
                prop_assert_eq!(url.to_string().parse::<StoreUrl>(), Ok(url));
            }
        }
    }
}
