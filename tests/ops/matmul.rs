//! `then(x @ w + bias)`.

use super::simd::flushing_fma;
use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::Rows;
use gpt2rs::ops::gelu::{activate, activate_all};
use gpt2rs::ops::matmul::{MatMul, Product, Quantised, Steps, Then};
use gpt2rs::ops::pairs::{Bf16, Bf16Dots, F32};
use gpt2rs::ops::panels::{Int4Groups, Int8Groups};
use gpt2rs::ops::round::{QuantiseRows, RoundRows};
use gpt2rs::pool::Columns;
use gpt2rs::simd::{Kernel, LANES, Simd, load_partial, store_partial};
use half::bf16;
use proptest::prelude::*;
use std::marker::PhantomData;

/// Activations in each type that a format takes.
#[derive(Default)]
pub struct Inputs {
    rows: usize,
    k: usize,
    stride: usize,
    pairs: Vec<[f32; 2]>,
    rounded: Vec<[bf16; 2]>,
    values: Vec<[[i8; 4]; 2]>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

/// A format with its kind of activations.
pub trait Tested: Product {
    /// Roundings on the way to a sum over K.
    fn roundings(k: usize) -> usize;
    /// (rows, K) activations.
    fn prepare(isa: Isa, x: &[f32], rows: usize, k: usize) -> Inputs;
    fn inputs(inputs: &Inputs) -> Self::Inputs<'_>;
    /// The values that those stand for, (rows, K).
    fn values(inputs: &Inputs) -> Vec<f64>;
    fn run(isa: Isa, product: MatMul<'_, Self>) {
        isa.run(product);
    }
    /// Sums as its epilogue activates them.
    fn activate(activation: Activation, sums: &mut [f32]) {
        activate_all(Isa::available()[0], activation, sums);
    }
    /// A link of the chain that defines the result, where it is one over K.
    fn link(sum: f32, x: f32, w: f32) -> Option<f32> {
        Some(x.mul_add(w, sum))
    }
}

macro_rules! widened {
    ($($format:ty),+) => {
        $(impl Tested for $format {
            fn roundings(k: usize) -> usize {
                k
            }
            fn prepare(_: Isa, x: &[f32], rows: usize, k: usize) -> Inputs {
                let stride = k.div_ceil(2) + 1;
                let mut pairs = vec![[FORBIDDEN; 2]; rows * stride];
                for (row, pairs) in x.chunks_exact(k).zip(pairs.chunks_exact_mut(stride)) {
                    for (x, pair) in row.chunks(2).zip(pairs) {
                        *pair = [x[0], x.get(1).copied().unwrap_or(0.0)];
                    }
                }
                Inputs { rows, k, stride, pairs, ..Inputs::default() }
            }
            fn inputs(inputs: &Inputs) -> Self::Inputs<'_> {
                Rows::new(&inputs.pairs, inputs.stride, inputs.k.div_ceil(2))
            }
            fn values(inputs: &Inputs) -> Vec<f64> {
                let rows = inputs.pairs.chunks_exact(inputs.stride);
                rows.flat_map(|row| row.as_flattened()[..inputs.k].iter().map(|&x| f64::from(x))).collect()
            }
        })+
    };
}

widened!(F32, Bf16);

impl Tested for Bf16Dots {
    fn roundings(k: usize) -> usize {
        k
    }
    fn prepare(isa: Isa, x: &[f32], rows: usize, k: usize) -> Inputs {
        let stride = k.div_ceil(2) + 1;
        let mut rounded = vec![[bf16::NAN; 2]; rows * stride];
        isa.run(RoundRows { x: Rows::new(x, k, k), rows, out: &mut rounded, stride });
        Inputs { rows, k, stride, rounded, ..Inputs::default() }
    }
    fn inputs(inputs: &Inputs) -> Rows<'_, [bf16; 2]> {
        Rows::new(&inputs.rounded, inputs.stride, inputs.k.div_ceil(2))
    }
    fn values(inputs: &Inputs) -> Vec<f64> {
        let mut values = Vec::new();
        for row in inputs.rounded.chunks_exact(inputs.stride) {
            let in_order = row.iter().flat_map(|&[second, first]| [first, second]);
            values.extend(in_order.take(inputs.k).map(|x| f64::from(x.to_f32())));
        }
        values
    }
    fn run(isa: Isa, product: MatMul<'_, Bf16Dots>) {
        isa.run_flushing(product);
    }
    fn activate(activation: Activation, sums: &mut [f32]) {
        Isa::available()[0].run_flushing(Activate(activation, sums));
    }
    fn link(sum: f32, x: f32, w: f32) -> Option<f32> {
        Some(flushing_fma(bf16::from_f32(x), bf16::from_f32(w), sum))
    }
}

/// An activation function in whatever mode it is run.
struct Activate<'a>(Activation, &'a mut [f32]);

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for lanes in self.1.chunks_mut(LANES) {
            store_partial(simd, activate(simd, self.0, load_partial(simd, lanes)), lanes);
        }
    }
}

macro_rules! quantised {
    ($($format:ty),+) => {
        $(impl Tested for $format {
            /// One of each group's sum, and one of the product of its scales or with the factor.
            fn roundings(k: usize) -> usize {
                k.div_ceil(Self::GROUP) + 1
            }
            fn prepare(isa: Isa, x: &[f32], rows: usize, k: usize) -> Inputs {
                let groups = k.div_ceil(Self::GROUP);
                let stride = groups * Self::GROUP / 8;
                let sums = groups * (Self::GROUP / Self::SUM);
                let mut values = vec![[[0; 4]; 2]; rows * stride];
                let (mut scales, mut starts) = (vec![FORBIDDEN; rows * groups], vec![0; rows * sums]);
                let x = Rows::new(x, k, k);
                let bytes = bytemuck::cast_slice_mut(&mut values);
                let (scales_out, starts_out) = (&mut scales[..], &mut starts[..]);
                isa.run(QuantiseRows {
                    x,
                    rows,
                    rotation: 1,
                    values: bytes,
                    scales: scales_out,
                    starts: starts_out,
                    format: PhantomData::<Self>,
                });
                Inputs { rows, k, stride, values, scales, starts, ..Inputs::default() }
            }
            fn inputs(inputs: &Inputs) -> Quantised<'_> {
                let groups = inputs.k.div_ceil(Self::GROUP);
                Quantised {
                    values: Rows::new(&inputs.values, inputs.stride, inputs.stride),
                    scales: Rows::new(&inputs.scales, groups, groups),
                    starts: Rows::new(&inputs.starts, groups * (Self::GROUP / Self::SUM), groups * (Self::GROUP / Self::SUM)),
                }
            }
            fn values(inputs: &Inputs) -> Vec<f64> {
                let mut all = Vec::new();
                for row in 0..inputs.rows {
                    let values = inputs.values[row * inputs.stride..][..inputs.stride].as_flattened().as_flattened();
                    let scales = &inputs.scales[row * inputs.k.div_ceil(Self::GROUP)..];
                    let scale = |i: usize| f64::from(scales[i / Self::GROUP]);
                    all.extend((0..inputs.k).map(|i| f64::from(values[i]) * scale(i)));
                }
                all
            }
            fn link(_: f32, _: f32, _: f32) -> Option<f32> {
                None
            }
        })+
    };
}

quantised!(Int8Groups, Int4Groups);

/// Operands of a product of (rows, K) with (K, N).
struct Case<F> {
    rows: usize,
    k: usize,
    n: usize,
    x: Vec<f32>,
    /// In panels; the lanes past the last column hold what may not be used.
    packed: Vec<Line>,
    /// (N,), or empty.
    bias: Vec<f32>,
    /// (rows, N), for [`Epilogue::AddTo`].
    residual: Vec<f32>,
    format: PhantomData<F>,
}

#[derive(Clone, Copy)]
enum Epilogue {
    Store,
    Activate(Activation),
    AddTo,
}

impl<F: Tested> Case<F> {
    fn new((rows, k, n): (usize, usize, usize), with_bias: bool, seed: u64) -> Case<F> {
        let mut random = Random(seed);
        let packed = pack::<F>(&random.values(k * n, 1.0), k, n);
        let bias = random.values(if with_bias { n } else { 0 }, 2.0);
        let x = random.values(rows * k, 3.0);
        let residual = random.values(rows * n, 5.0);
        Case { rows, k, n, x, packed, bias, residual, format: PhantomData }
    }

    fn w(&self) -> Panels<'_, F> {
        Panels::new(bytemuck::cast_slice(&self.packed), self.k, self.n)
    }

    /// The (rows, N) result, its columns computed in one part for each two neighbours of `borders` (in panels).
    fn compute(&self, isa: Isa, epilogue: Epilogue, borders: &[usize]) -> Vec<f32> {
        let stride = self.n + 5;
        let inputs = F::prepare(isa, &self.x, self.rows, self.k);
        let empty = vec![0.0; self.rows * self.n];
        let mut out = spread(&empty, self.n, stride);
        let mut residual = spread(&self.residual, self.n, stride);
        let w = self.w();
        let ranges =
            || borders.windows(2).map(|border| (NR * border[0]).min(self.n)..(NR * border[1]).min(self.n));
        let outs = Columns::split(&mut out, stride, self.rows, ranges());
        let residuals = Columns::split(&mut residual, stride, self.rows, ranges());
        for (out, residual) in outs.into_iter().zip(residuals) {
            let x = F::inputs(&inputs);
            let then = match epilogue {
                Epilogue::Store => Then::Store,
                Epilogue::Activate(activation) => Then::Activate(activation),
                Epilogue::AddTo => Then::AddTo(residual),
            };
            F::run(isa, MatMul { x, rows: self.rows, w, bias: &self.bias, then, out });
        }
        let out = gather(&out, self.n, stride);
        let residual = gather(&residual, self.n, stride);
        if matches!(epilogue, Epilogue::AddTo) { residual } else { out }
    }

    /// Row `row` alone.
    fn row(&self, row: usize) -> Case<F> {
        let (k, n) = (self.k, self.n);
        Case {
            rows: 1,
            x: self.x[row * k..][..k].to_vec(),
            packed: self.packed.clone(),
            bias: self.bias.clone(),
            residual: self.residual[row * n..][..n].to_vec(),
            ..*self
        }
    }

    /// The definition of a result in bits, for the formats whose sums are one chain of fused multiply-adds over k
    /// ascending: that, and then the bias.
    fn check_chains(&self, results: &[f32]) {
        let w = held(self.w());
        let values = F::values(&F::prepare(Isa::available()[0], &self.x, self.rows, self.k));
        for (i, &result) in results.iter().enumerate() {
            let (row, column) = (i / self.n, i % self.n);
            let mut sum = 0.0;
            for (&x, &w) in values[row * self.k..].iter().zip(w[column..].iter().step_by(self.n)) {
                let Some(link) = F::link(sum, x as f32, w) else { return };
                sum = link;
            }
            let sum = self.bias.get(column).map_or(sum, |bias| sum + bias);
            assert_eq!(bits(&[result]), bits(&[sum]), "({row}, {column}): {result:e}, not {sum:e}");
        }
    }

    /// Of the values as they are held: the roundings of the sum and one of the bias, `|error| <= gamma_{n+1} (sum |x w| +
    /// |bias|)`, and half of 2^-149 for each where results are subnormal.
    fn check_against_float64(&self, results: &[f32]) {
        let w = held(self.w());
        let values = F::values(&F::prepare(Isa::available()[0], &self.x, self.rows, self.k));
        let roundings = F::roundings(self.k) + 1;
        for (i, &result) in results.iter().enumerate() {
            let (row, column) = (i / self.n, i % self.n);
            let bias = self.bias.get(column).copied().map_or(0.0, f64::from);
            let (mut sum, mut magnitude) = (bias, bias.abs());
            for (&x, &w) in values[row * self.k..][..self.k].iter().zip(w[column..].iter().step_by(self.n)) {
                sum += x * f64::from(w);
                magnitude += (x * f64::from(w)).abs();
            }
            let bound = gamma(roundings) * magnitude + roundings as f64 * UNIT * TINY;
            let error = (f64::from(result) - sum).abs();
            assert!(error <= bound, "({row}, {column}): {result} for {sum}: {error:e} above {bound:e}");
        }
    }

    fn check(&self, borders: &[usize]) {
        let stored = on_every_isa(|isa| self.compute(isa, Epilogue::Store, borders));
        self.check_chains(&stored);
        self.check_against_float64(&stored);

        for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
            let activated = on_every_isa(|isa| self.compute(isa, Epilogue::Activate(activation), borders));
            let mut expected = stored.clone();
            F::activate(activation, &mut expected);
            assert_eq!(bits(&activated), bits(&expected), "{activation:?}");
        }

        let added = on_every_isa(|isa| self.compute(isa, Epilogue::AddTo, borders));
        let expected: Vec<f32> = self.residual.iter().zip(&stored).map(|(x, sum)| x + sum).collect();
        assert_eq!(bits(&added), bits(&expected));
    }
}

macro_rules! of_every_format {
    ($check:ident) => {
        $check::<F32>();
        $check::<Bf16>();
        $check::<Bf16Dots>();
        $check::<Int8Groups>();
        $check::<Int4Groups>();
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(
        rows in 1usize..=40,
        k in 1usize..=600,
        n in 1usize..=200,
        with_bias: bool,
        cuts in (0usize..=7, 0usize..=7),
        seed: u64,
    ) {
        let panels = n.div_ceil(NR);
        let mut borders = vec![0, cuts.0.min(panels), cuts.1.min(panels), panels];
        borders.sort_unstable();
        let shape = (rows, k, n);
        Case::<F32>::new(shape, with_bias, seed).check(&borders);
        Case::<Bf16>::new(shape, with_bias, seed).check(&borders);
        Case::<Bf16Dots>::new(shape, with_bias, seed).check(&borders);
        Case::<Int8Groups>::new(shape, with_bias, seed).check(&borders);
        Case::<Int4Groups>::new(shape, with_bias, seed).check(&borders);
    }

    #[test]
    fn a_row_of_many_is_the_row_alone(rows in 2usize..=40, k in 1usize..=600, n in 1usize..=100, seed: u64) {
        fn check<F: Tested>(case: &Case<F>, row: usize) {
            let (n, borders) = (case.n, [0, case.n.div_ceil(NR)]);
            for isa in Isa::available() {
                let all = case.compute(isa, Epilogue::Store, &borders);
                let alone = case.row(row).compute(isa, Epilogue::Store, &borders);
                assert_eq!(bits(&all[row * n..][..n]), bits(&alone), "{}", isa.name());
            }
        }
        let (shape, row) = ((rows, k, n), seed as usize % rows);
        check(&Case::<F32>::new(shape, true, seed), row);
        check(&Case::<Bf16>::new(shape, true, seed), row);
        check(&Case::<Bf16Dots>::new(shape, true, seed), row);
        check(&Case::<Int8Groups>::new(shape, true, seed), row);
        check(&Case::<Int4Groups>::new(shape, true, seed), row);
    }
}

/// One above and one below what the tiles, the groups and the pieces of k are made of.
#[test]
fn shapes_at_the_tiles_borders() {
    fn check<F: Tested>() {
        for rows in [1, 2, 3, 4, 6, 7, 8, 12, 13, 14, 15, 28, 29] {
            for k in [1, F::GROUP - 1, F::GROUP, F::GROUP + 1, 255, 256, 257, 513] {
                for n in [1, 16, 17, NR, NR + 1] {
                    let case = Case::<F>::new((rows, k.max(1), n), true, (rows * k * n) as u64);
                    let results =
                        on_every_isa(|isa| case.compute(isa, Epilogue::Store, &[0, n.div_ceil(NR)]));
                    case.check_chains(&results);
                    case.check_against_float64(&results);
                }
            }
        }
    }
    of_every_format!(check);
}

/// More of k than a piece.
#[test]
fn several_pieces_of_k() {
    fn check<F: Tested>() {
        for (rows, k) in [(1, 5000), (30, 2100), (15, 4097)] {
            let case = Case::<F>::new((rows, k, 40), true, k as u64);
            let results = on_every_isa(|isa| case.compute(isa, Epilogue::Store, &[0, 2]));
            case.check_chains(&results);
            case.check_against_float64(&results);
        }
    }
    of_every_format!(check);
}

#[test]
fn a_row_that_is_not_finite_leaves_the_others_alone() {
    fn check<F: Tested>() {
        let clean = Case::<F>::new((17, 300, 50), true, 1);
        let mut poisoned = Case::<F>::new((17, 300, 50), true, 1);
        poisoned.x[5 * 300 + 7] = f32::NAN;
        poisoned.x[16 * 300] = f32::INFINITY;
        let expected = on_every_isa(|isa| clean.compute(isa, Epilogue::Store, &[0, 2]));
        let results = on_every_isa(|isa| poisoned.compute(isa, Epilogue::Store, &[0, 2]));
        for (row, (result, expected)) in results.chunks(50).zip(expected.chunks(50)).enumerate() {
            match row {
                5 => assert!(result.iter().all(|value| value.is_nan())),
                16 => assert!(result.iter().all(|value| !value.is_finite())),
                _ => assert_eq!(bits(result), bits(expected)),
            }
        }
    }
    of_every_format!(check);
}

/// A weight that is not finite shows in its column, and nowhere else.
#[test]
fn a_weight_that_is_not_finite_leaves_the_other_columns_alone() {
    fn check<F: Tested>() {
        let (rows, k, n) = (9, 200, 50);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let clean = Case::<F>::new((rows, k, n), true, 2);
            let mut poisoned = Case::<F>::new((rows, k, n), true, 2);
            let mut w = held(clean.w());
            // As it is held, so that the other columns are packed alike: a value that a format has stays.
            poisoned.packed = pack::<F>(&w, k, n);
            let expected = on_every_isa(|isa| poisoned.compute(isa, Epilogue::Store, &[0, 2]));
            w[77 * n + 33] = broken;
            poisoned.packed = pack::<F>(&w, k, n);
            let results = on_every_isa(|isa| poisoned.compute(isa, Epilogue::Store, &[0, 2]));
            for (i, (result, expected)) in results.into_iter().zip(expected).enumerate() {
                if i % n == 33 {
                    assert!(!result.is_finite(), "row {}: {result} from a weight of {broken}", i / n);
                } else {
                    assert_eq!(bits(&[result]), bits(&[expected]));
                }
            }
        }
    }
    of_every_format!(check);
}

#[test]
fn no_rows_and_no_columns_are_no_work() {
    fn check<F: Tested>() {
        let case = Case::<F>::new((3, 5, 40), true, 1);
        let mut out = [7.0; 3 * 40];
        for isa in Isa::available() {
            let inputs = F::prepare(isa, &case.x, 3, 5);
            for (rows, columns) in [(0, 0..40), (3, 32..32)] {
                let [out] = Columns::split(&mut out, 40, 3, [columns]).try_into().ok().unwrap();
                let x = F::inputs(&inputs);
                F::run(isa, MatMul { x, rows, w: case.w(), bias: &case.bias, then: Then::Store, out });
            }
            assert_eq!(out, [7.0; 3 * 40]);
        }
    }
    of_every_format!(check);
}
