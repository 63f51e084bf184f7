//! How many bytes per second may be sent, by the clock on the wall: the usual, and windows of the week with another.
//!
//! Read first: [`Schedule::rate`]. Windows are compared with local time as people read it off a clock, so that a change
//! to summer time moves none of them: an hour that comes twice is in them twice, one that is left out is not waited for.

use std::time::Duration;

use backhaul_seams::clock;
use jiff::civil::{Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

/// Bytes per second by time of the week.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Schedule {
    /// Outside of all windows; `None`: as fast as it goes.
    pub usual: Option<u64>,
    /// The first one that it is time for counts.
    pub windows: Vec<Window>,
}

/// Some hours of some days.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// From this time on.
    pub from: Time,
    /// Until before this time: on the next day if it is not later than `from`.
    pub to: Time,
    /// On which days it begins.
    pub days: Days,
    /// Bytes per second; 0: nothing is sent.
    pub rate: u64,
}

/// Days of the week.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Days(u8);

/// As they are written.
const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

impl Days {
    /// All of them.
    pub const ALL: Self = Self(0x7f);

    fn has(self, day: Weekday) -> bool {
        self.0 & (1 << day.to_monday_zero_offset()) != 0
    }
}

impl std::str::FromStr for Days {
    type Err = String;

    /// `mon-fri`, `sat,sun`, `fri-mon`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("days = \"{text}\": want days as mon-fri or sat,sun");
        let day = |name: &str| NAMES.iter().position(|n| n.eq_ignore_ascii_case(name.trim())).ok_or_else(wrong);
        let mut days = 0;
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (mut at, last) = (day(first)?, day(last)?);
            days |= 1 << last;
            while at != last {
                days |= 1 << at;
                at = (at + 1) % 7;
            }
        }
        Ok(Self(days))
    }
}

impl std::fmt::Display for Days {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named: Vec<&str> =
            NAMES.iter().enumerate().filter(|(i, _)| self.0 & (1 << i) != 0).map(|(_, n)| *n).collect();
        f.write_str(&named.join(","))
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {} on {}", self.from.strftime("%H:%M"), self.to.strftime("%H:%M"), self.days)
    }
}

impl Window {
    fn contains(&self, now: &Zoned) -> bool {
        let (time, day) = (now.time(), now.weekday());
        if self.from < self.to {
            return self.days.has(day) && self.from <= time && time < self.to;
        }
        (self.days.has(day) && self.from <= time) || (self.days.has(day.previous()) && time < self.to)
    }
}

impl Schedule {
    /// The window that it is time for.
    pub fn window(&self, now: &Zoned) -> Option<&Window> {
        self.windows.iter().find(|w| w.contains(now))
    }

    /// Bytes per second at this time; `None`: as many as go.
    pub fn rate(&self, now: &Zoned) -> Option<u64> {
        self.window(now).map_or(self.usual, |w| Some(w.rate))
    }

    /// When the rate is another one; `None`: never.
    pub fn next_change(&self, now: &Zoned) -> Option<Timestamp> {
        let mut at = Vec::new();
        for ahead in -1..=8 {
            let Ok(date) = now.date().checked_add(ahead.days()) else { continue };
            for time in self.windows.iter().flat_map(|w| [w.from, w.to]) {
                at.extend(date.to_datetime(time).to_zoned(now.time_zone().clone()));
            }
        }
        at.retain(|t| t > now);
        at.sort();
        at.into_iter().find(|t| self.rate(t) != self.rate(now)).map(|t| t.timestamp())
    }
}

/// The time by this machine's clock, as its people read it.
pub fn local_now() -> Zoned {
    let since = Duration::from_millis(u64::try_from(clock::unix_millis()).unwrap_or(0));
    let at =
        Timestamp::from_millisecond(i64::try_from(since.as_millis()).unwrap_or(0)).unwrap_or(Timestamp::UNIX_EPOCH);
    at.to_zoned(TimeZone::system())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(from: &str, to: &str, days: &str, rate: u64) -> Window {
        let time = |text: &str| text.parse().expect("a time");
        Window { from: time(from), to: time(to), days: days.parse().expect("days"), rate }
    }

    fn at(text: &str) -> Zoned {
        text.parse().expect("a time with a zone")
    }

    #[test]
    fn a_window_begins_and_ends_to_the_second() {
        let schedule = Schedule { usual: Some(9), windows: vec![window("08:00", "18:00", "mon-fri", 5)] };
        // 2026-11-23 is a Monday.
        for (time, rate) in [("07:59:59", 9), ("08:00", 5), ("17:59:59", 5), ("18:00", 9)] {
            assert_eq!(schedule.rate(&at(&format!("2026-11-23T{time}[Europe/Berlin]"))), Some(rate), "{time}");
        }
        assert_eq!(schedule.rate(&at("2026-11-22T12:00[Europe/Berlin]")), Some(9), "Sunday");
        let change = schedule.next_change(&at("2026-11-20T20:00[Europe/Berlin]")).expect("Monday");
        assert_eq!(change, at("2026-11-23T08:00[Europe/Berlin]").timestamp());
        assert_eq!(Schedule { usual: Some(9), windows: vec![] }.next_change(&at("2026-11-20T20:00[UTC]")), None);
    }

    #[test]
    fn over_midnight_the_day_is_that_of_its_beginning() {
        let schedule = Schedule { usual: None, windows: vec![window("22:00", "06:00", "fri", 0)] };
        let rate = |text: &str| schedule.rate(&at(&format!("{text}[UTC]")));
        assert_eq!(rate("2026-11-27T21:59"), None);
        assert_eq!(rate("2026-11-27T22:00"), Some(0), "Friday evening");
        assert_eq!(rate("2026-11-28T05:59"), Some(0), "Saturday morning");
        assert_eq!(rate("2026-11-28T06:00"), None);
        assert_eq!(rate("2026-11-27T03:00"), None, "the morning before");
        let all_day = Schedule { usual: None, windows: vec![window("00:00", "00:00", "sat,sun", 1)] };
        assert_eq!(all_day.rate(&at("2026-11-28T13:00[UTC]")), Some(1));
        assert_eq!(all_day.rate(&at("2026-11-30T00:00[UTC]")), None);
    }

    #[test]
    fn summer_time_moves_no_window() {
        let schedule = Schedule { usual: Some(9), windows: vec![window("02:30", "08:00", "mon-sun", 5)] };
        // 2026-03-29: at 02:00 it is 03:00. 2026-10-25: at 03:00 it is 02:00 again.
        for (text, rate) in [
            ("2026-03-29T01:59:59+01:00", 9),
            ("2026-03-29T03:00:00+02:00", 5),
            ("2026-03-29T07:59:59+02:00", 5),
            ("2026-03-29T08:00:00+02:00", 9),
            ("2026-10-25T02:29:59+02:00", 9),
            ("2026-10-25T02:30:00+02:00", 5),
            ("2026-10-25T02:00:00+01:00", 9),
            ("2026-10-25T02:30:00+01:00", 5),
            ("2026-10-25T08:00:00+01:00", 9),
        ] {
            assert_eq!(schedule.rate(&at(&format!("{text}[Europe/Berlin]"))), Some(rate), "{text}");
        }
    }

    #[test]
    fn days_as_people_write_them() {
        let days = |text: &str| text.parse::<Days>().map(|d| d.to_string());
        assert_eq!(days("mon-fri").as_deref(), Ok("mon,tue,wed,thu,fri"));
        assert_eq!(days("sat, Sun").as_deref(), Ok("sat,sun"));
        assert_eq!(days("fri-mon").as_deref(), Ok("mon,fri,sat,sun"));
        assert_eq!("mon-sun".parse(), Ok(Days::ALL));
        assert!(["", "monday", "mon-", "1-5", "mon;tue"].iter().all(|bad| days(bad).is_err()));
    }

    #[test]
    fn the_first_window_counts() {
        let windows = vec![window("10:00", "11:00", "mon-sun", 1), window("08:00", "18:00", "mon-sun", 2)];
        let schedule = Schedule { usual: None, windows };
        assert_eq!(schedule.rate(&at("2026-11-23T10:30[UTC]")), Some(1));
        assert_eq!(schedule.rate(&at("2026-11-23T11:00[UTC]")), Some(2));
    }
}
