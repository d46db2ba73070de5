//! What each format makes of weights.

use super::*;
use gpt2rs::ops::pairs::{Bf16, Bf16Dots, F32};
use gpt2rs::ops::panels::{Int4Groups, Int8Groups, ZERO};
use half::bf16;
use proptest::prelude::*;

/// The values that a group of these rows stands for.
fn through<F: Format>(rows: &[[f32; NR]]) -> Vec<[f32; NR]> {
    let mut panel = lines(Panels::<F>::panel_len(F::GROUP));
    F::encode(rows, bytemuck::cast_slice_mut(&mut panel));
    let panel = bytemuck::cast_slice(&panel);
    (0..F::GROUP).map(|k| std::array::from_fn(|column| F::value(panel, k, column))).collect()
}

fn group<F: Format>(random: &mut Random, scale: f32) -> Vec<[f32; NR]> {
    (0..F::GROUP).map(|_| std::array::from_fn(|_| random.value() * scale)).collect()
}

fn column(rows: &[[f32; NR]], column: usize) -> Vec<f32> {
    rows.iter().map(|row| row[column]).collect()
}

fn greatest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |greatest, value| f64::from(value.abs()).max(greatest))
}

/// Levels of int4, in units of a group's scale.
fn levels() -> [f64; 16] {
    Int4Groups::BYTES.map(|byte| f64::from(i32::from(byte) - ZERO))
}

/// Holds each value of a group against its bound, a part of the column's greatest magnitude.
fn check<F: Format>(rows: &[[f32; NR]], part: f64, what: &str) {
    let held = through::<F>(rows);
    for lane in 0..NR {
        let (values, held) = (column(rows, lane), column(&held, lane));
        // Magnitudes whose scales are subnormal may be lost.
        let bound = part * greatest(&values) + 256.0 * TINY;
        for (value, held) in values.into_iter().zip(held) {
            let error = (f64::from(held) - f64::from(value)).abs();
            assert!(error <= bound, "{what}: {value:e} became {held:e}: {error:e} above {bound:e}");
        }
    }
}

/// Half a step: the scale is the greatest magnitude / 127, rounded to bfloat16 (2^-8). A scale that is rounded down
/// leaves 2^-8 of the greatest magnitude above 127 steps, which is less.
const INT8: f64 = 1.01 / 254.0;

/// Rows of int4 that share a scale.
const SCALED: usize = 16;

/// Holds the squared error of the weights that share a scale against what rounding them to a plain scale, their greatest
/// magnitude / 127, leaves: the best of several scales is no worse. The scale itself is rounded to 1/127 of the column's
/// greatest, by half of that at most, times a level of 127 at most; by whole units, of two levels that are about as near
/// the other may be taken: 10%.
fn check_int4(rows: &[[f32; NR]]) {
    let held = through::<Int4Groups>(rows);
    for lane in 0..NR {
        let (values, held) = (column(rows, lane), column(&held, lane));
        let of_scale = 1.3 * greatest(&values) / 254.0 * 127.0 / 97.0;
        for (values, held) in values.chunks(SCALED).zip(held.chunks(SCALED)) {
            let error = |held: &[f64]| -> f64 {
                values.iter().zip(held).map(|(&value, held)| (f64::from(value) - held).powi(2)).sum()
            };
            let plain = [1.0, -1.0].map(|sign| {
                let scale = sign * greatest(values) / 127.0;
                let nearest = values.iter().map(|&value| {
                    let distance = |level: &f64| (f64::from(value) - level * scale).abs();
                    levels().into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap() * scale
                });
                error(&nearest.collect::<Vec<f64>>())
            });
            let plain = plain[0].min(plain[1]);
            let found = error(&held.iter().map(|&value| f64::from(value)).collect::<Vec<f64>>());
            let bound = (1.05 * plain.sqrt() + 4.0 * of_scale + 256.0 * TINY).powi(2);
            assert!(found <= bound, "{found:e} above {bound:e} (plain {plain:e})");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_are_near(exponent in -36i32..=37, seed: u64) {
        let scale = 10.0f32.powi(exponent);
        let mut random = Random(seed);
        check::<Int8Groups>(&group::<Int8Groups>(&mut random, scale), INT8, "int8");
        // Of smaller weights the factor has no reciprocal.
        let scale = scale.max(1e-32);
        check_int4(&group::<Int4Groups>(&mut random, scale));
        // One weight that is far larger than the others.
        let mut rows = group::<Int8Groups>(&mut random, scale);
        rows[seed as usize % Int8Groups::GROUP][3] *= 30.0;
        check::<Int8Groups>(&rows, INT8, "int8");
        let mut rows = group::<Int4Groups>(&mut random, scale);
        rows[seed as usize % Int4Groups::GROUP][3] *= -30.0;
        check_int4(&rows);
    }

    #[test]
    fn wide_formats_round_to_nearest(seed: u64) {
        let mut random = Random(seed);
        let bits = |rows: &[[f32; NR]]| bits(rows.as_flattened());
        let mut any = || -> Vec<[f32; NR]> {
            (0..F32::GROUP).map(|_| std::array::from_fn(|_| f32::from_bits(random.bits() as u32))).collect()
        };
        let rows = any();
        prop_assert_eq!(bits(&through::<F32>(&rows)), bits(&rows));
        let rounded: Vec<[f32; NR]> =
            rows.iter().map(|row| row.map(|value| bf16::from_f32(value).to_f32())).collect();
        prop_assert_eq!(bits(&through::<Bf16>(&rows)), bits(&rounded));
        prop_assert_eq!(bits(&through::<Bf16Dots>(&rows)), bits(&rounded));
    }

    /// Any bits at all: no panic, and a column's values are those of that column alone.
    #[test]
    fn any_bits(seed: u64) {
        fn check<F: Format>(random: &mut Random) {
            let mut rows: Vec<[f32; NR]> =
                (0..F::GROUP).map(|_| std::array::from_fn(|_| f32::from_bits(random.bits() as u32))).collect();
            let first = column(&through::<F>(&rows), 5);
            for row in &mut rows {
                for (lane, value) in row.iter_mut().enumerate() {
                    *value = if lane == 5 { *value } else { 1.0 };
                }
            }
            assert_eq!(bits(&column(&through::<F>(&rows), 5)), bits(&first));
        }
        let mut random = Random(seed);
        check::<F32>(&mut random);
        check::<Bf16>(&mut random);
        check::<Int8Groups>(&mut random);
        check::<Int4Groups>(&mut random);
    }
}

fn check_special<F: Format>(exact_zeros: bool) {
    for zero in [0.0, -0.0] {
        let zeros = through::<F>(&vec![[zero; NR]; F::GROUP]);
        assert!(zeros.as_flattened().iter().all(|&value| value == 0.0));
        if exact_zeros {
            assert!(zeros.as_flattened().iter().all(|value| value.is_sign_negative() == (1.0 / zero < 0.0)));
        }
    }
    // All subnormal, or so small that their scale is.
    for tiny in [f32::from_bits(1), -f32::from_bits(0x1234), f32::MIN_POSITIVE, -3.0 * f32::MIN_POSITIVE] {
        let held = through::<F>(&vec![[tiny; NR]; F::GROUP]);
        let found = held.as_flattened().iter();
        assert!(found.clone().all(|value| value.abs() <= 1.5 * tiny.abs()), "{tiny:e}: {:?}", held[0]);
    }
    for broken in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for row in [0, F::GROUP / 2, F::GROUP - 1] {
            let clean = group::<F>(&mut Random(1), 1.0);
            let expected = through::<F>(&clean);
            let mut rows = clean;
            rows[row][7] = broken;
            let held = through::<F>(&rows);
            assert!(!held[row][7].is_finite(), "{broken} became {}", held[row][7]);
            for lane in (0..NR).filter(|&lane| lane != 7) {
                assert_eq!(bits(&column(&held, lane)), bits(&column(&expected, lane)));
            }
        }
    }
}

#[test]
fn zeros_tiny_values_and_what_is_not_finite() {
    check_special::<F32>(true);
    check_special::<Bf16>(true);
    check_special::<Bf16Dots>(true);
    check_special::<Int8Groups>(false);
    check_special::<Int4Groups>(false);
}

/// Groups are whole cache lines, and panels whole groups.
#[test]
fn panels_are_whole_lines() {
    fn check<F: Format>() {
        assert!(F::GROUP_BYTES.is_multiple_of(64) && F::PANEL_BYTES.is_multiple_of(64));
        for (k, n) in [(1, 1), (F::GROUP, NR), (F::GROUP + 1, NR + 1), (7 * F::GROUP - 1, 5 * NR)] {
            let len = (k.div_ceil(F::GROUP) * F::GROUP_BYTES + F::PANEL_BYTES) * n.div_ceil(NR);
            assert_eq!(Panels::<F>::packed_len(k, n), len);
            let data = lines(len);
            let panels = Panels::<F>::new(bytemuck::cast_slice(&data), k, n);
            let columns: Vec<usize> = (0..panels.count()).flat_map(|index| panels.columns(index)).collect();
            assert_eq!(columns, (0..n).collect::<Vec<_>>());
        }
    }
    check::<F32>();
    check::<Bf16>();
    check::<Int8Groups>();
    check::<Int4Groups>();
}
