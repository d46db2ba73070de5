//! The regions of a forward pass: how each operation's columns, heads or rows are cut over the pool's threads.
//!
//! A region ends with a barrier, so there are few: for a few rows LayerNorm is computed again by every thread that needs
//! it, which is cheaper than to wait for another; for many a thread has rows of its own; and biases, activations and residual sums ride in the products' epilogues.

mod activations;
mod inputs;

use crate::config::{Activation, Precision};
use crate::kv_cache::Head;
use crate::ops::Rows;
use crate::ops::attention::{self, Append, Attention, Cached};
use crate::ops::embed::embed;
use crate::ops::layernorm::LayerNorm;
use crate::ops::matmul::{MatMul, Then};
use crate::ops::pairs::{Bf16, Bf16Dots, F32, Int8};
use crate::ops::panels::{Int4Groups, Int8Groups, NR};
use crate::pool::{Columns, Pool, share};
use crate::simd::{Isa, in_default_mode};
use crate::weights::{Dtype, Linear, Matrix, Norm};
use inputs::{InputRows, Inputs, Source};
use std::marker::PhantomData;
use std::ops::Range;

pub use activations::Activations;

/// The threads of a model and what each of them keeps for itself.
pub struct Workers {
    how: How,
    pool: Pool,
    inputs: Inputs,
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
    inputs: Inputs,
    attention: attention::Scratch,
}

/// Rows from which on a product's inputs are prepared once, by all threads together, for the price of a barrier.
const SHARED_ROWS: usize = 8;

/// Rows for each thread from which on a product is cut by rows: what a thread computed is then read by the same one,
/// which costs less than fetching it from another core, and all threads read all weights.
const OWN_ROWS: usize = 64;

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
        Workers { how: How { isa, precision, kv_dtype }, pool, inputs: Inputs::default(), scratch }
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
        norm: (&Norm, f32),
        linear: &Linear,
        activation: Option<Activation>,
        out: &mut Activations,
    ) {
        let out = out.shape(x.rows, linear.weight.n());
        let (stride, then) = (out.stride(), || activation.map_or(Then::Store, Then::Activate));
        let outs = self.cut(&linear.weight, x.rows, &mut out.data, stride);
        let outs = outs.into_iter().map(|(rows, out)| (rows, then(), out)).collect();
        self.multiply(Source::new(x, Some(norm)), (&linear.weight, &linear.bias), outs);
    }

    /// `out = LayerNorm(x) @ w`, (rows, N) without padding.
    pub fn norm_head(&mut self, x: &Activations, norm: (&Norm, f32), w: &Matrix, out: &mut [f32]) {
        let outs = self.cut(w, x.rows, out, w.n());
        let outs = outs.into_iter().map(|(rows, out)| (rows, Then::Store, out)).collect();
        self.multiply(Source::new(x, Some(norm)), (w, &[]), outs);
    }

    /// `x += a @ w + b`; `sums` is room for unfinished sums.
    pub fn add_linear(
        &mut self,
        a: &Activations,
        linear: &Linear,
        sums: &mut Activations,
        x: &mut Activations,
    ) {
        let (rows, w, stride) = (a.rows, &linear.weight, x.stride());
        let sums = self.cut(w, rows, &mut sums.shape(rows, w.n()).data, stride);
        let outs = self.cut(w, rows, &mut x.data, stride).into_iter().zip(sums);
        let outs = outs.map(|((rows, x), (_, sums))| (rows, Then::AddTo(x), sums)).collect();
        self.multiply(Source::new(a, None), (w, &linear.bias), outs);
    }

    /// Each thread's part of a product's output: its rows, and of these its columns.
    fn cut<'a>(
        &self,
        w: &Matrix,
        rows: usize,
        mut out: &'a mut [f32],
        stride: usize,
    ) -> Vec<(Range<usize>, Columns<'a>)> {
        let n = self.pool.n_threads();
        if rows < n * OWN_ROWS {
            let outs = Columns::split(out, stride, rows, shares(w, n));
            return outs.into_iter().map(|out| (0..rows, out)).collect();
        }
        let mut parts = Vec::with_capacity(n);
        for i in 0..n {
            let rows = share(rows, n, i);
            let len = (rows.len() * stride).min(out.len());
            let own = out.split_off_mut(..len).expect("so many rows");
            parts.extend(
                Columns::split(own, stride, rows.len(), [0..w.n()])
                    .into_iter()
                    .map(|out| (rows.clone(), out)),
            );
        }
        parts
    }

    /// A product by all threads, each of which has rows, an epilogue, and its part of the output.
    fn multiply(
        &mut self,
        source: Source<'_>,
        (w, bias): (&Matrix, &[f32]),
        outs: Vec<(Range<usize>, Then<'_>, Columns<'_>)>,
    ) {
        let (how, n) = (self.how, self.pool.n_threads());
        let shared = n > 1 && (SHARED_ROWS..n * OWN_ROWS).contains(&source.rows);
        if shared {
            let parts = self.inputs.split(how, source, w, n);
            self.pool.run(parts, InputRows::fill);
        }
        let prepared = &self.inputs;
        let parts = outs.into_iter().zip(&mut self.scratch).collect();
        type Part<'a> = ((Range<usize>, Then<'a>, Columns<'a>), &'a mut Scratch);
        self.pool.run(parts, |((rows, then, out), scratch): Part<'_>| {
            let source = source.part(rows);
            let mut inputs = prepared;
            if !shared {
                scratch.inputs.split(how, source, w, 1).into_iter().for_each(InputRows::fill);
                inputs = &scratch.inputs;
            }
            how.matmul(source, inputs, w, bias, then, out);
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
        source: Source<'_>,
        inputs: &Inputs,
        w: &Matrix,
        bias: &[f32],
        then: Then<'_>,
        out: Columns<'_>,
    ) {
        let (isa, rows) = (self.isa, source.rows);
        macro_rules! product {
            ($run:ident, $format:ty, $x:expr) => {
                isa.$run(MatMul { x: $x, rows, w: w.panels::<$format>(), bias, then, out })
            };
        }
        match (w.dtype(), self.precision) {
            (Dtype::F32, _) => product!(run, F32, inputs.floats(source)),
            (Dtype::BF16, Precision::Exact) => product!(run, Bf16, inputs.floats(source)),
            (Dtype::BF16, Precision::Fast) => {
                product!(run_flushing, Bf16Dots, inputs.rounded(source))
            }
            (Dtype::Int8, _) => product!(run, Int8Groups, inputs.quantised::<Int8Groups>(source)),
            (Dtype::Int4, _) => product!(run, Int4Groups, inputs.quantised::<Int4Groups>(source)),
        }
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
