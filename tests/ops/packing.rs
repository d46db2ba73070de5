//! Named tensors into panels and back.

use super::*;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::{Config, MAX_CTX, MAX_EMBD, MAX_INNER, MAX_LAYER, MAX_VOCAB};
use gpt2rs::ops::pairs::F32;
use gpt2rs::ops::panels::{Int4Groups, Int8Groups};
use gpt2rs::weights::{Dtype, Matrix, Origin, Weights, packed_bytes};
use half::bf16;
use proptest::prelude::*;

/// The nearest bfloat16, by the distances to its two neighbours: of two that are equally near, the even one.
fn nearest_bf16(value: f32) -> u16 {
    let toward_zero = (value.to_bits() >> 16) as u16;
    if value.is_nan() || value.is_infinite() {
        return bf16::from_f32(value).to_bits();
    }
    // The neighbour of the greatest number is where the next binade would begin.
    let read = |bits: u16| match f64::from(bf16::from_bits(bits).to_f32()) {
        infinite if infinite.is_infinite() => 2.0f64.powi(128).copysign(infinite),
        finite => finite,
    };
    let (near, far) = (read(toward_zero), read(toward_zero + 1));
    let (below, above) = ((f64::from(value) - near).abs(), (far - f64::from(value)).abs());
    if below < above || (below == above && toward_zero.is_multiple_of(2)) {
        toward_zero
    } else {
        toward_zero + 1
    }
}

/// A matrix's elements as float32, (K, N) or (N, K) row-major.
fn unpacked(matrix: &Matrix, by_column: bool) -> Vec<f32> {
    let bytes = matrix.unpack(by_column);
    match matrix.dtype() {
        Dtype::F32 | Dtype::Int8 | Dtype::Int4 => {
            bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        }
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| bf16::from_bits(u16::from_le_bytes(bytes)).to_f32())
            .collect(),
    }
}

/// What a matrix (K, N) of these values holds: rounded, or in groups along K.
fn expected(dtype: Dtype, values: &[f32], k: usize, n: usize) -> Vec<f32> {
    fn through<F: Format>(values: &[f32], k: usize, n: usize) -> Vec<f32> {
        held(Panels::<F>::new(bytemuck::cast_slice(&pack::<F>(values, k, n)), k, n))
    }
    match dtype {
        Dtype::F32 => through::<F32>(values, k, n),
        Dtype::BF16 => values.iter().map(|&value| bf16::from_bits(nearest_bf16(value)).to_f32()).collect(),
        Dtype::Int8 => through::<Int8Groups>(values, k, n),
        Dtype::Int4 => through::<Int4Groups>(values, k, n),
    }
}

/// Each column (K) times the Hadamard matrix of n values that are 16 apart, by its definition.
fn rotated(values: &[f32], columns: usize, n: usize) -> Vec<f32> {
    let of = |k: usize, column: usize| {
        let (block, i, lane) = (k / (16 * n), k / 16 % n, k % 16);
        let term = |j: usize| {
            let sign = if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            sign * f64::from(values[((block * n + j) * 16 + lane) * columns + column])
        };
        ((0..n).map(term).sum::<f64>() / (n as f64).sqrt()) as f32
    };
    (0..values.len()).map(|i| of(i / columns, i % columns)).collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum::<f64>().sqrt()
}

fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values[column..].iter().step_by(columns)).copied().collect()
}

const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::Int8, Dtype::Int4];

/// Values that round in every way: ties to either side, up to infinity, subnormals, both zeros.
const DELICATE: [u32; 10] = [
    0x3f80_8000,
    0x3f81_8000,
    0xbf80_8000,
    0x3f80_8001,
    0x3f80_7fff,
    0x7f7f_ffff,
    0x0001_8000,
    0x8000_0001,
    0x8000_0000,
    0xff80_0000,
];

struct Shapes {
    c: usize,
    n_inner: usize,
    n_vocab: usize,
}

impl Shapes {
    fn config(&self) -> Config {
        let Shapes { c, n_inner, n_vocab } = self;
        let text = format!(
            r#"{{"n_layer": 1, "n_head": 1, "n_embd": {c}, "n_inner": {n_inner}, "n_positions": 3, "vocab_size": {n_vocab}}}"#
        );
        Config::from_json(&text).unwrap()
    }

    /// (name, K, N) of the block's matrices.
    fn matrices(&self) -> [(&'static str, usize, usize); 4] {
        let (c, n_inner) = (self.c, self.n_inner);
        [
            ("h.0.attn.c_attn.weight", c, 3 * c),
            ("h.0.attn.c_proj.weight", c, c),
            ("h.0.mlp.c_fc.weight", c, n_inner),
            ("h.0.mlp.c_proj.weight", n_inner, c),
        ]
    }

    fn check(&self, transposed: bool, dtype: Dtype, n_threads: usize, seed: u64) {
        let mut random = Random(seed);
        let mut values = |len: usize| {
            let mut values = random.values(len, 1.0);
            if dtype.is_integer() {
                return values;
            }
            values.iter_mut().zip(DELICATE).for_each(|(value, bits)| *value = f32::from_bits(bits));
            values
        };
        let (c, config) = (self.c, self.config());
        let mut checkpoint = Checkpoint::new();
        let wte = values(self.n_vocab * c);
        checkpoint.add_array("wte.weight", wte.clone(), &[self.n_vocab, c], false).unwrap();
        checkpoint.add_array("wpe.weight", values(3 * c), &[3, c], false).unwrap();
        for name in ["h.0.ln_1.weight", "h.0.ln_2.weight", "ln_f.weight"] {
            // Channels of one size: others are brought to it, and rows of the matrices behind them changed.
            let gains = if dtype.is_integer() { vec![1.0; c] } else { values(c) };
            checkpoint.add_array(name, gains, &[c], false).unwrap();
        }
        let stored: Vec<Vec<f32>> = self.matrices().iter().map(|&(_, k, n)| values(k * n)).collect();
        for ((name, k, n), values) in self.matrices().into_iter().zip(&stored) {
            if transposed {
                checkpoint.add_array(name, transpose(values, n), &[n, k], true).unwrap();
            } else {
                checkpoint.add_array(name, values.clone(), &[k, n], false).unwrap();
            }
        }

        let weights = Weights::new(&config, Origin::Checkpoint(&checkpoint), dtype, n_threads).unwrap();
        let h = &weights.h[0];
        let matrices = [&h.attn.c_attn, &h.attn.c_proj, &h.mlp.c_fc, &h.mlp.c_proj];
        for ((matrix, values), (name, k, n)) in matrices.into_iter().zip(&stored).zip(self.matrices()) {
            assert_eq!(
                (matrix.weight.k(), matrix.weight.n(), matrix.weight.dtype()),
                (k, n, dtype),
                "{name}"
            );
            let found = unpacked(&matrix.weight, false);
            let rotation = matrix.weight.rotation();
            if rotation == 1 {
                assert_eq!(bits(&found), bits(&expected(dtype, values, k, n)), "{name}");
            } else {
                assert!(
                    dtype.is_integer() && name.contains("c_proj") && k.is_multiple_of(rotation * 16),
                    "{name}"
                );
                let part = if dtype == Dtype::Int8 { 0.01 } else { 0.15 };
                let error = distance(&rotated(&found, n, rotation), values);
                assert!(error < part * distance(&vec![0.0; k * n], values), "{name}: {error}");
            }
            assert_eq!(bits(&unpacked(&matrix.weight, true)), bits(&transpose(&found, n)), "{name}");
            assert_eq!(matrix.bias, vec![0.0; n], "a bias that the checkpoint lacks");
        }
        assert_eq!((weights.wte.k(), weights.wte.n(), weights.wte.dtype()), (c, self.n_vocab, dtype));
        let held = expected(dtype, &transpose(&wte, c), c, self.n_vocab);
        assert_eq!(bits(&unpacked(&weights.wte, false)), bits(&held));
        assert_eq!(packed_bytes(&config, dtype), weights.bytes() as u64);
        assert!(weights.lm_head.is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(
        c in 1usize..=70,
        n_inner in 1usize..=130,
        n_vocab in 1usize..=140,
        transposed: bool,
        dtype in prop::sample::select(DTYPES.to_vec()),
        n_threads in 1usize..=3,
        seed: u64,
    ) {
        Shapes { c, n_inner, n_vocab }.check(transposed, dtype, n_threads, seed);
    }
}

/// Stored rows that are read in several pieces, and columns that are several tasks.
#[test]
fn matrices_of_many_pieces() {
    for transposed in [false, true] {
        for dtype in DTYPES {
            Shapes { c: 150, n_inner: 2100, n_vocab: 2100 }.check(transposed, dtype, 3, 4);
        }
    }
}

/// Separate query, key and value weights, each (C, C) stored (out, in), are one matrix.
#[test]
fn appended_parts_are_one_matrix() {
    let c = 20;
    let mut random = Random(8);
    let mut checkpoint = Checkpoint::new();
    checkpoint.add_array("wte.weight", random.values(5 * c, 1.0), &[5, c], false).unwrap();
    checkpoint.add_array("wpe.weight", random.values(3 * c, 1.0), &[3, c], false).unwrap();
    for name in ["h.0.ln_1.weight", "h.0.ln_2.weight", "ln_f.weight"] {
        checkpoint.add_array(name, random.values(c, 1.0), &[c], false).unwrap();
    }
    let parts: Vec<Vec<f32>> = (0..3).map(|_| random.values(c * c, 1.0)).collect();
    for part in &parts {
        checkpoint.add_array("h.0.attn.c_attn.weight", part.clone(), &[c, c], true).unwrap();
    }
    let shapes = Shapes { c, n_inner: 7, n_vocab: 5 };
    for (name, k, n) in &shapes.matrices()[1..] {
        checkpoint.add_array(name, random.values(k * n, 1.0), &[*k, *n], false).unwrap();
    }
    let weights = Weights::new(&shapes.config(), Origin::Checkpoint(&checkpoint), Dtype::F32, 2).unwrap();
    assert_eq!(bits(&unpacked(&weights.h[0].attn.c_attn.weight, true)), bits(&parts.concat()));
}

/// Published sizes, and one with every kind of padding, as they are counted and as they are held.
#[test]
fn packed_bytes_are_those_held() {
    let untied = r#"{"n_layer": 2, "n_head": 3, "n_embd": 12, "n_inner": 50, "n_positions": 8, "vocab_size": 33,
        "model_type": "gpt2", "tie_word_embeddings": false}"#;
    let config = Config::from_json(untied).unwrap();
    for dtype in DTYPES {
        let weights = Weights::new(&config, Origin::Random { seed: 1 }, dtype, 2).unwrap();
        assert_eq!(packed_bytes(&config, dtype), weights.bytes() as u64, "{dtype:?}");
    }
    // wte and lm_head (12, 64); per block c_attn (12, 64), c_proj (12, 32), c_fc (12, 64), c_proj (50, 32).
    let weights = 2 * 12 * 64 + 2 * (12 * 64 + 12 * 32 + 12 * 64 + 50 * 32);
    // wpe; per block two norms and biases of 36, 12, 50, 12; ln_f.
    let floats = 8 * 12 + 2 * (4 * 12 + 36 + 12 + 50 + 12) + 2 * 12;
    assert_eq!(packed_bytes(&config, Dtype::F32), 4 * (weights + floats));
    assert_eq!(packed_bytes(&config, Dtype::BF16), 2 * weights + 4 * floats);

    let gpt2 = Config::preset("gpt2").unwrap();
    let matrices: u64 = gpt2.block_matrices().iter().map(|&(k, n)| (k * n) as u64).sum();
    for (dtype, bits) in [(Dtype::F32, 32.0), (Dtype::BF16, 16.0), (Dtype::Int8, 8.5), (Dtype::Int4, 4.5)] {
        let wte_bits = if dtype == Dtype::Int4 { 8.5 } else { bits };
        let most = (12 * matrices) as f64 * bits / 8.0 + (768 * 50272) as f64 * wte_bits / 8.0;
        let found = packed_bytes(&gpt2, dtype) - 4 * gpt2.vectors();
        assert!(found as f64 <= most, "{dtype:?}: {found} above {most}");
    }
}

#[test]
fn packed_bytes_of_the_largest_config_overflow_nothing() {
    let config = Config::from_json(&format!(
        r#"{{"vocab_size": {MAX_VOCAB}, "n_positions": {MAX_CTX}, "n_embd": {MAX_EMBD}, "n_head": 1,
            "n_inner": {MAX_INNER}, "n_layer": {MAX_LAYER}, "tie_word_embeddings": false}}"#
    ))
    .unwrap();
    for dtype in DTYPES {
        let bytes = packed_bytes(&config, dtype);
        assert!((1 << 48..1 << 56).contains(&bytes), "{dtype:?}: {bytes}");
    }
}
