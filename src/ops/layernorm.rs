//! LayerNorm. Ba, Kiros and Hinton, arXiv:1607.06450.

pub mod backward;

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

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, out) in self.out.chunks_mut(self.out_stride).enumerate() {
            row(simd, self.x.row(i), self.weight, self.bias, self.eps, &mut out[..self.x.columns()]);
        }
    }
}

#[inline(always)]
fn row<S: Simd>(simd: S, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let [mean, inverse] = moments(simd, x, eps);
    let (means, inverse) = (simd.splat(mean), simd.splat(inverse));
    for (((out, x), weight), bias) in
        out.chunks_mut(LANES).zip(x.chunks(LANES)).zip(weight.chunks(LANES)).zip(bias.chunks(LANES))
    {
        let normed = simd.mul(simd.sub(load_partial(simd, x), means), inverse);
        let value = simd.fma(normed, load_partial(simd, weight), load_partial(simd, bias));
        store_partial(simd, value, out);
    }
}

/// The mean, and `1 / sqrt(variance + eps)`.
#[inline(always)]
fn moments<S: Simd>(simd: S, x: &[f32], eps: f32) -> [f32; 2] {
    let scale = 1.0 / x.len() as f32;
    let mut sum = simd.splat(0.0);
    for lanes in x.chunks(LANES) {
        sum = simd.add(sum, load_partial(simd, lanes));
    }
    let mean = simd.reduce_add(sum) * scale;
    let means = simd.splat(mean);
    let mut squares = simd.splat(0.0);
    for lanes in x.chunks(LANES) {
        let mut difference = simd.sub(load_partial(simd, lanes), means);
        if lanes.len() < LANES {
            // Lanes past the end held zeros, whose distance to the mean is none of the row's.
            let mut array = [0.0; LANES];
            simd.store(difference, &mut array);
            array[lanes.len()..].fill(0.0);
            difference = simd.load(&array);
        }
        squares = simd.fma(difference, difference, squares);
    }
    let variance = simd.reduce_add(squares) * scale;
    [mean, 1.0 / (variance + eps).sqrt()]
}
