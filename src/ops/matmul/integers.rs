//! Weights of 8 and 4 bits: within a group products are summed exactly in int32, and a group's sum, scaled by the
//! weights' and the activations' scale, is added by a float32 fused multiply-add. Where weights have integer scales for
//! parts of a group, the parts' sums, times these, are summed exactly as well, and the columns' factors come last.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, LINE, Part, Product, Tile};
use crate::ops::Rows;
use crate::ops::panels::{Format, Int4Groups, Int8Groups, NR};
use crate::simd::{BYTES, LANES, Simd};
use half::bf16;
use std::hint::black_box;

/// Activations in int8 groups, as `QuantiseRows` makes them.
#[derive(Clone, Copy)]
pub struct Quantised<'a> {
    /// (rows, K / 8): the values of a step, four and four.
    pub values: Rows<'a, [[i8; 4]; 2]>,
    /// (rows, groups).
    pub scales: Rows<'a>,
    /// (rows, integer sums): what these start from.
    pub starts: Rows<'a, i32>,
}

/// How much further ahead half bytes are asked for, which take longer to compute. Whole ones are not asked for at all:
/// there the processor's own prefetches run further ahead (measured on Zen 4).
const AHEAD_BYTES: usize = 8 << 10;

/// How eight rows of a panel, a step, are taken for integers.
pub trait Steps: Format {
    /// Bytes of a step.
    const STEP_BYTES: usize;
    /// Cache lines that a step asks for: half of those that it takes, so that two tiles bring the next piece.
    const ASKED: usize = Self::STEP_BYTES / LINE / 2;
    /// Rows of an integer sum: a group, or a part of it that has a scale of its own.
    const SUM: usize;
    /// Rows of the tallest tile of 32 registers, which are the sums of a group, those of all, and weights.
    const TALLEST: usize;

    /// Weights of 16 columns and four rows, the first or the second four of the step.
    fn four<S: Simd>(simd: S, step: &[u8], register: usize, four: usize) -> S::Bytes;
}

/// Sixty-four bytes of a step.
#[inline(always)]
fn load<S: Simd>(simd: S, step: &[u8], index: usize) -> S::Bytes {
    simd.load_bytes(&step.as_chunks::<BYTES>().0[index])
}

impl Steps for Int8Groups {
    const STEP_BYTES: usize = 8 * NR;
    const SUM: usize = Self::GROUP;
    const TALLEST: usize = 7;

    #[inline(always)]
    fn four<S: Simd>(simd: S, step: &[u8], register: usize, four: usize) -> S::Bytes {
        load(simd, step, 2 * four + register)
    }
}

impl Steps for Int4Groups {
    const STEP_BYTES: usize = 4 * NR;
    const SUM: usize = 16;
    const TALLEST: usize = 6;

    #[inline(always)]
    fn four<S: Simd>(simd: S, step: &[u8], register: usize, four: usize) -> S::Bytes {
        simd.look_up(&Int4Groups::BYTES, load(simd, step, register))[four]
    }
}

macro_rules! product {
    ($format:ty) => {
        impl Product for $format {
            type Inputs<'a> = Quantised<'a>;
            const DOTS: bool = true;
            const PIECE: usize = usize::MAX;
            const STEP_LINES: usize = Self::STEP_BYTES / LINE;
            const ASKED_LINES: usize = Self::ASKED;

            /// Of sixteen registers that are half as wide, 3 x 16.
            fn tallest(wide: bool) -> usize {
                if wide { Self::TALLEST } else { 3 }
            }

            fn address(x: Quantised<'_>, row: usize, group: usize) -> (*const u8, usize) {
                (x.values.row(row)[group * (Self::GROUP / 8)..].as_ptr().cast(), 8 * x.values.stride())
            }

            #[inline(always)]
            fn multiply<S: Simd, const STREAM: bool>(
                simd: S,
                x: Quantised<'_>,
                part: &Part,
                piece: &[u8],
                ahead: Ahead,
                sums: &mut Tile,
            ) {
                multiply_rows::<S, $format, STREAM>(simd, x, part, piece, ahead, sums);
            }
        }
    };
}

product!(Int8Groups);
product!(Int4Groups);

#[inline(always)]
fn multiply_rows<S: Simd, F: Steps, const STREAM: bool>(
    simd: S,
    x: Quantised<'_>,
    part: &Part,
    piece: &[u8],
    ahead: Ahead,
    sums: &mut Tile,
) {
    macro_rules! set {
        ($rows:literal, $register:literal, $registers:literal) => {
            multiply::<S, F, STREAM, $rows, $register, $registers>(
                simd,
                x,
                part.rows.start,
                piece,
                ahead,
                sums,
            )
        };
        ($rows:literal) => {
            set!($rows, 0, 2)
        };
        ($rows:literal in halves) => {{
            set!($rows, 0, 1);
            set!($rows, 1, 1);
        }};
    }
    match (part.rows.len(), S::WIDE) {
        (1, true) => set!(1),
        (2, true) => set!(2),
        (3, true) => set!(3),
        (4, true) => set!(4),
        (5, true) => set!(5),
        (6, true) => set!(6),
        (7, true) if F::TALLEST == 7 => set!(7),
        (1, false) => set!(1 in halves),
        (2, false) => set!(2 in halves),
        (3, false) => set!(3 in halves),
        (rows, _) => unreachable!("a tile of {rows} rows"),
    }
}

/// `sums = x @ panel` for `MR` rows of `NV` registers, from register `V0` of the panel on.
#[inline(always)]
fn multiply<S: Simd, F: Steps, const STREAM: bool, const MR: usize, const V0: usize, const NV: usize>(
    simd: S,
    x: Quantised<'_>,
    row: usize,
    panel: &[u8],
    mut ahead: Ahead,
    sums: &mut Tile,
) {
    let (panel, factors) = panel.split_at(panel.len() - F::PANEL_BYTES);
    let groups = panel.len() / F::GROUP_BYTES;
    let parts = F::GROUP / F::SUM;
    let group_steps = F::GROUP / 8;
    // Were it known, the loop over many rows' steps would be unrolled whole, and its inputs take the sums' registers.
    let steps = if STREAM { F::SUM / 8 } else { black_box(F::SUM / 8) };
    let mut asked = 0;
    let mut values = [&[][..]; MR];
    let mut scales = [&[][..]; MR];
    let mut starts = [&[][..]; MR];
    for r in 0..MR {
        values[r] = &x.values.row(row + r)[..groups * group_steps];
        scales[r] = &x.scales.row(row + r)[..groups];
        starts[r] = &x.starts.row(row + r)[..groups * parts];
    }
    let mut acc = [[simd.splat(0.0); NV]; MR];
    for g in 0..groups {
        let group = &panel[g * F::GROUP_BYTES..][..F::GROUP_BYTES];
        let (weight_scales, weights) = group.split_at(F::GROUP_BYTES - group_steps * F::STEP_BYTES);
        let mut total = [[simd.splat_i32(0); NV]; MR];
        for part in 0..parts {
            let weights = &weights[part * (F::SUM / 8) * F::STEP_BYTES..][..steps * F::STEP_BYTES];
            let mut x: [&[[[i8; 4]; 2]]; MR] = [&[][..]; MR];
            let mut dots = [[simd.splat_i32(0); NV]; MR];
            for r in 0..MR {
                x[r] = &values[r][g * group_steps + part * (F::SUM / 8)..][..steps];
                dots[r] = [simd.splat_i32(starts[r][g * parts + part]); NV];
            }
            for step in 0..steps {
                let bytes = &weights[step * F::STEP_BYTES..][..F::STEP_BYTES];
                if !STREAM {
                    for _ in 0..F::ASKED {
                        ahead.ask(simd, &mut asked);
                    }
                } else if parts > 1 {
                    let steps_before = g * group_steps + part * (F::SUM / 8) + step;
                    let offset = AHEAD_BYTES + steps_before * (F::GROUP_BYTES / group_steps);
                    for line in 0..(F::GROUP_BYTES / group_steps).div_ceil(LINE) {
                        simd.prefetch(ahead.address.wrapping_add(offset + line * LINE));
                    }
                }
                for four in 0..2 {
                    let mut lanes = [simd.load_bytes(&[0; BYTES]); NV];
                    for j in 0..NV {
                        lanes[j] = F::four(simd, bytes, V0 + j, four);
                    }
                    for r in 0..MR {
                        for j in 0..NV {
                            dots[r][j] = simd.dot_bytes(dots[r][j], lanes[j], x[r][step][four]);
                        }
                    }
                }
            }
            if parts == 1 {
                total = dots;
                continue;
            }
            let part_scales: &[[i8; LANES]] = bytemuck::cast_slice(&weight_scales[part * NR..][..NR]);
            for j in 0..NV {
                let scale = simd.load_i8(&part_scales[V0 + j]);
                for r in 0..MR {
                    total[r][j] = simd.mul_add_i32(dots[r][j], scale, total[r][j]);
                }
            }
        }
        for j in 0..NV {
            for r in 0..MR {
                let mut scale = simd.splat(scales[r][g]);
                if parts == 1 {
                    let weight_scales: &[[bf16; LANES]] = bytemuck::cast_slice(weight_scales);
                    scale = simd.mul(scale, simd.load_bf16(&weight_scales[V0 + j]));
                }
                acc[r][j] = simd.fma(simd.to_f32(total[r][j]), scale, acc[r][j]);
            }
        }
    }
    for r in 0..MR {
        for j in 0..NV {
            if parts > 1 {
                let factors: &[[f32; LANES]] = bytemuck::cast_slice(factors);
                acc[r][j] = simd.mul(acc[r][j], simd.load(&factors[V0 + j]));
            }
            simd.store(acc[r][j], &mut sums[r].as_chunks_mut().0[V0 + j]);
        }
    }
}
