//! Biases, penalties and bans, by hand.

use super::{Error, Sampling, Scratch, choose, isa, probabilities, sampling, support, try_choose};
use super::{assert_distribution, softmax};
use std::collections::BTreeMap;

const LOGITS: [f32; 6] = [1.5, -0.5, 3.0, 0.25, -2.0, 2.5];

/// Holds the distribution after `tokens` against the softmax of `scores`.
fn assert_scores(settings: &Sampling, tokens: &[u32], scores: [f64; 6]) {
    let settings = Sampling { do_sample: true, ..settings.clone() };
    let actual = probabilities(&settings, &LOGITS, tokens);
    assert_distribution(&actual, &softmax(&scores, 1.0), &format!("{settings:?} after {tokens:?}"));
}

fn allowed(settings: &Sampling, tokens: &[u32]) -> Vec<u32> {
    support(&probabilities(&Sampling { do_sample: true, ..settings.clone() }, &LOGITS, tokens))
}

#[test]
fn repetition_is_penalised_once_a_token_in_prompt_and_new_text() {
    let settings = Sampling { repetition_penalty: 2.0, prompt_len: 2, ..sampling() };
    assert_scores(&settings, &[2, 4, 2, 5, 2], [1.5, -0.5, 1.5, 0.25, -4.0, 1.25]);
}

#[test]
fn a_bias_comes_before_the_repetition_penalty() {
    let logit_bias = BTreeMap::from([(1, 2.5), (2, -4.0), (3, 1.0)]);
    let settings = Sampling { repetition_penalty: 2.0, logit_bias, ..sampling() };
    assert_scores(&settings, &[1, 2, 1, 2], [1.5, 1.0, -2.0, 1.25, -2.0, 2.5]);
}

#[test]
fn a_bias_of_minus_infinity_bans() {
    let logit_bias = BTreeMap::from([(2, f64::NEG_INFINITY)]);
    let settings = Sampling { repetition_penalty: 1.5, logit_bias, ..Sampling::default() };
    assert_eq!(choose(&settings, &LOGITS, &[2, 2]), 5);
    assert_eq!(allowed(&settings, &[2]), [0, 1, 3, 4, 5]);
}

#[test]
fn presence_and_frequency_count_new_tokens_only() {
    let settings = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, prompt_len: 3, ..sampling() };
    assert_scores(&settings, &[5, 5, 0, 2, 4, 2, 2], [1.5, -0.5, 1.75, 0.25, -2.75, 2.5]);
    assert_scores(&settings, &[5, 5, 0], LOGITS.map(f64::from));
    let settings = Sampling { frequency_penalty: -1.0, ..sampling() };
    assert_scores(&settings, &[1, 1], [1.5, 1.5, 3.0, 0.25, -2.0, 2.5]);
}

#[test]
fn they_come_after_the_repetition_penalty() {
    let settings = Sampling { repetition_penalty: 2.0, presence_penalty: 1.0, prompt_len: 1, ..sampling() };
    assert_scores(&settings, &[0, 2], [0.75, -0.5, 0.5, 0.25, -2.0, 2.5]);
}

#[test]
fn nothing_is_left_behind_for_the_next_choice() {
    let mut scratch = Scratch::default();
    let settings = Sampling { frequency_penalty: 0.5, repetition_penalty: 1.3, ..sampling() };
    for tokens in [&[2, 2, 5][..], &[0], &[2, 2, 5, 1]] {
        let shared = settings.probabilities(isa(), &LOGITS, tokens, &mut scratch).unwrap();
        assert_eq!(shared, probabilities(&settings, &LOGITS, tokens));
    }
}

#[test]
fn no_ngram_comes_twice() {
    let settings = |n| Sampling { no_repeat_ngram_size: n, ..Sampling::default() };
    assert_eq!(allowed(&settings(1), &[0, 3, 0]), [1, 2, 4, 5]);
    assert_eq!(allowed(&settings(2), &[0, 3, 0, 1, 0]), [0, 2, 4, 5]);
    assert_eq!(allowed(&settings(3), &[0, 3, 5, 1, 0, 3]), [0, 1, 2, 3, 4]);
    assert_eq!(allowed(&settings(3), &[3, 3, 3]), [0, 1, 2, 4, 5]);
    assert_eq!(allowed(&settings(4), &[3, 3, 3]), [0, 1, 2, 3, 4, 5]);
    assert_eq!(allowed(&settings(2), &[]), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn bad_words_of_one_two_and_three_tokens() {
    let bad_words_ids = vec![vec![2], vec![0, 5], vec![0, 1, 3]];
    let settings = Sampling { bad_words_ids, ..Sampling::default() };
    assert_eq!(allowed(&settings, &[]), [0, 1, 3, 4, 5]);
    assert_eq!(allowed(&settings, &[4, 0]), [0, 1, 3, 4]);
    assert_eq!(allowed(&settings, &[4, 0, 1]), [0, 1, 4, 5]);
    assert_eq!(allowed(&settings, &[0, 1, 4]), [0, 1, 3, 4, 5]);
    assert_eq!(choose(&settings, &LOGITS, &[1, 0]), 0);
}

#[test]
fn bad_words_that_transformers_ignores() {
    let bad_words_ids = vec![vec![5], vec![0, 5], vec![0, 1, 3]];
    let settings = Sampling { bad_words_ids, eos_token_ids: vec![4, 5], ..Sampling::default() };
    assert_eq!(allowed(&settings, &[1]), [0, 1, 2, 3, 4, 5], "an eos on its own");
    assert_eq!(allowed(&settings, &[3, 0]), [0, 1, 2, 3, 4], "an eos as the end of a word");
    assert_eq!(allowed(&settings, &[0]), [0, 1, 2, 3, 4, 5], "a word longer than the text");
    assert_eq!(allowed(&settings, &[0, 1]), [0, 1, 2, 3, 4, 5], "a word longer than the text");
}

#[test]
fn no_eos_before_the_least_number_of_new_tokens() {
    let settings = Sampling {
        eos_token_ids: vec![2, 5, 50256],
        min_new_tokens: 2,
        prompt_len: 3,
        ..Sampling::default()
    };
    assert_eq!(choose(&settings, &LOGITS, &[0, 0, 0]), 0);
    assert_eq!(allowed(&settings, &[0, 0, 0, 1]), [0, 1, 3, 4]);
    assert_eq!(choose(&settings, &LOGITS, &[0, 0, 0, 1, 1]), 2);
}

#[test]
fn suppressed_tokens_never_come() {
    let settings = Sampling { suppress_tokens: vec![2, 0], ..Sampling::default() };
    assert_eq!(choose(&settings, &LOGITS, &[]), 5);
    assert_eq!(allowed(&settings, &[]), [1, 3, 4, 5]);
}

#[test]
fn ids_outside_the_vocabulary_are_errors() {
    for (settings, tokens) in [
        (Sampling { suppress_tokens: vec![6], ..Sampling::default() }, vec![]),
        (Sampling { bad_words_ids: vec![vec![6]], ..Sampling::default() }, vec![]),
        (Sampling { logit_bias: BTreeMap::from([(6, 1.0)]), ..Sampling::default() }, vec![]),
        (Sampling { repetition_penalty: 2.0, ..Sampling::default() }, vec![0, 6]),
        (Sampling { frequency_penalty: 2.0, ..Sampling::default() }, vec![6]),
        (Sampling { no_repeat_ngram_size: 1, ..Sampling::default() }, vec![6]),
    ] {
        match try_choose(&settings, &LOGITS, &tokens) {
            Err(Error::TokenOutOfRange { token: 6, n_vocab: 6 }) => {}
            other => panic!("{settings:?}: {other:?}"),
        }
    }
}
