//! Products of row-major matrices, either of them taken transposed: what the backward pass is made of.
//!
//! The loops of BLIS (Van Zee and van de Geijn, 2015) around the register tiles of [`super::matmul`]: a piece of the
//! right factor is packed into panels that stay in the last-level cache, then each block of rows of the left one, which
//! stays in the second-level cache, goes over it. An output is one chain over k ascending, wherever the cuts fall: a
//! product may go on from what the output holds, which is how gradients are accumulated.

mod pack;

use super::Rows;
use super::matmul::{MatMul, Then};
use super::pairs::{Bf16Dots, F32};
use super::panels::{NR, Panels};
use crate::mapped::Line;
use crate::pool::Columns;
use crate::simd::{Isa, LANES};
use bytemuck::Zeroable;
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

pub use pack::{PackPanels, PackRows, Packable};

/// Terms of the chains that a pass over the outputs adds at most.
const KC: usize = 768;
/// Bytes of panels that are packed together at most, for a chain of `KC`.
const NC_BYTES: usize = size_of::<f32>() * 512;
/// Rows of the left factor that are gone through together at most: sixteen of the tallest tiles.
const MC: usize = 224;
/// The distance between rows of a block of the left factor that was copied, in pairs.
const STRIDE: usize = KC / 2 + 8;

/// How exactly the factors of a product are taken. Sums are float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    Float32,
    /// Rounded to bfloat16, and subnormals taken for zeros, as `precision="fast"` computes: see `docs/design.md`.
    Bfloat16,
}

/// A factor: a row-major matrix as it is, or transposed.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    rows: Rows<'a>,
    transposed: bool,
}

impl<'a> Operand<'a> {
    /// The matrix of these rows.
    pub fn of(rows: Rows<'a>) -> Operand<'a> {
        Operand { rows, transposed: false }
    }

    /// The matrix of these columns.
    pub fn transposed(rows: Rows<'a>) -> Operand<'a> {
        Operand { rows, transposed: true }
    }

    /// A part of the matrix.
    fn part(self, rows: Range<usize>, columns: Range<usize>) -> Operand<'a> {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        Operand { rows: self.rows.rows_from(rows.start).columns_of(columns), ..self }
    }
}

/// `out = a @ b + bias` for the columns of one thread.
pub struct Gemm<'a> {
    /// (M, K).
    pub a: Operand<'a>,
    /// (K, N).
    pub b: Operand<'a>,
    /// Terms of a chain, at least one.
    pub k: usize,
    /// Whether it is added to what `out` holds: the chains go on from there.
    pub adds: bool,
    /// (N,), or empty for none.
    pub bias: &'a [f32],
    /// These columns of the (M, N) output.
    pub out: Columns<'a>,
}

/// Room of one thread for a piece of each factor.
pub struct Scratch {
    panels: Vec<Line>,
    left: Left,
}

/// Room for a block of rows of the left factor.
pub struct Left {
    floats: Vec<[f32; 2]>,
    rounded: Vec<[bf16; 2]>,
}

impl Scratch {
    /// Bytes that it takes.
    pub const BYTES: usize = KC * NC_BYTES + (size_of::<[f32; 2]>() + size_of::<[bf16; 2]>()) * MC * STRIDE;

    /// Room for products of any size.
    pub fn new() -> Scratch {
        let left = Left { floats: vec![[0.0; 2]; MC * STRIDE], rounded: vec![[bf16::ZERO; 2]; MC * STRIDE] };
        Scratch { panels: vec![Line::zeroed(); KC * NC_BYTES / size_of::<Line>()], left }
    }

    /// The part that products with a [`Packed`] factor need.
    pub fn left(&mut self) -> &mut Left {
        &mut self.left
    }
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch::new()
    }
}

impl Gemm<'_> {
    /// Computes them.
    pub fn run(self, isa: Isa, precision: Precision, scratch: &mut Scratch) {
        match precision {
            Precision::Float32 => self.run_as::<F32>(isa, scratch),
            Precision::Bfloat16 => self.run_as::<Bf16Dots>(isa, scratch),
        }
    }

    fn run_as<P: Takes>(mut self, isa: Isa, scratch: &mut Scratch) {
        let (m, columns) = (self.out.rows(), self.out.range());
        let Scratch { panels, left } = scratch;
        for k in pieces(self.k, KC) {
            let bias = if k.end == self.k { self.bias } else { &[] };
            for n in pieces(columns.len(), NC_BYTES / P::BYTES) {
                let of_matrix = columns.start + n.start..columns.start + n.end;
                let bias = bias.get(of_matrix.clone()).unwrap_or(&[]);
                let size = (k.len(), n.len());
                pack::<P>(isa, self.b.part(k.clone(), of_matrix), size, panels);
                let a = self.a.part(0..m, k.clone());
                let adds = self.adds || k.start > 0;
                multiply::<P>(isa, a, size, panels, adds, bias, self.out.part(0..m, n), left);
            }
        }
    }
}

/// A right factor, packed for several products.
pub struct Packed<'a> {
    panels: &'a [Line],
    size: (usize, usize),
    precision: Precision,
}

/// Lines that a packed (k, n) factor takes at most.
pub fn packed_lines(k: usize, n: usize) -> usize {
    Panels::<F32>::packed_len(k, n) / size_of::<Line>()
}

impl<'a> Packed<'a> {
    /// Packs a (k, n) factor into `room`, which has its [`packed_lines`].
    pub fn new(
        isa: Isa,
        precision: Precision,
        b: Operand<'_>,
        size: (usize, usize),
        room: &'a mut [Line],
    ) -> Packed<'a> {
        match precision {
            Precision::Float32 => pack::<F32>(isa, b, size, room),
            Precision::Bfloat16 => pack::<Bf16Dots>(isa, b, size, room),
        }
        Packed { panels: room, size, precision }
    }

    /// `out = a @ self`, or `out += a @ self`.
    pub fn multiply(&self, isa: Isa, a: Operand<'_>, adds: bool, out: Columns<'_>, left: &mut Left) {
        let &Packed { panels, size, precision } = self;
        match precision {
            Precision::Float32 => multiply::<F32>(isa, a, size, panels, adds, &[], out, left),
            Precision::Bfloat16 => multiply::<Bf16Dots>(isa, a, size, panels, adds, &[], out, left),
        }
    }
}

/// Packs the (k, n) matrix `b`, each piece of k behind the one before.
fn pack<P: Takes>(isa: Isa, b: Operand<'_>, (k, n): (usize, usize), room: &mut [Line]) {
    let mut rest: &mut [u8] = bytemuck::cast_slice_mut(room);
    for k in pieces(k, KC) {
        let (out, after) = rest.split_at_mut(Panels::<P>::packed_len(k.len(), n));
        let b = b.part(k.clone(), 0..n);
        isa.run(PackPanels::<P> { b, k: k.len(), n, out, format: PhantomData });
        rest = after;
    }
}

/// `out = a @ b + bias`, or `out += a @ b + bias`, with the (k, n) matrix b as [`pack`] left it.
#[allow(clippy::too_many_arguments)]
fn multiply<P: Takes>(
    isa: Isa,
    a: Operand<'_>,
    (all, n): (usize, usize),
    panels: &[Line],
    adds: bool,
    bias: &[f32],
    mut out: Columns<'_>,
    left: &mut Left,
) {
    let mut rest: &[u8] = bytemuck::cast_slice(panels);
    for k in pieces(all, KC) {
        let (packed, after) = rest.split_at(Panels::<P>::packed_len(k.len(), n));
        rest = after;
        let bias = if k.end == all { bias } else { &[] };
        for m in pieces(out.rows(), MC) {
            let x = P::take(isa, a.part(m.clone(), k.clone()), (m.len(), k.len()), left);
            let w = Panels::<P>::new(packed, k.len(), n);
            let then = if adds || k.start > 0 { Then::Continue } else { Then::Store };
            P::run(isa, MatMul { x, rows: m.len(), w, bias, then, out: out.part(m, 0..n) });
        }
    }
}

/// `0..n` in pieces of about the same length, at most `longest`, whole registers but for the last.
fn pieces(n: usize, longest: usize) -> impl Iterator<Item = Range<usize>> {
    let length = n.div_ceil(n.div_ceil(longest).max(1)).next_multiple_of(NR).min(longest).max(1);
    (0..n).step_by(length).map(move |start| start..n.min(start + length))
}

/// A format whose products take rows of float32, as they lie or copied.
trait Takes: Packable {
    /// Bytes of a value of a panel.
    const BYTES: usize = size_of::<Self::Step>() / (2 * LANES);

    /// The (m, k) left factor, copied where it can't be taken as it lies.
    fn take<'a>(isa: Isa, a: Operand<'a>, size: (usize, usize), left: &'a mut Left) -> Self::Inputs<'a>;

    /// Runs the product in the floating-point mode that the format means.
    fn run(isa: Isa, product: MatMul<'_, Self>);
}

impl Takes for F32 {
    fn take<'a>(isa: Isa, a: Operand<'a>, (m, k): (usize, usize), left: &'a mut Left) -> Rows<'a, [f32; 2]> {
        // Rows that are no whole pairs would be read past their ends.
        let whole = a.rows.stride().is_multiple_of(2) && a.rows.columns().is_multiple_of(2);
        if whole && !a.transposed {
            return a.rows.pairs();
        }
        isa.run(PackRows::<F32> { a, m, k, out: &mut left.floats, stride: STRIDE });
        Rows::new(&left.floats, STRIDE, k.div_ceil(2))
    }

    fn run(isa: Isa, product: MatMul<'_, F32>) {
        isa.run(product);
    }
}

impl Takes for Bf16Dots {
    fn take<'a>(isa: Isa, a: Operand<'a>, (m, k): (usize, usize), left: &'a mut Left) -> Rows<'a, [bf16; 2]> {
        isa.run(PackRows::<Bf16Dots> { a, m, k, out: &mut left.rounded, stride: STRIDE });
        Rows::new(&left.rounded, STRIDE, k.div_ceil(2))
    }

    fn run(isa: Isa, product: MatMul<'_, Bf16Dots>) {
        isa.run_flushing(product);
    }
}
