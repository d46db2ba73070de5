//! Causal attention over a cache of blocks.
//!
//! A block holds [`BLOCK`] positions of one head in steps of [`super::pairs`]: keys two channels at a time, a lane being a
//! position; then values two positions at a time, a lane being a channel; then, for int8, a scale for each position's key
//! and value. Queries go over the cache in runs of [`RUN`] positions counted from position 0: each run gives (max, sum,
//! weighted values), merged in ascending order as in FlashAttention (Dao et al., arXiv:2205.14135). One query or many,
//! whichever thread: the same operations.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

mod cache;
mod softmax;

use super::Rows;
use super::softmax::exp_lanes;
use crate::pool::Columns;
use crate::simd::{Kernel, LANES, Simd, store_partial};
use cache::Layout;
use softmax::Weights;
use std::marker::PhantomData;
use std::ops::Range;

pub use cache::{Append, Cached, block_bytes};

/// Positions of a block.
pub const BLOCK: usize = LANES;
/// Positions whose weights are summed before they are merged with those before.
pub const RUN: usize = 64;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Queries of a head that share a pass over a run's keys and values.
const TILE: usize = 6;
/// Queries whose state stays in the first-level cache beside a run.
const QUERIES: usize = 8 * TILE;

/// `out = softmax(scale q k^T, causal) v` for queries of one head of one sequence.
pub struct Attention<'a, P> {
    /// (rows, HS): the queries, at consecutive positions.
    pub q: Rows<'a>,
    /// How many queries.
    pub rows: usize,
    /// The first one's position.
    pub position: usize,
    /// The head's blocks from position 0 on, the queries' own positions included.
    pub blocks: &'a [&'a [u8]],
    /// How they hold keys and values.
    pub cached: PhantomData<P>,
    /// Multiplies the scores.
    pub scale: f32,
    /// (rows, HS).
    pub out: Columns<'a>,
    /// Room for sums and inputs; grows to what is needed.
    pub scratch: &'a mut Scratch,
}

/// What attention needs beside its arguments.
#[derive(Default)]
pub struct Scratch {
    floats: Vec<f32>,
    /// Queries as inputs, of any type.
    queries: Vec<u64>,
}

/// What the runs so far have given a query; its weighted values are in the scratch.
#[derive(Clone, Copy)]
struct Merged {
    max: f32,
    sum: f32,
}

/// A pass's queries in the type that the cache is multiplied with.
#[derive(Clone, Copy)]
struct Queries<'a, X> {
    /// (rows, HS / 2 rounded up).
    inputs: &'a [X],
    /// (rows,).
    scales: &'a [f32; QUERIES],
}

impl<P: Cached> Kernel for Attention<'_, P> {
    type Output = ();
    const DOTS: bool = P::DOTS;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let hs = self.q.columns();
        let width = hs.next_multiple_of(LANES);
        let pairs = hs.div_ceil(2);
        let Scratch { mut floats, mut queries } = std::mem::take(self.scratch);
        floats.resize((QUERIES + TILE) * width, 0.0);
        queries.resize((QUERIES * pairs * size_of::<P::X>()).div_ceil(size_of::<u64>()), 0);
        let (sums, room) = floats.split_at_mut(QUERIES * width);
        for first in (0..self.rows).step_by(QUERIES) {
            let count = QUERIES.min(self.rows - first);
            let inputs: &mut [P::X] = bytemuck::cast_slice_mut(&mut queries);
            let mut scales = [0.0; QUERIES];
            for row in 0..count {
                scales[row] =
                    P::inputs(simd, self.q.row(first + row), &mut inputs[row * pairs..(row + 1) * pairs]);
            }
            let mut merged = [Merged { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
            sums[..count * width].fill(0.0);
            let position = self.position + first;
            for run in 0..=(position + count - 1) / RUN {
                // Queries before the run see none of it.
                let mut row = (run * RUN).saturating_sub(position);
                while row < count {
                    let visible = position + row + 1 - run * RUN;
                    let taken = if row + TILE <= count { TILE } else { 1 };
                    let state =
                        (&mut merged[row..row + taken], &mut sums[row * width..(row + taken) * width]);
                    let queries = Queries { inputs: &*inputs, scales: &scales };
                    if taken == TILE {
                        self.tile::<S, TILE, false>(simd, queries, row, run, visible, state, room);
                    } else if self.rows == 1 {
                        self.tile::<S, 1, true>(simd, queries, row, run, visible, state, room);
                    } else {
                        self.tile::<S, 1, false>(simd, queries, row, run, visible, state, room);
                    }
                    row += taken;
                }
            }
            for (row, merged) in merged[..count].iter().enumerate() {
                let total = simd.splat(merged.sum);
                let out = self.out.row(first + row);
                for (out, sum) in out.chunks_mut(LANES).zip(sums[row * width..].as_chunks().0) {
                    store_partial(simd, simd.div(simd.load(sum), total), out);
                }
            }
        }
        *self.scratch = Scratch { floats, queries };
    }
}

impl<P: Cached> Attention<'_, P> {
    /// `N` queries from `row` on, of which the first sees `visible` positions from the run's start, the next one more,
    /// against that run; merged into their state. A query alone (`STREAM`) asks for the next run ahead.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn tile<S: Simd, const N: usize, const STREAM: bool>(
        &self,
        simd: S,
        queries: Queries<'_, P::X>,
        row: usize,
        run: usize,
        visible: usize,
        (merged, sums): (&mut [Merged], &mut [f32]),
        room: &mut [f32],
    ) {
        let layout = Layout::of::<P>(self.q.columns());
        let blocks = &self.blocks[run * RUN / BLOCK..self.blocks.len().min((run + 1) * RUN / BLOCK)];
        // After a head's last run comes the next head's first, which lies behind this head's in the same blocks.
        let mut ahead = [std::ptr::null(); RUN / BLOCK];
        for (b, ahead) in ahead.iter_mut().enumerate() {
            let behind = self.blocks.get(b).map(|block| block.as_ptr_range().end);
            let next = self.blocks.get((run + 1) * RUN / BLOCK + b).map(|block| block.as_ptr());
            *ahead = next.or(behind).unwrap_or(std::ptr::null());
        }
        let mut scores = [[0.0; RUN]; N];
        if S::WIDE {
            self.scores::<S, N, 0, 4, STREAM>(simd, queries, row, blocks, &ahead, &mut scores);
        } else {
            self.scores::<S, N, 0, 1, STREAM>(simd, queries, row, blocks, &ahead, &mut scores);
            self.scores::<S, N, 1, 1, STREAM>(simd, queries, row, blocks, &ahead, &mut scores);
            self.scores::<S, N, 2, 1, STREAM>(simd, queries, row, blocks, &ahead, &mut scores);
            self.scores::<S, N, 3, 1, STREAM>(simd, queries, row, blocks, &ahead, &mut scores);
        }
        let of_run = Weights::<P::X, N>::of::<S, P>(simd, &mut scores, visible, blocks, layout);
        let width = sums.len() / N;
        // Whole steps: a chain must not depend on where another query's ends.
        let all_see = visible.min(RUN) / 2 * 2;
        self.values::<S, N, STREAM>(simd, blocks, &of_run.inputs, 0..all_see, &ahead, room);
        // What only the later queries see; a position that a query does not see may not even be multiplied by zero.
        for r in 0..N {
            let more = all_see..RUN.min(visible + r);
            if !more.is_empty() {
                let room = &mut room[r * width..(r + 1) * width];
                self.values::<S, 1, false>(simd, blocks, &[of_run.inputs[r]], more, &ahead, room);
            }
        }

        // Both factors of all rows by one exponential: that of the old sums in lane r, of the run's in lane r + 8.
        let mut factors = [0.0; LANES];
        for r in 0..N {
            let max = if merged[r].max > of_run.max[r] { merged[r].max } else { of_run.max[r] };
            factors[r] = merged[r].max - max;
            factors[r + 8] = of_run.max[r] - max;
            merged[r].max = max;
        }
        simd.store(exp_lanes(simd, simd.load(&factors)), &mut factors);
        for r in 0..N {
            let (old, new) = (factors[r], factors[r + 8]);
            merged[r].sum = merged[r].sum.mul_add(old, of_run.sum[r] * new);
            let new = new * of_run.scales[r];
            let sums = sums[r * width..(r + 1) * width].as_chunks_mut().0;
            for (sum, value) in sums.iter_mut().zip(room[r * width..].as_chunks().0) {
                let value = simd.mul(P::finish(simd, P::resume(simd, value)), simd.splat(new));
                simd.store(simd.fma(simd.load(sum), simd.splat(old), value), sum);
            }
        }
    }

    /// Scaled scores of `N` queries against the `NB` blocks of the run from `B0` on: chains over the channels ascending.
    #[inline(always)]
    fn scores<S: Simd, const N: usize, const B0: usize, const NB: usize, const STREAM: bool>(
        &self,
        simd: S,
        queries: Queries<'_, P::X>,
        row: usize,
        blocks: &[&[u8]],
        ahead: &[*const u8; RUN / BLOCK],
        weights: &mut [[f32; RUN]; N],
    ) {
        let hs = self.q.columns();
        let layout = Layout::of::<P>(hs);
        let pairs = hs.div_ceil(2);
        // A block that does not exist yet stands for positions that no query sees: any keys will do.
        let mut block = [&[][..]; NB];
        let mut k: [&[P::Step]; NB] = [&[][..]; NB];
        for b in 0..NB {
            block[b] = blocks.get(B0 + b).unwrap_or(&blocks[0]);
            k[b] = bytemuck::cast_slice(&block[b][..pairs * size_of::<P::Step>()]);
        }
        let mut q = [&[][..]; N];
        for r in 0..N {
            q[r] = &queries.inputs[(row + r) * pairs..(row + r + 1) * pairs];
        }
        let mut acc = [[P::zero(simd); NB]; N];
        for d in 0..pairs {
            if STREAM {
                for b in 0..NB {
                    ask::<S, P::Step>(simd, ahead[B0 + b], d);
                }
            }
            for turn in 0..P::TURNS {
                let mut lanes = [P::zero(simd); NB];
                for b in 0..NB {
                    lanes[b] = P::lanes(simd, &k[b][d], turn);
                }
                for r in 0..N {
                    for b in 0..NB {
                        acc[r][b] = P::add(simd, acc[r][b], lanes[b], q[r][d], turn);
                    }
                }
            }
        }
        for r in 0..N {
            let scale = simd.splat(self.scale * queries.scales[row + r]);
            let (weights, _) = weights[r].as_chunks_mut::<LANES>();
            for b in 0..NB {
                let mut score = simd.mul(P::finish(simd, acc[r][b]), scale);
                if P::SCALED {
                    let scales: &[[f32; BLOCK]] = bytemuck::cast_slice(&block[b][layout.scales..]);
                    score = simd.mul(score, simd.load(&scales[0]));
                }
                simd.store(score, &mut weights[B0 + b]);
            }
        }
    }

    /// `N` weighted sums of the values at `positions` of the run, in `room`; continued there unless they begin at 0.
    #[inline(always)]
    fn values<S: Simd, const N: usize, const STREAM: bool>(
        &self,
        simd: S,
        blocks: &[&[u8]],
        inputs: &[[P::X; RUN / 2]; N],
        positions: Range<usize>,
        ahead: &[*const u8; RUN / BLOCK],
        room: &mut [f32],
    ) {
        let registers = self.q.columns().div_ceil(LANES);
        let mut register = 0;
        while register < registers {
            let positions = positions.clone();
            if S::WIDE && register + 4 <= registers {
                self.channels::<S, N, 4, STREAM>(simd, blocks, inputs, positions, register, ahead, room);
                register += 4;
            } else {
                self.channels::<S, N, 1, STREAM>(simd, blocks, inputs, positions, register, ahead, room);
                register += 1;
            }
        }
    }

    /// The same for `NV` registers of channels from `register` on: chains over the positions ascending.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn channels<S: Simd, const N: usize, const NV: usize, const STREAM: bool>(
        &self,
        simd: S,
        blocks: &[&[u8]],
        inputs: &[[P::X; RUN / 2]; N],
        positions: Range<usize>,
        register: usize,
        ahead: &[*const u8; RUN / BLOCK],
        room: &mut [f32],
    ) {
        let hs = self.q.columns();
        let layout = Layout::of::<P>(hs);
        let registers = hs.div_ceil(LANES);
        let mut acc = [[P::zero(simd); NV]; N];
        if positions.start > 0 {
            for r in 0..N {
                let (room, _) = room[(r * registers + register) * LANES..].as_chunks::<LANES>();
                for j in 0..NV {
                    acc[r][j] = P::resume(simd, &room[j]);
                }
            }
        }
        for b in positions.start / BLOCK..positions.end.div_ceil(BLOCK) {
            let first = (positions.start.max(b * BLOCK) - b * BLOCK) / 2;
            let end = positions.end.min((b + 1) * BLOCK) - b * BLOCK;
            let values: &[P::Step] = bytemuck::cast_slice(&blocks[b][layout.values..layout.scales]);
            for pair in first..end / 2 {
                let steps = &values[pair * registers + register..][..NV];
                if STREAM {
                    for j in 0..NV {
                        ask::<S, P::Step>(
                            simd,
                            ahead[b].wrapping_add(layout.values),
                            pair * registers + register + j,
                        );
                    }
                }
                for turn in 0..P::TURNS {
                    let mut lanes = [P::zero(simd); NV];
                    for j in 0..NV {
                        lanes[j] = P::lanes(simd, &steps[j], turn);
                    }
                    for r in 0..N {
                        let x = inputs[r][b * (BLOCK / 2) + pair];
                        for j in 0..NV {
                            acc[r][j] = P::add(simd, acc[r][j], lanes[j], x, turn);
                        }
                    }
                }
            }
            if end % 2 == 1 {
                let steps = &values[end / 2 * registers + register..][..NV];
                for r in 0..N {
                    let x = inputs[r][b * (BLOCK / 2) + end / 2];
                    for j in 0..NV {
                        acc[r][j] = P::add(simd, acc[r][j], P::first(simd, &steps[j]), x, 0);
                    }
                }
            }
        }
        for r in 0..N {
            let (room, _) = room[(r * registers + register) * LANES..].as_chunks_mut::<LANES>();
            for j in 0..NV {
                P::save(simd, acc[r][j], &mut room[j]);
            }
        }
    }
}

/// Asks for the cache lines that begin in step `index` from `address` on, where one begins, too.
#[inline(always)]
fn ask<S: Simd, T>(simd: S, address: *const u8, index: usize) {
    let offset = index * size_of::<T>();
    for line in 0..size_of::<T>() / LINE {
        simd.prefetch_l2(address.wrapping_add(offset + line * LINE));
    }
    if size_of::<T>() < LINE && index.is_multiple_of(LINE / size_of::<T>()) {
        simd.prefetch_l2(address.wrapping_add(offset));
    }
}
