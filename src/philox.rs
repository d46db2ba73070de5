//! Random numbers as a function of a key and a counter, without state: Philox4x32-10.

/// The sixteen bytes that Philox4x32-10 makes of `counter` under `key`, as four words.
///
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; equal to Random123's.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox4x32_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// The same of `N` counters side by side, which compilers turn into vector instructions.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub fn philox4x32_lanes<const N: usize>(mut counter: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        for i in 0..N {
            let a = u64::from(counter[0][i]) * 0xD251_1F53;
            let b = u64::from(counter[2][i]) * 0xCD9E_8D57;
            counter[0][i] = (b >> 32) as u32 ^ counter[1][i] ^ key[0];
            counter[1][i] = b as u32;
            counter[2][i] = (a >> 32) as u32 ^ counter[3][i] ^ key[1];
            counter[3][i] = a as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The 64 random bits for the token at `position` of returned sequence `index` under `seed`.
pub fn random_bits(seed: u64, index: u64, position: u64) -> u64 {
    let halves = |n: u64| [n as u32, (n >> 32) as u32];
    let ([i0, i1], [p0, p1]) = (halves(index), halves(position));
    let [low, high, ..] = philox4x32([i0, i1, p0, p1], halves(seed));
    u64::from(high) << 32 | u64::from(low)
}

/// Normally distributed values: the i-th is a function of (seed, stream, i) alone, to the same bits on every machine.
#[derive(Clone, Copy, Debug)]
pub struct Normal {
    /// Key of the generator.
    pub seed: u64,
    /// Which sequence of values, such as the number of a tensor.
    pub stream: u64,
    /// Standard deviation; the mean is 0.
    pub deviation: f32,
}

impl Normal {
    /// Values `start..` of the stream, by Box and Muller (1958) in float64: four from each block of the generator.
    pub fn fill(&self, start: u64, out: &mut [f32]) {
        let halves = |n: u64| [n as u32, (n >> 32) as u32];
        let [s0, s1] = halves(self.stream);
        let mut block = [0.0; 4];
        for (i, out) in (start..).zip(out.iter_mut()) {
            let within = (i % 4) as usize;
            if within == 0 || i == start {
                let [b0, b1] = halves(i / 4);
                let words = philox4x32([b0, b1, s0, s1], halves(self.seed));
                for (pair, words) in block.chunks_exact_mut(2).zip(words.chunks_exact(2)) {
                    // Of (0, 1]: the logarithm of 0 is none.
                    let radius = (f64::from(words[0]) + 1.0) / 4_294_967_296.0;
                    let angle = f64::from(words[1]) / 4_294_967_296.0 * std::f64::consts::TAU;
                    let radius = (-2.0 * libm::log(radius)).sqrt();
                    let (sin, cos) = libm::sincos(angle);
                    pair.copy_from_slice(&[(radius * cos) as f32, (radius * sin) as f32]);
                }
            }
            *out = block[within] * self.deviation;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that Random123 ships for philox4x32, 10 rounds.
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn every_half_of_seed_index_and_position_counts() {
        let mut seen = std::collections::BTreeSet::from([random_bits(0, 0, 0)]);
        for shift in 0..64 {
            let bit = 1 << shift;
            for bits in [random_bits(bit, 0, 0), random_bits(0, bit, 0), random_bits(0, 0, bit)] {
                assert!(seen.insert(bits));
            }
        }
    }

    #[test]
    fn normal_values_have_the_moments_and_depend_on_their_index_alone() {
        let normal = Normal { seed: 7, stream: 3, deviation: 0.5 };
        let mut all = vec![0.0; 200_000];
        normal.fill(0, &mut all);
        let n = all.len() as f64;
        let moment = |power: i32| all.iter().map(|&v| (f64::from(v) / 0.5).powi(power)).sum::<f64>() / n;
        // Standard errors: 1, sqrt 2, sqrt 15 and sqrt 96 over sqrt n; five of them.
        for (power, expected, error) in [(1, 0.0, 1.0), (2, 1.0, 1.4143), (3, 0.0, 3.873), (4, 3.0, 9.798)] {
            assert!(
                (moment(power) - expected).abs() < 5.0 * error / n.sqrt(),
                "moment {power}: {}",
                moment(power)
            );
        }
        let mut some = [0.0; 37];
        normal.fill(1001, &mut some);
        assert_eq!(some[..], all[1001..1038]);
    }
}
