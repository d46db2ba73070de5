//! A caller's floating-point mode changes no bit of an operation, and is back afterwards.

use super::matmul::Tested;
use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::Rows;
use gpt2rs::ops::attention::{Append, Attention, Cached, Scratch, block_bytes};
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::layernorm::LayerNorm;
use gpt2rs::ops::matmul::{MatMul, Then};
use gpt2rs::ops::pairs::{Bf16, Bf16Dots, F32, Int8};
use gpt2rs::ops::panels::{Int4Groups, Int8Groups};
use gpt2rs::ops::softmax::exp;
use gpt2rs::pool::Columns;
use gpt2rs::simd::{Kernel, Simd};
use std::hint::black_box;
use std::iter::once;
use std::marker::PhantomData;

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

/// What `compute` gives in each mode is what it gives in the default one; some of it is subnormal.
fn check(compute: impl Fn(Isa) -> Vec<f32>) {
    let values = check_modes(compute);
    assert!(values.iter().any(|value| value.is_subnormal()), "nothing here could be flushed to zero");
}

/// The same, whatever is computed.
fn check_modes(compute: impl Fn(Isa) -> Vec<f32>) -> Vec<f32> {
    let mut all = Vec::new();
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
        all.extend(expected);
    }
    all
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

/// The mode is the kernel's from the first operation to the last, and the caller's afterwards, after a panic, too.
#[test]
fn a_kernel_runs_in_the_mode_that_is_asked_for() {
    struct Halve(f32);
    impl Kernel for Halve {
        type Output = (f32, u32);
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> (f32, u32) {
            let mut lanes = [0.0; 16];
            simd.store(simd.mul(simd.splat(black_box(self.0)), simd.splat(black_box(0.5))), &mut lanes);
            (lanes[3], read())
        }
    }
    struct Fail;
    impl Kernel for Fail {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            panic!("a bug");
        }
    }
    let smallest = f32::MIN_POSITIVE;
    for isa in Isa::available() {
        for mode in [DEFAULT].into_iter().chain(MODES) {
            write(mode);
            let (kept, in_run) = isa.run(Halve(smallest));
            let after_run = read();
            let (flushed, in_flushing) = isa.run_flushing(Halve(smallest));
            let after_flushing = read();
            let failed = std::panic::catch_unwind(|| isa.run_flushing(Fail));
            let after_panic = read();
            write(DEFAULT);
            assert!(failed.is_err());
            assert_eq!((kept, flushed.to_bits()), (smallest / 2.0, 0), "{} in mode {mode:#x}", isa.name());
            assert_eq!([in_run & CONTROL, in_flushing & CONTROL], [DEFAULT, DEFAULT | 0x8040]);
            assert_eq!([after_run & CONTROL, after_flushing & CONTROL, after_panic & CONTROL], [mode; 3]);
        }
    }
}

/// Rows of the second half are tiny, so that all their products are.
fn product<F: Tested>() -> impl Fn(Isa) -> Vec<f32> {
    let (rows, k, n) = (4, 50, 64);
    let x = values(rows * k, 1);
    let packed = pack::<F>(&Random(2).values(k * n, 0.1), k, n);
    move |isa| {
        let w = Panels::new(bytemuck::cast_slice(&packed), k, n);
        let inputs = F::prepare(isa, &x, rows, k);
        let mut all = vec![0.0; rows * n];
        let [out] = Columns::split(&mut all, n, rows, once(0..n)).try_into().ok().unwrap();
        F::run(isa, MatMul { x: F::inputs(&inputs), rows, w, bias: &[], then: Then::Store, out });
        all
    }
}

#[test]
fn matmul() {
    check(product::<F32>());
    check(product::<Bf16>());
    check_modes(product::<Int8Groups>());
    check_modes(product::<Int4Groups>());
    let flushed = check_modes(product::<Bf16Dots>());
    assert!(flushed.iter().all(|value| !value.is_subnormal()) && flushed.contains(&0.0));
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

/// Queries over values of which half are tiny.
fn attended<P: Cached>(run: impl Fn(Isa, Attention<'_, P>)) -> impl Fn(Isa) -> Vec<f32> {
    let (hs, len) = (40, 70);
    let mut random = Random(9);
    let (q, keys) = (random.values(len * hs, 1.0), random.values(len * hs, 1.0));
    let all: Vec<f32> = (0..len).flat_map(|position| values(hs, position as u64)).collect();
    move |isa| {
        let mut blocks = vec![lines(block_bytes::<P>(hs)); len.div_ceil(16)];
        let mut written: Vec<&mut [u8]> =
            blocks.iter_mut().map(|block| bytemuck::cast_slice_mut(block)).collect();
        let (keys, values) = (Rows::new(&keys, hs, hs), Rows::new(&all, hs, hs));
        let (cached, blocks_out) = (PhantomData, &mut written[..]);
        isa.run(Append::<P> { keys, values, rows: len, first: 0, blocks: blocks_out, cached });
        let blocks: Vec<&[u8]> = blocks.iter().map(|block| bytemuck::cast_slice(block)).collect();
        let mut out = vec![0.0; len * hs];
        let [columns] = Columns::split(&mut out, hs, len, once(0..hs)).try_into().ok().unwrap();
        let attention = Attention::<P> {
            q: Rows::new(&q, hs, hs),
            rows: len,
            position: 0,
            blocks: &blocks,
            cached: PhantomData,
            scale: 0.3,
            out: columns,
            scratch: &mut Scratch::default(),
        };
        run(isa, attention);
        out
    }
}

#[test]
fn attention() {
    check(attended::<F32>(|isa, attention| isa.run(attention)));
    check(attended::<Bf16>(|isa, attention| isa.run(attention)));
    check_modes(attended::<Int8>(|isa, attention| isa.run(attention)));
    check_modes(attended::<Bf16Dots>(|isa, attention| isa.run_flushing(attention)));
}
