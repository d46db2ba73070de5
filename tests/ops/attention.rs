//! `softmax(scale q k^T, causal) v` over a cache of blocks.

use super::*;
use bytemuck::Zeroable;
use gpt2rs::ops::Rows;
use gpt2rs::ops::attention::{Append, Attention, BLOCK, Cached, RUN, Scratch, block_bytes};
use gpt2rs::ops::pairs::{Bf16, Bf16Dots, F32, Int8};
use gpt2rs::pool::Columns;
use gpt2rs::simd::{Kernel, Simd};
use half::bf16;
use proptest::prelude::*;
use std::iter::once;
use std::marker::PhantomData;

/// A kind of cache, and what its computations add to the errors of float32 ones.
trait Tested: Cached {
    /// Whether weights are rounded to bfloat16 and subnormals are zero.
    const FLUSHES: bool = false;
    fn run(isa: Isa, attention: Attention<'_, Self>) {
        isa.run(attention);
    }
    /// An element in units of its scale.
    fn units(element: Self::Element) -> f64;
    /// What an input stands for, in order, in units of its scale.
    fn input(x: Self::X) -> [f64; 2];
}

impl Tested for F32 {
    fn units(element: f32) -> f64 {
        f64::from(element)
    }
    fn input(x: [f32; 2]) -> [f64; 2] {
        x.map(f64::from)
    }
}

impl Tested for Bf16 {
    fn units(element: bf16) -> f64 {
        element.to_f64()
    }
    fn input(x: [f32; 2]) -> [f64; 2] {
        x.map(f64::from)
    }
}

impl Tested for Bf16Dots {
    const FLUSHES: bool = true;
    fn run(isa: Isa, attention: Attention<'_, Bf16Dots>) {
        isa.run_flushing(attention);
    }
    fn units(element: bf16) -> f64 {
        element.to_f64()
    }
    fn input([second, first]: [bf16; 2]) -> [f64; 2] {
        [first.to_f64(), second.to_f64()]
    }
}

impl Tested for Int8 {
    fn units(element: i8) -> f64 {
        f64::from(element)
    }
    fn input(x: [i16; 2]) -> [f64; 2] {
        x.map(f64::from)
    }
}

/// A vector as a cache holds it, and as a query enters products; each with its scale.
struct Vector<'a, P>(&'a [f32], PhantomData<P>);

impl<P: Cached> Kernel for Vector<'_, P> {
    type Output = (Vec<P::Element>, f32, Vec<P::X>, f32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let mut stored = vec![P::Element::zeroed(); self.0.len()];
        let mut inputs = vec![P::X::zeroed(); self.0.len().div_ceil(2)];
        let stored_scale = P::store(simd, self.0, &mut stored);
        let scale = P::inputs(simd, self.0, &mut inputs);
        (stored, stored_scale, inputs, scale)
    }
}

/// (values, scale) of a vector as it is stored.
fn held<P: Tested>(vector: &[f32]) -> (Vec<f64>, f64) {
    let (stored, scale, ..) = Isa::available()[0].run(Vector::<P>(vector, PhantomData));
    let scale = f64::from(scale);
    (stored.into_iter().map(|element| P::units(element) * scale).collect(), scale)
}

/// The values of a query as it is multiplied.
fn entered<P: Tested>(query: &[f32]) -> Vec<f64> {
    let (.., inputs, scale) = Isa::available()[0].run(Vector::<P>(query, PhantomData));
    let all = inputs.into_iter().flat_map(P::input).map(|value| value * f64::from(scale));
    all.take(query.len()).collect()
}

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

/// One head's blocks.
type Blocks = Vec<Vec<Line>>;

fn append<P: Cached>(isa: Isa, blocks: &mut Blocks, first: usize, hs: usize, keys: &[f32], values: &[f32]) {
    let mut blocks: Vec<&mut [u8]> = blocks.iter_mut().map(|block| bytemuck::cast_slice_mut(block)).collect();
    let rows = keys.len() / hs;
    let (keys, values) = (spread(keys, hs, hs + 3), spread(values, hs, hs + 1));
    isa.run(Append::<P> {
        keys: Rows::new(&keys, hs + 3, hs),
        values: Rows::new(&values, hs + 1, hs),
        rows,
        first,
        blocks: &mut blocks,
        cached: PhantomData,
    });
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

    /// A cache of the first `len` positions, written `at_once` at a time. Blocks have been used before: positions that
    /// are not written hold what another sequence left there, and that may not be used.
    fn cache_in<P: Cached>(&self, isa: Isa, len: usize, at_once: usize) -> Blocks {
        let hs = self.hs;
        let mut blocks = vec![lines(block_bytes::<P>(hs)); len.div_ceil(BLOCK)];
        for position in 0..BLOCK * blocks.len() {
            let left = vec![[FORBIDDEN, f32::INFINITY, -1e30][position % 3]; hs];
            append::<P>(isa, &mut blocks, position, hs, &left, &left);
        }
        for first in (0..len).step_by(at_once) {
            let range = first * hs..len.min(first + at_once) * hs;
            append::<P>(isa, &mut blocks, first, hs, &self.keys[range.clone()], &self.values[range]);
        }
        blocks
    }

    fn cache<P: Cached>(&self, isa: Isa, len: usize) -> Blocks {
        self.cache_in::<P>(isa, len, usize::MAX / 2)
    }

    /// The outputs of `count` queries from `first` on.
    fn compute<P: Tested>(&self, isa: Isa, cache: &Blocks, first: usize, count: usize) -> Vec<f32> {
        let (q_stride, stride) = (self.hs + 1, self.hs + 2);
        let q = spread(&self.q[first * self.hs..][..count * self.hs], self.hs, q_stride);
        let mut out = spread(&vec![0.0; count * self.hs], self.hs, stride);
        let blocks: Vec<&[u8]> = cache.iter().map(|block| bytemuck::cast_slice(block)).collect();
        let [columns] = Columns::split(&mut out, stride, count, once(0..self.hs)).try_into().ok().unwrap();
        let attention = Attention::<P> {
            q: Rows::new(&q, q_stride, self.hs),
            rows: count,
            position: self.position + first,
            blocks: &blocks,
            cached: PhantomData,
            scale: self.scale,
            out: columns,
            scratch: &mut Scratch::default(),
        };
        P::run(isa, attention);
        gather(&out, self.hs, stride)
    }

    /// Naive attention of query `row` in float64, on keys, values and the query as they are held: (value, bound) of each
    /// channel.
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
    ///
    /// Scaled caches: four roundings more of a score and of a sum (from an integer, and the products with three
    /// scales), and one of each weight with its value's scale, after which a run's weights are rounded to steps of their
    /// greatest / 32767: half a step, 2% for the roundings on the way to it, of each value in its scale's units. In the
    /// flushing mode weights are rounded to bfloat16 (2^-8), and each of the products may lose TINY.
    fn expected<P: Tested>(&self, cached: &[[(Vec<f64>, f64); 2]], row: usize) -> Vec<(f64, f64)> {
        let q = entered::<P>(&self.q[row * self.hs..][..self.hs]);
        let visible = self.position + row + 1;
        let cached = &cached[..visible];
        let scale = f64::from(self.scale);
        let more = if P::SCALED { 4 } else { 0 };
        let scores: Vec<(f64, f64)> = cached
            .iter()
            .map(|[(key, _), _]| {
                let terms = || q.iter().zip(key).map(|(&q, &k)| q * k);
                let magnitude: f64 = terms().map(f64::abs).sum();
                (terms().sum::<f64>() * scale, gamma(self.hs + 1 + more) * magnitude * scale)
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
        let mut chains = gamma(64 + more + 2 * runs) + gamma(8 + 2 * runs) + UNIT;
        if P::FLUSHES {
            chains += 1.0 / 256.0;
        }
        // Of each run, half a step of its weights with their values' scales.
        let steps: Vec<f64> = weights
            .chunks(RUN)
            .zip(cached.chunks(RUN))
            .map(|(weights, cached)| {
                let scaled = weights.iter().zip(cached).map(|((weight, _), [_, (_, scale)])| weight * scale);
                if P::SCALED { 0.51 * scaled.fold(0.0, f64::max) / 32767.0 } else { 0.0 }
            })
            .collect();
        (0..self.hs)
            .map(|channel| {
                let (mut value, mut bound) = (0.0, 0.0);
                for (j, ([_, (values, scale)], (weight, error))) in cached.iter().zip(&weights).enumerate() {
                    let v = values[channel];
                    value += weight * v;
                    bound += weight * v.abs() * (error + mean_error + chains);
                    if P::SCALED && *scale > 0.0 {
                        bound += steps[j / RUN] * v.abs() / scale;
                    }
                }
                (value, 1.01 * bound + 3.0 * visible as f64 * TINY)
            })
            .collect()
    }

    fn check<P: Tested>(&self) {
        let len = self.position + self.rows;
        let results = on_every_isa(|isa| self.compute::<P>(isa, &self.cache::<P>(isa, len), 0, self.rows));
        let positions = self.keys.chunks_exact(self.hs).zip(self.values.chunks_exact(self.hs));
        let cached: Vec<_> = positions.map(|(key, value)| [held::<P>(key), held::<P>(value)]).collect();
        for (row, results) in results.chunks_exact(self.hs).enumerate() {
            let expected = self.expected::<P>(&cached, row);
            for (channel, (&result, (value, bound))) in results.iter().zip(expected).enumerate() {
                let error = (f64::from(result) - value).abs();
                assert!(
                    error <= bound,
                    "query {row}, channel {channel}: {result} for {value}: {error:e} above {bound:e}"
                );
            }
        }
    }

    /// Each query alone, on a cache that ends with it, and any two parts of the queries give the bits of all at once.
    fn check_cuts<P: Tested>(&self, cut: usize) {
        let len = self.position + self.rows;
        for isa in Isa::available() {
            let cache = |len| self.cache::<P>(isa, len);
            let whole = bits(&self.compute::<P>(isa, &cache(len), 0, self.rows));
            let one_by_one = self.cache_in::<P>(isa, len, 1);
            assert_eq!(bits(&self.compute::<P>(isa, &one_by_one, 0, self.rows)), whole, "{}", isa.name());
            let alone: Vec<u32> = (0..self.rows)
                .flat_map(|row| bits(&self.compute::<P>(isa, &cache(self.position + row + 1), row, 1)))
                .collect();
            assert_eq!(alone, whole, "{}", isa.name());
            let first = self.compute::<P>(isa, &cache(self.position + cut), 0, cut);
            let second = self.compute::<P>(isa, &cache(len), cut, self.rows - cut);
            assert_eq!([bits(&first), bits(&second)].concat(), whole, "{} cut at {cut}", isa.name());
        }
    }

    /// What positions after query `last` hold is nothing to the queries up to it.
    fn check_causality<P: Tested>(&self, last: usize) {
        let len = self.position + self.rows;
        let seen = (last + 1) * self.hs;
        for isa in Isa::available() {
            let clean = self.compute::<P>(isa, &self.cache::<P>(isa, len), 0, self.rows);
            for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut cache = self.cache::<P>(isa, len);
                let later = vec![broken; (self.rows - 1 - last) * self.hs];
                append::<P>(isa, &mut cache, self.position + last + 1, self.hs, &later, &later);
                let results = self.compute::<P>(isa, &cache, 0, self.rows);
                assert_eq!(bits(&results[..seen]), bits(&clean[..seen]), "{} {broken}", isa.name());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_queries(
        hs in 1usize..=130,
        rows in 1usize..=80,
        position in 0usize..=200,
        loudness in prop::sample::select(vec![0.1f32, 1.0, 8.0]),
        seed: u64,
    ) {
        let case = Case::new(hs, rows, position, loudness, seed);
        case.check::<F32>();
        case.check::<Bf16>();
        case.check::<Bf16Dots>();
        case.check::<Int8>();
    }

    #[test]
    fn one_query_or_many(hs in 1usize..=70, rows in 2usize..=70, position in 0usize..=140, seed: u64) {
        let case = Case::new(hs, rows, position, 1.0, seed);
        let cut = 1 + seed as usize % (rows - 1);
        case.check_cuts::<F32>(cut);
        case.check_cuts::<Bf16>(cut);
        case.check_cuts::<Bf16Dots>(cut);
        case.check_cuts::<Int8>(cut);
    }

    #[test]
    fn later_positions_do_not_count(hs in 1usize..=70, rows in 2usize..=70, position in 0usize..=140, seed: u64) {
        let case = Case::new(hs, rows, position, 1.0, seed);
        let last = seed as usize % rows;
        case.check_causality::<F32>(last);
        case.check_causality::<Bf16>(last);
        case.check_causality::<Bf16Dots>(last);
        case.check_causality::<Int8>(last);
    }
}

/// From a single channel to more than any model has, with positions on both sides of a run's border.
#[test]
fn odd_head_sizes() {
    for hs in [1, 3, 5, 16, 24, 64, 80, 600] {
        for (rows, position) in [(1, 0), (1, 63), (1, 64), (7, 60), (14, 130)] {
            let case = Case::new(hs, rows, position, 1.0, (hs + position) as u64);
            case.check::<F32>();
            case.check::<Bf16>();
            case.check::<Bf16Dots>();
            case.check::<Int8>();
        }
    }
}

/// The first position attends to itself alone: its value comes back in the bits that the cache holds.
#[test]
fn the_first_position_gives_its_own_value() {
    fn check<P: Tested>(case: &Case) {
        let result = on_every_isa(|isa| case.compute::<P>(isa, &case.cache::<P>(isa, 1), 0, 1));
        let expected: Vec<f32> = held::<P>(&case.values).0.into_iter().map(|value| value as f32).collect();
        assert_eq!(bits(&result), bits(&expected));
    }
    let case = Case::new(37, 1, 0, 1.0, 9);
    check::<F32>(&case);
    check::<Bf16>(&case);
    check::<Bf16Dots>(&case);
    case.check::<Int8>();
}

/// Scores so far apart that all but one weight are zero, in each run in turn.
#[test]
fn one_score_may_outweigh_all_others() {
    fn check<P: Tested>(case: &Case, loudest: usize) {
        let result = on_every_isa(|isa| case.compute::<P>(isa, &case.cache::<P>(isa, 200), 0, 1));
        let (expected, _) = held::<P>(&case.values[loudest * 16..][..16]);
        let expected: Vec<f32> = expected.into_iter().map(|value| value as f32).collect();
        assert_eq!(bits(&result), bits(&expected), "position {loudest}");
    }
    for loudest in [0, 63, 64, 130, 199] {
        let mut case = Case::new(16, 1, 199, 1.0, 11);
        case.q.fill(10.0);
        case.keys.fill(-10.0);
        case.keys[loudest * 16..][..16].fill(10.0);
        check::<F32>(&case, loudest);
        check::<Bf16>(&case, loudest);
        check::<Bf16Dots>(&case, loudest);
        case.check::<Int8>();
    }
}

/// Stored vectors: the greatest magnitude is 127, and what is not finite makes NaN of the whole vector.
#[test]
fn int8_vectors_are_within_half_a_step() {
    let mut random = Random(5);
    for len in [1, 2, 15, 16, 17, 64, 100] {
        for exponent in -34..38 {
            let vector = random.values(len, 10.0f32.powi(exponent));
            let (values, scale) = held::<Int8>(&vector);
            let greatest =
                vector.iter().fold(0.0, |greatest: f64, &value| greatest.max(f64::from(value.abs())));
            assert!((scale - greatest / 127.0).abs() <= UNIT * scale + TINY);
            for (value, held) in vector.iter().zip(values) {
                let error = (f64::from(*value) - held).abs();
                assert!(error <= 0.501 * scale, "{value:e} became {held:e}, steps of {scale:e}");
            }
        }
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut vector = random.values(len, 1.0);
            vector[len / 2] = broken;
            assert!(held::<Int8>(&vector).1.is_nan());
        }
    }
    assert_eq!(held::<Int8>(&[0.0, -0.0, 0.0]), (vec![0.0; 3], 0.0));
    // Too small for the reciprocal of a scale: zeros.
    assert_eq!(held::<Int8>(&[1e-40, -f32::from_bits(1)]), (vec![0.0; 2], 0.0));
}

/// A query or a key that is not finite makes NaN of what sees it, and of nothing else.
#[test]
fn what_is_not_finite_shows() {
    fn check<P: Tested>() {
        let (hs, rows) = (20, 30);
        let clean = Case::new(hs, rows, 50, 1.0, 3);
        let mut poisoned = Case::new(hs, rows, 50, 1.0, 3);
        poisoned.q[4 * hs + 7] = f32::NAN;
        poisoned.keys[(50 + 20) * hs + 3] = f32::NAN;
        let compute =
            |case: &Case| on_every_isa(|isa| case.compute::<P>(isa, &case.cache::<P>(isa, 80), 0, rows));
        let (expected, results) = (compute(&clean), compute(&poisoned));
        for (row, (result, expected)) in results.chunks(hs).zip(expected.chunks(hs)).enumerate() {
            if row == 4 || row >= 20 {
                assert!(result.iter().all(|value| value.is_nan()), "query {row}");
            } else {
                assert_eq!(bits(result), bits(expected), "query {row}");
            }
        }
    }
    check::<F32>();
    check::<Bf16>();
    check::<Bf16Dots>();
    check::<Int8>();
}
