//! The activation functions, against float64 and against their definitions.
//!
//! The bounds below are to first order in u; [`check`] allows 1% for the rest. The exponential errs by 2 units in the
//! last place, 4u, and gives exp(EXP_HIGHEST) of anything above, so that `x / (1 + exp(y))` is at least `|x| / 2.3e38`
//! where it should be nearer to zero.

use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::gelu::activate_all;
use gpt2rs::ops::softmax::EXP_HIGHEST;
use std::f64::consts::{PI, SQRT_2};

const ALL: [Activation; 4] = [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu];

fn compute(activation: Activation, values: &[f32]) -> Vec<f32> {
    on_every_isa(|isa| {
        let mut out = values.to_vec();
        activate_all(isa, activation, &mut out);
        out
    })
}

/// Every float32 magnitude from 2^-130 to 40 in steps of 2^-12 of it, and coarser ones to 1e30, with both signs.
fn values() -> Vec<f32> {
    let fine = (0x0000_1000..0x4220_0000).step_by(0x0800);
    let coarse = (0x4220_0000..0x7149_f2ca).step_by(0x4_0000);
    fine.chain(coarse).map(f32::from_bits).flat_map(|x| [x, -x]).chain([0.0, -0.0]).collect()
}

/// Holds each result against `expected(x)`: the exact value and a bound of the error.
fn check(activation: Activation, expected: impl Fn(f64) -> (f64, f64)) {
    let values = values();
    for (&x, &result) in values.iter().zip(&compute(activation, &values)) {
        let (exact, bound) = expected(f64::from(x));
        let error = (f64::from(result) - exact).abs();
        // Two roundings of subnormal results.
        let bound = 1.01 * bound + 2.0 * UNIT * TINY;
        assert!(
            error <= bound,
            "{activation:?}({x:e}) = {result:e} for {exact:e}: {error:e} above {bound:e}"
        );
    }
}

/// `x / (1 + exp(y))` whose `y` has a relative error of `y_error`, and the bound of the error: the exponential's 4u and
/// its argument's error count as far as it is a part of the sum; sum and quotient round once each.
fn quotient(x: f64, y: f64, y_error: f64) -> (f64, f64) {
    let exponential = y.exp();
    let exact = x / (1.0 + exponential);
    let part = if y > 700.0 { 1.0 } else { exponential / (1.0 + exponential) };
    if y > f64::from(EXP_HIGHEST) {
        return (exact, x.abs() / 2.3e38);
    }
    (exact, exact.abs() * (part * (y_error * y.abs() + 4.0 * UNIT) + 2.0 * UNIT))
}

#[test]
fn silu_is_within_its_bound() {
    check(Activation::Silu, |x| quotient(x, -x, 0.0));
}

/// The argument is `-2 sqrt(2/pi) (x + 0.044715 x^3)`; of its two terms, which have one sign, the cubic one has four
/// roundings before their sum (the square, both constants, their product), and two come after.
#[test]
fn gelu_new_is_within_its_bound() {
    check(Activation::GeluNew, |x| {
        let inner = (2.0 / PI).sqrt() * (x + 0.044715 * x * x * x);
        let (exact, bound) = quotient(x, -2.0 * inner, 6.0 * UNIT);
        let definition = 0.5 * x * (1.0 + inner.tanh());
        assert!(
            (definition - exact).abs() <= 4.0 * f64::EPSILON * x.abs(),
            "two ways to write gelu_new({x})"
        );
        (exact, bound)
    });
}

/// The normal distribution function, and erfc(z) for z >= 0 by the series of erf below 2 and the continued fraction
/// above (Abramowitz and Stegun, 7.1.6 and 7.1.14).
fn phi(x: f64) -> f64 {
    let z = x.abs() / SQRT_2;
    let erfc = if z < 2.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..60 {
            term *= 2.0 * z * z / (2 * n + 1) as f64;
            sum += term;
        }
        1.0 - 2.0 / PI.sqrt() * (-z * z).exp() * sum
    } else {
        let fraction = (1..=120).rev().fold(z, |tail, n| z + 0.5 * n as f64 / tail);
        (-z * z).exp() / (PI.sqrt() * fraction)
    };
    if x < 0.0 { 0.5 * erfc } else { 1.0 - 0.5 * erfc }
}

/// As the function states: 1e-6 of the value, and for negative values the rounded argument of exp(-x^2 / 2). From -13.2
/// on that is subnormal, and taken for zero.
#[test]
fn gelu_is_within_its_bound() {
    for (x, known) in
        [(1.0, 0.841_344_746_068_542_9), (-2.0, 0.022_750_131_948_179_2), (-6.0, 9.865_876_450_376_98e-10)]
    {
        assert!((phi(x) - known).abs() <= 1e-12 * known, "Phi({x}) = {}", phi(x));
    }
    check(Activation::Gelu, |x| {
        let exact = x * phi(x);
        let argument = if x < 0.0 { x * x / 2.0 * UNIT } else { 0.0 };
        let bound = if x < -13.1 { 13.2 * TINY } else { exact.abs() * (1e-6 + argument) };
        (exact, bound)
    });
}

#[test]
fn relu_is_exact() {
    check(Activation::Relu, |x| (x.max(0.0), 0.0));
}

#[test]
fn any_length() {
    for activation in ALL {
        let values = Random(5).values(50, 6.0);
        let all = compute(activation, &values);
        for len in 0..values.len() {
            assert_eq!(bits(&compute(activation, &values[..len])), bits(&all[..len]));
        }
    }
}

/// A number that is none stays none, so that a broken checkpoint shows in the logits.
#[test]
fn nan_stays_nan() {
    for activation in ALL {
        let result = compute(activation, &[f32::NAN, 1.0, -f32::NAN]);
        assert!(
            result[0].is_nan() && result[1].is_finite() && result[2].is_nan(),
            "{activation:?}: {result:?}"
        );
    }
}
