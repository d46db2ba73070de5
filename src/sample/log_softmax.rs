//! The model's own log-probabilities.

use super::peaks;
use crate::ops::softmax;
use crate::simd::{Isa, in_default_mode};

/// What turns a logit of one row into a log-probability.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax {
    max: f32,
    /// ln of the sum of exp(logit - max)
    log_sum: f64,
}

impl LogSoftmax {
    /// Of logits (V,), the greatest of which is `max`. NaN counts as -inf.
    ///
    /// The exponentials are float32, their sum float64 in sixteen lanes and one fixed order, so that every machine
    /// gives the same bits.
    pub fn of(isa: Isa, logits: &[f32], max: f32) -> LogSoftmax {
        let mut exps = [0.0f32; 1024];
        let mut lanes = [0.0f64; 16];
        for logits in logits.chunks(exps.len()) {
            let exps = &mut exps[..logits.len()];
            for (exp, &logit) in exps.iter_mut().zip(logits) {
                *exp = (logit - max).max(f32::NEG_INFINITY);
            }
            softmax::exp(isa, exps);
            let (rows, rest) = exps.as_chunks::<16>();
            for row in rows {
                for (lane, &exp) in lanes.iter_mut().zip(row) {
                    *lane += f64::from(exp);
                }
            }
            for (lane, &exp) in lanes.iter_mut().zip(rest) {
                *lane += f64::from(exp);
            }
        }
        LogSoftmax { max, log_sum: libm::log(lanes.iter().sum()) }
    }

    /// The log-probability of a token with this logit.
    pub fn at(self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.max) - self.log_sum) as f32
    }
}

/// ln p(`token`) under the softmax of `logits` (V,).
///
/// Within `(E + 6) * 2^-23 + |result| * 2^-24` of the exact value, where E, the mean of `max - logit` under these
/// probabilities, is at most ln V: 2e-6 for GPT-2. NaN counts as -inf; the result is NaN when no logit is finite.
///
/// # Panics
/// When `token` is not below V.
pub fn log_softmax_at(isa: Isa, logits: &[f32], token: u32) -> f32 {
    let logit = logits[token as usize];
    in_default_mode(|| {
        let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
        LogSoftmax::of(isa, logits, peaks::max(logits)).at(logit)
    })
}
