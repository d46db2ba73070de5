//! What `validate` refuses, and how it says so.

use super::{Sampling, sampling};
use std::collections::BTreeMap;

#[test]
fn the_defaults_and_the_ends_of_every_range_are_fine() {
    Sampling::default().validate(1).unwrap();
    Sampling {
        temperature: 1e-3,
        top_k: Some(0),
        top_p: Some(0.0),
        min_p: Some(1.0),
        typical_p: Some(1.0),
        epsilon_cutoff: Some(0.0),
        eta_cutoff: Some(0.999),
        repetition_penalty: 0.1,
        presence_penalty: -2.0,
        bad_words_ids: vec![vec![9]],
        suppress_tokens: vec![0, 9],
        logit_bias: BTreeMap::from([(9, f64::NEG_INFINITY), (0, 100.0)]),
        eos_token_ids: vec![50256],
        top_logprobs: 20,
        ..sampling()
    }
    .validate(10)
    .unwrap();
}

#[test]
fn each_refusal_names_setting_value_and_range() {
    let nan = f64::NAN;
    let bias = |id, bias| BTreeMap::from([(id, bias)]);
    let ids = "token ids from 0 to 9";
    for (settings, setting, value, range) in [
        (Sampling { temperature: 0.0, ..sampling() }, "temperature", "0", "above 0"),
        (Sampling { temperature: nan, ..sampling() }, "temperature", "NaN", "above 0"),
        (Sampling { temperature: f64::INFINITY, ..sampling() }, "temperature", "inf", "finite"),
        (Sampling { top_p: Some(1.5), ..sampling() }, "top_p", "1.5", "from 0 to 1"),
        (Sampling { top_p: Some(nan), ..sampling() }, "top_p", "NaN", "from 0 to 1"),
        (Sampling { min_p: Some(-0.1), ..sampling() }, "min_p", "-0.1", "from 0 to 1"),
        (Sampling { typical_p: Some(0.0), ..sampling() }, "typical_p", "0", "above 0 and at most 1"),
        (Sampling { epsilon_cutoff: Some(1.0), ..sampling() }, "epsilon_cutoff", "1", "below 1"),
        (Sampling { eta_cutoff: Some(-1.0), ..sampling() }, "eta_cutoff", "-1", "at least 0"),
        (Sampling { repetition_penalty: 0.0, ..sampling() }, "repetition_penalty", "0", "above 0"),
        (Sampling { presence_penalty: nan, ..sampling() }, "presence_penalty", "NaN", "finite"),
        (Sampling { frequency_penalty: f64::INFINITY, ..sampling() }, "frequency_penalty", "inf", "finite"),
        (Sampling { logit_bias: bias(0, f64::INFINITY), ..sampling() }, "logit_bias", "inf", "finite"),
        (Sampling { logit_bias: bias(0, nan), ..sampling() }, "logit_bias", "NaN", "finite"),
        (Sampling { logit_bias: bias(10, 1.0), ..sampling() }, "logit_bias", "10", ids),
        (Sampling { suppress_tokens: vec![3, 11], ..sampling() }, "suppress_tokens", "11", ids),
        (Sampling { bad_words_ids: vec![vec![1], vec![2, 12]], ..sampling() }, "bad_words_ids", "12", ids),
        (
            Sampling { bad_words_ids: vec![vec![1], vec![]], ..sampling() },
            "bad_words_ids",
            "[]",
            "at least one",
        ),
    ] {
        let message = settings.validate(10).expect_err(setting).to_string();
        assert!(message.starts_with(&format!("{setting} is {value};")), "{message}");
        assert!(message.contains(range), "{message}");
    }
    assert!(Sampling::default().validate(0).unwrap_err().to_string().starts_with("n_vocab is 0;"));
}
