//! Products of activations with packed weights: one layout streams for one row and multiplies for many.
//!
//! A weight matrix (K, N) is packed in panels of [`NR`] columns; within a panel the K rows of NR values lie one after
//! the other. An output is one chain of fused multiply-adds over k ascending, from zero; then the bias is added, then
//! comes the rest of the epilogue. How rows, columns and k are cut changes no bit: a cut along k stores the
//! accumulator and loads it again, which is exact. (The register tile and the loops around it are those of BLIS: Van
//! Zee and van de Geijn, 2015.)

use super::Rows;
use super::gelu::activate;
use crate::config::Activation;
use crate::pool::Columns;
use crate::simd::{Element, Kernel, LANES, Simd, load_partial, store_partial};
use std::ops::Range;

/// Columns of a panel.
pub const NR: usize = 2 * LANES;

/// How much of k a pass over many rows takes at a time: a panel's piece fits the first-level cache, the rows' pieces
/// the second-level one.
const KC: usize = 256;

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
        let tallest = if S::WIDE { 14 } else { 6 };
        let tiles = self.rows.div_ceil(tallest);
        let kc = if tiles == 1 { self.w.k } else { KC };
        let columns = self.out.range();
        if columns.is_empty() || self.rows == 0 {
            return;
        }
        let panels = columns.start / NR..columns.end.div_ceil(NR);
        for k0 in (0..self.w.k).step_by(kc) {
            let ks = k0..(k0 + kc).min(self.w.k);
            for panel in panels.clone() {
                let piece = &self.w.panel(panel)[ks.clone()];
                if tiles == 1 {
                    let part = Part { panel, rows: 0..self.rows, ks: ks.clone() };
                    let ahead = piece.as_ptr().cast::<u8>().wrapping_add(AHEAD_BYTES);
                    self.tile::<S, true>(simd, part, piece, ahead);
                    continue;
                }
                // Each tile asks for one line of the next piece a step, so the first one or two tiles bring it whole.
                let next = self.w.panel((panel + 1).min(panels.end - 1))[ks.clone()].as_ptr().cast::<u8>();
                for tile in 0..tiles {
                    let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
                    let brought = tile * ks.len() * LINE;
                    let ahead = next.wrapping_add(if brought < size_of_val(piece) { brought } else { 0 });
                    self.tile::<S, false>(simd, Part { panel, rows, ks: ks.clone() }, piece, ahead);
                }
            }
        }
    }
}

impl<W: Element> MatMul<'_, W> {
    /// The widest tile whose accumulators fit the registers: 14 x 32 of 32, 3 x 32 or 6 x 16 of 16 half as wide.
    #[inline(always)]
    fn tile<S: Simd, const STREAM: bool>(
        &mut self,
        simd: S,
        part: Part,
        piece: &[[W; NR]],
        ahead: *const u8,
    ) {
        macro_rules! whole {
            ($rows:literal) => {
                self.accumulate::<S, STREAM, $rows, 0, 2>(simd, &part, piece, ahead)
            };
        }
        macro_rules! halves {
            ($rows:literal) => {{
                self.accumulate::<S, STREAM, $rows, 0, 1>(simd, &part, piece, ahead);
                self.accumulate::<S, STREAM, $rows, 1, 1>(simd, &part, piece, ahead);
            }};
        }
        match (part.rows.len(), S::WIDE) {
            (1, _) => whole!(1),
            (2, _) => whole!(2),
            (3, _) => whole!(3),
            (4, false) => halves!(4),
            (5, false) => halves!(5),
            (6, false) => halves!(6),
            (4, true) => whole!(4),
            (5, true) => whole!(5),
            (6, true) => whole!(6),
            (7, true) => whole!(7),
            (8, true) => whole!(8),
            (9, true) => whole!(9),
            (10, true) => whole!(10),
            (11, true) => whole!(11),
            (12, true) => whole!(12),
            (13, true) => whole!(13),
            (14, true) => whole!(14),
            (rows, _) => unreachable!("a tile of {rows} rows"),
        }
    }

    /// `MR` rows by `NV` registers of the panel, from its register `V0` on.
    #[inline(always)]
    fn accumulate<S: Simd, const STREAM: bool, const MR: usize, const V0: usize, const NV: usize>(
        &mut self,
        simd: S,
        part: &Part,
        piece: &[[W; NR]],
        ahead: *const u8,
    ) {
        let steps = piece.len();
        let mut x = [&[][..]; MR];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x.row(part.rows.start + r)[part.ks.clone()][..steps];
        }
        // The tile's place among this thread's columns.
        let left = part.panel * NR + V0 * LANES - self.out.range().start;
        let mut acc = [[simd.splat(0.0); NV]; MR];
        if part.ks.start > 0 {
            for (r, acc) in acc.iter_mut().enumerate() {
                let sums = self.out.row(part.rows.start + r);
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = load_partial(simd, tail(sums, left + j * LANES));
                }
            }
        }
        for k in 0..steps {
            if STREAM {
                for line in 0..size_of::<[W; NR]>() / LINE {
                    simd.prefetch(ahead.wrapping_add(k * size_of::<[W; NR]>() + line * LINE));
                }
            } else {
                simd.prefetch_l2(ahead.wrapping_add(k * LINE));
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
        let last = part.ks.end == self.w.k;
        for (r, acc) in acc.into_iter().enumerate() {
            let row = part.rows.start + r;
            for (j, sum) in acc.into_iter().enumerate() {
                let at = left + j * LANES;
                if last {
                    self.finish(simd, row, at, sum);
                } else {
                    store_partial(simd, sum, tail_mut(self.out.row(row), at));
                }
            }
        }
    }

    /// The epilogue of sixteen columns of a row, at column `at` of this thread's.
    #[inline(always)]
    fn finish<S: Simd>(&mut self, simd: S, row: usize, at: usize, sum: S::F32) {
        let bias = tail(self.bias, self.out.range().start + at);
        let sum = if self.bias.is_empty() { sum } else { simd.add(sum, load_partial(simd, bias)) };
        match &mut self.then {
            Then::Store => store_partial(simd, sum, tail_mut(self.out.row(row), at)),
            Then::Activate(activation) => {
                let value = activate(simd, *activation, sum);
                store_partial(simd, value, tail_mut(self.out.row(row), at));
            }
            Then::AddTo(residual) => {
                let out = tail_mut(residual.row(row), at);
                let value = simd.add(load_partial(simd, out), sum);
                store_partial(simd, value, out);
            }
        }
    }
}

/// What of `slice` lies in the register that begins at `start`: sixteen values, fewer at the end, or none.
#[inline(always)]
fn tail(slice: &[f32], start: usize) -> &[f32] {
    let start = start.min(slice.len());
    &slice[start..(start + LANES).min(slice.len())]
}

#[inline(always)]
fn tail_mut(slice: &mut [f32], start: usize) -> &mut [f32] {
    let start = start.min(slice.len());
    let end = (start + LANES).min(slice.len());
    &mut slice[start..end]
}
