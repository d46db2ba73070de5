//! Several tokens a pass: the tokens, log-probabilities and logits of plain decoding, bit by bit.

use super::*;
use gpt2rs::error::Error;
use gpt2rs::model::MAX_ROWS;
use gpt2rs::sample::{Sample, Sampling};
use gpt2rs::session::{self, DecodeScratch, Sequence};
use gpt2rs::speculate::{self, Speculator, Step, Text};

/// A text that keeps coming back to a few phrases, so that lookups are right at times and wrong at times.
fn phrases(which: usize, len: usize, n_vocab: usize) -> Vec<u32> {
    let phrases: Vec<Vec<u32>> = (0..3).map(|i| text(which + 10 * i, 3 + 2 * i, n_vocab)).collect();
    let order = text(which + 50, len, 3);
    order.into_iter().flat_map(|i| phrases[i as usize].clone()).take(len).collect()
}

/// Greedy and drawn, with and without what depends on the tokens before.
fn samplings(which: usize, prompt_len: usize) -> Sampling {
    let plain = Sampling { prompt_len, logprobs: true, index: which as u64, ..Sampling::default() };
    match which % 4 {
        0 => plain,
        1 => Sampling { do_sample: true, temperature: 0.4, seed: 9, top_logprobs: 3, ..plain },
        2 => Sampling { repetition_penalty: 1.1, no_repeat_ngram_size: 5, frequency_penalty: 0.1, ..plain },
        _ => Sampling { do_sample: true, top_p: Some(0.5), top_k: Some(7), seed: 3, ..plain },
    }
}

fn prefilled(model: &Model, prompt: &[u32]) -> Sequence {
    let mut sequence = Sequence::new(model);
    session::prefill(model, &mut [&mut sequence], &[prompt], GO_ON).unwrap();
    sequence
}

/// The text alone, a token a pass.
fn plain(model: &Model, prompt: &[u32], sampling: &Sampling, len: usize) -> (Vec<Sample>, Sequence) {
    let mut sequence = prefilled(model, prompt);
    let mut scratch = DecodeScratch::default();
    let samples = (0..len)
        .map(|_| {
            session::decode(model, &mut [&mut sequence], &[sampling], &mut scratch, GO_ON).unwrap().remove(0)
        })
        .collect();
    (samples, sequence)
}

/// All texts together, to their lengths; counts of what was proposed and accepted.
struct Batch<'a> {
    model: &'a Model,
    draft: Option<&'a Model>,
    sequences: Vec<Sequence>,
    samplings: Vec<Sampling>,
    speculators: Vec<Speculator>,
    samples: Vec<Vec<Sample>>,
    lengths: Vec<usize>,
    proposed: usize,
    accepted: usize,
}

impl Batch<'_> {
    fn pass(&mut self, proceed: session::Proceed<'_>) -> gpt2rs::error::Result<()> {
        let mut which = Vec::new();
        let mut texts = Vec::new();
        let others =
            self.samplings.iter().zip(&mut self.speculators).zip(self.samples.iter().zip(&self.lengths));
        for (i, (sequence, ((sampling, speculator), (samples, len)))) in
            self.sequences.iter_mut().zip(others).enumerate()
        {
            if samples.len() < *len {
                which.push(i);
                texts.push(Text { sequence, sampling, speculator, room: len - samples.len() });
            }
        }
        let mut scratch = DecodeScratch::default();
        let steps = speculate::decode(self.model, self.draft, &mut texts, &mut scratch, proceed)?;
        for (i, Step { samples, proposed, accepted }) in which.into_iter().zip(steps) {
            assert!(!samples.is_empty() && accepted <= proposed && samples.len() - accepted <= 1);
            self.samples[i].extend(samples);
            self.proposed += proposed;
            self.accepted += accepted;
        }
        Ok(())
    }

    fn unfinished(&self) -> bool {
        self.samples.iter().zip(&self.lengths).any(|(samples, len)| samples.len() < *len)
    }
}

/// Texts together and one by one, against plain decoding of each: how many tokens were proposed, and accepted.
fn check(model: &Model, draft: Option<&Model>, what: &str) -> (usize, usize) {
    let together = std::iter::once(0..N_TEXTS);
    let alone = (0..N_TEXTS).map(|i| i..i + 1);
    together.chain(alone).fold((0, 0), |(proposed, accepted), which| {
        let more = check_batch(model, draft, which, what);
        (proposed + more.0, accepted + more.1)
    })
}

const N_TEXTS: usize = 6;

/// Texts of different lengths, some up to the last position.
fn check_batch(
    model: &Model,
    draft: Option<&Model>,
    which: std::ops::Range<usize>,
    what: &str,
) -> (usize, usize) {
    let Config { n_vocab, n_ctx, .. } = *model.config();
    let lengths: [(usize, usize); N_TEXTS] =
        [(60, 90), (1, 70), (33, n_ctx - 33), (90, 60), (120, 1), (n_ctx - 40, 40)];
    let prompts: Vec<Vec<u32>> = which.clone().map(|i| phrases(i, lengths[i].0, n_vocab)).collect();
    let lengths: Vec<usize> = which.clone().map(|i| lengths[i].1).collect();
    let samplings: Vec<Sampling> =
        which.clone().zip(&prompts).map(|(i, prompt)| samplings(i, prompt.len())).collect();
    let speculators = which.map(|i| match draft {
        Some(draft) => Speculator::draft(model, draft, 1 + 3 * i).unwrap(),
        None => Speculator::lookup(1 + 3 * i, 1 + i % 3),
    });
    let mut batch = Batch {
        model,
        draft,
        sequences: prompts.iter().map(|prompt| prefilled(model, prompt)).collect(),
        speculators: speculators.collect(),
        samples: vec![Vec::new(); prompts.len()],
        samplings,
        lengths,
        proposed: 0,
        accepted: 0,
    };
    let (mut passes, mut stopped) = (0, 0);
    while batch.unfinished() {
        // Most passes are stopped at first, at one layer or another, which leaves nothing behind.
        let before: Vec<usize> = batch.sequences.iter().map(|sequence| sequence.tokens().len()).collect();
        let asked = std::cell::Cell::new(0);
        match batch.pass(&|| asked.replace(asked.get() + 1) < passes % 7) {
            Err(Error::Cancelled) => {
                let after = batch.sequences.iter().map(|sequence| sequence.tokens().len());
                assert!(before.into_iter().eq(after), "{what}");
                stopped += 1;
                batch.pass(GO_ON).unwrap();
            }
            outcome => outcome.unwrap(),
        }
        passes += 1;
    }
    assert!(stopped > 0 || passes == 1, "{what}");
    for (i, sequence) in batch.sequences.iter_mut().enumerate() {
        let (samples, mut alone) = plain(model, &prompts[i], &batch.samplings[i], batch.lengths[i]);
        assert_eq!(batch.samples[i], samples, "{what}, text {i}");
        assert_eq!(sequence.tokens(), alone.tokens(), "{what}, text {i}");
        let logits = sequence.logits(model, GO_ON).unwrap();
        assert_bits(logits, alone.logits(model, GO_ON).unwrap(), &format!("{what}, text {i}"));
    }
    (batch.proposed, batch.accepted)
}

#[test]
fn lookups_change_no_bit() {
    let (mut proposed, mut accepted) = (0, 0);
    for types in USUAL {
        for (isa, n_threads) in [("portable", 1), (fastest().name(), 3)] {
            let model = model(WIDE, types, Isa::named(isa).unwrap(), n_threads);
            let counts = check(&model, None, isa);
            proposed += counts.0;
            accepted += counts.1;
        }
    }
    assert!(0 < accepted && accepted < proposed, "{accepted} of {proposed}: both must have been seen");
}

/// The same weights rounded are right as a rule; half as large they are worth asking for. A model of other weights is
/// wrong as a rule, one of fewer positions falls silent.
#[test]
fn draft_models_change_no_bit() {
    let model = model(ODD, FLOAT32, fastest(), 2);
    let rounded = self::model(ODD, BFLOAT16, fastest(), 2);
    let (proposed, accepted) = check(&model, Some(&rounded), "rounded");
    assert!(2 * accepted > proposed && accepted < proposed, "{accepted} of {proposed}");
    let shape = r#"{"n_layer": 0, "n_head": 1, "n_embd": 8, "n_positions": 150, "vocab_size": 301}"#;
    let (proposed, accepted) = check(&model, Some(&self::model(shape, FLOAT32, fastest(), 1)), "small");
    assert!(accepted < proposed, "{accepted} of {proposed}");
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let model = model(ODD, FLOAT32, fastest(), 1);
    let other = self::model(WIDE, FLOAT32, fastest(), 1);
    let refused = Speculator::draft(&model, &other, 5).err().expect("an error").to_string();
    assert!(refused.starts_with("assistant_model is a model with a vocabulary of 96"), "{refused}");
}

/// The last rows of runs, as many as are asked for, are rows of the whole.
#[test]
fn any_number_of_last_rows() {
    let model = model(ODD, FLOAT32, fastest(), 2);
    let texts = [text(0, 40, 301), text(1, 3, 301), text(2, 17, 301), text(3, 5, 301)];
    let wanted = [7, 3, 0, 1];
    let mut caches: Vec<KvCache> = texts.iter().map(|_| model.new_cache()).collect();
    let mut runs: Vec<Run<'_>> = caches
        .iter_mut()
        .zip(&texts)
        .zip(wanted)
        .map(|((cache, tokens), wanted)| Run { tokens, cache, wanted })
        .collect();
    let mut logits = vec![0.0; 11 * 301];
    model.forward(&mut runs, Wanted::Last(&mut logits), GO_ON).unwrap();
    let expected: Vec<f32> = texts
        .iter()
        .zip(wanted)
        .flat_map(|(text, wanted)| {
            pass(&model, &mut model.new_cache(), text).split_off((text.len() - wanted) * 301)
        })
        .collect();
    assert_bits(&logits, &expected, "last rows");
}

/// A draft that has to read more than a pass takes first, and texts beyond what one pass verifies.
#[test]
fn more_than_a_pass_takes() {
    let model = model(LONG, FLOAT32, fastest(), 2);
    let draft = self::model(LONG, BFLOAT16, fastest(), 2);
    let prompt = phrases(0, MAX_ROWS + 60, 40);
    for n_texts in [1, 3, 40, 130] {
        for drafts in [false, true] {
            let first = prefilled(&model, &prompt);
            let mut batch = Batch {
                model: &model,
                draft: drafts.then_some(&draft),
                sequences: vec![first; n_texts],
                samplings: (0..n_texts).map(|i| samplings(i, prompt.len())).collect(),
                speculators: (0..n_texts)
                    .map(|_| {
                        if drafts {
                            Speculator::draft(&model, &draft, 9).unwrap()
                        } else {
                            Speculator::lookup(9, 2)
                        }
                    })
                    .collect(),
                samples: vec![Vec::new(); n_texts],
                lengths: vec![20; n_texts],
                proposed: 0,
                accepted: 0,
            };
            while batch.unfinished() {
                batch.pass(GO_ON).unwrap();
            }
            for (i, samples) in batch.samples.iter().enumerate().step_by(7) {
                let (expected, _) = plain(&model, &prompt, &batch.samplings[i], 20);
                assert_eq!(samples, &expected, "text {i} of {n_texts}");
            }
        }
    }
}
