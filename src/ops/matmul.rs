//! Products of activations with packed weights: one layout streams for one row and multiplies for many.
//!
//! An output is one chain over k ascending, from zero; then the bias is added, then comes the rest of the epilogue. A
//! link of the chain is a fused multiply-add of float32 ([`floats`]), or an exact integer sum over a group, scaled
//! ([`integers`]). How rows, columns and k are cut changes no bit: a cut along k stores the sums and loads them again,
//! which is exact. (The register tile and the loops around it are those of BLIS: Van Zee and van de Geijn, 2015.)

mod floats;
mod integers;

use super::gelu::activate;
use super::panels::{Format, NR, Panels};
use crate::config::Activation;
use crate::pool::Columns;
use crate::simd::{Kernel, LANES, Simd, load_partial};
use std::ops::Range;

pub use integers::{Quantised, Steps};

/// Rows of the tallest tile: 14 x 2 registers of sums leave four of 32 for weights and inputs.
const TALLEST: usize = 14;

/// Bytes of a cache line.
const LINE: usize = 64;

/// How far ahead of its use a streamed weight is asked for.
const AHEAD_BYTES: usize = 6 << 10;

/// A format that activations are multiplied with.
pub trait Product: Format {
    /// Rows of activations in the type that it takes.
    type Inputs<'a>: Copy;
    /// Whether this uses dot products of bytes or pairs.
    const DOTS: bool;
    /// Groups that a pass over many rows takes at most: many, since each cut stores and loads all sums, and few enough
    /// for a panel's piece to stay in the second-level cache beside a tile's inputs.
    const PIECE: usize;
    /// Cache lines of weights that a step takes.
    const STEP_LINES: usize;
    /// Cache lines of what is needed next that a step asks for.
    const ASKED_LINES: usize;

    /// Rows of the tallest tile whose sums stay in registers, 32 of them where `wide`, else 16.
    fn tallest(wide: bool) -> usize;

    /// Where the inputs of `row` for group `group` begin, and the bytes to the next row's.
    fn address(x: Self::Inputs<'_>, row: usize, group: usize) -> (*const u8, usize);

    /// Adds `x @ piece` to the sums of the rows `part.rows`; to zeros when the part is the first of its chain.
    fn multiply<S: Simd, const STREAM: bool>(
        simd: S,
        x: Self::Inputs<'_>,
        part: &Part,
        piece: &[u8],
        ahead: Ahead,
        sums: &mut Tile,
    );
}

/// What follows the sum and its bias.
pub enum Then<'a> {
    /// Nothing: the output is stored.
    Store,
    /// The same, but the chains went on from what the output held, not from zero; of float formats alone.
    Continue,
    /// An activation function.
    Activate(Activation),
    /// It is added to these columns of the residual stream instead, in place.
    AddTo(Columns<'a>),
}

/// `then(x @ w + bias)` for the columns of one thread.
pub struct MatMul<'a, F: Product> {
    /// (rows, K).
    pub x: F::Inputs<'a>,
    /// How many rows.
    pub rows: usize,
    /// (K, N).
    pub w: Panels<'a, F>,
    /// (N,), or empty for none.
    pub bias: &'a [f32],
    /// The epilogue.
    pub then: Then<'a>,
    /// Columns of the (rows, N) output, from the first of a panel; with `Then::AddTo`, room for unfinished sums.
    pub out: Columns<'a>,
}

/// What a tile asks for while it computes: lines from `address` on, with a `gap` of bytes after each `lines`.
#[derive(Clone, Copy)]
pub struct Ahead {
    address: *const u8,
    lines: usize,
    gap: usize,
}

/// A tile of the output, and what of k is being added to it.
pub struct Part {
    panel: usize,
    rows: Range<usize>,
    groups: Range<usize>,
    /// Whether its chains begin here.
    fresh: bool,
}

impl<F: Product> Kernel for MatMul<'_, F> {
    type Output = ();
    const DOTS: bool = F::DOTS;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let tiles = self.rows.div_ceil(F::tallest(S::WIDE));
        let all = self.w.groups();
        // Pieces of one length, as a short last one would cost as many stores and loads.
        let length = if tiles == 1 { all } else { all.div_ceil(all.div_ceil(F::PIECE)) };
        let columns = self.out.range();
        assert!(self.bias.is_empty() || self.bias.len() == self.w.n());
        if columns.is_empty() || self.rows == 0 {
            return;
        }
        let mut sums: Tile = [[0.0; NR]; TALLEST];
        let panels = columns.start / NR..columns.end.div_ceil(NR);
        for first in (0..all).step_by(length) {
            let groups = first..(first + length).min(all);
            let fresh = first == 0 && !matches!(self.then, Then::Continue);
            let mut bytes = groups.start * F::GROUP_BYTES..groups.end * F::GROUP_BYTES;
            if groups.end == all {
                bytes.end += F::PANEL_BYTES;
            }
            for panel in panels.clone() {
                let piece = &self.w.panel(panel)[bytes.clone()];
                if tiles == 1 {
                    let part = Part { panel, rows: 0..self.rows, groups: groups.clone(), fresh };
                    let address = piece.as_ptr().wrapping_add(AHEAD_BYTES);
                    let ahead = Ahead { address, lines: usize::MAX, gap: 0 };
                    self.tile::<S, true>(simd, part, piece, ahead, &mut sums);
                    continue;
                }
                let next = self.w.panel((panel + 1).min(panels.end - 1))[bytes.clone()].as_ptr();
                for tile in 0..tiles {
                    let rows = self.rows * tile / tiles..self.rows * (tile + 1) / tiles;
                    // The first tiles bring the next piece of weights, the others the next tile's inputs, of which all
                    // together don't stay in the second-level cache.
                    let brought = tile * piece.len() / F::STEP_LINES * F::ASKED_LINES;
                    let ahead = if matches!(self.then, Then::Continue) {
                        // Sums that go on are read at a tile's begin, by when they must be there.
                        let following = if tile + 1 < tiles { (rows.end, panel) } else { (0, panel + 1) };
                        self.sums_of(following.0, following.1.min(panels.end - 1))
                    } else if brought < piece.len() {
                        Ahead { address: next.wrapping_add(brought), lines: usize::MAX, gap: 0 }
                    } else {
                        let row = if tile + 1 < tiles { rows.end } else { 0 };
                        let (address, stride) = F::address(self.x, row, groups.start);
                        let (end, _) = F::address(self.x, row, groups.end);
                        let lines = (end.addr() - address.addr()).div_ceil(LINE);
                        // Negative where rows are closer than whole lines; addresses wrap.
                        Ahead { address, lines, gap: stride.wrapping_sub(lines * LINE) }
                    };
                    let part = Part { panel, rows, groups: groups.clone(), fresh };
                    self.tile::<S, false>(simd, part, piece, ahead, &mut sums);
                }
            }
        }
    }
}

/// Accumulators of a tile between memory and registers.
pub type Tile = [[f32; NR]; TALLEST];

impl<F: Product> MatMul<'_, F> {
    /// The output of a tile that begins at `row` of `panel`.
    #[inline(always)]
    fn sums_of(&mut self, row: usize, panel: usize) -> Ahead {
        // Rows begin anywhere in a line.
        const LINES: usize = NR * size_of::<f32>() / LINE + 1;
        let gap = (self.out.stride() * size_of::<f32>()).wrapping_sub(LINES * LINE);
        let left = panel * NR - self.out.range().start;
        Ahead { address: self.out.row(row)[left..].as_ptr().cast(), lines: LINES, gap }
    }

    /// One tile: what was summed before, a piece of k, and after the last piece the epilogue.
    #[inline(always)]
    fn tile<S: Simd, const STREAM: bool>(
        &mut self,
        simd: S,
        part: Part,
        piece: &[u8],
        ahead: Ahead,
        sums: &mut Tile,
    ) {
        // The tile's place among this thread's columns, of which the last panel may have fewer than NR.
        let left = part.panel * NR - self.out.range().start;
        let columns = left..(left + NR).min(self.out.range().len());
        let last = part.groups.end == self.w.groups();
        for row in part.rows.clone() {
            // Stores to lines that are not there would wait at the tile's end, and the next tile with them.
            let out = match &mut self.then {
                Then::AddTo(residual) if last => residual.row(row),
                _ => self.out.row(row),
            };
            simd.prefetch(out[columns.start..].as_ptr());
            simd.prefetch(out[columns.end - 1..].as_ptr());
        }
        if !part.fresh {
            for (sums, row) in sums.iter_mut().zip(part.rows.clone()) {
                let out = &self.out.row(row)[columns.clone()];
                match out.first_chunk() {
                    Some(whole) => *sums = *whole,
                    None => sums[..out.len()].copy_from_slice(out),
                }
            }
        }
        F::multiply::<S, STREAM>(simd, self.x, &part, piece, ahead, sums);
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
            Then::Store | Then::Continue => (None, false),
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

impl Ahead {
    /// Asks for the next line.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S, asked: &mut usize) {
        simd.prefetch_l2(self.address);
        self.address = self.address.wrapping_add(LINE);
        *asked += 1;
        if *asked == self.lines {
            (*asked, self.address) = (0, self.address.wrapping_add(self.gap));
        }
    }
}
