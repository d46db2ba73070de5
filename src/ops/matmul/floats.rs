//! Chains of fused multiply-adds: float32 weights, and bfloat16 ones with float32 or bfloat16 activations.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::{Ahead, LINE, Part, Product, Tile};
use crate::ops::Rows;
use crate::ops::pairs::{Bf16, Bf16Dots, F32, Pairs};
use crate::ops::panels::{Format, NR};
use crate::simd::{LANES, Simd};

/// Formats whose groups are steps, and whose sums are float32.
trait Floats: Pairs + Format {
    /// [`Pairs::add`], with the input where it lies.
    #[inline(always)]
    fn add_from<S: Simd>(
        simd: S,
        sum: Self::Lanes<S>,
        lanes: Self::Lanes<S>,
        x: &Self::X,
        turn: usize,
    ) -> Self::Lanes<S> {
        Self::add(simd, sum, lanes, *x, turn)
    }
    /// Whether products call it. Elsewhere they call [`Pairs::add`]: where an input's address is taken, LLVM spills sums.
    const FROM_MEMORY: bool = false;
}
impl Floats for F32 {}
impl Floats for Bf16 {
    #[inline(always)]
    fn add_from<S: Simd>(simd: S, sum: S::F32, lanes: S::F32, x: &[f32; 2], turn: usize) -> S::F32 {
        simd.fma_from(&x[turn], lanes, sum)
    }
    const FROM_MEMORY: bool = true;
}
impl Floats for Bf16Dots {}

impl<P: Floats> Product for P {
    /// (rows, K / 2).
    type Inputs<'a> = Rows<'a, P::X>;
    const DOTS: bool = P::DOTS;
    const PIECE: usize = 512;
    const STEP_LINES: usize = P::GROUP_BYTES / LINE;
    const ASKED_LINES: usize = 1;

    /// Of sixteen registers that are half as wide, 6 x 16, or 3 x 32 for few rows.
    fn tallest(wide: bool) -> usize {
        if wide { 14 } else { 6 }
    }

    fn address(x: Rows<'_, P::X>, row: usize, group: usize) -> (*const u8, usize) {
        (x.row(row)[group..].as_ptr().cast(), size_of::<P::X>() * x.stride())
    }

    #[inline(always)]
    fn multiply<S: Simd, const STREAM: bool>(
        simd: S,
        x: Rows<'_, P::X>,
        part: &Part,
        piece: &[u8],
        ahead: Ahead,
        sums: &mut Tile,
    ) {
        let fresh = part.fresh;
        let piece: &[[P::Step; NR / LANES]] = bytemuck::cast_slice(piece);
        macro_rules! add {
            ($rows:literal, $register:literal, $registers:literal) => {{
                let mut inputs = [&[][..]; $rows];
                for r in 0..$rows {
                    inputs[r] = &x.row(part.rows.start + r)[part.groups.clone()];
                }
                multiply::<S, P, STREAM, $rows, $register, $registers>(
                    simd, inputs, piece, ahead, fresh, sums,
                )
            }};
            ($rows:literal) => {
                add!($rows, 0, 2)
            };
            ($rows:literal in halves) => {{
                add!($rows, 0, 1);
                add!($rows, 1, 1);
            }};
        }
        match (part.rows.len(), S::WIDE) {
            (1, _) => add!(1),
            (2, _) => add!(2),
            (3, _) => add!(3),
            (4, false) => add!(4 in halves),
            (5, false) => add!(5 in halves),
            (6, false) => add!(6 in halves),
            (4, true) => add!(4),
            (5, true) => add!(5),
            (6, true) => add!(6),
            (7, true) => add!(7),
            (8, true) => add!(8),
            (9, true) => add!(9),
            (10, true) => add!(10),
            (11, true) => add!(11),
            (12, true) => add!(12),
            (13, true) => add!(13),
            (14, true) => add!(14),
            (rows, _) => unreachable!("a tile of {rows} rows"),
        }
    }
}

/// Adds `x @ piece` to `MR` rows of `NV` registers, from register `V0` of the panel on; to zeros when `fresh`.
///
/// Sums are registers from the first step to the last: nothing here may need their address.
#[inline(always)]
fn multiply<S: Simd, P: Floats, const STREAM: bool, const MR: usize, const V0: usize, const NV: usize>(
    simd: S,
    mut x: [&[P::X]; MR],
    piece: &[[P::Step; NR / LANES]],
    mut ahead: Ahead,
    fresh: bool,
    sums: &mut Tile,
) {
    let steps = piece.len();
    let mut asked = 0;
    for x in &mut x {
        *x = &x[..steps];
    }
    let mut acc = [[P::zero(simd); NV]; MR];
    if !fresh {
        for r in 0..MR {
            for j in 0..NV {
                acc[r][j] = P::resume(simd, &sums[r].as_chunks().0[V0 + j]);
            }
        }
    }
    for k in 0..steps {
        if STREAM {
            for line in 0..P::GROUP_BYTES / LINE {
                simd.prefetch(ahead.address.wrapping_add(k * P::GROUP_BYTES + line * LINE));
            }
        } else {
            ahead.ask(simd, &mut asked);
        }
        for turn in 0..P::TURNS {
            let mut lanes = [P::zero(simd); NV];
            for j in 0..NV {
                lanes[j] = P::lanes(simd, &piece[k][V0 + j], turn);
            }
            for r in 0..MR {
                for j in 0..NV {
                    acc[r][j] = if P::FROM_MEMORY {
                        P::add_from(simd, acc[r][j], lanes[j], &x[r][k], turn)
                    } else {
                        P::add(simd, acc[r][j], lanes[j], x[r][k], turn)
                    };
                }
            }
        }
    }
    for r in 0..MR {
        for j in 0..NV {
            P::save(simd, acc[r][j], &mut sums[r].as_chunks_mut().0[V0 + j]);
        }
    }
}
