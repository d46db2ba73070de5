//! One answer: the logits of a token sequence are the same bits whatever computes them, and however they are come by.
//!
//! One instruction set (portable), one thread and one pass give the reference. Everything else is held against its bits:
//! threads x instruction set x {alone, in a ragged batch of 7} x {one pass, pieces of 1, 7, 64, 65 tokens} x {fresh,
//! forked, truncated cache} x {the caller's floating-point mode}, for every type of weights and of caches.

use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::{Config, Precision};
use gpt2rs::kv_cache::KvCache;
use gpt2rs::model::{Model, Options, Run, Wanted};
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};

mod calls;
mod every_way;
mod floating_point_mode;
mod speculation;

/// No size is a whole number of registers, a head's 20 channels neither, and the vocabulary ends inside a panel.
const ODD: &str =
    r#"{"n_layer": 2, "n_head": 3, "n_embd": 60, "n_inner": 100, "n_positions": 256, "vocab_size": 301}"#;
/// One head of GPT-2's own size.
const WIDE: &str = r#"{"n_layer": 1, "n_head": 1, "n_embd": 64, "n_positions": 256, "vocab_size": 96, "activation_function": "gelu"}"#;
/// More positions than rows in a pass.
const LONG: &str = r#"{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 700, "vocab_size": 40}"#;

const GO_ON: &dyn Fn() -> bool = &|| true;

/// Text `which`: tokens of a small linear congruential generator.
fn text(which: usize, len: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = 12345 + 977 * which as u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % n_vocab as u32
        })
        .collect()
}

/// Weights large enough that attention is far from uniform and that a change in any order of sums shows. The last
/// eight tokens have subnormal embeddings, and so subnormal logits: zero to who flushes them.
fn checkpoint(json: &str) -> Checkpoint {
    let mut state = 1u64;
    let mut values = |len: usize, scale: f32| -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
            })
            .collect()
    };
    let Config { n_embd: c, n_vocab, n_ctx, n_inner, n_layer, .. } = Config::from_json(json).unwrap();
    let mut checkpoint = Checkpoint::new();
    let mut add = |name: String, values: Vec<f32>, shape: &[usize]| {
        checkpoint.add_array(&name, values, shape, false).unwrap();
    };
    let mut wte = values(n_vocab * c, 0.3);
    wte[(n_vocab - 8) * c..].iter_mut().for_each(|value| *value *= 1e-38);
    add("wte.weight".into(), wte, &[n_vocab, c]);
    add("wpe.weight".into(), values(n_ctx * c, 0.3), &[n_ctx, c]);
    let norms = (0..n_layer).flat_map(|i| [format!("h.{i}.ln_1"), format!("h.{i}.ln_2")]);
    for name in norms.chain(["ln_f".to_owned()]) {
        add(format!("{name}.weight"), values(c, 1.5), &[c]);
        add(format!("{name}.bias"), values(c, 0.2), &[c]);
    }
    for i in 0..n_layer {
        for (name, k, n) in [
            ("attn.c_attn", c, 3 * c),
            ("attn.c_proj", c, c),
            ("mlp.c_fc", c, n_inner),
            ("mlp.c_proj", n_inner, c),
        ] {
            add(format!("h.{i}.{name}.weight"), values(k * n, 0.5), &[k, n]);
            add(format!("h.{i}.{name}.bias"), values(n, 0.2), &[n]);
        }
    }
    checkpoint
}

/// How a model is held and run.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Types {
    dtype: Dtype,
    kv_dtype: Dtype,
    precision: Precision,
}

const FLOAT32: Types = Types { dtype: Dtype::F32, kv_dtype: Dtype::F32, precision: Precision::Exact };
const BFLOAT16: Types = Types { dtype: Dtype::BF16, kv_dtype: Dtype::BF16, precision: Precision::Exact };
const FAST: Types = Types { precision: Precision::Fast, ..BFLOAT16 };
const INT8: Types = Types { dtype: Dtype::Int8, kv_dtype: Dtype::Int8, precision: Precision::Exact };
const INT4: Types = Types { dtype: Dtype::Int4, ..INT8 };

/// Each type of weights with the cache that it has unless another is asked for.
const USUAL: [Types; 5] = [FLOAT32, BFLOAT16, FAST, INT8, INT4];

impl Types {
    fn cached_in(self, kv_dtype: Dtype) -> Types {
        Types { kv_dtype, ..self }
    }

    fn options(self, isa: Isa, n_threads: usize) -> Options {
        let Types { dtype, kv_dtype, precision } = self;
        Options { dtype, kv_dtype: Some(kv_dtype), precision, n_threads: Some(n_threads), isa: Some(isa) }
    }
}

fn model(json: &str, types: Types, isa: Isa, n_threads: usize) -> Model {
    packed(&checkpoint(json), json, types, isa, n_threads)
}

fn packed(checkpoint: &Checkpoint, json: &str, types: Types, isa: Isa, n_threads: usize) -> Model {
    let config = Config::from_json(json).unwrap();
    Model::new(config, Origin::Checkpoint(checkpoint), types.options(isa, n_threads)).unwrap()
}

/// The model that gives the reference.
fn reference(json: &str, types: Types) -> Model {
    model(json, types, Isa::named("portable").unwrap(), 1)
}

fn fastest() -> Isa {
    *Isa::available().last().unwrap()
}

/// `tokens` computed in one pass after what `cache` holds: logits of all, (tokens, V).
fn pass(model: &Model, cache: &mut KvCache, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; tokens.len() * model.config().n_vocab];
    model.forward(&mut [Run { tokens, cache, wanted: 1 }], Wanted::All(&mut logits), GO_ON).unwrap();
    logits
}

#[track_caller]
fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differs = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = differs {
        panic!("{what}: logit {i} is {:e}, not {:e}", found[i], expected[i]);
    }
}
