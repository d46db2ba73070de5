//! The greatest score, and rows that have none.

use super::{Error, Sampling, choose, probabilities, sampling, support, try_choose};

/// Values that repeat, in an order that looks random.
fn row(len: usize, distinct: usize) -> Vec<f32> {
    (0..len).map(|id| ((id * 7919 + 13) % 104_729 % distinct) as f32 - 50.0).collect()
}

#[test]
fn the_lowest_id_of_the_greatest_logit() {
    for len in [1, 2, 3, 15, 16, 17, 31, 255, 256, 257, 272, 511, 513, 1000, 50257] {
        for distinct in [1, 2, 5, 1000] {
            let mut logits = row(len, distinct);
            for _ in 0..3 {
                let mut naive = 0;
                for id in 0..len {
                    if logits[id] > logits[naive] {
                        naive = id;
                    }
                }
                assert_eq!(choose(&Sampling::default(), &logits, &[]), naive as u32, "{len} {distinct}");
                logits[naive] = -100.0;
            }
        }
    }
}

#[test]
fn zeros_of_either_sign_are_equal() {
    assert_eq!(choose(&Sampling::default(), &[-1.0, -0.0, 0.0], &[]), 1);
    let settings = Sampling { top_p: Some(0.1), ..sampling() };
    assert_eq!(support(&probabilities(&settings, &[-0.0, 0.0, -9.0], &[])), [0]);
}

#[test]
fn nan_is_never_chosen() {
    let mut logits = row(700, 90);
    let best = choose(&Sampling::default(), &logits, &[]) as usize;
    logits[best] = f32::NAN;
    let next = choose(&Sampling::default(), &logits, &[]) as usize;
    assert!(next != best && !logits[next].is_nan());
    for settings in [
        sampling(),
        Sampling { top_k: Some(3), ..sampling() },
        Sampling { top_p: Some(0.99), ..sampling() },
        Sampling { typical_p: Some(0.99), ..sampling() },
        Sampling { eta_cutoff: Some(1e-9), ..sampling() },
        Sampling { repetition_penalty: 2.0, ..sampling() },
    ] {
        let probabilities = probabilities(&settings, &logits, &[best as u32]);
        assert_eq!(probabilities[best], 0.0);
        assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{settings:?}");
    }
}

#[test]
fn all_banned_but_one() {
    for len in [1, 2, 300, 1000] {
        for only in [0, len / 2, len - 1] {
            let mut logits = vec![f32::NEG_INFINITY; len];
            logits[only] = -1e30;
            for settings in [
                Sampling::default(),
                sampling(),
                Sampling { temperature: 1e300, ..sampling() },
                Sampling { temperature: 1e-300, ..sampling() },
                Sampling { top_k: Some(2), top_p: Some(0.0), ..sampling() },
                Sampling { min_p: Some(1.0), typical_p: Some(0.5), ..sampling() },
                Sampling { epsilon_cutoff: Some(0.9), eta_cutoff: Some(0.9), ..sampling() },
            ] {
                assert_eq!(choose(&settings, &logits, &[]), only as u32, "{settings:?}");
            }
        }
    }
}

#[test]
fn a_row_without_a_candidate_is_an_error() {
    let banned = Sampling { suppress_tokens: vec![0, 1, 2], ..Sampling::default() };
    for (settings, logits) in [
        (Sampling::default(), vec![]),
        (Sampling::default(), vec![f32::NAN; 300]),
        (sampling(), vec![f32::NEG_INFINITY; 3]),
        (banned, vec![1.0, 2.0, 3.0]),
    ] {
        match try_choose(&settings, &logits, &[0, 0, 0, 0]) {
            Err(Error::NoCandidate { position: 4, greatest: f32::NEG_INFINITY }) => {}
            other => panic!("{other:?}"),
        }
    }
    let error = try_choose(&sampling(), &[1.0, f32::INFINITY], &[0]).unwrap_err();
    assert!(matches!(error, Error::NoCandidate { position: 1, greatest: f32::INFINITY }));
    assert!(error.to_string().contains("after 1 tokens") && error.to_string().contains("inf"));
}

#[test]
fn settings_that_nobody_validated_do_no_harm() {
    let nan = f64::NAN;
    for settings in [
        Sampling { temperature: nan, ..sampling() },
        Sampling { temperature: -1.0, ..sampling() },
        Sampling { temperature: 0.0, top_p: Some(nan), min_p: Some(nan), ..sampling() },
        Sampling { top_p: Some(-3.0), min_p: Some(7.0), typical_p: Some(-1.0), ..sampling() },
        Sampling { typical_p: Some(nan), epsilon_cutoff: Some(9.0), eta_cutoff: Some(9.0), ..sampling() },
        Sampling { prompt_len: 99, min_new_tokens: 3, frequency_penalty: 1.0, ..sampling() },
    ] {
        assert!(settings.validate(3).is_err() || settings.prompt_len == 99);
        assert!(choose(&settings, &[1.0, 2.0, 0.5], &[1]) < 3, "{settings:?}");
    }
}
