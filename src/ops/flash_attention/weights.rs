//! What happens to a block of scores between its products.

use super::{BLOCK, Head, STRIDE};
use crate::ops::Rows;
use crate::ops::softmax::exp_lanes;
use crate::pool::Columns;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};
use std::ops::Range;

/// Keys of the block that the query at `row` sees.
fn visible(row: usize, key_block: usize) -> usize {
    (row + 1 - key_block * BLOCK).min(BLOCK)
}

/// Scores -> weights of the values, `exp(scale score - max)` or zero where dropped, and what they change in the rows so
/// far: maxima, sums, and outputs, which are brought to the new maximum.
pub struct Weigh<'a, 'b> {
    /// Whose they are.
    pub head: &'a Head<'b>,
    /// The queries.
    pub rows: Range<usize>,
    /// Which block of keys.
    pub key_block: usize,
    /// (rows, BLOCK), `STRIDE` apart.
    pub scores: &'a mut [f32],
    /// (rows,).
    pub max: &'a mut [f32],
    /// (rows,).
    pub sum: &'a mut [f32],
    /// (rows, HS).
    pub out: Columns<'a>,
}

impl Kernel for Weigh<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let scale = simd.splat(self.head.scale);
        for (i, row) in self.rows.clone().enumerate() {
            let scores = &mut self.scores[i * STRIDE..][..BLOCK];
            scores[visible(row, self.key_block)..].fill(f32::NEG_INFINITY);
            let (lanes, _) = scores.as_chunks_mut::<LANES>();
            let mut max = simd.splat(self.max[i]);
            for lanes in &mut *lanes {
                let scaled = simd.mul(simd.load(lanes), scale);
                simd.store(scaled, lanes);
                max = simd.max(max, scaled);
            }
            let max = simd.reduce_max(max);
            let mut sum = simd.splat(0.0);
            for lanes in &mut *lanes {
                let weight = exp_lanes(simd, simd.sub(simd.load(lanes), simd.splat(max)));
                sum = simd.add(sum, weight);
                simd.store(weight, lanes);
            }
            let factor = exp_lanes(simd, simd.splat(self.max[i] - max));
            let mut factors = [0.0; LANES];
            simd.store(factor, &mut factors);
            self.sum[i] = self.sum[i].mul_add(factors[0], simd.reduce_add(sum));
            self.max[i] = max;
            if self.key_block > 0 {
                for out in self.out.row(i).chunks_mut(LANES) {
                    store_partial(simd, simd.mul(load_partial(simd, out), factor), out);
                }
            }
            if let Some(mask) = &self.head.mask {
                let kept = mask.factors(self.head.first_weight(row, self.key_block));
                for (lanes, kept) in lanes.iter_mut().zip(&kept) {
                    simd.store(simd.mul(simd.load(lanes), simd.load(kept)), lanes);
                }
            }
        }
    }
}

/// After the last block: outputs are divided by their sums, whose logarithms are kept.
pub struct Finish<'a> {
    /// (rows,).
    pub max: &'a [f32],
    /// (rows,).
    pub sum: &'a [f32],
    /// (rows,), written: `max + log(sum)`.
    pub lse: &'a mut [f32],
    /// (rows, HS).
    pub out: Columns<'a>,
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        for (i, lse) in self.lse.iter_mut().enumerate() {
            *lse = (f64::from(self.max[i]) + libm::log(f64::from(self.sum[i]))) as f32;
            for out in self.out.row(i).chunks_mut(LANES) {
                store_partial(simd, simd.div(load_partial(simd, out), simd.splat(self.sum[i])), out);
            }
        }
    }
}

/// Dot products of the rows of two matrices.
pub struct DotRows<'a> {
    /// (rows, HS).
    pub a: Rows<'a>,
    /// (rows, HS).
    pub b: Rows<'a>,
    /// (rows,), written.
    pub out: &'a mut [f32],
}

impl Kernel for DotRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, out) in self.out.iter_mut().enumerate() {
            let mut sum = simd.splat(0.0);
            for (a, b) in self.a.row(i).chunks(LANES).zip(self.b.row(i).chunks(LANES)) {
                sum = simd.fma(load_partial(simd, a), load_partial(simd, b), sum);
            }
            *out = simd.reduce_add(sum);
        }
    }
}

/// Scores and the gradients of the weights -> weights as the values were multiplied with, and the scores' gradients
/// times the scale.
pub struct WeighBackward<'a, 'b> {
    /// Whose they are.
    pub head: &'a Head<'b>,
    /// The queries.
    pub rows: Range<usize>,
    /// Which block of keys.
    pub key_block: usize,
    /// (rows, BLOCK), `STRIDE` apart.
    pub scores: &'a mut [f32],
    /// The same.
    pub dscores: &'a mut [f32],
    /// (rows,).
    pub lse: &'a [f32],
    /// (rows,): dot products of outputs and their gradients.
    pub dots: &'a [f32],
}

impl Kernel for WeighBackward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.head.scale);
        for (i, row) in self.rows.clone().enumerate() {
            let scores = &mut self.scores[i * STRIDE..][..BLOCK];
            let dscores = &mut self.dscores[i * STRIDE..][..BLOCK];
            let (lse, dot) = (simd.splat(self.lse[i]), simd.splat(self.dots[i]));
            let mut kept = [[1.0; LANES]; BLOCK / LANES];
            if let Some(mask) = &self.head.mask {
                kept = mask.factors(self.head.first_weight(row, self.key_block));
            }
            let lanes = scores.as_chunks_mut::<LANES>().0.iter_mut().zip(dscores.as_chunks_mut::<LANES>().0);
            for ((score, dscore), kept) in lanes.zip(&kept) {
                let kept = simd.load(kept);
                let weight = exp_lanes(simd, simd.sub(simd.mul(simd.load(score), scale), lse));
                let change = simd.sub(simd.mul(simd.load(dscore), kept), dot);
                simd.store(simd.mul(weight, kept), score);
                simd.store(simd.mul(simd.mul(weight, change), scale), dscore);
            }
            // What the query does not see counts for nothing, whatever was computed there.
            let visible = visible(row, self.key_block);
            scores[visible..].fill(0.0);
            dscores[visible..].fill(0.0);
        }
    }
}
