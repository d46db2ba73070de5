//! The regions of a forward pass: how each operation's columns, heads or rows are cut over the pool's threads.
//!
//! A region ends with a barrier, so there are few: LayerNorm is computed again by every thread that needs it, which is
//! cheaper than to wait for another, and biases, activations and residual sums ride in the products' epilogues.

use crate::config::{Activation, Precision};
use crate::kv_cache::Head;
use crate::ops::attention::{self, Append, Attention, Cached};
use crate::ops::embed::embed;
use crate::ops::layernorm::LayerNorm;
use crate::ops::matmul::{MatMul, Quantised, Steps, Then};
use crate::ops::pairs::{Bf16, Bf16Dots, F32, Int8};
use crate::ops::panels::{Int4Groups, Int8Groups, NR};
use crate::ops::round::{QuantiseRows, RoundRows};
use crate::ops::{Rows, padded_stride};
use crate::pool::{Columns, Pool, share};
use crate::simd::{Isa, in_default_mode};
use crate::weights::{Dtype, Linear, Matrix, Norm};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// A row-major buffer of activations, its rows padded; it keeps its memory between passes.
#[derive(Default)]
pub struct Activations {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Activations {
    /// Makes it (rows, columns); what it holds is unspecified, but for a zero after each row of an odd length.
    pub fn shape(&mut self, rows: usize, columns: usize) -> &mut Activations {
        (self.rows, self.columns) = (rows, columns);
        let len = rows * self.stride();
        if self.data.len() < len {
            self.data.resize(len, 0.0);
        }
        if columns % 2 == 1 {
            let stride = self.stride();
            self.data[..len].chunks_exact_mut(stride).for_each(|row| row[columns] = 0.0);
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

    /// Its values two by two, a zero beside an odd last one.
    fn pairs(&self) -> Rows<'_, [f32; 2]> {
        Rows::new(bytemuck::cast_slice(&self.data), self.stride() / 2, self.columns.div_ceil(2))
    }

    fn split(&mut self, ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<Columns<'_>> {
        let stride = self.stride();
        Columns::split(&mut self.data, stride, self.rows, ranges)
    }
}

/// The threads of a model and what each of them keeps for itself.
pub struct Workers {
    how: How,
    pool: Pool,
    scratch: Vec<Scratch>,
}

/// What kernels are run.
#[derive(Clone, Copy)]
struct How {
    isa: Isa,
    precision: Precision,
    kv_dtype: Dtype,
}

#[derive(Default)]
struct Scratch {
    normed: Activations,
    inputs: Inputs,
    attention: attention::Scratch,
}

/// Room for activations in the type that narrow weights are multiplied with.
#[derive(Default)]
struct Inputs {
    pairs: Vec<[bf16; 2]>,
    values: Vec<[[i8; 4]; 2]>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

/// One sequence's part of a pass: its rows of the activations and one layer of its cache.
pub struct AttentionRun<'a> {
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub rows: usize,
    /// The layer's heads.
    pub heads: Vec<Head<'a>>,
}

impl Workers {
    /// Threads that run kernels of `isa`, for caches of `kv_dtype`.
    pub fn new(isa: Isa, precision: Precision, kv_dtype: Dtype, pool: Pool) -> Workers {
        let scratch = (0..pool.n_threads()).map(|_| Scratch::default()).collect();
        Workers { how: How { isa, precision, kv_dtype }, pool, scratch }
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
                    Dtype::F32 => embed(wte.panels::<F32>(), token as usize, wpe, &mut out[..c]),
                    Dtype::BF16 => embed(wte.panels::<Bf16>(), token as usize, wpe, &mut out[..c]),
                    Dtype::Int8 => embed(wte.panels::<Int8Groups>(), token as usize, wpe, &mut out[..c]),
                    Dtype::Int4 => embed(wte.panels::<Int4Groups>(), token as usize, wpe, &mut out[..c]),
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
        let how = self.how;
        self.pool.run(parts, |(out, scratch): (Columns<'_>, &mut Scratch)| {
            let Scratch { normed, inputs, .. } = scratch;
            let normed = normed.shape(x.rows, x.columns);
            norm_rows(how.isa, x, (norm, eps), normed);
            how.matmul(normed, w, bias, then(), out, inputs);
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
        let outs = x.split(shares(w, n)).into_iter().zip(sums);
        let parts = outs.zip(&mut self.scratch).collect();
        let how = self.how;
        self.pool.run(parts, |((x, sums), scratch): ((Columns<'_>, Columns<'_>), &mut Scratch)| {
            how.matmul(a, w, &linear.bias, Then::AddTo(x), sums, &mut scratch.inputs);
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
        let isa = self.how.isa;
        self.pool.run(parts, |(first, out): (usize, &mut [f32])| {
            let x = x.view().rows_from(first);
            let Norm { weight, bias } = norm;
            isa.run(LayerNorm { x, weight, bias, eps, out_stride: x.columns(), out });
        });
    }

    /// Appends each row's key and value to its cache and attends: (rows, 3C) queries, keys, values -> (rows, C).
    pub fn attention(
        &mut self,
        qkv: &Activations,
        runs: Vec<AttentionRun<'_>>,
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
        let how = self.how;
        self.pool.run(parts, |(units, scratch): (Vec<Unit<'_>>, &mut Scratch)| {
            for unit in units {
                how.attend(unit, scale, &mut scratch.attention);
            }
        });
    }
}

/// One head of one sequence.
struct Unit<'a> {
    /// From the sequence's first row on.
    qkv: Rows<'a>,
    position: usize,
    rows: usize,
    cache: Head<'a>,
    out: Columns<'a>,
}

impl Unit<'_> {
    /// Appends keys and values of all rows.
    fn append<P: Cached>(&mut self, isa: Isa) {
        let c = self.qkv.columns() / 3;
        let head = self.out.range();
        let keys = self.qkv.columns_of(c + head.start..c + head.end);
        let values = self.qkv.columns_of(2 * c + head.start..2 * c + head.end);
        let (blocks, start) = self.cache.written();
        let first = self.position - start;
        isa.run(Append::<P> { keys, values, rows: self.rows, first, blocks, cached: PhantomData });
    }

    /// What it costs, in query-key pairs.
    fn cost(&self) -> usize {
        self.rows * (self.position + self.rows)
    }
}

impl How {
    fn attend(self, mut unit: Unit<'_>, scale: f32, scratch: &mut attention::Scratch) {
        macro_rules! attend {
            ($pairs:ty, $run:ident) => {{
                unit.append::<$pairs>(self.isa);
                let Unit { qkv, position, rows, cache, out } = unit;
                let (q, blocks) = (qkv.columns_of(out.range()), cache.blocks());
                let (blocks, cached) = (&blocks[..], PhantomData::<$pairs>);
                self.isa.$run(Attention { q, rows, position, blocks, cached, scale, out, scratch })
            }};
        }
        match (self.kv_dtype, self.precision) {
            (Dtype::F32, _) => attend!(F32, run),
            (Dtype::BF16, Precision::Exact) => attend!(Bf16, run),
            (Dtype::BF16, Precision::Fast) => attend!(Bf16Dots, run_flushing),
            (Dtype::Int8, _) => attend!(Int8, run),
            (Dtype::Int4, _) => unreachable!("no cache is held in int4"),
        }
    }

    fn matmul(
        self,
        x: &Activations,
        w: &Matrix,
        bias: &[f32],
        then: Then<'_>,
        out: Columns<'_>,
        inputs: &mut Inputs,
    ) {
        let (isa, rows) = (self.isa, x.rows);
        match (w.dtype(), self.precision) {
            (Dtype::F32, _) => isa.run(MatMul { x: x.pairs(), rows, w: w.panels::<F32>(), bias, then, out }),
            (Dtype::BF16, Precision::Exact) => {
                isa.run(MatMul { x: x.pairs(), rows, w: w.panels::<Bf16>(), bias, then, out });
            }
            (Dtype::BF16, Precision::Fast) => {
                let x = inputs.round(isa, x);
                isa.run_flushing(MatMul { x, rows, w: w.panels::<Bf16Dots>(), bias, then, out });
            }
            (Dtype::Int8, _) => {
                let x = inputs.quantise::<Int8Groups>(isa, x, w.rotation());
                isa.run(MatMul { x, rows, w: w.panels::<Int8Groups>(), bias, then, out });
            }
            (Dtype::Int4, _) => {
                let x = inputs.quantise::<Int4Groups>(isa, x, w.rotation());
                isa.run(MatMul { x, rows, w: w.panels::<Int4Groups>(), bias, then, out });
            }
        }
    }
}

impl Inputs {
    fn round(&mut self, isa: Isa, x: &Activations) -> Rows<'_, [bf16; 2]> {
        let stride = x.stride() / 2;
        grow(&mut self.pairs, x.rows * stride);
        isa.run(RoundRows { x: x.view(), rows: x.rows, out: &mut self.pairs, stride });
        Rows::new(&self.pairs, stride, x.columns.div_ceil(2))
    }

    fn quantise<F: Steps>(&mut self, isa: Isa, x: &Activations, rotation: usize) -> Quantised<'_> {
        let (group, sum) = (F::GROUP, F::SUM);
        let groups = x.columns.div_ceil(group);
        let (steps, sums) = (groups * group / 8, groups * group / sum);
        grow(&mut self.values, x.rows * steps);
        grow(&mut self.scales, x.rows * groups);
        grow(&mut self.starts, x.rows * sums);
        let values = bytemuck::cast_slice_mut(&mut self.values);
        let (scales, starts) = (&mut self.scales[..], &mut self.starts[..]);
        let rows = x.rows;
        isa.run(QuantiseRows { x: x.view(), rows, rotation, group, sum, values, scales, starts });
        Quantised {
            values: Rows::new(&self.values, steps, steps),
            scales: Rows::new(&self.scales, groups, groups),
            starts: Rows::new(&self.starts, sums, sums),
        }
    }
}

fn grow<T: Copy + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() < len {
        values.resize(len, T::default());
    }
}

/// Cuts units, in order, into `n` parts of about the same cost.
fn deal(units: Vec<Unit<'_>>, n: usize) -> Vec<Vec<Unit<'_>>> {
    let total: usize = units.iter().map(Unit::cost).sum();
    let mut parts: Vec<Vec<Unit<'_>>> = (0..n).map(|_| Vec::new()).collect();
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
