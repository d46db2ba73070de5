//! The gradients of LayerNorm.
//!
//! With `n = (x - mean) / sqrt(variance + eps)` and `g = dy * weight`, `dx = (g - mean(g) - n mean(g n)) / sqrt(variance +
//! eps)`; `dweight` sums `dy * n` and `dbias` sums `dy` over the tokens.

use super::moments;
use crate::ops::Rows;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// `dx += ...` for rows of C values; sums over a row run as in [`super::LayerNorm`].
pub struct LayerNormInput<'a> {
    /// (rows, C), what was normed.
    pub x: Rows<'a>,
    /// (rows, C).
    pub dy: Rows<'a>,
    /// (C,), the gain.
    pub weight: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
    /// As many rows as are wanted, `dx_stride` apart.
    pub dx: &'a mut [f32],
    /// Distance between rows of `dx`.
    pub dx_stride: usize,
    /// (rows, 2), written: the mean and the inverse deviation, for [`LayerNormParameters`].
    pub moments: &'a mut [[f32; 2]],
}

impl Kernel for LayerNormInput<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let c = self.x.columns();
        let scale = 1.0 / c as f32;
        for (i, (dx, of_row)) in self.dx.chunks_mut(self.dx_stride).zip(self.moments).enumerate() {
            let (x, dy, dx) = (self.x.row(i), self.dy.row(i), &mut dx[..c]);
            *of_row = moments(simd, x, self.eps);
            let (mean, inverse) = (simd.splat(of_row[0]), simd.splat(of_row[1]));
            let mut sum = simd.splat(0.0);
            let mut sum_normed = simd.splat(0.0);
            for ((x, dy), weight) in x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.weight.chunks(LANES)) {
                // Past the end both factors of g are zeros.
                let g = simd.mul(load_partial(simd, dy), load_partial(simd, weight));
                let normed = simd.mul(simd.sub(load_partial(simd, x), mean), inverse);
                sum = simd.add(sum, g);
                sum_normed = simd.fma(g, normed, sum_normed);
            }
            let mean_g = simd.splat(simd.reduce_add(sum) * scale);
            let mean_g_normed = simd.splat(simd.reduce_add(sum_normed) * scale);
            for (((x, dy), weight), dx) in
                x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.weight.chunks(LANES)).zip(dx.chunks_mut(LANES))
            {
                let g = simd.mul(load_partial(simd, dy), load_partial(simd, weight));
                let normed = simd.mul(simd.sub(load_partial(simd, x), mean), inverse);
                let rest = simd.sub(simd.sub(g, mean_g), simd.mul(normed, mean_g_normed));
                store_partial(simd, simd.fma(rest, inverse, load_partial(simd, dx)), dx);
            }
        }
    }
}

/// `dweight += ...` and `dbias += ...` for some columns: chains over the rows ascending.
pub struct LayerNormParameters<'a> {
    /// (rows, columns), what was normed.
    pub x: Rows<'a>,
    /// (rows, columns).
    pub dy: Rows<'a>,
    /// (rows, 2), as [`LayerNormInput`] wrote them.
    pub moments: &'a [[f32; 2]],
    /// (columns,).
    pub dweight: &'a mut [f32],
    /// (columns,), or empty for none.
    pub dbias: &'a mut [f32],
}

impl Kernel for LayerNormParameters<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, &[mean, inverse]) in self.moments.iter().enumerate() {
            let (mean, inverse) = (simd.splat(mean), simd.splat(inverse));
            let (x, dy) = (self.x.row(i), self.dy.row(i));
            for ((x, dy), sum) in x.chunks(LANES).zip(dy.chunks(LANES)).zip(self.dweight.chunks_mut(LANES)) {
                let normed = simd.mul(simd.sub(load_partial(simd, x), mean), inverse);
                let value = simd.fma(load_partial(simd, dy), normed, load_partial(simd, sum));
                store_partial(simd, value, sum);
            }
            for (dy, sum) in dy.chunks(LANES).zip(self.dbias.chunks_mut(LANES)) {
                store_partial(simd, simd.add(load_partial(simd, sum), load_partial(simd, dy)), sum);
            }
        }
    }
}

/// `out += x` summed over its rows: the gradient of a bias. Chains over the rows ascending.
pub struct SumRows<'a> {
    /// (rows, columns).
    pub x: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// (columns,).
    pub out: &'a mut [f32],
}

impl Kernel for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for i in 0..self.rows {
            for (x, sum) in self.x.row(i).chunks(LANES).zip(self.out.chunks_mut(LANES)) {
                store_partial(simd, simd.add(load_partial(simd, sum), load_partial(simd, x)), sum);
            }
        }
    }
}
