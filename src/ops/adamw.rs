//! AdamW. Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101; as `torch.optim.AdamW`.

use crate::simd::{Kernel, LANES, Simd, load_partial, store_partial};

/// Values whose squares are summed in float32, by sixteen lanes and one tree, before float64 takes over.
pub const BLOCK: usize = 1024;

/// The sum of squares of each block of values.
pub struct SquareSums<'a> {
    /// Any number of values.
    pub values: &'a [f32],
    /// One for each [`BLOCK`] of them, written.
    pub sums: &'a mut [f32],
}

impl Kernel for SquareSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (block, out) in self.values.chunks(BLOCK).zip(self.sums) {
            let mut sum = simd.splat(0.0);
            for lanes in block.chunks(LANES) {
                let value = load_partial(simd, lanes);
                sum = simd.fma(value, value, sum);
            }
            *out = simd.reduce_add(sum);
        }
    }
}

/// What a step does to every value.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// What the old first moment and the gradient are multiplied by: `beta1` and `1 - beta1`.
    pub first: [f32; 2],
    /// The same of the second moment and the gradient's square.
    pub second: [f32; 2],
    /// What gradients are multiplied by: below 1 where they are clipped.
    pub gradient_scale: f32,
    /// The learning rate over `1 - beta1^step`.
    pub step_size: f32,
    /// `1 / sqrt(1 - beta2^step)`.
    pub deviation_scale: f32,
    /// Added to the deviation.
    pub eps: f32,
    /// What the weights are multiplied by: `1 - lr * weight_decay`, or 1.
    pub decay: f32,
}

/// One step of some weights: the moments take in the gradients, the weights follow, and the gradients are zeros again
/// while they are in the cache.
pub struct AdamW<'a> {
    /// What is done.
    pub rule: Rule,
    /// The gradients, zeroed.
    pub gradients: &'a mut [f32],
    /// As many, changed.
    pub weights: &'a mut [f32],
    /// First moments, changed.
    pub exp_avg: &'a mut [f32],
    /// Second moments, changed.
    pub exp_avg_sq: &'a mut [f32],
}

impl Kernel for AdamW<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Rule { first, second, gradient_scale, step_size, deviation_scale, eps, decay } = self.rule;
        let (beta1, rest1) = (simd.splat(first[0]), simd.splat(first[1]));
        let (beta2, rest2) = (simd.splat(second[0]), simd.splat(second[1]));
        let (scale, minus_step_size) = (simd.splat(gradient_scale), simd.splat(-step_size));
        let (deviation_scale, eps, decay) = (simd.splat(deviation_scale), simd.splat(eps), simd.splat(decay));
        for (((w, g), m), v) in self
            .weights
            .chunks_mut(LANES)
            .zip(self.gradients.chunks_mut(LANES))
            .zip(self.exp_avg.chunks_mut(LANES))
            .zip(self.exp_avg_sq.chunks_mut(LANES))
        {
            let gradient = simd.mul(load_partial(simd, g), scale);
            let first = simd.fma(load_partial(simd, m), beta1, simd.mul(gradient, rest1));
            let square = simd.mul(simd.mul(gradient, gradient), rest2);
            let second = simd.fma(load_partial(simd, v), beta2, square);
            let deviation = simd.fma(simd.sqrt(second), deviation_scale, eps);
            let kept = simd.mul(load_partial(simd, w), decay);
            let moved = simd.fma(simd.div(first, deviation), minus_step_size, kept);
            g.fill(0.0);
            store_partial(simd, first, m);
            store_partial(simd, second, v);
            store_partial(simd, moved, w);
        }
    }
}
