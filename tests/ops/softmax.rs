//! The exponential.

use super::*;
use gpt2rs::ops::softmax::{EXP_HIGHEST, EXP_LOWEST, exp};

fn compute(values: &[f32]) -> Vec<f32> {
    on_every_isa(|isa| {
        let mut out = values.to_vec();
        exp(isa, &mut out);
        out
    })
}

/// The distance of float32 values near `exact`: that of its binade, 2^-149 at least.
fn unit_in_the_last_place(exact: f64) -> f64 {
    let exponent = (exact.log2().floor() as i32).max(-126);
    2.0f64.powi(exponent - 23)
}

/// Two units in the last place where the result is a normal number; above, the highest such result; below, zero.
fn check(values: &[f32]) {
    let highest = compute(&[EXP_HIGHEST])[0];
    for (&x, &result) in values.iter().zip(&compute(values)) {
        if x.is_nan() {
            assert!(result.is_nan(), "exp(NaN) = {result}");
        } else if x > EXP_HIGHEST {
            assert_eq!(result, highest, "exp({x:e})");
        } else if x < EXP_LOWEST {
            assert_eq!(result.to_bits(), 0, "exp({x:e})");
        } else {
            let exact = f64::from(x).exp();
            let error = (f64::from(result) - exact).abs() / unit_in_the_last_place(exact);
            assert!(error <= 2.0, "exp({x:e}) = {result:e}, off by {error} units in the last place");
        }
    }
}

/// Every 1021st float32 of either sign, NaNs and infinities among them: 4.2 million values.
#[test]
fn the_whole_range() {
    let all: Vec<f32> = (0..=u32::MAX).step_by(1021).map(f32::from_bits).collect();
    check(&all);
}

#[test]
fn the_range_that_softmax_uses() {
    let values: Vec<f32> = (0..2_000_000).map(|i| i as f32 * -44e-6).collect();
    check(&values);
}

#[test]
fn borders_and_special_values() {
    let mut values = vec![
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -f32::from_bits(1),
        f32::NEG_INFINITY,
        f32::INFINITY,
        f32::NAN,
        -f32::NAN,
        1e30,
        -1e30,
        f32::MAX,
        f32::MIN,
        // The results would be subnormal: zero by definition.
        -87.4,
        -95.0,
        -103.0,
    ];
    for border in [EXP_LOWEST, EXP_HIGHEST] {
        values.extend([border, border.next_up(), border.next_down()]);
    }
    check(&values);
    assert_eq!(bits(&compute(&[0.0, -0.0])), bits(&[1.0, 1.0]));
    assert!(compute(&[EXP_HIGHEST])[0] < f32::MAX && compute(&[EXP_HIGHEST])[0] > 2.3e38);
}

/// Of any length, a value's result is its own.
#[test]
fn any_length() {
    let values = Random(3).values(70, 80.0);
    let all = compute(&values);
    for len in 0..values.len() {
        assert_eq!(bits(&compute(&values[..len])), bits(&all[..len]));
    }
}
