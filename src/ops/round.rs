//! Activations in the types that products of narrow weights and caches take.

// Registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Rows;
use super::panels::ZERO;
use crate::simd::{Kernel, LANES, Simd, load_partial};
use half::bf16;

/// The values themselves, an odd last one with a zero; their scale is 1.
#[inline(always)]
pub fn exact_pairs(x: &[f32], out: &mut [[f32; 2]]) -> f32 {
    let (pairs, rest) = x.as_chunks::<2>();
    out[..pairs.len()].copy_from_slice(pairs);
    if let [last] = rest {
        out[pairs.len()] = [*last, 0.0];
    }
    1.0
}

/// bfloat16 to nearest even, the two of a pair exchanged as in the packed weights; the scale is 1.
#[inline(always)]
pub fn rounded_pairs<S: Simd>(simd: S, x: &[f32], out: &mut [[bf16; 2]]) -> f32 {
    for (lanes, out) in x.chunks(LANES).zip(out.chunks_mut(LANES / 2)) {
        let mut rounded = [bf16::ZERO; LANES];
        simd.round_to_bf16(load_partial(simd, lanes), &mut rounded);
        for (out, pair) in out.iter_mut().zip(rounded.as_chunks::<2>().0) {
            *out = [pair[1], pair[0]];
        }
    }
    1.0
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
        let mut rounded = [0; LANES];
        // Not a number times zero is none; as an integer it is anything, and the scale tells.
        simd.round_to_i16(simd.mul(load_partial(simd, lanes), inverse), &mut rounded);
        for (out, pair) in out.iter_mut().zip(rounded.as_chunks::<2>().0) {
            *out = *pair;
        }
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
    let mut not_finite = zero;
    for lanes in x.chunks(LANES) {
        let lanes = load_partial(simd, lanes);
        greatest = simd.max(simd.max(lanes, simd.sub(zero, lanes)), greatest);
        not_finite = simd.fma(lanes, zero, not_finite);
    }
    let scale = simd.reduce_max(greatest) / integer;
    let inverse = 1.0 / scale;
    // Infinity times zero is NaN, which equals nothing.
    if simd.reduce_add(not_finite) != 0.0 {
        (f32::NAN, 0.0)
    } else if inverse.is_finite() {
        (scale, inverse)
    } else {
        (0.0, 0.0)
    }
}

/// float32 rows -> int8 groups: `value * scale` stands for an activation.
///
/// The scale is the group's greatest magnitude / 127, and NaN for a group with a value that is not finite, so that
/// whatever is computed from it is NaN, too.
pub struct QuantiseRows<'a> {
    /// (rows, K).
    pub x: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// By how many values the rows are rotated first, as the weights were: see [`rotate`].
    pub rotation: usize,
    /// Values of a group: a multiple of 16.
    pub group: usize,
    /// Values of an integer sum: a group or a part of it.
    pub sum: usize,
    /// (rows, K rounded up to whole groups by zeros).
    pub values: &'a mut [i8],
    /// (rows, groups).
    pub scales: &'a mut [f32],
    /// (rows, sums): what an int32 sum starts from, so that the weights' [`ZERO`] cancels out.
    pub starts: &'a mut [i32],
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let groups = self.x.columns().div_ceil(self.group);
        let padded = groups * self.group;
        let mut rotated = vec![0.0; if self.rotation > 1 { self.x.columns() } else { 0 }];
        for row in 0..self.rows {
            let mut x = self.x.row(row);
            if self.rotation > 1 {
                rotated.copy_from_slice(x);
                rotate(simd, self.rotation, &mut rotated);
                x = &rotated;
            }
            let values = &mut self.values[row * padded..][..padded];
            for (i, values) in values.chunks_exact_mut(self.group).enumerate() {
                let x = &x[i * self.group..x.len().min((i + 1) * self.group)];
                values[x.len()..].fill(0);
                let scale = quantised(simd, x, &mut values[..x.len()]);
                if scale.is_nan() {
                    values.fill(0);
                }
                self.scales[row * groups + i] = scale;
            }
            let starts = &mut self.starts[row * (padded / self.sum)..];
            for (start, values) in starts.iter_mut().zip(values.chunks_exact(self.sum)) {
                let mut sum = 0;
                for &value in values {
                    sum += i32::from(value);
                }
                *start = -ZERO * sum;
            }
        }
    }
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
            rounded_pairs(simd, self.x.row(i), &mut out[..self.x.columns().div_ceil(2)]);
        }
    }
}
