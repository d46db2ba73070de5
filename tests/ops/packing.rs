//! Named tensors into panels and back.

use super::*;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::weights::{Dtype, Matrix, Origin, Weights};
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
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| bf16::from_bits(u16::from_le_bytes(bytes)).to_f32())
            .collect(),
    }
}

fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values[column..].iter().step_by(columns)).copied().collect()
}

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
            values.iter_mut().zip(DELICATE).for_each(|(value, bits)| *value = f32::from_bits(bits));
            values
        };
        let (c, config) = (self.c, self.config());
        let mut checkpoint = Checkpoint::new();
        let wte = values(self.n_vocab * c);
        checkpoint.add_array("wte.weight", wte.clone(), &[self.n_vocab, c], false).unwrap();
        checkpoint.add_array("wpe.weight", values(3 * c), &[3, c], false).unwrap();
        for name in ["h.0.ln_1.weight", "h.0.ln_2.weight", "ln_f.weight"] {
            checkpoint.add_array(name, values(c), &[c], false).unwrap();
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
        let held = |values: &[f32]| -> Vec<f32> {
            let round = |&value: &f32| match dtype {
                Dtype::F32 => value,
                Dtype::BF16 => bf16::from_bits(nearest_bf16(value)).to_f32(),
            };
            values.iter().map(round).collect()
        };
        let h = &weights.h[0];
        let matrices = [&h.attn.c_attn, &h.attn.c_proj, &h.mlp.c_fc, &h.mlp.c_proj];
        for ((matrix, values), (name, k, n)) in matrices.into_iter().zip(&stored).zip(self.matrices()) {
            assert_eq!(
                (matrix.weight.k(), matrix.weight.n(), matrix.weight.dtype()),
                (k, n, dtype),
                "{name}"
            );
            assert_eq!(bits(&unpacked(&matrix.weight, false)), bits(&held(values)), "{name}");
            assert_eq!(bits(&unpacked(&matrix.weight, true)), bits(&transpose(&held(values), n)), "{name}");
            assert_eq!(matrix.bias, vec![0.0; n], "a bias that the checkpoint lacks");
        }
        assert_eq!((weights.wte.k(), weights.wte.n()), (c, self.n_vocab));
        assert_eq!(bits(&unpacked(&weights.wte, true)), bits(&held(&wte)));
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
        bfloat16: bool,
        n_threads in 1usize..=3,
        seed: u64,
    ) {
        let dtype = if bfloat16 { Dtype::BF16 } else { Dtype::F32 };
        Shapes { c, n_inner, n_vocab }.check(transposed, dtype, n_threads, seed);
    }
}

/// Stored rows that are read in several pieces, and columns that are several tasks.
#[test]
fn matrices_of_many_pieces() {
    for transposed in [false, true] {
        Shapes { c: 150, n_inner: 2100, n_vocab: 2100 }.check(transposed, Dtype::F32, 3, 4);
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
