//! Each operation alone, on one thread and in the shapes of 124M: C = 768, 12 heads of 64, V = 50257.
//!
//! `GPT2RS_ISA` chooses the instruction set. What decode does once a token is given in bytes read: its limit is the
//! bandwidth of memory. What prefill does is given in floating-point operations ("elements"): its limit is the FMA peak.
//! `benches/model.rs` measures both limits beside whole models.

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use gpt2rs::config::Activation;
use gpt2rs::ops::attention::{Attention, BLOCK, append, block_len};
use gpt2rs::ops::embed::embed;
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::layernorm::LayerNorm;
use gpt2rs::ops::matmul::{MatMul, Panels, Then};
use gpt2rs::ops::{Rows, padded_stride};
use gpt2rs::pool::Columns;
use gpt2rs::sample::{Sampling, Scratch};
use gpt2rs::simd::{Element, Isa};
use half::bf16;
use std::hint::black_box;
use std::iter::once;
use std::sync::LazyLock;
use std::time::Duration;

const C: usize = 768;
const N_HEAD: usize = 12;
const HS: usize = C / N_HEAD;
const V: usize = 50257;
/// Rows of a prefill.
const T: usize = 512;

/// Looked up once: a row's LayerNorm takes less time than the environment does.
fn isa() -> Isa {
    static ISA: LazyLock<Isa> =
        LazyLock::new(|| Isa::from_env().expect("GPT2RS_ISA names an instruction set of this machine"));
    *ISA
}

/// Values in -1..1 that follow no pattern a processor could learn.
fn values(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn elements<W: Element>(len: usize) -> Vec<W> {
    values(len).into_iter().map(W::from_f32).collect()
}

fn type_name<W: Element>() -> &'static str {
    if size_of::<W>() == 2 { "bfloat16" } else { "float32" }
}

/// As in `matmul decode/float32/avx512`.
fn id<W: Element>() -> BenchmarkId {
    BenchmarkId::new(type_name::<W>(), isa().name())
}

/// One row times the LM head, 154 MB in float32: more than a last-level cache holds, so that it comes from memory.
fn matmul_decode<W: Element>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let packed: Vec<W> = elements(Panels::<W>::packed_len(C, V));
    let w = Panels::new(&packed, C, V);
    let x = values(C);
    let mut out = vec![0.0; V];
    group.throughput(Throughput::Bytes(size_of_val(packed.as_slice()) as u64));
    group.bench_function(id::<W>(), |bencher| bencher.iter(|| matmul(&x, 1, w, &mut out)));
}

/// 512 rows times `mlp.c_fc`.
fn matmul_prefill<W: Element>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let n = 4 * C;
    let packed: Vec<W> = elements(Panels::<W>::packed_len(C, n));
    let w = Panels::new(&packed, C, n);
    let x = values(T * padded_stride(C));
    let mut out = vec![0.0; T * padded_stride(n)];
    group.throughput(Throughput::Elements((2 * T * C * n) as u64));
    group.bench_function(id::<W>(), |bencher| bencher.iter(|| matmul(&x, T, w, &mut out)));
}

fn matmul<W: Element>(x: &[f32], rows: usize, w: Panels<'_, W>, out: &mut [f32]) {
    let stride = if rows == 1 { w.n() } else { padded_stride(w.n()) };
    let x = Rows::new(x, if rows == 1 { w.k() } else { padded_stride(w.k()) }, w.k());
    for out in Columns::split(out, stride, rows, once(0..w.n())) {
        isa().run(MatMul { x, rows, w, bias: &[], then: Then::Store, out });
    }
}

/// All 12 heads of a layer, `rows` queries of which the last is at position `len - 1`.
struct Heads<T> {
    q: Vec<f32>,
    caches: Vec<Vec<Vec<T>>>,
    out: Vec<f32>,
    scratch: Vec<f32>,
    rows: usize,
    len: usize,
}

impl<T: Element> Heads<T> {
    fn new(rows: usize, len: usize) -> Heads<T> {
        let row = values(HS);
        let mut cache = vec![vec![T::default(); block_len(HS)]; len.div_ceil(BLOCK)];
        for position in 0..len {
            append(&mut cache[position / BLOCK], position % BLOCK, &row, &row);
        }
        let stride = padded_stride(C);
        Heads {
            q: values(rows * stride),
            caches: vec![cache; N_HEAD],
            out: vec![0.0; rows * stride],
            scratch: Vec::new(),
            rows,
            len,
        }
    }

    fn attend(&mut self) {
        let (stride, rows) = (padded_stride(C), self.rows);
        let q = Rows::new(&self.q, stride, C);
        let ranges = (0..N_HEAD).map(|head| head * HS..(head + 1) * HS);
        for (out, cache) in Columns::split(&mut self.out, stride, rows, ranges).into_iter().zip(&self.caches)
        {
            let blocks: Vec<&[T]> = cache.iter().map(Vec::as_slice).collect();
            isa().run(Attention {
                q: q.columns_of(out.range()),
                rows,
                position: self.len - rows,
                blocks: &blocks,
                scale: 0.125,
                out,
                scratch: &mut self.scratch,
            });
        }
    }
}

/// One query after 896 positions.
fn attention_decode<W: Element>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut heads = Heads::<W>::new(1, 896);
    group.throughput(Throughput::Bytes((2 * 896 * C * size_of::<W>()) as u64));
    group.bench_function(id::<W>(), |bencher| bencher.iter(|| heads.attend()));
}

/// 512 queries from position 0 on: 4 HS operations for each pair of a query and a key that it sees.
fn attention_prefill<W: Element>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut heads = Heads::<W>::new(T, T);
    group.throughput(Throughput::Elements((4 * C * T * (T + 1) / 2) as u64));
    group.bench_function(id::<W>(), |bencher| bencher.iter(|| heads.attend()));
}

/// 512 rows of the embedding that is packed as the LM head: a row's values lie a cache line or two apart.
fn embed_prefill<W: Element>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let packed: Vec<W> = elements(Panels::<W>::packed_len(C, V));
    let wte = Panels::new(&packed, C, V);
    let wpe = values(C);
    let mut out = vec![0.0; C];
    group.throughput(Throughput::Elements((T * C) as u64));
    group.bench_function(id::<W>(), |bencher| {
        bencher.iter(|| {
            for i in 0..T {
                embed(wte, i * 7919 % V, &wpe, black_box(&mut out));
            }
        });
    });
}

fn matmul_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul decode");
    matmul_decode::<f32>(&mut group);
    matmul_decode::<bf16>(&mut group);
    group.finish();
    let mut group = criterion.benchmark_group("matmul prefill");
    group.sampling_mode(SamplingMode::Flat);
    matmul_prefill::<f32>(&mut group);
    matmul_prefill::<bf16>(&mut group);
    group.finish();
}

fn attention_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention decode");
    attention_decode::<f32>(&mut group);
    attention_decode::<bf16>(&mut group);
    group.finish();
    let mut group = criterion.benchmark_group("attention prefill");
    attention_prefill::<f32>(&mut group);
    attention_prefill::<bf16>(&mut group);
    group.finish();
}

fn embed_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("embed");
    embed_prefill::<f32>(&mut group);
    embed_prefill::<bf16>(&mut group);
    group.finish();
}

fn layernorm_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("layernorm");
    let stride = padded_stride(C);
    let (weight, bias) = (values(C), values(C));
    for rows in [1, T] {
        let (x, mut out) = (values(rows * stride), vec![0.0; rows * stride]);
        group.throughput(Throughput::Elements((rows * C) as u64));
        group.bench_function(BenchmarkId::new(format!("{rows} rows"), isa().name()), |bencher| {
            bencher.iter(|| {
                let x = Rows::new(&x, stride, C);
                let (weight, bias, out) = (&weight[..], &bias[..], &mut out[..]);
                isa().run(LayerNorm { x, weight, bias, eps: 1e-5, out, out_stride: stride });
            });
        });
    }
    group.finish();
}

fn activation_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("activation");
    let x = values(4 * C);
    let mut out = x.clone();
    group.throughput(Throughput::Elements(x.len() as u64));
    for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
        group.bench_function(BenchmarkId::new(format!("{activation:?}"), isa().name()), |bencher| {
            bencher.iter(|| {
                // In place: without the copy the values would run towards zero.
                out.copy_from_slice(&x);
                activate_all(isa(), activation, &mut out);
            });
        });
    }
    group.finish();
}

fn sampling_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sampling");
    let logits: Vec<f32> = values(V).into_iter().map(|value| 10.0 * value).collect();
    let tokens: Vec<u32> = (0..100).collect();
    let mut scratch = Scratch::default();
    let sampled = Sampling { do_sample: true, temperature: 0.8, ..Sampling::default() };
    let settings = [
        ("argmax", Sampling::default()),
        ("temperature", sampled.clone()),
        ("temperature, top_p", Sampling { top_p: Some(0.95), ..sampled.clone() }),
        ("temperature, top_k, top_p", Sampling { top_k: Some(50), top_p: Some(0.95), ..sampled }),
    ];
    group.throughput(Throughput::Elements(V as u64));
    for (name, settings) in settings {
        group.bench_function(BenchmarkId::new(name, isa().name()), |bencher| {
            bencher.iter(|| settings.choose(isa(), &logits, &tokens, &mut scratch).unwrap());
        });
    }
    group.finish();
}

/// Short enough that all of them take a minute; criterion's flags set other times.
fn settings() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
}

criterion_group! {
    name = ops;
    config = settings();
    targets = matmul_benches, attention_benches, layernorm_benches, activation_benches, embed_benches, sampling_benches
}
criterion_main!(ops);
