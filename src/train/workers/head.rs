//! The LM head: logits, losses and their gradients, for some tokens after the others.

use super::parts::{cut, panels, times, vocabulary};
use super::{Scratch, Workers};
use crate::ops::cross_entropy::{self, BLOCK, BlockSums, LogitsBackward, MergeBlocks};
use crate::ops::gemm::{Gemm, Operand};
use crate::ops::{Rows, padded_stride};
use crate::pool::{Columns, share};
use crate::simd::in_default_mode;
use crate::train::memory::{Buffer, Head};
use std::ops::Range;

/// What the head does beside the losses.
pub struct HeadBackward<'a, 'b> {
    /// (V, C), added to.
    pub dwte: &'a mut [f32],
    /// (rows, C), written.
    pub dh: &'a mut Buffer<'b>,
    /// What the gradients are multiplied by.
    pub scale: f32,
}

impl Workers {
    /// The sum of the tokens' losses, given the final LayerNorm's output `h` and the head's embedding; and gradients.
    ///
    /// Logits are made and used for some tokens after the others, never for all at once.
    pub fn head(
        &mut self,
        h: &Buffer<'_>,
        wte: &[f32],
        targets: &[u32],
        room: &mut Head<'_>,
        mut backward: Option<HeadBackward<'_, '_>>,
    ) -> f64 {
        let mut sum = 0.0;
        for first in (0..targets.len()).step_by(room.tokens) {
            let rows = first..targets.len().min(first + room.tokens);
            let (h, targets) = (h.view().rows_from(first), &targets[rows.clone()]);
            sum = self.losses(h, wte, targets, room, sum);
            if let Some(HeadBackward { dwte, dh, scale }) = &mut backward {
                self.head_backward(h, (wte, dwte), targets, room, dh, rows, *scale);
            }
        }
        sum
    }

    /// Computes logits, leaves each token's maximum and sum of exponentials in the first rows, and adds the losses to
    /// `before`, one after the other.
    fn losses(&mut self, h: Rows<'_>, wte: &[f32], targets: &[u32], room: &mut Head<'_>, before: f64) -> f64 {
        let (c, tokens, threads) = (h.columns(), targets.len(), self.pool.n_threads());
        let (stride, v) = (padded_stride(tokens), wte.len() / c);
        let vocabulary: Vec<_> = vocabulary(v, threads).collect();
        let logits = cut(room.logits, times(vocabulary.iter().cloned(), stride));
        let blocks = || (0..threads).map(|i| share(v.div_ceil(BLOCK), threads, i));
        let maxima = cut(room.maxima, times(blocks(), stride));
        let sums = maxima.into_iter().zip(cut(room.sums, times(blocks(), stride)));
        let parts = vocabulary.iter().zip(logits).zip(sums).zip(&mut self.scratch).collect();
        let (isa, precision) = (self.isa, self.precision);
        type Part<'p> =
            (((&'p Range<usize>, &'p mut [f32]), (&'p mut [f32], &'p mut [f32])), &'p mut Scratch);
        self.pool.run(parts, |(((rows, logits), (maxima, sums)), scratch): Part<'_>| {
            let a = Operand::of(Rows::new(&wte[rows.start * c..rows.end * c], c, c));
            let b = Operand::transposed(h);
            for out in Columns::split(logits, stride, rows.len(), [0..tokens]) {
                Gemm { a, b, k: c, adds: false, bias: &[], out }.run(isa, precision, &mut scratch.gemm);
            }
            let logits = Rows::new(logits, stride, tokens);
            isa.run(BlockSums { logits, rows: rows.len(), maxima, sums });
        });
        let merged = v.div_ceil(BLOCK) * stride;
        let (maxima, sums) = (&mut room.maxima[..merged], &mut room.sums[..merged]);
        isa.run(MergeBlocks { maxima, sums, tokens, stride });
        let loss = |(token, &target): (usize, &u32)| {
            let logit = room.logits[target as usize * stride + token];
            cross_entropy::loss(logit, room.maxima[token], room.sums[token])
        };
        in_default_mode(|| targets.iter().enumerate().map(loss).fold(before, |sum, loss| sum + loss))
    }

    #[allow(clippy::too_many_arguments)]
    fn head_backward(
        &mut self,
        h: Rows<'_>,
        (wte, dwte): (&[f32], &mut [f32]),
        targets: &[u32],
        room: &mut Head<'_>,
        dh: &mut Buffer<'_>,
        rows: Range<usize>,
        scale: f32,
    ) {
        let (c, tokens, threads) = (h.columns(), targets.len(), self.pool.n_threads());
        let (stride, v) = (padded_stride(tokens), wte.len() / c);
        let vocabulary: Vec<_> = vocabulary(v, threads).collect();
        let logits = cut(room.logits, times(vocabulary.iter().cloned(), stride));
        let dwtes = cut(dwte, times(vocabulary.iter().cloned(), c));
        let parts = vocabulary.iter().zip(logits).zip(dwtes).zip(&mut self.scratch).collect();
        let (max, sum) = (&room.maxima[..tokens], &room.sums[..tokens]);
        let (isa, precision) = (self.isa, self.precision);
        type Part<'p> = (((&'p Range<usize>, &'p mut [f32]), &'p mut [f32]), &'p mut Scratch);
        self.pool.run(parts, |(((rows, logits), dwte), scratch): Part<'_>| {
            let first = rows.start;
            isa.run(LogitsBackward { logits, stride, first, targets, max, sum, scale });
            let (a, b) = (Operand::of(Rows::new(logits, stride, tokens)), Operand::of(h));
            for out in Columns::split(dwte, c, rows.len(), [0..c]) {
                Gemm { a, b, k: tokens, adds: true, bias: &[], out }.run(isa, precision, &mut scratch.gemm);
            }
        });
        let a = Operand::transposed(Rows::new(&room.logits[..v * stride], stride, tokens));
        let b = Operand::of(Rows::new(wte, c, c));
        let parts = dh.split(rows, panels(c, threads)).into_iter().zip(&mut self.scratch).collect();
        self.pool.run(parts, |(out, scratch): (Columns<'_>, &mut Scratch)| {
            Gemm { a, b, k: v, adds: false, bias: &[], out }.run(isa, precision, &mut scratch.gemm);
        });
    }
}
