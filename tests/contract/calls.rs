//! Calls at the borders: types mixed, more rows than a pass takes, stopped, concurrent, refused.

use super::floating_point_mode::{Mode, in_mode};
use super::*;
use gpt2rs::error::Error;
use gpt2rs::model::MAX_ROWS;
use gpt2rs::session::{self, DecodeScratch, Sequence};

/// Every type of weights with every type of cache: one answer each, and none that is another's.
#[test]
fn mixed_types_have_one_answer_each() {
    let tokens = text(0, 120, 301);
    let mut answers = Vec::new();
    for types in USUAL {
        for kv_dtype in [Dtype::F32, Dtype::BF16, Dtype::Int8] {
            let types = types.cached_in(kv_dtype);
            let reference = reference(ODD, types);
            let found = Types {
                dtype: reference.dtype(),
                kv_dtype: reference.kv_dtype(),
                precision: reference.precision(),
            };
            assert_eq!(found, types);
            let expected = pass(&reference, &mut reference.new_cache(), &tokens);
            assert!(expected.iter().all(|logit| logit.is_finite()));
            for isa in Isa::available() {
                let model = model(ODD, types, isa, 3);
                let mut cache = model.new_cache();
                let logits: Vec<f32> =
                    tokens.chunks(31).flat_map(|tokens| pass(&model, &mut cache, tokens)).collect();
                assert_bits(&logits, &expected, &format!("{types:?}, {}", isa.name()));
            }
            answers.push(expected);
        }
    }
    for (i, answer) in answers.iter().enumerate() {
        assert!(answers[..i].iter().all(|other| other != answer), "two types that round alike");
    }
}

/// What a model gets that does not ask for a type of cache.
#[test]
fn a_cache_is_held_as_the_weights_unless_asked_otherwise() {
    for types in USUAL {
        let options = Options { kv_dtype: None, ..types.options(fastest(), 1) };
        let checkpoint = checkpoint(WIDE);
        let config = Config::from_json(WIDE).unwrap();
        let model = Model::new(config, Origin::Checkpoint(&checkpoint), options).unwrap();
        assert_eq!(model.kv_dtype(), types.kv_dtype);
    }
}

/// Passes of at most 512 rows: one text that is longer, and a batch that is larger.
#[test]
fn more_rows_than_a_pass_takes() {
    let reference = reference(LONG, FLOAT32);
    let n_vocab = reference.config().n_vocab;
    let long = text(0, 650, n_vocab);
    assert!(long.len() > MAX_ROWS);
    let mut cache = reference.new_cache();
    let expected: Vec<f32> =
        long.chunks(64).flat_map(|tokens| pass(&reference, &mut cache, tokens)).collect();
    let last = &expected[(long.len() - 1) * n_vocab..];
    let mut states = Vec::new();
    for isa in Isa::available() {
        let model = model(LONG, FLOAT32, isa, 2);
        assert_bits(&session::logits(&model, &long, GO_ON).unwrap(), &expected, isa.name());
        states.push(session::hidden_states(&model, &long, GO_ON).unwrap());
        assert_bits(&states[0], states.last().unwrap(), isa.name());

        let texts: Vec<Vec<u32>> =
            [650, 300, 150, 1, 99].iter().enumerate().map(|(i, &len)| text(i, len, n_vocab)).collect();
        let alone: Vec<Vec<f32>> = texts
            .iter()
            .map(|text| {
                let mut sequence = Sequence::new(&model);
                session::prefill(&model, &mut [&mut sequence], &[text], GO_ON).unwrap();
                sequence.logits(&model, GO_ON).unwrap().to_vec()
            })
            .collect();
        assert_bits(&alone[0], last, isa.name());
        let mut batch: Vec<Sequence> = texts.iter().map(|_| Sequence::new(&model)).collect();
        let prompts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        session::prefill(&model, &mut batch.iter_mut().collect::<Vec<_>>(), &prompts, GO_ON).unwrap();
        for (sequence, alone) in batch.iter_mut().zip(&alone) {
            assert_bits(sequence.logits(&model, GO_ON).unwrap(), alone, isa.name());
        }
    }
    let state = &states[0];
    assert!(state.len() == long.len() * 16 && state.iter().all(|value| value.is_finite()));
}

/// Scores are log-probabilities of the same logits, also past the rows that are held at a time.
#[test]
fn scores_are_the_logits_log_softmax() {
    let expected = reference(ODD, FLOAT32);
    let tokens = text(3, 150, 301);
    let logits = session::logits(&expected, &tokens, GO_ON).unwrap();
    let first = session::score(&expected, &tokens, GO_ON).unwrap();
    assert_eq!(first.len(), tokens.len() - 1);
    for (i, (row, &score)) in logits.chunks(301).zip(&first).enumerate() {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        let exact = f64::from(row[tokens[i + 1] as usize] - max) - sum.ln();
        // Two roundings of the result; those inside it are of numbers up to ln V and exponentials, 1e-6 of 1.
        let bound = 1.2e-7 * exact.abs() + 1e-6;
        assert!((f64::from(score) - exact).abs() <= bound, "token {i}: {score} for {exact}");
    }
    for isa in Isa::available() {
        for mode in [Mode::Default, Mode::Hostile] {
            let model = model(ODD, FLOAT32, isa, 2);
            let scores = in_mode(mode, || session::score(&model, &tokens, GO_ON).unwrap());
            assert_bits(&scores, &first, isa.name());
        }
    }
}

/// A computation that is stopped before any of its layers leaves the caches as they were.
#[test]
fn a_cancelled_pass_leaves_nothing_behind() {
    let model = model(ODD, FLOAT32, fastest(), 2);
    let tokens = text(0, 100, 301);
    let expected = pass(&model, &mut model.new_cache(), &tokens);
    for layers in 0..model.config().n_layer {
        let mut cache = model.new_cache();
        pass(&model, &mut cache, &tokens[..35]);
        let fork = cache.clone();
        let asked = std::cell::Cell::new(0);
        let proceed = || asked.replace(asked.get() + 1) < layers;
        let mut logits = vec![0.0; 65 * 301];
        let mut runs = [Run { tokens: &text(5, 65, 301), cache: &mut cache, wanted: 1 }];
        let outcome = model.forward(&mut runs, Wanted::All(&mut logits), &proceed);
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
        for mut cache in [cache, fork] {
            assert_eq!(cache.len(), 35);
            assert_bits(&pass(&model, &mut cache, &tokens[35..]), &expected[35 * 301..], "afterwards");
        }
    }

    let mut sequence = Sequence::new(&model);
    session::prefill(&model, &mut [&mut sequence], &[&tokens[..35]], GO_ON).unwrap();
    let outcome = session::prefill(&model, &mut [&mut sequence], &[&tokens[35..]], &|| false);
    assert!(matches!(outcome, Err(Error::Cancelled)));
    assert_eq!(sequence.tokens(), &tokens[..35]);
    session::prefill(&model, &mut [&mut sequence], &[&tokens[35..]], GO_ON).unwrap();
    assert_bits(sequence.logits(&model, GO_ON).unwrap(), &expected[99 * 301..], "prefilled again");
}

/// Threads share a model: each gets the answer that it gets alone.
#[test]
fn concurrent_callers_get_their_serial_answers() {
    for n_threads in [1, 2] {
        let model = model(ODD, FLOAT32, fastest(), n_threads);
        let texts: Vec<Vec<u32>> = (0..4).map(|i| text(i, 60 + 20 * i, 301)).collect();
        let serial: Vec<Vec<f32>> =
            texts.iter().map(|text| pass(&model, &mut model.new_cache(), text)).collect();
        std::thread::scope(|scope| {
            for (text, expected) in texts.iter().zip(&serial) {
                let model = &model;
                scope.spawn(move || {
                    for piece in [usize::MAX, 13, 1] {
                        let mut cache = model.new_cache();
                        let logits: Vec<f32> =
                            text.chunks(piece).flat_map(|tokens| pass(model, &mut cache, tokens)).collect();
                        assert_bits(&logits, expected, "one of four threads");
                    }
                });
            }
        });
    }
}

/// Each is an error that names what was found and what is allowed, and leaves sequence and model usable.
#[test]
fn what_does_not_fit_is_refused() {
    let model = model(WIDE, FLOAT32, fastest(), 2);
    let (n_vocab, n_ctx) = (96, 256);
    let tokens = text(0, 20, n_vocab);
    let mut sequence = Sequence::new(&model);
    session::prefill(&model, &mut [&mut sequence], &[&tokens], GO_ON).unwrap();
    let expected = sequence.logits(&model, GO_ON).unwrap().to_vec();

    let outcome = session::prefill(&model, &mut [&mut sequence], &[&[3, 96, 5]], GO_ON);
    assert!(matches!(outcome, Err(Error::TokenOutOfRange { token: 96, n_vocab: 96 })), "{outcome:?}");
    let long = vec![1; n_ctx];
    let outcome = session::prefill(&model, &mut [&mut sequence], &[&long], GO_ON);
    assert!(matches!(outcome, Err(Error::ContextOverflow { wanted: 276, n_ctx: 256 })), "{outcome:?}");
    let outcome = session::prefill(&model, &mut [&mut Sequence::new(&model)], &[&[]], GO_ON);
    assert!(matches!(outcome, Err(Error::EmptySequence)), "{outcome:?}");
    assert_eq!(sequence.tokens(), tokens);
    assert_bits(sequence.logits(&model, GO_ON).unwrap(), &expected, "after errors");

    for tokens in [&[96][..], &[u32::MAX]] {
        let outcome = session::logits(&model, tokens, GO_ON);
        assert!(matches!(outcome, Err(Error::TokenOutOfRange { token, .. }) if token == tokens[0]));
    }
    for compute in [session::logits, session::hidden_states, session::score] {
        assert!(matches!(compute(&model, &[], GO_ON), Err(Error::EmptySequence)));
        let too_long = compute(&model, &vec![0; n_ctx + 1], GO_ON);
        assert!(matches!(too_long, Err(Error::ContextOverflow { wanted: 257, n_ctx: 256 })));
        assert!(compute(&model, &long, GO_ON).is_ok(), "as long as the context");
    }

    let mut full = Sequence::new(&model);
    session::prefill(&model, &mut [&mut full], &[&long], GO_ON).unwrap();
    let greedy = gpt2rs::sample::Sampling::default();
    let outcome = session::decode(&model, &mut [&mut full], &[&greedy], &mut DecodeScratch::default(), GO_ON);
    assert!(matches!(outcome, Err(Error::ContextOverflow { wanted: 257, n_ctx: 256 })), "{outcome:?}");
    full.truncate(0);
    assert!(matches!(full.logits(&model, GO_ON), Err(Error::EmptySequence)));
}
