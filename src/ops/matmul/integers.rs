//! Weights of 8 and 4 bits: within a group products are summed exactly in int32, and a group's sum, scaled by the
//! weights' and the activations' scale, is added by a float32 fused multiply-add.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, LINE, Part, Product, Tile};
use crate::ops::Rows;
use crate::ops::panels::{Format, Int4Groups, Int8Groups, NR};
use crate::simd::{BYTES, LANES, Simd};
use half::bf16;

/// Activations in int8 groups, as `QuantiseRows` makes them.
#[derive(Clone, Copy)]
pub struct Quantised<'a> {
    /// (rows, K / 4): four values at a time.
    pub values: Rows<'a, [i8; 4]>,
    /// (rows, groups).
    pub scales: Rows<'a>,
    /// (rows, groups): what the integer sums start from.
    pub starts: Rows<'a, i32>,
}

/// How the bytes of a step, 2 x 64 of them, are taken for integers.
trait Steps: Format {
    /// Fours of rows that they hold.
    const FOURS: usize;

    /// The weights of 16 columns: an array for each four of rows.
    fn fours<S: Simd>(simd: S, bytes: &[u8; BYTES]) -> [S::Bytes; 2];
}

impl Steps for Int8Groups {
    const FOURS: usize = 1;

    #[inline(always)]
    fn fours<S: Simd>(simd: S, bytes: &[u8; BYTES]) -> [S::Bytes; 2] {
        [simd.load_bytes(bytes); 2]
    }
}

impl Steps for Int4Groups {
    const FOURS: usize = 2;

    #[inline(always)]
    fn fours<S: Simd>(simd: S, bytes: &[u8; BYTES]) -> [S::Bytes; 2] {
        simd.look_up(&Int4Groups::BYTES, simd.load_bytes(bytes))
    }
}

macro_rules! product {
    ($format:ty) => {
        impl Product for $format {
            type Inputs<'a> = Quantised<'a>;
            const DOTS: bool = true;
            const PIECE: usize = usize::MAX;
            const STEP_LINES: usize = 2 * BYTES / LINE;

            fn tallest(wide: bool) -> usize {
                tallest(wide)
            }

            fn address(x: Quantised<'_>, row: usize, group: usize) -> (*const u8, usize) {
                (x.values.row(row)[group * (Self::GROUP / 4)..].as_ptr().cast(), 4 * x.values.stride())
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

/// 7 x 32 of 32 registers, which are the sums of a group and those of all; of sixteen that are half as wide, 3 x 16.
fn tallest(wide: bool) -> usize {
    if wide { 7 } else { 3 }
}

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
        (7, true) => set!(7),
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
    let groups = panel.len() / F::GROUP_BYTES;
    let mut asked = 0;
    let mut values = [&[][..]; MR];
    let mut scales = [&[][..]; MR];
    let mut starts = [&[][..]; MR];
    for r in 0..MR {
        values[r] = &x.values.row(row + r)[..groups * (F::GROUP / 4)];
        scales[r] = &x.scales.row(row + r)[..groups];
        starts[r] = &x.starts.row(row + r)[..groups];
    }
    let mut acc = [[simd.splat(0.0); NV]; MR];
    for g in 0..groups {
        let group = &panel[g * F::GROUP_BYTES..][..F::GROUP_BYTES];
        let (weights, weight_scales) = group.split_at(F::GROUP_BYTES - 2 * NR);
        let weights = weights.as_chunks::<BYTES>().0.as_chunks::<2>().0;
        let weight_scales: &[[bf16; LANES]] = bytemuck::cast_slice(weight_scales);
        let mut dots = [[simd.splat_i32(0); NV]; MR];
        for r in 0..MR {
            for j in 0..NV {
                dots[r][j] = simd.splat_i32(starts[r][g]);
            }
        }
        for (step, bytes) in weights.iter().enumerate() {
            if STREAM {
                for line in 0..2 * BYTES / LINE {
                    let offset = g * F::GROUP_BYTES + step * 2 * BYTES + line * LINE;
                    simd.prefetch(ahead.address.wrapping_add(offset));
                }
            } else {
                ahead.ask(simd, &mut asked);
            }
            for j in 0..NV {
                let fours = F::fours(simd, &bytes[V0 + j]);
                for four in 0..F::FOURS {
                    for r in 0..MR {
                        let x = values[r][g * (F::GROUP / 4) + step * F::FOURS + four];
                        dots[r][j] = simd.dot_bytes(dots[r][j], fours[four], x);
                    }
                }
            }
        }
        for j in 0..NV {
            let lanes = simd.load_bf16(&weight_scales[V0 + j]);
            for r in 0..MR {
                let scale = simd.mul(simd.splat(scales[r][g]), lanes);
                acc[r][j] = simd.fma(simd.to_f32(dots[r][j]), scale, acc[r][j]);
            }
        }
    }
    for r in 0..MR {
        for j in 0..NV {
            simd.store(acc[r][j], &mut sums[r].as_chunks_mut().0[V0 + j]);
        }
    }
}
