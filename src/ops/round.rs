//! Activations in the types that products of narrow weights and caches take.

// Registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Rows;
use super::matmul::Steps;
use super::panels::ZERO;
use crate::simd::{Kernel, LANES, Simd, load_partial};
use half::bf16;
use std::marker::PhantomData;

/// Sixteen bfloat16 to nearest even, the two of a pair exchanged as in the packed weights.
#[inline(always)]
pub fn rounded_pairs<S: Simd>(simd: S, value: S::F32) -> [[bf16; 2]; LANES / 2] {
    let mut rounded = [bf16::ZERO; LANES];
    simd.round_to_bf16(value, &mut rounded);
    let mut pairs = [[bf16::ZERO; 2]; LANES / 2];
    for (out, pair) in pairs.iter_mut().zip(rounded.as_chunks::<2>().0) {
        *out = [pair[1], pair[0]];
    }
    pairs
}

/// Sixteen integers to nearest even, which must fit.
#[inline(always)]
pub fn integer_pairs<S: Simd>(simd: S, value: S::F32) -> [[i16; 2]; LANES / 2] {
    let mut rounded = [0; LANES];
    simd.round_to_i16(value, &mut rounded);
    bytemuck::cast(rounded)
}

/// bfloat16 to nearest even, in order.
#[inline(always)]
pub fn rounded<S: Simd>(simd: S, x: &[f32], out: &mut [bf16]) {
    for (lanes, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let mut rounded = [bf16::ZERO; LANES];
        simd.round_to_bf16(load_partial(simd, lanes), &mut rounded);
        out.copy_from_slice(&rounded[..out.len()]);
    }
}

/// int16, as fine as leaves the sum of products with as many int8 in an int32; the scale is NaN for values that are not
/// all finite.
#[inline(always)]
pub fn quantised_pairs<S: Simd>(simd: S, x: &[f32], out: &mut [[i16; 2]]) -> f32 {
    let finest = (i32::MAX / (127 * 2 * out.len().max(1) as i32)).min(32767);
    let (scale, inverse) = scale_of(simd, x, finest as f32);
    let inverse = simd.splat(inverse);
    for (lanes, out) in x.chunks(LANES).zip(out.chunks_mut(LANES / 2)) {
        // Not a number times zero is none; as an integer it is anything, and the scale tells.
        let pairs = integer_pairs(simd, simd.mul(load_partial(simd, lanes), inverse));
        out.copy_from_slice(&pairs[..out.len()]);
    }
    scale
}

/// int8 in -127..=127; gives the scale, NaN for values that are not all finite.
#[inline(always)]
pub fn quantised<S: Simd>(simd: S, x: &[f32], out: &mut [i8]) -> f32 {
    let (scale, inverse) = scale_of(simd, x, 127.0);
    let inverse = simd.splat(inverse);
    for (lanes, out) in x.chunks(LANES).zip(out.chunks_mut(LANES)) {
        let mut rounded = [0; LANES];
        simd.round_to_i8(simd.mul(load_partial(simd, lanes), inverse), &mut rounded);
        match out.first_chunk_mut() {
            Some(out) => *out = rounded,
            None => out.copy_from_slice(&rounded[..out.len()]),
        }
    }
    scale
}

/// The scale by which the greatest magnitude becomes `integer`, and its reciprocal. Values too small for a reciprocal are
/// zeros: 0 and 0. Where a value is not finite: NaN and 0.
#[inline(always)]
fn scale_of<S: Simd>(simd: S, x: &[f32], integer: f32) -> (f32, f32) {
    let zero = simd.splat(0.0);
    let mut greatest = zero;
    for lanes in x.chunks(LANES) {
        let lanes = load_partial(simd, lanes);
        greatest = simd.max(simd.max(lanes, simd.sub(zero, lanes)), greatest);
    }
    if all_finite(simd, x) { scale_to(simd.reduce_max(greatest), integer) } else { (f32::NAN, 0.0) }
}

/// The scale by which `greatest` becomes `integer`, and its reciprocal; 0 and 0 where that is not finite.
#[inline(always)]
pub fn scale_to(greatest: f32, integer: f32) -> (f32, f32) {
    let inverse = integer / greatest;
    if inverse.is_finite() { (greatest / integer, inverse) } else { (0.0, 0.0) }
}

/// Whether all values are finite.
#[inline(always)]
pub fn all_finite<S: Simd>(simd: S, x: &[f32]) -> bool {
    let zero = simd.splat(0.0);
    let mut sum = zero;
    for lanes in x.chunks(LANES) {
        // Infinity times zero is NaN, which equals nothing.
        sum = simd.fma(load_partial(simd, lanes), zero, sum);
    }
    simd.reduce_add(sum) == 0.0
}

/// float32 rows -> int8 groups: `value * scale` stands for an activation.
///
/// The scale is the group's greatest magnitude / 127, and NaN for a group with a value that is not finite, so that
/// whatever is computed from it is NaN, too.
pub struct QuantiseRows<'a, F> {
    /// (rows, K).
    pub x: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// By how many values the rows are rotated first, as the weights were: see [`rotate`].
    pub rotation: usize,
    /// (rows, K rounded up to whole groups by zeros).
    pub values: &'a mut [i8],
    /// (rows, groups).
    pub scales: &'a mut [f32],
    /// (rows, sums): what an int32 sum starts from, so that the weights' [`ZERO`] cancels out.
    pub starts: &'a mut [i32],
    /// The weights' format, which says how groups are cut.
    pub format: PhantomData<F>,
}

impl<F: Steps> Kernel for QuantiseRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = self.x.columns();
        let groups = columns.div_ceil(F::GROUP);
        let sums = F::GROUP / F::SUM;
        // Where rows are rotated or groups not whole, they are copied first.
        let copies = self.rotation > 1 || columns < groups * F::GROUP;
        let mut copy = vec![0.0; if copies { groups * F::GROUP } else { 0 }];
        for row in 0..self.rows {
            let mut x = self.x.row(row);
            if copies {
                copy[..columns].copy_from_slice(x);
                if self.rotation > 1 {
                    rotate(simd, self.rotation, &mut copy[..columns]);
                }
                x = &copy;
            }
            let scales = &mut self.scales[row * groups..][..groups];
            let values = &mut self.values[row * groups * F::GROUP..][..groups * F::GROUP];
            let starts = &mut self.starts[row * groups * sums..][..groups * sums];
            let mut not_finite = simd.splat(0.0);
            for i in 0..groups {
                let values = &mut values[i * F::GROUP..][..F::GROUP];
                let x = &x[i * F::GROUP..][..F::GROUP];
                (scales[i], not_finite) = group(simd, x, values, not_finite);
                let starts = &mut starts[i * sums..][..sums];
                for (start, values) in starts.iter_mut().zip(values.chunks_exact(F::SUM)) {
                    let mut sum = simd.splat(0.0);
                    for values in values.as_chunks().0 {
                        sum = simd.add(sum, simd.to_f32(simd.load_i8(values)));
                    }
                    // Small integers: exact.
                    *start = -ZERO * simd.reduce_add(sum) as i32;
                }
            }
            if simd.reduce_add(not_finite) != 0.0 {
                for i in 0..groups {
                    if !all_finite(simd, &x[i * F::GROUP..][..F::GROUP]) {
                        scales[i] = f32::NAN;
                        values[i * F::GROUP..][..F::GROUP].fill(0);
                        starts[i * sums..][..sums].fill(0);
                    }
                }
            }
        }
    }
}

/// A group in int8; gives its scale, and `not_finite` plus zeros, or NaN where the group is not finite.
#[inline(always)]
fn group<S: Simd>(simd: S, x: &[f32], out: &mut [i8], mut not_finite: S::F32) -> (f32, S::F32) {
    let zero = simd.splat(0.0);
    let mut greatest = zero;
    for lanes in x.as_chunks().0 {
        let lanes = simd.load(lanes);
        greatest = simd.max(simd.max(lanes, simd.sub(zero, lanes)), greatest);
        // Infinity times zero is NaN.
        not_finite = simd.fma(lanes, zero, not_finite);
    }
    let (scale, inverse) = scale_to(simd.reduce_max(greatest), 127.0);
    let inverse = simd.splat(inverse);
    for (lanes, out) in x.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        simd.round_to_i8(simd.mul(simd.load(lanes), inverse), out);
    }
    (scale, not_finite)
}

/// How many values a row of K is rotated by: 16, 4, or 1 for not at all.
pub fn rotation(k: usize) -> usize {
    [16, 4].into_iter().find(|n| k.is_multiple_of(n * LANES)).unwrap_or(1)
}

/// Multiplies each `n` (16 or 4) values that are 16 apart by the orthonormal Hadamard matrix, in place.
///
/// Products with weights that were rotated likewise are the same, but rounding errors are smaller: what stands out among
/// its neighbours is spread over all of them. (As QuaRot does: Ashkboos et al., arXiv:2404.00456.)
#[inline(always)]
pub fn rotate<S: Simd>(simd: S, n: usize, x: &mut [f32]) {
    if n == 16 {
        rotate_by::<S, 16>(simd, 0.25, x);
    } else {
        rotate_by::<S, 4>(simd, 0.5, x);
    }
}

#[inline(always)]
fn rotate_by<S: Simd, const N: usize>(simd: S, scale: f32, x: &mut [f32]) {
    let scale = simd.splat(scale);
    for block in x.as_chunks_mut::<LANES>().0.as_chunks_mut::<N>().0 {
        let mut lanes = [scale; N];
        for i in 0..N {
            lanes[i] = simd.load(&block[i]);
        }
        let mut half = 1;
        while half < N {
            for i in 0..N {
                if i & half == 0 {
                    let (a, b) = (lanes[i], lanes[i + half]);
                    lanes[i] = simd.add(a, b);
                    lanes[i + half] = simd.sub(a, b);
                }
            }
            half *= 2;
        }
        for i in 0..N {
            simd.store(simd.mul(lanes[i], scale), &mut block[i]);
        }
    }
}

/// float32 rows -> pairs of bfloat16.
pub struct RoundRows<'a> {
    /// (rows, K).
    pub x: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// (rows, K / 2 rounded up), `stride` apart.
    pub out: &'a mut [[bf16; 2]],
    /// Distance between rows of `out`.
    pub stride: usize,
}

impl Kernel for RoundRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, out) in self.out.chunks_exact_mut(self.stride).take(self.rows).enumerate() {
            let out = &mut out[..self.x.columns().div_ceil(2)];
            for (lanes, out) in self.x.row(i).chunks(LANES).zip(out.chunks_mut(LANES / 2)) {
                out.copy_from_slice(&rounded_pairs(simd, load_partial(simd, lanes))[..out.len()]);
            }
        }
    }
}
