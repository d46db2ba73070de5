//! The regions of a forward pass: how each operation's columns, heads or rows are cut over the pool's threads.
//!
//! A region ends with a barrier, so there are few: LayerNorm is computed again by every thread that needs it, which is
//! cheaper than to wait for another, and biases, activations and residual sums ride in the products' epilogues.

use crate::config::Activation;
use crate::kv_cache::{CacheElement, Head};
use crate::ops::attention::Attention;
use crate::ops::embed::embed;
use crate::ops::layernorm::LayerNorm;
use crate::ops::matmul::{MatMul, NR, Then};
use crate::ops::{Rows, padded_stride};
use crate::pool::{Columns, Pool, share};
use crate::simd::{Element, Isa, in_default_mode};
use crate::weights::{Dtype, Linear, Matrix, Norm};
use half::bf16;
use std::ops::Range;

/// A row-major buffer of activations, its rows padded; it keeps its memory between passes.
#[derive(Default)]
pub struct Activations {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Activations {
    /// Makes it (rows, columns); what it holds is unspecified.
    pub fn shape(&mut self, rows: usize, columns: usize) -> &mut Activations {
        (self.rows, self.columns) = (rows, columns);
        let len = rows * self.stride();
        if self.data.len() < len {
            self.data.resize(len, 0.0);
        }
        self
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        self.view().row(i)
    }

    /// Row `i`, to be written.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let start = i * self.stride();
        &mut self.data[start..start + self.columns]
    }

    fn stride(&self) -> usize {
        padded_stride(self.columns)
    }

    fn view(&self) -> Rows<'_> {
        Rows::new(&self.data, self.stride(), self.columns)
    }

    fn split(&mut self, ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<Columns<'_>> {
        let stride = self.stride();
        Columns::split(&mut self.data, stride, self.rows, ranges)
    }
}

/// The threads of a model and what each of them keeps for itself.
pub struct Workers {
    isa: Isa,
    pool: Pool,
    scratch: Vec<Scratch>,
}

#[derive(Default)]
struct Scratch {
    normed: Activations,
    attention: Vec<f32>,
}

/// One sequence's part of a pass: its rows of the activations and one layer of its cache.
pub struct AttentionRun<'a, T> {
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub rows: usize,
    /// The layer's heads.
    pub heads: Vec<Head<'a, T>>,
}

impl Workers {
    /// Threads that run kernels of `isa`.
    pub fn new(isa: Isa, pool: Pool) -> Workers {
        let scratch = (0..pool.n_threads()).map(|_| Scratch::default()).collect();
        Workers { isa, pool, scratch }
    }

    /// `x[i] = wte[token] + wpe[position]` for each (token, position).
    pub fn embed(&mut self, wte: &Matrix, wpe: &[f32], tokens: &[(u32, usize)], x: &mut Activations) {
        let n = self.pool.n_threads();
        let (stride, c) = (x.stride(), x.columns);
        let mut rest = &mut x.data[..];
        let mut parts = Vec::with_capacity(n);
        for i in 0..n {
            let tokens = &tokens[share(tokens.len(), n, i)];
            let (rows, after) = rest.split_at_mut(tokens.len() * stride);
            rest = after;
            parts.push((tokens, rows));
        }
        let embed_all = |(tokens, rows): (&[(u32, usize)], &mut [f32])| {
            for (&(token, position), out) in tokens.iter().zip(rows.chunks_exact_mut(stride)) {
                let wpe = &wpe[position * c..(position + 1) * c];
                match wte.dtype() {
                    Dtype::F32 => embed(wte.panels::<f32>(), token as usize, wpe, &mut out[..c]),
                    Dtype::BF16 => embed(wte.panels::<bf16>(), token as usize, wpe, &mut out[..c]),
                }
            }
        };
        // No kernel, which would see to that itself.
        self.pool.run(parts, |part| in_default_mode(|| embed_all(part)));
    }

    /// `out = LayerNorm(x) @ w + b`, and its activation where there is one.
    pub fn norm_linear(
        &mut self,
        x: &Activations,
        (norm, eps): (&Norm, f32),
        linear: &Linear,
        activation: Option<Activation>,
        out: &mut Activations,
    ) {
        let out = out.shape(x.rows, linear.weight.n());
        let (stride, rows) = (out.stride(), out.rows);
        let then = || activation.map_or(Then::Store, Then::Activate);
        self.norm_matmul(x, (norm, eps), (&linear.weight, &linear.bias), then, (&mut out.data, stride, rows));
    }

    /// `out = LayerNorm(x) @ w`, (rows, N) without padding.
    pub fn norm_head(&mut self, x: &Activations, norm: (&Norm, f32), w: &Matrix, out: &mut [f32]) {
        self.norm_matmul(x, norm, (w, &[]), || Then::Store, (out, w.n(), x.rows));
    }

    fn norm_matmul<'t>(
        &mut self,
        x: &Activations,
        (norm, eps): (&Norm, f32),
        (w, bias): (&Matrix, &[f32]),
        then: impl Fn() -> Then<'t> + Sync,
        (out, stride, rows): (&mut [f32], usize, usize),
    ) {
        let outs = Columns::split(out, stride, rows, shares(w, self.pool.n_threads()));
        let parts = outs.into_iter().zip(&mut self.scratch).collect();
        let isa = self.isa;
        self.pool.run(parts, |(out, scratch): (Columns<'_>, &mut Scratch)| {
            let normed = scratch.normed.shape(x.rows, x.columns);
            norm_rows(isa, x, (norm, eps), normed);
            matmul(isa, normed, w, bias, then(), out);
        });
    }

    /// `x += a @ w + b`; `sums` is room for unfinished sums.
    pub fn add_linear(
        &mut self,
        a: &Activations,
        linear: &Linear,
        sums: &mut Activations,
        x: &mut Activations,
    ) {
        let (n, w) = (self.pool.n_threads(), &linear.weight);
        let sums = sums.shape(a.rows, w.n()).split(shares(w, n));
        let parts = x.split(shares(w, n)).into_iter().zip(sums).collect();
        let isa = self.isa;
        self.pool.run(parts, |(x, sums): (Columns<'_>, Columns<'_>)| {
            matmul(isa, a, w, &linear.bias, Then::AddTo(x), sums);
        });
    }

    /// `out = LayerNorm(x)`, (rows, C) without padding.
    pub fn norm(&mut self, x: &Activations, (norm, eps): (&Norm, f32), out: &mut [f32]) {
        let n = self.pool.n_threads();
        let mut rest = out;
        let mut parts = Vec::with_capacity(n);
        for i in 0..n {
            let rows = share(x.rows, n, i);
            let (out, after) = rest.split_at_mut(rows.len() * x.columns);
            rest = after;
            parts.push((rows.start, out));
        }
        let isa = self.isa;
        self.pool.run(parts, |(first, out): (usize, &mut [f32])| {
            let x = x.view().rows_from(first);
            let Norm { weight, bias } = norm;
            isa.run(LayerNorm { x, weight, bias, eps, out_stride: x.columns(), out });
        });
    }

    /// Appends each row's key and value to its cache and attends: (rows, 3C) queries, keys, values -> (rows, C).
    pub fn attention<T: CacheElement>(
        &mut self,
        qkv: &Activations,
        runs: Vec<AttentionRun<'_, T>>,
        scale: f32,
        out: &mut Activations,
    ) {
        let c = qkv.columns / 3;
        let stride = out.shape(qkv.rows, c).stride();
        let mut rest = &mut out.data[..];
        let mut first_row = 0;
        let mut units = Vec::new();
        for run in runs {
            let (rows, after) = rest.split_at_mut(run.rows * stride);
            rest = after;
            let hs = c / run.heads.len();
            let ranges = (0..run.heads.len()).map(|head| head * hs..(head + 1) * hs);
            let outs = Columns::split(rows, stride, run.rows, ranges);
            for (cache, out) in run.heads.into_iter().zip(outs) {
                units.push(Unit {
                    qkv: qkv.view().rows_from(first_row),
                    position: run.position,
                    rows: run.rows,
                    cache,
                    out,
                });
            }
            first_row += run.rows;
        }
        let parts = deal(units, self.pool.n_threads()).into_iter().zip(&mut self.scratch).collect();
        let isa = self.isa;
        self.pool.run(parts, |(units, scratch): (Vec<Unit<'_, T>>, &mut Scratch)| {
            for unit in units {
                unit.attend(isa, scale, &mut scratch.attention);
            }
        });
    }
}

/// One head of one sequence.
struct Unit<'a, T> {
    /// From the sequence's first row on.
    qkv: Rows<'a>,
    position: usize,
    rows: usize,
    cache: Head<'a, T>,
    out: Columns<'a>,
}

impl<T: Element> Unit<'_, T> {
    fn attend(mut self, isa: Isa, scale: f32, scratch: &mut Vec<f32>) {
        let c = self.qkv.columns() / 3;
        let head = self.out.range();
        for i in 0..self.rows {
            let row = self.qkv.row(i);
            let (key, value) = (&row[c..][head.clone()], &row[2 * c..][head.clone()]);
            self.cache.append(self.position + i, key, value);
        }
        let (q, blocks) = (self.qkv.columns_of(head), self.cache.blocks());
        let (rows, position) = (self.rows, self.position);
        isa.run(Attention { q, rows, position, blocks: &blocks, scale, out: self.out, scratch });
    }

    /// What it costs, in query-key pairs.
    fn cost(&self) -> usize {
        self.rows * (self.position + self.rows)
    }
}

/// Cuts units, in order, into `n` parts of about the same cost.
fn deal<T: Element>(units: Vec<Unit<'_, T>>, n: usize) -> Vec<Vec<Unit<'_, T>>> {
    let total: usize = units.iter().map(Unit::cost).sum();
    let mut parts: Vec<Vec<Unit<'_, T>>> = (0..n).map(|_| Vec::new()).collect();
    let mut before = 0;
    for unit in units {
        let cost = unit.cost();
        // By the middle of its cost, so that equal units are dealt evenly.
        let part = (2 * before + cost) * n / (2 * total).max(1);
        before += cost;
        parts[part.min(n - 1)].push(unit);
    }
    parts
}

/// Each thread's columns of a product: whole panels.
fn shares(w: &Matrix, n: usize) -> impl Iterator<Item = Range<usize>> {
    let columns = w.n();
    let panels = columns.div_ceil(NR);
    (0..n).map(move |i| {
        let panels = share(panels, n, i);
        (panels.start * NR).min(columns)..(panels.end * NR).min(columns)
    })
}

fn norm_rows(isa: Isa, x: &Activations, (norm, eps): (&Norm, f32), out: &mut Activations) {
    let out_stride = out.stride();
    let out = &mut out.data[..x.rows * out_stride];
    isa.run(LayerNorm { x: x.view(), weight: &norm.weight, bias: &norm.bias, eps, out, out_stride });
}

fn matmul(isa: Isa, x: &Activations, w: &Matrix, bias: &[f32], then: Then<'_>, out: Columns<'_>) {
    let (rows, x) = (x.rows, x.view());
    match w.dtype() {
        Dtype::F32 => isa.run(MatMul { x, rows, w: w.panels::<f32>(), bias, then, out }),
        Dtype::BF16 => isa.run(MatMul { x, rows, w: w.panels::<bf16>(), bias, then, out }),
    }
}
