//! `then(x @ w + bias)`.

use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::Rows;
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::matmul::{MatMul, NR, Panels, Then};
use gpt2rs::pool::Columns;
use gpt2rs::simd::Element;
use half::bf16;
use proptest::prelude::*;

/// Operands of a product of (rows, K) with (K, N).
struct Product<W> {
    rows: usize,
    k: usize,
    n: usize,
    x: Vec<f32>,
    /// (K, N), row-major.
    w: Vec<W>,
    /// In panels; the lanes past the last column hold what may not be used.
    packed: Vec<W>,
    /// (N,), or empty.
    bias: Vec<f32>,
    /// (rows, N), for [`Epilogue::AddTo`].
    residual: Vec<f32>,
}

#[derive(Clone, Copy)]
enum Epilogue {
    Store,
    Activate(Activation),
    AddTo,
}

impl<W: Element> Product<W> {
    fn new((rows, k, n): (usize, usize, usize), with_bias: bool, seed: u64) -> Product<W> {
        let mut random = Random(seed);
        let w: Vec<W> = random.values(k * n, 1.0).into_iter().map(W::from_f32).collect();
        let mut packed = vec![W::from_f32(FORBIDDEN); Panels::<W>::packed_len(k, n)];
        for (i, row) in w.chunks_exact(n).enumerate() {
            for (column, &value) in row.iter().enumerate() {
                packed[column / NR * k * NR + i * NR + column % NR] = value;
            }
        }
        let bias = random.values(if with_bias { n } else { 0 }, 2.0);
        let x = random.values(rows * k, 3.0);
        Product { rows, k, n, x, w, packed, bias, residual: random.values(rows * n, 5.0) }
    }

    /// The (rows, N) result, its columns computed in one part for each two neighbours of `borders` (in panels).
    fn compute(&self, isa: Isa, epilogue: Epilogue, borders: &[usize]) -> Vec<f32> {
        let (x_stride, stride) = (self.k + 3, self.n + 5);
        let x = spread(&self.x, self.k, x_stride);
        let empty = vec![0.0; self.rows * self.n];
        let mut out = spread(&empty, self.n, stride);
        let mut residual = spread(&self.residual, self.n, stride);
        let w = Panels::new(&self.packed, self.k, self.n);
        let ranges = || borders.windows(2).map(|border| w.columns(border[0]..border[1]));
        let outs = Columns::split(&mut out, stride, self.rows, ranges());
        let residuals = Columns::split(&mut residual, stride, self.rows, ranges());
        for (out, residual) in outs.into_iter().zip(residuals) {
            let x = Rows::new(&x, x_stride, self.k);
            let then = match epilogue {
                Epilogue::Store => Then::Store,
                Epilogue::Activate(activation) => Then::Activate(activation),
                Epilogue::AddTo => Then::AddTo(residual),
            };
            isa.run(MatMul { x, rows: self.rows, w, bias: &self.bias, then, out });
        }
        let out = gather(&out, self.n, stride);
        let residual = gather(&residual, self.n, stride);
        if matches!(epilogue, Epilogue::AddTo) { residual } else { out }
    }

    /// Row `row` alone.
    fn row(&self, row: usize) -> Product<W> {
        let (k, n) = (self.k, self.n);
        Product {
            rows: 1,
            x: self.x[row * k..][..k].to_vec(),
            w: self.w.clone(),
            packed: self.packed.clone(),
            bias: self.bias.clone(),
            residual: self.residual[row * n..][..n].to_vec(),
            ..*self
        }
    }

    /// `(row, column, x, w)` of every output: the factors in the order of k.
    fn outputs(&self) -> impl Iterator<Item = (usize, usize, &[f32], impl Iterator<Item = f32>)> {
        (0..self.rows * self.n).map(|i| {
            let (row, column) = (i / self.n, i % self.n);
            let w = self.w[column..].iter().step_by(self.n).map(|w| w.to_f32());
            (row, column, &self.x[row * self.k..][..self.k], w)
        })
    }

    /// The definition of the result: one chain of fused multiply-adds over k ascending, then the bias.
    fn chains(&self) -> Vec<f32> {
        let outputs = self.outputs().map(|(_, column, x, w)| {
            let sum = x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(w, sum));
            self.bias.get(column).map_or(sum, |bias| sum + bias)
        });
        outputs.collect()
    }

    /// K roundings of the chain and one of the bias: `|error| <= gamma_{K+1} (sum |x w| + |bias|)`, and half of 2^-149
    /// for each where results are subnormal.
    fn check_against_float64(&self, results: &[f32]) {
        for ((row, column, x, w), &result) in self.outputs().zip(results) {
            let bias = self.bias.get(column).copied().map_or(0.0, f64::from);
            let (mut sum, mut magnitude) = (bias, bias.abs());
            for (&x, w) in x.iter().zip(w) {
                sum += f64::from(x) * f64::from(w);
                magnitude += (f64::from(x) * f64::from(w)).abs();
            }
            let bound = gamma(self.k + 1) * magnitude + (self.k + 1) as f64 * UNIT * TINY;
            let error = (f64::from(result) - sum).abs();
            assert!(error <= bound, "({row}, {column}): {result} for {sum}: {error:e} above {bound:e}");
        }
    }

    fn check(&self, borders: &[usize]) {
        let stored = on_every_isa(|isa| self.compute(isa, Epilogue::Store, borders));
        assert_eq!(bits(&stored), bits(&self.chains()));
        self.check_against_float64(&stored);

        for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
            let activated = on_every_isa(|isa| self.compute(isa, Epilogue::Activate(activation), borders));
            let mut expected = stored.clone();
            activate_all(Isa::available()[0], activation, &mut expected);
            assert_eq!(bits(&activated), bits(&expected), "{activation:?}");
        }

        let added = on_every_isa(|isa| self.compute(isa, Epilogue::AddTo, borders));
        let expected: Vec<f32> = self.residual.iter().zip(&stored).map(|(x, sum)| x + sum).collect();
        assert_eq!(bits(&added), bits(&expected));
    }
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
        Product::<f32>::new((rows, k, n), with_bias, seed).check(&borders);
        Product::<bf16>::new((rows, k, n), with_bias, seed).check(&borders);
    }

    #[test]
    fn a_row_of_many_is_the_row_alone(rows in 2usize..=40, k in 1usize..=600, n in 1usize..=100, seed: u64) {
        fn check<W: Element>(product: &Product<W>, row: usize) {
            let (n, borders) = (product.n, [0, product.n.div_ceil(NR)]);
            for isa in Isa::available() {
                let all = product.compute(isa, Epilogue::Store, &borders);
                let alone = product.row(row).compute(isa, Epilogue::Store, &borders);
                assert_eq!(bits(&all[row * n..][..n]), bits(&alone), "{}", isa.name());
            }
        }
        let row = seed as usize % rows;
        check(&Product::<f32>::new((rows, k, n), true, seed), row);
        check(&Product::<bf16>::new((rows, k, n), true, seed), row);
    }
}

/// One above and one below what the tiles and the pieces of k are made of.
#[test]
fn shapes_at_the_tiles_borders() {
    for rows in [1, 3, 4, 6, 7, 12, 13, 14, 15, 28, 29] {
        for k in [1, 255, 256, 257, 513] {
            for n in [1, 16, 17, NR, NR + 1] {
                let product = Product::<f32>::new((rows, k, n), true, (rows * k * n) as u64);
                let results = on_every_isa(|isa| product.compute(isa, Epilogue::Store, &[0, n.div_ceil(NR)]));
                assert_eq!(bits(&results), bits(&product.chains()), "{rows} x {k} x {n}");
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_leaves_the_others_alone() {
    let clean = Product::<f32>::new((17, 300, 50), true, 1);
    let mut poisoned = Product::<f32>::new((17, 300, 50), true, 1);
    poisoned.x[5 * 300 + 7] = f32::NAN;
    poisoned.x[16 * 300] = f32::INFINITY;
    let expected = clean.chains();
    let results = on_every_isa(|isa| poisoned.compute(isa, Epilogue::Store, &[0, 2]));
    for (row, (result, expected)) in results.chunks(50).zip(expected.chunks(50)).enumerate() {
        match row {
            5 => assert!(result.iter().all(|value| value.is_nan())),
            16 => assert!(result.iter().all(|value| !value.is_finite())),
            _ => assert_eq!(bits(result), bits(expected)),
        }
    }
}

#[test]
fn no_rows_and_no_columns_are_no_work() {
    let product = Product::<f32>::new((3, 5, 40), true, 1);
    let w = Panels::new(&product.packed, 5, 40);
    let mut out = [7.0; 3 * 40];
    for isa in Isa::available() {
        for (rows, columns) in [(0, 0..40), (3, 32..32)] {
            let [part] = Columns::split(&mut out, 40, 3, [columns]).try_into().ok().unwrap();
            let x = Rows::new(&product.x, 5, 5);
            isa.run(MatMul { x, rows, w, bias: &product.bias, then: Then::Store, out: part });
        }
        assert_eq!(out, [7.0; 3 * 40]);
    }
}
