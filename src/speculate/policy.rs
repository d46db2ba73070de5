//! How many tokens to propose: as many as are expected to pay, by what was accepted so far.
//!
//! Times are in plain passes over one row. A pass over the single rows of B texts takes `1 + (B - 1) r`, of which each
//! text's share is `s = (1 + (B - 1) r) / B`. A proposal adds a row, `r`, and from a draft model of `d` times the size
//! its share of a pass of that, `d s`. With the i-th proposal accepted at a rate `p_i` once those before it are, k
//! proposals give `G(k) = p_1 + p_1 p_2 + ... + p_1 ... p_k` tokens on top of one, so k is what minimises
//!
//! ```text
//! (s + k (r + d s)) / (1 + G(k))      time of a token
//! ```
//!
//! and 0 unless that is clearly less than `s`. Everything is counted and nothing is timed: a text is always written in
//! the same passes.

use super::lookup::{Guess, LONGEST_COUNTED};
use crate::model::Model;

/// What proposals of one text cost.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    /// s: a text's share of a plain pass.
    plain: f64,
    /// r: a row more.
    row: f64,
    /// d s: a drafted token.
    drafted: f64,
}

impl Costs {
    /// Bytes of weights from which they are taken to come from memory rather than from a cache.
    const STREAMED: usize = 32 << 20;
    /// r for weights of one byte that come from memory; a pass takes time by the byte, a row of it by the weight.
    /// (Measured on two cores of an AMD EPYC with GPT-2 124M and up to 16 rows: 0.02 to 0.05 in float32, 0.03 to 0.13
    /// in bfloat16.)
    const ROW: f64 = 0.2;
    /// How much cheaper the pass is, and so how much dearer the row, where weights come from a cache. (0.3 to 0.4 a row
    /// with 6 MB of bfloat16.)
    const CACHED: f64 = 4.0;

    /// Costs in a batch of `n_texts`, of which all may get proposals.
    pub fn of(model: &Model, draft: Option<&Model>, n_texts: usize) -> Costs {
        let bytes = model.weights().bytes();
        let per_weight = bytes as f64 / model.config().num_parameters(false) as f64;
        let slow_down = if bytes < Costs::STREAMED { Costs::CACHED } else { 1.0 };
        let row = (Costs::ROW * slow_down / per_weight).min(1.0);
        let plain = (1.0 + (n_texts as f64 - 1.0) * row) / n_texts as f64;
        let size = draft.map_or(0.0, |draft| draft.weights().bytes() as f64 / bytes as f64);
        Costs { plain, row, drafted: size * plain }
    }

    /// The number of proposals that is expected to be fastest, given the rate at which each is accepted.
    fn fastest(self, rates: impl Iterator<Item = f64>) -> usize {
        /// A gain that is expected to be less is left: rates and costs are estimates.
        const MARGIN: f64 = 0.97;
        let (mut best, mut least) = (0, MARGIN * self.plain);
        let (mut accepted, mut tokens) = (1.0, 1.0);
        for (i, rate) in rates.enumerate() {
            accepted *= rate;
            tokens += accepted;
            let time = (self.plain + (i + 1) as f64 * (self.row + self.drafted)) / tokens;
            if time < least {
                (best, least) = (i + 1, time);
            }
        }
        best
    }
}

/// How often proposals of a kind were accepted, of late.
#[derive(Clone, Copy, Debug)]
struct Rate {
    hits: f64,
    tries: f64,
}

impl Rate {
    /// A first guess, which counts as much as two tries.
    fn guessed(rate: f64) -> Rate {
        Rate { hits: 2.0 * rate, tries: 2.0 }
    }

    fn observe(&mut self, hit: bool) {
        /// The last 30 tries or so count.
        const KEPT: f64 = 0.97;
        self.hits = KEPT * self.hits + f64::from(u8::from(hit));
        self.tries = KEPT * self.tries + 1.0;
    }

    fn get(self) -> f64 {
        self.hits / self.tries
    }
}

/// Rates of lookups, by the length of the match: the longer, the surer. A guess is compared with what came also where
/// none of it was proposed, so that it costs nothing to learn when lookups begin to pay.
#[derive(Debug)]
pub struct LookupPolicy {
    /// Of matches of 1 to `LONGEST_COUNTED` tokens, or more.
    rates: [Rate; LONGEST_COUNTED],
}

impl Default for LookupPolicy {
    fn default() -> LookupPolicy {
        LookupPolicy { rates: std::array::from_fn(|i| Rate::guessed((i + 1) as f64 / (i + 3) as f64)) }
    }
}

impl LookupPolicy {
    /// How many tokens of the guess to propose, `most` at most.
    pub fn length(&self, guess: &Guess, most: usize, costs: Costs) -> usize {
        let rates = (0..guess.tokens.len().min(most)).map(|i| self.rates[class(guess, i)].get());
        costs.fastest(rates)
    }

    /// Takes in which tokens came.
    pub fn observe(&mut self, guess: &Guess, came: impl Iterator<Item = u32>) {
        for (i, (&guessed, came)) in guess.tokens.iter().zip(came).enumerate() {
            self.rates[class(guess, i)].observe(guessed == came);
            if guessed != came {
                break;
            }
        }
    }
}

/// Each token of a guess that came makes the match longer by one.
fn class(guess: &Guess, i: usize) -> usize {
    (guess.matched + i).min(LONGEST_COUNTED) - 1
}

/// Rate of a draft model. Where it does not pay it rests, and then tries one token: after 8 passes, 16, 32 and so on.
#[derive(Debug)]
pub struct DraftPolicy {
    rate: Rate,
    /// Passes to go without it.
    rest: usize,
    /// Those after the next try, if that fails.
    next_rest: usize,
}

impl DraftPolicy {
    const FIRST_REST: usize = 8;
    const LONGEST_REST: usize = 512;

    /// How many tokens to draft, `most` at most.
    pub fn length(&mut self, most: usize, costs: Costs) -> usize {
        let rate = self.rate.get();
        let length = costs.fastest((0..most).map(|_| rate));
        // One that would not pay if it were always right is not tried again.
        if length > 0 || costs.fastest((0..most).map(|_| 1.0)) == 0 {
            return length;
        }
        if self.rest > 0 {
            self.rest -= 1;
            return 0;
        }
        self.rest = self.next_rest;
        self.next_rest = (2 * self.next_rest).min(DraftPolicy::LONGEST_REST);
        1
    }

    /// Takes in that of `drafted` tokens the first `accepted` came.
    pub fn observe(&mut self, drafted: usize, accepted: usize) {
        for _ in 0..accepted {
            self.rate.observe(true);
        }
        if accepted < drafted {
            self.rate.observe(false);
        }
        if accepted > 0 {
            (self.rest, self.next_rest) = (0, DraftPolicy::FIRST_REST);
        }
    }
}

impl Default for DraftPolicy {
    fn default() -> DraftPolicy {
        let (rest, next_rest) = (DraftPolicy::FIRST_REST, 2 * DraftPolicy::FIRST_REST);
        DraftPolicy { rate: Rate::guessed(0.7), rest, next_rest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Costs = Costs { plain: 1.0, row: 0.1, drafted: 0.0 };

    /// The time of a token by the formula above, for rates that are all alike.
    fn time(costs: Costs, rate: f64, k: usize) -> f64 {
        let tokens: f64 = (0..=k).map(|i| rate.powi(i as i32)).sum();
        (costs.plain + k as f64 * (costs.row + costs.drafted)) / tokens
    }

    #[test]
    fn the_length_is_the_fastest_one() {
        for drafted in [0.0, 0.05, 0.3] {
            for rate in [0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0] {
                let costs = Costs { drafted, ..ALONE };
                let found = costs.fastest((0..20).map(|_| rate));
                let fastest = (0..=20).map(|k| time(costs, rate, k)).fold(f64::INFINITY, f64::min);
                let expected = if fastest < 0.97 { fastest } else { 1.0 };
                assert!((time(costs, rate, found) - expected).abs() < 1e-12, "{drafted}, {rate}: {found}");
            }
        }
        assert_eq!(ALONE.fastest((0..20).map(|_| 1.0)), 20);
        assert_eq!(ALONE.fastest((0..20).map(|_| 0.1)), 0);
        // In a batch the weights are read for all, so that a row costs as much as it does alone, and a plain token less.
        let shared = Costs { plain: 0.2, ..ALONE };
        assert!(shared.fastest((0..20).map(|_| 0.6)) < ALONE.fastest((0..20).map(|_| 0.6)));
    }

    /// What is proposed on a text whose guesses fail is little, and each kind of guess is learnt by itself.
    #[test]
    fn lookups_that_fail_are_no_longer_proposed() {
        let mut policy = LookupPolicy::default();
        let guess = |matched| Guess { tokens: vec![7; 11], matched };
        let mut proposed = 0;
        for _ in 0..1000 {
            proposed += policy.length(&guess(1), 10, ALONE);
            policy.observe(&guess(1), [8].into_iter());
        }
        assert!(proposed < 30, "{proposed}");
        assert!(policy.length(&guess(5), 10, ALONE) > 0);
        // What was only compared counts.
        for _ in 0..60 {
            policy.observe(&guess(1), [7; 11].into_iter());
        }
        assert_eq!(policy.length(&guess(1), 10, ALONE), 10);
        assert_eq!(policy.length(&guess(1), 3, ALONE), 3);
    }

    #[test]
    fn a_draft_that_fails_is_tried_rarely_and_one_that_is_right_comes_back() {
        let costs = Costs { drafted: 0.2, ..ALONE };
        let mut policy = DraftPolicy::default();
        let mut drafted = 0;
        for _ in 0..1000 {
            let length = policy.length(10, costs);
            policy.observe(length, 0);
            drafted += length;
        }
        assert!((6..40).contains(&drafted), "{drafted}");
        let passes = (0..10_000).take_while(|_| {
            let length = policy.length(10, costs);
            policy.observe(length, length);
            length < 10
        });
        assert!(passes.count() < 1000);
        let as_large = Costs { drafted: 1.0, ..ALONE };
        assert_eq!((0..100).map(|_| DraftPolicy::default().length(10, as_large)).sum::<usize>(), 0);
    }
}
