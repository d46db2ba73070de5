//! LayerNorm. Ba, Kiros and Hinton, arXiv:1607.06450.

// Registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Rows;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// `out[i] = (x[i] - mean) / sqrt(variance + eps) * weight + bias` for each row of C values.
///
/// Sums run over 16 lanes (lane i takes values i, i + 16, ...) and one fixed tree; the variance is taken around the
/// mean in a second pass.
pub struct LayerNorm<'a> {
    /// (rows, C).
    pub x: Rows<'a>,
    /// (C,), the gain.
    pub weight: &'a [f32],
    /// (C,).
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
    /// As many rows as are wanted, `out_stride` apart.
    pub out: &'a mut [f32],
    /// Distance between rows of `out`.
    pub out_stride: usize,
}

/// Rows that are computed together, since each waits for its own sums.
const TOGETHER: usize = 4;

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let rows = self.out.len().div_ceil(self.out_stride);
        let mut row = 0;
        while row + TOGETHER <= rows {
            self.several::<S, TOGETHER>(simd, row);
            row += TOGETHER;
        }
        while row < rows {
            self.several::<S, 1>(simd, row);
            row += 1;
        }
    }
}

impl LayerNorm<'_> {
    /// `N` rows from `first` on.
    #[inline(always)]
    fn several<S: Simd, const N: usize>(&mut self, simd: S, first: usize) {
        let columns = self.x.columns();
        let scale = 1.0 / columns as f32;
        let (whole, rest) = (columns / LANES, columns % LANES);
        let mut x = [&[][..]; N];
        for r in 0..N {
            x[r] = self.x.row(first + r);
        }
        let mut sums = [simd.splat(0.0); N];
        for i in 0..whole {
            for r in 0..N {
                sums[r] = simd.add(sums[r], simd.load(&x[r].as_chunks().0[i]));
            }
        }
        let mut means = [simd.splat(0.0); N];
        for r in 0..N {
            if rest > 0 {
                sums[r] = simd.add(sums[r], load_partial(simd, &x[r][whole * LANES..]));
            }
            means[r] = simd.splat(simd.reduce_add(sums[r]) * scale);
        }
        let mut squares = [simd.splat(0.0); N];
        for i in 0..whole {
            for r in 0..N {
                let difference = simd.sub(simd.load(&x[r].as_chunks().0[i]), means[r]);
                squares[r] = simd.fma(difference, difference, squares[r]);
            }
        }
        let mut inverses = [simd.splat(0.0); N];
        for r in 0..N {
            if rest > 0 {
                // Lanes past the end would hold zeros, whose distance to the mean is none of the row's.
                let mut array = [0.0; LANES];
                simd.store(means[r], &mut array);
                array[..rest].copy_from_slice(&x[r][whole * LANES..]);
                let difference = simd.sub(simd.load(&array), means[r]);
                squares[r] = simd.fma(difference, difference, squares[r]);
            }
            let variance = simd.reduce_add(squares[r]) * scale;
            inverses[r] = simd.splat(1.0 / (variance + self.eps).sqrt());
        }
        for start in (0..columns).step_by(LANES) {
            let lanes = start..columns.min(start + LANES);
            let weight = load_partial(simd, &self.weight[lanes.clone()]);
            let bias = load_partial(simd, &self.bias[lanes.clone()]);
            for r in 0..N {
                let difference = simd.sub(load_partial(simd, &x[r][lanes.clone()]), means[r]);
                let value = simd.fma(simd.mul(difference, inverses[r]), weight, bias);
                let out = &mut self.out[(first + r) * self.out_stride..];
                store_partial(simd, value, &mut out[lanes.clone()]);
            }
        }
    }
}
