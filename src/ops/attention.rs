//! Causal attention over a cache of blocks.
//!
//! A block holds [`BLOCK`] positions of one head: keys as (HS, 16), so that a lane is a position, then values as
//! (16, HS padded to whole registers), so that a lane is a channel. Queries go over the cache in runs of [`RUN`]
//! positions counted from position 0: each run gives (max, sum, weighted values), merged in ascending order as in
//! FlashAttention (Dao et al., arXiv:2205.14135). One query or many, whichever thread: the same operations.

// Tiles of registers are arrays indexed by constants: iterators over them hide that from whoever reads, and from LLVM.
#![allow(clippy::needless_range_loop)]

use super::Rows;
use super::softmax::exp_lanes;
use crate::pool::Columns;
use crate::simd::{Element, Kernel, LANES, Simd, store_partial};
use std::ops::Range;

/// Positions of a block.
pub const BLOCK: usize = LANES;
/// Positions whose weights are summed before they are merged with those before.
pub const RUN: usize = 64;

/// Queries of a head that share a pass over a run's keys and values.
const TILE: usize = 6;
/// Queries whose state stays in the first-level cache beside a run.
const QUERIES: usize = 8 * TILE;

/// Elements of a block of one head of size `hs`.
pub fn block_len(hs: usize) -> usize {
    hs * BLOCK + BLOCK * hs.next_multiple_of(LANES)
}

/// Writes the key and the value (HS each) of position `slot` of a block.
pub fn append<T: Element>(block: &mut [T], slot: usize, key: &[f32], value: &[f32]) {
    let (keys, values) = block.split_at_mut(key.len() * BLOCK);
    for (row, &key) in keys.chunks_exact_mut(BLOCK).zip(key) {
        row[slot] = T::from_f32(key);
    }
    let row = value.len().next_multiple_of(LANES);
    for (out, &value) in values[slot * row..].iter_mut().zip(value) {
        *out = T::from_f32(value);
    }
}

/// `out = softmax(scale q k^T, causal) v` for queries of one head of one sequence.
pub struct Attention<'a, T> {
    /// (rows, HS): the queries, at consecutive positions.
    pub q: Rows<'a>,
    /// How many queries.
    pub rows: usize,
    /// The first one's position.
    pub position: usize,
    /// The head's blocks from position 0 on, the queries' own positions included.
    pub blocks: &'a [&'a [T]],
    /// Multiplies the scores.
    pub scale: f32,
    /// (rows, HS).
    pub out: Columns<'a>,
    /// Room for sums; grows to what is needed.
    pub scratch: &'a mut Vec<f32>,
}

/// What the runs so far have given a query; its weighted values are in the scratch.
#[derive(Clone, Copy)]
struct Merged {
    max: f32,
    sum: f32,
}

impl<T: Element> Kernel for Attention<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let hs = self.q.columns();
        let width = hs.next_multiple_of(LANES);
        let mut values = std::mem::take(self.scratch);
        values.resize((QUERIES + TILE) * width, 0.0);
        let (sums, room) = values.split_at_mut(QUERIES * width);
        for first in (0..self.rows).step_by(QUERIES) {
            let count = QUERIES.min(self.rows - first);
            let mut merged = [Merged { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
            sums.fill(0.0);
            let position = self.position + first;
            for run in 0..=(position + count - 1) / RUN {
                // Queries before the run see none of it.
                let mut row = (run * RUN).saturating_sub(position);
                while row < count {
                    let visible = position + row + 1 - run * RUN;
                    let taken = if row + TILE <= count { TILE } else { 1 };
                    let state =
                        (&mut merged[row..row + taken], &mut sums[row * width..(row + taken) * width]);
                    if taken == TILE {
                        self.tile::<S, TILE, false>(simd, first + row, run, visible, state, room);
                    } else if self.rows == 1 {
                        self.tile::<S, 1, true>(simd, first + row, run, visible, state, room);
                    } else {
                        self.tile::<S, 1, false>(simd, first + row, run, visible, state, room);
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
        *self.scratch = values;
    }
}

impl<T: Element> Attention<'_, T> {
    /// `N` queries from `row` on, of which the first sees `visible` positions from the run's start, the next one more,
    /// against that run; merged into their state. A query alone (`STREAM`) asks for the next run ahead.
    #[inline(always)]
    fn tile<S: Simd, const N: usize, const STREAM: bool>(
        &self,
        simd: S,
        row: usize,
        run: usize,
        visible: usize,
        (merged, sums): (&mut [Merged], &mut [f32]),
        room: &mut [f32],
    ) {
        let blocks = &self.blocks[run * RUN / BLOCK..self.blocks.len().min((run + 1) * RUN / BLOCK)];
        // After a head's last run comes the next head's first, which lies behind this head's in the same blocks.
        let mut ahead = [std::ptr::null(); RUN / BLOCK];
        for (b, ahead) in ahead.iter_mut().enumerate() {
            let behind = self.blocks.get(b).map(|block| block.as_ptr_range().end);
            let next = self.blocks.get((run + 1) * RUN / BLOCK + b).map(|block| block.as_ptr());
            *ahead = next.or(behind).unwrap_or(std::ptr::null());
        }
        let mut weights = [[0.0; RUN]; N];
        if S::WIDE {
            self.scores::<S, N, 0, 4, STREAM>(simd, row, blocks, &ahead, &mut weights);
        } else {
            self.scores::<S, N, 0, 1, STREAM>(simd, row, blocks, &ahead, &mut weights);
            self.scores::<S, N, 1, 1, STREAM>(simd, row, blocks, &ahead, &mut weights);
            self.scores::<S, N, 2, 1, STREAM>(simd, row, blocks, &ahead, &mut weights);
            self.scores::<S, N, 3, 1, STREAM>(simd, row, blocks, &ahead, &mut weights);
        }
        let mut run_max = [0.0; N];
        let mut run_sum = [0.0; N];
        for (r, weights) in weights.iter_mut().enumerate() {
            weights[RUN.min(visible + r)..].fill(f32::NEG_INFINITY);
            (run_max[r], run_sum[r]) = softmax_run(simd, weights);
        }

        let width = sums.len() / N;
        let all_see = visible.min(RUN);
        self.values::<S, N, STREAM>(simd, blocks, &weights, 0..all_see, &ahead, room);
        // What only the later queries see; a position that a query does not see may not even be multiplied by zero.
        for r in 1..N {
            let more = all_see..RUN.min(visible + r);
            let room = &mut room[r * width..(r + 1) * width];
            self.values::<S, 1, false>(simd, blocks, &[weights[r]], more, &ahead, room);
        }

        // Both factors of all rows by one exponential: that of the old sums in lane r, of the run's in lane r + 8.
        let mut factors = [0.0; LANES];
        for r in 0..N {
            let max = if merged[r].max > run_max[r] { merged[r].max } else { run_max[r] };
            factors[r] = merged[r].max - max;
            factors[r + 8] = run_max[r] - max;
            merged[r].max = max;
        }
        simd.store(exp_lanes(simd, simd.load(&factors)), &mut factors);
        for r in 0..N {
            let (old, new) = (factors[r], factors[r + 8]);
            merged[r].sum = merged[r].sum.mul_add(old, run_sum[r] * new);
            let sums = sums[r * width..(r + 1) * width].as_chunks_mut().0;
            for (sum, value) in sums.iter_mut().zip(room[r * width..].as_chunks().0) {
                let value = simd.mul(simd.load(value), simd.splat(new));
                simd.store(simd.fma(simd.load(sum), simd.splat(old), value), sum);
            }
        }
    }

    /// Scaled scores of `N` queries against the `NB` blocks of the run from `B0` on: chains over the channels ascending.
    #[inline(always)]
    fn scores<S: Simd, const N: usize, const B0: usize, const NB: usize, const STREAM: bool>(
        &self,
        simd: S,
        row: usize,
        blocks: &[&[T]],
        ahead: &[*const T; RUN / BLOCK],
        weights: &mut [[f32; RUN]; N],
    ) {
        let hs = self.q.columns();
        // A block that does not exist yet stands for positions that no query sees: any keys will do.
        let mut k = [&[][..]; NB];
        for b in 0..NB {
            k[b] = &blocks.get(B0 + b).unwrap_or(&blocks[0])[..hs * BLOCK].as_chunks::<BLOCK>().0[..hs];
        }
        let mut q = [&[][..]; N];
        for r in 0..N {
            q[r] = &self.q.row(row + r)[..hs];
        }
        let mut acc = [[simd.splat(0.0); NB]; N];
        for d in 0..hs {
            let mut lanes = [simd.splat(0.0); NB];
            for b in 0..NB {
                lanes[b] = T::load(simd, &k[b][d]);
                if STREAM {
                    simd.prefetch_l2(ahead[B0 + b].wrapping_add(d * BLOCK));
                }
            }
            for r in 0..N {
                let value = simd.splat(q[r][d]);
                for b in 0..NB {
                    acc[r][b] = simd.fma(value, lanes[b], acc[r][b]);
                }
            }
        }
        for r in 0..N {
            let (weights, _) = weights[r].as_chunks_mut::<LANES>();
            for b in 0..NB {
                simd.store(simd.mul(acc[r][b], simd.splat(self.scale)), &mut weights[B0 + b]);
            }
        }
    }

    /// `N` weighted sums of the values at `positions` of the run, in `room`; continued there unless they begin at 0.
    #[inline(always)]
    fn values<S: Simd, const N: usize, const STREAM: bool>(
        &self,
        simd: S,
        blocks: &[&[T]],
        weights: &[[f32; RUN]; N],
        positions: Range<usize>,
        ahead: &[*const T; RUN / BLOCK],
        room: &mut [f32],
    ) {
        let width = self.q.columns().next_multiple_of(LANES);
        let mut channel = 0;
        while channel < width && !positions.is_empty() {
            let positions = positions.clone();
            if S::WIDE && channel + 4 * LANES <= width {
                self.channels::<S, N, 4, STREAM>(simd, blocks, weights, positions, channel, ahead, room);
                channel += 4 * LANES;
            } else {
                self.channels::<S, N, 1, STREAM>(simd, blocks, weights, positions, channel, ahead, room);
                channel += LANES;
            }
        }
    }

    /// The same for `NV` registers of channels: chains over the positions ascending.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn channels<S: Simd, const N: usize, const NV: usize, const STREAM: bool>(
        &self,
        simd: S,
        blocks: &[&[T]],
        weights: &[[f32; RUN]; N],
        positions: Range<usize>,
        channel: usize,
        ahead: &[*const T; RUN / BLOCK],
        room: &mut [f32],
    ) {
        let hs = self.q.columns();
        let width = hs.next_multiple_of(LANES);
        let mut acc = [[simd.splat(0.0); NV]; N];
        if positions.start > 0 {
            for r in 0..N {
                let (room, _) = room[r * width + channel..][..NV * LANES].as_chunks::<LANES>();
                for j in 0..NV {
                    acc[r][j] = simd.load(&room[j]);
                }
            }
        }
        for b in positions.start / BLOCK..positions.end.div_ceil(BLOCK) {
            let slots =
                positions.start.max(b * BLOCK) - b * BLOCK..positions.end.min((b + 1) * BLOCK) - b * BLOCK;
            let values = &blocks[b][hs * BLOCK..][..width * BLOCK];
            for slot in slots {
                let (row, _) = values[slot * width + channel..][..NV * LANES].as_chunks::<LANES>();
                let mut lanes = [simd.splat(0.0); NV];
                for j in 0..NV {
                    lanes[j] = T::load(simd, &row[j]);
                    if STREAM {
                        simd.prefetch_l2(
                            ahead[b].wrapping_add(hs * BLOCK + slot * width + channel + j * LANES),
                        );
                    }
                }
                for r in 0..N {
                    let weight = simd.splat(weights[r][b * BLOCK + slot]);
                    for j in 0..NV {
                        acc[r][j] = simd.fma(weight, lanes[j], acc[r][j]);
                    }
                }
            }
        }
        for r in 0..N {
            let (room, _) = room[r * width + channel..][..NV * LANES].as_chunks_mut::<LANES>();
            for j in 0..NV {
                simd.store(acc[r][j], &mut room[j]);
            }
        }
    }
}

/// Turns a run's scores into `exp(score - max)`, and gives the maximum and the sum.
#[inline(always)]
fn softmax_run<S: Simd>(simd: S, weights: &mut [f32; RUN]) -> (f32, f32) {
    let (lanes, _) = weights.as_chunks_mut::<LANES>();
    let mut max = simd.load(&lanes[0]);
    for lanes in &lanes[1..] {
        max = simd.max(max, simd.load(lanes));
    }
    let max = simd.reduce_max(max);
    let mut sum = simd.splat(0.0);
    for lanes in lanes {
        let weight = exp_lanes(simd, simd.sub(simd.load(lanes), simd.splat(max)));
        simd.store(weight, lanes);
        sum = simd.add(sum, weight);
    }
    (max, simd.reduce_add(sum))
}
