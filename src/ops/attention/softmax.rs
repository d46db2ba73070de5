//! A run's scores -> its weights, as what its values are multiplied with.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::cache::{Cached, Layout};
use super::{BLOCK, RUN};
use crate::ops::round::{all_finite, scale_to};
use crate::ops::softmax::exp_lanes;
use crate::simd::{LANES, Simd};

/// Registers of a run's positions.
const REGISTERS: usize = RUN / LANES;

/// What makes inputs of a run's weights, which are at most 1: factors for each position, and the scale that undoes them.
pub(super) struct Factors {
    /// The values' own scales, so that the greatest becomes the greatest integer.
    of_position: [f32; RUN],
    scale: f32,
}

impl Factors {
    /// For a query that sees the first `seen` positions of the run. The scale is NaN where one of these is not finite.
    #[inline(always)]
    pub(super) fn of<S: Simd, P: Cached>(simd: S, blocks: &[&[u8]], layout: Layout, seen: usize) -> Factors {
        let mut of_position = [0.0; RUN];
        if !P::SCALED {
            return Factors { of_position, scale: 1.0 };
        }
        for (block, scales) in blocks.iter().zip(of_position.as_chunks_mut::<BLOCK>().0) {
            *scales = bytemuck::cast_slice::<u8, [f32; BLOCK]>(&block[layout.scales..])[1];
        }
        // A scale that was not written may be anything.
        of_position[seen..].fill(0.0);
        let mut greatest = simd.splat(0.0);
        for lanes in of_position.as_chunks().0 {
            greatest = simd.max(simd.load(lanes), greatest);
        }
        // As many products of int16 and int8 as a run has positions can't leave int32.
        let (mut scale, inverse) = scale_to(simd.reduce_max(greatest), 32767.0);
        if !all_finite(simd, &of_position) {
            scale = f32::NAN;
        }
        for lanes in of_position.as_chunks_mut().0 {
            simd.store(simd.mul(simd.load(lanes), simd.splat(inverse)), lanes);
        }
        Factors { of_position, scale }
    }
}

/// The softmax of a run for `N` queries, without its normaliser.
pub(super) struct Weights<X, const N: usize> {
    /// The weights, each at most 1, times the values' scales.
    pub(super) inputs: [[X; RUN / 2]; N],
    /// What the inputs must be multiplied by.
    pub(super) scales: [f32; N],
    /// The greatest score.
    pub(super) max: [f32; N],
    /// The sum of the weights.
    pub(super) sum: [f32; N],
}

impl<X: bytemuck::Pod, const N: usize> Weights<X, N> {
    /// Of scores of which the first query sees `visible`, each other one more than that before.
    #[inline(always)]
    pub(super) fn of<S: Simd, P: Cached<X = X>>(
        simd: S,
        scores: &mut [[f32; RUN]; N],
        visible: usize,
        blocks: &[&[u8]],
        layout: Layout,
    ) -> Weights<X, N> {
        if visible < RUN {
            for r in 0..N {
                scores[r][RUN.min(visible + r)..].fill(f32::NEG_INFINITY);
            }
        }
        // Each step for all queries before the next, as a query's own steps wait for one another.
        let mut max = [0.0; N];
        for r in 0..N {
            let (lanes, _) = scores[r].as_chunks();
            let mut greatest = simd.load(&lanes[0]);
            for i in 1..REGISTERS {
                greatest = simd.max(greatest, simd.load(&lanes[i]));
            }
            max[r] = simd.reduce_max(greatest);
        }
        let mut factors = Factors::of::<S, P>(simd, blocks, layout, RUN.min(visible));
        let mut scales = [factors.scale; N];
        let mut sums = [simd.splat(0.0); N];
        let mut inputs = [[X::zeroed(); RUN / 2]; N];
        for r in 0..N {
            if P::SCALED && r > 0 && visible < RUN {
                factors = Factors::of::<S, P>(simd, blocks, layout, RUN.min(visible + r));
                scales[r] = factors.scale;
            }
            let (lanes, _) = scores[r].as_chunks();
            for i in 0..REGISTERS {
                let mut weight = exp_lanes(simd, simd.sub(simd.load(&lanes[i]), simd.splat(max[r])));
                sums[r] = simd.add(sums[r], weight);
                if P::SCALED {
                    weight = simd.mul(weight, simd.load(&factors.of_position.as_chunks().0[i]));
                }
                inputs[r].as_chunks_mut().0[i] = P::sixteen(simd, weight);
            }
        }
        let mut sum = [0.0; N];
        for r in 0..N {
            sum[r] = simd.reduce_add(sums[r]);
        }
        Weights { inputs, scales, max, sum }
    }
}
