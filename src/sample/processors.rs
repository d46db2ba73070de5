//! Settings that change scores, greedy or not: biases, penalties and bans.
//!
//! Equal to Hugging Face transformers' processors (`generation/logits_process.py`), in the order in which its
//! `generate` applies them; the presence and frequency penalties, which it lacks, are OpenAI's and vLLM's.

use super::Sampling;
use crate::error::{Error, Result};

/// Sets the score of `token` to -inf.
fn ban(scores: &mut [f32], token: u32) -> Result<()> {
    *score_mut(scores, token)? = f32::NEG_INFINITY;
    Ok(())
}

fn score_mut(scores: &mut [f32], token: u32) -> Result<&mut f32> {
    let n_vocab = scores.len();
    scores.get_mut(token as usize).ok_or(Error::TokenOutOfRange { token, n_vocab })
}

impl Sampling {
    /// Of prompt and new tokens, the new ones.
    fn new_tokens<'t>(&self, tokens: &'t [u32]) -> &'t [u32] {
        tokens.get(self.prompt_len..).unwrap_or_default()
    }

    /// Whether no setting changes the scores after `tokens`, so that the logits may be used as they are.
    pub(super) fn leaves_scores(&self, tokens: &[u32]) -> bool {
        self.logit_bias.is_empty()
            && self.repetition_penalty == 1.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.no_repeat_ngram_size == 0
            && self.bad_words_ids.is_empty()
            && (self.eos_token_ids.is_empty() || self.new_tokens(tokens).len() >= self.min_new_tokens)
            && self.suppress_tokens.is_empty()
    }

    /// Fills `scores` (V,) with the logits (V,) as the settings change them after `tokens`. `counts` is room for one
    /// number a token, all zero before and after.
    pub(super) fn process(
        &self,
        logits: &[f32],
        tokens: &[u32],
        scores: &mut Vec<f32>,
        counts: &mut Vec<u32>,
    ) -> Result<()> {
        scores.clear();
        scores.extend_from_slice(logits);
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= logits.len()) {
            return Err(Error::TokenOutOfRange { token, n_vocab: logits.len() });
        }
        self.add_logit_bias(scores)?;
        self.penalise_repetition(logits, tokens, scores);
        self.penalise_frequency(self.new_tokens(tokens), scores, counts);
        self.ban_repeated_ngrams(tokens, scores);
        self.ban_bad_words(tokens, scores)?;
        if self.new_tokens(tokens).len() < self.min_new_tokens {
            // Configurations of small vocabularies often keep GPT-2's eos, 50256, which then no text can reach.
            for &eos in self.eos_token_ids.iter().filter(|&&eos| (eos as usize) < logits.len()) {
                ban(scores, eos)?;
            }
        }
        self.suppress_tokens.iter().try_for_each(|&token| ban(scores, token))
    }

    fn add_logit_bias(&self, scores: &mut [f32]) -> Result<()> {
        for (&token, &bias) in &self.logit_bias {
            *score_mut(scores, token)? += bias as f32;
        }
        Ok(())
    }

    /// Once for each distinct token of prompt and new text (CTRL, Keskar et al. 2019).
    fn penalise_repetition(&self, logits: &[f32], tokens: &[u32], scores: &mut [f32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        for &token in tokens {
            // From the logit anew, so that a token that comes again gets the same score again, not a second penalty.
            let bias = self.logit_bias.get(&token).map_or(0.0, |&bias| bias as f32);
            let score = logits[token as usize] + bias;
            scores[token as usize] = if score < 0.0 { score * penalty } else { score / penalty };
        }
    }

    fn penalise_frequency(&self, new_tokens: &[u32], scores: &mut [f32], counts: &mut Vec<u32>) {
        if self.presence_penalty == 0.0 && self.frequency_penalty == 0.0 {
            return;
        }
        counts.resize(scores.len(), 0);
        for &token in new_tokens {
            counts[token as usize] += 1;
        }
        for &token in new_tokens {
            let count = std::mem::take(&mut counts[token as usize]);
            if count > 0 {
                let penalty = self.presence_penalty + self.frequency_penalty * f64::from(count);
                scores[token as usize] -= penalty as f32;
            }
        }
    }

    /// Bans each token that would complete an n-gram that prompt and new text already have.
    fn ban_repeated_ngrams(&self, tokens: &[u32], scores: &mut [f32]) {
        let n = self.no_repeat_ngram_size;
        if n == 0 || tokens.len() < n {
            return;
        }
        let begun = &tokens[tokens.len() + 1 - n..];
        for ngram in tokens.windows(n) {
            if let [start @ .., last] = ngram
                && start == begun
            {
                scores[*last as usize] = f32::NEG_INFINITY;
            }
        }
    }

    /// Bans each token that would complete a bad word. As in transformers, a word that is just an eos is none, and a
    /// word counts only once the text is as long as it.
    fn ban_bad_words(&self, tokens: &[u32], scores: &mut [f32]) -> Result<()> {
        for word in &self.bad_words_ids {
            match word.as_slice() {
                [token] if self.eos_token_ids.contains(token) => {}
                [token] => ban(scores, *token)?,
                [start @ .., last] if word.len() <= tokens.len() && tokens.ends_with(start) => {
                    ban(scores, *last)?
                }
                _ => {}
            }
        }
        Ok(())
    }
}
