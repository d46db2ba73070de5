//! Which settings make sense for a vocabulary.

use super::Sampling;
use crate::error::{Error, Result};
use std::fmt::Display;

/// Sums of weights, 2^40 at most each, stay below 2^63 for vocabularies smaller than this.
const MAX_N_VOCAB: usize = 1 << 23;

fn check(holds: bool, setting: &'static str, value: impl Display, expected: impl Display) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Setting { setting, value: value.to_string(), expected: expected.to_string() })
}

fn check_option(
    value: Option<f64>,
    holds: impl Fn(f64) -> bool,
    setting: &'static str,
    expected: &str,
) -> Result<()> {
    value.map_or(Ok(()), |value| check(holds(value), setting, value, expected))
}

impl Sampling {
    /// Checks every setting on its own for a vocabulary of `n_vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] with the setting, its value and its range.
    pub fn validate(&self, n_vocab: usize) -> Result<()> {
        check(0 < n_vocab && n_vocab < MAX_N_VOCAB, "n_vocab", n_vocab, "above 0 and below 2^23")?;
        let t = self.temperature;
        check(t > 0.0 && t.is_finite(), "temperature", t, "a finite number above 0")?;
        let from_0_to_1 = |p: f64| (0.0..=1.0).contains(&p);
        check_option(self.top_p, from_0_to_1, "top_p", "from 0 to 1")?;
        check_option(self.min_p, from_0_to_1, "min_p", "from 0 to 1")?;
        check_option(self.typical_p, |p| p > 0.0 && p <= 1.0, "typical_p", "above 0 and at most 1")?;
        let below_1 = |p: f64| (0.0..1.0).contains(&p);
        check_option(self.epsilon_cutoff, below_1, "epsilon_cutoff", "at least 0 and below 1")?;
        check_option(self.eta_cutoff, below_1, "eta_cutoff", "at least 0 and below 1")?;
        let r = self.repetition_penalty;
        check(r > 0.0 && r.is_finite(), "repetition_penalty", r, "a finite number above 0")?;
        for (setting, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            check(penalty.is_finite(), setting, penalty, "a finite number")?;
        }
        for &bias in self.logit_bias.values() {
            let holds = bias.is_finite() || bias == f64::NEG_INFINITY;
            check(holds, "logit_bias", bias, "a finite number or -inf")?;
        }
        let shortest = self.bad_words_ids.iter().map(Vec::len).min();
        check(shortest != Some(0), "bad_words_ids", "[]", "sequences of at least one token each")?;
        let bad = self.bad_words_ids.iter().flatten().map(|&id| ("bad_words_ids", id));
        let suppressed = self.suppress_tokens.iter().map(|&id| ("suppress_tokens", id));
        let biased = self.logit_bias.keys().map(|&id| ("logit_bias", id));
        bad.chain(suppressed).chain(biased).try_for_each(|(setting, id)| {
            check((id as usize) < n_vocab, setting, id, format_args!("token ids from 0 to {}", n_vocab - 1))
        })
    }
}
