//! Factors of a product, copied into the order in which register tiles take them.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Operand;
use crate::ops::Rows;
use crate::ops::matmul::Product;
use crate::ops::pairs::{Bf16Dots, F32, Pairs};
use crate::ops::panels::NR;
use crate::simd::{Kernel, LANES, Simd, load_partial};
use half::bf16;
use std::marker::PhantomData;

/// A format of panels that is made from registers.
pub trait Packable: Product + Pairs {
    /// Two rows of sixteen columns.
    fn step<S: Simd>(simd: S, first: S::F32, second: S::F32, out: &mut Self::Step);
}

impl Packable for F32 {
    #[inline(always)]
    fn step<S: Simd>(simd: S, first: S::F32, second: S::F32, out: &mut [[f32; LANES]; 2]) {
        simd.store(first, &mut out[0]);
        simd.store(second, &mut out[1]);
    }
}

impl Packable for Bf16Dots {
    #[inline(always)]
    fn step<S: Simd>(simd: S, first: S::F32, second: S::F32, out: &mut [[bf16; 2]; LANES]) {
        simd.round_to_pairs(first, second, out);
    }
}

/// The right factor -> panels, as [`crate::ops::panels`] lays them out.
pub struct PackPanels<'a, P> {
    /// (K, N).
    pub b: Operand<'a>,
    /// Rows.
    pub k: usize,
    /// Columns.
    pub n: usize,
    /// Whole panels.
    pub out: &'a mut [u8],
    /// What is packed.
    pub format: PhantomData<P>,
}

impl<P: Packable> Kernel for PackPanels<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let out: &mut [[P::Step; NR / LANES]] = bytemuck::cast_slice_mut(self.out);
        let steps = self.k.div_ceil(2);
        if self.b.transposed {
            for column in (0..self.n.next_multiple_of(NR)).step_by(LANES) {
                let (panel, half) = (column / NR, column % NR / LANES);
                for k in (0..self.k).step_by(LANES) {
                    let block = columns_of(simd, self.b.rows, column, self.n, k);
                    let out = &mut out[panel * steps..][k / 2..steps.min(k / 2 + LANES / 2)];
                    for (pair, out) in out.iter_mut().enumerate() {
                        P::step(simd, block[2 * pair], block[2 * pair + 1], &mut out[half]);
                    }
                }
            }
            return;
        }
        for step in 0..steps {
            let first = self.b.rows.row(2 * step);
            let second = if 2 * step + 1 < self.k { self.b.rows.row(2 * step + 1) } else { &[] };
            for panel in 0..self.n.div_ceil(NR) {
                let out = &mut out[panel * steps + step];
                for half in 0..NR / LANES {
                    let column = panel * NR + half * LANES;
                    let (first, second) = (lanes(simd, first, column), lanes(simd, second, column));
                    P::step(simd, first, second, &mut out[half]);
                }
            }
        }
    }
}

/// Sixteen values from `start` on, zeros after the row's end.
#[inline(always)]
fn lanes<S: Simd>(simd: S, row: &[f32], start: usize) -> S::F32 {
    load_partial(simd, &row[start.min(row.len())..])
}

/// Values `k..k + 16` of the rows `first..first + 16`, as columns; zeros where rows (of which there are `n`) or values
/// are missing.
#[inline(always)]
fn columns_of<S: Simd>(simd: S, rows: Rows<'_>, first: usize, n: usize, k: usize) -> [S::F32; LANES] {
    let mut block = [simd.splat(0.0); LANES];
    if first + LANES <= n && k + LANES <= rows.columns() {
        for i in 0..LANES {
            block[i] = load_partial(simd, &rows.row(first + i)[k..k + LANES]);
        }
    } else {
        for i in 0..LANES.min(n.saturating_sub(first)) {
            block[i] = lanes(simd, rows.row(first + i), k);
        }
    }
    simd.transpose(block)
}

/// The left factor -> its rows, in pairs, each padded by zeros to whole registers.
pub struct PackRows<'a, P: Pairs> {
    /// (M, K).
    pub a: Operand<'a>,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub k: usize,
    /// (M, K / 2 rounded up), rows `stride` apart.
    pub out: &'a mut [P::X],
    /// At least K / 2 rounded up to whole registers.
    pub stride: usize,
}

impl<P: Pairs> Kernel for PackRows<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if !self.a.transposed {
            for m in 0..self.m {
                let out = &mut self.out[m * self.stride..];
                for k in (0..self.k).step_by(LANES) {
                    put::<S, P>(simd, lanes(simd, self.a.rows.row(m), k), &mut out[k / 2..]);
                }
            }
            return;
        }
        for k in (0..self.k).step_by(LANES) {
            for m in (0..self.m).step_by(LANES) {
                let block = columns_of(simd, self.a.rows.rows_from(k), 0, self.k - k, m);
                for i in 0..LANES {
                    if m + i < self.m {
                        put::<S, P>(simd, block[i], &mut self.out[(m + i) * self.stride + k / 2..]);
                    }
                }
            }
        }
    }
}

/// Eight pairs, where rows of whole registers have room for them.
#[inline(always)]
fn put<S: Simd, P: Pairs>(simd: S, values: S::F32, out: &mut [P::X]) {
    *out.first_chunk_mut().expect("rows of whole registers") = P::sixteen(simd, values);
}
