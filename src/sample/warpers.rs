//! Settings that narrow the distribution when sampling, and the draw from it.
//!
//! Equal to Hugging Face transformers' warpers (`generation/logits_process.py`), in the order in which its `generate`
//! applies them. Weights are integers, so that a sum is the same in any order, on any machine.

use super::Sampling;
use super::peaks::{self, Peaks, descending};
use crate::ops::softmax;
use crate::simd::Isa;

/// Fractional bits of a weight: the most likely token weighs 2^40, and one less than 2^-41 as likely weighs nothing.
const WEIGHT_BITS: u32 = 40;

/// A float64 from here to 2^53 holds an integer in its low bits: adding this rounds, and becomes vector instructions.
const TWO_52: f64 = (1u64 << 52) as f64;

/// `exp` (0 to 1) in units of 2^-40, to nearest even.
fn weight(exp: f32) -> u64 {
    (f64::from(exp) * (1u64 << WEIGHT_BITS) as f64 + TWO_52).to_bits() - TWO_52.to_bits()
}

/// The least integer that is not below `fraction * total`, `fraction` (0 to 1) taken in units of 2^-63.
fn share(total: u64, fraction: f64) -> u64 {
    let units = (fraction.min(1.0) * (1u64 << 63) as f64) as u64;
    ((u128::from(units) * u128::from(total)).div_ceil(1 << 63)) as u64
}

/// Something with a weight, the sooner the lesser its key.
#[derive(Clone, Copy, Debug)]
pub struct Ranked {
    key: u64,
    weight: u64,
}

/// The key at which the weights, taken by ascending key, first sum to `mass` (1 to the sum of all). What is in `ranked`
/// is lost. A radix search: nothing is sorted, and the order of equal keys makes no difference.
fn key_at_mass(ranked: &mut Vec<Ranked>, mut mass: u64) -> u64 {
    const RADIX_BITS: u32 = 10;
    loop {
        let keys = || ranked.iter().map(|entry| entry.key);
        let (low, high) = keys().fold((u64::MAX, 0), |(low, high), key| (low.min(key), high.max(key)));
        if low >= high {
            return low;
        }
        let digits = (high - low).ilog2() + 1;
        let shift = digits.saturating_sub(RADIX_BITS);
        let bucket_of = |entry: &Ranked| ((entry.key - low) >> shift) as usize;
        let mut sums = [0u64; 1 << RADIX_BITS];
        for entry in ranked.iter() {
            sums[bucket_of(entry)] += entry.weight;
        }
        let mut bucket = 0;
        while sums[bucket] < mass {
            mass -= sums[bucket];
            bucket += 1;
        }
        ranked.retain(|entry| bucket_of(entry) == bucket);
    }
}

/// Room for one draw, used again by the next.
#[derive(Debug, Default)]
pub struct Room {
    ids: Vec<u32>,
    exps: Vec<f32>,
    ranked: Vec<Ranked>,
}

/// The tokens that may still be drawn, by ascending id.
pub struct Candidates<'r> {
    /// (V,) after the processors
    scores: &'r [f32],
    max: f32,
    /// 1 / temperature
    scale: f32,
    /// Whether every token is a candidate; `ids` is then empty.
    all: bool,
    ids: &'r mut Vec<u32>,
    /// exp((score - max) / temperature) of each candidate
    exps: &'r mut Vec<f32>,
    ranked: &'r mut Vec<Ranked>,
    /// Sum of the candidates' weights; at least 1.
    total: u64,
}

/// (score - max) / temperature; NaN becomes -inf.
fn scaled(score: f32, max: f32, scale: f32) -> f32 {
    ((score - max) * scale).max(f32::NEG_INFINITY)
}

impl<'r> Candidates<'r> {
    /// What the settings leave of the scores (V,), the greatest of which is finite. `peaks` has measured them.
    pub fn new(
        settings: &Sampling,
        isa: Isa,
        scores: &'r [f32],
        peaks: &mut Peaks,
        room: &'r mut Room,
    ) -> Candidates<'r> {
        let Room { ids, exps, ranked } = room;
        let max = peaks.max();
        // In a range in which a difference of 0 stays 0 and one of -inf stays -inf, whatever the temperature.
        let scale = f32::MIN_POSITIVE.max((1.0 / settings.temperature) as f32).min(f32::MAX);
        let top_k = settings.top_k.filter(|&k| 0 < k && k < scores.len());
        exps.clear();
        if let Some(k) = top_k {
            peaks.best(scores, k, ids);
            exps.extend(ids.iter().map(|&id| scaled(scores[id as usize], max, scale)));
        } else {
            ids.clear();
            exps.extend(scores.iter().map(|&score| scaled(score, max, scale)));
        }
        softmax::exp(isa, exps);
        let mut candidates =
            Candidates { scores, max, scale, all: top_k.is_none(), ids, exps, ranked, total: 0 };
        candidates.sum();
        candidates.narrow(settings);
        candidates
    }

    fn narrow(&mut self, settings: &Sampling) {
        if let Some(top_p) = settings.top_p.filter(|&p| p < 1.0) {
            self.top_p(top_p);
        }
        if let Some(min_p) = settings.min_p {
            self.retain_weight(share(1 << WEIGHT_BITS, min_p));
        }
        if let Some(typical_p) = settings.typical_p.filter(|&p| p < 1.0) {
            self.typical(typical_p);
        }
        if let Some(epsilon) = settings.epsilon_cutoff.filter(|&e| e > 0.0) {
            self.cut_off(epsilon);
        }
        if let Some(epsilon) = settings.eta_cutoff.filter(|&e| e > 0.0) {
            // exp(-entropy) is exp(mean logarithm of the unnormalised probabilities) / their sum.
            let mean = self.mean_log() as f64 * LOG_UNIT.recip();
            let sum = self.total as f64 / (1u64 << WEIGHT_BITS) as f64;
            self.cut_off(epsilon.min(epsilon.sqrt() * libm::exp(mean) / sum));
        }
    }

    fn sum(&mut self) {
        self.total = self.exps.iter().map(|&exp| weight(exp)).sum();
    }

    /// Keeps the candidates for which `keep(id, weight)` holds; one of them must have a weight.
    fn retain(&mut self, mut keep: impl FnMut(u32, u64) -> bool) {
        self.list_ids();
        let mut kept = 0;
        for candidate in 0..self.ids.len() {
            let (id, exp) = (self.ids[candidate], self.exps[candidate]);
            (self.ids[kept], self.exps[kept]) = (id, exp);
            kept += usize::from(keep(id, weight(exp)));
        }
        self.ids.truncate(kept);
        self.exps.truncate(kept);
        self.sum();
    }

    /// Keeps the candidates that weigh `least` or more: one of them must.
    fn retain_weight(&mut self, least: u64) {
        const BLOCK: usize = 64;
        if !self.all {
            return self.retain(|_, weight| weight >= least);
        }
        // Few of a whole vocabulary stay as a rule, so blocks without any are passed over.
        self.ids.resize(self.exps.len(), 0);
        let mut kept = 0;
        for start in (0..self.exps.len()).step_by(BLOCK) {
            let block = start..self.exps.len().min(start + BLOCK);
            let heaviest = peaks::max(&self.exps[block.clone()]);
            if weight(heaviest) < least {
                continue;
            }
            for id in block {
                let exp = self.exps[id];
                (self.ids[kept], self.exps[kept]) = (id as u32, exp);
                kept += usize::from(weight(exp) >= least);
            }
        }
        self.ids.truncate(kept);
        self.exps.truncate(kept);
        self.all = false;
        self.sum();
    }

    fn list_ids(&mut self) {
        if self.all {
            self.ids.extend(0..self.scores.len() as u32);
            self.all = false;
        }
    }

    /// Nucleus sampling (Holtzman et al. 2020): keeps a token when those ranked before it (by descending score, then
    /// ascending id) weigh less than `top_p` of all; always the first.
    fn top_p(&mut self, top_p: f64) {
        let mass = share(self.total, top_p).max(1);
        // A token so light that all together, were they no heavier, fit into what is cut off, is cut off: it and those
        // after it weigh no more than that, so those before it weigh `mass` or more.
        let too_light = (self.total - mass) / self.exps.len() as u64;
        self.retain_weight(too_light + 1);
        let scores = self.scores;
        let key = |id: u32| u64::from(descending(scores[id as usize])) << 32 | u64::from(id);
        let last = self.key_at_mass(key, mass);
        self.retain(|id, _| key(id) <= last);
    }

    /// Locally typical sampling (Meister et al. 2023): keeps the tokens whose log-probability is nearest to its mean,
    /// until they weigh `typical_p` of all, and those that tie with the last of them.
    fn typical(&mut self, typical_p: f64) {
        self.retain_weight(1);
        let mean = self.mean_log();
        let (scores, max, scale) = (self.scores, self.max, self.scale);
        let key = |id: u32| log_units(scaled(scores[id as usize], max, scale)).abs_diff(mean);
        let last = self.key_at_mass(key, share(self.total, typical_p));
        self.retain(|id, _| key(id) <= last);
    }

    /// Keeps the tokens of probability `epsilon` or more (Hewitt et al. 2022), and always those of the greatest score.
    fn cut_off(&mut self, epsilon: f64) {
        let least = share(self.total, epsilon);
        let scores = self.scores;
        let best = self.exps.iter().copied().fold(0.0, f32::max);
        // Different scores may have one exponential, so the greatest score is looked for, among the best of those.
        let ids = (0..self.exps.len()).filter(|&candidate| self.exps[candidate] == best);
        let greatest =
            ids.map(|candidate| scores[self.id(candidate) as usize]).fold(f32::NEG_INFINITY, f32::max);
        self.retain(|id, weight| weight >= least || scores[id as usize] == greatest);
    }

    /// The mean of (score - max) / temperature under the candidates' weights, in units of 1 / [`LOG_UNIT`].
    fn mean_log(&self) -> i64 {
        let logs = (0..self.exps.len()).map(|candidate| {
            let score = self.scores[self.id(candidate) as usize];
            let weight = i128::from(weight(self.exps[candidate]));
            if weight == 0 { 0 } else { weight * i128::from(log_units(scaled(score, self.max, self.scale))) }
        });
        logs.sum::<i128>().div_euclid(i128::from(self.total)) as i64
    }

    fn key_at_mass(&mut self, key: impl Fn(u32) -> u64, mass: u64) -> u64 {
        self.ranked.clear();
        let candidates = self.ids.iter().zip(self.exps.iter());
        self.ranked.extend(candidates.map(|(&id, &exp)| Ranked { key: key(id), weight: weight(exp) }));
        key_at_mass(self.ranked, mass)
    }

    fn id(&self, candidate: usize) -> u32 {
        if self.all { candidate as u32 } else { self.ids[candidate] }
    }

    /// The id that the inverse of the cumulative distribution, ids ascending, has at `bits` / 2^64.
    pub fn draw(&self, bits: u64) -> u32 {
        const BLOCK: usize = 512;
        let mut target = ((u128::from(bits) * u128::from(self.total)) >> 64) as u64;
        for (block, exps) in self.exps.chunks(BLOCK).enumerate() {
            let sum = exps.iter().map(|&exp| weight(exp)).sum::<u64>();
            if target >= sum {
                target -= sum;
                continue;
            }
            for (offset, &exp) in exps.iter().enumerate() {
                let weight = weight(exp);
                if target < weight {
                    return self.id(block * BLOCK + offset);
                }
                target -= weight;
            }
        }
        unreachable!("the target is below the sum of the weights")
    }

    /// The probability of each candidate with its id.
    pub fn probabilities(&self) -> impl Iterator<Item = (u32, f64)> {
        let total = self.total as f64;
        self.exps
            .iter()
            .enumerate()
            .map(move |(candidate, &exp)| (self.id(candidate), weight(exp) as f64 / total))
    }
}

/// Units in which logarithms are integers, so that a mean of them is exact.
const LOG_UNIT: f64 = (1u64 << 32) as f64;

/// `log` (above -2^19) in units of 1 / [`LOG_UNIT`], to nearest even; as [`weight`], with room for either sign.
fn log_units(log: f32) -> i64 {
    const MIDDLE: f64 = 1.5 * TWO_52;
    (f64::from(log) * LOG_UNIT + MIDDLE).to_bits() as i64 - MIDDLE.to_bits() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_are_rounded_up_from_exact_products() {
        assert_eq!(share(10, 0.5), 5);
        assert_eq!(share(11, 0.5), 6);
        assert_eq!(share(1 << 40, 0.25), 1 << 38);
        assert_eq!(share((1 << 40) + 1, 0.25), (1 << 38) + 1);
        assert_eq!(share(u64::MAX, 1.0), u64::MAX);
        assert_eq!(share(u64::MAX, 0.0), 0);
    }

    #[test]
    fn weights_are_rounded_to_even() {
        let unit = 2f32.powi(-40);
        let cases = [(0.0, 0), (0.5, 0), (0.75, 1), (1.0, 1), (1.5, 2), (2.5, 2), (3.5, 4)];
        for (units, expected) in cases {
            assert_eq!(weight(units * unit), expected, "{units}");
        }
        assert_eq!(weight(1.0), 1 << 40);
    }

    #[test]
    fn a_draw_is_the_inverse_of_the_distribution_to_the_last_bit() {
        let settings = Sampling { do_sample: true, ..Sampling::default() };
        let isa = Isa::available()[0];
        // Four equal tokens, others between them without a weight; 700 more put them into two blocks.
        let mut scores = vec![f32::NEG_INFINITY; 705];
        let ids = [1, 3, 600, 704];
        ids.iter().for_each(|&id| scores[id] = 0.5);
        let (mut peaks, mut room) = (Peaks::default(), Room::default());
        peaks.measure(&scores);
        let candidates = Candidates::new(&settings, isa, &scores, &mut peaks, &mut room);
        for (quarter, &id) in ids.iter().enumerate() {
            let first = (quarter as u64) << 62;
            assert_eq!(candidates.draw(first), id as u32);
            assert_eq!(candidates.draw(first + ((1 << 62) - 1)), id as u32);
        }
    }

    proptest! {
        #[test]
        fn key_at_mass_is_where_a_sorted_sum_reaches_it(
            mut entries in prop::collection::vec((any::<u64>(), 0u64..1000), 1..300),
            shift in 0u32..64,
            part in 0.0f64..=1.0,
        ) {
            entries.iter_mut().for_each(|(key, _)| *key >>= shift);
            entries[0].1 += 1;
            let total: u64 = entries.iter().map(|(_, weight)| weight).sum();
            let mass = share(total, part).max(1);
            let mut ranked: Vec<Ranked> = entries.iter().map(|&(key, weight)| Ranked { key, weight }).collect();
            entries.sort_unstable();
            let mut sum = 0;
            let expected = entries.iter().find(|(_, weight)| {
                sum += weight;
                sum >= mass
            });
            prop_assert_eq!(key_at_mass(&mut ranked, mass), expected.unwrap().0);
        }
    }
}
