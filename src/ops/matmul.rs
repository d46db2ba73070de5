//! Products of activations with packed weights: one layout streams for one row and multiplies for many.
//!
//! A weight matrix (K, N) is packed in panels of [`NR`] columns; within a panel the K rows of NR values lie one after
//! the other. An output is one chain of fused multiply-adds over k ascending, from zero; then the bias is added, then
//! comes the rest of the epilogue. How rows, columns and k are cut changes no bit: a cut along k stores the
//! accumulator and loads it again, which is exact. (The register tile and the loops around it are those of BLIS: Van
//! Zee and van de Geijn, 2015.)

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Rows;
use super::gelu::activate;
use crate::config::Activation;
use crate::pool::Columns;
use crate::simd::{Element, Kernel, LANES, Simd, load_partial};
use std::ops::Range;

/// Columns of a panel.
pub const NR: usize = 2 * LANES;

/// How much of k a pass over many rows takes at most: long, since each cut stores and loads all sums, and short enough
/// for a panel's piece to stay in the second-level cache beside a tile's inputs.
const KC: usize = 1024;

/// Rows of the tallest tile: 14 x 2 registers of sums leave four of 32 for weights and inputs.
const TALLEST: usize = 14;

/// Bytes of a cache line.
const LINE: usize = 64;

/// How far ahead of its use a streamed weight is asked for.
const AHEAD_BYTES: usize = 6 << 10;

/// A packed (K, N) matrix.
#[derive(Clone, Copy)]
pub struct Panels<'a, W> {
    data: &'a [W],
    k: usize,
    n: usize,
}

impl<'a, W: Element> Panels<'a, W> {
    /// Elements that a packed (k, n) matrix takes: n is rounded up to whole panels.
    pub fn packed_len(k: usize, n: usize) -> usize {
        k * n.next_multiple_of(NR)
    }

    /// A view of packed data.
    ///
    /// # Panics
    /// When the length is not that of a (k, n) matrix.
    pub fn new(data: &'a [W], k: usize, n: usize) -> Panels<'a, W> {
        assert_eq!(data.len(), Self::packed_len(k, n));
        Panels { data, k, n }
    }

    /// Rows of the matrix: the inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the matrix: the outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.n.div_ceil(NR)
    }

    /// The columns that lie in the panels `panels`.
    pub fn columns(&self, panels: Range<usize>) -> Range<usize> {
        (panels.start * NR).min(self.n)..(panels.end * NR).min(self.n)
    }

    /// The K rows of panel `index`.
    #[inline(always)]
    pub fn panel(&self, index: usize) -> &'a [[W; NR]] {
        self.data[index * self.k * NR..][..self.k * NR].as_chunks().0
    }
}

/// What follows the sum and its bias.
pub enum Then<'a> {
    /// Nothing: the output is stored.
    Store,
    /// An activation function.
    Activate(Activation),
    /// It is added to these columns of the residual stream instead, in place.
    AddTo(Columns<'a>),
}

/// `then(x @ w + bias)` for the columns of one thread.
pub struct MatMul<'a, W> {
    /// (rows, K).
    pub x: Rows<'a>,
    /// How many rows.
    pub rows: usize,
    /// (K, N).
    pub w: Panels<'a, W>,
    /// (N,), or empty for none.
    pub bias: &'a [f32],
    /// The epilogue.
    pub then: Then<'a>,
    /// Columns of the (rows, N) output, from the first of a panel; with `Then::AddTo`, room for unfinished sums.
    pub out: Columns<'a>,
}

/// What a tile asks for while it computes: lines from `address` on, with a `gap` of bytes after each `lines`.
#[derive(Clone, Copy)]
struct Ahead {
    address: *const u8,
    lines: usize,
    gap: usize,
}

/// A tile of the output, and what of k is being added to it.
struct Part {
    panel: usize,
    rows: Range<usize>,
    ks: Range<usize>,
}

impl<W: Element> Kernel for MatMul<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let tiles = self.rows.div_ceil(if S::WIDE { TALLEST } else { 6 });
        // Pieces of one length, as a short last one would cost as many stores and loads.
        let kc = if tiles == 1 { self.w.k } else { self.w.k.div_ceil(self.w.k.div_ceil(KC)) };
        let columns = self.out.range();
        assert!(self.bias.is_empty() || self.bias.len() == self.w.n);
        if columns.is_empty() || self.rows == 0 {
            return;
        }
        let mut sums: Tile = [[0.0; NR]; TALLEST];
        let panels = columns.start / NR..columns.end.div_ceil(NR);
        for k0 in (0..self.w.k).step_by(kc) {
            let ks = k0..(k0 + kc).min(self.w.k);
            for panel in panels.clone() {
                let piece = &self.w.panel(panel)[ks.clone()];
                if tiles == 1 {
                    let part = Part { panel, rows: 0..self.rows, ks: ks.clone() };
                    let address = piece.as_ptr().cast::<u8>().wrapping_add(AHEAD_BYTES);
                    let ahead = Ahead { address, lines: usize::MAX, gap: 0 };
                    self.tile::<S, true>(simd, part, piece, ahead, &mut sums);
                    continue;
                }
                let next = self.w.panel((panel + 1).min(panels.end - 1))[ks.clone()].as_ptr().cast::<u8>();
                for tile in 0..tiles {
                    let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
                    // One line a step: the first one or two tiles bring the next piece of weights, the others the next
                    // tile's inputs, of which all together don't stay in the second-level cache.
                    let brought = tile * ks.len() * LINE;
                    let ahead = if brought < size_of_val(piece) {
                        Ahead { address: next.wrapping_add(brought), lines: usize::MAX, gap: 0 }
                    } else {
                        let row = self.x.row(if tile + 1 < tiles { rows.end } else { 0 });
                        let lines = (size_of::<f32>() * ks.len()).div_ceil(LINE);
                        // Negative where rows are closer than whole lines; addresses wrap.
                        let gap = (size_of::<f32>() * self.x.stride()).wrapping_sub(lines * LINE);
                        Ahead { address: row[ks.start..].as_ptr().cast(), lines, gap }
                    };
                    let part = Part { panel, rows, ks: ks.clone() };
                    self.tile::<S, false>(simd, part, piece, ahead, &mut sums);
                }
            }
        }
    }
}

/// Accumulators of a tile between memory and registers.
type Tile = [[f32; NR]; TALLEST];

impl<W: Element> MatMul<'_, W> {
    /// One tile: what was summed before, a piece of k, and after the last piece the epilogue.
    #[inline(always)]
    fn tile<S: Simd, const STREAM: bool>(
        &mut self,
        simd: S,
        part: Part,
        piece: &[[W; NR]],
        ahead: Ahead,
        sums: &mut Tile,
    ) {
        // The tile's place among this thread's columns, of which the last panel may have fewer than NR.
        let left = part.panel * NR - self.out.range().start;
        let columns = left..(left + NR).min(self.out.range().len());
        let last = part.ks.end == self.w.k;
        for row in part.rows.clone() {
            // Stores to lines that are not there would wait at the tile's end, and the next tile with them.
            let out = match &mut self.then {
                Then::AddTo(residual) if last => residual.row(row),
                _ => self.out.row(row),
            };
            simd.prefetch(out[columns.start..].as_ptr());
            simd.prefetch(out[columns.end - 1..].as_ptr());
        }
        if part.ks.start > 0 {
            for (sums, row) in sums.iter_mut().zip(part.rows.clone()) {
                let out = &self.out.row(row)[columns.clone()];
                match out.first_chunk() {
                    Some(whole) => *sums = *whole,
                    None => sums[..out.len()].copy_from_slice(out),
                }
            }
        }
        self.multiply::<S, STREAM>(simd, &part, piece, ahead, sums);
        if last {
            return self.finish(simd, part, columns, sums);
        }
        for (sums, row) in sums.iter().zip(part.rows) {
            let out = &mut self.out.row(row)[columns.clone()];
            match out.first_chunk_mut() {
                Some(whole) => *whole = *sums,
                None => out.copy_from_slice(&sums[..out.len()]),
            }
        }
    }

    /// By as many rows at once as there are, and as many columns as leave their sums in registers: 14 x 32 of 32
    /// registers, 3 x 32 or 6 x 16 of sixteen that are half as wide.
    #[inline(always)]
    fn multiply<S: Simd, const STREAM: bool>(
        &self,
        simd: S,
        part: &Part,
        piece: &[[W; NR]],
        ahead: Ahead,
        sums: &mut Tile,
    ) {
        let fresh = part.ks.start == 0;
        let x = |row: usize| &self.x.row(part.rows.start + row)[part.ks.clone()];
        macro_rules! add {
            ($rows:literal, $register:literal, $registers:literal) => {{
                let x = std::array::from_fn(x);
                multiply::<S, W, STREAM, $rows, $register, $registers>(simd, x, piece, ahead, fresh, sums)
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

    /// The epilogue of a tile: `columns` of this thread's.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, simd: S, part: Part, columns: Range<usize>, sums: &Tile) {
        let first = self.out.range().start + columns.start;
        let mut bias = [simd.splat(0.0); NR / LANES];
        if let Some(of_panel) = self.bias.get(first..first + columns.len()) {
            for (bias, of_lanes) in bias.iter_mut().zip(of_panel.chunks(LANES)) {
                *bias = load_partial(simd, of_lanes);
            }
        }
        let (activation, adds) = match self.then {
            Then::Store => (None, false),
            Then::Activate(activation) => (Some(activation), false),
            Then::AddTo(_) => (None, true),
        };
        for (sums, row) in sums.iter().zip(part.rows) {
            let out = match &mut self.then {
                Then::AddTo(residual) => residual.row(row),
                _ => self.out.row(row),
            };
            let out = &mut out[columns.clone()];
            match out.first_chunk_mut() {
                Some(whole) => epilogue(simd, sums, &bias, activation, adds, whole),
                None => {
                    let mut whole = [0.0; NR];
                    whole[..out.len()].copy_from_slice(out);
                    epilogue(simd, sums, &bias, activation, adds, &mut whole);
                    out.copy_from_slice(&whole[..out.len()]);
                }
            }
        }
    }
}

/// A row of a panel: `out = activation(sums + bias)`, or `out += sums + bias`.
#[inline(always)]
fn epilogue<S: Simd>(
    simd: S,
    sums: &[f32; NR],
    bias: &[S::F32; NR / LANES],
    activation: Option<Activation>,
    adds: bool,
    out: &mut [f32; NR],
) {
    for ((out, sums), &bias) in out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0).zip(bias) {
        let mut value = simd.add(simd.load(sums), bias);
        if let Some(activation) = activation {
            value = activate(simd, activation, value);
        }
        if adds {
            value = simd.add(simd.load(out), value);
        }
        simd.store(value, out);
    }
}

/// Adds `x @ piece` to `MR` rows of `NV` registers, from register `V0` of the panel on; to zeros when `fresh`.
///
/// Sums are registers from the first step to the last: nothing here may need their address.
#[inline(always)]
fn multiply<S: Simd, W: Element, const STREAM: bool, const MR: usize, const V0: usize, const NV: usize>(
    simd: S,
    mut x: [&[f32]; MR],
    piece: &[[W; NR]],
    mut ahead: Ahead,
    fresh: bool,
    sums: &mut Tile,
) {
    let steps = piece.len();
    let mut line = 0;
    for x in &mut x {
        *x = &x[..steps];
    }
    let mut acc = [[simd.splat(0.0); NV]; MR];
    if !fresh {
        for r in 0..MR {
            for j in 0..NV {
                acc[r][j] = simd.load(&sums[r].as_chunks().0[V0 + j]);
            }
        }
    }
    for k in 0..steps {
        if STREAM {
            for line in 0..size_of::<[W; NR]>() / LINE {
                simd.prefetch(ahead.address.wrapping_add(k * size_of::<[W; NR]>() + line * LINE));
            }
        } else {
            simd.prefetch_l2(ahead.address);
            ahead.address = ahead.address.wrapping_add(LINE);
            line += 1;
            if line == ahead.lines {
                (line, ahead.address) = (0, ahead.address.wrapping_add(ahead.gap));
            }
        }
        let (w, _) = piece[k].as_chunks::<LANES>();
        let mut lanes = [simd.splat(0.0); NV];
        for j in 0..NV {
            lanes[j] = W::load(simd, &w[V0 + j]);
        }
        for r in 0..MR {
            let value = simd.splat(x[r][k]);
            for j in 0..NV {
                acc[r][j] = simd.fma(value, lanes[j], acc[r][j]);
            }
        }
    }
    for r in 0..MR {
        for j in 0..NV {
            simd.store(acc[r][j], &mut sums[r].as_chunks_mut().0[V0 + j]);
        }
    }
}
