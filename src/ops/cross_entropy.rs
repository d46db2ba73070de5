//! Softmax cross-entropy over logits that lie token by column: (V, tokens).
//!
//! So a lane is a token, the embedding's rows give the logits as they lie, and the logits' gradient gives the embedding's.
//! The vocabulary is gone through in blocks of [`BLOCK`] rows: each gives a (maximum, sum of exponentials) for every
//! token, merged in ascending order.

use super::Rows;
use super::softmax::exp_lanes;
use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// Rows of logits whose exponentials are summed before they are merged with those before.
pub const BLOCK: usize = 64;

/// The maxima and the sums of exponentials of blocks of rows.
pub struct BlockSums<'a> {
    /// (rows, tokens), from the first row of a block on.
    pub logits: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// (blocks, tokens), `logits.stride()` apart, written.
    pub maxima: &'a mut [f32],
    /// The same.
    pub sums: &'a mut [f32],
}

impl Kernel for BlockSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (tokens, stride) = (self.logits.columns(), self.logits.stride());
        let blocks = self.maxima.chunks_mut(stride).zip(self.sums.chunks_mut(stride));
        for (block, (maxima, sums)) in blocks.enumerate() {
            let rows = block * BLOCK..self.rows.min((block + 1) * BLOCK);
            for start in (0..tokens).step_by(LANES) {
                let end = tokens.min(start + LANES);
                let mut max = simd.splat(f32::NEG_INFINITY);
                for row in rows.clone() {
                    // In this order a NaN stays one.
                    max = simd.max(max, load_partial(simd, &self.logits.row(row)[start..end]));
                }
                let mut sum = simd.splat(0.0);
                for row in rows.clone() {
                    let logits = load_partial(simd, &self.logits.row(row)[start..end]);
                    sum = simd.add(sum, exp_lanes(simd, simd.sub(logits, max)));
                }
                store_partial(simd, max, &mut maxima[start..end]);
                store_partial(simd, sum, &mut sums[start..end]);
            }
        }
    }
}

/// Merges the blocks: `maxima` and `sums` of the first become those of all.
pub struct MergeBlocks<'a> {
    /// (blocks, tokens), `stride` apart.
    pub maxima: &'a mut [f32],
    /// The same.
    pub sums: &'a mut [f32],
    /// How many tokens.
    pub tokens: usize,
    /// Distance between rows.
    pub stride: usize,
}

impl Kernel for MergeBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (max, maxima) = self.maxima.split_at_mut(self.stride);
        let (sum, sums) = self.sums.split_at_mut(self.stride);
        for (maxima, sums) in maxima.chunks(self.stride).zip(sums.chunks(self.stride)) {
            for start in (0..self.tokens).step_by(LANES) {
                let lanes = start..self.tokens.min(start + LANES);
                let (old, new) =
                    (load_partial(simd, &max[lanes.clone()]), load_partial(simd, &maxima[lanes.clone()]));
                let both = simd.max(old, new);
                let old_factor = exp_lanes(simd, simd.sub(old, both));
                let new_sum = load_partial(simd, &sums[lanes.clone()]);
                let new_sum = simd.mul(new_sum, exp_lanes(simd, simd.sub(new, both)));
                let old_sum = load_partial(simd, &sum[lanes.clone()]);
                store_partial(simd, simd.fma(old_sum, old_factor, new_sum), &mut sum[lanes.clone()]);
                store_partial(simd, both, &mut max[lanes]);
            }
        }
    }
}

/// `-log softmax(logits)[target]` of a token, given its maximum and its sum of exponentials.
pub fn loss(target_logit: f32, max: f32, sum: f32) -> f64 {
    libm::log(f64::from(sum)) + (f64::from(max) - f64::from(target_logit))
}

/// Logits -> `scale` times the loss's gradient, in place: `scale * (softmax - 1 at the target)`.
pub struct LogitsBackward<'a> {
    /// (rows, tokens), `stride` apart: rows of the vocabulary from `first` on.
    pub logits: &'a mut [f32],
    /// Distance between rows.
    pub stride: usize,
    /// The first row's token id.
    pub first: usize,
    /// (tokens,).
    pub targets: &'a [u32],
    /// (tokens,), of the whole vocabulary.
    pub max: &'a [f32],
    /// (tokens,), of the whole vocabulary.
    pub sum: &'a [f32],
    /// What the gradient is multiplied by.
    pub scale: f32,
}

impl Kernel for LogitsBackward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tokens = self.targets.len();
        let scale = simd.splat(self.scale);
        for row in self.logits.chunks_mut(self.stride) {
            for start in (0..tokens).step_by(LANES) {
                let lanes = start..tokens.min(start + LANES);
                let logits = load_partial(simd, &row[lanes.clone()]);
                let p = exp_lanes(simd, simd.sub(logits, load_partial(simd, &self.max[lanes.clone()])));
                let p = simd.div(simd.mul(p, scale), load_partial(simd, &self.sum[lanes.clone()]));
                store_partial(simd, p, &mut row[lanes]);
            }
        }
        for (token, &target) in self.targets.iter().enumerate() {
            let row = (target as usize).wrapping_sub(self.first);
            if let Some(value) = self.logits.get_mut(row.saturating_mul(self.stride).saturating_add(token)) {
                *value -= self.scale;
            }
        }
    }
}
