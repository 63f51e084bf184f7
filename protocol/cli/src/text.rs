//! Sizes, durations and times as people write and read them.

use std::time::Duration;

use backhaul_protocol::ids::LogSeq;
use backhaul_protocol::store::log::UnixMillis;
use backhaul_protocol::wire::message::PointSpec;

/// 1.5 GiB.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// What a restore says of a device that is larger than the volume, in bytes more; `None` if it is not.
pub fn beyond(more: u64) -> Option<String> {
    (more > 0).then(|| {
        format!("    the device has {} more, behind the volume's end: they were left as they were", bytes(more))
    })
}

/// `16MiB`, `64K`, `1000`: bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a size: want a number with KiB, MiB, GiB or TiB");
    let text_trimmed = text.trim();
    let digits = text_trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(text_trimmed.len());
    let number: u64 = text_trimmed[..digits].parse().map_err(|_| wrong())?;
    let unit: u64 = match text_trimmed[digits..].trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).ok_or_else(wrong)
}

/// `20MB`, `20MiB/s`, `100Mbit/s`: bytes per second.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a rate: want bytes per second as 20MB, or bits as 100Mbit");
    let number = text.trim();
    let number = number.strip_suffix("/s").unwrap_or(number);
    let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
    let value: u64 = number[..digits].parse().map_err(|_| wrong())?;
    let (unit, divisor): (u64, u64) = match number[digits..].trim() {
        "" | "B" => (1, 1),
        "kB" | "KB" => (1000, 1),
        "MB" => (1_000_000, 1),
        "GB" => (1_000_000_000, 1),
        "KiB" => (1 << 10, 1),
        "MiB" => (1 << 20, 1),
        "GiB" => (1 << 30, 1),
        "kbit" => (1000, 8),
        "Mbit" => (1_000_000, 8),
        "Gbit" => (1_000_000_000, 8),
        _ => return Err(wrong()),
    };
    value.checked_mul(unit).map(|n| n / divisor).ok_or_else(wrong)
}

/// `15s`, `5m`, `1h`, `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("\"{text}\" is not a duration: want a number with ms, s, m, h or d");
    let text_trimmed = text.trim();
    let digits = text_trimmed.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text_trimmed[..digits].parse().map_err(|_| wrong())?;
    let millis: u64 = match &text_trimmed[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    // Longer than a century is a slip of the keyboard, and overflows clocks.
    let limit = 100 * 366 * 86_400_000;
    number.checked_mul(millis).filter(|n| *n <= limit).map(Duration::from_millis).ok_or_else(wrong)
}

/// 3.2 s, 4m10s.
pub fn duration(d: Duration) -> String {
    let secs = d.as_secs();
    match secs {
        0..60 => format!("{:.1} s", d.as_secs_f64()),
        60..3600 => format!("{}m{:02}s", secs / 60, secs % 60),
        3600..86_400 => format!("{}h{:02}m", secs / 3600, secs % 3600 / 60),
        _ => format!("{}d{:02}h", secs / 86_400, secs % 86_400 / 3600),
    }
}

/// RFC 3339 in UTC.
pub fn time(at: UnixMillis) -> String {
    jiff::Timestamp::from_millisecond(at.0).map_or_else(|_| format!("{} ms", at.0), |t| t.to_string())
}

/// `latest`, a number, or a time (RFC 3339, or a local date and time).
pub fn parse_point(text: &str) -> Result<PointSpec, String> {
    if text == "latest" {
        return Ok(PointSpec::Latest);
    }
    if let Ok(number) = text.parse() {
        return Ok(PointSpec::Number(LogSeq(number)));
    }
    let zoned = || {
        jiff::civil::DateTime::strptime("%Y-%m-%d %H:%M:%S", text).or_else(|_| text.parse::<jiff::civil::DateTime>())
    };
    let at = text
        .parse::<jiff::Timestamp>()
        .or_else(|_| zoned().and_then(|d| d.to_zoned(jiff::tz::TimeZone::system())).map(|z| z.timestamp()));
    at.map(|t| PointSpec::Time(UnixMillis(t.as_millisecond())))
        .map_err(|_| format!("\"{text}\" is no point: want `latest`, a number, or a time like 2026-11-22T14:00:00Z"))
}

/// Splits `NAME@POINT`; without `@` the latest.
pub fn split_point(text: &str) -> Result<(&str, PointSpec), String> {
    match text.split_once('@') {
        None => Ok((text, PointSpec::Latest)),
        Some((name, point)) => Ok((name, parse_point(point)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations() {
        assert_eq!(parse_bytes("16MiB"), Ok(16 << 20));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        for bad in ["", "-1", "1e99", "5 parsecs", "99999999999999999999", "16EiB"] {
            assert!(parse_bytes(bad).is_err() && parse_duration(bad).is_err(), "{bad}");
        }
        assert!(parse_duration("99999999999d").is_err());
        assert_eq!(bytes(1536), "1.5 KiB");
        let rates = ["0", "20MB", "20MiB/s", "100Mbit/s", "5 kB"].map(|text| parse_rate(text).ok());
        assert_eq!(rates, [Some(0), Some(20_000_000), Some(20 << 20), Some(12_500_000), Some(5000)]);
        assert!(["", "-1", "20Mb", "fast", "99999999999GB", "1MB/h"].iter().all(|bad| parse_rate(bad).is_err()));
    }

    #[test]
    fn points() {
        assert_eq!(split_point("db@7"), Ok(("db", PointSpec::Number(LogSeq(7)))));
        assert_eq!(split_point("db"), Ok(("db", PointSpec::Latest)));
        assert_eq!(parse_point("1970-01-01T00:00:01Z"), Ok(PointSpec::Time(UnixMillis(1000))));
        assert!(parse_point("-1").is_err() && parse_point("yesterday").is_err());
    }
}
