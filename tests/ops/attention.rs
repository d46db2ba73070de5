//! `softmax(scale q k^T, causal) v` over a cache of blocks.

use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::attention::{Attention, BLOCK, RUN, append, block_len};
use gpt2rs::pool::Columns;
use gpt2rs::simd::Element;
use half::bf16;
use proptest::prelude::*;
use std::iter::once;

/// One head of one sequence: keys and values of all positions up to the last query's.
struct Case {
    hs: usize,
    /// Queries.
    rows: usize,
    /// The first query's.
    position: usize,
    scale: f32,
    /// (rows, HS).
    q: Vec<f32>,
    /// (position + rows, HS) each.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Case {
    fn new(hs: usize, rows: usize, position: usize, loudness: f32, seed: u64) -> Case {
        let mut random = Random(seed);
        let len = (position + rows) * hs;
        Case {
            hs,
            rows,
            position,
            scale: loudness / (hs as f32).sqrt(),
            q: random.values(rows * hs, 2.0),
            keys: random.values(len, 2.0),
            values: random.values(len, 1.0),
        }
    }

    /// A cache of the first `len` positions; whatever else its blocks hold may not be used.
    fn cache<T: Element>(&self, len: usize) -> Vec<Vec<T>> {
        let mut blocks = vec![vec![T::from_f32(FORBIDDEN); block_len(self.hs)]; len.div_ceil(BLOCK)];
        let positions = self.keys.chunks_exact(self.hs).zip(self.values.chunks_exact(self.hs));
        for (position, (key, value)) in positions.take(len).enumerate() {
            append(&mut blocks[position / BLOCK], position % BLOCK, key, value);
        }
        blocks
    }

    /// The outputs of `count` queries from `first` on.
    fn compute<T: Element>(&self, isa: Isa, cache: &[Vec<T>], first: usize, count: usize) -> Vec<f32> {
        let (q_stride, stride) = (self.hs + 1, self.hs + 2);
        let q = spread(&self.q[first * self.hs..][..count * self.hs], self.hs, q_stride);
        let mut out = spread(&vec![0.0; count * self.hs], self.hs, stride);
        let blocks: Vec<&[T]> = cache.iter().map(Vec::as_slice).collect();
        let [columns] = Columns::split(&mut out, stride, count, once(0..self.hs)).try_into().ok().unwrap();
        isa.run(Attention {
            q: Rows::new(&q, q_stride, self.hs),
            rows: count,
            position: self.position + first,
            blocks: &blocks,
            scale: self.scale,
            out: columns,
            scratch: &mut vec![FORBIDDEN; 1000],
        });
        gather(&out, self.hs, stride)
    }

    /// Naive attention of query `row` in float64: (value, bound) of each channel.
    ///
    /// With w_j the weight of position j, its errors are, relative and to first order:
    /// - of its score: a chain over HS and the scale, gamma_{HS+1} scale sum |q k|, as it stands in the exponent;
    /// - of the differences to the maxima, which add up to max - s_j: u (max - s_j);
    /// - of one exponential for the weight and one for each merge of the R runs, 4u each (2 units in the last place),
    ///   and of the product with it, u.
    ///
    /// The sum of the weights adds 8 roundings in a run (4 registers and the tree) and 2 a merge, the values' sum 64 and
    /// 2 a merge, the division one. An error of w_j shows in the numerator as w_j |v_j|, and in the denominator as
    /// w_j times the mean of |v|. Second order: 1%. Weights below 1.2e-38 count as zero: T TINY max |v|.
    fn expected<T: Element>(&self, row: usize) -> Vec<(f64, f64)> {
        let held = |value: f32| f64::from(T::from_f32(value).to_f32());
        let q = &self.q[row * self.hs..][..self.hs];
        let visible = self.position + row + 1;
        let keys = self.keys.chunks_exact(self.hs).take(visible);
        let scale = f64::from(self.scale);
        let scores: Vec<(f64, f64)> = keys
            .map(|key| {
                let terms = || q.iter().zip(key).map(|(&q, &k)| f64::from(q) * held(k));
                let magnitude: f64 = terms().map(f64::abs).sum();
                (terms().sum::<f64>() * scale, gamma(self.hs + 1) * magnitude * scale)
            })
            .collect();
        let max = scores.iter().map(|score| score.0).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score.0 - max).exp()).sum();
        let runs = visible.div_ceil(RUN);
        let weights: Vec<(f64, f64)> = scores
            .iter()
            .map(|&(score, error)| {
                let relative = error + UNIT * (max - score) + 5.0 * UNIT * (runs + 1) as f64;
                ((score - max).exp() / total, relative)
            })
            .collect();
        let mean_error: f64 = weights.iter().map(|(weight, error)| weight * error).sum();
        let chains = gamma(64 + 2 * runs) + gamma(8 + 2 * runs) + UNIT;
        (0..self.hs)
            .map(|channel| {
                let values = self.values[channel..].iter().step_by(self.hs).map(|&value| held(value));
                let (mut value, mut bound) = (0.0, 0.0);
                for (v, (weight, error)) in values.zip(&weights) {
                    value += weight * v;
                    bound += weight * v.abs() * (error + mean_error + chains);
                }
                (value, 1.01 * bound + visible as f64 * TINY)
            })
            .collect()
    }

    fn check<T: Element>(&self) {
        let cache = self.cache::<T>(self.position + self.rows);
        let results = on_every_isa(|isa| self.compute(isa, &cache, 0, self.rows));
        for (row, results) in results.chunks_exact(self.hs).enumerate() {
            for (channel, (&result, (value, bound))) in
                results.iter().zip(self.expected::<T>(row)).enumerate()
            {
                let error = (f64::from(result) - value).abs();
                assert!(
                    error <= bound,
                    "query {row}, channel {channel}: {result} for {value}: {error:e} above {bound:e}"
                );
            }
        }
    }

    /// Each query alone, on a cache that ends with it, and any two parts of the queries give the bits of all at once.
    fn check_cuts<T: Element>(&self, cut: usize) {
        let len = self.position + self.rows;
        for isa in Isa::available() {
            let whole = bits(&self.compute(isa, &self.cache::<T>(len), 0, self.rows));
            let alone: Vec<u32> = (0..self.rows)
                .flat_map(|row| bits(&self.compute(isa, &self.cache::<T>(self.position + row + 1), row, 1)))
                .collect();
            assert_eq!(alone, whole, "{}", isa.name());
            let first = self.compute(isa, &self.cache::<T>(self.position + cut), 0, cut);
            let second = self.compute(isa, &self.cache::<T>(len), cut, self.rows - cut);
            assert_eq!([bits(&first), bits(&second)].concat(), whole, "{} cut at {cut}", isa.name());
        }
    }

    /// What positions after query `last` hold is nothing to the queries up to it.
    fn check_causality<T: Element>(&self, last: usize) {
        let len = self.position + self.rows;
        let seen = (last + 1) * self.hs;
        for isa in Isa::available() {
            let clean = self.compute(isa, &self.cache::<T>(len), 0, self.rows);
            for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut cache = self.cache::<T>(len);
                for position in self.position + last + 1..len {
                    let row = vec![broken; self.hs];
                    append(&mut cache[position / BLOCK], position % BLOCK, &row, &row);
                }
                let results = self.compute(isa, &cache, 0, self.rows);
                assert_eq!(bits(&results[..seen]), bits(&clean[..seen]), "{} {broken}", isa.name());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_queries(
        hs in 1usize..=130,
        rows in 1usize..=80,
        position in 0usize..=200,
        loudness in prop::sample::select(vec![0.1f32, 1.0, 8.0]),
        seed: u64,
    ) {
        let case = Case::new(hs, rows, position, loudness, seed);
        case.check::<f32>();
        case.check::<bf16>();
    }

    #[test]
    fn one_query_or_many(hs in 1usize..=70, rows in 2usize..=70, position in 0usize..=140, seed: u64) {
        let case = Case::new(hs, rows, position, 1.0, seed);
        let cut = 1 + seed as usize % (rows - 1);
        case.check_cuts::<f32>(cut);
        case.check_cuts::<bf16>(cut);
    }

    #[test]
    fn later_positions_do_not_count(hs in 1usize..=70, rows in 2usize..=70, position in 0usize..=140, seed: u64) {
        let case = Case::new(hs, rows, position, 1.0, seed);
        let last = seed as usize % rows;
        case.check_causality::<f32>(last);
        case.check_causality::<bf16>(last);
    }
}

/// The first position attends to itself alone: its value comes back in the bits that the cache holds.
#[test]
fn the_first_position_gives_its_own_value() {
    let case = Case::new(37, 1, 0, 1.0, 9);
    let single = on_every_isa(|isa| case.compute(isa, &case.cache::<f32>(1), 0, 1));
    assert_eq!(bits(&single), bits(&case.values));
    let rounded: Vec<f32> = case.values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
    assert_eq!(bits(&on_every_isa(|isa| case.compute(isa, &case.cache::<bf16>(1), 0, 1))), bits(&rounded));
}

/// Scores so far apart that all but one weight are zero, in each run in turn.
#[test]
fn one_score_may_outweigh_all_others() {
    for loudest in [0, 63, 64, 130, 199] {
        let mut case = Case::new(16, 1, 199, 1.0, 11);
        case.q.fill(10.0);
        case.keys.fill(-10.0);
        case.keys[loudest * 16..][..16].fill(10.0);
        let result = on_every_isa(|isa| case.compute(isa, &case.cache::<f32>(200), 0, 1));
        assert_eq!(bits(&result), bits(&case.values[loudest * 16..][..16]), "position {loudest}");
    }
}
