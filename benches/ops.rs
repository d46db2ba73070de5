//! Each operation alone, on one thread and in the shapes of 124M: C = 768, 12 heads of 64, V = 50257.
//!
//! `GPT2RS_ISA` chooses the instruction set. What decode does once a token is given in bytes read: its limit is the
//! bandwidth of memory. What prefill does is given in floating-point operations ("elements"): its limit is the FMA peak.
//! `benches/model.rs` measures both limits beside whole models.

use bytemuck::Zeroable;
use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use gpt2rs::config::Activation;
use gpt2rs::mapped::{Arena, Line};
use gpt2rs::ops::attention::{self, Append, Attention, BLOCK, Cached, block_bytes};
use gpt2rs::ops::embed::embed;
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::layernorm::LayerNorm;
use gpt2rs::ops::matmul::{MatMul, Product, Quantised, Steps, Then};
use gpt2rs::ops::pairs::{Bf16, Bf16Dots, F32, Int8};
use gpt2rs::ops::panels::{Format, Int4Groups, Int8Groups, NR, Panels};
use gpt2rs::ops::round::{QuantiseRows, RoundRows};
use gpt2rs::ops::{Rows, padded_stride};
use gpt2rs::pool::Columns;
use gpt2rs::sample::{Sampling, Scratch};
use gpt2rs::simd::Isa;
use half::bf16;
use std::hint::black_box;
use std::iter::once;
use std::marker::PhantomData;
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

/// As in `matmul decode/float32/avx512`.
fn id(name: &str) -> BenchmarkId {
    BenchmarkId::new(name, isa().name())
}

/// A (K, N) matrix in panels. One group's values, again and again: no kernel's time depends on them.
fn pack<F: Format>(k: usize, n: usize) -> Arena {
    let mut packed = Arena::new(Panels::<F>::packed_len(k, n)).expect("memory");
    let mut group = vec![Line::zeroed(); F::GROUP_BYTES / size_of::<Line>()];
    let group: &mut [u8] = bytemuck::cast_slice_mut(&mut group);
    F::encode(values(F::GROUP * NR).as_chunks::<NR>().0, group);
    packed.bytes_mut().chunks_exact_mut(F::GROUP_BYTES).for_each(|packed| packed.copy_from_slice(group));
    packed
}

/// Room for activations in the types that narrow weights take.
#[derive(Default)]
struct Inputs {
    rounded: Vec<[bf16; 2]>,
    values: Vec<[[i8; 4]; 2]>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

/// A format, with how it is run: from float32 activations, whose rounding is part of the work.
trait Benched: Product {
    const NAME: &str;
    fn inputs<'a>(x: Rows<'a>, rows: usize, data: &'a [f32], inputs: &'a mut Inputs) -> Self::Inputs<'a>;
    fn run(product: MatMul<'_, Self>) {
        isa().run(product);
    }
}

macro_rules! benched {
    ($format:ty, $name:literal) => {
        impl Benched for $format {
            const NAME: &str = $name;
            fn inputs<'a>(x: Rows<'a>, _: usize, data: &'a [f32], _: &'a mut Inputs) -> Self::Inputs<'a> {
                Rows::new(bytemuck::cast_slice(data), x.stride() / 2, x.columns() / 2)
            }
        }
    };
    ($format:ty, $name:literal, in groups) => {
        impl Benched for $format {
            const NAME: &str = $name;
            fn inputs<'a>(
                x: Rows<'a>,
                rows: usize,
                _: &'a [f32],
                inputs: &'a mut Inputs,
            ) -> Self::Inputs<'a> {
                let groups = x.columns().div_ceil(Self::GROUP);
                let steps = groups * Self::GROUP / 8;
                let sums = groups * (Self::GROUP / Self::SUM);
                inputs.values.resize(rows * steps, [[0; 4]; 2]);
                inputs.scales.resize(rows * groups, 0.0);
                inputs.starts.resize(rows * sums, 0);
                let Inputs { values, scales, starts, .. } = inputs;
                let (bytes, format) = (bytemuck::cast_slice_mut(values), PhantomData::<Self>);
                isa().run(QuantiseRows { x, rows, rotation: 1, values: bytes, scales, starts, format });
                Quantised {
                    values: Rows::new(values, steps, steps),
                    scales: Rows::new(scales, groups, groups),
                    starts: Rows::new(starts, sums, sums),
                }
            }
        }
    };
}

benched!(F32, "float32");
benched!(Bf16, "bfloat16");
benched!(Int8Groups, "int8", in groups);
benched!(Int4Groups, "int4", in groups);

impl Benched for Bf16Dots {
    const NAME: &str = "bfloat16, fast";
    fn inputs<'a>(x: Rows<'a>, rows: usize, _: &'a [f32], inputs: &'a mut Inputs) -> Rows<'a, [bf16; 2]> {
        let stride = x.stride() / 2;
        inputs.rounded.resize(rows * stride, [bf16::ZERO; 2]);
        isa().run(RoundRows { x, rows, out: &mut inputs.rounded, stride });
        Rows::new(&inputs.rounded, stride, x.columns() / 2)
    }
    fn run(product: MatMul<'_, Bf16Dots>) {
        isa().run_flushing(product);
    }
}

/// One row times the LM head, 154 MB in float32: more than a last-level cache holds, so that it comes from memory.
fn matmul_decode<F: Benched>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut packed = pack::<F>(C, V);
    let packed: &[u8] = packed.bytes_mut();
    let x = values(padded_stride(C));
    let (mut out, mut inputs) = (vec![0.0; V], Inputs::default());
    group.throughput(Throughput::Bytes(packed.len() as u64));
    group.bench_function(id(F::NAME), |bencher| {
        bencher.iter(|| matmul::<F>(&x, 1, Panels::new(packed, C, V), V, &mut out, &mut inputs));
    });
}

/// 512 rows times `mlp.c_fc`.
fn matmul_prefill<F: Benched>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let n = 4 * C;
    let mut packed = pack::<F>(C, n);
    let packed: &[u8] = packed.bytes_mut();
    let x = values(T * padded_stride(C));
    let (mut out, mut inputs) = (vec![0.0; T * padded_stride(n)], Inputs::default());
    group.throughput(Throughput::Elements((2 * T * C * n) as u64));
    group.bench_function(id(F::NAME), |bencher| {
        let w = Panels::new(packed, C, n);
        bencher.iter(|| matmul::<F>(&x, T, w, padded_stride(n), &mut out, &mut inputs));
    });
}

fn matmul<F: Benched>(
    x: &[f32],
    rows: usize,
    w: Panels<'_, F>,
    stride: usize,
    out: &mut [f32],
    inputs: &mut Inputs,
) {
    let x = F::inputs(Rows::new(x, padded_stride(C), C), rows, x, inputs);
    for out in Columns::split(out, stride, rows, once(0..w.n())) {
        F::run(MatMul { x, rows, w, bias: &[], then: Then::Store, out });
    }
}

/// A kind of cache, with how it is run.
trait BenchedCache: Cached {
    const NAME: &str;
    fn run(attention: Attention<'_, Self>) {
        isa().run(attention);
    }
}

impl BenchedCache for F32 {
    const NAME: &str = "float32";
}
impl BenchedCache for Bf16 {
    const NAME: &str = "bfloat16";
}
impl BenchedCache for Int8 {
    const NAME: &str = "int8";
}
impl BenchedCache for Bf16Dots {
    const NAME: &str = "bfloat16, fast";
    fn run(attention: Attention<'_, Bf16Dots>) {
        isa().run_flushing(attention);
    }
}

/// All 12 heads of a layer, `rows` queries of which the last is at position `len - 1`.
struct Heads<P> {
    q: Vec<f32>,
    caches: Vec<Vec<Vec<Line>>>,
    out: Vec<f32>,
    scratch: attention::Scratch,
    rows: usize,
    len: usize,
    cached: PhantomData<P>,
}

impl<P: BenchedCache> Heads<P> {
    fn new(rows: usize, len: usize) -> Heads<P> {
        let kept = values(len * HS);
        let block = vec![Line::zeroed(); block_bytes::<P>(HS) / size_of::<Line>()];
        let mut cache = vec![block; len.div_ceil(BLOCK)];
        let mut blocks: Vec<&mut [u8]> =
            cache.iter_mut().map(|block| bytemuck::cast_slice_mut(block)).collect();
        let (keys, values_of_keys) = (Rows::new(&kept, HS, HS), Rows::new(&kept, HS, HS));
        isa().run(Append::<P> {
            keys,
            values: values_of_keys,
            rows: len,
            first: 0,
            blocks: &mut blocks,
            cached: PhantomData,
        });
        let stride = padded_stride(C);
        Heads {
            q: values(rows * stride),
            caches: vec![cache; N_HEAD],
            out: vec![0.0; rows * stride],
            scratch: attention::Scratch::default(),
            rows,
            len,
            cached: PhantomData,
        }
    }

    fn attend(&mut self) {
        let (stride, rows) = (padded_stride(C), self.rows);
        let q = Rows::new(&self.q, stride, C);
        let ranges = (0..N_HEAD).map(|head| head * HS..(head + 1) * HS);
        for (out, cache) in Columns::split(&mut self.out, stride, rows, ranges).into_iter().zip(&self.caches)
        {
            let blocks: Vec<&[u8]> = cache.iter().map(|block| bytemuck::cast_slice(block)).collect();
            P::run(Attention {
                q: q.columns_of(out.range()),
                rows,
                position: self.len - rows,
                blocks: &blocks,
                cached: self.cached,
                scale: 0.125,
                out,
                scratch: &mut self.scratch,
            });
        }
    }
}

/// One query after 896 positions.
fn attention_decode<P: BenchedCache>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut heads = Heads::<P>::new(1, 896);
    group.throughput(Throughput::Bytes((N_HEAD * 896 / BLOCK * block_bytes::<P>(HS)) as u64));
    group.bench_function(id(P::NAME), |bencher| bencher.iter(|| heads.attend()));
}

/// 512 queries from position 0 on: 4 HS operations for each pair of a query and a key that it sees.
fn attention_prefill<P: BenchedCache>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut heads = Heads::<P>::new(T, T);
    group.throughput(Throughput::Elements((4 * C * T * (T + 1) / 2) as u64));
    group.bench_function(id(P::NAME), |bencher| bencher.iter(|| heads.attend()));
}

/// 512 rows of the embedding that is packed as the LM head: a row's values lie a cache line or two apart.
fn embed_prefill<F: Benched>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let mut packed = pack::<F>(C, V);
    let wte = Panels::<F>::new(packed.bytes_mut(), C, V);
    let wpe = values(C);
    let mut out = vec![0.0; C];
    group.throughput(Throughput::Elements((T * C) as u64));
    group.bench_function(id(F::NAME), |bencher| {
        bencher.iter(|| {
            for i in 0..T {
                embed(wte, i * 7919 % V, &wpe, black_box(&mut out));
            }
        });
    });
}

fn matmul_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul decode");
    matmul_decode::<F32>(&mut group);
    matmul_decode::<Bf16>(&mut group);
    matmul_decode::<Bf16Dots>(&mut group);
    matmul_decode::<Int8Groups>(&mut group);
    matmul_decode::<Int4Groups>(&mut group);
    group.finish();
    let mut group = criterion.benchmark_group("matmul prefill");
    group.sampling_mode(SamplingMode::Flat);
    matmul_prefill::<F32>(&mut group);
    matmul_prefill::<Bf16>(&mut group);
    matmul_prefill::<Bf16Dots>(&mut group);
    matmul_prefill::<Int8Groups>(&mut group);
    matmul_prefill::<Int4Groups>(&mut group);
    group.finish();
}

fn attention_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention decode");
    attention_decode::<F32>(&mut group);
    attention_decode::<Bf16>(&mut group);
    attention_decode::<Bf16Dots>(&mut group);
    attention_decode::<Int8>(&mut group);
    group.finish();
    let mut group = criterion.benchmark_group("attention prefill");
    attention_prefill::<F32>(&mut group);
    attention_prefill::<Bf16>(&mut group);
    attention_prefill::<Bf16Dots>(&mut group);
    attention_prefill::<Int8>(&mut group);
    group.finish();
}

fn embed_benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("embed");
    embed_prefill::<F32>(&mut group);
    embed_prefill::<Bf16>(&mut group);
    embed_prefill::<Int8Groups>(&mut group);
    embed_prefill::<Int4Groups>(&mut group);
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
