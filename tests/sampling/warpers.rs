//! Warpers against naive float64 definitions, on rows with ties, bans and odd sizes.

use super::{Sampling, Scratch, assert_distribution, choose, isa, probabilities, sampling, softmax, support};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Thresholds are decided in float32 here and in float64 there: what is nearer to one than this is left open.
const NEAR: f64 = 2e-5;

/// Whether a naive definition keeps a token, where that is beyond doubt.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kept {
    Yes,
    No,
    Either,
}

fn kept(value: f64, threshold: f64) -> Kept {
    if value >= threshold * (1.0 + NEAR) {
        Kept::Yes
    } else if value < threshold * (1.0 - NEAR) {
        Kept::No
    } else {
        Kept::Either
    }
}

/// ids by descending score, ascending id.
fn ranked(scores: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..scores.len()).collect();
    ids.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    ids
}

fn naive_top_k(scores: &[f64], k: usize) -> Vec<Kept> {
    let kth = scores[ranked(scores)[k.min(scores.len()) - 1]];
    scores.iter().map(|&score| if score >= kth { Kept::Yes } else { Kept::No }).collect()
}

fn naive_top_p(scores: &[f64], p: &[f64], top_p: f64) -> Vec<Kept> {
    let mut better = 0.0;
    let mut result = vec![Kept::No; p.len()];
    for (rank, &id) in ranked(scores).iter().enumerate() {
        // Kept when top_p is above the mass of the better ones; sums differ by rounding relative to 1.
        result[id] = match top_p - better {
            _ if rank == 0 => Kept::Yes,
            left if left > NEAR => Kept::Yes,
            left if left < -NEAR => Kept::No,
            _ => Kept::Either,
        };
        better += p[id];
    }
    result
}

fn naive_cutoff(scores: &[f64], p: &[f64], cutoff: f64) -> Vec<Kept> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    p.iter().zip(scores).map(|(&p, &score)| if score == max { Kept::Yes } else { kept(p, cutoff) }).collect()
}

fn entropy(p: &[f64]) -> f64 {
    p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum()
}

fn naive_typical(p: &[f64], mass: f64) -> Vec<Kept> {
    let entropy = entropy(p);
    let distance: Vec<f64> = p.iter().map(|p| (-p.ln() - entropy).abs()).collect();
    let mut ids: Vec<usize> = (0..p.len()).filter(|&id| p[id] > 0.0).collect();
    ids.sort_by(|&a, &b| distance[a].total_cmp(&distance[b]));
    let last = |mass: f64| {
        let mut sum = 0.0;
        let reached = ids.iter().find(|&&id| {
            sum += p[id];
            sum >= mass
        });
        distance[*reached.unwrap_or_else(|| ids.last().unwrap())]
    };
    let (least, most) = (last(mass - NEAR), last(mass + NEAR));
    let decide = |d: &f64| match *d {
        d if d < least - NEAR => Kept::Yes,
        d if d > most + NEAR => Kept::No,
        _ => Kept::Either,
    };
    distance.iter().map(decide).collect()
}

/// Holds `settings` against the naive decision on each token and the renormalised float64 probabilities.
fn compare(settings: &Sampling, logits: &[f32], scores: &[f64], decisions: &[Kept]) {
    let actual = probabilities(settings, logits, &[]);
    let p = softmax(scores, settings.temperature);
    let max = p.iter().copied().fold(0.0, f64::max);
    let mut expected = vec![0.0; p.len()];
    for id in 0..p.len() {
        let keeps = actual[id] > 0.0;
        // Weights end at 2^-41 of the greatest.
        if p[id] > max * 2f64.powi(-40) {
            let what = (settings, id, actual[id], p[id], decisions[id]);
            assert!(decisions[id] == Kept::Either || (decisions[id] == Kept::Yes) == keeps, "{what:?}");
        } else {
            assert!(actual[id] < 2f64.powi(-39), "{settings:?}: token {id}");
        }
        if keeps {
            expected[id] = p[id];
        }
    }
    let sum: f64 = expected.iter().sum();
    expected.iter_mut().for_each(|p| *p /= sum);
    assert_distribution(&actual, &expected, &format!("{settings:?}"));
}

/// Rows with ties and bans, at least one score finite.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let score = prop_oneof![
        6 => -9.0f32..6.0,
        3 => (-8i8..8).prop_map(|n| f32::from(n) * 0.5),
        1 => Just(f32::NEG_INFINITY),
    ];
    (prop::collection::vec(score, 1..700), -6.0f32..6.0, any::<prop::sample::Index>()).prop_map(
        |(mut row, finite, at)| {
            let at = at.index(row.len());
            row[at] = finite;
            row
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn equal_to_the_naive_definitions(
        logits in rows(),
        temperature in 0.4f64..2.5,
        k in 1usize..800,
        share in 0.02f64..0.98,
        small in 1e-5f64..0.3,
    ) {
        let plain = Sampling { temperature, ..sampling() };
        let scores: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        let p = softmax(&scores, temperature);
        let best = p.iter().copied().fold(0.0, f64::max);
        compare(&plain, &logits, &scores, &naive_cutoff(&scores, &p, f64::MIN_POSITIVE));
        compare(
            &Sampling { top_k: Some(k), ..plain.clone() },
            &logits, &scores, &naive_top_k(&scores, k),
        );
        compare(
            &Sampling { top_p: Some(share), ..plain.clone() },
            &logits, &scores, &naive_top_p(&scores, &p, share),
        );
        compare(
            &Sampling { min_p: Some(small), ..plain.clone() },
            &logits, &scores, &naive_cutoff(&scores, &p, small * best),
        );
        compare(
            &Sampling { typical_p: Some(share), ..plain.clone() },
            &logits, &scores, &naive_typical(&p, share),
        );
        compare(
            &Sampling { epsilon_cutoff: Some(small), ..plain.clone() },
            &logits, &scores, &naive_cutoff(&scores, &p, small),
        );
        let eta = small.min(small.sqrt() * (-entropy(&p)).exp());
        compare(
            &Sampling { eta_cutoff: Some(small), ..plain.clone() },
            &logits, &scores, &naive_cutoff(&scores, &p, eta),
        );
        // One after another, each sees the renormalised probabilities that the one before it left.
        let first = naive_top_k(&scores, k);
        let left: Vec<f64> = (0..scores.len())
            .map(|id| if first[id] == Kept::Yes { scores[id] } else { f64::NEG_INFINITY })
            .collect();
        compare(
            &Sampling { top_k: Some(k), top_p: Some(share), ..plain },
            &logits, &left, &naive_top_p(&left, &softmax(&left, temperature), share),
        );
    }

    #[test]
    fn one_token_at_least_is_kept_and_can_be_chosen(
        mut logits in rows(),
        do_sample in any::<bool>(),
        temperature in prop_oneof![Just(1e-9), Just(1e9), 0.1f64..3.0],
        top_k in prop::option::of(0usize..50),
        top_p in prop::option::of(0.0f64..=1.0),
        min_p in prop::option::of(0.0f64..=1.0),
        typical_p in prop::option::of(1e-6f64..=1.0),
        epsilon_cutoff in prop::option::of(0.0f64..1.0),
        eta_cutoff in prop::option::of(0.0f64..1.0),
        penalties in (0.1f64..3.0, -2.0f64..2.0, -2.0f64..2.0),
        tokens in prop::collection::vec(0u32..700, 0..30),
        seed in any::<u64>(),
    ) {
        let n_vocab = logits.len() as u32;
        let tokens: Vec<u32> = tokens.into_iter().map(|token| token % n_vocab).collect();
        let nan = (n_vocab / 2) as usize;
        if logits.iter().enumerate().any(|(id, &logit)| id != nan && logit.is_finite()) {
            logits[nan] = f32::NAN;
        }
        let settings = Sampling {
            do_sample, temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff,
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            frequency_penalty: penalties.2,
            logit_bias: BTreeMap::from([(0, 1.0)]),
            prompt_len: 3,
            seed,
            ..Sampling::default()
        };
        settings.validate(logits.len()).unwrap();
        let probabilities = probabilities(&settings, &logits, &tokens);
        prop_assert!(!support(&probabilities).is_empty());
        prop_assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let token = choose(&settings, &logits, &tokens);
        prop_assert!(probabilities[token as usize] > 0.0 && logits[token as usize].is_finite());
    }
}

#[test]
fn scores_that_tie_with_the_last_of_top_k_stay() {
    let logits = [2.0, 1.0, 3.0, 2.0, 2.0, 0.0];
    let support_of = |k| support(&probabilities(&Sampling { top_k: Some(k), ..sampling() }, &logits, &[]));
    assert_eq!(support_of(1), [2]);
    assert_eq!(support_of(2), [0, 2, 3, 4]);
    assert_eq!(support_of(4), [0, 2, 3, 4]);
    assert_eq!(support_of(5), [0, 1, 2, 3, 4]);
    assert_eq!(support_of(6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(support_of(600), [0, 1, 2, 3, 4, 5]);
    assert_eq!(support_of(0), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn top_p_takes_equal_scores_by_id_until_the_mass_is_reached_exactly() {
    let support_of = |top_p: f64, logits: &[f32]| {
        support(&probabilities(&Sampling { top_p: Some(top_p), ..sampling() }, logits, &[]))
    };
    for len in [4, 16, 1024] {
        let logits = vec![-7.5; len];
        let quarter: Vec<u32> = (0..len as u32 / 4).collect();
        assert_eq!(support_of(0.25, &logits), quarter, "a quarter of {len}, no token more");
        let more: Vec<u32> = (0..=len as u32 / 4).collect();
        assert_eq!(support_of(0.25 + 1e-9, &logits), more);
        assert_eq!(support_of(0.0, &logits), [0]);
        assert_eq!(support_of(1.0, &logits).len(), len);
    }
}

#[test]
fn typical_sampling_may_drop_the_likeliest_and_keeps_ties() {
    // One likely token and many equal ones: the mean log-probability is near theirs.
    let mut logits = vec![0.0; 1000];
    logits[500] = 5.0;
    let settings = Sampling { typical_p: Some(0.3), ..sampling() };
    let support = support(&probabilities(&settings, &logits, &[]));
    assert_eq!(support.len(), 999);
    assert!(!support.contains(&500));
    // The greatest score of those left is what a cutoff then always keeps.
    let settings = Sampling { typical_p: Some(0.3), epsilon_cutoff: Some(0.5), ..sampling() };
    let probabilities = settings.probabilities(isa(), &logits, &[], &mut Scratch::default()).unwrap();
    assert_eq!(crate::support(&probabilities).len(), 999);
}
