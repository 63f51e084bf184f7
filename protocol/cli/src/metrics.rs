//! Metrics as Prometheus reads them (text format 0.0.4), and the smallest HTTP server that can tell them.
//!
//! Read first: [`Exposition`], then [`serve`]. `GET /metrics` is all that is answered; requests are bounded in size, time
//! and number, and nothing that was sent is kept.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// What a metric is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Goes up, and begins anew with the process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts in buckets.
    Histogram,
}

/// A family of samples. Its name ends with its unit, or `_total` for a counter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    /// `backhaul_agent_lag_seconds`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// In one line.
    pub help: &'static str,
}

/// A text of samples.
#[derive(Clone, Debug, Default)]
pub struct Exposition(String);

impl Exposition {
    /// Begins a family; its samples follow, and may be none.
    pub fn family(&mut self, metric: &Metric) {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(self.0, "# HELP {0} {1}\n# TYPE {0} {kind}", metric.name, metric.help);
    }

    /// One sample of the family that was begun last; `suffix` is empty but in histograms.
    pub fn sample(&mut self, metric: &Metric, suffix: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.0, "{}{suffix}", metric.name);
        for (i, (name, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{name}=\"{}\"", if i == 0 { '{' } else { ',' }, escaped(value));
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A family of one sample, or of none where nobody knows.
    pub fn one(&mut self, metric: &Metric, value: Option<f64>) {
        self.family(metric);
        value.into_iter().for_each(|value| self.sample(metric, "", &[], value));
    }

    /// A family of which one sample is 1 and the others are 0.
    pub fn one_of<'a>(
        &mut self,
        metric: &Metric,
        label: &str,
        all: impl IntoIterator<Item = &'a str>,
        now: Option<&str>,
    ) {
        self.family(metric);
        all.into_iter().for_each(|name| {
            self.sample(metric, "", &[(label, name)], f64::from(u8::from(now == Some(name))));
        });
    }

    /// The text.
    pub fn into_text(self) -> String {
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Memory that this process takes.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// A request that is longer is none of Prometheus'.
const MAX_REQUEST: usize = 8 << 10;
/// Who takes longer with a request or an answer is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// Answered at once; others wait their turn.
const MAX_CONNECTIONS: usize = 8;

/// Answers until it is dropped. `render` gives the metrics as they are now.
pub async fn serve(listener: TcpListener, render: impl Fn() -> String + Send + Sync + 'static) {
    let render = Arc::new(render);
    let turns = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let turn = turns.clone().acquire_owned().await.expect("never closed");
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptors are left, mostly.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let render = render.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(PATIENCE, answer(stream, &*render)).await;
            drop(turn);
        });
    }
}

async fn answer(mut stream: TcpStream, render: &(dyn Fn() -> String + Send + Sync)) -> std::io::Result<()> {
    let mut request = Vec::new();
    let whole = loop {
        if request.windows(4).any(|w| w == b"\r\n\r\n") {
            break true;
        }
        if request.len() >= MAX_REQUEST {
            break false;
        }
        let mut part = [0; 1024];
        match stream.read(&mut part).await? {
            0 => break false,
            n => request.extend_from_slice(&part[..n]),
        }
    };
    let (status, kind, body) = match method_and_path(&request) {
        Some(("GET", "/metrics")) if whole => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", render()),
        Some(("GET", _)) if whole => ("404 Not Found", "text/plain", "metrics are at /metrics\n".to_owned()),
        Some((_, _)) if whole => ("405 Method Not Allowed", "text/plain", "only GET is answered\n".to_owned()),
        _ => ("400 Bad Request", "text/plain", "want GET /metrics\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// Of the first line; what comes after a `?` is left out.
fn method_and_path(request: &[u8]) -> Option<(&str, &str)> {
    let line = request.split(|b| *b == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, path, version) = (words.next()?, words.next()?, words.next()?);
    let is_http = version.starts_with("HTTP/1.") && words.next().is_none() && !method.is_empty();
    is_http.then(|| (method, path.split('?').next().unwrap_or(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAG: Metric = Metric { name: "x_lag_seconds", kind: Kind::Gauge, help: "How old." };

    #[test]
    fn a_text_as_the_format_has_it() {
        let mut text = Exposition::default();
        text.one(&LAG, Some(1.5));
        text.family(&LAG);
        text.sample(&LAG, "_bucket", &[("name", "a\"b\\c\nd"), ("le", "+Inf")], 2.0);
        let want = "# HELP x_lag_seconds How old.\n# TYPE x_lag_seconds gauge\nx_lag_seconds 1.5\n\
                    # HELP x_lag_seconds How old.\n# TYPE x_lag_seconds gauge\n\
                    x_lag_seconds_bucket{name=\"a\\\"b\\\\c\\nd\",le=\"+Inf\"} 2\n";
        assert_eq!(text.into_text(), want);
    }

    async fn ask(address: std::net::SocketAddr, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        // Whoever is refused early may find the other end closed.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).expect("text")
    }

    #[tokio::test]
    async fn only_metrics_are_told_and_nobody_holds_it_up() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(serve(listener, || "x 1\n".to_owned()));
        let good = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nx 1\n"), "{good}");
        assert!(good.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: 4\r\n"));
        for (request, status) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
            (b"GET /metrics\r\n\r\n", "400"),
            (b"\xff\xfe\r\n\r\n", "400"),
            (&[b'x'; MAX_REQUEST + 1], "400"),
        ] {
            let answer = ask(address, request).await;
            assert!(answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        }
        // Those who say nothing are sent away, and others are answered then.
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.expect("it listens"));
        }
        let answer = tokio::time::timeout(PATIENCE * 2, ask(address, b"GET /metrics HTTP/1.0\r\n\r\n")).await;
        assert!(answer.expect("in time").starts_with("HTTP/1.1 200"));
    }
}
