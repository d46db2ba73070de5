//! The regions of a training pass: how each operation's columns, rows or heads are cut over the pool's threads. No cut
//! changes a bit: every sum is computed by one thread, in one order.

mod head;
mod parts;

use super::memory::{Buffer, Size};
use super::parameters::{Linear, Norm};
use crate::config::{Activation, Config};
use crate::error::{Error, Result};
use crate::ops::Rows;
use crate::ops::adamw::{self, AdamW, Rule, SquareSums};
use crate::ops::dropout::{Drop, Mask};
use crate::ops::embed::embed_backward;
use crate::ops::flash_attention;
use crate::ops::gelu::backward::{Activate, ActivateBackward};
use crate::ops::gemm::{self, Gemm, Operand, Precision};
use crate::ops::layernorm::LayerNorm;
use crate::ops::layernorm::backward::{LayerNormInput, LayerNormParameters, SumRows};
use crate::pool::{Columns, Pool, share};
use crate::simd::{Isa, in_default_mode};
use parts::{cut, deal, panels, two_of};
use std::ops::Range;

pub use head::HeadBackward;

/// The threads of a run and what each of them keeps for itself.
pub struct Workers {
    isa: Isa,
    precision: Precision,
    pool: Pool,
    scratch: Vec<Scratch>,
}

struct Scratch {
    gemm: gemm::Scratch,
    attention: flash_attention::Scratch,
}

/// Weights, and their gradients where they are wanted.
pub struct Learned<'a> {
    /// All weights.
    pub weights: &'a [f32],
    /// All gradients.
    pub gradients: &'a mut [f32],
}

/// How a batch's heads attend.
#[derive(Clone, Copy)]
pub struct Attention {
    /// T.
    pub tokens: usize,
    /// Heads of a sequence.
    pub n_head: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Which weights are dropped.
    pub mask: Option<Mask>,
}

impl Workers {
    /// Threads that run kernels of `isa`.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn new(
        isa: Isa,
        precision: Precision,
        n_threads: usize,
        size: Size,
        config: &Config,
    ) -> Result<Workers> {
        let pool = Pool::new(n_threads).map_err(|source| Error::Threads { n_threads, source })?;
        let scratch = || Scratch {
            gemm: gemm::Scratch::new(),
            attention: flash_attention::Scratch::new(size.n_tokens, config.head_size()),
        };
        let scratch = (0..pool.n_threads()).map(|_| scratch()).collect();
        Ok(Workers { isa, precision, pool, scratch })
    }

    /// `out = wte[token] + wpe[position]`.
    pub fn embed(&mut self, wte: &[f32], wpe: &[f32], tokens: &[(u32, usize)], out: &mut Buffer<'_>) {
        let (c, stride) = (out.view().columns(), out.stride());
        let embed = |(first, rows): (usize, &mut [f32])| {
            for (out, &(token, position)) in rows.chunks_mut(stride).zip(&tokens[first..]) {
                let (token, position) = (&wte[token as usize * c..], &wpe[position * c..]);
                for ((out, token), position) in out[..c].iter_mut().zip(token).zip(position) {
                    *out = token + position;
                }
            }
        };
        let parts = out.split_rows(self.pool.n_threads());
        self.pool.run(parts, |part| in_default_mode(|| embed(part)));
    }

    /// `out = LayerNorm(x)`.
    pub fn norm(&mut self, x: &Buffer<'_>, (norm, eps): (&Norm, f32), weights: &[f32], out: &mut Buffer<'_>) {
        let (x, out_stride) = (x.view(), out.stride());
        let zeros = vec![0.0; if norm.bias.is_empty() { x.columns() } else { 0 }];
        let bias = if norm.bias.is_empty() { &zeros[..] } else { &weights[norm.bias.clone()] };
        let weight = &weights[norm.weight.clone()];
        let isa = self.isa;
        let parts = out.split_rows(self.pool.n_threads());
        self.pool.run(parts, |(first, out)| {
            isa.run(LayerNorm { x: x.rows_from(first), weight, bias, eps, out, out_stride });
        });
    }

    /// `out = x @ w + b`.
    pub fn linear(&mut self, x: &Buffer<'_>, linear: &Linear, weights: &[f32], out: &mut Buffer<'_>) {
        let &Linear { ref weight, ref bias, k, n } = linear;
        let b = Operand::of(Rows::new(&weights[weight.clone()], n, n));
        let (a, bias) = (Operand::of(x.view()), &weights[bias.clone()]);
        let (isa, precision) = (self.isa, self.precision);
        let threads = self.pool.n_threads();
        let parts = out.split(0..x.rows(), panels(n, threads)).into_iter().zip(&mut self.scratch).collect();
        self.pool.run(parts, |(out, scratch): (Columns<'_>, &mut Scratch)| {
            Gemm { a, b, k, adds: false, bias, out }.run(isa, precision, &mut scratch.gemm);
        });
    }

    /// `out = y * factors`, plus `residual` where there is one.
    pub fn drop(
        &mut self,
        y: &Buffer<'_>,
        residual: Option<&Buffer<'_>>,
        mask: Option<Mask>,
        out: &mut Buffer<'_>,
    ) {
        let (y, residual, stride) = (y.view(), residual.map(Buffer::view), out.stride());
        let isa = self.isa;
        let parts = out.split_rows(self.pool.n_threads());
        self.pool.run(parts, |(first, out)| {
            let residual = residual.map(|residual| residual.rows_from(first));
            isa.run(Drop { y: y.rows_from(first), residual, mask, first, out, stride });
        });
    }

    /// `y * factors`, in `room`; `y` itself where nothing is dropped.
    pub fn dropped<'a, 'b>(
        &mut self,
        y: &'a Buffer<'b>,
        mask: Option<Mask>,
        room: &'a mut Buffer<'b>,
    ) -> &'a Buffer<'b> {
        if mask.is_none() {
            return y;
        }
        self.drop(y, None, mask, room);
        room
    }

    /// `out = activation(x)`.
    pub fn activate(&mut self, x: &Buffer<'_>, activation: Activation, out: &mut Buffer<'_>) {
        let (x, stride, isa) = (x.view(), out.stride(), self.isa);
        let parts = out.split_rows(self.pool.n_threads());
        self.pool
            .run(parts, |(first, out)| isa.run(Activate { x: x.rows_from(first), activation, out, stride }));
    }

    /// `d *= activation'(x)`.
    pub fn activate_backward(&mut self, x: &Buffer<'_>, activation: Activation, d: &mut Buffer<'_>) {
        let (x, stride, isa) = (x.view(), d.stride(), self.isa);
        let parts = d.split_rows(self.pool.n_threads());
        self.pool.run(parts, |(first, d)| {
            isa.run(ActivateBackward { x: x.rows_from(first), activation, d, stride });
        });
    }

    /// Queries, keys and values (rows, 3C) -> attention's output (rows, C), and the logarithms of its sums.
    pub fn attention(&mut self, qkv: &Buffer<'_>, how: Attention, out: &mut Buffer<'_>, lse: &mut [f32]) {
        let heads = how.heads(qkv);
        let (hs, stride, rows) = (out.view().columns() / how.n_head, out.stride(), out.rows());
        let mut units = Vec::new();
        for out in out.data_mut()[..rows * stride].chunks_mut(how.tokens * stride) {
            let ranges = (0..how.n_head).map(|head| head * hs..(head + 1) * hs);
            units.extend(Columns::split(out, stride, how.tokens, ranges));
        }
        let units = heads.into_iter().zip(units).zip(lse.chunks_mut(how.tokens));
        let parts = deal(units.collect(), &mut self.scratch);
        let (isa, precision) = (self.isa, self.precision);
        type Units<'u> = Vec<((flash_attention::Head<'u>, Columns<'u>), &'u mut [f32])>;
        self.pool.run(parts, |(units, scratch): (Units<'_>, &mut Scratch)| {
            for ((head, out), lse) in units {
                head.forward(isa, precision, out, lse, &mut scratch.attention, scratch.gemm.left());
            }
        });
    }

    /// The gradients of queries, keys and values, from that of attention's output.
    pub fn attention_backward(
        &mut self,
        (qkv, out, lse): (&Buffer<'_>, &Buffer<'_>, &[f32]),
        how: Attention,
        dout: &Buffer<'_>,
        dqkv: &mut Buffer<'_>,
    ) {
        let (hs, stride, rows) = (out.view().columns() / how.n_head, dqkv.stride(), dqkv.rows());
        let mut gradients = Vec::new();
        for dqkv in dqkv.data_mut()[..rows * stride].chunks_mut(how.tokens * stride) {
            let ranges = (0..3 * how.n_head).map(|head| head * hs..(head + 1) * hs);
            let mut columns = Columns::split(dqkv, stride, how.tokens, ranges).into_iter();
            let mut of_heads = || columns.by_ref().take(how.n_head).collect::<Vec<_>>();
            let (dq, dk, dv) = (of_heads(), of_heads(), of_heads());
            gradients.extend(dq.into_iter().zip(dk).zip(dv).map(|((dq, dk), dv)| [dq, dk, dv]));
        }
        let units = how.heads(qkv).into_iter().zip(lse.chunks(how.tokens)).zip(gradients);
        let parts = deal(units.collect(), &mut self.scratch);
        let (isa, precision, out, dout) = (self.isa, self.precision, out.view(), dout.view());
        type Units<'u> = Vec<((flash_attention::Head<'u>, &'u [f32]), [Columns<'u>; 3])>;
        self.pool.run(parts, |(units, scratch): (Units<'_>, &mut Scratch)| {
            for ((head, lse), gradients) in units {
                let (sequence, number) = (head.index / how.n_head, head.index % how.n_head);
                let (row, columns) = (sequence * how.tokens, number * hs..(number + 1) * hs);
                let out = out.rows_from(row).columns_of(columns.clone());
                let dout = dout.rows_from(row).columns_of(columns);
                let left = scratch.gemm.left();
                head.backward(isa, precision, (out, lse, dout), gradients, &mut scratch.attention, left);
            }
        });
    }

    /// `dw += x^T dy`, `db += dy` summed over rows, and `dx = dy w^T`.
    pub fn linear_backward(
        &mut self,
        x: &Buffer<'_>,
        linear: &Linear,
        dy: &Buffer<'_>,
        learned: &mut Learned<'_>,
        dx: &mut Buffer<'_>,
    ) {
        let &Linear { ref weight, ref bias, k, n } = linear;
        let (rows, threads) = (x.rows(), self.pool.n_threads());
        let w = Rows::new(&learned.weights[weight.clone()], n, n);
        let (dw, db) = two_of(learned.gradients, weight, bias);
        let dws = Columns::split(dw, n, k, panels(n, threads));
        let dbs = cut(db, panels(n, threads));
        let dxs = dx.split(0..rows, panels(k, threads));
        let parts = dws.into_iter().zip(dbs).zip(dxs).zip(&mut self.scratch).collect();
        let (x, dy, isa, precision) = (x.view(), dy.view(), self.isa, self.precision);
        type Part<'p> = (((Columns<'p>, &'p mut [f32]), Columns<'p>), &'p mut Scratch);
        self.pool.run(parts, |(((dw, db), dx), scratch): Part<'_>| {
            if !db.is_empty() {
                isa.run(SumRows { x: dy.columns_of(dw.range()), rows, out: db });
            }
            let (a, b) = (Operand::transposed(x), Operand::of(dy));
            Gemm { a, b, k: rows, adds: true, bias: &[], out: dw }.run(isa, precision, &mut scratch.gemm);
            let (a, b) = (Operand::of(dy), Operand::transposed(w));
            Gemm { a, b, k: n, adds: false, bias: &[], out: dx }.run(isa, precision, &mut scratch.gemm);
        });
    }

    /// `dx += ...` through `LayerNorm(x)`, and the gradients of its gain and bias.
    pub fn norm_backward(
        &mut self,
        x: &Buffer<'_>,
        (norm, eps): (&Norm, f32),
        dy: &Buffer<'_>,
        learned: &mut Learned<'_>,
        dx: &mut Buffer<'_>,
        moments: &mut [[f32; 2]],
    ) {
        let (x, dy, dx_stride, threads) = (x.view(), dy.view(), dx.stride(), self.pool.n_threads());
        let weight = &learned.weights[norm.weight.clone()];
        let rows = dx.rows();
        let all = (0..threads).map(|i| share(rows, threads, i));
        let parts = dx.split_rows(threads).into_iter().zip(cut(moments, all)).collect();
        let isa = self.isa;
        self.pool.run(parts, |((first, dx), moments): ((usize, &mut [f32]), &mut [[f32; 2]])| {
            let (x, dy) = (x.rows_from(first), dy.rows_from(first));
            isa.run(LayerNormInput { x, dy, weight, eps, dx, dx_stride, moments });
        });
        let (dweight, dbias) = two_of(learned.gradients, &norm.weight, &norm.bias);
        let columns: Vec<_> = panels(x.columns(), threads).collect();
        let sums = cut(dweight, columns.clone()).into_iter().zip(cut(dbias, columns.clone()));
        let parts = columns.into_iter().zip(sums).collect();
        let moments = &*moments;
        self.pool.run(parts, |(columns, (dweight, dbias)): (Range<usize>, (&mut [f32], &mut [f32]))| {
            let (x, dy) = (x.columns_of(columns.clone()), dy.columns_of(columns));
            isa.run(LayerNormParameters { x, dy, moments, dweight, dbias });
        });
    }

    /// `dwte[token] += dx` and `dwpe[position] += dx`.
    pub fn embed_backward(
        &mut self,
        dx: &Buffer<'_>,
        tokens: &[(u32, usize)],
        (wte, wpe): (&Range<usize>, &Range<usize>),
        learned: &mut Learned<'_>,
    ) {
        let (dx, threads) = (dx.view(), self.pool.n_threads());
        let c = dx.columns();
        let (dwte, dwpe) = two_of(learned.gradients, wte, wpe);
        let (v, positions) = (dwte.len() / c, dwpe.len() / c);
        let dwtes = Columns::split(dwte, c, v, panels(c, threads));
        let dwpes = Columns::split(dwpe, c, positions, panels(c, threads));
        let parts = dwtes.into_iter().zip(dwpes).collect();
        self.pool.run(parts, |(mut dwte, mut dwpe): (Columns<'_>, Columns<'_>)| {
            let dx = dx.columns_of(dwte.range());
            in_default_mode(|| embed_backward(dx, tokens, &mut dwte, &mut dwpe));
        });
    }

    /// The root of the sum of squares: of blocks in float32, of the blocks' sums, in ascending order, in float64.
    pub fn norm_of(&mut self, values: &[f32], sums: &mut Vec<f32>) -> f64 {
        let threads = self.pool.n_threads();
        let blocks = values.len().div_ceil(adamw::BLOCK);
        sums.resize(blocks, 0.0);
        let shares = || (0..threads).map(|i| share(blocks, threads, i));
        let parts = shares().zip(cut(sums, shares())).collect();
        let isa = self.isa;
        self.pool.run(parts, |(blocks, sums): (Range<usize>, &mut [f32])| {
            let values = &values[blocks.start * adamw::BLOCK..values.len().min(blocks.end * adamw::BLOCK)];
            isa.run(SquareSums { values, sums });
        });
        in_default_mode(|| sums.iter().map(|&sum| f64::from(sum)).sum::<f64>().sqrt())
    }

    /// One step of AdamW of all tensors: (place, rule) each, in ascending order.
    pub fn adamw(
        &mut self,
        tensors: &[(Range<usize>, Rule)],
        gradients: &mut [f32],
        [weights, exp_avg, exp_avg_sq]: [&mut [f32]; 3],
    ) {
        let threads = self.pool.n_threads();
        let blocks = weights.len().div_ceil(adamw::BLOCK);
        let end = weights.len();
        let shares = (0..threads).map(|i| {
            let blocks = share(blocks, threads, i);
            blocks.start * adamw::BLOCK..end.min(blocks.end * adamw::BLOCK)
        });
        let shares: Vec<_> = shares.collect();
        let [weights, exp_avg, exp_avg_sq, gradients] =
            [weights, exp_avg, exp_avg_sq, gradients].map(|values| cut(values, shares.clone()));
        let moments = exp_avg.into_iter().zip(exp_avg_sq);
        let parts = shares.into_iter().zip(weights).zip(gradients).zip(moments).collect();
        let isa = self.isa;
        type Part<'p> = (((Range<usize>, &'p mut [f32]), &'p mut [f32]), (&'p mut [f32], &'p mut [f32]));
        self.pool.run(parts, |(((here, weights), gradients), (exp_avg, exp_avg_sq)): Part<'_>| {
            for (place, rule) in tensors {
                let both = place.start.max(here.start)..place.end.min(here.end);
                if both.is_empty() {
                    continue;
                }
                let both = both.start - here.start..both.end - here.start;
                let (rule, gradients) = (*rule, &mut gradients[both.clone()]);
                let weights = &mut weights[both.clone()];
                let (exp_avg, exp_avg_sq) = (&mut exp_avg[both.clone()], &mut exp_avg_sq[both]);
                isa.run(AdamW { rule, gradients, weights, exp_avg, exp_avg_sq });
            }
        });
    }
}

impl Attention {
    /// Every head of every sequence, one after the other.
    fn heads<'a>(self, qkv: &'a Buffer<'_>) -> Vec<flash_attention::Head<'a>> {
        let Attention { tokens, n_head, scale, mask } = self;
        let sequences = qkv.rows() / tokens;
        let (qkv, c) = (qkv.view(), qkv.view().columns() / 3);
        let hs = c / n_head;
        let head = |index: usize| {
            let rows = qkv.rows_from(index / n_head * tokens);
            let of = |part: usize| {
                rows.columns_of(part * c + index % n_head * hs..part * c + (index % n_head + 1) * hs)
            };
            flash_attention::Head { q: of(0), k: of(1), v: of(2), tokens, scale, mask, index }
        };
        (0..sequences * n_head).map(head).collect()
    }
}
