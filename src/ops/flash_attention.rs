//! Causal attention of whole sequences, and its gradients, blockwise: no (T, T) matrix is held.
//!
//! FlashAttention: Dao et al., arXiv:2205.14135, and Dao, arXiv:2307.08691. Queries and keys are taken in blocks of
//! [`BLOCK`]. The forward pass keeps the logarithm of each row's sum of exponentials, from which the backward pass makes
//! a block's weights again. Sums over keys or queries are chains in ascending order; one thread computes a head.

mod weights;

use super::Rows;
use super::dropout::{GROUP, Mask};
use super::gemm::{self, Operand, Packed, Precision, packed_lines};
use crate::mapped::Line;
use crate::pool::Columns;
use crate::simd::Isa;
use bytemuck::Zeroable;
use std::ops::Range;
use weights::{DotRows, Finish, Weigh, WeighBackward};

/// Queries, and keys, of a block: a group of dropout's factors.
pub const BLOCK: usize = GROUP;
/// Distance between the rows of a block of weights.
const STRIDE: usize = BLOCK + 16;

/// One head of one sequence.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// (T, HS).
    pub q: Rows<'a>,
    /// (T, HS).
    pub k: Rows<'a>,
    /// (T, HS).
    pub v: Rows<'a>,
    /// How many tokens.
    pub tokens: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Which weights are dropped, if any.
    pub mask: Option<Mask>,
    /// The head's number among all of the batch, by which its weights' indices differ from the others'.
    pub index: usize,
}

/// Room of one thread.
pub struct Scratch {
    /// Packed blocks of keys and values, in up to three ways, for all blocks of a sequence.
    keys: [Vec<Line>; 3],
    /// Packed blocks of queries and output gradients.
    queries: [Vec<Line>; 2],
    /// (BLOCK, BLOCK), `STRIDE` apart: scores, and their gradients.
    scores: [Vec<f32>; 2],
    /// (BLOCK,): a row's maximum or the dot product of output and gradient; a row's sum.
    of_rows: [Vec<f32>; 2],
}

impl Scratch {
    /// Room for sequences of `tokens` and heads of `hs` channels.
    pub fn new(tokens: usize, hs: usize) -> Scratch {
        let lines = |n: usize| vec![Line::zeroed(); n];
        let keys = tokens.div_ceil(BLOCK) * block_lines(hs);
        Scratch {
            keys: [lines(keys), lines(keys), lines(keys)],
            queries: [lines(block_lines(hs)), lines(block_lines(hs))],
            scores: [vec![0.0; BLOCK * STRIDE], vec![0.0; BLOCK * STRIDE]],
            of_rows: [vec![0.0; BLOCK], vec![0.0; BLOCK]],
        }
    }

    /// Bytes that it takes.
    pub fn bytes(tokens: usize, hs: usize) -> usize {
        let blocks = 3 * tokens.div_ceil(BLOCK) + 2;
        blocks * block_lines(hs) * size_of::<Line>() + 2 * BLOCK * (STRIDE + 1) * size_of::<f32>()
    }
}

/// Lines of a packed block of keys or queries, either way around.
fn block_lines(hs: usize) -> usize {
    packed_lines(hs, BLOCK).max(packed_lines(BLOCK, hs))
}

/// The blocks of `tokens`.
fn blocks(tokens: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    (0..tokens.div_ceil(BLOCK)).map(move |i| (i, i * BLOCK..tokens.min((i + 1) * BLOCK)))
}

/// How products are computed.
#[derive(Clone, Copy)]
struct Products {
    isa: Isa,
    precision: Precision,
}

impl Products {
    /// Every block of the rows of `x`, packed: as they are, or transposed.
    fn pack_blocks<'s>(
        self,
        x: Rows<'_>,
        tokens: usize,
        transposed: bool,
        room: &'s mut [Line],
    ) -> Vec<Packed<'s>> {
        let rooms = room.chunks_mut(block_lines(x.columns()));
        let pack =
            |((_, rows), room): ((usize, Range<usize>), &'s mut [Line])| self.pack(x, rows, transposed, room);
        blocks(tokens).zip(rooms).map(pack).collect()
    }

    fn pack<'s>(self, x: Rows<'_>, rows: Range<usize>, transposed: bool, room: &'s mut [Line]) -> Packed<'s> {
        let Products { isa, precision } = self;
        let (part, hs) = (x.rows_from(rows.start), x.columns());
        if transposed {
            Packed::new(isa, precision, Operand::transposed(part), (hs, rows.len()), room)
        } else {
            Packed::new(isa, precision, Operand::of(part), (rows.len(), hs), room)
        }
    }
}

/// All columns of a block of weights.
fn square(data: &mut [f32], rows: usize, columns: usize) -> Columns<'_> {
    Columns::split(data, STRIDE, rows, [0..columns]).pop().expect("one range")
}

impl Head<'_> {
    /// The index of the first of a row's factors for a block of keys.
    fn first_weight(&self, row: usize, key_block: usize) -> u64 {
        let padded = self.tokens.next_multiple_of(BLOCK) as u64;
        (self.index as u64 * padded + row as u64) * padded + (key_block * BLOCK) as u64
    }

    /// `out = dropout(softmax(scale q k^T, causal)) v`, and `lse`, the logarithms of the softmax's sums, (T,).
    pub fn forward(
        &self,
        isa: Isa,
        precision: Precision,
        mut out: Columns<'_>,
        lse: &mut [f32],
        scratch: &mut Scratch,
        left: &mut gemm::Left,
    ) {
        let products = Products { isa, precision };
        let hs = self.q.columns();
        let Scratch { keys: [keys, values, _], scores: [scores, _], of_rows: [max, sum], .. } = scratch;
        let keys = products.pack_blocks(self.k, self.tokens, true, keys);
        let values = products.pack_blocks(self.v, self.tokens, false, values);
        for (_, rows) in blocks(self.tokens) {
            let q = Operand::of(self.q.rows_from(rows.start));
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            for (j, columns) in blocks(rows.end) {
                keys[j].multiply(isa, q, false, square(scores, rows.len(), columns.len()), left);
                isa.run(Weigh {
                    head: self,
                    rows: rows.clone(),
                    key_block: j,
                    scores,
                    max,
                    sum,
                    out: out.part(rows.clone(), 0..hs),
                });
                let weights = Operand::of(Rows::new(scores, STRIDE, columns.len()));
                values[j].multiply(isa, weights, j > 0, out.part(rows.clone(), 0..hs), left);
            }
            let lse = &mut lse[rows.clone()];
            isa.run(Finish { max, sum, lse, out: out.part(rows, 0..hs) });
        }
    }

    /// The gradients of queries, keys and values, written, from that of the output, `dout`: both outputs are (T, HS).
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        isa: Isa,
        precision: Precision,
        (out, lse, dout): (Rows<'_>, &[f32], Rows<'_>),
        [mut dq, mut dk, mut dv]: [Columns<'_>; 3],
        scratch: &mut Scratch,
        left: &mut gemm::Left,
    ) {
        let products = Products { isa, precision };
        let hs = self.q.columns();
        let Scratch {
            keys: [keys, keys_t, values_t],
            queries: [queries, douts],
            scores: [scores, dscores],
            of_rows: [dots, _],
        } = scratch;
        let keys = products.pack_blocks(self.k, self.tokens, false, keys);
        let keys_t = products.pack_blocks(self.k, self.tokens, true, keys_t);
        let values_t = products.pack_blocks(self.v, self.tokens, true, values_t);
        for (i, rows) in blocks(self.tokens) {
            let (q, dout) = (self.q.rows_from(rows.start), dout.rows_from(rows.start));
            let packed_q = products.pack(q, 0..rows.len(), false, queries);
            let packed_dout = products.pack(dout, 0..rows.len(), false, douts);
            isa.run(DotRows { a: out.rows_from(rows.start), b: dout, out: &mut dots[..rows.len()] });
            for (j, columns) in blocks(rows.end) {
                let (m, n) = (rows.len(), columns.len());
                keys_t[j].multiply(isa, Operand::of(q), false, square(scores, m, n), left);
                values_t[j].multiply(isa, Operand::of(dout), false, square(dscores, m, n), left);
                let lse = &lse[rows.clone()];
                isa.run(WeighBackward {
                    head: self,
                    rows: rows.clone(),
                    key_block: j,
                    scores,
                    dscores,
                    lse,
                    dots,
                });
                let (weights, dscores) = (Rows::new(scores, STRIDE, n), Rows::new(dscores, STRIDE, n));
                // The first query that sees a block of keys is in the block of the same number.
                let dv = dv.part(columns.clone(), 0..hs);
                packed_dout.multiply(isa, Operand::transposed(weights), i > j, dv, left);
                let dk = dk.part(columns, 0..hs);
                packed_q.multiply(isa, Operand::transposed(dscores), i > j, dk, left);
                keys[j].multiply(isa, Operand::of(dscores), j > 0, dq.part(rows.clone(), 0..hs), left);
            }
        }
    }
}
