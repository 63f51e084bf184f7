//! What protecting volumes would take: measured beforehand, nothing written to them.
//!
//! Read first: [`forecast`] (what follows from the figures, as arithmetic alone), then where the figures come from.
//!
//! | file | owns | does not own |
//! |---|---|---|
//! | [`sample`] | how much of a volume is data and how far it compresses, from some of its blocks | what changes |
//! | [`rate`] | how many distinct blocks change in so much time | how that is found out |
//! | [`watch`] | finding that out: by kernel hints, else by reading twice | |
//! | [`pins`] | a tracker of our own in the kernel, that goes when we go | |
//! | [`compare`] | reading twice | |
//! | [`network`] | round trip and rate to the receiver | |
//! | [`forecast`] | what follows | any measuring |
//! | [`report`], [`told`] | all of it as JSON and in words | |

pub mod compare;
pub mod forecast;
pub mod network;
pub mod pins;
pub mod rate;
pub mod report;
pub mod sample;
pub mod told;
pub mod watch;

use std::sync::Arc;

use backhaul_protocol::geometry::Geometry;
use backhaul_volume::Source;

/// A volume that is looked at.
#[derive(Clone, Debug)]
pub struct Subject {
    /// As it is protected, or would be.
    pub name: String,
    /// Open for reading.
    pub source: Arc<Source>,
    /// Block size and length.
    pub geometry: Geometry,
}

/// A figure that was found by looking at a part: with 95 % certainty it is off by no more than the margin.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Up or down; 0 where everything was looked at.
    pub margin: f64,
}

impl Estimate {
    /// The sum over a population of which some were looked at, by chance: from their number, sum and sum of squares.
    /// `least` is what one of the population may come to, for what was never met: three in as many as were looked at.
    pub fn of_sum(population: u64, looked_at: u64, sum: f64, squares: f64, least: f64) -> Self {
        if looked_at == 0 {
            let all = population as f64 * least;
            return Self { value: all / 2.0, margin: all / 2.0 };
        }
        let (n, all) = (looked_at as f64, population as f64);
        let mean = sum / n;
        let deviation = (squares / n - mean * mean).max(0.0).sqrt();
        // What was not looked at is all that can be wrong.
        let unseen = (1.0 - n / all).max(0.0).sqrt();
        let margin = (1.96 * deviation / n.sqrt()).max(3.0 / n * least) * unseen;
        Self { value: mean * all, margin: margin * all }
    }
}

impl std::ops::Add for Estimate {
    type Output = Self;
    /// Of independent figures.
    fn add(self, other: Self) -> Self {
        Self { value: self.value + other.value, margin: self.margin.hypot(other.margin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_as_sure_as_its_sample() {
        // Every second one of 100 of 10,000 is 1.
        let half = Estimate::of_sum(10_000, 100, 50.0, 50.0, 1.0);
        assert_eq!(half.value, 5000.0);
        assert!((900.0..1050.0).contains(&half.margin), "textbook: 1.96 * 0.5 / 10 of it: {half:?}");
        let all = Estimate::of_sum(100, 100, 50.0, 50.0, 1.0);
        assert_eq!(all, Estimate { value: 50.0, margin: 0.0 }, "nothing is left to guess");
        let none = Estimate::of_sum(10_000, 100, 0.0, 0.0, 1.0);
        assert_eq!(none.value, 0.0);
        assert!((250.0..=300.0).contains(&none.margin), "what was never met may be there: {none:?}");
        let nothing = Estimate::of_sum(10, 0, 0.0, 0.0, 1.0);
        assert_eq!((nothing.value - nothing.margin, nothing.value + nothing.margin), (0.0, 10.0));
    }
}
