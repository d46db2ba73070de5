//! A caller's floating-point mode changes no bit of an operation, and is back afterwards.

use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::Rows;
use gpt2rs::ops::attention::{Attention, append, block_len};
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::layernorm::LayerNorm;
use gpt2rs::ops::matmul::{MatMul, Panels, Then};
use gpt2rs::ops::softmax::exp;
use gpt2rs::pool::Columns;
use half::bf16;
use std::hint::black_box;
use std::iter::once;

/// Control bits of MXCSR: all exceptions masked, to nearest even, subnormals kept.
const DEFAULT: u32 = 0x1f80;
/// The rest of MXCSR says which exceptions have occurred.
const CONTROL: u32 = 0xffc0;

/// Flush-to-zero with denormals-are-zero; and rounding down, up and toward zero.
const MODES: [u32; 4] = [DEFAULT | 0x8040, DEFAULT | 0x2000, DEFAULT | 0x4000, DEFAULT | 0x6000];

fn read() -> u32 {
    let mut mode = 0u32;
    // SAFETY: stmxcsr writes the four bytes of a live u32.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode, options(nostack)) };
    mode
}

fn write(mode: u32) {
    // SAFETY: ldmxcsr reads the four bytes of a live u32; the modes here mask all exceptions, and what runs in another
    // mode than the default is the code under test and what compares bits.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode, options(nostack)) };
}

/// What `compute` gives in each mode is what it gives in the default one.
fn check(compute: impl Fn(Isa) -> Vec<f32>) {
    for isa in Isa::available() {
        let expected = compute(isa);
        for mode in MODES {
            write(mode);
            let values = compute(isa);
            let after = read();
            write(DEFAULT);
            assert_eq!(bits(&values), bits(&expected), "{} in mode {mode:#x}", isa.name());
            assert_eq!(after & CONTROL, mode, "{}: the mode after the call", isa.name());
        }
        assert!(expected.iter().any(|value| value.is_subnormal()), "nothing here could be flushed to zero");
    }
}

/// Half of them of common size, half so small that sums and products are subnormal.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut values = Random(seed).values(n, 1.0);
    values[n / 2..].iter_mut().for_each(|value| *value *= 1e-38);
    values
}

#[test]
fn the_mode_is_really_another() {
    #[inline(never)]
    fn third(x: f32) -> f32 {
        black_box(black_box(x) / black_box(3.0))
    }
    let nearest = third(1.0);
    write(MODES[1]);
    let down = third(1.0);
    write(MODES[0]);
    let flushed = third(f32::MIN_POSITIVE);
    write(DEFAULT);
    assert!(down < nearest && flushed == 0.0 && third(f32::MIN_POSITIVE) > 0.0);
}

#[test]
fn matmul() {
    let (rows, k, n) = (4, 50, 64);
    // Rows of the second half are tiny, so that all their products are.
    let x = values(rows * k, 1);
    let packed = Random(2).values(Panels::<f32>::packed_len(k, n), 0.1);
    let bf16: Vec<bf16> = packed.iter().map(|&value| bf16::from_f32(value)).collect();
    check(|isa| {
        let mut out = vec![0.0; 2 * rows * n];
        let (first, second) = out.split_at_mut(rows * n);
        let x = Rows::new(&x, k, k);
        let [part] = Columns::split(first, n, rows, once(0..n)).try_into().ok().unwrap();
        isa.run(MatMul { x, rows, w: Panels::new(&packed, k, n), bias: &[], then: Then::Store, out: part });
        let [part] = Columns::split(second, n, rows, once(0..n)).try_into().ok().unwrap();
        isa.run(MatMul { x, rows, w: Panels::new(&bf16, k, n), bias: &[], then: Then::Store, out: part });
        out
    });
}

#[test]
fn layernorm() {
    let c = 75;
    let (x, bias) = (Random(3).values(c, 1.0), values(c, 4));
    let mut weight = Random(5).values(c, 1.0);
    weight[c / 2..].fill(0.0);
    check(|isa| {
        let mut out = vec![0.0; c];
        let x = Rows::new(&x, c, c);
        isa.run(LayerNorm { x, weight: &weight, bias: &bias, eps: 1e-5, out: &mut out, out_stride: c });
        out
    });
}

#[test]
fn activations() {
    let x = values(100, 6);
    for activation in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
        check(|isa| {
            let mut out = x.clone();
            activate_all(isa, activation, &mut out);
            out
        });
    }
}

/// The exponential's own results are never subnormal; it takes subnormal arguments.
#[test]
fn exponential() {
    let x: Vec<f32> = Random(7).values(100, 80.0).into_iter().chain(values(100, 8)).collect();
    for isa in Isa::available() {
        let compute = || {
            let mut out = x.clone();
            exp(isa, &mut out);
            out
        };
        let expected = compute();
        for mode in MODES {
            write(mode);
            let (values, after) = (compute(), read());
            write(DEFAULT);
            assert_eq!((bits(&values), after & CONTROL), (bits(&expected), mode), "{}", isa.name());
        }
    }
}

#[test]
fn attention() {
    let (hs, len) = (40, 70);
    let mut random = Random(9);
    let q = random.values(len * hs, 1.0);
    let mut blocks = vec![vec![0.0f32; block_len(hs)]; len.div_ceil(16)];
    for position in 0..len {
        append(
            &mut blocks[position / 16],
            position % 16,
            &random.values(hs, 1.0),
            &values(hs, position as u64),
        );
    }
    let blocks: Vec<&[f32]> = blocks.iter().map(Vec::as_slice).collect();
    check(|isa| {
        let mut out = vec![0.0; len * hs];
        let [columns] = Columns::split(&mut out, hs, len, once(0..hs)).try_into().ok().unwrap();
        let q = Rows::new(&q, hs, hs);
        let mut scratch = Vec::new();
        let out_of = Attention {
            q,
            rows: len,
            position: 0,
            blocks: &blocks,
            scale: 0.3,
            out: columns,
            scratch: &mut scratch,
        };
        isa.run(out_of);
        out
    });
}
