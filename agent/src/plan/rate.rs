//! How many distinct blocks change within so much time, whatever the number of writes to each.
//!
//! Read first: [`Series`]. Who marks what was written hands in words of bits, one bit for each unit; this counts them in
//! blocks of any larger size and keeps what was counted of each interval.

use super::Estimate;

/// Bytes of the smallest unit in which changes are noted: the smallest block that a volume may have.
pub const UNIT: u32 = 16 << 10;
/// Block sizes that are compared, bytes.
pub const SIZES: [u32; 3] = [16 << 10, 64 << 10, 256 << 10];

/// Blocks of `factor` bits (a power of two up to 64) with at least one bit set.
pub fn count_blocks(words: &[u64], factor: u32) -> u64 {
    debug_assert!(factor.is_power_of_two() && factor <= 64);
    words.iter().filter(|w| **w != 0).map(|word| u64::from(folded(*word, factor).count_ones())).sum()
}

/// Each group of `factor` bits as its lowest one.
fn folded(mut word: u64, factor: u32) -> u64 {
    let mut shift = 1;
    while shift < factor {
        word |= word >> shift;
        shift *= 2;
    }
    let lowest = (0..64 / factor).fold(0, |mask, group| mask | 1 << (group * factor));
    word & lowest
}

/// What changed between two looks.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Interval {
    /// How long it was.
    pub seconds: f64,
    /// Distinct blocks, for each size of the series.
    pub blocks: Vec<f64>,
}

/// One volume, or all together: what changed in each interval.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Series {
    /// Block sizes, bytes: the volume's own first.
    pub sizes: Vec<u32>,
    /// One after the other, each about as long as the policy's.
    pub intervals: Vec<Interval>,
    /// The same in steps of a second; none where they are not to be had.
    pub seconds: Vec<Interval>,
    /// The whole time as one.
    pub whole: Interval,
    /// Bytes in blocks of the volume's own size that changed in the whole time.
    pub changed: Estimate,
}

impl Series {
    /// Nothing counted yet, of a volume with blocks of this size.
    pub fn new(own: u32) -> Self {
        let sizes: Vec<u32> = std::iter::once(own).chain(SIZES).collect();
        let whole = Interval { seconds: 0.0, blocks: vec![0.0; sizes.len()] };
        Self { sizes, whole, ..Self::default() }
    }

    /// Counts bits of units of `unit` bytes, each standing for `scale` of them, in blocks of each size. Of blocks that
    /// are smaller than the unit only the least is known: one for each unit.
    pub fn count(&self, words: &[u64], unit: u32, seconds: f64, scale: f64) -> Interval {
        let blocks = self.sizes.iter().map(|size| count_blocks(words, (size / unit).max(1)) as f64 * scale);
        Interval { seconds, blocks: blocks.collect() }
    }

    /// Bytes in blocks of the volume's own size.
    pub fn bytes(&self, interval: &Interval) -> f64 {
        self.bytes_in(interval, 0)
    }

    /// Bytes in blocks of the size with this place.
    pub fn bytes_in(&self, interval: &Interval, size: usize) -> f64 {
        interval.blocks.get(size).map_or(0.0, |n| n * f64::from(self.sizes[size]))
    }
}

/// Figures of several intervals.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize)]
pub struct Spread {
    /// Half of them have less.
    pub median: f64,
    /// Their mean.
    pub mean: f64,
    /// The most.
    pub peak: f64,
}

impl Spread {
    /// Of these; zeroes of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Self { median, mean: values.iter().sum::<f64>() / values.len() as f64, peak: values[values.len() - 1] }
    }
}

/// The block size to protect a volume with: the usual one, unless another changes much less. `bytes` are those that
/// changed in blocks of each of [`SIZES`].
pub fn recommended(bytes: [f64; 3]) -> u32 {
    let [small, usual, large] = bytes;
    // Four times the index, the records and the requests to hash must be worth it.
    if usual > 0.0 && small < usual / 2.0 {
        SIZES[0]
    // A quarter of them for a little more to send.
    } else if usual > 0.0 && large < usual * 1.25 {
        SIZES[2]
    } else {
        SIZES[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_writes_to_one_block_are_one() {
        // Units 0, 1, 2 and 63 of one word; unit 4 of the next.
        let words = [0b111 | 1 << 63, 0b1_0000];
        assert_eq!(count_blocks(&words, 1), 5);
        assert_eq!(count_blocks(&words, 2), 4, "0 and 1 are one");
        assert_eq!(count_blocks(&words, 4), 3, "0 to 2 are one");
        assert_eq!(count_blocks(&words, 16), 3);
        assert_eq!(count_blocks(&words, 64), 2);
        for factor in [1, 2, 4, 8, 16, 32, 64] {
            assert_eq!(count_blocks(&[u64::MAX; 3], factor), 3 * u64::from(64 / factor), "{factor}");
            for bit in 0..64 {
                assert_eq!(count_blocks(&[1 << bit], factor), 1, "bit {bit}, {factor}");
            }
        }
    }

    #[test]
    fn a_small_write_dirties_a_whole_block() {
        let series = Series::new(64 << 10);
        // One unit of 16 KiB in each block of 64 KiB.
        let interval = series.count(&[0x1111_1111_1111_1111], UNIT, 1.0, 1.0);
        assert_eq!(series.bytes(&interval), f64::from(16 * (64 << 10)));
        let by_size: Vec<f64> = (1..4).map(|i| series.bytes_in(&interval, i)).collect();
        assert_eq!(by_size, [16, 64, 64].map(|k| f64::from(16 * (k << 10))));
        assert_eq!(recommended([by_size[0], by_size[1], by_size[2]]), 16 << 10);
        let doubled = series.count(&[1], UNIT, 1.0, 2.0);
        assert_eq!(doubled.blocks, [2.0; 4], "a half that was looked at stands for all");
        let coarse = series.count(&[1], 64 << 10, 1.0, 1.0);
        assert_eq!(coarse.blocks, [1.0; 4]);
    }

    #[test]
    fn block_sizes_are_recommended_by_what_they_send() {
        assert_eq!(recommended([0.0; 3]), 64 << 10, "nothing changed: nothing is known");
        assert_eq!(recommended([49.0, 100.0, 400.0]), 16 << 10);
        assert_eq!(recommended([51.0, 100.0, 400.0]), 64 << 10);
        assert_eq!(recommended([98.0, 100.0, 110.0]), 256 << 10);
    }

    #[test]
    fn spread() {
        assert_eq!(Spread::of([]), Spread::default());
        assert_eq!(Spread::of([3.0, 1.0, 100.0]), Spread { median: 3.0, mean: 104.0 / 3.0, peak: 100.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 9.0]).median, 3.0);
    }
}
