//! What became of packets, over time: a line of JSON each half a second.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::path::Path;

const EVERY: Duration = Duration::from_millis(500);

/// Where it is written.
pub struct Stats {
    file: Option<File>,
    began: Instant,
    next: Instant,
    /// Bytes that were passed on, by flow: protocol and ports as one end named them.
    pub flows: BTreeMap<String, u64>,
}

impl Stats {
    /// To a file, if one is named.
    pub fn new(path: Option<PathBuf>) -> io::Result<Self> {
        let now = Instant::now();
        Ok(Self { file: path.map(File::create).transpose()?, began: now, next: now + EVERY, flows: BTreeMap::new() })
    }

    /// When the next line is due.
    pub fn is_due(&self, now: Instant) -> bool {
        self.file.is_some() && now >= self.next
    }

    /// Writes a line.
    pub fn write(&mut self, now: Instant, paths: &[Path; 2]) -> io::Result<()> {
        self.next = now + EVERY;
        let Some(file) = &mut self.file else { return Ok(()) };
        let direction = |p: &Path| {
            let c = p.counts();
            format!(
                r#"{{"packets":{},"bytes":{},"lost":{},"dropped":{},"too_large":{}}}"#,
                c.packets, c.bytes, c.lost, c.dropped, c.too_large
            )
        };
        let flows: Vec<String> = self.flows.iter().map(|(name, bytes)| format!(r#""{name}":{bytes}"#)).collect();
        writeln!(
            file,
            r#"{{"seconds":{:.3},"up":{},"down":{},"flows":{{{}}}}}"#,
            (now - self.began).as_secs_f64(),
            direction(&paths[0]),
            direction(&paths[1]),
            flows.join(",")
        )
    }
}
