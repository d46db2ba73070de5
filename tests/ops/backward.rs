//! Gradients against finite differences of naive float64 forward passes.
//!
//! A central difference of step h errs by h^2/6 times the third derivative, and by what float64 rounds over h: with h =
//! 1e-4 both are near 1e-9 for the functions here, far below what float32 rounds. What the operation's float32 may err by
//! is a number of roundings times the greatest magnitude that is summed, and stands at each test.

use super::*;
use gpt2rs::config::Activation;
use gpt2rs::ops::Rows;
use gpt2rs::ops::cross_entropy::{self, BLOCK, BlockSums, LogitsBackward, MergeBlocks};
use gpt2rs::ops::embed::embed_backward;
use gpt2rs::ops::gelu::backward::{Activate, ActivateBackward};
use gpt2rs::ops::layernorm::backward::{LayerNormInput, LayerNormParameters, SumRows};
use gpt2rs::pool::Columns;

/// The gradient of `loss` at `x`, by central differences.
pub fn differences(x: &[f64], mut loss: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-4;
    let (mut x, n) = (x.to_vec(), x.len());
    let mut slope = |i: usize| {
        let middle = x[i];
        let mut at = |value: f64| {
            x[i] = value;
            loss(&x)
        };
        let slope = (at(middle + STEP) - at(middle - STEP)) / (2.0 * STEP);
        x[i] = middle;
        slope
    };
    (0..n).map(&mut slope).collect()
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Holds every value to `bound` of the greatest magnitude.
#[track_caller]
pub fn assert_near(found: &[f32], expected: &[f64], bound: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let greatest = expected.iter().fold(0.0f64, |greatest, value| greatest.max(value.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs() / greatest;
        assert!(error <= bound, "{what} {i}: {found} for {expected}: {error:e} above {bound:e}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// C / 16 + 4 roundings a sum, two sums after two others, and a dozen more; terms are up to a few times the result.
#[test]
fn layer_norm() {
    for (rows, c) in [(3, 37), (5, 16), (2, 70)] {
        let mut random = Random(c as u64);
        let (x, dy) = (random.values(rows * c, 2.0), random.values(rows * c, 1.0));
        let (weight, bias) = (random.values(c, 1.5), random.values(c, 1.0));
        let (residual, eps) = (random.values(rows * c, 1.0), 1e-5);
        let norm = |x: &[f64], weight: &[f64], bias: &[f64]| -> Vec<f64> {
            let row = |x: &[f64]| -> Vec<f64> {
                let mean = x.iter().sum::<f64>() / c as f64;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
                let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
                (0..c).map(|i| (x[i] - mean) * inverse * weight[i] + bias[i]).collect()
            };
            x.chunks(c).flat_map(row).collect()
        };
        let (x64, dy64, weight64, bias64) = (wide(&x), wide(&dy), wide(&weight), wide(&bias));
        let dx = differences(&x64, |x| dot(&norm(x, &weight64, &bias64), &dy64));
        let dweight = differences(&weight64, |weight| dot(&norm(&x64, weight, &bias64), &dy64));
        let dbias = differences(&bias64, |bias| dot(&norm(&x64, &weight64, bias), &dy64));

        let stride = c + 3;
        let (x, dy) = (spread(&x, c, stride), spread(&dy, c, stride));
        let (x, dy) = (Rows::new(&x, stride, c), Rows::new(&dy, stride, c));
        let found = on_every_isa(|isa| {
            let mut out = spread(&residual, c, stride);
            let mut moments = vec![[0.0; 2]; rows];
            let (weight, moments) = (&weight[..], &mut moments[..]);
            isa.run(LayerNormInput { x, dy, weight, eps, dx: &mut out, dx_stride: stride, moments });
            let (mut dweight, mut dbias) = (vec![0.0; c], vec![0.0; c]);
            for columns in [0..c / 2, c / 2..c] {
                let (x, dy) = (x.columns_of(columns.clone()), dy.columns_of(columns.clone()));
                let (dweight, dbias) = (&mut dweight[columns.clone()], &mut dbias[columns]);
                isa.run(LayerNormParameters { x, dy, moments, dweight, dbias });
            }
            let mut sums = vec![0.0; c];
            isa.run(SumRows { x: dy, rows, out: &mut sums });
            assert_eq!(bits(&sums), bits(&dbias));
            [gather(&out, c, stride), dweight, dbias].concat()
        });
        let bound = gamma(4 * (c.div_ceil(16) + 16));
        let dx: Vec<f64> = dx.iter().zip(&residual).map(|(dx, &residual)| dx + f64::from(residual)).collect();
        let (of_x, of_parameters) = found.split_at(rows * c);
        assert_near(of_x, &dx, bound, "dx");
        assert_near(&of_parameters[..c], &dweight, bound, "dweight");
        assert_near(&of_parameters[c..], &dbias, bound, "dbias");
    }
}

fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::GeluNew => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => 0.5 * x * libm::erfc(-x / 2.0f64.sqrt()),
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// `exp` of an argument near 10 errs by 10 roundings and 2 more, Phi by 1.5e-7 of itself.
#[test]
fn activations() {
    for which in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
        // Not 0, where ReLU has no derivative.
        let x: Vec<f32> = (-37..37).map(|i| (i as f32 + 0.5) * 0.27).collect();
        let dy = Random(3).values(x.len(), 1.0);
        let columns = 37;
        let expected: Vec<f64> = wide(&x)
            .iter()
            .zip(wide(&dy))
            .map(|(&x, dy)| dy * differences(&[x], |x| activation(which, x[0]))[0])
            .collect();
        let stride = 40;
        let spread_x = spread(&x, columns, stride);
        let x = Rows::new(&spread_x, stride, columns);
        let found = on_every_isa(|isa| {
            let mut d = spread(&dy, columns, stride);
            isa.run(ActivateBackward { x, activation: which, d: &mut d, stride });
            gather(&d, columns, stride)
        });
        assert_near(&found, &expected, gamma(32), "derivative");
        let values = on_every_isa(|isa| {
            let mut out = spread(&dy, columns, stride);
            isa.run(Activate { x, activation: which, out: &mut out, stride });
            gather(&out, columns, stride)
        });
        let expected: Vec<f64> =
            wide(&gather(&spread_x, columns, stride)).iter().map(|&x| activation(which, x)).collect();
        assert_near(&values, &expected, gamma(32), "activation");
    }
    // Far out: derivatives of 0 and 1, nothing infinite on the way.
    let far = [40.0, 127.9, 128.1, 200.0, 1e30, f32::INFINITY].map(|x| [-x, x]);
    let far = [far.as_flattened(), &[f32::NAN]].concat();
    for which in [Activation::GeluNew, Activation::Gelu, Activation::Relu, Activation::Silu] {
        let found = on_every_isa(|isa| {
            let mut d = vec![1.0; far.len()];
            let (x, stride) = (Rows::new(&far, far.len(), far.len()), far.len());
            isa.run(ActivateBackward { x, activation: which, d: &mut d, stride });
            d
        });
        for (x, slope) in far.iter().zip(found) {
            if x.is_nan() {
                assert!(slope.is_nan(), "{which:?} at {x}: {slope}");
                continue;
            }
            assert!((slope - if *x > 0.0 { 1.0 } else { 0.0 }).abs() < 1e-6, "{which:?} at {x}: {slope}");
        }
    }
}

/// V / 64 + 64 roundings a sum of positive terms, a few for the exponentials.
#[test]
fn cross_entropy() {
    for (v, tokens) in [(5, 3), (150, 17), (64, 16), (700, 33)] {
        let mut random = Random(v as u64);
        let logits = random.values(v * tokens, 8.0);
        let targets: Vec<u32> = (0..tokens).map(|_| (random.bits() % v as u64) as u32).collect();
        let loss = |logits: &[f64]| -> f64 {
            let of_token = |(token, &target): (usize, &u32)| {
                let column = |i: usize| logits[i * tokens + token];
                (0..v).map(|i| column(i).exp()).sum::<f64>().ln() - column(target as usize)
            };
            targets.iter().enumerate().map(of_token).sum()
        };
        let scale = 0.37f32;
        let logits64 = wide(&logits);
        let expected: Vec<f64> =
            differences(&logits64, loss).iter().map(|slope| slope * f64::from(scale)).collect();
        let (stride, blocks) = (tokens.next_multiple_of(16) + 16, v.div_ceil(BLOCK));
        let found = on_every_isa(|isa| {
            let mut held = spread(&logits, tokens, stride);
            let (mut maxima, mut sums) = (vec![FORBIDDEN; blocks * stride], vec![FORBIDDEN; blocks * stride]);
            let rows = Rows::new(&held, stride, tokens);
            isa.run(BlockSums { logits: rows, rows: v, maxima: &mut maxima, sums: &mut sums });
            isa.run(MergeBlocks { maxima: &mut maxima, sums: &mut sums, tokens, stride });
            let losses = targets.iter().enumerate().map(|(token, &target)| {
                cross_entropy::loss(held[target as usize * stride + token], maxima[token], sums[token])
            });
            let total = losses.sum::<f64>() as f32;
            let (targets, max, sum) = (&targets[..], &maxima[..tokens], &sums[..tokens]);
            // In two parts, as two threads would.
            let half = (v / 2).next_multiple_of(BLOCK).min(v);
            let (low, high) = held.split_at_mut(half * stride);
            isa.run(LogitsBackward { logits: low, stride, first: 0, targets, max, sum, scale });
            isa.run(LogitsBackward { logits: high, stride, first: half, targets, max, sum, scale });
            [gather(&held, tokens, stride), vec![total]].concat()
        });
        let (total, gradients) = found.split_last().unwrap();
        let bound = gamma(BLOCK + blocks + 24);
        assert_near(&[*total], &[loss(&logits64)], bound, "loss");
        assert_near(gradients, &expected, bound, "gradient");
    }
}

/// Tokens that come twice are summed in the order of the rows.
#[test]
fn embeddings() {
    let (c, v, positions) = (5, 7, 3);
    let tokens = [(3, 0), (1, 1), (3, 2), (3, 0), (6, 1)];
    let dx = Random(1).values(tokens.len() * c, 1.0);
    let (mut dwte, mut dwpe) = (Random(2).values(v * c, 1.0), Random(3).values(positions * c, 1.0));
    let (mut wte, mut wpe) = (dwte.clone(), dwpe.clone());
    for (row, (token, position)) in tokens.iter().enumerate() {
        for i in 0..c {
            wte[*token as usize * c + i] += dx[row * c + i];
            wpe[position * c + i] += dx[row * c + i];
        }
    }
    let dwtes = Columns::split(&mut dwte, c, v, [0..2, 2..5]);
    for (mut dwte, mut dwpe) in dwtes.into_iter().zip(Columns::split(&mut dwpe, c, positions, [0..2, 2..5])) {
        embed_backward(Rows::new(&dx, c, c).columns_of(dwte.range()), &tokens, &mut dwte, &mut dwpe);
    }
    assert_eq!((bits(&dwte), bits(&dwpe)), (bits(&wte), bits(&wpe)));
}
