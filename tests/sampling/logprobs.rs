//! The model's own log-probabilities.

use super::{Sampling, Scratch, choose, isa, sampling, try_choose};
use gpt2rs::sample::log_softmax_at;
use gpt2rs::simd::Isa;
use proptest::prelude::*;

/// ln of the softmax (V,) in float64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - f64::from(max)).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - f64::from(max) - sum.ln()).collect()
}

proptest! {
    #[test]
    fn within_the_stated_bound(logits in prop::collection::vec(-60.0f32..20.0, 1..3000), scale in 0.01f32..1.0) {
        let logits: Vec<f32> = logits.iter().map(|logit| logit * scale).collect();
        let expected = log_softmax(&logits);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mean: f64 =
            logits.iter().zip(&expected).map(|(&logit, log)| f64::from(max - logit) * log.exp()).sum();
        for token in [0, logits.len() / 2, logits.len() - 1] {
            let bits = Isa::available().into_iter().map(|isa| log_softmax_at(isa, &logits, token as u32).to_bits());
            let bits: Vec<u32> = bits.collect();
            prop_assert!(bits.iter().all(|&other| other == bits[0]), "one answer on every instruction set");
            let error = (f64::from(f32::from_bits(bits[0])) - expected[token]).abs();
            prop_assert!(error <= (mean + 6.0) * 2f64.powi(-23) + expected[token].abs() * 2f64.powi(-24));
        }
    }
}

#[test]
fn banned_and_nan_logits() {
    let logits = [1.0, f32::NEG_INFINITY, f32::NAN, 1.0];
    assert_eq!(log_softmax_at(isa(), &logits, 0), -std::f32::consts::LN_2);
    assert_eq!(log_softmax_at(isa(), &logits, 1), f32::NEG_INFINITY);
    assert_eq!(log_softmax_at(isa(), &logits, 2), f32::NEG_INFINITY);
    assert!(log_softmax_at(isa(), &[f32::NEG_INFINITY; 2], 0).is_nan());
}

#[test]
fn of_the_model_before_any_setting() {
    let logits = [0.5f32, 4.0, 1.0, 4.0, -3.0, 1.0];
    let settings = Sampling {
        suppress_tokens: vec![1, 3],
        repetition_penalty: 5.0,
        temperature: 0.1,
        top_k: Some(1),
        logprobs: true,
        top_logprobs: 4,
        ..sampling()
    };
    let sample = try_choose(&settings, &logits, &[2]).unwrap();
    assert_eq!(sample.token, 5);
    assert_eq!(sample.logprob, Some(log_softmax_at(isa(), &logits, 5)));
    // The likeliest first, the lowest id first among equals: the fourth place goes to 5, after the equal 2.
    let expected: Vec<(u32, f32)> =
        [1, 3, 2, 5].into_iter().map(|id| (id, log_softmax_at(isa(), &logits, id))).collect();
    assert_eq!(sample.top_logprobs, expected);
    let three = try_choose(&Sampling { top_logprobs: 3, ..settings.clone() }, &logits, &[2]).unwrap();
    assert_eq!(three.top_logprobs, expected[..3]);
    let all = try_choose(&Sampling { top_logprobs: 100, ..settings }, &logits, &[2]).unwrap();
    assert_eq!(all.top_logprobs.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 3, 2, 5, 0, 4]);
}

#[test]
fn zeros_of_either_sign_are_equal() {
    let settings = Sampling { top_logprobs: 2, ..Sampling::default() };
    let sample = try_choose(&settings, &[-1.0, -0.0, 0.0, 0.0], &[]).unwrap();
    assert_eq!(sample.top_logprobs.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn only_where_asked_for_and_without_a_change_of_the_choice() {
    let logits: Vec<f32> = (0..999).map(|id| ((id * 37) % 101) as f32 * 0.05).collect();
    let mut scratch = Scratch::default();
    for seed in 0..50 {
        let plain = Sampling { seed, ..sampling() };
        let sample = plain.choose(isa(), &logits, &[1], &mut scratch).unwrap();
        assert!(sample.logprob.is_none() && sample.top_logprobs.is_empty());
        let asked = Sampling { logprobs: true, ..plain };
        assert_eq!(choose(&asked, &logits, &[1]), sample.token);
        let logprob = asked.choose(isa(), &logits, &[1], &mut scratch).unwrap().logprob;
        assert_eq!(logprob, Some(log_softmax_at(isa(), &logits, sample.token)));
    }
}
