//! Logits to token: processors, warpers, draws, log-probabilities and what is refused.

use gpt2rs::error::Error;
use gpt2rs::sample::{Sample, Sampling, Scratch};
use gpt2rs::simd::Isa;

mod draws;
mod golden;
mod greedy;
mod logprobs;
mod processors;
mod settings;
mod warpers;

/// The fastest instruction set here.
fn isa() -> Isa {
    *Isa::available().last().unwrap()
}

fn try_choose(settings: &Sampling, logits: &[f32], tokens: &[u32]) -> Result<Sample, Error> {
    settings.choose(isa(), logits, tokens, &mut Scratch::default())
}

fn choose(settings: &Sampling, logits: &[f32], tokens: &[u32]) -> u32 {
    try_choose(settings, logits, tokens).unwrap().token
}

/// The distribution (V,) drawn from.
fn probabilities(settings: &Sampling, logits: &[f32], tokens: &[u32]) -> Vec<f64> {
    settings.probabilities(isa(), logits, tokens, &mut Scratch::default()).unwrap()
}

/// Settings that sample, everything else off.
fn sampling() -> Sampling {
    Sampling { do_sample: true, ..Sampling::default() }
}

/// The ids with a probability above zero.
fn support(probabilities: &[f64]) -> Vec<u32> {
    (0..probabilities.len() as u32).filter(|&id| probabilities[id as usize] > 0.0).collect()
}

/// The softmax (V,) of `scores` / `temperature` in float64; zero for a score of -inf.
fn softmax(scores: &[f64], temperature: f64) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = scores.iter().map(|score| ((score - max) / temperature).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|exp| exp / sum).collect()
}

/// Holds `actual` against a float64 `expected`, both distributions (V,) with the same support.
///
/// A logarithm x of an unnormalised probability has two float32 roundings, `exp` is within 2 units in the last place,
/// and so is the sum that divides; x is above -28.5, where weights end. Weights have an absolute rounding of 2^-41.
fn assert_distribution(actual: &[f64], expected: &[f64], what: &str) {
    let relative = 2.0 * (28.5 * 2f64.powi(-23) + 2f64.powi(-22));
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (id, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        assert_eq!(actual > 0.0, expected > 0.0, "{what}: token {id}, {actual} against {expected}");
        let bound = expected * relative + 2f64.powi(-40);
        assert!((actual - expected).abs() <= bound, "{what}: token {id}, {actual} against {expected}");
    }
}
