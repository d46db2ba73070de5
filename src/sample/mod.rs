//! Logits to token: biases, penalties and bans, then the greatest score or a draw.
//!
//! ```text
//! logits (V,) -> processors -> argmax                          -> token
//!                           -> temperature, warpers -> weights -> token
//! ```

use crate::error::{Error, Result};
use crate::philox::random_bits;
use crate::simd::{Isa, in_default_mode};
use std::collections::BTreeMap;

mod log_softmax;
mod peaks;
mod processors;
mod validate;
mod warpers;

pub use log_softmax::log_softmax_at;

use log_softmax::LogSoftmax;
use peaks::{Peaks, descending};
use warpers::{Candidates, Room};

/// How the next tokens of one returned sequence are chosen.
///
/// The names and meanings are those of Hugging Face transformers' `generate`, whose processors and warpers apply in its
/// order; `presence_penalty`, `frequency_penalty`, `logprobs` and `top_logprobs` are OpenAI's. The choice depends on
/// these settings, the logits and the tokens so far, and on nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Draw from the distribution; otherwise take the greatest score, the lowest id among equals.
    pub do_sample: bool,
    /// Divides the scores; above 0.
    pub temperature: f64,
    /// Keep the `top_k` greatest scores, and those equal to the last of them; 0 keeps all.
    pub top_k: Option<usize>,
    /// Keep the likeliest tokens until their probabilities reach `top_p` (0 to 1).
    pub top_p: Option<f64>,
    /// Keep tokens at least `min_p` (0 to 1) times as likely as the likeliest.
    pub min_p: Option<f64>,
    /// Keep the tokens whose log-probability is nearest to the mean until their probabilities reach `typical_p`
    /// (above 0, to 1).
    pub typical_p: Option<f64>,
    /// Keep tokens of at least this probability (0 to below 1).
    pub epsilon_cutoff: Option<f64>,
    /// Keep tokens whose probability is at least min(eta, sqrt(eta) * exp(-entropy)) (0 to below 1).
    pub eta_cutoff: Option<f64>,
    /// Scores of tokens in prompt or new text are divided by this (above 0), or multiplied where negative.
    pub repetition_penalty: f64,
    /// Subtracted from the score of each token in the new text.
    pub presence_penalty: f64,
    /// Subtracted from the score of each token in the new text as often as it is there.
    pub frequency_penalty: f64,
    /// No run of so many tokens comes twice in prompt and new text; 0 allows all.
    pub no_repeat_ngram_size: usize,
    /// Token sequences that are never completed. As in transformers, one that is just an eos is ignored, and so is one
    /// longer than the text so far.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Added to the scores of these tokens first of all; -inf bans.
    pub logit_bias: BTreeMap<u32, f64>,
    /// Tokens that end a text; those outside the vocabulary never come.
    pub eos_token_ids: Vec<u32>,
    /// No eos before so many new tokens.
    pub min_new_tokens: usize,
    /// Key of the random numbers.
    pub seed: u64,
    /// Number of this sequence among those returned for its prompt.
    pub index: u64,
    /// Length of the prompt: where the new tokens start.
    pub prompt_len: usize,
    /// Whether the chosen token's log-probability is wanted.
    pub logprobs: bool,
    /// How many of the likeliest tokens are wanted with their log-probabilities.
    pub top_logprobs: usize,
}

impl Default for Sampling {
    /// Greedy, with every other setting off.
    fn default() -> Sampling {
        Sampling {
            do_sample: false,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            typical_p: None,
            epsilon_cutoff: None,
            eta_cutoff: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            suppress_tokens: Vec::new(),
            logit_bias: BTreeMap::new(),
            eos_token_ids: Vec::new(),
            min_new_tokens: 0,
            seed: 0,
            index: 0,
            prompt_len: 0,
            logprobs: false,
            top_logprobs: 0,
        }
    }
}

/// A chosen token. Log-probabilities are the model's own: natural logarithms, before any setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its id.
    pub token: u32,
    /// Its log-probability, where [`Sampling::logprobs`] asks for it.
    pub logprob: Option<f32>,
    /// The [`Sampling::top_logprobs`] likeliest tokens (or all V) with their log-probabilities, the likeliest first,
    /// the lowest id first among equals.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Room that a choice needs, used again by the next one.
#[derive(Debug, Default)]
pub struct Scratch {
    /// (V,), when processors change the logits
    scores: Vec<f32>,
    /// (V,) zeros
    counts: Vec<u32>,
    peaks: Peaks,
    room: Room,
    ids: Vec<u32>,
}

impl Sampling {
    /// Chooses the token that follows `tokens` (prompt and new ones), whose model output is `logits` (V,).
    ///
    /// A draw takes its 64 random bits from Philox4x32-10 under (seed; index, `tokens.len()`). Probabilities are
    /// integers in units of 2^-40 of the greatest, so that their sums are exact, and the token is the inverse of the
    /// cumulative distribution by ascending id. A logit of NaN is never chosen. [`Sampling::validate`] says whether the
    /// settings make sense.
    ///
    /// # Errors
    /// [`Error::NoCandidate`] when the greatest score is not finite: all are banned or NaN, or one overflowed.
    /// [`Error::TokenOutOfRange`] when a token that a setting looks at is not below V.
    pub fn choose(&self, isa: Isa, logits: &[f32], tokens: &[u32], scratch: &mut Scratch) -> Result<Sample> {
        in_default_mode(|| {
            let token = self.with_scores(logits, tokens, scratch, |scores, peaks, room| {
                if self.do_sample {
                    let bits = random_bits(self.seed, self.index, tokens.len() as u64);
                    Candidates::new(self, isa, scores, peaks, room).draw(bits)
                } else {
                    peaks.argmax(scores) as u32
                }
            })?;
            let mut sample = Sample { token, logprob: None, top_logprobs: Vec::new() };
            if self.logprobs || self.top_logprobs > 0 {
                self.add_logprobs(isa, logits, scratch, &mut sample);
            }
            Ok(sample)
        })
    }

    /// The distribution (V,) that [`Sampling::choose`] draws from; 1 for one token when it does not draw.
    ///
    /// # Errors
    /// As [`Sampling::choose`].
    pub fn probabilities(
        &self,
        isa: Isa,
        logits: &[f32],
        tokens: &[u32],
        scratch: &mut Scratch,
    ) -> Result<Vec<f64>> {
        in_default_mode(|| {
            let mut probabilities = vec![0.0; logits.len()];
            self.with_scores(logits, tokens, scratch, |scores, peaks, room| {
                if self.do_sample {
                    for (id, probability) in Candidates::new(self, isa, scores, peaks, room).probabilities() {
                        probabilities[id as usize] = probability;
                    }
                } else {
                    probabilities[peaks.argmax(scores)] = 1.0;
                }
            })?;
            Ok(probabilities)
        })
    }

    /// Calls `use_scores` with the processed scores and their peaks, once one of them can be chosen.
    fn with_scores<T>(
        &self,
        logits: &[f32],
        tokens: &[u32],
        scratch: &mut Scratch,
        use_scores: impl FnOnce(&[f32], &mut Peaks, &mut Room) -> T,
    ) -> Result<T> {
        let Scratch { scores, counts, peaks, room, .. } = scratch;
        let scores = if self.leaves_scores(tokens) {
            logits
        } else {
            self.process(logits, tokens, scores, counts)?;
            scores
        };
        peaks.measure(scores);
        let greatest = peaks.max();
        if !greatest.is_finite() {
            return Err(Error::NoCandidate { position: tokens.len(), greatest });
        }
        Ok(use_scores(scores, peaks, room))
    }

    fn add_logprobs(&self, isa: Isa, logits: &[f32], scratch: &mut Scratch, sample: &mut Sample) {
        let Scratch { peaks, ids, .. } = scratch;
        peaks.measure(logits);
        let log_softmax = LogSoftmax::of(isa, logits, peaks.max());
        if self.logprobs {
            sample.logprob = Some(log_softmax.at(logits[sample.token as usize]));
        }
        peaks.best(logits, self.top_logprobs, ids);
        ids.sort_by_key(|&id| descending(logits[id as usize]));
        ids.truncate(self.top_logprobs);
        sample.top_logprobs.extend(ids.iter().map(|&id| (id, log_softmax.at(logits[id as usize]))));
    }
}
