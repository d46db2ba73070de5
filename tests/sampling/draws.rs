//! Draws follow the distribution, and depend on nothing but what they should.

use super::{Sampling, Scratch, choose, isa, probabilities, sampling, softmax};
use gpt2rs::simd::Isa;

/// Scores (48,) whose probabilities go from a fifth to a hundred-thousandth, in no order.
fn logits() -> Vec<f32> {
    (0..48).map(|id| ((id * 29) % 48) as f32 * -0.2).collect()
}

/// How often each token (V,) comes in 200,000 draws over 400 returned sequences and 500 positions.
fn counts(settings: &Sampling, logits: &[f32]) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    let mut scratch = Scratch::default();
    let tokens = vec![0; 500];
    for index in 0..400 {
        let settings = Sampling { index, ..settings.clone() };
        for position in 0..500 {
            let sample = settings.choose(isa(), logits, &tokens[..position], &mut scratch).unwrap();
            counts[sample.token as usize] += 1;
        }
    }
    counts
}

/// Pearson's statistic of counts against a distribution, and its value that 1 in 1,000 true draws exceeds (Wilson and
/// Hilferty's approximation). Tokens expected fewer than ten times are counted as one.
fn chi_squared(counts: &[u32], distribution: &[f64]) -> (f64, f64) {
    let draws = f64::from(counts.iter().sum::<u32>());
    let mut cells = Vec::new();
    let mut rare = (0.0, 0.0);
    for (&count, &probability) in counts.iter().zip(distribution) {
        let (count, expected) = (f64::from(count), probability * draws);
        if expected >= 10.0 {
            cells.push((count, expected));
        } else {
            rare = (rare.0 + count, rare.1 + expected);
        }
    }
    if rare.1 > 0.0 {
        cells.push(rare);
    }
    assert!(rare.1 > 0.0 || rare.0 == 0.0, "a token without probability was drawn");
    let statistic = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let freedom = (cells.len() - 1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    (statistic, freedom * (1.0 - spread + 3.09 * spread.sqrt()).powi(3))
}

/// `distribution` without the tokens that `keep` refuses, renormalised.
fn only(distribution: &[f64], keep: impl Fn(usize) -> bool) -> Vec<f64> {
    let kept: Vec<f64> =
        (0..distribution.len()).map(|id| if keep(id) { distribution[id] } else { 0.0 }).collect();
    let sum: f64 = kept.iter().sum();
    kept.iter().map(|p| p / sum).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let logits = logits();
    let scores: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    let plain = softmax(&scores, 1.0);
    let better = |distribution: &[f64], id: usize| -> Vec<f64> {
        (0..48).filter(|&other| scores[other] > scores[id]).map(|other| distribution[other]).collect()
    };
    let warm = softmax(&scores, 1.5);
    let cases = [
        (Sampling { seed: 1, ..sampling() }, plain.clone()),
        (Sampling { seed: 2, temperature: 1.5, ..sampling() }, warm.clone()),
        (Sampling { seed: 3, top_k: Some(9), ..sampling() }, only(&plain, |id| better(&plain, id).len() < 9)),
        (
            Sampling { seed: 4, top_p: Some(0.9), temperature: 1.5, ..sampling() },
            only(&warm, |id| better(&warm, id).iter().sum::<f64>() < 0.9),
        ),
    ];
    for (settings, distribution) in &cases {
        let counts = counts(settings, &logits);
        let (statistic, limit) = chi_squared(&counts, distribution);
        assert!(statistic < limit, "{settings:?}: {statistic} against {limit}");
        // The same draws tell a distribution apart that is only slightly another.
        let temperature = settings.temperature * 1.03;
        let other = softmax(&scores, temperature);
        let (statistic, limit) = chi_squared(&counts, &only(&other, |id| distribution[id] > 0.0));
        assert!(statistic > limit, "{settings:?}: {statistic} against {limit}");
    }
}

#[test]
fn neighbouring_draws_are_independent() {
    let logits = [0.0f32; 8];
    let tokens = vec![0; 40_000];
    let draw = |index, position: usize| {
        choose(&Sampling { index, seed: 7, ..sampling() }, &logits, &tokens[..position]) as usize
    };
    let uniform = [1.0 / 64.0; 64];
    let (mut positions, mut indices) = (vec![0; 64], vec![0; 64]);
    for i in 0..20_000 {
        positions[8 * draw(0, 2 * i) + draw(0, 2 * i + 1)] += 1;
        indices[8 * draw(2 * i as u64, 1) + draw(2 * i as u64 + 1, 1)] += 1;
    }
    for pairs in [positions, indices] {
        let (statistic, limit) = chi_squared(&pairs, &uniform);
        assert!(statistic < limit, "{statistic} against {limit}");
    }
}

#[test]
fn a_draw_depends_on_seed_index_and_position_alone() {
    let logits: Vec<f32> = (0..5000).map(|id| ((id * 31) % 4999) as f32 * 1e-3).collect();
    let settings = |seed, index| Sampling { seed, index, top_p: Some(0.999), temperature: 0.9, ..sampling() };
    let mut scratch = Scratch::default();
    let mut different = [0; 3];
    for i in 0..100u64 {
        let tokens = vec![1; 100 + i as usize];
        let token = choose(&settings(i, 3), &logits, &tokens);
        // Other prompts, another split of the text into prompt and new, used scratch, every instruction set.
        let others = vec![2; tokens.len()];
        let elsewhere = Sampling { prompt_len: 50, logprobs: true, ..settings(i, 3) };
        for isa in Isa::available() {
            assert_eq!(elsewhere.choose(isa, &logits, &others, &mut scratch).unwrap().token, token);
        }
        different[0] += u32::from(token != choose(&settings(i + 1, 3), &logits, &tokens));
        different[1] += u32::from(token != choose(&settings(i, 4), &logits, &tokens));
        different[2] += u32::from(token != choose(&settings(i, 3), &logits, &tokens[1..]));
    }
    assert!(different.iter().all(|&n| n > 90), "{different:?}");
}

#[test]
fn one_distribution_on_every_instruction_set() {
    let logits: Vec<f32> = (0..3001).map(|id| ((id * 7919) % 3001) as f32 * 5e-3 - 40.0).collect();
    let settings = Sampling {
        temperature: 0.77,
        top_p: Some(0.98),
        typical_p: Some(0.95),
        eta_cutoff: Some(1e-5),
        ..sampling()
    };
    for settings in [sampling(), settings] {
        let expected = probabilities(&settings, &logits, &[]);
        for isa in Isa::available() {
            let actual = settings.probabilities(isa, &logits, &[], &mut Scratch::default()).unwrap();
            assert_eq!(actual, expected, "{}", isa.name());
        }
    }
}
