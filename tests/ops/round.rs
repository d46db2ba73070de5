//! Activations in the types of narrow products.

use super::*;
use gpt2rs::ops::Rows;
use gpt2rs::ops::matmul::Steps;
use gpt2rs::ops::panels::{Int4Groups, Int8Groups, ZERO};
use gpt2rs::ops::round::{QuantiseRows, RoundRows};
use half::bf16;
use proptest::prelude::*;
use std::marker::PhantomData;

/// Groups of int8: (rows, K rounded up), (rows, groups), (rows, groups).
#[derive(Debug, PartialEq)]
struct Groups {
    values: Vec<i8>,
    scales: Vec<u32>,
    starts: Vec<i32>,
}

fn quantise<F: Steps>(x: &[f32], rows: usize, k: usize) -> Groups {
    let groups = k.div_ceil(F::GROUP);
    let sums = F::GROUP / F::SUM;
    let x = spread(x, k, k + 3);
    let on = |isa: Isa| {
        let (mut values, mut scales) = (vec![99; rows * groups * F::GROUP], vec![FORBIDDEN; rows * groups]);
        let mut starts = vec![99; rows * groups * sums];
        let x = Rows::new(&x, k + 3, k);
        let (values_out, scales_out, starts_out) = (&mut values[..], &mut scales[..], &mut starts[..]);
        isa.run(QuantiseRows {
            x,
            rows,
            rotation: 1,
            values: values_out,
            scales: scales_out,
            starts: starts_out,
            format: PhantomData::<F>,
        });
        Groups { values, scales: bits(&scales), starts }
    };
    let all = Isa::available();
    let first = on(all[0]);
    for isa in &all[1..] {
        assert_eq!(on(*isa), first, "{}", isa.name());
    }
    first
}

/// The greatest magnitude becomes 127: half a step, 1% for the roundings of the reciprocal and of the product. Of values
/// whose scale has no reciprocal nothing is left.
fn check_quantised<F: Steps>(x: &[f32], rows: usize, k: usize) {
    let Groups { values, scales, starts } = quantise::<F>(x, rows, k);
    let (group, sums) = (F::GROUP, F::GROUP / F::SUM);
    let groups = k.div_ceil(group);
    for (i, values) in values.chunks_exact(group).enumerate() {
        let (row, first) = (i / groups, i % groups * group);
        let x = &x[row * k..][first..k.min(first + group)];
        let scale = f64::from(f32::from_bits(scales[i]));
        assert!(values[x.len()..].iter().all(|&value| value == 0), "past the row's end");
        for (values, start) in values.chunks_exact(F::SUM).zip(&starts[i * sums..]) {
            assert_eq!(*start, -ZERO * values.iter().map(|&value| i32::from(value)).sum::<i32>());
        }
        if x.iter().any(|value| !value.is_finite()) {
            assert!(scale.is_nan());
            continue;
        }
        for (&x, &value) in x.iter().zip(values) {
            assert!(value > -128);
            let error = (f64::from(value) * scale - f64::from(x)).abs();
            assert!(error <= 0.505 * scale + 127.0 * TINY, "{x:e} became {value} * {scale:e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn int8_groups(rows in 1usize..=5, k in 1usize..=300, exponent in -40i32..=38, seed: u64) {
        let x = Random(seed).values(rows * k, 10.0f32.powi(exponent));
        check_quantised::<Int8Groups>(&x, rows, k);
        check_quantised::<Int4Groups>(&x, rows, k);
    }

    #[test]
    fn int8_groups_of_any_bits(k in 1usize..=200, seed: u64) {
        let mut random = Random(seed);
        let x: Vec<f32> = (0..2 * k).map(|_| f32::from_bits(random.bits() as u32)).collect();
        check_quantised::<Int8Groups>(&x, 2, k);
        check_quantised::<Int4Groups>(&x, 2, k);
    }

    #[test]
    fn bfloat16_pairs(rows in 1usize..=5, k in 1usize..=100, seed: u64) {
        let mut random = Random(seed);
        let x: Vec<f32> = (0..rows * k).map(|_| f32::from_bits(random.bits() as u32)).collect();
        let stride = k.div_ceil(2) + 2;
        let untouched = [bf16::from_f32(3.0), bf16::from_f32(4.0)];
        for isa in Isa::available() {
            let mut out = vec![untouched; rows * stride];
            isa.run(RoundRows { x: Rows::new(&x, k, k), rows, out: &mut out, stride });
            for (x, out) in x.chunks_exact(k).zip(out.chunks_exact(stride)) {
                let (pairs, rest) = out.split_at(k.div_ceil(2));
                prop_assert!(rest.iter().all(|&pair| pair == untouched), "{}", isa.name());
                for (x, &[second, first]) in x.chunks(2).zip(pairs) {
                    let expected = [x[0], x.get(1).copied().unwrap_or(0.0)].map(|x| bf16::from_f32(x).to_f32());
                    prop_assert_eq!(bits(&[first.to_f32(), second.to_f32()]), bits(&expected), "{}", isa.name());
                }
            }
        }
    }
}

/// The rotation is orthonormal: products of rotated rows are those of the rows, and it undoes itself.
#[test]
fn rotations_keep_products() {
    for (k, n) in [(256, 16), (512, 16), (64, 4), (192, 4)] {
        assert_eq!(gpt2rs::ops::round::rotation(k), n, "{k}");
        let (a, b) = (Random(5).values(k, 1.0), Random(6).values(k, 1.0));
        for isa in Isa::available() {
            let (mut turned_a, mut turned_b) = (a.clone(), b.clone());
            isa.run(Rotate(n, &mut turned_a));
            isa.run(Rotate(n, &mut turned_b));
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            // log2(16) additions and a scale of each value.
            let bound = 10.0 * f64::from(f32::EPSILON) * k as f64;
            assert!((dot(&turned_a, &turned_b) - dot(&a, &b)).abs() < bound, "{}", isa.name());
            assert!(turned_a.iter().zip(&a).any(|(turned, a)| (turned - a).abs() > 0.1), "{}", isa.name());
            isa.run(Rotate(n, &mut turned_a));
            assert!(turned_a.iter().zip(&a).all(|(back, a)| (back - a).abs() < 1e-5), "{}", isa.name());
        }
    }
    assert_eq!([1, 33, 48, 100].map(gpt2rs::ops::round::rotation), [1; 4]);
}

struct Rotate<'a>(usize, &'a mut [f32]);

impl gpt2rs::simd::Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: gpt2rs::simd::Simd>(self, simd: S) {
        gpt2rs::ops::round::rotate(simd, self.0, self.1);
    }
}
